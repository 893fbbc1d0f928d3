"""Errors that a user can put right: gram_mini/runs/ending.py turns them into one clear line."""


class UserError(Exception):
    """The message says what is wrong, where, and what to do."""


class Interrupted(Exception):
    """A run has stopped because it was asked to. The message says how to go on."""


def last_line(error: Exception) -> str:
    """The last line of an error's text that is not empty, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
