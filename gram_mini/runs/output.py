"""Files and folders that are written whole or not at all.

``name`` is the option that names a file or folder, where it can be another than --out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gram_mini.errors import UserError

from filelock import FileLock, Timeout


def check_output(path: Path, overwrite: bool) -> None:
    """Check before the work begins that a file can be written.

    Raises:
        UserError: it is there and may not be replaced, or its folder cannot be written to.
    """
    if path.exists() and not overwrite:
        raise UserError(f"--out {path}: already there; give another file, or --overwrite")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--out {path}: give the name of a file in a folder that exists and can be written to"
        )


def write_whole(path: Path, parts: Iterable[str], name: str) -> None:
    """Write texts to a file under another name and rename it when it is complete.

    Raises:
        UserError: it cannot be written; an older file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def lock(path: Path) -> FileLock:
    """Keep other processes from writing a file or folder; a process that dies lets go of it.

    Raises:
        UserError: another process is writing it.
    """
    # A run that failed in this process, as in a notebook, does not bar the next one.
    held = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            f"--out {path}: another process is writing it; wait for it, stop it, or give another"
        ) from None
    return held


def unlock(held: FileLock) -> None:
    """Let go of a lock."""
    Path(held.lock_file).unlink(missing_ok=True)
    held.release(force=True)


def changes(saved: dict, now: dict) -> str:
    """Which settings are others now than the saved ones, in words; empty if none is."""
    return ", ".join(
        f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    )


def check_place(folder: Path, name: str) -> None:
    """Check before the work begins that a folder can be made.

    Raises:
        UserError: it, or the folder it would be made in, is a file or cannot be written to.
    """
    place = folder.absolute()
    above = next(place for place in (place, *place.parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(
            f"{name} {folder}: {above} is a file or cannot be written to; give another folder"
        )


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a complete folder to its final name; only then remove an older one of that name."""
    aside = None
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) / folder.name
        folder.rename(aside)
    partial.rename(folder)
    if aside:
        shutil.rmtree(aside.parent, ignore_errors=True)


def sampled_hash(head: bytes, files: list[Path]) -> str:
    """A hash of some bytes, and of the names, sizes and samples of files."""
    digest = hashlib.sha256(head)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            # 64 KiB at each of 256 places tell two models apart without reading 16 GB.
            for part in range(256):
                stream.seek(part * size // 256)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]
