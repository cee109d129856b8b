"""A whole run as `train.py` starts it: join the other processes, train, compare with the baselines, report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmsa import distributed
from dmsa.checkpoint import Checkpoints
from dmsa.config import Config, resolve_method, validate
from dmsa.scoring.baselines import untrained_rows
from dmsa.training.progress import say
from dmsa.training.sampler import check_shares
from dmsa.training.trainer import Trainer


def train(config: Config, argv: list[str] | None = None) -> dict[str, Any]:
    """Train as `config` says, going on from the run folder's newest checkpoint if it has one.

    Args:
        config: a whole run.
        argv: command line for the report; the process's own if None.

    Returns:
        `scores` (one dict an evaluation), `best` (one of them, or None), `folder`, `steps`.

    Raises:
        ValueError: configuration, world size, data or checkpoint do not fit; says how.
        FileNotFoundError: data or weights are missing; says where to get them.
        OSError: the run folder or a checkpoint cannot be written; the previous checkpoint is intact.
        NonFiniteLossError: names the loss; the batch is in the run folder.
        LostRankError: another process ended or cannot be reached; names it and the last checkpoint.
    """
    with started(config, argv) as trainer:
        return complete(trainer)


@contextlib.contextmanager
def started(config: Config, argv: list[str] | None = None) -> Iterator[Trainer]:
    """Join the other processes, build the run and yield it; arguments and errors are those of `train`."""
    validate(config)
    check_shares(config.train.batch, distributed.launched()[1])

    def goes_on() -> str:
        folder = Path(config.out) / "checkpoints"
        return f"the same command goes on from {Checkpoints(folder).newest() or f'the last checkpoint in {folder}'}"

    with distributed.process_group(consequence=goes_on) as device:
        distributed.expect(config.train.alone_timeout)
        trainer = Trainer(config, device, sys.argv if argv is None else argv)
        try:
            yield trainer
        finally:
            trainer.close()


def complete(trainer: Trainer) -> dict[str, Any]:
    """Train to the end, then the baselines that `train.baselines` asks for; write the report; return as `train`."""
    result = trainer.run()
    path = trainer.report(_baselines(trainer))
    if path is not None:
        say(f"{path} has the scores, {path.parent / 'panels'} the panels")
    return result


def _baselines(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the rows that a finished run's report shows beside its own; the first process makes the untrained ones."""
    config = trainer.config
    if not config.train.baselines or trainer.state.best is None or trainer.val_data.labels_from is None:
        return []
    rows: list[dict[str, Any]] = []
    if distributed.is_main():
        rows = untrained_rows(config, trainer.val_data, trainer.encoder, trainer.centroids["vectors"])
    if config.method != "transfgu":
        rows.append(_transfgu(trainer, rows))
    return rows


def _transfgu(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Train TransFGU (pyramid, PAR and segmentation loss off) with the same data, seed and budget; return its row."""
    config = trainer.config
    twin = resolve_method(dataclasses.replace(config, method="transfgu", out=str(Path(config.out) / "transfgu")))
    runner = Trainer(twin, trainer.device, trainer.argv)
    try:
        best = runner.run()["best"]
        runner.report(rows)
    finally:
        runner.close()
    return {
        "method": "transfgu (best epoch)",
        "miou": 100 * best["miou"],
        "accuracy": 100 * best["accuracy"],
        "protocol": best["protocol"],
        "source": f"same budget, epoch {best['epoch'] + 1}",
    }
