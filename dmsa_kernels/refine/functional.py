"""The public functions: validate, resize, call the registered operators. The contract is documented here."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmsa_kernels.backend import BACKENDS
from dmsa_kernels.refine import ops
from dmsa_kernels.refine.resize import resize_corners
from dmsa_kernels.refine.spec import AffinitySpec, resolve_spec

PRECISIONS = ("exact", "fast")
RESIZES = ("masks", "image", "none")
# A pixel's coordinate plus a dilation must stay within 32 bits in the kernels.
MAX_DILATION = 2**30


@dataclass(frozen=True)
class Affinity:
    """Weights of every pixel's neighbours; made by :func:`local_affinity`, used by :func:`propagate`.

    Attributes:
        weights: ``[B, P, H, W]``, P = 8 * len(dilations) in the order of the dilations, each with its neighbours
            row-major without the centre. float32 (float64 for a float64 image, float16 for ``precision="fast"``).
            Carries the gradient to the image.
        dilations: the dilations the weights belong to.
    """

    weights: Tensor
    dilations: tuple[int, ...]

    def to(self, *args, **kwargs) -> Affinity:
        """The affinity with its weights on another device or in another dtype; arguments as :meth:`torch.Tensor.to`."""
        return Affinity(self.weights.to(*args, **kwargs), self.dilations)


def _check_stack(name: str, x: Tensor, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must have four dimensions, {layout}")
    if not x.is_floating_point():
        raise TypeError(f"{name}.dtype={x.dtype} must be a floating-point type; convert it with {name}.float()")
    if x.layout != torch.strided:
        raise TypeError(f"{name}.layout={x.layout} must be torch.strided; convert it with {name}.to_dense()")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}.shape={tuple(x.shape)} must have at least one pixel, {layout}")
    # The compiler traces without forward-mode derivatives; outside, an operator would drop one without a word.
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name} carries a forward-mode derivative (jvp); the refinement has reverse mode only")


def _check_image(image: Tensor) -> None:
    _check_stack("image", image, "[B, K, H, W]")
    if image.shape[1] == 0:
        raise ValueError(f"image.shape={tuple(image.shape)} must have at least one channel, [B, K, H, W]")


def _check_dilations(dilations: Sequence[int]) -> list[int]:
    if isinstance(dilations, (str, bytes)) or not hasattr(dilations, "__iter__"):
        raise TypeError(f"{dilations=} must be a sequence of positive integers, such as [1, 2, 4, 8, 12, 24]")
    checked = []
    for dilation in dilations:
        if isinstance(dilation, bool) or not hasattr(dilation, "__index__"):
            raise TypeError(f"{dilations=} must hold integers only, got {dilation!r}")
        checked.append(operator.index(dilation))
        if checked[-1] < 1:
            raise ValueError(f"{dilations=} must hold positive integers only, got {dilation!r}")
        if checked[-1] > MAX_DILATION:
            raise ValueError(f"{dilations=} must hold integers of at most 2^30, got {dilation!r}")
    if not checked:
        raise ValueError(f"{dilations=} must hold at least one dilation")
    return checked


def _check_num_iter(num_iter: int) -> int:
    if isinstance(num_iter, bool) or not hasattr(num_iter, "__index__"):
        raise TypeError(f"{num_iter=} must be an integer")
    num_iter = operator.index(num_iter)
    if num_iter < 0:
        raise ValueError(f"{num_iter=} must be at least 0")
    return num_iter


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def check_options(
    dilations: Sequence[int], num_iter: int, *, resize: str, precision: str, backend: str
) -> tuple[list[int], int]:
    """Raise what :func:`refine` raises for arguments that are not tensors; return dilations and iterations as ints."""
    checked = _check_dilations(dilations), _check_num_iter(num_iter)
    _check_choice("resize", resize, RESIZES)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("backend", backend, BACKENDS)
    return checked


def _check_masks(masks: Tensor, other: str, batch: int, device: torch.device) -> None:
    _check_stack("masks", masks, "[B, C, H, W]")
    if masks.shape[0] != batch:
        raise ValueError(f"masks.shape={tuple(masks.shape)} must have the batch size of {other}, {batch}")
    if masks.device != device:
        raise ValueError(f"masks.device={masks.device} must be the device of {other}, {device}")


def _check_affinity(affinity: Affinity) -> None:
    if not isinstance(affinity, Affinity):
        raise TypeError(f"affinity must come from local_affinity, got {type(affinity).__name__}")
    _check_stack("affinity.weights", affinity.weights, "[B, P, H, W]")
    neighbours = 8 * len(_check_dilations(affinity.dilations))
    if affinity.weights.shape[1] != neighbours:
        raise ValueError(
            f"affinity.weights.shape={tuple(affinity.weights.shape)} must have {neighbours} weights a pixel, eight for"
            f" each of {affinity.dilations=}"
        )


def _check_classes(masks: Tensor, valid_classes: Tensor | None, return_labels: bool) -> None:
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


def local_affinity(
    image: Tensor,
    dilations: Sequence[int],
    *,
    spec: AffinitySpec | str = "par",
    precision: str = "exact",
    backend: str = "auto",
) -> Affinity:
    r"""Affinity of every pixel to its P = 8 * D neighbours at D dilations.

    .. math::
        a_p(q) = -\frac1K \sum_k \left(\frac{|I_k(q + o_p) - I_k(q)|}{\alpha\,\sigma_k(q) + \epsilon}\right)^e,\quad
        w_p(q) = \mathrm{softmax}_p\,a(q) + \beta\,\mathrm{softmax}_p\left(-\frac{r_p^2}{(\alpha\,\mathrm{std}(r) +
        \epsilon)^2}\right)

    Neighbours outside the map are its border pixels, so a dilation may exceed the map. Source: AFA, CVPR 2022 (PAR) and
    Single-Stage Semantic Segmentation, CVPR 2020 (PAMR); Eq. 4 of DMSA.

    Args:
        image: guide ``[B, K, H, W]``, floating point, any strides and any value range (the affinity divides by the
            local standard deviation).
        dilations: positive integers in pixels, in any order, repeats allowed.
        spec: a preset (``"par"``, ``"pamr"``, ``"lcm"``) or an :class:`AffinitySpec`.
        precision: ``"exact"`` stores float32 weights (float64 for a float64 image), ``"fast"`` float16.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        The :class:`Affinity`, differentiable once with respect to ``image``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument outside its range; the message shows its value.
        RuntimeError: ``backend="triton"`` cannot take the image; the message is the reason.
    """
    _check_image(image)
    checked = _check_dilations(dilations)
    constants = resolve_spec(spec)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("backend", backend, BACKENDS)
    return _affinity(image, checked, constants, precision, backend)


def _affinity(image: Tensor, dilations: list[int], spec: AffinitySpec, precision: str, backend: str) -> Affinity:
    weights = ops.local_affinity(
        image,
        dilations,
        float(spec.exponent),
        float(spec.alpha),
        spec.sigma,
        float(spec.eps),
        float(spec.position_weight),
        precision == "fast",
        backend,
    )
    return Affinity(weights, tuple(dilations))


def propagate(
    affinity: Affinity,
    masks: Tensor,
    num_iter: int,
    *,
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``num_iter`` times :math:`M(q) \leftarrow \sum_p w_p(q)\,M(q + o_p)`.

    One affinity serves any number of masks. No tensor of size B * C * P * H * W is made.

    Args:
        affinity: from :func:`local_affinity`, for B maps of H x W pixels.
        masks: ``[B, C, H, W]``, floating point, any strides; C may be 0.
        num_iter: iterations T >= 0; 0 returns the masks.
        valid_classes: bool ``[B, C]``. Planes that are not valid are not read and come back zero; the others equal
            a call with the valid planes of each image alone.
        return_labels: return labels instead of planes, without a second copy of the planes.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        The refined masks, shape, dtype and memory format of ``masks``; differentiable once with respect to ``masks``
        and the affinity. With ``return_labels``, the pair (labels int64 ``[B, H, W]``, values ``[B, H, W]`` of the
        masks' dtype), not differentiable: the valid class with the largest refined value (the lowest of equal ones,
        a NaN counts as largest) and that value; 0 and 0 for an image without a valid class.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; the message shows them.
        RuntimeError: ``backend="triton"`` cannot take the tensors; the message is the reason.
    """
    _check_affinity(affinity)
    batch, _, height, width = affinity.weights.shape
    _check_masks(masks, "affinity", batch, affinity.weights.device)
    if tuple(masks.shape[2:]) != (height, width):
        raise ValueError(
            f"masks.shape={tuple(masks.shape)} must have the affinity's map size, {(height, width)};"
            " refine(image, masks, ...) resizes one of the two"
        )
    num_iter = _check_num_iter(num_iter)
    _check_classes(masks, valid_classes, return_labels)
    _check_choice("backend", backend, BACKENDS)
    return (_labels if return_labels else _propagate)(affinity, masks, num_iter, valid_classes, backend)


def _propagate(affinity: Affinity, masks: Tensor, num_iter: int, valid_classes: Tensor | None, backend: str) -> Tensor:
    arguments = (list(affinity.dilations), num_iter, valid_classes, backend)
    return ops.propagate(affinity.weights, masks, *arguments)


def _labels(
    affinity: Affinity, masks: Tensor, num_iter: int, valid_classes: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    arguments = (list(affinity.dilations), num_iter, valid_classes, backend)
    labels, values = ops.propagate_labels(affinity.weights.detach(), masks.detach(), *arguments)
    return labels, values


def refine(
    image: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    *,
    spec: AffinitySpec | str = "par",
    resize: str = "masks",
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Refine ``masks`` along the edges of ``image``: :func:`local_affinity`, then :func:`propagate`.

    Args:
        image: guide ``[B, K, H, W]``, floating point, any value range.
        masks: ``[B, C, h, w]``, floating point, on the image's device.
        dilations: positive integers in pixels of the map on which is refined.
        num_iter: iterations T >= 0; 0 returns the resized masks.
        spec: a preset (``"par"``, ``"pamr"``, ``"lcm"``) or an :class:`AffinitySpec`.
        resize: ``"masks"`` brings the masks to the image's size (AFA, PAMR), ``"image"`` the image to the masks' size
            (WeCLIP, ExCEL), both bilinear with ``align_corners=True`` in float32; ``"none"`` demands equal sizes.
        valid_classes: bool ``[B, C]``; see :func:`propagate`.
        return_labels: return (labels, values) instead of planes; classes are then resized and refined in chunks, so
            that the full-resolution planes never exist together. See :func:`propagate`.
        precision: ``"exact"``, or ``"fast"`` with a float16 affinity.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        Refined masks ``[B, C, H, W]`` in the masks' dtype, differentiable once with respect to masks and image; or the
        labels and their values.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; the message shows them.
        RuntimeError: ``backend="triton"`` cannot take the tensors; the message is the reason.
    """
    _check_image(image)
    _check_masks(masks, "image", image.shape[0], image.device)
    checked, num_iter = check_options(dilations, num_iter, resize=resize, precision=precision, backend=backend)
    constants = resolve_spec(spec)
    _check_classes(masks, valid_classes, return_labels)
    if resize == "none" and image.shape[2:] != masks.shape[2:]:
        raise ValueError(
            f"resize='none' needs equal map sizes, image.shape={tuple(image.shape)} and"
            f" masks.shape={tuple(masks.shape)}; use resize='masks' or resize='image'"
        )
    if resize == "image":
        image = resize_corners(image, masks.shape[2:])
    affinity = _affinity(image, checked, constants, precision, backend)
    if return_labels:
        return _labels(affinity, masks, num_iter, valid_classes, backend)
    resized = resize_corners(masks, image.shape[2:])
    return _propagate(affinity, resized, num_iter, valid_classes, backend).to(masks.dtype)
