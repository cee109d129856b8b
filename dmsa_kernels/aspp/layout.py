"""Memory layouts and tap geometry that every implementation of the operator shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of ``x`` ``[B, C, H, W]`` are adjacent in memory: channels_last, or a view of tokens."""
    return x.stride(1) == 1 and x.shape[1] > 1 and (x.stride(3) != 1 or x.shape[3] == 1)


def empty_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate ``[B, channels, H, W]``, dense, in the layout of ``like``."""
    batch, _, height, width = like.shape
    if is_channels_last(like):
        return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return like.new_empty((batch, channels, height, width), dtype=dtype)


def in_layout_of(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad`` in memory order like ``x``; expanded and sliced gradients of the same order stay as they are."""
    if is_channels_last(x):
        return grad if grad.stride(1) <= 1 else grad.contiguous(memory_format=torch.channels_last)
    return grad if grad.stride(3) <= 1 and grad.stride(2) <= grad.stride(1) else grad.contiguous()


class Tap(NamedTuple):
    """One filter tap: its place in the filter, its offset, and the output rows and columns whose input it reads."""

    i: int
    j: int
    dy: int
    dx: int
    top: int
    bottom: int
    left: int
    right: int


def taps(kernel_size: int, dilation: int, height: int, width: int) -> Iterator[Tap]:
    """Yield the taps that fall inside a map ``height`` x ``width`` for some output pixel, the centre first.

    At rate 18 a 20 x 20 map leaves little of the eight outer taps, and at rate 20 nothing: those are not yielded.
    """
    half = kernel_size // 2
    order = sorted(range(kernel_size), key=lambda i: abs(i - half))
    for i in order:
        for j in order:
            dy, dx = (i - half) * dilation, (j - half) * dilation
            if abs(dy) < height and abs(dx) < width:
                yield Tap(i, j, dy, dx, max(0, -dy), height - max(0, dy), max(0, -dx), width - max(0, dx))
