"""What is measured: a row is one operator on one workload with all its candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Candidate:
    """One implementation of a row's operator."""

    name: str
    """Such as `ours`, `materialising`, `padded slices`, `torch.compile(padded slices)`."""
    run: Callable[..., Any]
    """Called with the row's inputs; returns a tensor or a tuple of tensors."""
    tune: Callable[..., Any] | None = None
    """Called with the row's inputs before everything else, on a GPU: measures launch configurations for them."""
    ours: bool = False
    """The first candidate with `ours` is what the speed-ups compare with."""
    peak_bytes: int = 0
    """Estimated memory it needs beyond the inputs; 0 if it is no larger than the output."""
    tolerance: float | None = None
    """Bound of the gate, if it differs from the row's."""
    compiled: bool = False
    """Runs through torch.compile: skipped where there is no compiler, started last."""
    why_not: str | None = None
    """Reason why it cannot run here; it is listed as skipped with it."""


@dataclass(frozen=True)
class Row:
    """One operator on one workload."""

    family: str
    """`refine`, `aspp`, `cam`, `step` or `data`."""
    workload: str
    """Name in the workload table."""
    variant: str
    """What is computed: `refine`, `affinity`, `forward`, `forward+backward`, ..."""
    dtype: str
    shape: str
    """Shape that is run, as text (such as `1,3,256,256`)."""
    inputs: Callable[[torch.device, int], tuple]
    """`inputs(device, seed)` draws one set of fresh inputs."""
    candidates: tuple[Candidate, ...]
    reference: Callable[..., Any] | None = None
    """Called with the same inputs, computes in higher precision; without one the gate only asks for finite values."""
    tolerance: float = 2e-5
    """Largest accepted error, relative to the largest reference value."""
    error: Callable[[Any, Any], float] | None = None
    """`error(result, expected)` if `relative_error` is not the right measure."""
    floor_bytes: int = 0
    """Bytes that must pass device memory: every input read once, every output written once."""
    cache_bytes: int = 0
    """Bytes that must be loaded from the first-level cache."""
    operations: int = 0
    """Floating-point operations."""
    items: float = 0
    """What is counted for a rate (images, pixels), if one is of interest."""
    scaled_from: str = ""
    """Full shape, if the row is scaled down (on a CPU)."""
    launch_bound: bool = False
    """Small enough that launches dominate: CUDA-graph replay is timed too."""
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}/{self.workload}/{self.variant}/{self.dtype}"

    def __str__(self) -> str:
        return self.name
