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

from dmsa_kernels.aspp.layout import Tap, empty_map, in_layout_of, is_channels_last, taps

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32: the running sum of one tile stays in a core's second-level cache
# A library call of fewer elements than this runs in the calling thread: on small maps, waiting for the other thread
# after every tap costs more than it brings, and on a busy machine many times more.
SERIAL_ELEMENTS = (1 << 15) - 1
SMALL_MAP_ELEMENTS = 1 << 20
FEW_THREADS = 2
LIBRARY_ELEMENTS = 1 << 20
LIBRARY_PADDING = 6
WIDE_SUM_ELEMENTS = 1 << 16  # below this, sums in float64 cost next to nothing


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    branches, channels = weight.shape[:2]
    out = empty_map(x, channels * (1 if reduce == "sum" else branches))
    if reduce == "concat" and all(library_is_faster(x, weight.shape[-1], d, joined=False) for d in dilations):
        # All branches at once: joining whole branches is faster than copying each to its place.
        joined = torch.cat([_library_branch(x, weight, bias, dilations, r) for r in range(branches)], 1)
        return joined if joined.stride() == out.stride() else out.copy_(joined)
    outs = [out] if reduce == "sum" else _split(out, branches)
    _convolve([x] * branches, weight, bias, dilations, outs)
    return out


def fused_dwconv_project(
    x: Tensor, weight: Tensor, bias: Tensor | None, projection: Tensor, offset: Tensor | None, dilations: Sequence[int]
) -> Tensor:
    """Compute the branches, then their projection ``[B, O, H, W]``, by the library."""
    y = F.conv2d(multi_dilation_dwconv(x, weight, bias, dilations, "concat"), projection[:, :, None, None])
    if offset is not None:
        y += offset[:, :, None, None]
    out = empty_map(x, projection.shape[0])
    return y if y.stride() == out.stride() else out.copy_(y)


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


def library_is_faster(out: Tensor, kernel_size: int, dilation: int, joined: bool) -> bool:
    """Whether ``F.conv2d`` beats the taps for one branch of ``out`` ``[B, C, H, W]``; measured, see the benchmarks."""
    if out.device.type != "cpu":
        return True
    if out.dtype == torch.float64 or (joined and out.dtype != torch.float32):
        return False
    # oneDNN's depthwise kernel takes no padding wider than its register block and falls back to a loop beyond.
    return torch.backends.mkldnn.is_available() and dilation * (kernel_size // 2) <= LIBRARY_PADDING


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


def _tile_elements(like: Tensor) -> int:
    """Return the size of the blocks in which taps are added up into a map ``[B, C, H, W]``."""
    small = like.numel() <= SMALL_MAP_ELEMENTS and torch.get_num_threads() <= FEW_THREADS
    return SERIAL_ELEMENTS if small else TILE_ELEMENTS


def _tiles(like: Tensor, elements: int) -> Iterator[_Tile]:
    """Cut a map ``[B, C, H, W]`` into blocks of about ``elements`` that are long runs of its memory."""
    batch, channels, height, width = like.shape
    images = max(1, elements // (channels * height * width))
    planes, rows = channels, height
    if images == 1 and is_channels_last(like) and like.dtype == _sum_dtype(like.dtype):
        rows = max(1, elements // (channels * width))
    elif images == 1:
        # Narrower types are widened tile by tile: whole planes, so that no row is widened twice.
        planes = max(1, elements // (height * width))
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
    dtype = _sum_dtype(weight.dtype)
    joined = len(outs) < len(sources)
    by_library = [r for r, d in enumerate(dilations) if library_is_faster(outs[0], weight.shape[-1], d, joined)]
    if by_library:
        _convolve_by_library(sources, weight, bias, dilations, outs, by_library)
    by_taps = [r for r in range(len(sources)) if r not in by_library]
    if not by_taps:
        return
    height, width = outs[0].shape[2:]
    filters = weight.permute(0, 2, 3, 1).to(dtype).contiguous()[..., None, None]  # [R, k, k, C, 1, 1]
    offsets = None if bias is None else bias.to(dtype)[..., None, None]  # [R, C, 1, 1]
    inside = {dilation: list(taps(weight.shape[-1], dilation, height, width)) for dilation in dilations}
    for tile in _tiles(outs[0], _tile_elements(outs[0])):
        total = None
        for r in by_taps:
            out = outs[0 if joined else r][tile.images, tile.channels, tile.top : tile.bottom]
            block = sources[r][tile.images, tile.channels].to(dtype)
            scales = filters[r, :, :, tile.channels]
            if total is None or not joined:
                total = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
                fresh = not (joined and by_library)
            else:
                fresh = False
            # Long chains of additions lose digits: the branches of large filters are summed up apart.
            apart = not fresh and weight.shape[-1] > 3
            branch = torch.empty_like(total) if apart else total
            _add_taps(block, scales, inside[dilations[r]], tile, branch, fresh or apart)
            if apart:
                total += branch
            if offsets is not None:
                total += offsets[r, tile.channels]
            if total is not out and (not joined or r == by_taps[-1]):
                out.copy_(total)


def _convolve_by_library(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    outs: Sequence[Tensor],
    branches: Sequence[int],
) -> None:
    """Write what :func:`_convolve` writes for ``branches``, a few images at a time so that no large copy is made."""
    joined = len(outs) < len(sources)
    dtype = _sum_dtype(weight.dtype) if joined else weight.dtype
    per_image = outs[0][0].numel() if len(outs[0]) else 1
    step = max(1, LIBRARY_ELEMENTS // per_image)
    for b in range(0, len(outs[0]), step):
        total = None
        for r in branches:
            y = _library_branch(sources[r][b : b + step].to(dtype), weight, bias, dilations, r)
            if not joined:
                outs[r][b : b + step].copy_(y)
            else:
                total = y if total is None else total.add_(y)
        if total is not None:
            outs[0][b : b + step].copy_(total)


def _library_branch(source: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], r: int) -> Tensor:
    """Return branch ``r`` ``[B, C, H, W]``, computed in the dtype of ``source``."""
    return F.conv2d(
        source,
        weight[r, :, None].to(source.dtype),
        None if bias is None else bias[r].to(source.dtype),
        padding=dilations[r] * (weight.shape[-1] // 2),
        dilation=dilations[r],
        groups=weight.shape[1],
    )


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
    by_taps = []
    for r, dilation in enumerate(dilations):
        if library_weight_gradient_is_faster(x, dilation):
            sums[r] = _library_weight_gradient(grads[r], x, kernel_size, dilation).permute(1, 2, 0)
        else:
            by_taps.append(r)
    for tile in _tiles(x, TILE_ELEMENTS) if by_taps else ():
        source = x[tile.images, tile.channels].to(dtype)
        for r in by_taps:
            block = grads[r][tile.images, tile.channels].to(dtype)
            for tap in inside[dilations[r]]:
                top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
                if top >= bottom:
                    continue
                shifted = source[:, :, top + tap.dy : bottom + tap.dy, tap.left + tap.dx : tap.right + tap.dx]
                product = block[:, :, top:bottom, tap.left : tap.right] * shifted
                sums[r, tap.i, tap.j, tile.channels] += product.sum((2, 3), dtype=partial_dtype).sum(0)
    return sums.permute(0, 3, 1, 2)


def library_weight_gradient_is_faster(x: Tensor, dilation: int) -> bool:
    """Whether the library's weight gradient beats the taps: its fast kernel knows one layout and no dilation."""
    if x.device.type != "cpu":
        return True
    known = x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return known and dilation == 1 and is_channels_last(x) and len(x) > 0


def _library_weight_gradient(grad: Tensor, x: Tensor, kernel_size: int, dilation: int) -> Tensor:
    channels = x.shape[1]
    dtype = _sum_dtype(x.dtype)
    padding = dilation * (kernel_size // 2)
    weight = x.new_empty((channels, 1, kernel_size, kernel_size), dtype=dtype)  # only its shape is read
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.to(dtype),
        x.to(dtype),
        weight,
        None,
        stride=(1, 1),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        transposed=False,
        output_padding=(0, 0),
        groups=channels,
        output_mask=(False, True, False),
    )
    return grad_weight[:, 0]
