"""A folder of images, with or without masks and class names.

Expected below the root: images in `images/train` and `images/val`, or in `images/` (then both splits are all of
them), or in the root itself; masks, if any, in `masks/` with the same relative names and the suffix `.png`;
`classes.txt`, if any, with one class name per line in the order of the ids, optionally followed by a comma and
`thing` or `stuff` (things first). A first class called `background` makes id 0 the background of a set of things.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from dmsa.config import DataConfig
from dmsa.data.base import (
    IGNORE,
    IMAGE_SUFFIXES,
    SegmentationData,
    few,
    label_lookup,
    map_label,
    read_mask,
    read_text,
    require_files,
    thin,
)
from dmsa.data.transforms import TrainTransform, ValTransform


def walk(folder: Path) -> list[str]:
    """Return the relative paths of all files below `folder`, sorted; folders with a leading dot are left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [(Path(parent) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)


def read_classes(path: Path) -> tuple[list[str], int, bool]:
    """Return the names, the number of things and whether id 0 is the background, from a `classes.txt`.

    Without kinds, every class is a thing if the first is `background`, else the first half are things.

    Raises:
        ValueError: no names, an unknown kind, things after stuff, or more than 254 classes.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not 1 <= len(lines) <= 254:
        raise ValueError(f"{path} names {len(lines)} classes; expected 1..254, one per line")
    names = [line.rsplit(",", 1)[0].strip() for line in lines]
    kinds = [line.rsplit(",", 1)[1].strip() if "," in line else "" for line in lines]
    if unknown := [kind for kind in kinds if kind not in ("", "thing", "stuff")]:
        raise ValueError(f"{path} has kinds {few(unknown)}; expected `thing` or `stuff` after the comma")
    if names[0] == "background":
        if "stuff" in kinds[1:]:
            raise ValueError(
                f"{path} has a background and stuff; expected a background and things, or things and stuff"
            )
        return names, len(names) - 1, True
    if not any(kinds):
        return names, (len(names) + 1) // 2, False
    n_things = sum(kind == "thing" for kind in kinds)
    if kinds != ["thing"] * n_things + ["stuff"] * (len(kinds) - n_things):
        raise ValueError(f"{path} mixes kinds; expected a kind on every line, things before stuff")
    return names, n_things, False


class Folder(SegmentationData):
    """The images of a folder (see the module).

    Args:
        config: `root`, `repeat`, `train_images`, `val_images`, `classes` and what the transforms use.
        split: `train` or `val`.
        seed: seed of the augmentation.

    Raises:
        ValueError: no root, or two images that share a mask.
        FileNotFoundError: no images, or some but not all of the masks.
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0) -> None:
        if config.root is None:
            raise ValueError(f"data set 'folder' needs a folder of images, --data.root FOLDER; got {config.root=}")
        root = Path(config.root)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; expected images in it, or in {root / 'images'}")
        images = root / "images" if (root / "images").is_dir() else root
        masks = root / "masks"
        if (images / split).is_dir():
            images, masks = images / split, masks / split
        files = [f for f in walk(images) if f.lower().endswith(IMAGE_SUFFIXES)]
        if images == root:
            files = [f for f in files if not f.startswith("masks/")]
        if not files:
            raise FileNotFoundError(f"no images ({' '.join(IMAGE_SUFFIXES)}) in {images}")
        names = [os.path.splitext(f)[0] for f in files]
        if len(set(names)) < len(names):
            twice = [name for name, count in Counter(names).items() if count > 1]
            raise ValueError(f"images in {images} differ only by their suffix, and would share a mask: {few(twice)}")
        limit = config.train_images if split == "train" else config.val_images
        self._images, self._masks = images, masks
        present = set(walk(masks)) if masks.is_dir() else set()
        labels_from = None
        if present:
            wanted = [f"{name}.png" for name in names]
            require_files(f"masks of {split}", wanted, present, masks, "Every image needs one, or none has any")
            labels_from = masks.relative_to(root).as_posix()
        names_file = root / "classes.txt"
        if names_file.is_file():
            classes, n_things, things_only = read_classes(names_file)
        else:
            count = config.classes
            # Both splits: they must agree on the number of classes.
            every = [root / "masks" / mask for mask in walk(root / "masks") if mask.endswith(".png")]
            if every:
                count = 1 + max(self._highest_id(mask) for mask in every)
            classes, n_things, things_only = [f"class {i}" for i in range(count)], (count + 1) // 2, False
        self._lut = label_lookup({i: i for i in range(len(classes))})
        files = thin(files, limit)
        self._files = np.array([f.encode() for f in files])
        super().__init__(
            name="folder",
            split=split,
            classes=classes,
            n_things=n_things,
            things_only=things_only,
            names=thin(names, limit),
            transform=TrainTransform(config, seed) if split == "train" else ValTransform(config),
            labels_from=labels_from,
            repeat=config.repeat if split == "train" else 1,
            total=len(names),
        )

    @staticmethod
    def _highest_id(path: Path) -> int:
        ids = read_mask(path)
        return int(ids[ids != IGNORE].max(initial=0))

    def image_path(self, index: int) -> Path:
        return self._images / self._files[index].decode()

    def read_label(self, index: int) -> np.ndarray | None:
        if self.labels_from is None:
            return None
        path = self._masks / f"{self.image_name(index)}.png"
        return map_label(read_mask(path), self._lut, path)
