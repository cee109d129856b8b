"""What the refinement is compared with: two plain implementations of the same formula.

`materialising` is how public projects compute it: the map is padded, a convolution with one-hot filters shifts it to
every neighbour, the shifts of all dilations are concatenated to [B, C, P, H, W], multiplied with the affinity, summed.
`padded_slices` makes no such tensor; written for a compiler, it adds up products of slices of padded maps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.refine.spec import PRESETS, AffinitySpec

TAPS = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]


def _filters(x: Tensor) -> Tensor:
    """[8, 1, 3, 3] with a single one in each filter."""
    filters = x.new_zeros(8, 1, 3, 3)
    for p, (i, j) in enumerate(TAPS):
        filters[p, 0, i, j] = 1
    return filters


def _shifted(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """All neighbours of x [B, C, H, W], [B, C, P, H, W]."""
    batch, channels, height, width = x.shape
    filters = _filters(x)
    shifts = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate").view(batch * channels, 1, height + 2 * d, width + 2 * d)
        shifts.append(F.conv2d(padded, filters, dilation=d).view(batch, channels, 8, height, width))
    return torch.cat(shifts, 2)


def _distance_term(dilations: Sequence[int], spec: AffinitySpec, like: Tensor) -> Tensor:
    ring = [math.hypot(i - 1, j - 1) for i, j in TAPS]
    distance = torch.tensor([d * r for d in dilations for r in ring], dtype=like.dtype, device=like.device)
    score = -((distance / (distance.std() * spec.alpha + spec.eps)) ** 2)
    return spec.position_weight * score.softmax(0)


def materialising(image: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, spec: str) -> Tensor:
    """Pad, shift by convolution, concatenate, multiply, sum; a tensor of B*C*P*H*W elements in every iteration."""
    constants = PRESETS[spec]
    near = _shifted(image, dilations)
    centre = image.unsqueeze(2)
    samples = near if constants.sigma == "neighbours" else torch.cat([near] + [centre] * len(dilations), 2)
    sigma = samples.std(2, keepdim=True)
    score = -(((near - centre).abs() / (constants.alpha * sigma + constants.eps)) ** constants.exponent)
    weights = score.mean(1, keepdim=True).softmax(2)  # [B, 1, P, H, W]
    if constants.position_weight:
        weights = weights + _distance_term(dilations, constants, image).view(1, 1, -1, 1, 1)
    for _ in range(num_iter):
        masks = (_shifted(masks, dilations) * weights).sum(2)
    return masks


def materialising_by_chunks(
    image: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, spec: str, chunk: int = 30
) -> Tensor:
    """`materialising`, so many classes at a time: what open-vocabulary code does where all of them do not fit.

    Every chunk computes the affinity again, as the module that such code calls in a loop does.
    """
    parts = [materialising(image, part, dilations, num_iter, spec) for part in masks.split(chunk, 1)]
    return torch.cat(parts, 1)


def _slices(x: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    height, width = x.shape[2:]
    views = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        views += [padded[:, :, i * d : i * d + height, j * d : j * d + width] for i, j in TAPS]
    return views


def sliced_affinity(image: Tensor, dilations: Sequence[int], spec: str) -> Tensor:
    """The affinity [B, P, H, W] from slices of padded images."""
    constants = PRESETS[spec]
    near = _slices(image, dilations)
    samples = near if constants.sigma == "neighbours" else near + [image] * len(dilations)
    mean = sum(samples) / len(samples)
    variance = sum((sample - mean) ** 2 for sample in samples) / (len(samples) - 1)
    scale = constants.alpha * variance.sqrt() + constants.eps
    scores = [-(((view - image).abs() / scale) ** constants.exponent).mean(1) for view in near]
    weights = torch.stack(scores, 1).softmax(1)
    if constants.position_weight:
        weights = weights + _distance_term(dilations, constants, image).view(1, -1, 1, 1)
    return weights


def sliced_step(weights: Tensor, masks: Tensor, dilations: Sequence[int]) -> Tensor:
    """One iteration from slices of padded masks."""
    return sum(weights[:, p : p + 1] * view for p, view in enumerate(_slices(masks, dilations)))


def padded_slices(
    image: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    spec: str,
    affinity: Callable[..., Tensor] = sliced_affinity,
    step: Callable[..., Tensor] = sliced_step,
) -> Tensor:
    """Sums of products of padded slices, without the large tensor."""
    weights = affinity(image, dilations, spec)
    for _ in range(num_iter):
        masks = step(weights, masks, dilations)
    return masks


@functools.cache
def compiled_padded_slices() -> Callable[..., Tensor]:
    """`padded_slices` through torch.compile: affinity and step each one graph, since unrolling ten steps into one
    takes minutes to compile and ran slower."""
    return functools.partial(padded_slices, affinity=torch.compile(sliced_affinity), step=torch.compile(sliced_step))
