"""The classes of a data set, apart from its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Classes:
    """What a task, a checkpoint and a picture need to know about a data set."""

    name: str
    classes: tuple[str, ...]
    palette: np.ndarray
    things_only: bool
    n_things: int
    n_stuff: int

    @classmethod
    def of(cls, dataset: Any) -> Classes:
        """Read them off a data set."""
        return cls(
            dataset.name,
            tuple(dataset.classes),
            np.asarray(dataset.palette, dtype=np.uint8),
            bool(dataset.things_only),
            int(dataset.n_things),
            int(dataset.n_stuff),
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, the background of things data included."""
        return len(self.classes)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "palette": torch.from_numpy(self.palette.copy()),
            "things_only": self.things_only,
            "n_things": self.n_things,
            "n_stuff": self.n_stuff,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Classes:
        """Undo `state_dict`."""
        return cls(
            state["name"],
            tuple(state["classes"]),
            state["palette"].numpy(),
            state["things_only"],
            state["n_things"],
            state["n_stuff"],
        )
