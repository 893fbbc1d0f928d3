"""Errors that a user can put right: gram_mini/runs/ending.py turns them into one clear line."""


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""


class Interrupted(Exception):
    """A run has stopped because it was asked to. The message says how to go on."""


def last_line(error: Exception) -> str:
    """The last line of an error's text that is not empty, or its type."""
    return _lines(error)[-1]


def first_line(error: Exception) -> str:
    """The first such line."""
    return _lines(error)[0]


def _lines(error: Exception) -> list[str]:
    lines = [line.strip() for line in str(error).splitlines()]
    return [line for line in lines if line] or [type(error).__name__]
