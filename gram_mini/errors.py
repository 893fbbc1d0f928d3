"""One way to tell a user what is wrong: raise UserError, and the script ends with one clear line."""

from __future__ import annotations

import sys
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@contextmanager
def clear_errors():
    """Turn a UserError into one line on standard error and exit status 2; anything else is a bug and shows as one."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: no run folder was written or replaced", file=sys.stderr)
        sys.exit(130)
