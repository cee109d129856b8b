"""What the refinement kernels share: tap geometry, offset width, launch options."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

# Row-major 3x3 order without the centre: tap j of dilation d is at (TAP_Y[j] * d, TAP_X[j] * d).
TAP_Y = tl.constexpr((-1, -1, -1, 0, 0, 1, 1, 1))
TAP_X = tl.constexpr((-1, 0, 1, -1, 1, -1, 0, 1))

# The kernels write their fused multiply-adds out; naming the option keeps its changing default out of the result.
LAUNCH = {"enable_fp_fusion": True}

_INT32_MAX = 2**31 - 1
# Tiles overrun the map by less than this many elements in a direction, before the mask applies.
_TILE_OVERRUN = 4096


def needs_int64(*tensors: Tensor) -> bool:
    """Return whether an offset into one of ``tensors`` can leave 32 bits; meta tensors do."""
    for tensor in tensors:
        reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        overrun = _TILE_OVERRUN * max((abs(stride) for stride in tensor.stride()[-2:]), default=1)
        if tensor.numel() and reach + overrun > _INT32_MAX:
            return True
    return False


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make ``tensor``'s GPU the current one while a kernel is launched; nothing to do on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def position_weights(dilations: Sequence[int], alpha: float, eps: float, position_weight: float) -> tuple[float, ...]:
    """Return ``position_weight * softmax_p(-(r_p / (alpha * std(r) + eps))^2)`` for P neighbours, in double precision.

    ``r_p`` is ``d`` for the straight and ``sqrt(2) * d`` for the diagonal neighbours; ``std`` is over P, ddof = 1.
    """
    distances = [d * math.hypot(y, x) for d in dilations for y, x in zip(TAP_Y.value, TAP_X.value, strict=True)]
    mean = math.fsum(distances) / len(distances)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in distances) / (len(distances) - 1))
    scores = [-((r / (alpha * std + eps)) ** 2) for r in distances]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return tuple(position_weight * e / math.fsum(exponentials) for e in exponentials)
