"""Scores before and after the refinement: counts of one image, their sum, the sweep of the background threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmsa.data.base import IGNORE
from dmsa.refinement.refiner import THRESHOLDS, Refined, decide

IDS = 256
"""Rows and columns of a count: ids of 8 bits."""


@dataclass
class Counts:
    """Pixels by class; adding those of two images gives those of both.

    Attributes:
        before, after: int64 `[256, 256]`, rows labels, columns predictions; ignored predictions in the last column.
        swept_before, swept_after: int64 `[thresholds, 2, 256]`, correct and predicted pixels of each class where the
            background is below a threshold; zeros where no threshold decides.
        swept: images in the sweep.
    """

    before: np.ndarray
    after: np.ndarray
    swept_before: np.ndarray
    swept_after: np.ndarray
    swept: int = 0

    @classmethod
    def none(cls) -> Counts:
        """Return the counts of no image."""
        pairs, sweep = np.zeros((IDS, IDS), np.int64), np.zeros((len(THRESHOLDS), 2, IDS), np.int64)
        return cls(pairs, pairs.copy(), sweep, sweep.copy())

    def __iadd__(self, other: Counts) -> Counts:
        self.before += other.before
        self.after += other.after
        self.swept_before += other.swept_before
        self.swept_after += other.swept_after
        self.swept += other.swept
        return self


def count(refined: Refined, truth: np.ndarray) -> Counts:
    """Return the counts of one image.

    Args:
        refined: its masks.
        truth: uint8 `[H, W]`; 255 is not counted.
    """
    total = Counts.none()
    total.before = _pairs(refined.coarse, truth)
    total.after = _pairs(refined.labels, truth)
    if refined.swept:
        total.swept_before = sweep(refined.ids, refined.coarse_scores, truth)
        total.swept_after = sweep(refined.ids, refined.scores, truth)
        total.swept = 1
    return total


def _pairs(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    known = truth != IGNORE
    pairs = truth[known].astype(np.int64) * IDS + labels[known]
    return np.bincount(pairs, minlength=IDS * IDS).reshape(IDS, IDS)


def sweep(ids: tuple[int, ...], scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Correct and predicted pixels `[thresholds, 2, 256]`; a pixel is background below a threshold."""
    known = truth != IGNORE
    truth = truth[known]
    best = scores.max(0)[known] if ids else np.full(truth.shape, -1.0)
    labels = decide(ids, scores, None)[known]
    # A pixel belongs to its class up to this many thresholds, and to the background from there on.
    passed = np.searchsorted(THRESHOLDS, best, side="right")
    result = np.zeros((len(THRESHOLDS), 2, IDS), dtype=np.int64)
    for row, chosen in enumerate((labels == truth, np.ones_like(truth, dtype=bool))):
        histogram = np.zeros((len(THRESHOLDS) + 1, IDS), dtype=np.int64)
        np.add.at(histogram, (passed[chosen], labels[chosen]), 1)
        result[:, row] = histogram[::-1].cumsum(0)[::-1][1:]
        rest = (truth == 0) if row == 0 else np.ones_like(chosen)
        below = np.bincount(passed[rest], minlength=len(THRESHOLDS) + 1).cumsum()[:-1]
        result[:, row, 0] += below
    return result


def iou(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Intersection over union in percent of each class `[..., K]`, NaN where `true` has no pixel."""
    union = predicted + true - correct
    return np.where(true > 0, 100 * correct / np.maximum(union, 1), np.nan)


def class_ious(pairs: np.ndarray) -> np.ndarray:
    """Intersection over union in percent `[255]` of a count; ignored predictions are misses."""
    return iou(np.diagonal(pairs), pairs.sum(0), pairs.sum(1))[:IGNORE]


def curve(swept: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Mean intersection over union in percent `[thresholds]`, over the classes that occur in the labels `pairs`."""
    true = pairs.sum(1)
    return np.nanmean(iou(swept[:, 0], swept[:, 1], true)[:, true > 0], axis=1)
