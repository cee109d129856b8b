"""From logits on a coarse grid to labels of a picture of any size, in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UPSAMPLED_VALUES = 2**26  # logits that are upsampled at once, at most, but for one class: 256 MiB in fp32


def upsampled_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the argmax over the classes of bilinearly upsampled logits, the lowest id where several are equal.

    All classes of a picture at once where they fit `UPSAMPLED_VALUES`, else a few at a time beside their maximum so
    far: the result is the same, and memory does not grow with the number of classes.

    Args:
        logits: `[B, K, h, w]`, any floating dtype; K is at most 256.
        size: (H, W) of the labels.

    Returns:
        uint8 `[B, H, W]`, on the device of `logits`.
    """
    values = logits.shape[1] * size[0] * size[1]
    if values > UPSAMPLED_VALUES:
        return torch.stack([_by_classes(one, size) for one in logits])
    parts = logits.split(max(1, UPSAMPLED_VALUES // max(1, values)))
    return torch.cat([_upsample(part, size).argmax(1).to(torch.uint8) for part in parts])


def _by_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    highest = torch.full(size, -torch.inf, device=logits.device)
    ids = iter(range(len(logits)))
    for part in logits[None].split(max(1, UPSAMPLED_VALUES // (size[0] * size[1])), dim=1):
        for scores in _upsample(part, size)[0]:
            labels.masked_fill_(scores > highest, next(ids))
            torch.maximum(highest, scores, out=highest)
    return labels


def _upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
