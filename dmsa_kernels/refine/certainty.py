"""How sure masks are of their labels, and the anchor that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmsa_kernels.refine.checks import check_classes, check_masks


@torch.no_grad()
def certainty(masks: Tensor, valid_classes: Tensor | None = None) -> Tensor:
    r"""How sure the masks of each image are: mean over the pixels of best minus second best score, over their range.

    .. math::
        c = \frac{\mathrm{mean}_q\,(M_{(1)}(q) - M_{(2)}(q))}{\max_{c,q} M - \min_{c,q} M}

    About 1 for averages over cells that are mostly inside one class, 0.2 with normal noise of 0.3 and for class
    activation maps. It does not change when scores are shifted or scaled. A single class is compared with its minimum.

    Args:
        masks: scores ``[B, C, h, w]``, floating point, any range; those that are not finite count as 0.
        valid_classes: bool ``[B, C]``, classes to look at; see :func:`propagate`.

    Returns:
        ``[B, 1, 1, 1]`` in [0, 1], float32 or float64, without gradient; 0 without classes or for constant masks.
    """
    check_masks(masks, "masks", masks.shape[0], masks.device)
    check_classes(masks, valid_classes, return_labels=False)
    planes = torch.nan_to_num(masks if masks.dtype == torch.float64 else masks.float(), 0.0, 0.0, 0.0)
    batch, classes = planes.shape[:2]
    if batch == 0 or classes == 0:
        return planes.new_zeros(batch, 1, 1, 1)
    valid = planes.new_ones(batch, classes, 1, 1, dtype=torch.bool)
    if valid_classes is not None:
        valid = valid_classes[:, :, None, None]
    highest = planes.masked_fill(~valid, -torch.inf).amax((1, 2, 3), keepdim=True)
    lowest = planes.masked_fill(~valid, torch.inf).amin((1, 2, 3), keepdim=True)
    # Classes that are not valid, and the second of a single class, count as the lowest score.
    planes = torch.where(valid, planes, lowest)
    best, where = planes.max(1, keepdim=True)
    second = planes.scatter(1, where, lowest.expand_as(best)).amax(1, keepdim=True)
    margin = (best - second).mean((2, 3), keepdim=True) / (highest - lowest)
    return torch.where(highest > lowest, margin, 0.0)


@dataclass(frozen=True)
class CertaintyAnchor:
    """Anchor that grows with the certainty of the first masks: ``share * certainty ** power``, one value an image.

    Sure masks are right nearly everywhere, and a refinement wears away what is thin; noisy or blurred ones gain.

    Args:
        share: anchor of masks that are quite sure, in [0, 1).
        power: > 0.
    """

    share: float
    power: float

    def __call__(self, masks: Tensor, valid_classes: Tensor | None = None) -> Tensor:
        """Return the anchor ``[B, 1, h, w]`` of masks ``[B, C, h, w]``."""
        anchor = self.share * certainty(masks, valid_classes) ** self.power
        return anchor.expand(-1, -1, *masks.shape[2:])
