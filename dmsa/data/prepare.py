"""`dmsa prepare`: unpack the official archives into the layout that the data sets expect, and make the curated list.

Only what the data sets use is unpacked. Files are written beside their place and renamed, so that an interrupted run
leaves no half files; running again goes on where it stopped. Existing files are never touched without `--force`.
An archive is read from end to end before anything of it is written: names that lead out of the root are refused.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dmsa.data.coco import curated_file, is_curated, map_folders
from dmsa.data.images import read_mask
from dmsa.data.listing import list_files
from dmsa.data.sources import OFFICIAL_CURATED, OFFICIAL_MAPS, Archive

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class Member:
    """A file in an archive that goes to `target`."""

    source: str
    target: Path
    size: int


@dataclass(frozen=True)
class Unpacked:
    """What unpacking one archive did."""

    written: int
    """Files that were written."""
    present: int
    """Files that were there already, of the right size."""
    kept: list[str]
    """Files that were there with another size, and were left alone."""


def check_member(archive: Path, name: str) -> None:
    """Refuse a name that could lead out of the folder that the archive is unpacked into.

    Raises:
        ValueError: it is absolute, has a drive letter, a backslash or a `..`; the message names archive and member.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or (path.parts and ":" in path.parts[0]):
        raise ValueError(f"{archive} has a member {name!r} that leads out of its folder; nothing was unpacked from it")


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the archive's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{archive} cannot be read: {reason}; download it again") from error


def _target(spec: Archive, name: str, root: Path) -> Path | None:
    """Return where a member goes, `None` if it is not wanted."""
    name = name.removeprefix("./")
    for source, target in spec.parts:
        if name == source or (source.endswith("/") and name.startswith(source) and not name.endswith("/")):
            return root / (target + name[len(source) :])
    return None


def _check_end(opened: tarfile.TarFile) -> None:
    """Raise `EOFError` unless a block of zeros follows the last member: tarfile takes any broken header for the end."""
    stream = opened.fileobj
    stream.seek(opened.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise EOFError(f"it is cut off or broken at byte {opened.offset}")
    while stream.read(1 << 20):  # to the checksum of a compressed file
        pass


def list_members(archive: Path, spec: Archive, root: Path) -> list[Member]:
    """Return the members of `archive` that are wanted; every name in the archive is checked first.

    Raises:
        ValueError: a member leads out of the folder, or is wanted but no regular file; the archive cannot be read, or
            has nothing of what it should.
    """
    found, targets = [], set()
    with _reading(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                entries = [(i.filename, i.file_size, (i.external_attr >> 28) != 0xA) for i in opened.infolist()]
        else:
            with tarfile.open(archive) as opened:
                entries = [(i.name, i.size, i.isreg()) for i in opened if not i.isdir()]
                _check_end(opened)
    for name, size, regular in entries:
        check_member(archive, name)
        target = _target(spec, name, root)
        if target is None:
            continue
        if not regular:
            raise ValueError(
                f"{archive} has a member {name!r} that is a link or a device; nothing was unpacked from it"
            )
        if target in targets:
            raise ValueError(f"{archive} has two members for {target}; nothing was unpacked from it")
        targets.add(target)
        found.append(Member(name, target, size))
    if not found:
        raise ValueError(f"{archive} has none of {', '.join(s for s, _ in spec.parts)}: not the official archive?")
    return found


def _write(stream: IO[bytes], member: Member) -> None:
    member.target.parent.mkdir(parents=True, exist_ok=True)
    part = member.target.with_name(f".{member.target.name}.part")
    try:
        with open(part, "wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
        if part.stat().st_size != member.size:
            raise EOFError(f"member {member.source} is cut off")
        os.replace(part, member.target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def unpack(archive: Path, spec: Archive, root: Path, force: bool = False) -> Unpacked:
    """Unpack what is wanted of `archive` below `root`.

    Args:
        archive: zip or tar file, compressed or not.
        spec: what is wanted and where it goes.
        root: folder of the data set.
        force: replace files that are there already.

    Raises:
        ValueError: the archive is unsafe or cannot be listed (nothing is unpacked), or a member is broken (those before
            it are unpacked).
    """
    members = list_members(archive, spec, root)
    wanted: dict[str, Member] = {}
    kept = []
    for member in members:
        if force or not member.target.exists():
            wanted[member.source] = member
        elif not member.target.is_file() or member.target.stat().st_size != member.size:
            kept.append(str(member.target))
    if wanted:
        with _reading(archive):
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    for name in _progress(wanted, archive.name):
                        with opened.open(name) as stream:
                            _write(stream, wanted[name])
            else:
                with tarfile.open(archive) as opened:
                    for info in _progress(opened, archive.name):
                        content = opened.extractfile(info) if info.name in wanted else None
                        if content is not None:
                            _write(content, wanted[info.name])
    return Unpacked(len(wanted), len(members) - len(wanted) - len(kept), kept)


def _progress(work: Iterable[Any], description: str) -> Iterable[Any]:
    if not sys.stderr.isatty():
        return work
    from tqdm import tqdm

    return tqdm(work, desc=description, unit="file", leave=False)


def curate(root: Path, split: str, force: bool = False) -> str:
    """Make the curated list of `split` from its label maps and return a sentence about it.

    Raises:
        CorruptImageError: a map cannot be decoded.
        FileExistsError: there is another list already, and not `force`.
    """
    maps = map_folders(root, split)[0]
    names = [Path(name).stem for name in list_files(maps, (".png",), flat=True).files]
    with ThreadPoolExecutor(4) as pool:
        chosen = list(pool.map(lambda name: is_curated(read_mask(maps / f"{name}.png")), _progress(names, "curated")))
    text = "".join(f"{name}\n" for name, is_chosen in zip(names, chosen, strict=True) if is_chosen)
    path = curated_file(root, split)
    official = OFFICIAL_CURATED if len(names) == OFFICIAL_MAPS else None
    verdict = f"{sum(chosen)} of {len(names)} images"
    if official is not None:
        verdict += " (the official number)" if official == sum(chosen) else f" (OFFICIALLY {official})"
    if path.is_file():
        if path.read_text(encoding="utf-8") == text:
            return f"curated list {path}: {verdict}, as before"
        if not force:
            raise FileExistsError(f"{path} differs from the list that the maps give ({verdict}); --force replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return f"curated list {path}: {verdict}"
