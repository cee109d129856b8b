"""Two ways to bring masks to the size of an image: corners aligned, as the public code does it, and cells in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int], stride: Sequence[float] | None) -> Tensor:
    """:func:`resize_cells` for cells of a stride, :func:`resize_corners` without one."""
    return resize_corners(x, size) if stride is None else resize_cells(x, size, stride)


def resize_corners(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, ``align_corners=True``, in float32 (float64 stays); x [B, C, h, w] -> [B, C, *size]."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return _by_planes(x, lambda planes: F.interpolate(planes, tuple(size), mode="bilinear", align_corners=True))


def resize_cells(x: Tensor, size: Sequence[int], stride: Sequence[float]) -> Tensor:
    """Bilinear between the centres of cells, the first of which begins at the map's corner; dtype as above.

    Args:
        x: averages over cells ``[B, C, h, w]``.
        size: of the result ``[B, C, *size]``: less than a cell more or fewer than the cells cover, cut off or repeated.
        stride: rows and columns of a cell in pixels.
    """
    if tuple(stride) == (1, 1) and tuple(x.shape[-2:]) == tuple(size):
        return x

    def enlarge(planes: Tensor) -> Tensor:
        # a map that ends beyond the last cell continues it
        if planes.shape[-2] * stride[0] < size[0]:
            planes = torch.cat([planes, planes[..., -1:, :]], -2)
        if planes.shape[-1] * stride[1] < size[1]:
            planes = torch.cat([planes, planes[..., -1:]], -1)
        whole = F.interpolate(
            planes, scale_factor=tuple(stride), mode="bilinear", align_corners=False, recompute_scale_factor=False
        )
        return whole[..., : size[0], : size[1]]

    return _by_planes(x, enlarge)


def halved(x: Tensor, cells: Sequence[int], stride: Sequence[float] | None) -> Tensor:
    """Means of 2 x 2 pixels, an odd row or column with what there is, in float32 (float64 stays).

    Args:
        x: ``[B, K, H, W]``.
        cells: rows and columns of cells that cover it to within less than a cell; they then cover the result so.
        stride: rows and columns of a cell in pixels, or ``None`` if there are none.
    """
    sizes = [
        max(1, n // 2 if stride is not None and count * side < n else -(-n // 2))
        for n, count, side in zip(x.shape[2:], cells, stride or (1, 1))
    ]
    if x.shape[0] == 0:
        return x.new_zeros((*x.shape[:2], *sizes))
    planes = x if x.dtype == torch.float64 else x.float()
    return F.avg_pool2d(planes, 2, ceil_mode=True)[:, :, : sizes[0], : sizes[1]]


def _by_planes(x: Tensor, enlarge: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``enlarge`` to the planes [B * C, 1, h, w] of x, in float32 or float64.

    ``interpolate`` rounds differently with the number of channels and their memory format, and a batch must equal its
    images bit for bit.
    """
    if x.dtype != torch.float64:
        x = x.float()
    if 0 in x.shape[:2]:  # interpolate refuses empty tensors
        size = enlarge(x.new_zeros((1, 1, *x.shape[2:]))).shape[2:]
        return x.new_zeros((*x.shape[:2], *size)) + x.sum()
    enlarged = enlarge(x.reshape(-1, 1, *x.shape[2:]).contiguous())
    return enlarged.reshape(*x.shape[:2], *enlarged.shape[2:])
