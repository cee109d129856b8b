"""What a run tells: metrics.jsonl (exact and repeatable), TensorBoard, the progress bar. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmsa.distributed import is_main
from dmsa.files import cannot_write


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run folder.

    metrics.jsonl holds nothing that depends on the clock: a run that was interrupted ends with the same bytes as one
    that was not. Speed goes to TensorBoard.

    Args:
        folder: the run folder.
        keep_bytes: length up to which an existing metrics.jsonl is kept; what an interrupted run wrote after its last
            checkpoint is cut off.
        step: first step to be written; TensorBoard hides older events from there on.

    Raises:
        ValueError: metrics.jsonl is shorter than the checkpoint says.
    """

    def __init__(self, folder: str | Path, *, keep_bytes: int = 0, step: int = 0) -> None:
        self._stream = self._board = None
        if not is_main():
            return
        from torch.utils.tensorboard import SummaryWriter

        path = Path(folder) / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise ValueError(
                f"{path} has {size} bytes, but the checkpoint was written when it had {keep_bytes}: lines are missing; "
                "put the file back, or choose another run folder with --out"
            )
        self._path = path
        with self._named(path):
            self._stream = open(path, "ab")  # noqa: SIM115 (closed by close)
            self._stream.truncate(keep_bytes)
        with self._named(path.parent / "tensorboard"):
            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line, and every number in it to TensorBoard."""
        if self._stream is None:
            return
        line = {"kind": kind, "step": step, **values}
        with self._named(self._path):
            self._stream.write((json.dumps(_finite(line), allow_nan=False) + "\n").encode())
            self._stream.flush()
        self._show(lambda board: [board.add_scalar(name, value, step) for name, value in _numbers(values, kind)])

    def speed(self, step: int, images_per_second: float) -> None:
        """Write the throughput to TensorBoard."""
        self._show(lambda board: board.add_scalar("speed/images_per_second", images_per_second, step))

    def picture(self, step: int, pixels: Any) -> None:
        """Write a panel, uint8 `[H, W, 3]`, to TensorBoard."""
        self._show(lambda board: board.add_image("panels", pixels, step, dataformats="HWC"))

    def position(self) -> int:
        """Force everything to the disk and return the length of metrics.jsonl in bytes."""
        if self._stream is None:
            return 0
        with self._named(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        """Close both. Lines are complete before this, so that an error here hides none that led to it."""
        for closing in (self._stream, self._board):
            if closing is not None:
                with contextlib.suppress(OSError):
                    closing.close()

    def _show(self, write: Callable[[Any], object]) -> None:
        """Let `write` tell TensorBoard something; its writer's thread reports an error with the next call."""
        if self._board is not None:
            with self._named(self._path.parent / "tensorboard"):
                write(self._board)

    @staticmethod
    @contextlib.contextmanager
    def _named(path: Path) -> Iterator[None]:
        """Name the file in errors of the block."""
        try:
            yield
        except OSError as error:
            intact = "The checkpoints are intact: start the same command again to go on from the last one."
            raise cannot_write(path, error, intact) from error


class Progress:
    """A progress bar over the images of the whole run: images/s and time left. Silent on every rank but 0.

    Args:
        total_images: images of the run.
        done_images: images that an interrupted run has seen already.
    """

    def __init__(self, total_images: int, done_images: int = 0) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_images,
            initial=done_images,
            unit=" images",
            disable=not is_main(),
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def epoch(self, epoch: int, epochs: int) -> None:
        """Show which epoch runs."""
        self._bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)

    def advance(self, images: int) -> None:
        """Count the images of a step."""
        self._bar.update(images)

    def losses(self, losses: dict[str, float], entropy: float, active: str) -> None:
        """Show the losses of the last logging step, and the labels' entropy and active classes."""
        shown = {name: f"{value:.3f}" for name, value in losses.items()}
        self._bar.set_postfix({**shown, "entropy": f"{entropy:.2f}", "active": active}, refresh=False)

    def rate(self) -> float:
        """Return images per second since the last calls, 0 while unknown."""
        return float(self._bar.format_dict["rate"] or 0.0)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def say(message: str) -> None:
    """Print a line on rank 0, above the progress bar."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def git_commit(folder: str | Path | None = None) -> str:
    """Return the commit of the source tree (with `+changes` if it was edited), or `unknown` outside one."""
    folder = Path(__file__).resolve().parents[2] if folder is None else Path(folder)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return "unknown"
    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((f"{prefix}/{key}", float(value)))
    return found
