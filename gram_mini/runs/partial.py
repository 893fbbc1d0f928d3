"""A file of lines that grows under another name, and can be gone on with after a stop."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.output import changes, check_output, lock, unlock, write_whole


def check_partial(path: Path, overwrite: bool, resume: bool) -> None:
    """Check before the work begins that a file can be begun, or gone on with: see PartialFile.

    Raises:
        UserError: as check_output; there is an unfinished one and neither ``resume`` nor
            ``overwrite`` is on, none to resume, or something else of its name.
    """
    check_output(path, overwrite)
    partial, state = partial_names(path)
    unfinished = partial.is_file() and state.is_file()
    if resume and not unfinished:
        raise UserError(
            f"--resume: there is no unfinished {partial}; leave the option out to start one"
        )
    if unfinished and not (resume or overwrite):
        raise UserError(
            f"--out {path}: unfinished, in {partial}; go on with --resume, or start anew with "
            "--overwrite"
        )
    if partial.is_dir() or partial.exists() and not (unfinished or overwrite):
        raise UserError(f"{partial}: is in the way and no unfinished file of ours; rename it")


def partial_names(path: Path) -> tuple[Path, Path]:
    """The names of the lines of an unfinished file, and of what is known about them."""
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")


class PartialFile:
    """A file whose lines are written a chunk at a time, as NAME.partial until it is complete.

    NAME.partial.json holds the settings that the lines were made with and how many chunks, lines
    and bytes are whole. ``settings`` must be equal for the file to go on; a change of ``noted`` is
    only said. What a stop has left of a chunk is cut off.

    Attributes:
        chunks, lines: how many are written.
        totals: what :meth:`add` was given with the last chunk; empty before the first.

    Raises:
        UserError: it cannot be written, another process writes it, it was begun with other
            settings (names them), or as check_partial.
    """

    def __init__(self, path: Path, settings: dict, noted: dict, resume: bool, overwrite=False):
        self.path = path
        self.partial, self._state = partial_names(path)
        self._settings = {"settings": settings, "noted": noted}
        self.chunks = self.lines = 0
        self.totals: dict = {}
        self._lock = lock(path)
        try:
            check_partial(path, overwrite, resume)  # another process may have written here
            size = self._saved() if resume else 0
            if not resume:
                # First, so that old lines never stand beside new settings.
                self.partial.unlink(missing_ok=True)
                self._save(0)
            self._file = open(self.partial, "r+b" if resume else "wb")
            self._file.seek(size)
            self._file.truncate()
        except BaseException:
            unlock(self._lock)
            raise

    def _saved(self) -> int:
        """Take over what an unfinished file says of itself; returns its whole bytes."""
        again = "start anew with --overwrite"
        try:
            saved = json.loads(self._state.read_text())
            self.chunks, self.lines = saved["chunks"], saved["lines"]
            self.totals, size = saved["totals"], saved["bytes"]
        except (ValueError, KeyError):
            raise UserError(f"{self._state}: cannot be read; {again}") from None
        now = json.loads(json.dumps(self._settings))  # as it was saved
        if changed := changes(saved["settings"], now["settings"]):
            raise UserError(
                f"--resume: {self.partial} was begun otherwise: {changed}; give the same again, "
                f"or {again}"
            )
        if changed := changes(saved["noted"], now["noted"]):
            print(f"--resume: {changed}; the last digits of what follows may be others for it")
        if self.partial.stat().st_size < size:
            raise UserError(f"{self.partial}: has lost lines that were written; {again}")
        return size

    def _save(self, size: int) -> None:
        whole = {"chunks": self.chunks, "lines": self.lines, "bytes": size, "totals": self.totals}
        write_whole(self._state, [json.dumps({**self._settings, **whole}, indent=1)], "--out")

    def add(self, lines: list[str], totals: dict) -> None:
        """Append the lines of a chunk; when this returns, they are on the disk.

        ``totals`` is what the caller wants to know again when the file is gone on with.
        """
        self._file.write("".join(lines).encode("utf-8", "replace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.chunks, self.lines, self.totals = self.chunks + 1, self.lines + len(lines), totals
        self._save(self._file.tell())

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        self.partial.replace(self.path)
        self._state.unlink()
        unlock(self._lock)

    def leave(self) -> None:
        """Let go of the file as it is; without a line it is removed."""
        with suppress(OSError):  # what could not be written is still in the buffer
            self._file.close()
        if not self.lines:
            self.partial.unlink(missing_ok=True)
            self._state.unlink(missing_ok=True)
        unlock(self._lock)
