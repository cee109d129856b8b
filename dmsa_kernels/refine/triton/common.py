# ruff: noqa: RUF005 (Triton concatenates lists, it does not unpack them)
"""What the refinement kernels share: tap geometry, offset width, launch options."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import compat

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
def tap_offsets(o_tap, dilation):
    """Return the offsets in y and x of taps 0 to 7 of a dilation: row-major 3x3 order without the centre."""
    o_tap = o_tap + (o_tap >= 4).to(tl.int32)
    return (o_tap // 3 - 1) * dilation, (o_tap % 3 - 1) * dilation


@triton.jit
def step_offsets(i, DILATIONS: tl.constexpr, TAPS: tl.constexpr):
    """Return the offsets in y and x of step ``i``: a dilation's eight taps ``[8, 1]`` at a time, or one."""
    if TAPS == 8:
        return tap_offsets(tl.arange(0, 8)[:, None], list(DILATIONS)[i])
    else:
        return list(TAP_Y)[i % 8] * list(DILATIONS)[i // 8], list(TAP_X)[i % 8] * list(DILATIONS)[i // 8]


@triton.jit
def beside_taps(of_pixels, TAPS: tl.constexpr):
    """Return ``[PIXELS]`` in the shape that meets a step's offsets."""
    return of_pixels[None, :] if TAPS == 8 else of_pixels


@triton.jit
def clamped(o_y, o_x, dy, dx, height, width):
    """Return the rows and columns of taps, clamped to the map."""
    return tl.minimum(tl.maximum(o_y + dy, 0), height - 1), tl.minimum(tl.maximum(o_x + dx, 0), width - 1)


@triton.jit
def reverse(o_y, o_x, dy, dx, height, width):
    """Return the rows and columns of the pixels whose taps these are, and which of them are inside the map."""
    q_y = o_y - dy
    q_x = o_x - dx
    return q_y, q_x, (q_y >= 0) & (q_y < height) & (q_x >= 0) & (q_x < width)


@triton.jit
def split_eight(eight):
    """Return the eight tensors ``[PIXELS]`` or ``[PIXELS, BLOCK_C]`` that lie along the first dimension."""
    eight = tl.permute(eight, [1, 2, 0]) if len(eight.shape) == 3 else tl.permute(eight, [1, 0])
    SHAPE: tl.constexpr = eight.shape[:-1]
    even, odd = tl.split(tl.reshape(eight, SHAPE + [4, 2]))
    even_0, even_2 = tl.split(tl.reshape(even, SHAPE + [2, 2]))
    odd_1, odd_3 = tl.split(tl.reshape(odd, SHAPE + [2, 2]))
    e_0, e_4 = tl.split(even_0)
    e_1, e_5 = tl.split(odd_1)
    e_2, e_6 = tl.split(even_2)
    e_3, e_7 = tl.split(odd_3)
    return e_0, e_1, e_2, e_3, e_4, e_5, e_6, e_7


@triton.jit
def add_taps(acc, weights, taps, TAPS: tl.constexpr):
    """Return ``acc + sum_i weights[i] taps[i]`` over the taps of a step, one after another.

    Args:
        acc: ``[PIXELS]`` or ``[PIXELS, BLOCK_C]``.
        weights: ``[8, PIXELS]``, or ``[PIXELS]`` for one tap.
        taps: ``[8, PIXELS]`` or ``[8, PIXELS, BLOCK_C]``, or without the first dimension for one tap.
    """
    if len(acc.shape) == 2:
        weights = tl.broadcast_to(tl.expand_dims(weights, -1), taps.shape)
    if TAPS == 8:
        w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7 = split_eight(weights)
        t_0, t_1, t_2, t_3, t_4, t_5, t_6, t_7 = split_eight(taps)
        acc = tl.fma(w_0, t_0, acc)
        acc = tl.fma(w_1, t_1, acc)
        acc = tl.fma(w_2, t_2, acc)
        acc = tl.fma(w_3, t_3, acc)
        acc = tl.fma(w_4, t_4, acc)
        acc = tl.fma(w_5, t_5, acc)
        acc = tl.fma(w_6, t_6, acc)
        acc = tl.fma(w_7, t_7, acc)
    else:
        acc = tl.fma(weights, taps, acc)
    return acc


@triton.jit
def tile_rows(i_row, tiles_h, row_stride, BLOCK_H: tl.constexpr, o_row):
    """Return the rows of tile ``i_row`` of ``tiles_h``: those of ``row_stride`` tiles, or of what is left, in turn."""
    first = i_row // row_stride * row_stride
    stride = tl.minimum(row_stride, tiles_h - first)
    return first * BLOCK_H + i_row - first + o_row * stride


def taps_each() -> int:
    """Return how many taps kernels read at a time, TAPS: a dilation's eight, or one.

    The compiler's passes take the square of the number of loads. Before Triton 3.7 it splits eight by way of shared
    memory.
    """
    return 8 if compat.triton_splits_in_registers() else 1


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
