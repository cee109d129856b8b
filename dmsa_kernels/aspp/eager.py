"""The multi-dilation depthwise convolution without Triton: tap accumulation in cache-sized tiles, or the library.

A dilated depthwise convolution is a sum of k * k shifted, scaled copies of the map. PyTorch's own routes take all
k * k of them through generic code once the filter is dilated; adding up only the taps that fall inside the map, tile
by tile so that the running sum stays in cache, is faster except where the library has a specialised kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmsa_kernels.aspp.layout import Tap, empty_map, in_layout_of, is_channels_last, taps

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32: the running sum of one tile stays in a core's second-level cache
WIDE_SUM_ELEMENTS = 1 << 16  # below this, sums in float64 cost next to nothing


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    branches, channels = weight.shape[:2]
    out = empty_map(x, channels * (1 if reduce == "sum" else branches))
    outs = [out] if reduce == "sum" else _split(out, branches)
    _convolve([x] * branches, weight, bias, dilations, outs)
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
    """Return the gradients of x ``[B, C, H, W]``, weight ``[R, C, k, k]`` and bias ``[R, C]``, ``[0]`` if unneeded."""
    branches, channels = weight.shape[:2]
    grad = in_layout_of(grad, x)
    grads = [grad] * branches if reduce == "sum" else _split(grad, branches)
    grad_x = empty_map(x, channels) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty((branches, channels)) if need_bias else weight.new_empty(0)
    if need_x:
        _convolve(grads, weight.flip(2, 3), None, dilations, [grad_x])
    if need_weight:
        grad_weight.copy_(_weight_gradient(grads, x, weight.shape[-1], dilations))
    if need_bias:
        grad_bias.copy_(grad.sum((0, 2, 3), dtype=torch.float64).view(-1, channels).expand(branches, channels))
    return grad_x, grad_weight, grad_bias


class _Tile(NamedTuple):
    """A block of a map: images, channels and rows."""

    images: slice
    channels: slice
    top: int
    bottom: int


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _split(joined: Tensor, branches: int) -> list[Tensor]:
    """Return the R views ``[B, C, H, W]`` of ``[B, R * C, H, W]``."""
    return list(joined.unflatten(1, (branches, -1)).unbind(1))


def _tiles(like: Tensor) -> Iterator[_Tile]:
    """Cut a map ``[B, C, H, W]`` into blocks of about ``TILE_ELEMENTS`` that are long runs of its memory."""
    batch, channels, height, width = like.shape
    images = max(1, TILE_ELEMENTS // (channels * height * width))
    planes, rows = channels, height
    if images == 1 and is_channels_last(like) and like.dtype == _sum_dtype(like.dtype):
        rows = max(1, TILE_ELEMENTS // (channels * width))
    elif images == 1:
        # Narrower types are widened tile by tile: whole planes, so that no row is widened twice.
        planes = max(1, TILE_ELEMENTS // (height * width))
    for b in range(0, batch, images):
        for c in range(0, channels, planes):
            for y in range(0, height, rows):
                yield _Tile(slice(b, b + images), slice(c, c + planes), y, min(y + rows, height))


def _convolve(
    sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None, dilations: Sequence[int], outs: Sequence[Tensor]
) -> None:
    """Write the branches, source r convolved with filter r, into R ``outs``, or their sum into the only one.

    Args:
        sources: R maps ``[B, C, H, W]``: the input R times, or the branches' gradients.
        weight: ``[R, C, k, k]``.
        bias: ``[R, C]`` or ``None``.
        dilations: R dilations.
        outs: R maps or one, ``[B, C, H, W]``, overwritten.
    """
    height, width = outs[0].shape[2:]
    dtype = _sum_dtype(weight.dtype)
    filters = weight.permute(0, 2, 3, 1).to(dtype).contiguous()[..., None, None]  # [R, k, k, C, 1, 1]
    offsets = None if bias is None else bias.to(dtype)[..., None, None]  # [R, C, 1, 1]
    inside = {dilation: list(taps(weight.shape[-1], dilation, height, width)) for dilation in dilations}
    joined = len(outs) < len(sources)
    for tile in _tiles(outs[0]):
        total = None
        for r, (source, dilation) in enumerate(zip(sources, dilations, strict=True)):
            out = outs[0 if joined else r][tile.images, tile.channels, tile.top : tile.bottom]
            block = source[tile.images, tile.channels].to(dtype)
            scales = filters[r, :, :, tile.channels]
            if not joined:
                total = None
            fresh = total is None
            if fresh:
                total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
            # Long chains of additions lose digits: the branches of large filters are summed up apart.
            apart = not fresh and weight.shape[-1] > 3
            branch = torch.empty_like(total) if apart else total
            _add_taps(block, scales, inside[dilation], tile, branch, fresh or apart)
            if apart:
                total += branch
            if offsets is not None:
                total += offsets[r, tile.channels]
            if total is not out and (not joined or r == len(sources) - 1):
                out.copy_(total)


def _add_taps(source: Tensor, scales: Tensor, inside: Sequence[Tap], tile: _Tile, total: Tensor, fresh: bool) -> None:
    """Add to ``total``, the rows of ``tile``, every tap's share of ``source``; ``fresh`` overwrites what is there."""
    for tap in inside:
        top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
        if top >= bottom:
            continue
        shifted = source[:, :, top + tap.dy : bottom + tap.dy, tap.left + tap.dx : tap.right + tap.dx]
        if fresh:  # the centre tap comes first and covers the tile
            torch.mul(shifted, scales[tap.i, tap.j], out=total)
            fresh = False
        else:
            reached = total[:, :, top - tile.top : bottom - tile.top, tap.left : tap.right]
            reached.addcmul_(shifted, scales[tap.i, tap.j])


def _weight_gradient(grads: Sequence[Tensor], x: Tensor, kernel_size: int, dilations: Sequence[int]) -> Tensor:
    """Return ``[R, C, k, k]`` in float64: every tap's sum of gradient times shifted input.

    The partial sums of one plane of one tile are float32: those of few values, which may cancel, are float64.
    """
    channels, height, width = x.shape[1:]
    dtype = _sum_dtype(x.dtype)
    partial_dtype = torch.float64 if x.numel() < WIDE_SUM_ELEMENTS else dtype
    sums = x.new_zeros((len(dilations), kernel_size, kernel_size, channels), dtype=torch.float64)
    inside = {dilation: list(taps(kernel_size, dilation, height, width)) for dilation in dilations}
    for tile in _tiles(x):
        source = x[tile.images, tile.channels].to(dtype)
        for r, (grad, dilation) in enumerate(zip(grads, dilations, strict=True)):
            block = grad[tile.images, tile.channels].to(dtype)
            for tap in inside[dilation]:
                top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
                if top >= bottom:
                    continue
                shifted = source[:, :, top + tap.dy : bottom + tap.dy, tap.left + tap.dx : tap.right + tap.dx]
                product = block[:, :, top:bottom, tap.left : tap.right] * shifted
                sums[r, tap.i, tap.j, tile.channels] += product.sum((2, 3), dtype=partial_dtype).sum(0)
    return sums.permute(0, 3, 1, 2)
