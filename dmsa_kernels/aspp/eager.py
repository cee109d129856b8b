"""The multi-dilation depthwise convolution without Triton: tap accumulation in cache-sized tiles, or the library.

A dilated depthwise convolution is a sum of k * k shifted, scaled copies of the map. PyTorch's own routes take all
k * k of them through generic code once the filter is dilated; adding up only the taps that fall inside the map, tile
by tile so that the running sum stays in cache, is faster except where the library has a specialised kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.aspp.layout import Tap, empty_map, is_channels_last, taps

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32: the running sum of one tile stays in a core's second-level cache


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    channels = x.shape[1]
    out = empty_map(x, channels * (1 if reduce == "sum" else len(dilations)))
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.to(_sum_dtype(x.dtype))[:, :, None, None]  # [R, C, 1, 1]
    filters = _tap_vectors(weight)
    by_taps = []
    for r, dilation in enumerate(dilations):
        if reduce == "concat" and library_is_faster(x, weight.shape[-1], dilation):
            _library_branch(x, weight[r], None if bias is None else bias[r], dilation, _branch(out, r, channels))
        else:
            by_taps.append(r)
    if by_taps:
        _forward_by_taps(x, filters, bias, dilations, reduce, by_taps, out)
    return out


def multi_dilation_dwconv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    reduce: str,
    *,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x ``[B, C, H, W]``, weight ``[R, C, k, k]`` and bias ``[R, C]``, each empty if unneeded."""
    branches, channels = weight.shape[:2]
    grad = _in_layout_of(grad, x)
    grad_x = empty_map(x, channels) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty((branches, channels)) if need_bias else weight.new_empty(0)
    if need_x and x.numel():
        _input_gradient(grad, _tap_vectors(weight), dilations, reduce, grad_x)
    if need_weight:
        grad_weight.copy_(_weight_gradient(grad, x, weight.shape[-1], dilations, reduce))
    if need_bias:
        sums = grad.sum((0, 2, 3), dtype=_sum_dtype(x.dtype))
        grad_bias.copy_(sums.expand(branches, channels) if reduce == "sum" else sums.view(branches, channels))
    return grad_x, grad_weight, grad_bias


def library_is_faster(x: Tensor, kernel_size: int, dilation: int) -> bool:
    """Whether one ``F.conv2d`` beats the tap accumulation for a branch of ``x`` ``[B, C, H, W]``."""
    return False


class _Tile(NamedTuple):
    """A block of a map: images, channels and rows."""

    images: slice
    channels: slice
    top: int
    bottom: int


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _branch(joined: Tensor, r: int, channels: int) -> Tensor:
    return joined[:, r * channels : (r + 1) * channels]


def _tap_vectors(weight: Tensor) -> Tensor:
    """Return the filters as ``[R, k, k, C, 1, 1]`` with the channels of one tap adjacent, in the accumulation dtype."""
    return weight.permute(0, 2, 3, 1).to(_sum_dtype(weight.dtype)).contiguous()[..., None, None]


def _in_layout_of(grad: Tensor, x: Tensor) -> Tensor:
    """Return ``grad`` in memory order like ``x``; expanded and sliced gradients of the same order stay as they are."""
    if is_channels_last(x):
        return grad if grad.stride(1) <= 1 else grad.contiguous(memory_format=torch.channels_last)
    return grad if grad.stride(3) <= 1 and grad.stride(2) <= grad.stride(1) else grad.contiguous()


def _tiles(like: Tensor) -> Iterator[_Tile]:
    """Cut a map ``[B, C, H, W]`` into blocks of about ``TILE_ELEMENTS`` that are long runs of its memory."""
    batch, channels, height, width = like.shape
    per_image = channels * height * width
    images = max(1, TILE_ELEMENTS // per_image)
    planes, rows = channels, height
    if images == 1 and is_channels_last(like) and like.dtype == _sum_dtype(like.dtype):
        rows = max(1, TILE_ELEMENTS // (channels * width))
    elif images == 1:
        planes = max(1, TILE_ELEMENTS // (height * width))
    for b in range(0, batch, images):
        for c in range(0, channels, planes):
            for y in range(0, height, rows):
                yield _Tile(slice(b, b + images), slice(c, c + planes), y, min(y + rows, height))


def _forward_by_taps(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    reduce: str,
    branches: Sequence[int],
    out: Tensor,
) -> None:
    channels, height, width = x.shape[1:]
    sum_dtype = _sum_dtype(x.dtype)
    geometry = {d: list(taps(filters.shape[1], d, height, width)) for d in set(dilations)}
    for tile in _tiles(x):
        source = x[tile.images, tile.channels].to(sum_dtype)
        total: Tensor | None = None
        for r in branches:
            target = (out if reduce == "sum" else _branch(out, r, channels))[tile.images, tile.channels]
            target = target[:, :, tile.top : tile.bottom]
            if reduce == "concat" or total is None:
                total = target if target.dtype == sum_dtype else torch.empty_like(target, dtype=sum_dtype)
                start = True
            for tap in geometry[dilations[r]]:
                top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
                if top >= bottom:
                    continue
                shifted = source[:, :, top + tap.dy : bottom + tap.dy, tap.left + tap.dx : tap.right + tap.dx]
                scale = filters[r, tap.i, tap.j, tile.channels]
                if start:
                    torch.mul(shifted, scale, out=total)
                    start = False
                else:
                    total[:, :, top - tile.top : bottom - tile.top, tap.left : tap.right].addcmul_(shifted, scale)
            if bias is not None:
                total += bias[r, tile.channels]
            if reduce == "concat" and total is not target:
                target.copy_(total)
        if reduce == "sum" and total is not target:
            target.copy_(total)


def _library_branch(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, out: Tensor) -> None:
    padding = dilation * (weight.shape[-1] // 2)
    y = F.conv2d(x, weight[:, None], padding=padding, dilation=dilation, groups=x.shape[1])
    out.copy_(y if bias is None else y + bias)


def _input_gradient(grad: Tensor, filters: Tensor, dilations: Sequence[int], reduce: str, grad_x: Tensor) -> None:
    channels, height, width = grad_x.shape[1:]
    sum_dtype = _sum_dtype(grad_x.dtype)
    geometry = {d: list(taps(filters.shape[1], d, height, width)) for d in set(dilations)}
    for tile in _tiles(grad_x):
        target = grad_x[tile.images, tile.channels, tile.top : tile.bottom]
        total = target if target.dtype == sum_dtype else torch.empty_like(target, dtype=sum_dtype)
        start = True
        for r, dilation in enumerate(dilations):
            branch = (grad if reduce == "sum" else _branch(grad, r, channels))[tile.images, tile.channels]
            branch = branch.to(sum_dtype)
            for tap in geometry[dilation]:
                # The tap carries output pixel q to input pixel q + (dy, dx): these input rows lie inside the tile.
                top, bottom = max(tile.top, tap.top + tap.dy), min(tile.bottom, tap.bottom + tap.dy)
                if top >= bottom:
                    continue
                arriving = branch[:, :, top - tap.dy : bottom - tap.dy, tap.left : tap.right]
                scale = filters[r, tap.i, tap.j, tile.channels]
                if start:
                    torch.mul(arriving, scale, out=total)
                    start = False
                else:
                    columns = slice(tap.left + tap.dx, tap.right + tap.dx)
                    total[:, :, top - tile.top : bottom - tile.top, columns].addcmul_(arriving, scale)
        if total is not target:
            target.copy_(total)


def _weight_gradient(grad: Tensor, x: Tensor, kernel_size: int, dilations: Sequence[int], reduce: str) -> Tensor:
    """Return ``[R, C, k, k]``: every tap's sum of gradient times shifted input, one partial sum a tile."""
    channels, height, width = x.shape[1:]
    sum_dtype = _sum_dtype(x.dtype)
    sums = x.new_zeros((len(dilations), kernel_size, kernel_size, channels), dtype=sum_dtype)
    geometry = {d: list(taps(kernel_size, d, height, width)) for d in set(dilations)}
    for tile in _tiles(x):
        source = x[tile.images, tile.channels].to(sum_dtype)
        for r, dilation in enumerate(dilations):
            branch = (grad if reduce == "sum" else _branch(grad, r, channels))[tile.images, tile.channels]
            branch = branch.to(sum_dtype)
            for tap in geometry[dilation]:
                top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
                if top >= bottom:
                    continue
                arriving = branch[:, :, top:bottom, tap.left : tap.right]
                shifted = source[:, :, top + tap.dy : bottom + tap.dy, tap.left + tap.dx : tap.right + tap.dx]
                sums[r, tap.i, tap.j, tile.channels] += (arriving * shifted).sum((0, 2, 3))
    return sums.permute(0, 3, 1, 2)
