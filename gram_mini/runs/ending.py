"""How a command ends: one line for what a user can put right, and an exit status."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager

from gram_mini.errors import Interrupted, UserError

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)

LESS_MEMORY = (
    "what helps: in training a smaller --batch-tokens, which gives the same result, "
    "--gradient-checkpointing, or a smaller --batch-size or --lora-rank; in scoring a smaller "
    "--batch-size; in both a shorter --max-length"
)


@contextmanager
def clear_errors():
    """Turn what a user can put right into one line on standard error and exit status 2.

    A bug still shows as a traceback. With the environment variable GRAM_DEBUG=1 everything does.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("GRAM_DEBUG"):
            raise
        _end(f"error: {error}", 2)
    except Interrupted as error:
        _end(f"interrupted: {error}", 130)
    except KeyboardInterrupt:
        _end("\ninterrupted: nothing was written since the last checkpoint, if there is one", 130)
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        _end(f"error: {line}", 2, alike=False)


def _end(line: str, status: int, alike: bool = True) -> None:
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not alike:  # of several processes that fail alike, one speaks
        print(line if rank == "0" else f"process {rank}: {line}", file=sys.stderr)
    sys.exit(status)


def _explain(error: Exception) -> str | None:
    """One line for what a machine ran out of or forbids, None for anything else."""
    text = str(error)
    reason = (text.splitlines() or [""])[0]
    refused = isinstance(error, OSError) and error.errno in FULL_OR_FORBIDDEN
    # What safetensors and torch make of an OSError is known by its text.
    if refused or "No space left on device" in text or "File too large" in text:
        return f"a file could not be read or written: {reason}; make room or choose another folder"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory ({reason.split('. ')[0]}); {LESS_MEMORY}, --bits 4"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory; {LESS_MEMORY}, --limit"
    return None
