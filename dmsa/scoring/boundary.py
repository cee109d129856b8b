"""Boundary F-score: whether class borders lie where they should, whatever the classes are called."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 2
"""Pixels by which a boundary may be off in the boundary F-score."""


def boundaries(label: Tensor) -> Tensor:
    """Pixels whose right or lower neighbour has another class, bool ``[B, H, W]`` for ``label [B, H, W]``."""
    edge = torch.zeros_like(label, dtype=torch.bool)
    edge[:, :, :-1] |= label[:, :, 1:] != label[:, :, :-1]
    edge[:, :-1] |= label[:, 1:] != label[:, :-1]
    return edge


class BoundaryScore:
    """Boundary F-score of a set, whatever the classes are called: precision and recall of class borders.

    Args:
        tolerance: A border pixel counts as found if the other map has one within this many rows and columns.
    """

    def __init__(self, tolerance: int = TOLERANCE) -> None:
        if tolerance < 0:
            raise ValueError(f"{tolerance=}: expected a number of pixels, at least 0")
        self.tolerance = tolerance
        self.counts = np.zeros(4, dtype=np.int64)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Count the borders of class maps ``[B, H, W]``; names of classes do not matter."""
        found, wanted = boundaries(predicted), boundaries(label)
        near_found, near_wanted = self._widen(found), self._widen(wanted)
        hits = (found & near_wanted, found, wanted & near_found, wanted)
        self.counts += np.array([int(hit.sum()) for hit in hits])

    def _widen(self, edge: Tensor) -> Tensor:
        size = 2 * self.tolerance + 1
        return F.max_pool2d(edge[:, None].float(), size, stride=1, padding=self.tolerance)[:, 0] > 0

    @property
    def value(self) -> float:
        """F-score in percent; 0 where nothing is found."""
        hit, found, recalled, wanted = self.counts.tolist()
        precision, recall = hit / max(found, 1), recalled / max(wanted, 1)
        return 200 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
