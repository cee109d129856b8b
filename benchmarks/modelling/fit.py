"""The cost model's constants on a CPU, fitted to what was measured there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.measuring.results import Result


@dataclass(frozen=True)
class Fit:
    """Seconds = call + operations · s_op + bytes · s_byte of one operator on one machine, and how well it predicts."""

    operator: str
    constants: tuple[float, float, float]
    median_error: float
    """Median over the rows of |predicted / measured - 1|."""
    worst_error: float
    left_out_error: float
    """Median of the same with the row left out of the fit."""
    predictions: tuple[tuple[str, float, float], ...]
    """Row name, measured and predicted seconds."""


def non_negative_fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Minimise the relative squared error of `features @ x` against `seconds` over x >= 0.

    There are three features, so every subset of them is tried.
    """
    scaled = features / seconds[:, None]
    ones = np.ones(len(seconds))
    best, least = np.zeros(features.shape[1]), math.inf
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            # Columns differ by twenty orders of magnitude.
            columns = scaled[:, chosen]
            norms = np.linalg.norm(columns, axis=0)
            if not norms.all():
                continue
            part = np.linalg.lstsq(columns / norms, ones, rcond=None)[0] / norms
            if (part < 0).any():
                continue
            loss = float(((columns @ part - ones) ** 2).sum())
            if loss < least:
                best, least = np.zeros(features.shape[1]), loss
                best[list(chosen)] = part
    return best


def measured(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Group our measured rows with known counts by operator: family, variant and number format."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.ours and result.status == "ok" and result.operations > 0 and result.floor_bytes > 0:
            groups.setdefault(f"{result.family} {result.variant}, {result.candidate}", []).append(result)
    return groups


def fit(name: str, results: Sequence[Result]) -> Fit:
    """Fit one operator's constants, and judge them on the rows themselves and on rows left out.

    Raises:
        ValueError: fewer than four rows.
    """
    if len(results) < 4:
        raise ValueError(f"{name}: {len(results)} rows, expected at least 4 for three constants")
    features = np.array([[1.0, r.operations, r.floor_bytes] for r in results])
    seconds = np.array([r.median_ms / 1e3 for r in results])
    constants = non_negative_fit(features, seconds)
    predicted = features @ constants
    left_out = []
    for i in range(len(results)):
        rest = np.arange(len(results)) != i
        left_out.append(abs(features[i] @ non_negative_fit(features[rest], seconds[rest]) / seconds[i] - 1))
    error = np.abs(predicted / seconds - 1)
    return Fit(
        name,
        tuple(constants.tolist()),
        float(np.median(error)),
        float(error.max()),
        float(np.median(left_out)),
        tuple(
            (f"{r.workload} {r.shape}", float(a), float(b)) for r, a, b in zip(results, seconds, predicted, strict=True)
        ),
    )
