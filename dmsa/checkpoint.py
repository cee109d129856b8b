"""Checkpoints: complete, atomic, the last n and the best; readable with `torch.load(..., weights_only=True)`.

What is random depends on seed, epoch, step and image, never on a process or on what was drawn before. So a checkpoint
holds no generators, and a run goes on with any number of processes.

A checkpoint is a dict of tensors and plain values:

| key | what |
|---|---|
| `version` | of this layout |
| `config` | the merged configuration as nested dicts |
| `dataset` | `name`, `classes`, `palette`, `things_only`, `n_things`, `n_stuff` |
| `encoder` | SHA-256 of the frozen weights, which are not stored |
| `student`, `teacher`, `initial` | trained weights; the teacher's state; the student's weights before the first step |
| `optimizer`, `scaler` | their state dicts |
| `epoch`, `position`, `step` | epoch to go on with, steps already done in it, steps done in all |
| `trained_epoch`, `unscored` | epoch the student was last trained in; whether it is done but not evaluated yet |
| `alpha_counter`, `rates` | epochs since the teacher's snapshot; dilation rates the student was last trained with |
| `centroids` | class centroids and their provenance |
| `scores`, `best`, `assignment` | scores so far, the best of them, the last prediction-to-class assignment |
| `skipped`, `skipped_images` | training images that could not be decoded: those logged, and all found |
| `metrics_bytes` | length of metrics.jsonl at this moment |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmsa.config import Config, differences, to_dict
from dmsa.files import link_atomically, remove_leftovers, write_atomically

VERSION = 4
REQUIRED = {
    "config": dict,
    "student": dict,
    "epoch": int,
    "step": int,
    "optimizer": dict,
    "dataset": dict,
}
MAY_CHANGE = (
    "out",
    "data.root",
    "data.workers",
    "train.baselines",
    "train.epochs",
    "train.keep_checkpoints",
    "train.checkpoint_minutes",
    "train.step_timeout",
    "train.alone_timeout",
)
"""Options that may differ when a run goes on; none of them changes what a step computes."""


def load(path: str | Path) -> dict[str, Any]:
    """Read one checkpoint file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or something else than a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r} is not a file; expected a .pt file written by train.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way in which a file can be broken
        others = [item.name for item in _files(path.parent) if item != path]
        advice = (
            f"delete it and start the same command again: it goes on from {others[-1]}"
            if others
            else "there is no earlier one beside it: delete it and start the same command again, from the beginning"
        )
        raise ValueError(
            f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: truncated, damaged or not a checkpoint "
            f"({type(error).__name__}); {advice}"
        ) from error
    missing = [key for key in REQUIRED if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(missing)}")
    for key, kind in REQUIRED.items():
        if not isinstance(state[key], kind):
            raise ValueError(f"{path}: {key} is a {type(state[key]).__name__}, expected a {kind.__name__}")
    if state.get("version") == 3:  # held generators, and kept no epoch without its score
        state = {**{key: value for key, value in state.items() if key != "rng"}, "version": VERSION, "unscored": False}
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has checkpoint layout {state.get('version')}, this program reads {VERSION}")
    return state


def check_config(state: Mapping[str, Any], config: Config, path: str | Path) -> None:
    """Check that a checkpoint belongs to `config`.

    Raises:
        ValueError: lists every option that differs, with both values; or the configuration in the file contains itself.
    """
    # Options that are younger than the checkpoint had the effect of their defaults.
    defaults = to_dict(Config())
    then = {
        name: {**defaults[name], **value} if isinstance(value, dict) and isinstance(defaults.get(name), dict) else value
        for name, value in {**defaults, **state["config"]}.items()
    }
    try:
        found = differences(then, to_dict(config), ignore=MAY_CHANGE, labels=("in the checkpoint", "now"))
    except RecursionError:
        raise ValueError(f"{path} is damaged: its configuration contains itself") from None
    if found:
        raise ValueError(
            f"{path} was written with another configuration:\n  "
            + "\n  ".join(found)
            + "\nstart with the options of that run, or choose another run folder with --out"
        )


class Checkpoints:
    """The checkpoint files of a run folder.

    Args:
        folder: where they lie; created by `save`.
        keep: how many of the newest stay, besides the best.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    @property
    def best(self) -> Path:
        """File of the best checkpoint, whether it exists or not."""
        return self.folder / "best.pt"

    def path(self, step: int) -> Path:
        """Return the file of the checkpoint after `step` steps, whether it exists or not."""
        return self.folder / f"step-{step:08d}.pt"

    def newest(self) -> Path | None:
        """Return the checkpoint with the most steps, or None."""
        files = _files(self.folder)
        return files[-1] if files else None

    def clean(self) -> None:
        """Delete what writers that were killed left behind."""
        remove_leftovers(self.folder)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write `state` atomically as the newest checkpoint and drop the oldest beyond `keep`.

        Raises:
            OSError: full disk, read-only folder, size limit; names the file and the checkpoint that is still intact.
        """
        before = self.newest()
        consequence = (
            f"{before.name} is intact: start the same command again to go on from it."
            if before is not None
            else "No earlier checkpoint exists."
        )
        path = self.path(state["step"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"could not create {self.folder}: {error.strerror}") from error
        write_atomically(path, lambda stream: torch.save(dict(state), stream), consequence=consequence)
        for old in _files(self.folder)[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def mark_best(self, path: Path) -> None:
        """Make `best.pt` another name of `path`; it stays when `path` is dropped."""
        link_atomically(path, self.best)


def find(path: str | Path, *, prefer_best: bool = True) -> Path:
    """Return the checkpoint file that `path` means: a file, a run folder (its best, else its newest).

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        store = Checkpoints(folder)
        if prefer_best and store.best.is_file():
            return store.best
        if newest := store.newest():
            return newest
    raise FileNotFoundError(
        f"checkpoint={str(path)!r}: expected a checkpoint file, or a run folder of train.py with checkpoints/*.pt"
    )


def _files(folder: Path) -> Sequence[Path]:
    return sorted(item for item in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", item.name))
