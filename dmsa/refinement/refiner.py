"""One image at a time: scores and photograph in, labels, soft maps and counts out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa.data.base import IGNORE
from dmsa.refinement.maps import Maps
from dmsa_kernels import PAMR, PAR

Preset = Literal["fitted", "par", "pamr", "none"]
FULL_SIZE_STRIDE = 16.0
"""Cells assumed for masks of the image's own size, which do not tell what they were enlarged from."""
FITTED_STRIDES = (4.0, 64.0)
HARD_ANCHOR = 0.1
"""Anchor for class indices, which look certain whatever they are; fitted as the presets were."""
THRESHOLDS = np.round(np.arange(0, 1.005, 0.01), 2)
"""Background thresholds of the sweep."""


@dataclass(frozen=True)
class Settings:
    """What decides the outputs of one image.

    Attributes:
        preset: `fitted` (:meth:`dmsa_kernels.PAR.for_stride`), `par` (dilations 1 to 24, 10 iterations, corners
            aligned, as AFA), `pamr` (8 and 16, 10 iterations), or `none`: cells enlarged in place.
        stride: side of a cell of the masks in pixels; `None` takes the ratio of the sizes.
        background: score of the background where the maps have no class 0; `None` for maps that have it, or for sets
            without a background.
        low, high: below `low` background, from `high` on the best class, between them ignored; instead of `background`.
    """

    preset: Preset = "fitted"
    stride: float | None = None
    background: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.stride is not None and not (math.isfinite(self.stride) and self.stride >= 1):
            raise ValueError(f"--stride {self.stride} must be at least 1 pixel")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"--low and --high go together, got {self.low} and {self.high}")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"--low {self.low} must not exceed --high {self.high}")

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """The scores below which a pixel is background, and from which on it is of its class; `None` without."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        return None if self.background is None else (self.background, self.background)


@dataclass
class Refined:
    """The refined masks of one image.

    Attributes:
        labels: uint8 `[H, W]`, 255 where ignored.
        ids: class of each plane.
        scores: float32 `[len(ids), H, W]`.
        coarse: the labels of the masks as they were, enlarged in place.
        coarse_scores: their scores.
        swept: whether a threshold decided on the background.
    """

    labels: np.ndarray
    ids: tuple[int, ...]
    scores: np.ndarray
    coarse: np.ndarray
    coarse_scores: np.ndarray
    swept: bool


def cell_of(size: tuple[int, int], maps: tuple[int, int], stride: float | None) -> tuple[float, float] | None:
    """Return rows and columns in pixels of a cell of maps `[h, w]` of an image `[H, W]`; `None` for equal sizes.

    Cells are squares of `stride` where such squares cover the image to within a cell, else the image divided by the
    map's size.
    """
    if size == maps:
        return None
    if stride is not None and all(abs(n * stride - whole) < stride for n, whole in zip(maps, size, strict=True)):
        return stride, stride
    return size[0] / maps[0], size[1] / maps[1]


def add_background(maps: Maps, settings: Settings, background: np.ndarray | None) -> Maps:
    """Return the maps with `background` `[h, w]`, if given, as the plane of class 0.

    Raises:
        ValueError: the background is there twice, or in two ways, or of another size.
    """
    has = 0 in maps.ids
    if has and (background is not None or settings.thresholds is not None):
        raise ValueError("class 0 is among the maps already: leave --background, --low and --high out")
    if background is None:
        return maps
    if background.shape != maps.scores.shape[1:]:
        raise ValueError(f"the background is a map of {background.shape}, the classes of {maps.scores.shape[1:]}")
    return Maps((0, *maps.ids), np.concatenate([background[None], maps.scores]), maps.ignored)


@dataclass
class Refiner:
    """Refines images with one setting; the modules are made once a cell size.

    Args:
        settings: see :class:`Settings`.
        device: where to compute.
    """

    settings: Settings
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, image: np.ndarray, maps: Maps) -> Refined:
        """Refine the maps of an image.

        Args:
            image: uint8 `[H, W, 3]`.
            maps: of any size.
        """
        photo = torch.from_numpy(image).to(self.device).permute(2, 0, 1).unsqueeze(0).float()  # [1, 3, H, W]
        planes = torch.from_numpy(maps.scores).to(self.device).unsqueeze(0)  # [1, C, h, w]
        hard = maps.ignored is not None
        if maps.ignored is not None:
            ignored = torch.from_numpy(maps.ignored).to(planes)
            planes = torch.cat([planes, ignored[None, None]], 1)
        size = (image.shape[0], image.shape[1])
        if any(n > whole for n, whole in zip(planes.shape[2:], size, strict=True)):
            planes = F.interpolate(planes, size, mode="area")
        cell = cell_of(size, (planes.shape[2], planes.shape[3]), self.settings.stride)
        coarse = enlarge(planes, size, cell)
        stays = coarse[0, -1].cpu().numpy() > 0.5 if hard else np.zeros(size, dtype=bool)
        planes, coarse = planes[:, : len(maps.ids)], coarse[:, : len(maps.ids)]
        refined = self._module(cell, hard)(photo, planes) if maps.ids else coarse
        gain = 1.01**10 if self.settings.preset == "par" else 1.0  # what PAR makes of a constant, a threshold too
        before, after = coarse[0].cpu().numpy(), refined[0].cpu().numpy() / gain
        labels, coarse_labels = (decide(maps.ids, scores, self.settings.thresholds) for scores in (after, before))
        labels[stays] = coarse_labels[stays] = IGNORE
        swept = self.settings.thresholds is not None
        return Refined(labels, maps.ids, after, coarse_labels, before, swept)

    def _module(self, cell: tuple[float, float] | None, hard: bool) -> Callable[[Tensor, Tensor], Tensor]:
        if self.settings.preset == "par":
            return PAR([1, 2, 4, 8, 12, 24], 10)
        if self.settings.preset == "pamr":
            return PAMR(10, [8, 16])
        if self.settings.preset == "none":
            return lambda image, planes: enlarge(planes, (image.shape[2], image.shape[3]), cell)
        ratio = math.sqrt(cell[0] * cell[1]) if cell else FULL_SIZE_STRIDE
        side = min(max(self.settings.stride or ratio, FITTED_STRIDES[0]), FITTED_STRIDES[1])
        fitted = PAR.for_stride(side, anchor=HARD_ANCHOR) if hard else PAR.for_stride(side)
        fitted.stride = cell
        return fitted


def enlarge(planes: Tensor, size: tuple[int, int], cell: tuple[float, float] | None) -> Tensor:
    """Bring the centres of cells to their place in a map of `size`, bilinear; equal sizes (`cell` None) stay."""
    if cell is None:
        return planes
    return PAR([1], 0, stride=cell)(planes.new_zeros(len(planes), 1, *size), planes)


def decide(ids: tuple[int, ...], scores: np.ndarray, thresholds: tuple[float, float] | None) -> np.ndarray:
    """Return the class of the best score of every pixel, uint8 `[H, W]`.

    Args:
        ids: class of each plane.
        scores: `[len(ids), H, W]`; without planes everything is background.
        thresholds: below the first a pixel is background (0), from the second on of its class, between them ignored.
    """
    if not ids:
        return np.zeros(scores.shape[1:], dtype=np.uint8)
    labels = np.asarray(ids, dtype=np.uint8)[scores.argmax(0)]
    if thresholds is not None:
        best = scores.max(0)
        labels[best < thresholds[1]] = IGNORE
        labels[best < thresholds[0]] = 0
    return labels
