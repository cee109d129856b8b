"""What every data set shares: class tables, label ids, samples, skipped images, shared epoch."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dmsa.config import DataConfig
from dmsa.data.images import CorruptImageError, as_rgb, ignore_orientation, open_image, orientation, upright_size
from dmsa.data.listing import few

IGNORE = 255
_INVALID = 254  # what a label table holds for ids that the data set does not know


def table(name: str) -> dict:
    """Return the class table `name` (`voc`, `coco80`, `coco_stuff27`, `paper`) that ships with the package."""
    return json.loads((resources.files("dmsa") / "tables" / f"{name}.json").read_text(encoding="utf-8"))


def colour_map(n: int) -> np.ndarray:
    """Return VOC's colours of ids 0..n-1, uint8 `[n, 3]`: bits 0, 1, 2 of the id, then 3, 4, 5, ... from the top down.

    Raises:
        ValueError: `n` is not in 1..256.
    """
    if not 1 <= n <= 256:
        raise ValueError(f"expected 1..256 colours, got {n=}")
    ids = np.arange(n)
    colours = np.zeros((n, 3), dtype=np.uint8)
    for level in range(3):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    return colours


def label_lookup(mapping: dict[int, int]) -> np.ndarray:
    """Return a uint8 `[256]` table of `mapping`: 255 stays 255, ids that are not in it become invalid."""
    lut = np.full(256, _INVALID, dtype=np.uint8)
    lut[IGNORE] = IGNORE
    for source, target in mapping.items():
        lut[source] = target
    return lut


def map_label(label: np.ndarray, lut: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Return `lut[label]`, uint8.

    Args:
        label: uint8 `[H, W]`, ids as the file `path` holds them.
        lut: from :func:`label_lookup`.

    Raises:
        ValueError: ids that the table does not have; the message names the file and the ids.
    """
    # bytearray.translate and memchr: four times faster than indexing and comparing arrays.
    mapped = bytearray(label.tobytes()).translate(lut.tobytes())
    if _INVALID in mapped:
        ids = np.unique(label[lut[label] == _INVALID]).tolist()
        known = np.flatnonzero(lut < _INVALID)
        raise ValueError(
            f"{path} holds ids outside the table: {ids}; expected {known.min()}..{known.max()} "
            f"({len(known)} ids) or 255 for pixels to ignore"
        )
    return np.frombuffer(mapped, dtype=np.uint8).reshape(label.shape)


def root_of(config: DataConfig, what: str) -> Path:
    """Return the folder of a data set.

    Raises:
        ValueError: none is set; the message names the options, and `what` is expected there.
    """
    if config.root is None:
        raise ValueError(
            f"data set {config.name!r} needs {what}, and none is given: --data.root FOLDER of train.py, --root FOLDER "
            "of the dmsa commands"
        )
    return Path(config.root)


class SegmentationData(Dataset):
    """A data set of images with or without labels; every one yields the same sample.

    `data[i]` is a dict with `image` float32 `[3, S, S]` (ImageNet-normalised; jittered in training), `guide` float32
    `[3, S, S]` in [0, 1] (the same crop without jitter), `label` int64 `[S, S]` (255 = ignore, everywhere if there
    are none), `index` and `name`; validation samples also have `size`, the original (H, W).

    An image that cannot be decoded is replaced in training by the next one that can, in the order of the data set;
    the first time this happens a warning names it, and :meth:`skipped` lists all of them, whichever worker met them.

    Attributes:
        name: name in the configuration.
        split: `train` or `val`.
        classes: names in the order of the ids.
        num_classes: their number, background included.
        n_things, n_stuff: classes of either kind; `num_classes = n_things + n_stuff`, plus 1 if `things_only`.
        things_only: id 0 is the background and the other classes are things. Otherwise things come before stuff.
        palette: uint8 `[num_classes, 3]`.
        ignore: 255.
        labels_from: where labels come from, in words, or `None` for images alone.
        total: images of the whole split, of which `images` are used.
        with_labels: whether samples need their label; if not, none is read, and all of it is 255.
        left_out: what was found beside them and is not used, and why; one sentence each.

    Args:
        names: name of every image, without suffix.
        transform: from :mod:`dmsa.data.transforms`.
        repeat: how often one epoch visits every image.
        total: images before any were left out by choice; all of `names` if unset.
        left_out: what the files have that is not used, and why; one sentence each.
    """

    ignore = IGNORE
    with_labels = True

    def __init__(
        self,
        *,
        name: str,
        split: str,
        classes: Sequence[str],
        n_things: int,
        things_only: bool,
        names: Sequence[str],
        transform: Callable,
        labels_from: str | None,
        palette: np.ndarray | None = None,
        repeat: int = 1,
        total: int | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        if not len(names):
            raise ValueError(f"data set {name!r} has no images in split {split!r}")
        if repeat < 1:
            raise ValueError(f"expected repeat >= 1, got {repeat=}")
        self.name = name
        self.split = split
        self.classes = list(classes)
        self.num_classes = len(self.classes)
        self.n_things = n_things
        self.n_stuff = self.num_classes - n_things - int(things_only)
        self.things_only = things_only
        self.palette = colour_map(self.num_classes) if palette is None else palette
        self.labels_from = labels_from
        self.transform = transform
        self.repeat = repeat
        self.total = len(names) if total is None else total
        self.left_out = list(left_out)
        # One array, not a list of strings: workers that touch a list's reference counts copy its memory.
        self._names = np.array([n.encode() for n in names])
        # Shared memory, so that persistent workers see a new epoch and the parent sees what they skipped.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._names) * self.repeat

    @property
    def kinds(self) -> list[str]:
        """`background`, `thing` or `stuff`, one a class."""
        background = ["background"] * self.things_only
        return [*background, *["thing"] * self.n_things, *["stuff"] * self.n_stuff]

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self._names)

    def image_name(self, index: int) -> str:
        """Return the name of image `index`, without suffix."""
        return self._names[index % self.images].decode()

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of `epoch`, in the workers too."""
        self._epoch.fill_(epoch)

    def skipped(self) -> list[str]:
        """Return the names of the images that could not be decoded so far, in the order of the data set."""
        return [self.image_name(i) for i in self._skipped.nonzero().flatten().tolist()]

    def remember_skipped(self, names: Sequence[str]) -> None:
        """Count the images `names` as skipped, as an interrupted run had found them; they are not warned of again."""
        known = set(names)
        self._skipped |= torch.tensor([self.image_name(i) in known for i in range(self.images)])

    def image_path(self, index: int) -> Path:
        """Return the file of image `index` (0..images-1)."""
        raise TypeError(f"{type(self).__name__} has no image files")

    def read_label(self, index: int) -> np.ndarray | None:
        """Return the label of image `index` (0..images-1), uint8 `[H, W]` of class ids and 255, or `None`.

        A subclass overrides this and :meth:`image_path`, or :meth:`raw` and :meth:`open`.
        """
        return self.raw(index)[1]

    def open(self, index: int) -> Image.Image | np.ndarray:
        """Return image `index` (0..images-1), decoded or not."""
        return open_image(self.image_path(index))

    def curated(self) -> list[int] | None:
        """Return the images of the curated split, or `None` if this data set has no such notion."""
        return None

    def raw(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return image `index`, upright, uint8 `[H, W, 3]`, and its label, uint8 `[H, W]` or `None`.

        Raises:
            CorruptImageError: it cannot be decoded.
            ValueError: the label holds unknown ids, or has another size than the image.
        """
        index %= self.images
        image = self.open(index)
        if not isinstance(image, Image.Image):
            return image, self._label_for(index, image)
        with image:
            label = self._label_for(index, image)
            return np.array(as_rgb(image)), label

    def pixels(self, index: int) -> np.ndarray:
        """Return image `index`, upright, uint8 `[H, W, 3]`; its label may be missing or broken.

        Raises:
            CorruptImageError: it cannot be decoded.
        """
        image = self.open(index % self.images)
        if not isinstance(image, Image.Image):
            return image
        with image:
            return np.array(as_rgb(image))

    def _label_for(self, index: int, image: Image.Image | np.ndarray) -> np.ndarray | None:
        """Return the label of an opened image; it tells whether the image is meant upright, or as it is stored."""
        label = self.read_label(index)
        if label is None:
            return None
        if isinstance(image, np.ndarray):
            size = image.shape[:2]
        else:
            size = upright_size(image)
            if label.shape != size and label.shape == (image.height, image.width):
                ignore_orientation(image)
                return label
        if label.shape != size:
            turned = "" if isinstance(image, np.ndarray) or orientation(image) == 1 else ", turned upright as EXIF says"
            raise ValueError(
                f"label of {self.image_name(index)} is {label.shape}, its image {size}{turned}; expected the same size"
            )
        return label

    def _sample(self, index: int, seed_index: int) -> dict[str, Any]:
        image = self.open(index)
        with image if isinstance(image, Image.Image) else contextlib.nullcontext():
            label = self._label_for(index, image) if self.with_labels else None
            return self.transform(image, label, index=seed_index, epoch=int(self._epoch))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is outside a data set of {len(self)} samples")
        index %= len(self)
        for step in range(self.images):
            image = (index + step) % self.images
            try:
                sample = self._sample(image, index)
            except CorruptImageError as error:
                self._skip(image, error)
                continue
            sample["index"] = index if step == 0 else image
            sample["name"] = self.image_name(image)
            return sample
        raise ValueError(f"none of the {self.images} images of {self.name!r} can be decoded: {few(self.skipped())}")

    def _skip(self, image: int, error: CorruptImageError) -> None:
        if not self._skipped[image]:
            self._skipped[image] = True
            warnings.warn(f"skipped: {error} ({int(self._skipped.sum())} skipped so far)", stacklevel=3)
