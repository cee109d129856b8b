"""What bad arguments of the refinement get: an error that names the argument, its value and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmsa_kernels.backend import BACKENDS
from dmsa_kernels.compat import tangent

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = ("exact", "fast")
RESIZES = ("masks", "image", "none")
# A pixel's coordinate plus a dilation must stay within 32 bits in the kernels.
MAX_DILATION = 2**30


def check_stack(name: str, x: Tensor, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must have four dimensions, {layout}")
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).partition(".")[2] for dtype in DTYPES)
        raise TypeError(f"{name}.dtype={x.dtype} must be one of {wanted}; convert it with {name}.float()")
    if x.layout != torch.strided:
        raise TypeError(f"{name}.layout={x.layout} must be torch.strided; convert it with {name}.to_dense()")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must have at least one pixel, {layout}")
    if tangent(x) is not None:  # an operator would drop it without a word
        raise RuntimeError(f"{name} carries a forward-mode derivative (jvp); the refinement has reverse mode only")


def check_image(image: Tensor) -> None:
    check_stack("image", image, "[B, K, H, W]")
    if image.shape[1] == 0:
        raise ValueError(f"image.shape={tuple(image.shape)} must have at least one channel, [B, K, H, W]")


def check_dilations(dilations: Sequence[int]) -> list[int]:
    if isinstance(dilations, (str, bytes)) or not hasattr(dilations, "__iter__"):
        raise TypeError(f"{dilations=} must be a sequence of positive integers, such as [1, 2, 4, 8, 12, 24]")
    checked = []
    for dilation in dilations:
        if type(dilation) is not int and (isinstance(dilation, bool) or not hasattr(dilation, "__index__")):
            raise TypeError(f"{dilations=} must hold integers only, got {dilation!r}")
        checked.append(operator.index(dilation))
        if checked[-1] < 1:
            raise ValueError(f"{dilations=} must hold positive integers only, got {dilation!r}")
        if checked[-1] > MAX_DILATION:
            raise ValueError(f"{dilations=} must hold integers of at most 2^30, got {dilation!r}")
    if not checked:
        raise ValueError(f"{dilations=} must hold at least one dilation")
    return checked


def check_num_iter(num_iter: int) -> int:
    if isinstance(num_iter, bool) or not hasattr(num_iter, "__index__"):
        raise TypeError(f"{num_iter=} must be an integer")
    num_iter = operator.index(num_iter)
    if num_iter < 0:
        raise ValueError(f"{num_iter=} must be at least 0")
    return num_iter


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_stride(stride: float | Sequence[float] | None, resize: str) -> list[float] | None:
    """Rows and columns of a cell, or ``None``."""
    if stride is None:
        return None
    both: Any = [stride, stride] if isinstance(stride, numbers.Real) else stride
    if not isinstance(both, Sequence) or len(both) != 2 or not all(isinstance(s, numbers.Real) for s in both):
        raise TypeError(f"{stride=} must be a number of pixels, such as 16, or a pair of rows and columns")
    if not all(math.isfinite(s) and s >= 1 for s in both):
        raise ValueError(f"{stride=} must be at least 1 pixel and finite")
    if resize != "masks":
        raise ValueError(f"{stride=} enlarges the masks, which {resize=} does not; use resize='masks'")
    return [float(s) for s in both]


def check_options(
    dilations: Sequence[int],
    num_iter: int,
    *,
    resize: str,
    precision: str,
    backend: str,
    stride: float | Sequence[float] | None = None,
    anchor: float | Tensor = 0.0,
) -> tuple[list[int], int, list[float] | None]:
    """Raise what :func:`refine` raises for arguments that are not tensors; return dilations, iterations and stride."""
    checked = check_dilations(dilations), check_num_iter(num_iter)
    check_choice("resize", resize, RESIZES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    check_anchor(anchor)
    return *checked, check_stride(stride, resize)


def check_anchor(anchor: float | Tensor) -> None:
    """Raise what :func:`propagate` raises for a number that is not a share, or for something else than a tensor."""
    if isinstance(anchor, Tensor):
        if not anchor.is_floating_point():
            raise TypeError(f"anchor.dtype={anchor.dtype} must be a floating-point type")
    elif isinstance(anchor, bool) or not isinstance(anchor, numbers.Real):
        raise TypeError(f"{anchor=} must be a number in [0, 1) or a tensor [B, 1, H, W]")
    elif not 0 <= anchor < 1:
        raise ValueError(f"{anchor=} must be in [0, 1)")


def anchor_map(anchor: float | Tensor, masks: Tensor, size: Sequence[int], other: Sequence[int]) -> Tensor | None:
    """The anchor as [B, 1, h, w], of size ``size`` or ``other``, in the computing dtype; ``None`` for a number 0."""
    check_anchor(anchor)
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    batch = masks.shape[0]
    if not isinstance(anchor, Tensor):
        if anchor == 0:
            return None
        everywhere = torch.full((1, 1, 1, 1), float(anchor), dtype=dtype, device=masks.device)
        return everywhere.expand(batch, 1, *size)
    if anchor.dim() == 0:
        anchor = anchor.expand(1, 1, *size)
    sizes = {tuple(size), tuple(other)}
    if anchor.dim() != 4 or anchor.shape[0] not in (1, batch) or anchor.shape[1] != 1 or anchor.shape[2:] not in sizes:
        expected = " or ".join(str((batch, 1, *each)) for each in sorted(sizes))
        raise ValueError(f"anchor.shape={tuple(anchor.shape)} must be {expected}, [B, 1, H, W]")
    if anchor.device != masks.device:
        raise ValueError(f"anchor.device={anchor.device} must be the masks' device, {masks.device}")
    return anchor.to(dtype).expand(batch, -1, -1, -1)


def check_masks(masks: Tensor, other: str, batch: int, device: torch.device) -> None:
    check_stack("masks", masks, "[B, C, H, W]")
    if masks.shape[0] != batch:
        raise ValueError(f"masks.shape={tuple(masks.shape)} must have the batch size of {other}, {batch}")
    if masks.device != device:
        raise ValueError(f"masks.device={masks.device} must be the device of {other}, {device}")


def check_classes(masks: Tensor, valid_classes: Tensor | None, return_labels: bool) -> None:
    if return_labels and masks.shape[1] == 0:
        raise ValueError(f"return_labels=True needs at least one class, masks.shape={tuple(masks.shape)}")
    if valid_classes is None:
        return
    if not isinstance(valid_classes, Tensor):
        raise TypeError(f"valid_classes must be a bool tensor [B, C], got {type(valid_classes).__name__}")
    if valid_classes.dtype != torch.bool:
        raise TypeError(f"valid_classes.dtype={valid_classes.dtype} must be torch.bool, such as labels > 0")
    if valid_classes.shape != masks.shape[:2]:
        raise ValueError(
            f"valid_classes.shape={tuple(valid_classes.shape)} must be the masks' [B, C], {tuple(masks.shape[:2])}"
        )
    if valid_classes.device != masks.device:
        raise ValueError(f"valid_classes.device={valid_classes.device} must be the masks' device, {masks.device}")


def check_cells(masks: Tensor, stride: Sequence[float], size: Sequence[int]) -> None:
    """Raise unless the cells [B, C, h, w] cover a map of ``size`` to within less than a cell."""
    covered = [cells * pixels for cells, pixels in zip(masks.shape[2:], stride)]
    if any(abs(c - n) >= pixels for c, n, pixels in zip(covered, size, stride)):
        raise ValueError(
            f"masks.shape={tuple(masks.shape)} with stride={tuple(stride)} cover {tuple(covered)} pixels of an image of"
            f" {tuple(size)}: a cell or more too few or too many"
        )
