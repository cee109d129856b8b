"""Writing files: nothing is replaced unasked, and a reader never sees half of one, whenever the writer dies."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO


def claim_outputs(
    folder: str | Path,
    names: Iterable[str],
    *,
    inputs: Iterable[str | Path] = (),
    force: bool = False,
    remedy: str = "--force replaces, or choose another --out",
) -> list[Path]:
    """Make `folder` and return the files `names` in it, once it is known that writing them harms nothing.

    Args:
        folder: where to write; made if it does not exist.
        names: relative names of all files that will be written.
        inputs: files that are read, and must stay; `force` does not give them up.
        force: files that are there already may be replaced.
        remedy: what the user may do about those, for the message.

    Raises:
        ValueError: two outputs have the same name, or one is an input; nothing was made.
        FileExistsError: an output is there already, and not `force`; nothing was made.
        OSError: the folder cannot be made or written.
    """
    folder, names = Path(folder), list(names)
    paths = [folder / name for name in names]
    if twice := [str(path) for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"{_some(twice)}: several inputs would be written there; rename them, or take them one by one")
    real = Path(os.path.realpath(folder))  # `new/../photos` will be `photos` once `new` has been made
    there = {path: _identity(path) for path in (real / name for name in names) if os.path.lexists(path)}
    read = {_identity(path): path for path in inputs} if there else {}
    if eaten := [str(read[mark]) for mark in there.values() if mark is not None and mark in read]:
        raise ValueError(f"--out={str(folder)!r} would replace what is read: {_some(eaten)}; choose another folder")
    if wrong := [str(path) for path in there if path.is_dir()]:
        raise FileExistsError(f"{_some(wrong)}: a folder, where a file is to be written; choose another --out")
    if there and not force:
        raise FileExistsError(f"{_some(list(map(str, there)))}: there already; {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of this name" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(error.errno, f"--out={str(folder)!r} cannot be made: {reason}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"--out={str(folder)!r} is not writable; choose another")
    return paths


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return what two names of the same file share; `None` for a link that leads nowhere."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


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
