"""A run of seconds for tests, and how to compare two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dmsa import checkpoint
from dmsa.config import Config, from_dict

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""For programs that tests start."""


def tiny_values(**train: Any) -> dict[str, Any]:
    """Options of a run of three epochs with two steps each; the teacher starts in the second one."""
    return {
        "data": {"name": "shapes", "size": 48, "crop": 48, "train_images": 16, "val_images": 4, "workers": 0},
        "model": {"encoder": "shapes_vit_tiny", "weights": "random", "decoder_layers": 1, "decoder_heads": 4},
        "labels": {"par_iterations": 2, "bank_images": 8},
        "train": {
            "epochs": 3,
            "batch": 8,
            "lr": 1e-3,
            "teacher_start": 1,
            "teacher_interval": [2],
            "log_every": 1,
            "panels": 1,
            "checkpoint_minutes": 0.0,
            **train,
        },
    }


def tiny_config(out: str | Path, **train: Any) -> Config:
    return from_dict({**tiny_values(**train), "out": str(out)})


def attempts(out: Path, plan: list[dict | None], processes: int = 1, **train: Any) -> list[dict[str, Any]]:
    """Run `tests.dmsa.crash` and return its results."""
    order = {"config": tiny_values(**train), "out": str(out), "attempts": plan, "processes": processes}
    done = subprocess.run(
        [sys.executable, "-m", "tests.dmsa.crash", json.dumps(order)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for result in results:
        result["log"] = done.stderr
    return results


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Compare two checkpoints bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_runs(a: Path, b: Path) -> None:
    """Compare two finished runs: everything in the last and the best checkpoint, and the bytes of the metrics."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for best in (False, True):
        states = []
        for run in (a, b):
            store = checkpoint.Checkpoints(run / "checkpoints")
            states.append(checkpoint.load(store.best if best else store.newest()))
            states[-1]["config"].pop("out")
            for option in ("epochs", "step_timeout", "alone_timeout"):
                states[-1]["config"]["train"].pop(option)
        assert_same(*states)
