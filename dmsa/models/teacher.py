"""The teacher: a snapshot or a moving average of the student, sharing its frozen encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from dmsa.config import Config
from dmsa.models.encoder import Attended
from dmsa.models.schedule import is_snapshot_epoch
from dmsa.models.segmenter import Segmenter


class Teacher:
    """Source of the second half of the pseudo label, silent until `train.teacher_start`.

    `snapshot` (TransFGU): in every snapshot epoch, teacher <- student and student <- its initial weights. `ema`:
    teacher <- student once, at the start, then follows it step by step, and is what a run scores and keeps for use.

    Args:
        student: its present weights are remembered as the initial ones.
        config: reads `model.teacher`, `model.ema_momentum`, `train.teacher_start`, `train.teacher_interval`.
    """

    def __init__(self, student: Segmenter, config: Config) -> None:
        if config.model.teacher not in ("snapshot", "ema"):
            raise ValueError(f"{config.model.teacher=} is not one of snapshot, ema")
        if not 0 <= config.model.ema_momentum <= 1:
            raise ValueError(f"{config.model.ema_momentum=} is not between 0 and 1")
        self.student = student
        self.kind = config.model.teacher
        self.momentum = config.model.ema_momentum
        self.start = config.train.teacher_start
        self.interval = config.train.teacher_interval
        self.model = student.twin()
        self.initial = student.trainable_state()
        self.snapshot_epoch: int | None = None
        self.epoch = 0

    @property
    def active(self) -> bool:
        """Whether a first snapshot has been taken."""
        return self.snapshot_epoch is not None

    @property
    def averages(self) -> bool:
        """Whether the teacher is a moving average of the student that has begun."""
        return self.kind == "ema" and self.active

    @property
    def epochs_since_snapshot(self) -> int | None:
        """0 in the epoch of the snapshot (for `ema`, of the start); `None` before the first one."""
        return None if self.snapshot_epoch is None else self.epoch - self.snapshot_epoch

    def start_epoch(self, epoch: int) -> bool:
        """Begin an epoch (zero-based); takes the snapshot if one is due. Calling it again in the same epoch is safe.

        Returns:
            whether the student was put back to its initial weights.
        """
        self.epoch = epoch
        if self.kind == "ema":
            due = not self.active and epoch >= self.start
        else:
            due = epoch != self.snapshot_epoch and is_snapshot_epoch(epoch, self.start, self.interval)
        if not due:
            return False
        self.model.load_trainable_state(self.student.trainable_state())
        self.snapshot_epoch = epoch
        if self.kind == "snapshot":
            self.student.load_trainable_state(self.initial)
        return self.kind == "snapshot"

    @torch.no_grad()
    def after_step(self) -> None:
        """Follow the student by one optimiser step (`ema` only)."""
        if not self.averages:
            return
        own = self.model.state_dict()
        for key, value in self.student.state_dict().items():
            if key.startswith("encoder."):
                continue
            if value.is_floating_point():
                own[key].lerp_(value, 1 - self.momentum)
            else:
                own[key].copy_(value)

    @torch.no_grad()
    def logits(
        self, tokens: Tensor | Attended, grid: tuple[int, int], rates: tuple[int, ...] | None = None
    ) -> Tensor | None:
        """Return the teacher's scores [B, K, h, w] from the shared frozen features; `None` while it is silent."""
        return self.model.from_frozen(tokens, grid, rates)["logits"] if self.active else None

    def state_dict(self) -> dict:
        """Return everything needed to continue: teacher, student's initial weights, counters."""
        return {
            "model": self.model.trainable_state(),
            "initial": {key: value.clone() for key, value in self.initial.items()},
            "snapshot_epoch": self.snapshot_epoch,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        self.model.load_trainable_state(state["model"])
        self.initial = {key: state["initial"][key].to(value) for key, value in self.initial.items()}
        self.snapshot_epoch = state["snapshot_epoch"]
        self.epoch = state["epoch"]
