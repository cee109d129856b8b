"""The multi-dilation depthwise convolution without Triton: tap accumulation in cache-sized tiles, or the library.

A dilated depthwise convolution is a sum of k * k shifted, scaled copies of the map. PyTorch's own routes take all
k * k of them through generic code where the padding is wide or the filter's gradient is dilated; adding up only the
taps that fall inside the map, tile by tile so that the running sum stays in cache, is faster there. Both work through
the map in pieces: results that pass the allocator's threshold (32 MiB in glibc) are mapped page by page at every call,
which costs more than the arithmetic.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.aspp.layout import Tap, empty_map, in_layout_of, is_channels_last, taps

TILE_ELEMENTS = 1 << 18  # of one thread: the running sum of a tile, 1 MiB of float32, stays in or near its core
LIBRARY_ELEMENTS = 1 << 21  # of a branch by the library at a time: 8 MiB, far below the allocator's threshold
WIDE_SUM_ELEMENTS = 1 << 16  # below this, sums in float64 cost next to nothing


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    branches, channels = weight.shape[:2]
    out = empty_map(x, channels * (1 if reduce == "sum" else branches))
    _convolve([x] * branches, weight, bias, dilations, out)
    return out


def fused_dwconv_project(
    x: Tensor, weight: Tensor, bias: Tensor | None, projection: Tensor, offset: Tensor | None, dilations: Sequence[int]
) -> Tensor:
    """Compute the branches, then their projection ``[B, O, H, W]``, by the library."""
    y = F.conv2d(multi_dilation_dwconv(x, weight, bias, dilations, "concat"), projection[:, :, None, None])
    if offset is not None:
        y += offset[:, :, None, None]
    strides = empty_map(x[:0], projection.shape[0]).stride()  # the batch does not enter into them
    return y if y.stride() == strides else empty_map(x, projection.shape[0]).copy_(y)


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
        _convolve(grads, weight.flip(2, 3), None, dilations, grad_x)
    if need_weight:
        grad_weight.copy_(_weight_gradient(grads, x, weight.shape[-1], dilations))
    if need_bias:
        grad_bias.copy_(grad.sum((0, 2, 3), dtype=torch.float64).view(-1, channels).expand(branches, channels))
    return grad_x, grad_weight, grad_bias


def widest_library_padding(out: Tensor, summed: bool) -> int:
    """Return the padding up to which ``F.conv2d`` beats the taps for a branch of ``out`` ``[B, C, H, W]``; measured."""
    if not out.is_cpu:
        return sys.maxsize
    narrow_sum = summed and out.dtype != torch.float32
    if out.dtype == torch.float64 or narrow_sum or not torch.backends.mkldnn.is_available():
        return 0
    # oneDNN's depthwise kernel takes no padding wider than its register block and falls back to a loop beyond.
    return 6 if _has_avx512() else 4


@functools.cache
def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


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
    return list(joined.chunk(branches, 1))


def _tiles(like: Tensor) -> Iterator[_Tile]:
    """Cut a map ``[B, C, H, W]`` into blocks of about :data:`TILE_ELEMENTS` a thread, long runs of its memory."""
    batch, channels, height, width = like.shape
    elements = TILE_ELEMENTS * torch.get_num_threads()
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
    sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None, dilations: Sequence[int], out: Tensor
) -> None:
    """Write the branches, source r convolved with filter r, side by side into ``out``, or their sum.

    Args:
        sources: R maps ``[B, C, H, W]``: the input R times, or the branches' gradients.
        weight: ``[R, C, k, k]``.
        bias: ``[R, C]`` or ``None``.
        dilations: R dilations.
        out: ``[B, R * C, H, W]``, or ``[B, C, H, W]`` for the sum, overwritten.
    """
    branches, channels = weight.shape[:2]
    summed = out.shape[1] < branches * channels
    outs = [out] * branches if summed else _split(out, branches)
    widest = widest_library_padding(out, summed) // (weight.shape[-1] // 2)
    by_library = [r for r, dilation in enumerate(dilations) if dilation <= widest]
    if by_library:
        _convolve_by_library(sources, weight, bias, dilations, outs, by_library, summed)
    by_taps = [r for r in range(branches) if r not in by_library]
    if not by_taps:
        return
    dtype = _sum_dtype(weight.dtype)
    height, width = out.shape[2:]
    filters = weight.permute(0, 2, 3, 1).to(dtype).contiguous()[..., None, None]  # [R, k, k, C, 1, 1]
    offsets = None if bias is None else bias.to(dtype)[..., None, None]  # [R, C, 1, 1]
    inside = {dilation: list(taps(weight.shape[-1], dilation, height, width)) for dilation in dilations}
    for tile in _tiles(outs[0]):
        total = None
        for r in by_taps:
            target = outs[r][tile.images, tile.channels, tile.top : tile.bottom]
            block = sources[r][tile.images, tile.channels].to(dtype)
            scales = filters[r, :, :, tile.channels].flatten(0, 1).unbind(0)
            if total is None or not summed:
                total = target if out.dtype == dtype else torch.empty_like(target, dtype=dtype)
                fresh = not (summed and by_library)
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
            if total is not target and (not summed or r == by_taps[-1]):
                target.copy_(total)


def _convolve_by_library(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    outs: Sequence[Tensor],
    by_library: Sequence[int],
    summed: bool,
) -> None:
    """Write what :func:`_convolve` writes for the branches ``by_library``, a few images at a time.

    Narrow types are computed in float32, for which alone the library's kernel exists on every processor.

    Args:
        sources, weight, bias, dilations: as in :func:`_convolve`.
        outs: R results ``[B, C, H, W]``, one and the same tensor R times for the sum.
        by_library: the branches' indices.
        summed: whether to add the branches up.
    """
    batch, elements = len(outs[0]), outs[0].numel()
    if batch > 1 and elements > LIBRARY_ELEMENTS and outs[0].device.type == "cpu":
        step = max(1, -(-batch // -(-elements // LIBRARY_ELEMENTS)))  # pieces of about the same size
        for piece in (slice(b, b + step) for b in range(0, batch, step)):
            inputs, results = [source[piece] for source in sources], [out[piece] for out in outs]
            _convolve_by_library(inputs, weight, bias, dilations, results, by_library, summed)
        return
    dtype = _sum_dtype(weight.dtype)
    narrow = weight.dtype != dtype
    filters = (weight.to(dtype) if narrow else weight).unsqueeze(2).unbind(0)  # R times [C, 1, k, k]
    offsets = [None] * len(filters) if bias is None else bias.to(dtype).unbind(0)  # R times [C]
    channels, half = weight.shape[1], weight.shape[-1] // 2
    total = None
    for r in by_library:
        dilation = dilations[r]
        source = sources[r].to(dtype) if narrow else sources[r]
        branch = F.conv2d(source, filters[r], offsets[r], 1, dilation * half, dilation, channels)
        if not summed:
            outs[r].copy_(branch)
        elif total is None:
            total = branch
        else:
            total += branch
        del branch  # the next branch takes its memory, which is still in the cache
    if total is not None:
        outs[0].copy_(total)


def _window(block: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Return ``block[:, :, top:bottom, left:right]``, at half the cost: a tile makes two such views a tap."""
    batch, channels = block.shape[:2]
    row, column = block.stride(2), block.stride(3)
    offset = block.storage_offset() + top * row + left * column
    return block.as_strided((batch, channels, bottom - top, right - left), block.stride(), offset)


def _add_taps(
    source: Tensor, scales: Sequence[Tensor], inside: Sequence[Tap], tile: _Tile, total: Tensor, fresh: bool
) -> None:
    """Add to ``total``, the rows of ``tile``, every tap's share of ``source``; ``fresh`` overwrites what is there.

    Args:
        source: ``[b, c, H, W]``, the images and channels of the tile.
        scales: k * k factors ``[c, 1, 1]``.
        inside: the taps inside the map, the centre first.
        tile: where ``total`` lies.
        total: ``[b, c, rows, W]``.
        fresh: whether to write the first tap instead of adding it.
    """
    kernel_size = round(len(scales) ** 0.5)
    for tap in inside:
        top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
        if top >= bottom:
            continue
        shifted = _window(source, top + tap.dy, bottom + tap.dy, tap.left + tap.dx, tap.right + tap.dx)
        scale = scales[tap.i * kernel_size + tap.j]
        if fresh:  # the centre tap comes first and covers the tile
            torch.mul(shifted, scale, out=total)
            fresh = False
        else:
            _window(total, top - tile.top, bottom - tile.top, tap.left, tap.right).addcmul_(shifted, scale)


def _weight_gradient(grads: Sequence[Tensor], x: Tensor, kernel_size: int, dilations: Sequence[int]) -> Tensor:
    """Return ``[R, C, k, k]`` in float64: every tap's sum of gradient times shifted input.

    The partial sums of one plane of one tile are float32: those of few values, which may cancel, are float64.
    """
    channels, height, width = x.shape[1:]
    dtype = _sum_dtype(x.dtype)
    partial_dtype = torch.float64 if x.numel() < WIDE_SUM_ELEMENTS else dtype
    sums = x.new_zeros((len(dilations), kernel_size * kernel_size, channels), dtype=torch.float64)
    inside = {dilation: list(taps(kernel_size, dilation, height, width)) for dilation in dilations}
    by_taps = []
    for r, dilation in enumerate(dilations):
        if library_weight_gradient_is_faster(x, dilation):
            sums[r] = _library_weight_gradient(grads[r], x, kernel_size, dilation).flatten(1).t()
        else:
            by_taps.append(r)
    for tile in _tiles(x) if by_taps else ():
        source = x[tile.images, tile.channels].to(dtype)
        for r in by_taps:
            block = grads[r][tile.images, tile.channels].to(dtype)
            partial = x.new_zeros((len(sums[r]), *source.shape[:2]), dtype=partial_dtype)  # [k * k, b, c]
            for tap in inside[dilations[r]]:
                top, bottom = max(tile.top, tap.top), min(tile.bottom, tap.bottom)
                if top >= bottom:
                    continue
                shifted = _window(source, top + tap.dy, bottom + tap.dy, tap.left + tap.dx, tap.right + tap.dx)
                target = partial[tap.i * kernel_size + tap.j]
                # The product is in no variable: the next one takes its memory, which is still in the cache.
                torch.sum(
                    _window(block, top, bottom, tap.left, tap.right) * shifted, (2, 3), dtype=partial_dtype, out=target
                )
            sums[r, :, tile.channels] += partial.sum(1, dtype=torch.float64)
    return sums.view(len(dilations), kernel_size, kernel_size, channels).permute(0, 3, 1, 2)


def library_weight_gradient_is_faster(x: Tensor, dilation: int) -> bool:
    """Whether the library's weight gradient beats the taps; measured, see the benchmarks.

    Its fast kernel knows no dilation and, with AVX-512, is lost in the conversion of maps that are channels first.
    """
    if x.device.type != "cpu":
        return True
    known = x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return known and dilation == 1 and len(x) > 0 and (is_channels_last(x) or not _has_avx512())


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
