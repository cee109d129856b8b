"""`dmsa doctor`: look at a data root and say what is there, what is missing and where it comes from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmsa.config import DataConfig
from dmsa.data import SPLITS, build
from dmsa.data.listing import few
from dmsa.data.sources import FILE_SETS, SPLIT_IMAGES, items


@dataclass(frozen=True)
class Split:
    """What a split would be: its images and labels, or the error that stands in the way."""

    name: str
    images: int
    """Images that can be used; 0 where there is an error."""
    official: int | None
    """Images of the official release."""
    labels_from: str | None
    error: str | None
    broken: list[str]
    """Images and labels that cannot be decoded or hold unknown ids, with the reason; empty unless asked for."""


@dataclass(frozen=True)
class Finding:
    """A data set: lines about its files, and its splits."""

    name: str
    files: list[dict[str, Any]]
    splits: list[Split]

    @property
    def usable(self) -> bool:
        """Whether both splits can be built and nothing that was decoded is broken."""
        return not self.bad_splits

    @property
    def bad_splits(self) -> list[str]:
        """Names of the splits that cannot be built or have broken files."""
        return [split.name for split in self.splits if split.error is not None or split.broken]

    @property
    def begun(self) -> bool:
        """Whether any of its files is there."""
        return any(file["count"] is not None for file in self.files)


def _broken(data: Any) -> list[str]:
    def check(index: int) -> str | None:
        try:
            data.raw(index)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(4) as pool:  # Pillow decodes without the interpreter's lock
        return [reason for reason in pool.map(check, range(data.images)) if reason is not None]


def examine(name: str, root: str | None, decode: bool = False) -> Finding:
    """Return what is to be said about data set `name` in `root`; nothing is written."""
    files = []
    if name in FILE_SETS and root is not None:
        for item in items(name, Path(root)):
            files.append(
                {
                    "path": str(item.path),
                    "what": item.what,
                    "count": item.count(),
                    "official": item.official,
                    "archive": item.archive,
                    "site": item.site,
                    "needed": item.needed,
                }
            )
    splits = []
    for split in SPLITS:
        official = SPLIT_IMAGES.get(name, {}).get(split)
        try:
            data = build(DataConfig(name=name, root=root), split)
        except (ValueError, OSError) as error:
            splits.append(Split(split, 0, official, None, str(error), []))
            continue
        broken = _broken(data) if decode else []
        splits.append(Split(split, data.images, official, data.labels_from, None, broken))
    return Finding(name, files, splits)


def _versus(count: int, official: int | None) -> str:
    if official is None:
        return ""
    return " (the official number)" if count == official else f" (officially {official})"


def _file_line(file: dict[str, Any]) -> str:
    count, official = file["count"], file["official"]
    if count is None:
        source = f"from {file['archive']}, {file['site']}" if file["archive"] != "-" else file["site"]
        state = "missing" if file["needed"] == "needed" else "absent"
        detail = f"{source} ({file['needed']})"
    else:
        state = "there"
        detail = f"{count}{_versus(count, official)}"
    return f"  {state:<8} {file['what']:<32} {file['path']}: {detail}"


def describe(finding: Finding) -> str:
    """Return a finding as text."""
    state = "usable" if finding.usable else f"NOT usable for {' and '.join(finding.bad_splits)}"
    lines = [f"{finding.name}: {state}"]
    lines += [_file_line(file) for file in finding.files]
    for split in finding.splits:
        if split.error is not None:
            lines.append(f"  {split.name:<5} unusable: {split.error}")
            continue
        labels = f"labels from {split.labels_from}" if split.labels_from else "no labels (cannot be scored)"
        lines.append(f"  {split.name:<5} {split.images} images{_versus(split.images, split.official)}, {labels}")
        if split.broken:
            lines.append(f"        {len(split.broken)} broken: {few(split.broken, 10)}")
    return "\n".join(lines)
