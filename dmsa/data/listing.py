"""Files in a folder and lines in a list: what is there, and what was left out and why."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".jp2", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_JOINERS = "\u200c\u200d"  # invisible, but letters of several scripts need them


@dataclass(frozen=True)
class Listing:
    """The files of a folder."""

    folder: Path
    files: list[str]
    """Relative names with `/` between folders, sorted."""
    left_out: dict[str, list[str]]
    """Reason -> the names that it kept out, in a form that can be printed."""

    def notes(self) -> list[str]:
        """Return one sentence about what was left out, or nothing."""
        if not self.left_out:
            return []
        reasons = [f"{len(names)} {reason} ({few(names, 3)})" for reason, names in sorted(self.left_out.items())]
        return [f"left out of {self.folder}: {'; '.join(reasons)}"]


def list_files(folder: str | Path, suffixes: Sequence[str], *, flat: bool = False, skip: Sequence[str] = ()) -> Listing:
    """List the files of a folder, and what was left out of the list.

    Links are followed; a folder that is reached in two ways is listed once, under its own name if it has one here.

    Args:
        folder: where; a folder that does not exist is empty.
        suffixes: endings that are wanted, in lower case; files may have them in any case.
        flat: the folder is part of an official release: folders below do not count, and endings are in lower case.
        skip: relative names of files and folders that belong to something else, and are not spoken of.
    """
    folder = Path(folder)
    files: list[str] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    if not folder.is_dir():
        return Listing(folder, files, {})
    seen = set()
    folders = [""]
    links: list[str] = []
    while folders or links:
        inside = folders.pop() if folders else links.pop()
        try:
            state = os.stat(folder / inside)
            if (state.st_dev, state.st_ino) in seen:
                left_out["linked to a folder that is listed already"].append(inside.rstrip("/"))
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder / inside) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            left_out[f"that cannot be read: {error.strerror}"].append(inside.rstrip("/") or str(folder))
            continue
        for entry in found:
            name = inside + entry.name
            is_folder = _is(entry.is_dir)
            if name in skip or (is_folder and flat):
                continue
            if reason := _reason(entry, is_folder, suffixes, flat):
                left_out[reason].append(printable(name))
            elif is_folder:
                (links if entry.is_symlink() else folders).append(f"{name}/")
            else:
                files.append(name)
    return Listing(folder, sorted(files), {reason: sorted(names) for reason, names in left_out.items()})


def _reason(entry: os.DirEntry, is_folder: bool, suffixes: Sequence[str], exact: bool) -> str | None:
    """Return why an entry of a folder is left out, `None` if it is not."""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return "with a name that is not UTF-8"
    if any(unicodedata.category(c) == "Cc" for c in entry.name):
        return "with a control character in the name"
    if entry.name.startswith("."):
        return "hidden"
    if is_folder:
        return None
    suffix = os.path.splitext(entry.name)[1]
    if (suffix if exact else suffix.lower()) not in suffixes:
        return f"with the ending {suffix}" if suffix else "without an ending"
    if not _is(entry.is_file):
        return "linked to nothing" if entry.is_symlink() else "that are no files"
    return None


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself, or into a folder that is closed
        return False


def printable(name: str) -> str:
    """Return a file's name with escapes for what cannot be printed: bytes that are not UTF-8, control characters."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def by_stem(files: Sequence[str], folder: Path, what: str) -> dict[str, str]:
    """Return name without ending -> file; names are composed (NFC), since file systems differ in how they keep accents.

    Raises:
        ValueError: two files differ only by their ending; the first few are named.
    """
    names = [unicodedata.normalize("NFC", os.path.splitext(file)[0]) for file in files]
    stems = dict(zip(names, files, strict=True))
    if len(stems) < len(files):
        counts = Counter(names)
        twice = [file for name, file in zip(names, files, strict=True) if counts[name] > 1]
        raise ValueError(f"{what} in {folder} differ only by their ending, {few(twice)}: keep one of each")
    return stems


def few(items: Sequence[object], limit: int = 5) -> str:
    """Return the first `limit` items as text, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def require_files(what: str, wanted: Sequence[str], present: set[str], folder: Path, source: str) -> None:
    """Raise `FileNotFoundError` with the first few names and the counts unless all of `wanted` is in `present`."""
    missing = [name for name in wanted if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} {what} are missing in {folder}: {few(missing)}. {source}"
        )


def thin(items: list, limit: int | None) -> list:
    """Return `limit` items spread evenly over `items` (all of them if `limit` is None), in order.

    Raises:
        ValueError: `limit` is not positive.
    """
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"expected a positive number of images, got {limit=}")
    return [items[i * len(items) // limit] for i in range(limit)]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, without blanks around them and without empty ones at the end.

    UTF-8 with or without a byte order mark, UTF-16 with one; any line ends.

    Raises:
        ValueError: it holds something else, or characters that cannot be seen; the message names file and line.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = [line.strip() for line in content.decode(encoding).splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if strange := [c for c in line if unicodedata.category(c) in ("Cc", "Cf") and c not in _JOINERS and c != "\t"]:
            raise ValueError(
                f"{path} has an invisible character U+{ord(strange[0]):04X} in line {number}, {line!a}; remove it"
            )
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_list(path: Path) -> list[str]:
    """Return the first word of every non-empty line of a split list.

    Raises:
        ValueError: it is no text file, or names something twice.
    """
    names = [line.split()[0] for line in read_lines(path) if line]
    refuse_twice(names, path)
    return names


def refuse_twice(names: Sequence[str], path: Path, key: Callable[[str], str] = str) -> None:
    """Raise `ValueError` if a list names something twice; `key` is what counts as the same."""
    twice = [name for name, count in Counter(map(key, names)).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {few(twice)} twice; expected every name once")
