"""A folder of images, with or without masks and class names.

Expected below the root: images in `images/train` and `images/val`, or in `images/` (then both splits are all of
them), or in the root itself; masks, if any, in `masks/` with the same relative names and the ending `.png`;
`classes.txt`, if any, with one class name per line in the order of the ids, optionally followed by a comma and
`thing` or `stuff` (things first). A first class called `background` makes id 0 the background of a set of things.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dmsa.config import DataConfig
from dmsa.data.base import IGNORE, SegmentationData, label_lookup, map_label, root_of
from dmsa.data.images import read_mask
from dmsa.data.listing import (
    IMAGE_SUFFIXES,
    by_stem,
    few,
    list_files,
    read_lines,
    refuse_twice,
    require_files,
    thin,
)
from dmsa.data.transforms import TrainTransform, ValTransform

SPLIT_FOLDERS = ("train", "val")
_OURS = ("masks", "classes.txt")  # what is no image where the root itself holds the images
_SPARSE = 16  # ids up to here may have gaps


def read_classes(path: Path) -> tuple[list[str], int, bool]:
    """Return the names, the number of things and whether id 0 is the background, from a `classes.txt`.

    Without kinds, every class is a thing if the first is `background`, else the first half are things.

    Raises:
        ValueError: no names, an empty line, a name twice, an unknown kind, things after stuff, a background that is not
            the first, or more than 254 classes.
    """
    lines = read_lines(path)
    if not 1 <= len(lines) <= 254:
        raise ValueError(f"{path} names {len(lines)} classes; expected 1..254, one per line")
    names = [line.rsplit(",", 1)[0].strip() for line in lines]
    kinds = [line.rsplit(",", 1)[1].strip() if "," in line else "" for line in lines]
    if "" in names:
        raise ValueError(f"{path} has no name in line {names.index('') + 1}; expected one for every id, 0 first")
    if unknown := [kind for kind in kinds if kind not in ("", "thing", "stuff")]:
        raise ValueError(f"{path} has kinds {few(unknown)}; expected `thing` or `stuff` after the last comma")
    refuse_twice(names, path, str.casefold)
    if "background" in (name.casefold() for name in names[1:]):
        raise ValueError(f"{path} has a background that is not the first class; expected it in line 1, for id 0")
    if names[0].casefold() == "background":
        if "stuff" in kinds[1:]:
            raise ValueError(
                f"{path} has a background and stuff; expected a background and things, or things and stuff"
            )
        return ["background", *names[1:]], len(names) - 1, True
    if not any(kinds):
        return names, (len(names) + 1) // 2, False
    n_things = sum(kind == "thing" for kind in kinds)
    if kinds != ["thing"] * n_things + ["stuff"] * (len(kinds) - n_things):
        raise ValueError(f"{path} mixes kinds; expected a kind on every line, things before stuff")
    return names, n_things, False


def refuse_near_names(root: Path) -> None:
    """Raise `ValueError` if something in `root` is called almost as the layout has it, and would be overlooked."""
    names = os.listdir(root)
    for wanted, also in (("images", ()), ("masks", ()), ("classes.txt", ("classes.txt.txt",))):
        near = [name for name in names if name.casefold() in (wanted, *also)]
        if near and wanted not in names:
            raise ValueError(f"{root / near[0]} is not read under this name; expected {wanted!r}")


def count_classes(folder: Path) -> int | None:
    """Return one more than the highest id in all masks below `folder`, `None` if there are none.

    Raises:
        ValueError: the masks hold one class only (binary masks of 0 and 255, say), or too few ids for their range.
    """
    masks = list_files(folder, (".png",)).files
    if not masks:
        return None
    occurs = np.zeros(256, dtype=bool)
    for mask in masks:
        occurs[read_mask(folder / mask)] = True
    ids = np.flatnonzero(occurs[:IGNORE])
    advice = f"expected ids 0, 1, 2, ... of two classes at least in the {len(masks)} masks in {folder}, or classes.txt"
    if len(ids) < 2:
        also = ", and 255 means 'ignore' (binary masks are 0 and 1)" if occurs[IGNORE] else ""
        raise ValueError(f"{advice}; they hold only {few(np.flatnonzero(occurs).tolist())}{also}")
    count = int(ids.max()) + 1
    if count > _SPARSE and 2 * len(ids) < count:
        raise ValueError(f"{advice}; they hold {few(ids.tolist())}: {len(ids)} of the ids 0..{count - 1}")
    return count


class Folder(SegmentationData):
    """The images of a folder (see the module).

    Args:
        config: `root`, `repeat`, `train_images`, `val_images`, `classes` and what the transforms use.
        split: `train` or `val`.
        seed: seed of the augmentation.

    Raises:
        ValueError: no root, a name of the layout in other letters, two images or masks of one name, or masks whose
            classes cannot be told.
        FileNotFoundError: no images, or some but not all of the masks.
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0) -> None:
        root = root_of(config, "a folder of images")
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}; expected images in it, or in {root / 'images'}")
        refuse_near_names(root)
        images = root / "images" if (root / "images").is_dir() else root
        masks = root / "masks"
        left_out: list[str] = []
        if images != root and (beside := list_files(root, IMAGE_SUFFIXES, flat=True).files):
            left_out.append(f"left out: {len(beside)} images in {root}, since there is {images} ({few(beside, 3)})")
        has_splits = any((images / name).is_dir() for name in SPLIT_FOLDERS)
        if has_splits:
            if not (images / split).is_dir():
                raise FileNotFoundError(
                    f"no {images / split}, beside the other split; expected both {few(SPLIT_FOLDERS)} in {images}, or "
                    "neither (then both are all of the images)"
                )
            if beside := list_files(images, IMAGE_SUFFIXES, skip=(*SPLIT_FOLDERS, *_OURS)).files:
                left_out.append(f"left out: {len(beside)} images in {images} that are in no split ({few(beside, 3)})")
            images = images / split
        listing = list_files(images, IMAGE_SUFFIXES, skip=_OURS if images == root else ())
        left_out += listing.notes()
        if not listing.files:
            raise FileNotFoundError(f"no images ({' '.join(IMAGE_SUFFIXES)}) in {'; '.join([str(images), *left_out])}")
        stems = by_stem(listing.files, images, "images")
        names, files = list(stems), list(stems.values())
        mask_files: list[str] = []
        if masks.is_dir():
            masks = masks / split if has_splits else masks
            mask_files, notes = self._find_masks(masks, split, names)
            left_out += notes
        names_file = root / "classes.txt"
        if names_file.is_file():
            classes, n_things, things_only = read_classes(names_file)
        else:
            # All masks, of both splits: these must agree on the number of classes.
            count = count_classes(root / "masks") or config.classes
            classes, n_things, things_only = [f"class {i}" for i in range(count)], (count + 1) // 2, False
        self._lut = label_lookup({i: i for i in range(len(classes))})
        limit = config.train_images if split == "train" else config.val_images
        # Arrays, not lists of strings, as the names in the base class.
        self._images, self._files = images, np.array([f.encode() for f in thin(files, limit)])
        self._masks, self._mask_files = masks, np.array([f.encode() for f in thin(mask_files, limit)])
        super().__init__(
            name="folder",
            split=split,
            classes=classes,
            n_things=n_things,
            things_only=things_only,
            names=thin(names, limit),
            transform=TrainTransform(config, seed) if split == "train" else ValTransform(config),
            labels_from=masks.relative_to(root).as_posix() if mask_files else None,
            repeat=config.repeat if split == "train" else 1,
            total=len(names),
            left_out=left_out,
        )

    @staticmethod
    def _find_masks(folder: Path, split: str, names: list[str]) -> tuple[list[str], list[str]]:
        """Return the mask of every image, or no masks at all, and what was left out."""
        listing = list_files(folder, (".png",))
        if not listing.files:
            unsplit = folder.name == split and not any((folder.parent / name).is_dir() for name in SPLIT_FOLDERS)
            if listing.left_out or (unsplit and list_files(folder.parent, (".png",)).files):
                raise FileNotFoundError("; ".join([f"no masks (.png) in {folder}", *listing.notes()]))
            return [], [f"no masks in {folder}"]
        found = by_stem(listing.files, folder, "masks")
        hint = "; ".join(["Every image needs one, or none has any", *listing.notes()])
        wanted = [f"{name}.png" for name in names]
        require_files(f"masks of {split}", wanted, {f"{stem}.png" for stem in found}, folder, hint)
        extra = sorted(set(found) - set(names))
        notes = [f"left out: {len(extra)} masks in {folder} without an image ({few(extra, 3)})"] if extra else []
        return [found[name] for name in names], [*listing.notes(), *notes]

    def image_path(self, index: int) -> Path:
        return self._images / self._files[index].decode()

    def read_label(self, index: int) -> np.ndarray | None:
        if self.labels_from is None:
            return None
        path = self._masks / self._mask_files[index].decode()
        return map_label(read_mask(path), self._lut, path)
