"""Writing files so that a reader never sees half of one, whenever the writer dies."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], *, consequence: str = "") -> Path:
    """Let `write(stream)` fill a temporary file beside `path`, force it to the disk, then rename it to `path`.

    Args:
        path: final name; its folder must exist.
        write: gets a binary stream.
        consequence: appended to the error message, e.g. what is still intact.

    Raises:
        OSError: with the same errno, naming the file and the reason; the temporary file is gone, `path` is as before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        reason = _os_error(error)
        if reason is None:
            raise
        raise cannot_write(path, reason, consequence) from error
    return path


def cannot_write(path: Path, reason: OSError, consequence: str = "") -> OSError:
    """Return an error with the errno of `reason` that names the file and says what to do about it."""
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EFBIG: "the file would exceed the size limit of this process",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "the folder is not writable",
    }.get(reason.errno or 0, os.strerror(reason.errno) if reason.errno else str(reason))
    return OSError(reason.errno or 0, f"could not write {path}: {advice}. {consequence}".strip())


def remove_leftovers(folder: str | Path) -> None:
    """Delete temporary files of writers that were killed."""
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def link_atomically(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source` (a copy where the file system has no links), replacing it."""
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(target, lambda stream: stream.write(source.read_bytes()))
        return
    os.replace(temporary, target)
    _sync_folder(target.parent)


def _os_error(error: BaseException) -> OSError | None:
    """Return the operating system's error behind `error`; torch wraps those of its writer in a RuntimeError."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
