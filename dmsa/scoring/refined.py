"""What is scored of a network: its scores as they are, or refined by PAR along the picture (`model.refine`)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from dmsa.config import Config
from dmsa.data.transforms import denormalise
from dmsa.labels.fuse import refine_scores


def refined(logits: Tensor, images: Tensor, config: Config) -> Tensor:
    """Return `logits` ``[B, K, h, w]``, or their softmax after PAR at the resolution at which labels are refined.

    Args:
        logits: of the student.
        images: normalised ``[B, 3, S, S]``, what it saw.
        config: reads `model.refine`, `labels.par_dilations` and `labels.par_iterations`.
    """
    if config.model.refine == "off":
        return logits
    labels = dataclasses.replace(config.labels, par="on", label_grid="pixels")
    return refine_scores(logits.float().softmax(1), denormalise(images).float(), labels)


def remarks(config: Config) -> list[str]:
    """Return what must be said beside a score of a network with this configuration."""
    if config.model.refine == "off":
        return []
    return ["predictions refined by PAR along the picture: not comparable with scores that are not"]
