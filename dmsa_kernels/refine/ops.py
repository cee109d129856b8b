"""The registered operators ``dmsa_kernels::{local_affinity, propagate, propagate_labels}`` and their backwards.

Schemas, fake implementations and autograd; a backend's module is imported inside the operator that needs it. There is
no autocast policy: an operator gets its tensors as they are and computes in float32.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from dmsa_kernels.backend import resolve
from dmsa_kernels.compat import operator
from dmsa_kernels.refine import eager, reference
from dmsa_kernels.refine.labels import merge_larger
from dmsa_kernels.refine.resize import resize

# Elements of the planes that exist at full resolution at a time while labels are computed (fp32: 256 MB).
LABEL_ELEMENTS = 1 << 26


def _implementation(backend: str, launcher: str, *tensors: Tensor) -> ModuleType:
    """The module that computes on ``tensors``; ``launcher`` names the file of the Triton kernels."""
    name = resolve(backend, *tensors)
    if name == "eager":
        return eager
    if name == "reference":
        return reference
    return _kernels(launcher)


@functools.cache
def _kernels(launcher: str) -> ModuleType:
    return importlib.import_module(f"dmsa_kernels.refine.triton.{launcher}")


# --- the affinity


def _local_affinity(
    image: Tensor,
    dilations: list[int],
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    fast: bool,
    backend: str,
) -> Tensor:
    return _implementation(backend, "affinity", image).local_affinity(
        image,
        dilations,
        exponent=exponent,
        alpha=alpha,
        sigma=sigma,
        eps=eps,
        position_weight=position_weight,
        fast=fast,
    )


def _local_affinity_fake(image: Tensor, dilations: list[int], *spec: object) -> Tensor:
    fast = spec[-2]
    dtype = torch.float16 if fast else torch.float64 if image.dtype == torch.float64 else torch.float32
    batch, _, height, width = image.shape
    return image.new_empty((batch, 8 * len(dilations), height, width), dtype=dtype)


def _local_affinity_setup(ctx, inputs, output) -> None:
    image, *ctx.spec, _fast, ctx.backend = inputs
    ctx.save_for_backward(image)


def _local_affinity_autograd(ctx, grad_weights: Tensor):
    (image,) = ctx.saved_tensors
    grad_image = local_affinity_backward(grad_weights, image, *ctx.spec, ctx.backend)
    return (grad_image, *[None] * (len(ctx.spec) + 2))


def _local_affinity_backward(
    grad_weights: Tensor,
    image: Tensor,
    dilations: list[int],
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    backend: str,
) -> Tensor:
    return _implementation(backend, "backward", grad_weights, image).local_affinity_backward(
        grad_weights,
        image,
        dilations,
        exponent=exponent,
        alpha=alpha,
        sigma=sigma,
        eps=eps,
        position_weight=position_weight,
    )


def _local_affinity_backward_fake(grad_weights: Tensor, image: Tensor, *spec: object) -> Tensor:
    return torch.empty_like(image)


# --- the propagation


def _check_anchor(anchor: Tensor | None) -> None:
    """Only on the CPU: to look at a value on an accelerator would wait for it."""
    if anchor is not None and anchor.device.type == "cpu" and not ((anchor >= 0) & (anchor < 1)).all():
        low, high = anchor.min().item(), anchor.max().item()
        raise ValueError(f"anchor must hold values in [0, 1) only, got {low:g} to {high:g}")


def _propagate(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    backend: str,
    anchor: Tensor | None = None,
) -> Tensor:
    _check_anchor(anchor)
    module = _implementation(backend, "propagate", weights, masks)
    return module.propagate(weights, masks, dilations, num_iter, valid_classes, anchor)


def _propagate_fake(weights: Tensor, masks: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(masks)


def _propagate_setup(ctx, inputs, output) -> None:
    weights, masks, ctx.dilations, ctx.num_iter, valid_classes, ctx.backend, anchor = inputs
    ctx.save_for_backward(weights, masks, valid_classes, anchor)


def _propagate_autograd(ctx, grad: Tensor):
    weights, masks, valid_classes, anchor = ctx.saved_tensors
    need_weights, need_masks, *_, need_anchor = ctx.needs_input_grad
    needs = (need_weights, need_masks, need_anchor)
    grads = propagate_backward(
        grad,
        weights,
        masks,
        ctx.dilations,
        ctx.num_iter,
        valid_classes,
        need_weights,
        need_masks,
        ctx.backend,
        anchor,
        need_anchor,
    )
    grad_weights, grad_masks, grad_anchor = (g if need else None for g, need in zip(grads, needs))
    return grad_weights, grad_masks, None, None, None, None, grad_anchor


def _propagate_backward(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    need_weights: bool,
    need_masks: bool,
    backend: str,
    anchor: Tensor | None = None,
    need_anchor: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weights, grad_masks, *grad_anchor = _implementation(
        backend, "backward", grad, weights, masks
    ).propagate_backward(
        grad,
        weights,
        masks,
        dilations,
        num_iter,
        valid_classes,
        need_weights=need_weights,
        need_masks=need_masks,
        anchor=anchor,
        need_anchor=need_anchor,
    )
    return grad_weights, grad_masks, grad_anchor[0] if grad_anchor else masks.new_empty(0)


def _propagate_backward_fake(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    need_weights: bool,
    need_masks: bool,
    backend: str,
    anchor: Tensor | None = None,
    need_anchor: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weights.new_empty(weights.shape if need_weights else 0),
        torch.empty_like(masks) if need_masks else masks.new_empty(0),
        masks.new_empty(0) if anchor is None or not need_anchor else anchor.new_empty(anchor.shape),
    )


def label_chunks(classes: int, batch: int, height: int, width: int) -> list[slice]:
    """Classes that are resized and propagated together for labels: about equally many, never all of a large stack."""
    most = max(1, LABEL_ELEMENTS // max(1, batch * height * width))
    count = max(1, -(-classes // most))
    return [slice(classes * i // count, classes * (i + 1) // count) for i in range(count)]


def _propagate_labels(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    backend: str,
    anchor: Tensor | None = None,
    stride: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Masks may be smaller or larger than the affinity's map: each chunk of classes is resized when its turn comes.

    Values are compared in float32 or float64 and rounded to the masks' dtype at the end.
    """
    _check_anchor(anchor)
    module = _implementation(backend, "propagate", weights, masks)
    height, width = weights.shape[2:]
    best: tuple[Tensor, Tensor] | None = None
    for chunk in label_chunks(masks.shape[1], masks.shape[0], height, width):
        planes = resize(masks[:, chunk], (height, width), stride)
        valid = None if valid_classes is None else valid_classes[:, chunk]
        labels, values = module.propagate_labels(weights, planes, dilations, num_iter, valid, anchor)
        labels = labels + chunk.start
        best = (labels, values) if best is None else merge_larger(*best, labels, values)
    assert best is not None  # there is always a chunk
    labels, values = best
    if valid_classes is not None:
        # minus infinity is the value of a class that is not valid, too: there the lowest valid class wins
        labels = labels.where(values != -torch.inf, valid_classes.int().argmax(1)[:, None, None])
        values = values.where(valid_classes.any(1)[:, None, None], 0.0)
    return labels, values.to(masks.dtype)


def _propagate_labels_fake(weights: Tensor, masks: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    size = (masks.shape[0], *weights.shape[2:])
    return masks.new_empty(size, dtype=torch.int64), masks.new_empty(size)


def _refuse_second_order(ctx, *grads: Tensor):
    raise RuntimeError(
        "the refinement is differentiable once: a gradient of its gradient was asked for (create_graph=True);"
        " the functions of dmsa_kernels.refine.reference are plain PyTorch and have one, when called directly"
    )


_SPEC = "int[] dilations, float exponent, float alpha, str sigma, float eps, float position_weight"

local_affinity = operator(
    f"local_affinity(Tensor image, {_SPEC}, bool fast, str backend) -> Tensor",
    _local_affinity,
    _local_affinity_fake,
    setup=_local_affinity_setup,
    backward=_local_affinity_autograd,
)
local_affinity_backward = operator(
    f"local_affinity_backward(Tensor grad_weights, Tensor image, {_SPEC}, str backend) -> Tensor",
    _local_affinity_backward,
    _local_affinity_backward_fake,
    backward=_refuse_second_order,
)
propagate = operator(
    "propagate(Tensor weights, Tensor masks, int[] dilations, int num_iter, Tensor? valid_classes, str backend,"
    " Tensor? anchor=None) -> Tensor",
    _propagate,
    _propagate_fake,
    setup=_propagate_setup,
    backward=_propagate_autograd,
)
propagate_labels = operator(
    "propagate_labels(Tensor weights, Tensor masks, int[] dilations, int num_iter, Tensor? valid_classes, str backend,"
    " Tensor? anchor=None, float[]? stride=None) -> (Tensor labels, Tensor values)",
    _propagate_labels,
    _propagate_labels_fake,
)
propagate_backward = operator(
    "propagate_backward(Tensor grad, Tensor weights, Tensor masks, int[] dilations, int num_iter,"
    " Tensor? valid_classes, bool need_weights, bool need_masks, str backend, Tensor? anchor=None,"
    " bool need_anchor=False) -> (Tensor grad_weights, Tensor grad_masks, Tensor grad_anchor)",
    _propagate_backward,
    _propagate_backward_fake,
    backward=_refuse_second_order,
)
