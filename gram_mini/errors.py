"""How a user is told what is wrong: raise UserError, and the script ends with one clear line.

gram_mini/runs/ending.py turns these exceptions into that line.
"""


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


class Interrupted(Exception):
    """A run was asked to stop and has stopped in good order. The message says how to go on."""


def last_line(error: Exception) -> str:
    """The last line of an error's text that is not empty, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
