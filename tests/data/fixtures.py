"""Small data sets in the official formats, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dmsa.data.base import colour_map


def write_image(path: Path, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Write a smooth random JPEG or PNG and return its decoded pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path, quality=95) if path.suffix == ".jpg" else image.save(path)
    return np.array(Image.open(path).convert("RGB"))


def write_palette(path: Path, ids: np.ndarray) -> None:
    """Write a palette PNG whose indices are `ids`, as VOC's masks are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8), mode=None)
    image.putpalette(colour_map(256).tobytes())
    assert image.mode == "P"
    image.save(path)


def write_grey(path: Path, ids: np.ndarray) -> None:
    """Write an 8-bit grey PNG whose pixels are `ids`, as COCO-Stuff's maps are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def blocks(ids: list[int], height: int = 48, width: int = 64) -> np.ndarray:
    """Return a label of vertical stripes, one an id, uint8 `[H, W]`."""
    return np.repeat(np.array(ids, dtype=np.uint8), -(-width // len(ids)))[None, :width].repeat(height, 0)


def voc(root: Path, train: int = 3, val: int = 2) -> dict[str, np.ndarray]:
    """Write a VOC 2012 of `train` + `val` images below `root`/VOCdevkit/VOC2012; return the labels by name."""
    base = root / "VOCdevkit" / "VOC2012"
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    labels = {}
    for split, count in (("train", train), ("val", val)):
        names = [f"2007_{split}{i}" for i in range(count)]
        (lists / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
        for i, name in enumerate(names):
            write_image(base / "JPEGImages" / f"{name}.jpg", seed=i)
            labels[name] = blocks([0, 1 + i, 15, 20, 255])
            write_palette(base / "SegmentationClass" / f"{name}.png", labels[name])
    return labels


def write_mat(path: Path, ids: np.ndarray) -> None:
    """Write an SBD `cls/*.mat`: a struct `GTcls` with `Segmentation`, `Boundaries` and `CategoriesPresent`."""
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    boundaries = np.empty((20, 1), dtype=object)
    boundaries[:, 0] = [np.zeros((2, 2))] * 20
    present = np.unique(ids[ids > 0]).astype(np.uint8)[:, None]
    struct = {"Boundaries": boundaries, "Segmentation": ids.astype(np.uint8), "CategoriesPresent": present}
    savemat(path, {"GTcls": struct}, do_compression=True)


def sbd(root: Path, voc_labels: dict[str, np.ndarray], extra: int = 4) -> dict[str, np.ndarray]:
    """Add SBD to a :func:`voc`: `extra` new images, one VOC train and one VOC val image; return the new labels."""
    base = root / "benchmark_RELEASE" / "dataset"
    names = [f"2008_extra{i}" for i in range(extra)]
    labels = {}
    for i, name in enumerate(names):
        write_image(root / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{name}.jpg", seed=50 + i)
        labels[name] = blocks([0, 2 + i])
        write_mat(base / "cls" / f"{name}.mat", labels[name])
    for name in ("2007_train0", "2007_val0"):
        write_mat(base / "cls" / f"{name}.mat", np.full_like(voc_labels[name], 7))
    (base / "train.txt").write_text("\n".join([*names[:2], "2007_train0"]) + "\n")
    (base / "val.txt").write_text("\n".join([*names[2:], "2007_val0"]) + "\n")
    return labels


def square(left: float, top: float, right: float, bottom: float) -> list[float]:
    """Return the polygon of a box, as COCO has it."""
    return [left, top, right, top, right, bottom, left, bottom]


def coco(root: Path, split: str = "val2017", images: int = 3, maps: bool = True, instances: bool = True) -> None:
    """Write COCO images 1..n of 48 x 64, their maps and their instances.

    Image 1 has a polygon of two parts (person), an uncompressed run length (dog, COCO category 18), a compressed one
    (toothbrush, 90), a crowd that a person partly covers, and a small cup (47) on a large table (67). The others
    have none. Every map holds the stripes of :func:`blocks` [0, 10, 91, 181, 255].
    """
    annotations = []

    def add(category: int, segmentation: object, area: float, crowd: int = 0) -> None:
        number = len(annotations) + 1
        annotations.append(
            {
                "id": number, "image_id": 1, "category_id": category, "segmentation": segmentation, "area": area,
                "iscrowd": crowd, "bbox": [0, 0, 1, 1],
            }
        )  # fmt: skip

    add(47, [square(44, 4, 48, 8)], 16)  # the cup comes before the table that it stands on
    add(67, [square(40, 0, 60, 12)], 240)
    add(1, [square(0, 0, 8, 8), square(16, 0, 24, 8)], 128)
    dog = np.zeros((48, 64), dtype=np.uint8, order="F")
    dog[20:30, 5:15] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], dog.ravel(order="F"), [2]]))))
    add(18, {"counts": runs.tolist(), "size": [48, 64]}, 100)
    brush = np.zeros((48, 64), dtype=np.uint8, order="F")
    brush[20:30, 30:40] = 1
    packed = coco_mask.encode(brush)
    add(90, {"counts": packed["counts"].decode(), "size": [48, 64]}, 100)
    add(1, [square(50, 36, 56, 44)], 48)
    crowd = np.zeros((48, 64), dtype=np.uint8, order="F")
    crowd[34:46, 44:60] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.ravel(order="F"), [2]]))))
    add(1, {"counts": runs.tolist(), "size": [48, 64]}, 192, crowd=1)

    names = [f"{i:012d}" for i in range(1, images + 1)]
    for i, name in enumerate(names):
        write_image(root / split / f"{name}.jpg", seed=i)
        if maps:
            write_grey(root / "stuffthingmaps" / split / f"{name}.png", blocks([0, 10, 91, 181, 255]))
    if instances:
        content = {
            "images": [{"id": i + 1, "file_name": f"{n}.jpg", "height": 48, "width": 64} for i, n in enumerate(names)],
            "annotations": annotations,
            "categories": [],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
