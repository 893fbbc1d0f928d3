"""A file of lines that grows under another name, and can be gone on with after a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.output import changes, check_output, write_whole

from filelock import FileLock, Timeout


def check_partial(path: Path, overwrite: bool, resume: bool, name: str) -> None:
    """Check before the work begins that a file can be begun, or gone on with: see PartialFile.

    Raises:
        UserError: there is an unfinished one and neither ``resume`` nor ``overwrite`` is on, none
            to resume, or something else of its name.
    """
    partial, settings = partial_names(path)
    unfinished = partial.is_file() and settings.is_file()
    if resume and not unfinished:
        raise UserError(
            f"--resume: there is no unfinished {partial}; leave the option out to start one"
        )
    if unfinished and not (resume or overwrite):
        raise UserError(
            f"{name} {path}: unfinished, in {partial}; go on with --resume, or start anew with "
            "--overwrite"
        )
    if partial.is_dir() or partial.exists() and not (unfinished or overwrite):
        raise UserError(f"{partial}: is in the way and no unfinished file of ours; rename it")


def partial_names(path: Path) -> tuple[Path, Path]:
    """The names of the lines of an unfinished file, and of the settings they were made with."""
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")


class PartialFile:
    """A file whose lines are written as they come, as NAME.partial until it is complete.

    NAME.partial.json holds the settings that the lines were made with. ``settings`` must be equal
    to them for the file to go on; a change of ``noted`` is only said.

    Lines are kept or dropped a chunk at a time: :meth:`kept` gives those of the next chunk as long
    as they are there, then :meth:`add` appends.

    Raises:
        UserError: it cannot be written, another process writes it, it was begun with other
            settings (names them), or as check_output and check_partial.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        settings: dict,
        resume: bool,
        noted: dict,
        overwrite: bool = False,
    ):
        self.path, self.name = path, name
        self.partial, self._settings = partial_names(path)
        self.lines = 0  # in whole chunks
        self.dropped = 0  # lines of a chunk that was not whole
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{name} {path}: another process is writing it; wait for it or stop it, or give "
                f"another {name}"
            ) from None
        try:
            check_output(path, overwrite, name)  # another process may have written here until now
            check_partial(path, overwrite, resume, name)
            if resume:
                self._compare(settings, noted)
            else:
                # First, so that old lines never stand beside new settings.
                self.partial.unlink(missing_ok=True)
                write_whole(self._settings, [json.dumps({**settings, **noted}, indent=1)], name)
            self._file = open(self.partial, "r+b" if resume else "wb")
        except OSError as error:
            self._unlock()
            raise self._failed(error) from None
        except UserError:
            self._unlock()
            raise
        self._reading = resume

    def _compare(self, settings: dict, noted: dict) -> None:
        try:
            saved = json.loads(self._settings.read_text())
        except ValueError:
            raise UserError(
                f"{self._settings}: cannot be read; start anew with --overwrite"
            ) from None

        settings, noted = json.loads(json.dumps([settings, noted]))  # as they were saved
        if changed := changes(saved, settings):
            raise UserError(
                f"--resume: {self.partial} was begun otherwise: {changed}; give the same again, "
                "or start anew with --overwrite"
            )
        if changed := changes(saved, noted):
            print(f"--resume: {changed}; the last digits of what follows may be others for it")

    def kept(self, count: int) -> list[bytes] | None:
        """The next ``count`` lines, or None where they are not all there: then what there is of
        them is cut off, and whatever follows is to be added.
        """
        if not self._reading:
            return None
        begin = self._file.tell()
        lines = [self._file.readline() for _ in range(count)]
        if all(line.endswith(b"\n") for line in lines):
            self.lines += count
            return lines
        self._file.seek(begin)
        self._file.truncate()
        self.dropped = sum(map(bool, lines))
        self._reading = False
        return None

    def add(self, lines: list[str]) -> None:
        """Append the lines of a chunk; when this returns, they are on the disk."""
        try:
            self._file.write("".join(lines).encode("utf-8", "replace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None
        self.lines += len(lines)

    def finish(self) -> None:
        """Give the file its name."""
        try:
            if self._reading and self._file.read(1):
                raise UserError(f"{self.partial}: holds more lines than the data; use --overwrite")
            self._file.close()
            self.partial.replace(self.path)
            self._settings.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._unlock()

    def leave(self) -> None:
        """Let go of the file as it is; without a line it is removed."""
        try:
            self._file.close()
        except OSError:  # what could not be written is still in the buffer
            pass
        if not (self.lines or self._reading):
            self.partial.unlink(missing_ok=True)
            self._settings.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.name} {self.path}: cannot be written: {error.strerror}")
