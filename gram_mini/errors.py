"""One way to tell a user what is wrong: raise UserError, and the script ends with one clear line."""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@contextmanager
def clear_errors():
    """Turn what a user can put right into one line on standard error and exit status 2; a bug still shows as one."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; make room or choose another folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written or replaced", file=sys.stderr)
        sys.exit(130)
