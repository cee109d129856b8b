"""Resizing as the public code does it: bilinear, corners aligned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_corners(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, ``align_corners=True``, in float32 (float64 stays); x [B, C, h, w] -> [B, C, *size]."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.dtype != torch.float64:
        x = x.float()
    if 0 in x.shape[:2]:
        return x.new_zeros((*x.shape[:2], *size)) + x.sum()  # interpolate refuses empty tensors
    # Plane by plane: interpolate rounds differently with the number of channels and their memory format, and a batch
    # must equal its images bit for bit.
    planes = x.reshape(-1, 1, *x.shape[2:]).contiguous()
    return F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=True).view(*x.shape[:2], *size)
