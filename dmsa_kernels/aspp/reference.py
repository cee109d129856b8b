"""The definition of the multi-dilation depthwise convolution in plain PyTorch: slow and obvious, any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.aspp.layout import empty_map


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """Return ``x(q + (dy, dx))`` for every pixel q of ``[B, C, H, W]``, zero where that lies outside the map."""
    height, width = x.shape[2:]
    dy, dx = max(-height, min(height, dy)), max(-width, min(width, dx))
    padded = F.pad(x, (abs(dx), abs(dx), abs(dy), abs(dy)))
    return padded[:, :, abs(dy) + dy :, abs(dx) + dx :][:, :, :height, :width]


def _offsets(kernel_size: int, dilation: int) -> list[tuple[int, int, int, int]]:
    half = kernel_size // 2
    return [
        (i, j, (i - half) * dilation, (j - half) * dilation) for i in range(kernel_size) for j in range(kernel_size)
    ]


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    dtype = _compute_dtype(x.dtype)
    source, filters = x.to(dtype), weight.to(dtype)
    branches = []
    for r, dilation in enumerate(dilations):
        y = torch.zeros_like(source)
        for i, j, dy, dx in _offsets(weight.shape[-1], dilation):
            y = y + filters[r, :, i, j, None, None] * _shifted(source, dy, dx)
        if bias is not None:
            y = y + bias[r, :, None, None].to(dtype)
        branches.append(y)
    result = torch.stack(branches).sum(0) if reduce == "sum" else torch.cat(branches, 1)
    return empty_map(x, result.shape[1]).copy_(result)


def fused_dwconv_project(
    x: Tensor, weight: Tensor, bias: Tensor | None, projection: Tensor, offset: Tensor | None, dilations: Sequence[int]
) -> Tensor:
    """Compute the branches, then their projection ``[B, O, H, W]``."""
    dtype = _compute_dtype(x.dtype)
    branches = multi_dilation_dwconv(x, weight, bias, dilations, "concat")  # [B, R * C, H, W]
    y = torch.einsum("oc,bchw->bohw", projection.to(dtype), branches.to(dtype))
    if offset is not None:
        y = y + offset[:, :, None, None].to(dtype)
    return empty_map(x, projection.shape[0]).copy_(y)


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
    dtype = _compute_dtype(x.dtype)
    source, filters, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
    channels = x.shape[1]
    grad_x = torch.zeros_like(source)
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    grad_bias = torch.zeros(weight.shape[:2], dtype=dtype, device=weight.device)
    for r, dilation in enumerate(dilations):
        branch = grad if reduce == "sum" else grad[:, r * channels : (r + 1) * channels]  # [B, C, H, W]
        grad_bias[r] = branch.sum((0, 2, 3), dtype=torch.float64)
        branch_x = torch.zeros_like(source)
        for i, j, dy, dx in _offsets(weight.shape[-1], dilation):
            branch_x = branch_x + filters[r, :, i, j, None, None] * _shifted(branch, -dy, -dx)
            grad_weight[r, :, i, j] = (branch * _shifted(source, dy, dx)).sum((0, 2, 3), dtype=torch.float64)
        grad_x = grad_x + branch_x
    return (
        empty_map(x, channels).copy_(grad_x) if need_x else x.new_empty(0),
        grad_weight.to(weight.dtype) if need_weight else weight.new_empty(0),
        grad_bias.to(weight.dtype) if need_bias else weight.new_empty(0),
    )
