"""The four losses (Eq. 6 of the paper, arXiv 2303.00199): total = l1 seg + l2 ce + l3 un + l4 cls.

Every loss is finite whatever it is given: what has no pixels, no pairs or no competitor counts 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa.config import LossConfig

IGNORE = 255


def bootstrapping_loss(
    logits: Tensor,
    label: Tensor,
    negative: Tensor | None = None,
    alpha: float = 0.0,
    *,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with the pseudo label, minus alpha times that with a wrong one: CE(m, y) - alpha CE(m, y_neg).

    Source: TransFGU (`models/loss/BootstrappingLoss.py`).

    Args:
        logits: [B, K, h, w].
        label: int64 [B, h, w].
        negative: int64 [B, h, w] from `negative_label`; `None` before the first snapshot.
        alpha: weight of the second term, see `dmsa.models.schedule.negative_weight`.
        ignore_index: pixels with this label count neither here nor there.
        reduction: `mean` over the pixels that count, or `none` for the map [B, h, w] with 0 where ignored.
    """
    loss = _cross_entropy(logits, label, ignore_index)
    valid = label != ignore_index
    if negative is not None:
        loss = loss - alpha * _cross_entropy(logits, torch.where(valid, negative, ignore_index), ignore_index)
    return _reduce(loss, valid, reduction)


def uncertainty_loss(
    logits: Tensor, things_only: bool = False, foreground: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Reward a clear winner: 1 - mean(p1 - p2) of the two largest softmax values.

    Args:
        logits: [B, K, h, w].
        things_only: leave the background channel 0 out of the softmax.
        foreground: bool [B, h, w], only these pixels count; all if unset. METHOD: pixels where some CAM > 0.1, for
            data sets of things.
        reduction: `mean`, or `none` for the map 1 - (p1 - p2), [B, h, w], 0 where a pixel does not count.
    """
    if things_only:
        logits = logits[:, 1:]
    valid = torch.ones_like(logits[:, 0], dtype=torch.bool) if foreground is None else foreground.bool()
    if logits.shape[1] < 2:  # a lone class has no competitor to be confused with
        return _reduce(logits.sum(1) * 0, valid, reduction)
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return _reduce(torch.where(valid, 1 - (first - second), 0), valid, reduction)


def class_embedding_loss(class_tokens: Tensor, *, reduction: str = "mean") -> Tensor:
    """Keep the decoded class tokens apart: mean over pairs i < j of 1 + cos(e_i, e_j).

    Source: TransFGU (`models/loss/CLSEmbLoss.py`).

    Args:
        class_tokens: [B, K, D], any length.
        reduction: `mean`, or `none` for the pairs [B, K(K-1)/2], ordered (0,1), (0,2), ..., (1,2), ...
    """
    tokens = F.normalize(class_tokens, dim=-1)
    cosines = tokens @ tokens.transpose(1, 2)  # [B, K, K]
    first, second = torch.triu_indices(cosines.shape[1], cosines.shape[1], 1, device=cosines.device)
    pairs = 1 + cosines[:, first, second]
    return _reduce(pairs, torch.ones_like(pairs, dtype=torch.bool), reduction)


def segmentation_loss(
    logits: Tensor, label: Tensor, things_only: bool = True, n_things: int | None = None, *, ignore_index: int = IGNORE
) -> Tensor:
    """Balance the two halves of the image: half the mean CE over background, half the mean CE over the rest (Eq. 6).

    Args:
        logits: [B, K, h, w].
        label: int64 [B, h, w].
        things_only: background is class 0. Otherwise the halves are stuff (classes from `n_things` on) and things.
        n_things: number of things classes; needed unless `things_only`.
        ignore_index: pixels with this label are in neither half.

    Returns:
        a scalar; an empty half counts 0.
    """
    if not things_only and n_things is None:
        raise ValueError("n_things is needed to tell things from stuff when things_only=False")
    loss = _cross_entropy(logits, label, ignore_index)
    valid = label != ignore_index
    background = valid & ((label == 0) if n_things is None or things_only else (label >= n_things))
    halves = [_reduce(torch.where(half, loss, 0), half, "mean") for half in (background, valid & ~background)]
    return 0.5 * halves[0] + 0.5 * halves[1]


def total_loss(
    output: dict[str, Tensor],
    label: Tensor,
    foreground: Tensor | None,
    weights: LossConfig,
    *,
    things_only: bool,
    n_things: int,
    negative: Tensor | None = None,
    alpha: float = 0.0,
    ignore_index: int = IGNORE,
) -> dict[str, Tensor]:
    """Compute every loss and their weighted sum.

    Args:
        output: of `Segmenter`: `logits` [B, K, h, w] and `class_tokens` [B, K, D].
        label: int64 [B, H, W] pseudo label; where it is finer than the logits, these are enlarged (bilinear).
        foreground: bool [B, H, W] for the uncertainty of data sets of things; unused for the others.
        weights: lambda 1..4.
        things_only: the data set labels things only; channel 0 is background.
        n_things: number of things classes.
        negative: int64 [B, H, W] or `None`.
        alpha: weight of the negative labels.
        ignore_index: label of pixels that do not count.

    Returns:
        scalars `seg`, `ce`, `un`, `cls` and `total`.
    """
    logits = output["logits"].float() if output["logits"].dtype.itemsize < 4 else output["logits"]
    if logits.shape[-2:] != label.shape[-2:]:
        logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
    losses = {
        "seg": segmentation_loss(logits, label, things_only, n_things, ignore_index=ignore_index),
        "ce": bootstrapping_loss(logits, label, negative, alpha, ignore_index=ignore_index),
        "un": uncertainty_loss(logits, things_only, foreground if things_only else None),
        "cls": class_embedding_loss(output["class_tokens"].to(logits.dtype)),
    }
    losses["total"] = sum(getattr(weights, name) * value for name, value in losses.items())
    return losses


def _cross_entropy(logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
    if logits.ndim != 4 or label.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(f"{label.shape=} does not fit {logits.shape=}; expected [B, h, w] and [B, K, h, w]")
    return F.cross_entropy(logits, label, reduction="none", ignore_index=ignore_index)


def _reduce(values: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Mean of `values`, which are 0 where not `valid`, over the valid entries, without asking the device how many."""
    if reduction == "none":
        return values
    if reduction != "mean":
        raise ValueError(f"{reduction=} is not one of mean, none")
    return values.sum() / valid.sum().clamp(min=1)
