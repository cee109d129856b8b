"""The definition of the refinement in plain PyTorch: slow, obvious, in double precision, differentiable.

Every function computes in float64 and rounds its result once, so it is what the other backends are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmsa_kernels.refine.labels import largest
from dmsa_kernels.refine.spec import offsets, position_vector, sigma_centre_count


def neighbour(x: Tensor, dy: int, dx: int) -> Tensor:
    """``x(q + (dy, dx))`` with both coordinates clamped to the map; x and result [..., H, W]."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device) + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + dx).clamp(0, width - 1)
    return x[..., rows, :][..., columns]


def _affinity(
    image: Tensor, dilations: list[int], exponent: float, alpha: float, sigma: str, eps: float, position_weight: float
) -> Tensor:
    neighbours = torch.stack([neighbour(image, dy, dx) for dy, dx in offsets(dilations)], 1)  # [B, P, K, H, W]
    centre = image.unsqueeze(1)  # [B, 1, K, H, W]
    contrast = (neighbours - centre).abs()
    if sigma == "none":
        scale = torch.ones_like(centre)
    else:
        samples = torch.cat([neighbours] + [centre] * sigma_centre_count(sigma, dilations), 1)
        scale = samples.std(1, keepdim=True)  # [B, 1, K, H, W]
        # a channel without contrast has the same score for all neighbours: left out, it drowns no other in rounding
        contrast = contrast.where(samples.amin(1, keepdim=True) != samples.amax(1, keepdim=True), 0.0)
    scores = -((contrast / (alpha * scale + eps)) ** exponent).mean(2)  # [B, P, H, W]
    position = torch.tensor(
        position_vector(dilations, alpha, eps, position_weight), dtype=image.dtype, device=image.device
    )
    return scores.softmax(1) + position.view(1, -1, 1, 1)


def _propagate(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None,
) -> Tensor:
    keep = None if valid_classes is None else valid_classes[:, :, None, None]
    if keep is not None:
        masks = masks.where(keep, 0.0)
    first = masks
    for _ in range(num_iter):
        refined = torch.zeros_like(masks)
        for p, (dy, dx) in enumerate(offsets(dilations)):
            refined = refined + weights[:, p : p + 1] * neighbour(masks, dy, dx)
        masks = refined if anchor is None else (1 - anchor) * refined + anchor * first
    return masks if keep is None else masks.where(keep, 0.0)


def local_affinity(
    image: Tensor,
    dilations: list[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    fast: bool,
) -> Tensor:
    """Weights [B, P, H, W] of the P = 8 * D neighbours of every pixel of image [B, K, H, W]."""
    weights = _affinity(image.double(), dilations, exponent, alpha, sigma, eps, position_weight)
    if fast:
        return weights.half()
    return weights if image.dtype == torch.float64 else weights.float()


def local_affinity_backward(
    grad_weights: Tensor,
    image: Tensor,
    dilations: list[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
) -> Tensor:
    """Gradient [B, K, H, W] of the image, by automatic differentiation."""
    pullback = torch.func.vjp(
        lambda x: _affinity(x, dilations, exponent, alpha, sigma, eps, position_weight), image.double()
    )[1]
    return torch.empty_like(image).copy_(pullback(grad_weights.double())[0])


def propagate(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> Tensor:
    """``num_iter`` times ``masks(q) <- sum_p weights_p(q) * masks(q + o_p)``; masks and result [B, C, H, W].

    With an ``anchor`` [B, 1, H, W] every iteration keeps that share of the first masks.
    """
    hold = None if anchor is None else anchor.double()
    out = torch.empty_like(masks)
    return out.copy_(_propagate(weights.double(), masks.double(), dilations, num_iter, valid_classes, hold))


def propagate_labels(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The class of the largest propagated value among the valid classes and that value (float64), both [B, H, W]."""
    return largest(propagate(weights, masks.double(), dilations, num_iter, valid_classes, anchor), valid_classes)


def propagate_backward(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    *,
    need_weights: bool,
    need_masks: bool,
    anchor: Tensor | None = None,
    need_anchor: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of weights, masks and an anchor in their shapes, by automatic differentiation; empty if not needed."""
    inputs = [x.double() for x in (weights, masks, anchor) if x is not None]
    pullback = torch.func.vjp(
        lambda w, m, a=None: _propagate(w, m, dilations, num_iter, valid_classes, a),
        *inputs,
    )[1]
    grad_weights, grad_masks, *grad_anchor = pullback(grad.double())
    grads = (
        grad_weights.to(weights.dtype) if need_weights else weights.new_empty(0),
        torch.empty_like(masks).copy_(grad_masks) if need_masks else masks.new_empty(0),
    )
    return (
        grads if anchor is None else (*grads, grad_anchor[0].to(anchor.dtype) if need_anchor else anchor.new_empty(0))
    )
