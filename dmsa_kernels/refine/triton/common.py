"""What the refinement kernels share: tap geometry, offset width, launch options."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels index constant tuples as lists: the language takes an index of the tuple itself from Triton 3.4 on.
# Row-major 3x3 order without the centre: tap j of dilation d is at (TAP_Y[j] * d, TAP_X[j] * d).
TAP_Y = tl.constexpr((-1, -1, -1, 0, 0, 1, 1, 1))
TAP_X = tl.constexpr((-1, 0, 1, -1, 1, -1, 0, 1))

# What a row or lane that is none adds to a sum: 0 would turn a sum of -0 into 0, so the compiler would have to add it.
NOTHING = tl.constexpr(-0.0)

# The kernels write their fused multiply-adds out; naming the option keeps its changing default out of the result.
LAUNCH = {"enable_fp_fusion": True}

_INT32_MAX = 2**31 - 1
# A flat block of pixels ends at most this far beyond its plane, before the mask applies.
_OVERRUN = 4096


@triton.jit
def tile_rows(i_row, tiles_h, row_stride, BLOCK_H: tl.constexpr, o_row):
    """Return the rows of tile ``i_row`` of ``tiles_h``: those of ``row_stride`` tiles, or of what is left, in turn."""
    first = i_row // row_stride * row_stride
    stride = tl.minimum(row_stride, tiles_h - first)
    return first * BLOCK_H + i_row - first + o_row * stride


def in_float32(constant: float) -> float:
    """Return a positive constant, no smaller than a normal float32: kernels take others for double precision."""
    return max(float(constant), torch.finfo(torch.float32).tiny)


def needs_int64(*tensors: Tensor) -> bool:
    """Return whether an offset into one of ``tensors`` can leave 32 bits; meta tensors do."""
    for tensor in tensors:
        reach = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride()))
        if tensor.numel() and reach + _OVERRUN > _INT32_MAX:
            return True
    return False


# The dilation lists people run: PAMR's own, open-vocabulary heads', remote sensing's, AFA's six, DiffCut's eight.
OFFLINE_DILATIONS = ((1,), (8, 16), (1, 2, 4), (1, 2, 4, 8, 12, 24), (1, 2, 4, 8, 12, 24, 32, 64))


def pointer(dtype: torch.dtype) -> str:
    """Return Triton's name of a pointer to ``dtype``."""
    return {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
