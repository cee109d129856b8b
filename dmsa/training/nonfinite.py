"""What happens when a loss is not a number any more: the batch is kept, and every process stops with one message."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from dmsa import distributed
from dmsa.files import write_atomically


class NonFiniteLossError(FloatingPointError):
    """A loss, or the gradient, became infinite or NaN."""


def stop_nonfinite(
    own: Mapping[str, Any] | None,
    remake: Callable[[int], dict[str, Any]],
    folder: Path,
    *,
    epoch: int,
    newest: Path | None,
) -> NoReturn:
    """Save the first batch with a loss that is not finite, and stop every process.

    Args:
        own: step and values of this process's first such step, from `Window.first_broken`.
        remake: a step's number -> this process's part of its batch.
        folder: for the batch; made if needed.
        epoch: of that step, zero-based.
        newest: checkpoint to go on from, if there is one.

    Raises:
        NonFiniteLossError: always, the same in every process but for whether its batch could be kept.
    """
    broken = {rank: item for rank, item in enumerate(distributed.gather_objects(own)) if item}
    step = min(item["step"] for item in broken.values())
    ranks = [rank for rank, item in broken.items() if item["step"] == step]
    values = broken[ranks[0]]["values"]
    kept = f"The batch is in {folder}"
    if distributed.rank() in ranks:
        saved = {**remake(step), "epoch": epoch, "step": step, "losses": broken[distributed.rank()]["values"]}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{step:08d}-rank{distributed.rank()}.pt"
            write_atomically(path, lambda stream: torch.save(saved, stream))
        except OSError as error:
            kept = f"The batch could not be kept ({error})"
    distributed.barrier()
    names = [name for name, value in values.items() if not math.isfinite(value)]
    raise NonFiniteLossError(
        f"{' and '.join(name for name in names if name != 'total' or len(names) == 1)} became "
        f"{values[names[0]]} in step {step} (epoch {epoch + 1}) on rank {', '.join(map(str, ranks))}: "
        f"{ {name: round(value, 4) for name, value in values.items()} }. {kept}; "
        + (f"{newest} is intact" if newest else "no checkpoint was written yet")
        + ". Try a smaller --train.lr, or --train.precision fp32"
    )
