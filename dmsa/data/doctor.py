"""`dmsa doctor`: look at a data root and say what is there, what is missing and where it comes from."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from dmsa.config import DataConfig, DataName
from dmsa.data import SPLITS, build
from dmsa.data.base import IGNORE
from dmsa.data.images import oddities, orientation, upright_size
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
    left_out: list[str]
    """What was found beside the images and is not used, and why."""
    decoded: str | None
    """What decoding everything showed; `None` unless asked for."""
    unusual: list[str]
    """Unusual kinds of images, each with its number and the first few; empty unless asked for."""
    broken: list[str]
    """Images and labels that cannot be decoded or hold unknown ids, with the reason; empty unless asked for."""


@dataclass(frozen=True)
class Finding:
    """A data set: lines about its files, and its splits."""

    name: str
    files: list[dict[str, Any]]
    classes: list[str]
    """Names in the order of the ids, each of the user's own with its kind."""
    splits: list[Split]
    shared: int
    """Images that are in both splits."""

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


@dataclass(frozen=True)
class _Seen:
    """What decoding one image and its label showed."""

    name: str
    error: str | None = None
    size: tuple[int, int] | None = None
    ids: np.ndarray | None = None
    """Pixels by id, int64 `[256]`."""
    odd: tuple[str, ...] = ()


def _look(data: Any, index: int) -> _Seen:
    name = data.image_name(index)
    try:
        pixels, label = data.raw(index)
        odd = []
        opened = data.open(index)
        if isinstance(opened, Image.Image):
            with opened:
                odd = oddities(opened)
                if upright_size(opened) != pixels.shape[:2]:
                    odd[0] = f"on their side (EXIF orientation {orientation(opened)}), and so are their labels"
    except (ValueError, OSError) as error:
        return _Seen(name, str(error))
    ids = None if label is None else np.bincount(label.ravel(), minlength=256)
    return _Seen(name, None, pixels.shape[:2], ids, tuple(odd))


def _decode(data: Any) -> tuple[str, list[str], list[str]]:
    """Decode everything; return what was decoded in a sentence, what is unusual, and what is broken."""
    with ThreadPoolExecutor(4) as pool:  # Pillow decodes without the interpreter's lock
        seen = list(pool.map(lambda index: _look(data, index), range(data.images)))
    broken = [look.error for look in seen if look.error is not None]
    good = [look for look in seen if look.error is None]
    if not good:
        return f"decoded none of {len(seen)} images", [], broken
    sizes = [look.size for look in good if look.size is not None]
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    summary = f"decoded {len(good)} images of {'{} x {}'.format(*smallest)} to {'{} x {}'.format(*largest)} pixels"
    odd = defaultdict(list)
    for look in good:
        for what in look.odd:
            odd[what].append(look.name)
    ids = sum(look.ids for look in good if look.ids is not None)
    if not isinstance(ids, int):
        occur = np.flatnonzero(ids[: data.num_classes])
        absent = [name for k, name in enumerate(data.classes) if not ids[k]]
        summary += f"; {len(occur)} of {data.num_classes} classes occur in their labels"
        summary += f" (not {few(absent, 3)})" if absent and len(occur) else ""
        summary += f", {100 * ids[IGNORE] / ids.sum():.1f} % of the pixels are 255 (ignored)"
        if len(occur) < min(2, data.num_classes):
            alone = few([data.classes[k] for k in occur]) or "no class"
            broken.append(f"all labels together hold {alone} alone, beside 255 (binary masks are 0 and 1)")
    return summary, [f"{len(names)} {what} ({few(names, 3)})" for what, names in sorted(odd.items())], broken


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
    splits, classes, paths = [], [], []
    for split in SPLITS:
        official = SPLIT_IMAGES.get(name, {}).get(split)
        try:
            data = build(DataConfig(name=cast(DataName, name), root=root), split)
        except (ValueError, OSError) as error:
            splits.append(Split(split, 0, official, None, str(error), [], None, [], []))
            continue
        decoded, unusual, broken = _decode(data) if decode else (None, [], [])
        images, labels_from = data.images, data.labels_from
        splits.append(Split(split, images, official, labels_from, None, data.left_out, decoded, unusual, broken))
        if name != "shapes":
            paths.append({data.image_path(index) for index in range(data.images)})
        classes = [f"{k} {c} ({kind})" for k, (c, kind) in enumerate(zip(data.classes, data.kinds, strict=True))]
    shared = len(set.intersection(*paths)) if len(paths) == len(SPLITS) else 0
    return Finding(name, files, classes, splits, shared)


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
    if finding.name == "folder" and finding.classes:
        lines.append(f"  {len(finding.classes)} classes: {few(finding.classes, 10)}")
    for split in finding.splits:
        if split.error is not None:
            lines.append(f"  {split.name:<5} unusable: {split.error}")
            continue
        labels = f"labels from {split.labels_from}" if split.labels_from else "no labels (cannot be scored)"
        lines.append(f"  {split.name:<5} {split.images} images{_versus(split.images, split.official)}, {labels}")
        lines += [f"        {line}" for line in split.left_out]
        if split.decoded:
            lines.append(f"        {split.decoded}")
        if split.unusual:
            lines.append(f"        unusual: {'; '.join(split.unusual)}")
        if split.broken:
            lines.append(f"        {len(split.broken)} broken: {few(split.broken, 10)}")
    if finding.shared:
        lines.append(f"  {finding.shared} images are in both splits: a score on them is no score on unseen images")
    return "\n".join(lines)
