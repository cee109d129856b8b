"""COCO 2017 as COCO-80 (things and background) and as COCO-Stuff-27 (12 groups of things, 15 of stuff).

Expected below the root: images in `train2017/` and `val2017/` (or in `images/`), `annotations/instances_*.json`, and
COCO-Stuff's PNG maps in `stuffthingmaps/{train,val}2017/` (or in `annotations/{train,val}2017/`). COCO-80 does
without the maps: the polygons and run lengths of the instances are drawn, crowd regions become 255.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmsa.config import DataConfig
from dmsa.data.base import IGNORE, SegmentationData, label_lookup, map_label, root_of, table
from dmsa.data.images import read_mask
from dmsa.data.listing import few, list_files, read_list, refuse_twice, require_files, thin
from dmsa.data.outlines import draw_outline
from dmsa.data.transforms import TrainTransform, ValTransform

IMAGE_SOURCE = "Get {split}.zip from cocodataset.org/#download, then run `dmsa prepare --name {name}`"
MAP_SOURCE = (
    "Get stuffthingmaps_trainval2017.zip (COCO-Stuff, github.com/nightrome/cocostuff), "
    "then run `dmsa prepare --name {name}`"
)
INSTANCE_SOURCE = (
    "Get annotations_trainval2017.zip from cocodataset.org/#download, then run `dmsa prepare --name {name}`"
)
CURATED_FILE = "Coco164kFull_Stuff_Coarse_7.txt"  # the name under which IIC, PiCIE and STEGO share the list
CURATED_MIN_SIDE = 360
CURATED_STUFF = 0.75
MAX_SIDE = 2**16  # pixels
FIRST_STUFF = 91  # COCO-Stuff ids below are things


def image_folders(root: Path, split: str) -> list[Path]:
    """Return where the images of `split` (`train2017`, `val2017`) may lie; what is there comes first, and is read."""
    return _there_first([root / "images" / split, root / split])


def map_folders(root: Path, split: str) -> list[Path]:
    """Return where COCO-Stuff's PNG maps of `split` may lie; what is there comes first, and is read."""
    return _there_first([root / "stuffthingmaps" / split, root / "annotations" / split])


def _there_first(folders: list[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: not folder.is_dir())


def curated_file(root: Path, split: str) -> Path:
    """Return the file of the curated list of `split`."""
    return root / "curated" / split / CURATED_FILE


def is_curated(ids: np.ndarray) -> bool:
    """Tell whether a COCO-Stuff map belongs to the curated split: min side >= 360 and >= 75 % stuff pixels.

    The rule of IIC (xu-ji/IIC, `coco164k_prepare.py`), which PiCIE and STEGO took over; unlabelled pixels count in
    the denominator.

    Args:
        ids: uint8 `[H, W]`, COCO-Stuff ids 0..181 and 255.
    """
    if min(ids.shape) < CURATED_MIN_SIDE:
        return False
    stuff = np.count_nonzero((ids >= FIRST_STUFF) & (ids != IGNORE))
    return bool(stuff >= CURATED_STUFF * ids.size)


class Instances:
    """The outlines in an `instances_*.json`, packed into arrays (workers share them; objects would be copied).

    Args:
        path: the file.
        category_ids: COCO category id -> class id.

    Attributes:
        names: of the images, without folder and ending, in the order of the file names.
        left_out: annotations that are not drawn, and why; one sentence each.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not a COCO annotation file, an entry lacks something, two have the same id, or it has
            categories that `category_ids` lacks.
    """

    def __init__(self, path: Path, category_ids: dict[int, int]) -> None:
        self.path = path
        try:
            content = json.loads(path.read_bytes())
        except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a COCO annotation file: {type(error).__name__}: {error}") from error
        images, annotations = (self._entries(content, key) for key in ("images", "annotations"))
        for image in images:
            self._require(image, "images", id=_is_id, file_name=_is_name, height=_is_side, width=_is_side)
        for annotation in annotations:
            self._require(annotation, "annotations", id=_is_id, image_id=_is_id, category_id=_is_id)
        refuse_twice([str(image["id"]) for image in images], path)
        refuse_twice([str(annotation["id"]) for annotation in annotations], path)
        unknown = sorted({a["category_id"] for a in annotations} - set(category_ids))
        if unknown:
            raise ValueError(f"{path} has categories outside the table: {unknown}; expected COCO's 80 category ids")
        images = sorted(images, key=lambda image: image["file_name"])
        self.names = [Path(image["file_name"]).stem for image in images]
        refuse_twice(self.names, path)
        self.sizes = np.array([(i["height"], i["width"]) for i in images], dtype=np.int32).reshape(-1, 2)
        order = {image["id"]: i for i, image in enumerate(images)}
        self.left_out = self._left_out(annotations, order)
        annotations = [a for a in annotations if a["image_id"] in order and a.get("segmentation")]
        for annotation in annotations:
            self._require(annotation, "annotations", area=_is_area)
            self._require({"iscrowd": 0, **annotation}, "annotations", iscrowd=_is_flag)
        self._pack(annotations, order, category_ids)

    def _entries(self, content: object, key: str) -> list:
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise ValueError(f"{self.path} is not a COCO annotation file: expected a list {key!r} in an object")
        return found

    def _require(self, entry: object, key: str, **fields: Callable[[object], str]) -> None:
        """Raise `ValueError` unless every field of an entry of the list `key` is there and is what it should be."""
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path} is not a COCO annotation file: {entry!r:.100} in {key!r}, no object")
        for field, problem in fields.items():
            if expected := problem(entry.get(field)):
                which = ", ".join(f"{k}={entry[k]!r:.100}" for k in ("id", "image_id", "file_name") if k in entry)
                value = f"{field}={entry[field]!r:.100}" if field in entry else f"no {field!r}"
                raise ValueError(
                    f"{self.path} is not a COCO annotation file: the entry of {key!r} with {which or 'no id'} has "
                    f"{value}; {expected}"
                )

    def _left_out(self, annotations: list[dict], order: dict[int, int]) -> list[str]:
        strangers = [a["id"] for a in annotations if a["image_id"] not in order]
        bare = [a["id"] for a in annotations if a["image_id"] in order and not a.get("segmentation")]
        kinds = ((strangers, "of images that it does not list"), (bare, "without an outline"))
        return [
            f"left out: {len(ids)} annotations of {self.path} {what} (ids {few(ids, 3)})" for ids, what in kinds if ids
        ]

    def _pack(self, annotations: list[dict], order: dict[int, int], category_ids: dict[int, int]) -> None:
        # Large regions are drawn first, so that what lies on them stays visible; crowds come before all instances.
        annotations.sort(key=lambda a: (order[a["image_id"]], not a.get("iscrowd"), -a["area"], a["id"]))
        rows = np.array([order[a["image_id"]] for a in annotations], dtype=np.int64)
        self._first = np.searchsorted(rows, np.arange(len(order) + 1))
        self._class = np.array(
            [IGNORE if a.get("iscrowd") else category_ids[a["category_id"]] for a in annotations], dtype=np.uint8
        )
        outlines = [json.dumps(a["segmentation"], separators=(",", ":")).encode() for a in annotations]
        self._offset = np.concatenate([[0], np.cumsum([len(o) for o in outlines], dtype=np.int64)]).astype(np.int64)
        self._outlines = np.frombuffer(b"".join(outlines), dtype=np.uint8)

    def draw(self, index: int) -> np.ndarray:
        """Return the label of image `index`, uint8 `[H, W]`: 0 = background, 255 = crowd where no instance is.

        Raises:
            ValueError: an outline is malformed or does not fit the image; the message names the file and the image.
        """
        height, width = self.sizes[index].tolist()
        label = np.zeros((height, width), dtype=np.uint8)
        for i in range(self._first[index], self._first[index + 1]):
            outline = json.loads(self._outlines[self._offset[i] : self._offset[i + 1]].tobytes())
            try:
                region = draw_outline(outline, height, width)
            except ValueError as error:
                raise ValueError(
                    f"{self.path} has an outline of image {self.names[index]} that cannot be drawn on its {height} x "
                    f"{width} pixels: {error}"
                ) from error
            label[region] = self._class[i]
        return label


def _is_id(value: object) -> str:
    return "" if type(value) is int else "expected an integer"


def _is_name(value: object) -> str:
    return "" if isinstance(value, str) and Path(value).stem else "expected a file name"


def _is_side(value: object) -> str:
    return "" if type(value) is int and 1 <= value <= MAX_SIDE else f"expected 1..{MAX_SIDE} pixels"


def _is_area(value: object) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    return "" if known else "expected its area in pixels (the large are drawn first)"


def _is_flag(value: object) -> str:
    return "" if value in (0, 1, None) else "expected 0 or 1"


class Coco(SegmentationData):
    """COCO-80 (`name="coco80"`) or COCO-Stuff-27 (`"coco_stuff27"`) on the images of COCO 2017.

    Labels come from COCO-Stuff's PNG maps, as in TransFGU. COCO-80 without maps draws `instances_*.json`.

    Args:
        config: `name`, `root`, `repeat`, `train_images`, `val_images` and what the transforms use.
        split: `train` (118,287 images) or `val` (5,000).
        seed: seed of the augmentation.
        labels: `maps`, `instances` (COCO-80 only), or `auto`: maps where there is a folder of them.

    Raises:
        ValueError: no root, or `labels` is unknown.
        FileNotFoundError: images or labels are missing. A training split may do without any labels.
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0, labels: str = "auto") -> None:
        image_source = IMAGE_SOURCE.format(split=f"{split}2017", name=config.name)
        self.root = root_of(config, f"the folder of COCO ({image_source})")
        if labels not in (("auto", "maps", "instances") if config.name == "coco80" else ("auto", "maps")):
            raise ValueError(f"{config.name} has no labels of this kind, got {labels=}; expected 'auto' or 'maps'")
        self.year_split = f"{split}2017"
        self._images, *other_images = image_folders(self.root, self.year_split)
        self._maps, *other_maps = map_folders(self.root, self.year_split)
        map_source = MAP_SOURCE.format(name=config.name)
        listing = list_files(self._images, (".jpg",), flat=True)
        left_out = listing.notes()
        for read, others in ((self._images, other_images), (self._maps, other_maps)):
            left_out += [f"left out: {f}, since there is {read}" for f in others if f.is_dir() and not f.samefile(read)]
        names = [Path(f).stem for f in listing.files]
        if not names:
            raise FileNotFoundError("; ".join([f"no .jpg images in {self._images}. {image_source}", *left_out]))
        files = set(listing.files)
        classes = table(config.name)
        json_file = self.root / "annotations" / f"instances_{self.year_split}.json"
        self._instances: Instances | None = None
        if labels == "auto" and config.name == "coco80" and not self._maps.is_dir() and json_file.is_file():
            labels = "instances"
        total = len(names)
        limit = config.train_images if split == "train" else config.val_images
        if labels == "instances":
            if not json_file.is_file():
                raise FileNotFoundError(f"{json_file} is missing. {INSTANCE_SOURCE.format(name=config.name)}")
            ids = {int(k): v for k, v in classes["category_id_to_contiguous"].items()}
            self._instances = Instances(json_file, ids)
            total = len(self._instances.names)
            left_out += self._instances.left_out
            if extra := sorted(set(names) - set(self._instances.names)):
                left_out.append(f"left out: {len(extra)} images that {json_file} does not list ({few(extra, 3)})")
            names = thin(self._instances.names, limit)
            self._row = {name: i for i, name in enumerate(self._instances.names)}
            labels_from = json_file.name
            require_files(
                f"images of {config.name} {split}", [f"{n}.jpg" for n in names], files, self._images, image_source
            )
        elif split == "train" and labels == "auto" and not self._maps.is_dir():
            names = thin(names, limit)
            labels_from = None
        else:
            names = thin(names, limit)
            maps = set(list_files(self._maps, (".png",), flat=True).files)
            wanted = [f"{n}.png" for n in names]
            hint = map_source
            if config.name == "coco80" and not maps:
                hint = f"{map_source}; or {INSTANCE_SOURCE.format(name=config.name)}"
            require_files(f"label maps of {config.name} {split}", wanted, maps, self._maps, hint)
            # An image that was lost would otherwise vanish from the list, and from the score, without a word.
            extra = [f"{Path(m).stem}.jpg" for m in sorted(maps)] if limit is None else []
            require_files(f"images of {config.name} {split}", extra, files, self._images, image_source)
            labels_from = f"{self._maps.parent.name}/{self.year_split}"
        if config.name == "coco80":
            mapping = {int(k): v for k, v in classes["stuffthingmap_id_to_contiguous"].items()}
            names_of_classes, n_things, things_only = classes["names"], 80, True
        else:
            mapping = {int(k): v for k, v in classes["fine_to_coarse"].items()}
            names_of_classes, things_only = classes["coarse"], False
            n_things = sum(name.endswith("-things") for name in names_of_classes)
        self._lut = label_lookup(mapping)
        super().__init__(
            name=config.name,
            split=split,
            classes=names_of_classes,
            n_things=n_things,
            things_only=things_only,
            names=names,
            transform=TrainTransform(config, seed) if split == "train" else ValTransform(config),
            labels_from=labels_from,
            repeat=config.repeat if split == "train" else 1,
            total=total,
            left_out=left_out,
        )

    def image_path(self, index: int) -> Path:
        return self._images / f"{self.image_name(index)}.jpg"

    def read_label(self, index: int) -> np.ndarray | None:
        if self.labels_from is None:
            return None
        name = self.image_name(index)
        if self._instances is not None:
            return self._instances.draw(self._row[name])
        path = self._maps / f"{name}.png"
        return map_label(read_mask(path), self._lut, path)

    def curated(self) -> list[int] | None:
        """Return the images of this split that are on the curated list.

        Raises:
            FileNotFoundError: the list has not been made.
            ValueError: it names images that this split does not have.
        """
        path = curated_file(self.root, self.year_split)
        if not path.is_file():
            raise FileNotFoundError(
                f"the curated list {path} is missing; `dmsa prepare --name {self.name}` makes it from the label maps"
            )
        order = {self.image_name(i): i for i in range(self.images)}
        names = read_list(path)
        unknown = [name for name in names if name not in order]
        if unknown and self.images == self.total:
            raise ValueError(f"{path} names images that {self.name} {self.split} does not have: {few(unknown)}")
        chosen = [order[name] for name in names if name in order]
        if not chosen:
            raise ValueError(f"none of the {len(names)} images in {path} is among the {self.images} of {self.split}")
        return chosen
