"""What every data set shares: reading files with errors that name them, samples, skipped images, shared epoch."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

IGNORE = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_INVALID = 254  # what a label table holds for ids that the data set does not know


class CorruptImageError(ValueError):
    """An image or mask that exists but cannot be decoded; `path` is the file."""

    def __init__(self, path: str | os.PathLike, reason: object) -> None:
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = str(reason)

    def __str__(self) -> str:
        return f"cannot decode {self.path}: {self.reason}"


def table(name: str) -> dict:
    """Return the class table `name` (`voc`, `coco80`, `coco_stuff27`, `paper`) that ships with the package."""
    return json.loads(resources.files("dmsa").joinpath("tables", f"{name}.json").read_text(encoding="utf-8"))


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


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        FileNotFoundError: it is not there.
        CorruptImageError: it is not an image.
    """
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's format plugins raise whatever a broken header leads them to
        raise CorruptImageError(path, error) from error


def decode(path: str | os.PathLike, read: Callable[[], object]) -> object:
    """Return `read()`; whatever a broken file makes Pillow raise becomes a :class:`CorruptImageError`."""
    try:
        return read()
    except _UNREADABLE as error:
        raise CorruptImageError(path, error) from error


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Return the ids in a mask file, uint8 `[H, W]`; palette images are read as indices, not as colours.

    Raises:
        FileNotFoundError: it is not there.
        CorruptImageError: it cannot be decoded.
        ValueError: it holds colours instead of ids, or ids above 255.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1", "I;16", "I"):
            raise ValueError(
                f"{path} is a {image.mode} image of colours; expected a palette or 8-bit grey PNG whose pixels are "
                "class ids"
            )
        ids = decode(path, lambda: np.array(image))
    if ids.dtype == np.uint8:
        return ids
    if ids.dtype != bool and (ids.min(initial=0) < 0 or ids.max(initial=0) > 255):
        raise ValueError(f"{path} holds ids up to {ids.max()}; expected 0..255")
    return ids.astype(np.uint8)


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


def file_names(folder: Path) -> set[str]:
    """Return the names in `folder`, empty if there is no such folder; one scan instead of a question per file."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        ValueError: it holds something else; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def read_list(path: Path) -> list[str]:
    """Return the first word of every non-empty line of a split list."""
    return [line.split()[0] for line in read_text(path).splitlines() if line.strip()]


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

    Args:
        names: name of every image, without suffix.
        transform: from :mod:`dmsa.data.transforms`.
        repeat: how often one epoch visits every image.
        total: images before any were left out by choice; all of `names` if unset.
    """

    ignore = IGNORE

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
        # One array, not a list of strings: workers that touch a list's reference counts copy its memory.
        self._names = np.array([n.encode() for n in names])
        # Shared memory, so that persistent workers see a new epoch and the parent sees what they skipped.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._names) * self.repeat

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
        """Return image `index` as it is in the file, uint8 `[H, W, 3]`, and its label, uint8 `[H, W]` or `None`.

        Raises:
            CorruptImageError: it cannot be decoded.
            ValueError: the label holds unknown ids, or has another size than the image.
        """
        index %= self.images
        image = self.open(index)
        if isinstance(image, Image.Image):
            with image:
                image = decode(self.image_path(index), lambda: np.array(image.convert("RGB")))
        return image, self._label_for(index, image.shape[:2])

    def _label_for(self, index: int, size: tuple[int, int]) -> np.ndarray | None:
        label = self.read_label(index)
        if label is not None and label.shape != size:
            raise ValueError(
                f"label of {self.image_name(index)} is {label.shape}, its image {size}; expected the same size"
            )
        return label

    def _sample(self, index: int, seed_index: int) -> dict[str, object]:
        image = self.open(index)
        epoch = int(self._epoch)
        if not isinstance(image, Image.Image):
            return self.transform(image, self._label_for(index, image.shape[:2]), index=seed_index, epoch=epoch)
        with image:
            label = self._label_for(index, (image.height, image.width))
            return decode(self.image_path(index), lambda: self.transform(image, label, index=seed_index, epoch=epoch))

    def __getitem__(self, index: int) -> dict[str, object]:
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
