"""How sure masks are of their labels, and the anchor that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.refine.checks import check_classes, check_masks

NOISE = 0.6
"""Noise, as a share of what sets the best class apart, at which masks count half as sure."""
STEEPNESS = 8
SAMPLES = 1 << 16
"""Places of a plane above which the noise is measured on a grid of them."""
DEVIATION = 0.6745 * 1.25**0.5
"""Median of the absolute difference of a normal deviate of deviation 1 and the mean of four others."""


@torch.no_grad()
def certainty(masks: Tensor, valid_classes: Tensor | None = None) -> Tensor:
    r"""How sure the masks of each image are: clear without their noise, and with little of it.

    .. math::
        c = \frac{a}{\max S - \min S} \cdot \frac{1}{1 + (\sigma / 0.6\,a)^8},\quad
        a = \mathrm{mean}_q\,\Bigl(\max_c S_c(q) - \mathrm{mean}_{\mathrm{other}\ c}\,S_c(q)\Bigr)

    S are the masks averaged over 3 x 3 places, sigma is the noise: the median difference of a score and the mean of the
    four beside it, which edges hardly move. About 0.5 to 0.95 for averages over cells, 0.3 to 0.5 with normal noise
    of 0.3, 0.05 to 0.3 with noise of 0.5 and for class activation maps, whatever the number of classes. It does not
    change when scores are shifted or scaled. A single class is compared with its minimum.

    Args:
        masks: scores ``[B, C, h, w]``, floating point, any range; those that are not finite count as 0. One value a
            cell: enlarged masks hide much of their noise.
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
    valid = planes.new_ones(batch, classes, dtype=torch.bool) if valid_classes is None else valid_classes
    keep, count = valid[:, :, None, None], valid.sum(1)[:, None, None, None]
    planes = planes.masked_fill(~keep, 0.0)
    smooth = F.avg_pool2d(_bordered(planes), 3, 1)
    highest = smooth.masked_fill(~keep, -torch.inf).amax((1, 2, 3), keepdim=True)
    lowest = smooth.masked_fill(~keep, torch.inf).amin((1, 2, 3), keepdim=True)
    best = smooth.masked_fill(~keep, -torch.inf).amax(1, keepdim=True)
    others = (smooth.sum(1, keepdim=True) - best) / (count - 1)
    apart = (best - torch.where(count > 1, others, lowest)).mean((2, 3), keepdim=True)
    clear = apart / (highest - lowest)
    noise = _noise(planes, valid) / apart
    # beyond 4 nothing is left of it, and the power stays in range
    sure = clear / (1 + (noise / NOISE).clamp(max=4.0) ** STEEPNESS)
    # equal planes of several classes leave 0 / 0, also where they vary over the image
    return torch.where((highest > lowest) & (apart > 0), sure, 0.0)


def _bordered(planes: Tensor) -> Tensor:
    return F.pad(planes, (1, 1, 1, 1), mode="replicate")


def _noise(planes: Tensor, valid: Tensor) -> Tensor:
    """Deviation of the noise of planes [B, C, h, w], from its median over the valid ones [B, C]: [B, 1, 1, 1]."""
    padded = _bordered(planes)
    # the border has fewer than four different neighbours; it counts only where there is nothing else
    if planes.shape[2] > 2:
        padded = padded[:, :, 1:-1]
    if planes.shape[3] > 2:
        padded = padded[:, :, :, 1:-1]
    beside = padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
    step = (padded[:, :, 1:-1, 1:-1] - beside / 4).abs()
    apart = math.isqrt(step.shape[2] * step.shape[3] // SAMPLES) + 1
    step = step[:, :, ::apart, ::apart]
    places = step.shape[2] * step.shape[3]
    ordered = step.masked_fill(~valid[:, :, None, None], torch.inf).flatten(1).sort(1).values
    middle = ((valid.sum(1, keepdim=True) * places - 1) // 2).clamp_min(0)
    return (ordered.gather(1, middle) / DEVIATION)[:, :, None, None]


@dataclass(frozen=True)
class CertaintyAnchor:
    """Anchor that grows with the certainty c of the first masks: ``share * (c - doubt) / (1 - doubt)``, at least 0.

    One value an image. Sure masks are right nearly everywhere, and a refinement wears away what is thin; noisy or
    blurred ones gain.

    Args:
        share: anchor of masks that are quite sure, in [0, 1).
        doubt: certainty in [0, 1) up to which nothing is kept.
    """

    share: float
    doubt: float

    def __call__(self, masks: Tensor, valid_classes: Tensor | None = None) -> Tensor:
        """Return the anchor ``[B, 1, h, w]`` of masks ``[B, C, h, w]``."""
        above = (certainty(masks, valid_classes) - self.doubt).clamp_min(0) / (1 - self.doubt)
        return (self.share * above).expand(-1, -1, *masks.shape[2:])
