"""Methods compared over seeds: the figures of one training, and the differences between trainings of the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmsa.scoring.table import spread

Curve = Sequence[Mapping[str, Any]]
"""A training's evaluations in order, each with `epoch` (zero-based), `miou` and `accuracy` (fractions)."""

FIGURES = ("last", "best", "mean")
"""What is told of a curve: its last epoch, the epoch of its best mIoU, the mean over its epochs."""


def figures(curve: Curve) -> dict[str, float]:
    """Return mIoU and accuracy in percent at the last and at the best epoch and averaged, and `best_epoch` (from 1).

    The keys are `miou_last`, `accuracy_last` and so on for `FIGURES`; the best epoch is that of the highest mIoU.

    Raises:
        ValueError: an empty curve.
    """
    if not curve:
        raise ValueError("an empty curve has no last epoch: expected one evaluation at least")
    best = max(curve, key=lambda entry: entry["miou"])
    found: dict[str, float] = {"best_epoch": best["epoch"] + 1}
    for name in ("miou", "accuracy"):
        values = (curve[-1][name], best[name], np.mean([entry[name] for entry in curve]))
        found |= {f"{name}_{when}": 100 * float(value) for when, value in zip(FIGURES, values, strict=True)}
    return found


def arrival(curve: Curve, miou: float) -> float:
    """Return the first epoch, counted from 1, with an mIoU (fraction) of at least `miou`; NaN if there is none."""
    return next((float(entry["epoch"] + 1) for entry in curve if entry["miou"] >= miou), math.nan)


def arrivals(curves: Sequence[Curve], reference: Sequence[Curve]) -> list[float]:
    """Return, seed by seed, the epoch at which a curve reaches the reference's best mIoU; NaN where it never does."""
    targets = [max(entry["miou"] for entry in curve) for curve in reference]
    return [arrival(curve, target) for curve, target in zip(curves, targets, strict=True)]


def arrived(epochs: Sequence[float]) -> str:
    """Return mean and deviation of the epochs of those that arrive, and how many do: `2.3 ± 0.6 (3 of 5)`."""
    found = [epoch for epoch in epochs if not math.isnan(epoch)]
    return f"{spread(found, 1) if found else '-'} ({len(found)} of {len(epochs)})"


def difference(values: Sequence[float], reference: Sequence[float]) -> str:
    """Return mean and standard deviation of the differences of pairs, and how many are positive: `+1.2 ± 0.8 (4 of 5)`.

    Args:
        values: one a seed.
        reference: the same seeds in the same order.
    """
    pairs = np.subtract(values, reference)
    return f"{'+' if pairs.mean() >= 0 else ''}{spread(pairs.tolist(), 2)} ({int((pairs > 0).sum())} of {len(pairs)})"
