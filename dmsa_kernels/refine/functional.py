"""The public functions: validate, resize, call the registered operators. The contract is documented here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dmsa_kernels.backend import BACKENDS
from dmsa_kernels.refine import ops
from dmsa_kernels.refine.checks import (
    PRECISIONS,
    anchor_map,
    check_cells,
    check_choice,
    check_classes,
    check_dilations,
    check_image,
    check_masks,
    check_num_iter,
    check_options,
    check_stack,
)
from dmsa_kernels.refine.resize import resize as resized
from dmsa_kernels.refine.resize import resize_corners
from dmsa_kernels.refine.spec import AffinitySpec, resolve_spec


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


def _check_affinity(affinity: Affinity) -> None:
    if not isinstance(affinity, Affinity):
        raise TypeError(f"affinity must come from local_affinity, got {type(affinity).__name__}")
    check_stack("affinity.weights", affinity.weights, "[B, P, H, W]")
    neighbours = 8 * len(check_dilations(affinity.dilations))
    if affinity.weights.shape[1] != neighbours:
        raise ValueError(
            f"affinity.weights.shape={tuple(affinity.weights.shape)} must have {neighbours} weights a pixel, eight for"
            f" each of {affinity.dilations=}"
        )


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
        image: guide ``[B, K, H, W]``, floating point, any strides; contrasts from 1e-15 to 1e15 (the affinity divides
            by the local standard deviation, so that 0 to 1 and 0 to 255 are as good).
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
    check_image(image)
    checked = check_dilations(dilations)
    constants = resolve_spec(spec)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
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
    anchor: float | Tensor = 0.0,
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``num_iter`` times :math:`M(q) \leftarrow (1 - a(q)) \sum_p w_p(q)\,M(q + o_p) + a(q)\,M_0(q)`, with a = 0.

    An anchor ``a`` keeps a share of the first masks in every iteration, so that thin things are not worn away; the
    public code has none. One affinity serves any number of masks. No tensor of size B * C * P * H * W is made.

    Args:
        affinity: from :func:`local_affinity`, for B maps of H x W pixels.
        masks: ``[B, C, H, W]``, floating point, any strides; C may be 0.
        num_iter: iterations T >= 0; 0 returns the masks.
        anchor: share of the first masks, in [0, 1): a number, or a tensor ``[B, 1, H, W]`` or ``[]`` (the values of one
            on an accelerator are not looked at, which would wait for it).
        valid_classes: bool ``[B, C]``. Planes that are not valid are not read and come back zero; the others equal
            a call with the valid planes of each image alone.
        return_labels: return labels instead of planes, without a second copy of the planes.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        The refined masks, shape, dtype and memory format of ``masks``; differentiable once with respect to ``masks``,
        the affinity and an anchor that is a tensor. With ``return_labels``, the pair (labels int64 ``[B, H, W]``,
        values ``[B, H, W]`` of the masks' dtype), not differentiable: the valid class with the largest refined value
        before rounding (the lowest of equal ones, a NaN counts as largest) and that value; 0 and 0 for an image without
        a valid class.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; the message shows them.
        RuntimeError: ``backend="triton"`` cannot take the tensors; the message is the reason.
    """
    _check_affinity(affinity)
    batch, _, height, width = affinity.weights.shape
    check_masks(masks, "affinity", batch, affinity.weights.device)
    if tuple(masks.shape[2:]) != (height, width):
        raise ValueError(
            f"masks.shape={tuple(masks.shape)} must have the affinity's map size, {(height, width)};"
            " refine(image, masks, ...) resizes one of the two"
        )
    num_iter = check_num_iter(num_iter)
    check_classes(masks, valid_classes, return_labels)
    check_choice("backend", backend, BACKENDS)
    hold = anchor_map(anchor, masks, (height, width), (height, width))
    if return_labels:
        return _labels(affinity, masks, num_iter, valid_classes, backend, hold, None)
    return _propagate(affinity, masks, num_iter, valid_classes, backend, hold)


def _propagate(
    affinity: Affinity,
    masks: Tensor,
    num_iter: int,
    valid_classes: Tensor | None,
    backend: str,
    anchor: Tensor | None,
) -> Tensor:
    arguments = (list(affinity.dilations), num_iter, valid_classes, backend, anchor)
    return ops.propagate(affinity.weights, masks, *arguments)


def _labels(
    affinity: Affinity,
    masks: Tensor,
    num_iter: int,
    valid_classes: Tensor | None,
    backend: str,
    anchor: Tensor | None,
    stride: list[float] | None,
) -> tuple[Tensor, Tensor]:
    hold = None if anchor is None else anchor.detach()
    arguments = (list(affinity.dilations), num_iter, valid_classes, backend, hold, stride)
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
    stride: float | Sequence[float] | None = None,
    anchor: float | Tensor = 0.0,
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Refine ``masks`` along the edges of ``image``: :func:`local_affinity`, then :func:`propagate`.

    Args:
        image: guide ``[B, K, H, W]``, floating point; see :func:`local_affinity`.
        masks: ``[B, C, h, w]``, floating point, on the image's device.
        dilations: positive integers in pixels of the map on which is refined.
        num_iter: iterations T >= 0; 0 returns the resized masks.
        spec: a preset (``"par"``, ``"pamr"``, ``"lcm"``) or an :class:`AffinitySpec`.
        resize: ``"masks"`` brings the masks to the image's size (AFA, PAMR), ``"image"`` the image to the masks' size
            (WeCLIP, ExCEL), both bilinear with ``align_corners=True`` in float32; ``"none"`` demands equal sizes.
        stride: pixels of the cells that the masks are averages over, at least 1: a number, or a pair for rows and
            columns. Cell centres then come to their place in the image, from which ``align_corners=True`` moves them by
            up to half a cell; the cells cover the image to within less than a cell. ``None`` resizes as above.
        anchor: share of the first masks that every iteration keeps, in [0, 1): a number, or a tensor ``[B, 1, H, W]``
            of the size on which is refined or ``[B, 1, h, w]``, resized like the masks. See :func:`propagate`.
        valid_classes: bool ``[B, C]``; see :func:`propagate`.
        return_labels: return (labels, values) instead of planes; classes are then resized and refined in chunks, so
            that the full-resolution planes never exist together. See :func:`propagate`.
        precision: ``"exact"``, or ``"fast"`` with a float16 affinity.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Returns:
        Refined masks ``[B, C, H, W]`` in the masks' dtype, differentiable once with respect to masks, image and anchor;
        or the labels and their values.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or values that do not fit; the message shows them.
        RuntimeError: ``backend="triton"`` cannot take the tensors; the message is the reason.
    """
    check_image(image)
    check_masks(masks, "image", image.shape[0], image.device)
    checked, num_iter, cell = check_options(
        dilations, num_iter, resize=resize, precision=precision, backend=backend, stride=stride, anchor=anchor
    )
    constants = resolve_spec(spec)
    check_classes(masks, valid_classes, return_labels)
    if resize == "none" and image.shape[2:] != masks.shape[2:]:
        raise ValueError(
            f"resize='none' needs equal map sizes, image.shape={tuple(image.shape)} and"
            f" masks.shape={tuple(masks.shape)}; use resize='masks' or resize='image'"
        )
    size = masks.shape[2:] if resize == "image" else image.shape[2:]
    if cell is not None:
        check_cells(masks, cell, size)
    hold = anchor_map(anchor, masks, size, masks.shape[2:])
    if hold is not None and hold.shape[2:] != size:
        hold = resized(hold, size, cell)
    affinity = _affinity(resize_corners(image, size), checked, constants, precision, backend)
    if return_labels:
        return _labels(affinity, masks, num_iter, valid_classes, backend, hold, cell)
    enlarged = resized(masks, size, cell)
    return _propagate(affinity, enlarged, num_iter, valid_classes, backend, hold).to(masks.dtype)
