"""What is logged between two logging steps, added up on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmsa import distributed
from dmsa.training.task import LOSSES

WATCHED = (*LOSSES, "total", "gradient")
"""What must stay finite."""


class Window:
    """What is logged, added up on the device between two logging steps so that no step waits for it.

    Args:
        num_classes: length of the label counts.
        device: of the losses.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.device = device
        self.num_classes = num_classes
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._sums = torch.zeros(len(WATCHED), dtype=torch.float64, device=self.device)
        self._labels = torch.zeros(self.num_classes, dtype=torch.float64, device=self.device)
        self._broken_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._broken_values = torch.zeros(len(WATCHED), dtype=torch.float64, device=self.device)

    def add(self, step: int, watched: Tensor, labels: Tensor) -> None:
        """Add a step's values `[len(WATCHED)]` (this process's shares) and label counts `[K]`."""
        self._steps += 1
        self._sums += watched
        self._labels += labels
        newly = (self._broken_step < 0) & ~watched.isfinite().all()
        self._broken_step = torch.where(newly, step, self._broken_step)
        self._broken_values = torch.where(newly, watched, self._broken_values)

    def read(self, due: bool) -> tuple[dict[str, float], np.ndarray, bool, bool]:
        """Add up all processes, begin anew (unless broken) and return means, label counts, and two flags.

        The flags, `due` of any process and "something was not finite", are the same in every process.
        """
        flags = torch.tensor([float(due), 0.0], dtype=torch.float64, device=self.device)
        flags[1] = (self._broken_step >= 0).double()
        packed = distributed.all_reduce_sum(torch.cat([self._sums, self._labels, flags])).tolist()
        means = {name: value / self._steps for name, value in zip(WATCHED, packed, strict=False)}
        labels = np.array(packed[len(WATCHED) : -2])
        if not packed[-1]:
            self._clear()
        return means, labels, bool(packed[-2]), bool(packed[-1])

    def first_broken(self) -> dict[str, Any] | None:
        """Return step and values of this process's first step that was not finite."""
        step = int(self._broken_step)
        values = dict(zip(WATCHED, self._broken_values.tolist(), strict=True))
        return None if step < 0 else {"step": step, "values": values}
