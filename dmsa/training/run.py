"""The run folder: who may write in it, what lies where."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from dmsa.config import Config
from dmsa.files import claim_outputs, remove_leftovers, write_atomically


class FolderBusyError(OSError):
    """Another process is writing in the run folder."""


class NotScoredError(ValueError):
    """An epoch is trained and kept, but cannot be scored."""


class RunFolder:
    """A run folder, locked while this process writes in it.

    | path | what |
    |---|---|
    | config.yaml | the merged configuration; `--preset RUN/config.yaml` runs it again |
    | commit.txt | git commits of the source tree that the run was trained at, in order |
    | metrics.jsonl | losses, label statistics and scores, one JSON object a line |
    | tensorboard/ | the same and the panels as events |
    | checkpoints/ | step-*.pt and best.pt |
    | panels/ | epoch-*.png |
    | cache/ | feature bank and centroids |
    | nonfinite/ | the batch that made a loss infinite or NaN |
    | scores.png | mIoU and accuracy by epoch |
    | report.md | scores beside the paper's, and the command |

    Args:
        path: created if needed.

    Raises:
        OSError: it cannot be created or written, or has files of these names that no run made; says why.
        FolderBusyError: another process is writing in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        if self.path.is_dir() and not self.checkpoints.is_dir():  # somebody's folder, not a run's
            names = ("config.yaml", "commit.txt", "metrics.jsonl", "report.md")
            claim_outputs(self.path, names, remedy="no run made them, choose another --out")
        for folder in (self.path, self.checkpoints, self.panels, self.cache):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"out={str(self.path)!r}: cannot create {folder}: {error.strerror}; choose another --out",
                ) from error
        try:
            self._lock = open(self.path / ".lock", "ab")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise OSError(
                error.errno,
                f"out={str(self.path)!r} is not writable: {error.strerror}; nothing was changed, choose another --out",
            ) from error
        try:
            # Locks of this kind belong to the process: data-loader workers do not inherit them, and SIGKILL frees them.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise FolderBusyError(
                f"out={str(self.path)!r}: another process is training in this folder; stop it or choose another --out"
            ) from error
        for folder in (self.path, self.checkpoints, self.panels, self.cache, *self.cache.glob("*/")):
            remove_leftovers(folder)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def panels(self) -> Path:
        """Folder of the panels."""
        return self.path / "panels"

    @property
    def cache(self) -> Path:
        """Folder of what can be made again: feature bank and centroids."""
        return self.path / "cache"

    def write_text(self, name: str, text: str) -> Path:
        """Write a small file atomically."""
        return write_atomically(self.path / name, lambda stream: stream.write(text.encode()))

    def write_config(self, config: Config) -> None:
        """Write config.yaml."""
        self.write_text("config.yaml", config.to_yaml())

    def add_commit(self, commit: str, *, begins: bool) -> None:
        """Note in commit.txt at which commit the source tree is; a run that `begins` forgets what was there."""
        known = [] if begins else commits(self.path)
        if commit not in known:
            self.write_text("commit.txt", "\n".join([*known, commit]) + "\n")

    def close(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def commits(folder: str | Path) -> list[str]:
    """Return the commits in a run folder's commit.txt, none if there is no such file."""
    path = Path(folder) / "commit.txt"
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def launch_command(argv: list[str]) -> str:
    """Return the command line that started this process, with torchrun's part if it was torchrun."""
    import shlex

    words = shlex.join(argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {words}"
    local, whole = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    hosts = f"--nnodes={whole // local} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT " if whole > local else ""
    return f"torchrun {hosts}--nproc_per_node={local} {words}"
