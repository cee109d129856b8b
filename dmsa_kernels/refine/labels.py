"""The largest plane of a stack of score planes, whole or in chunks of classes."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, valid_classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class and value of the largest valid plane of scores [B, C, H, W], both [B, H, W].

    As :func:`torch.max`: the lowest class wins a tie, and a NaN wins. Label 0 and minus infinity where an image has
    no valid class.
    """
    if valid_classes is not None:
        scores = scores.where(valid_classes[:, :, None, None], -torch.inf)
    values, labels = scores.max(1)
    return labels, values


def merge_larger(labels: Tensor, values: Tensor, other_labels: Tensor, other_values: Tensor) -> tuple[Tensor, Tensor]:
    """Of two label maps [B, H, W] with their values, the larger one; the first wins ties, and a NaN wins."""
    larger = (other_values > values) | (other_values.isnan() & ~values.isnan())
    return torch.where(larger, other_labels, labels), torch.where(larger, other_values, values)
