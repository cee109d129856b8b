"""From class activation map and teacher to the pseudo label."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa.config import LabelConfig


class PseudoLabel(NamedTuple):
    """What a training step compares the student with."""

    label: Tensor
    """int64 [B, h, w] class of each token (or pixel of the refinement grid); ties go to the lowest class."""
    scores: Tensor
    """[B, K, h, w] refined scores of the label's grid; the label is their argmax."""
    foreground: Tensor
    """bool [B, h, w]: some CAM is above the background threshold there."""


def normalize_cam(cam: Tensor) -> Tensor:
    """Stretch each image's maps to [0, 1], jointly over classes and pixels; a constant image gives zeros.

    Args:
        cam: [B, K, h, w].
    """
    if not cam.numel():
        return cam
    low = cam.amin((1, 2, 3), keepdim=True)
    span = cam.amax((1, 2, 3), keepdim=True) - low
    return torch.where(span > 0, (cam - low) / span, 0)


def fuse(
    cam: Tensor,
    teacher_logits: Tensor | None,
    things_only: bool,
    background_threshold: float = 0.1,
) -> Tensor:
    """Fuse the normalised CAM with the teacher's prediction: 0.5 softmax(teacher) + 0.5 CAM.

    Source: TransFGU (`models/loss/BootstrappingLoss.py`).

    Args:
        cam: [B, n, h, w], as it comes from `attention_gradient_cam` or `feature_cam`.
        teacher_logits: [B, K, h, w]; `None` before the first snapshot, when the CAM stands alone.
        things_only: the data set labels things only, so that a background channel relu(threshold - max CAM) comes
            first and K = n + 1; otherwise K = n.
        background_threshold: CAM value, after normalisation, below which background begins.

    Returns:
        [B, K, h, w] scores. No gradient.

    Raises:
        ValueError: the teacher's shape does not fit.
    """
    with torch.no_grad():
        scores = normalize_cam(cam)
        if things_only:
            background = (background_threshold - scores.amax(1, keepdim=True)).relu()
            scores = torch.cat([background, scores], dim=1)
        if teacher_logits is None:
            return scores
        if teacher_logits.shape != scores.shape:
            raise ValueError(
                f"{teacher_logits.shape=} differs from the CAM's {tuple(scores.shape)} with {things_only=}"
            )
        return 0.5 * teacher_logits.to(scores.dtype).softmax(1) + 0.5 * scores


def refine_scores(scores: Tensor, guide: Tensor, config: LabelConfig) -> Tensor:
    """Refine fused scores with PAR (Eq. 4) at half the crop's resolution, or at all of it.

    Args:
        scores: [B, K, h, w] on the token grid.
        guide: [B, 3, S, S'] the crop before colour jitter, any affine scale (PAR divides by the local deviation).
        config: reads `par`, `par_dilations`, `par_iterations`, `par_resolution`, `label_grid`.

    Returns:
        with `label_grid=pixels`, [B, K, H, W] of the refinement, (S//2, S'//2) or (S, S'); with `tokens`, [B, K, h, w],
        each token the mean of its pixels.
    """
    if guide.ndim != 4 or guide.shape[1] != 3 or guide.shape[0] != scores.shape[0]:
        raise ValueError(f"{guide.shape=} is not [{scores.shape[0]}, 3, S, S] for {scores.shape=}")
    switches = (("par", ("on", "off")), ("par_resolution", ("half", "full")), ("label_grid", ("pixels", "tokens")))
    for name, choices in switches:
        if getattr(config, name) not in choices:
            raise ValueError(f"labels.{name}={getattr(config, name)!r} is not one of {', '.join(choices)}")
    grid = (scores.shape[-2], scores.shape[-1])
    divisor = 2 if config.par_resolution == "half" else 1
    size = (max(guide.shape[2] // divisor, 1), max(guide.shape[3] // divisor, 1))
    if config.par == "off":
        if config.label_grid == "tokens":
            return scores
        return F.interpolate(scores, size, mode="bilinear", align_corners=True)
    from dmsa_kernels.refine import refine

    with torch.no_grad():
        small = F.interpolate(guide.to(scores.dtype), size, mode="bilinear", antialias=True)
        refined = cast(Tensor, refine(small, scores, config.par_dilations, config.par_iterations, resize="masks"))
        return F.adaptive_avg_pool2d(refined, grid) if config.label_grid == "tokens" else refined


def pseudo_label(
    cam: Tensor,
    teacher_logits: Tensor | None,
    guide: Tensor,
    things_only: bool,
    config: LabelConfig,
) -> PseudoLabel:
    """Fuse, refine and take the argmax: the whole way from the CAM to the label.

    Args:
        cam: [B, n, h, w].
        teacher_logits: [B, K, h, w] or `None`, as in `fuse`.
        guide: [B, 3, S, S] the crop before colour jitter.
        things_only: as in `fuse`.
        config: the `labels` part of the configuration.
    """
    with torch.no_grad():
        scores = fuse(cam, teacher_logits, things_only, config.background_threshold)
        scores = refine_scores(scores, guide, config)
        foreground = (normalize_cam(cam) > config.background_threshold).any(1)  # [B, h, w]
        if foreground.shape[-2:] != scores.shape[-2:]:
            foreground = F.interpolate(foreground[:, None].float(), scores.shape[-2:], mode="nearest")[:, 0].bool()
        return PseudoLabel(scores.argmax(1), scores, foreground)


def negative_label(
    scores: Tensor, permutation: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return a wrong label from the same scores: the argmax after one random permutation of the channels.

    Args:
        scores: [B, K, h, w] refined scores.
        permutation: int64 [K]; drawn if unset, one for the whole batch.
        generator: source of the draw (a CPU generator); torch's default one if unset.

    Returns:
        int64 [B, h, w].
    """
    if permutation is None:
        permutation = torch.randperm(scores.shape[1], generator=generator)
    elif permutation.shape != scores.shape[1:2]:
        raise ValueError(f"{permutation.shape=} does not permute the {scores.shape[1]} channels of {scores.shape=}")
    return scores[:, permutation.to(scores.device)].argmax(1)
