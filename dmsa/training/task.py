"""One training step's mathematics: a batch in, a dict of losses out. Knows nothing of files, processes or loops.

Every loss is a sum divided by a count over the *global* batch. `prepare` makes the labels of a part of the batch and
counts what they contain; the caller adds the counts of all parts (micro-batches, processes); `losses` divides by them.
The losses and gradients of the parts then add up to those of the whole batch, however it is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmsa.config import Config
from dmsa.data.classes import Classes
from dmsa.labels.cam import CAMS
from dmsa.labels.fuse import negative_label, normalize_cam, pseudo_label
from dmsa.models.encoder import Attended, Encoder
from dmsa.models.schedule import dilations_for_epoch, evaluation_rates, grid_aware, negative_weight
from dmsa.models.segmenter import Segmenter
from dmsa.models.teacher import Teacher
from dmsa.random import mix
from dmsa.scoring.refined import refined
from dmsa.training import losses as terms

LOSSES = ("seg", "ce", "un", "cls")
COUNTS = ("pixels", "background", "rest", "uncertain", "images")


@dataclass(frozen=True)
class Prepared:
    """Labels of a part of a batch, and what the student needs for it."""

    attended: Attended
    """Frozen features, shared with the labels."""
    label: Tensor
    """int64 `[b, h, w]`."""
    negative: Tensor | None
    """int64 `[b, h, w]`, None before the teacher's first snapshot."""
    foreground: Tensor
    """bool `[b, h, w]`, where the uncertainty of things data counts."""
    counts: Tensor
    """float64 `[len(COUNTS)]`: this part's share of the denominators."""


class Task:
    """Student, teacher and centroids, and how they make losses out of images.

    Args:
        config: the run.
        classes: of the training data.
        encoder: the frozen backbone; its device is the task's.
        centroids: `[n_things + n_stuff, D]`.

    Raises:
        ValueError: the number or width of the centroids does not fit.
    """

    def __init__(self, config: Config, classes: Classes, encoder: Encoder, centroids: Tensor) -> None:
        expected = (classes.n_things + classes.n_stuff, encoder.embed_dim)
        if tuple(centroids.shape) != expected:
            raise ValueError(
                f"{tuple(centroids.shape)=} is not {expected}: one centroid a class, of the encoder's width"
            )
        self.config = config
        self.classes = classes
        self.encoder = encoder
        self.device = next(encoder.parameters()).device
        self.centroids = centroids.to(self.device)
        self.student = Segmenter(config.model, classes.num_classes, encoder).to(self.device)
        self.teacher = Teacher(self.student, config)
        self.forward: nn.Module = self.student
        """What runs the student: itself, or a wrapper that averages gradients."""

    @property
    def scored(self) -> Segmenter:
        """What is scored and used: the student, or its moving average where the teacher is one."""
        return self.teacher.model if self.teacher.averages else self.student

    def start_epoch(self, epoch: int) -> bool:
        """Renew the teacher if it is due; return whether the student was put back to its initial weights."""
        return self.teacher.start_epoch(epoch)

    def rates(self, epoch: int, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the dilation rates of an epoch on a token grid (h, w)."""
        rates = dilations_for_epoch(epoch, self.config.rates.epoch_base)
        return grid_aware(rates, grid) if self.config.rates.grid_aware else rates

    def eval_rates(self, epoch: int, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the rates for evaluating weights that were last trained in `epoch`."""
        return evaluation_rates(self.config, epoch, grid)

    @torch.no_grad()
    def prepare(self, batch: Mapping[str, Any], epoch: int, step: int) -> Prepared:
        """Make the pseudo labels of a part of the global batch of `step`.

        Args:
            batch: `image` and `guide`, `[b, 3, S, S]`, on the task's device.
            epoch: zero-based epoch.
            step: number of the step in the run; all parts of a batch share it, and with it the negative labels'
                permutation.
        """
        attended = self.encoder.features(batch["image"])
        rates = self.rates(epoch, attended.grid)
        cam = CAMS[self.config.labels.cam](self.encoder, attended, self.centroids)
        teacher = self.teacher.logits(attended, attended.grid, rates)
        made = pseudo_label(cam, teacher, batch["guide"], self.classes.things_only, self.config.labels)
        negative = None
        if self.teacher.active:
            generator = torch.Generator().manual_seed(mix(self.config.train.seed, step))
            negative = negative_label(made.scores, torch.randperm(made.scores.shape[1], generator=generator))
        background = self._background(made.label)
        uncertain = made.foreground if self.classes.things_only else torch.ones_like(made.foreground)
        images = torch.full((), len(made.label), dtype=torch.float64, device=self.device)
        counts = [torch.ones_like(background).sum(), background.sum(), (~background).sum(), uncertain.sum(), images]
        return Prepared(attended, made.label, negative, uncertain, torch.stack([c.double() for c in counts]))

    def losses(self, prepared: Prepared, counts: Tensor, epoch: int) -> dict[str, Tensor]:
        """Run the student and return this part's share of every loss, and of their weighted sum `total`.

        Args:
            prepared: from `prepare`.
            counts: the counts of all parts, added up.
            epoch: zero-based epoch.

        Returns:
            fp32 scalars `seg`, `ce`, `un`, `cls`, `total`; the shares of all parts add up to the batch's losses.
        """
        rates = self.rates(epoch, prepared.attended.grid)
        output = self.forward(None, rates, frozen=prepared.attended)
        with torch.autocast(self.device.type, enabled=False):
            return self._losses(output, prepared, counts)

    def _losses(self, output: Mapping[str, Tensor], prepared: Prepared, counts: Tensor) -> dict[str, Tensor]:
        label = prepared.label
        logits = output["logits"].float()
        if logits.shape[-2:] != label.shape[-2:]:
            logits = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
        pixels, background, rest, uncertain, images = counts.clamp(min=1).to(logits.dtype).unbind()
        positive = terms.bootstrapping_loss(logits, label, reduction="none")  # [b, h, w]
        ce = positive.sum() / pixels
        if prepared.negative is not None:
            alpha = negative_weight(self.teacher.epochs_since_snapshot)
            wrong = terms.bootstrapping_loss(logits, prepared.negative, reduction="none")
            ce = ce - alpha * wrong.sum() / pixels
        is_background = self._background(label)
        seg = 0.5 * torch.where(is_background, positive, 0).sum() / background
        seg = seg + 0.5 * torch.where(is_background, 0, positive).sum() / rest
        doubt = terms.uncertainty_loss(logits, self.classes.things_only, prepared.foreground, reduction="none")
        pairs = terms.class_embedding_loss(output["class_tokens"].float(), reduction="none")  # [b, pairs]
        shares = {
            "seg": seg,
            "ce": ce,
            "un": doubt.sum() / uncertain,
            "cls": pairs.sum() / (images * max(pairs.shape[1], 1)),
        }
        weights = self.config.losses
        return {**shares, "total": sum(getattr(weights, name) * value for name, value in shares.items())}

    def step(self, batch: Mapping[str, Any], epoch: int, step: int = 0) -> dict[str, Tensor]:
        """Return the losses of a whole batch in one process: `prepare` and `losses` together.

        Args:
            batch: `image` and `guide`, `[B, 3, S, S]`.
            epoch: zero-based epoch.
            step: number of the step in the run.
        """
        prepared = self.prepare(batch, epoch, step)
        return self.losses(prepared, prepared.counts, epoch)

    @torch.no_grad()
    def explain(self, batch: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        """Return the stages between an image and its prediction, for panels.

        Returns:
            `cam` `[B, n, h, w]` in [0, 1], `teacher` labels `[B, h, w]` (None before the first snapshot), `refined`
            labels and `prediction` labels, `[B, h, w]`.
        """
        attended = self.encoder.features(batch["image"])
        rates = self.eval_rates(epoch, attended.grid)
        cam = CAMS[self.config.labels.cam](self.encoder, attended, self.centroids)
        teacher = self.teacher.logits(attended, attended.grid, rates)
        made = pseudo_label(cam, teacher, batch["guide"], self.classes.things_only, self.config.labels)
        logits = refined(self.scored(None, rates, frozen=attended)["logits"], batch["image"], self.config)
        return {
            "cam": normalize_cam(cam),
            "teacher": None if teacher is None else teacher.argmax(1),
            "refined": made.label,
            "prediction": logits.argmax(1),
        }

    def _background(self, label: Tensor) -> Tensor:
        """Return the half of Eq. 6 that a pixel is in: background, or (data with stuff) stuff."""
        return label == 0 if self.classes.things_only else label >= self.classes.n_things


def split_batch(batch: Mapping[str, Any], size: int | None) -> list[dict[str, Any]]:
    """Cut a batch into parts of `size` images; the last one may be smaller."""
    length = len(batch["image"])
    size = size or length
    return [{key: batch[key][begin : begin + size] for key in ("image", "guide")} for begin in range(0, length, size)]


def label_counts(parts: list[Prepared], num_classes: int) -> Tensor:
    """Count the labels `[K]` without asking the device for anything."""
    ids = torch.arange(num_classes, device=parts[0].label.device)
    return torch.stack([(part.label.reshape(-1, 1) == ids).sum(0) for part in parts]).sum(0)
