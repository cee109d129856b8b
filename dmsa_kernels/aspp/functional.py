"""Multi-dilation depthwise convolution: the public functions and their contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmsa_kernels.aspp import ops
from dmsa_kernels.backend import BACKENDS
from dmsa_kernels.compat import autocast_dtype, tangent

KERNEL_SIZES = (3, 5, 7)
REDUCTIONS = ("stack", "concat", "sum")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def multi_dilation_dwconv(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    bias: Tensor | None = None,
    reduce: str = "stack",
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel of one map with R small filters, each at its own dilation, in one pass over the map.

    ``y_r(b, c, q) = bias[r, c] + sum_ij weight[r, c, i, j] * x(b, c, q + dilations[r] * (i - k // 2, j - k // 2))``,
    with zeros outside the map: R times ``F.conv2d(x, weight[r, :, None], bias[r], padding=d * (k // 2), dilation=d,
    groups=C)``. This is the atrous part of a separable ASPP head (DeepLabV3+, DAFormer).

    Args:
        x: ``[B, C, H, W]``, float32, float16 or bfloat16 (float64 on the eager and reference backends), any strides.
            Tokens ``[B, H * W, C]`` enter without a copy as ``tokens.transpose(1, 2).unflatten(2, (H, W))``.
        weight: ``[R, C, k, k]``, one filter a branch and channel, k in 3, 5, 7, the dtype and device of ``x``.
        dilations: R positive integers, in pixels. They may exceed the map: taps that fall outside read zero.
        bias: ``[R, C]`` or ``None``.
        reduce: ``"stack"`` returns the branches ``[B, R, C, H, W]``, ``"concat"`` joins them along the channels,
            branch after branch, ``[B, R * C, H, W]``, ``"sum"`` adds them up, ``[B, C, H, W]``.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        The branches in the dtype of ``x`` (under autocast, the autocast dtype), accumulated in float32 (float64 for
        float64), in the memory layout of ``x``: channels first, or channels last where the channels of ``x`` lie
        next to one another in memory.

    Differentiable once in ``x``, ``weight`` and ``bias``, in reverse mode and in forward mode (``torch.func.jvp``); the
    gradients are deterministic.

    Raises:
        TypeError: an argument is not a tensor of these dtypes, the dtypes differ outside autocast, or ``dilations`` are
            no integers.
        ValueError: a shape, a dilation, ``reduce`` or ``backend`` is out of range, or the devices differ.
        RuntimeError: ``backend="triton"`` and the kernels cannot run; the message says why.
    """
    dilations = list_of_dilations(dilations)
    check_arguments(x, weight, dilations, bias)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{reduce=} is not one of {', '.join(REDUCTIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} is not one of {', '.join(BACKENDS)}")
    joined = "sum" if reduce == "sum" else "concat"

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.multi_dilation_dwconv(x, weight, bias, dilations, joined, backend)

    tensors = _under_autocast(x, weight, bias)
    (x, weight, bias), (d_x, d_weight, d_bias) = _unpack(tensors)
    terms = []
    if d_x is not None:
        terms.append(convolve(d_x, weight, None))
    if d_weight is not None or d_bias is not None:
        terms.append(convolve(x, torch.zeros_like(weight) if d_weight is None else d_weight, d_bias))
    out = _pack(convolve(x, weight, bias), terms)
    if reduce == "stack":
        return out.unflatten(1, (weight.shape[0], weight.shape[1]))  # [B, R, C, H, W]
    return out


def fused_dwconv_project(
    x: Tensor,
    weight: Tensor,
    projection: Tensor,
    dilations: Sequence[int],
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Project the branches of :func:`multi_dilation_dwconv` to O channels without keeping them.

    ``y(b, o, q) = offset[b, o] + sum_rc projection[o, r * C + c] * y_r(b, c, q)``: what a 1 x 1 convolution of the
    branches joined by ``reduce="concat"`` gives. The Triton kernel projects each depthwise tile, rounded to the dtype
    of ``x``, from registers, and accumulates in float32 (float32 inputs in full precision, never TF32). Eager and
    reference run the two operators one after the other. The backward pass computes the branches again.

    Args:
        x: ``[B, C, H, W]``, as in :func:`multi_dilation_dwconv`.
        weight: ``[R, C, k, k]``, k in 3, 5, 7.
        projection: ``[O, R * C]``, branch after branch, the dtype and device of ``x``.
        dilations: R positive integers, in pixels.
        bias: the branches' ``[R, C]`` or ``None``.
        offset: ``[B, O]`` or ``None``: added to every pixel of an image (a bias expanded, an image-pooling branch).
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        ``[B, O, H, W]`` in the dtype (under autocast, the autocast dtype) and memory layout of ``x``.

    Differentiable once in every tensor, in reverse and in forward mode.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`multi_dilation_dwconv`, and for ``projection`` and ``offset``.
    """
    dilations = list_of_dilations(dilations)
    check_arguments(x, weight, dilations, bias)
    check_projection(x, weight, projection, offset)
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} is not one of {', '.join(BACKENDS)}")

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, projection: Tensor, offset: Tensor | None) -> Tensor:
        return ops.fused_dwconv_project(x, weight, bias, projection, offset, dilations, backend)

    tensors = _under_autocast(x, weight, bias, projection, offset)
    (x, weight, bias, projection, offset), (d_x, d_weight, d_bias, d_projection, d_offset) = _unpack(tensors)
    terms = []
    if d_x is not None:
        terms.append(project(d_x, weight, None, projection, None))
    if d_weight is not None or d_bias is not None:
        d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
        terms.append(project(x, d_weight, d_bias, projection, None))
    if d_projection is not None:
        terms.append(project(x, weight, bias, d_projection, None))
    if d_offset is not None:
        terms.append(d_offset[:, :, None, None])
    return _pack(project(x, weight, bias, projection, offset), terms)


def _unpack(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Tensor | None]]:
    """The tensors without their forward-mode derivatives, and these: an operator would drop them without a word."""
    tangents = [None if tensor is None else tangent(tensor) for tensor in tensors]
    if all(derivative is None for derivative in tangents):
        return list(tensors), tangents
    return [None if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in tensors], tangents


def _pack(primal: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The result with its derivative, the sum of the terms: the operators are linear in each of their tensors."""
    if not terms:
        return primal
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return forward_ad.make_dual(primal, total.expand_as(primal))


def _under_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in autocast's dtype where it is on; double precision is a choice that it respects."""
    x = tensors[0]
    dtype = None if x is None else autocast_dtype(x)
    if dtype is None:
        return list(tensors)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def check_projection(x: Tensor, weight: Tensor, projection: Tensor, offset: Tensor | None) -> None:
    """Raise the error that names what is wrong with ``projection`` or ``offset``; x and weight are checked already."""
    width = weight.shape[0] * weight.shape[1]
    if not isinstance(projection, Tensor):
        raise TypeError(f"projection must be a torch.Tensor, got {type(projection).__name__}")
    if projection.dim() != 2 or projection.shape[1] != width or projection.shape[0] == 0:
        raise ValueError(f"{projection.shape=}, expected [O, R * C] = [at least 1, {width}]")
    named = {"projection": projection}
    if offset is not None:
        if not isinstance(offset, Tensor):
            raise TypeError(f"offset must be a torch.Tensor, got {type(offset).__name__}")
        if offset.shape != (x.shape[0], projection.shape[0]):
            raise ValueError(f"{offset.shape=}, expected [B, O] = [{x.shape[0]}, {projection.shape[0]}]")
        named["offset"] = offset
    check_alike(named, x)


def check_arguments(x: Tensor, weight: Tensor, dilations: Sequence[int], bias: Tensor | None) -> None:
    """Raise the error that names the first argument of :func:`multi_dilation_dwconv` that is out of its contract."""
    named = {"x": x, "weight": weight}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}.dtype={tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.dim() != 4:
        raise ValueError(
            f"{x.shape=}, expected [B, C, H, W] (tokens: tokens.transpose(1, 2).unflatten(2, (H, W)) is such a view)"
        )
    channels, height, width = x.shape[1:]
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{x.shape=}, expected at least one channel, row and column")
    shape = weight.shape
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in KERNEL_SIZES:
        raise ValueError(f"{weight.shape=}, expected [R, C, k, k] with k one of {KERNEL_SIZES}")
    branches = shape[0]
    if shape[1] != channels:
        raise ValueError(f"{weight.shape=}, expected the {channels} channels of x ({x.shape=}) in dimension 1")
    if branches == 0:
        raise ValueError(f"{weight.shape=}, expected at least one branch")
    if bias is not None and bias.shape != (branches, channels):
        raise ValueError(f"{bias.shape=}, expected [R, C] = [{branches}, {channels}]")
    check_dilations(dilations, branches)
    check_alike(named, x)


def check_alike(named: Mapping[str, Tensor], x: Tensor) -> None:
    """Raise unless the tensors are on the device of ``x`` and of its dtype, or autocast makes them so."""
    device, dtype = x.device, x.dtype
    for name, tensor in named.items():
        if tensor.device != device:
            raise ValueError(f"{name}.device={tensor.device}, expected the device of x, {device}")
        # Autocast brings every dtype but float64 to its own.
        if tensor.dtype != dtype and (torch.float64 in (tensor.dtype, dtype) or autocast_dtype(x) is None):
            raise TypeError(f"{name}.dtype={tensor.dtype}, expected the dtype of x, {dtype}")


def list_of_dilations(dilations: Sequence[int]) -> list[int]:
    """Return ``dilations`` as a list, or raise the error that names it where it is none."""
    if not isinstance(dilations, Iterable):
        raise TypeError(f"{dilations=}, expected a sequence of integers, one a branch, got {type(dilations).__name__}")
    return list(dilations)


def check_dilations(dilations: Sequence[int], branches: int) -> None:
    """Raise unless ``dilations`` holds ``branches`` positive integers."""
    if len(dilations) != branches:
        raise ValueError(f"{dilations=} has {len(dilations)} entries, expected one for each of the {branches} branches")
    for dilation in dilations:
        if isinstance(dilation, bool) or not isinstance(dilation, (int, torch.SymInt)):
            raise TypeError(f"{dilations=}, expected integers, got {type(dilation).__name__}")
        if dilation < 1:
            raise ValueError(f"{dilations=}, expected dilations of at least 1")
