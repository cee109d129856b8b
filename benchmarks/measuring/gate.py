"""Whether a result is right, before anything is timed."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a result (a tensor, or nested sequences and dicts of them), in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def relative_error(result: Any, expected: Any) -> float:
    """Return the largest difference of any tensor, relative to the largest expected value; integers count mismatches.

    NaN or infinity on either side, other shapes and missing tensors give infinity.
    """
    got, want = tensors(result), tensors(expected)
    if len(got) != len(want) or not got:
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel() == 0:
            continue
        if not b.is_floating_point():
            worst = max(worst, (a != b).double().mean().item())
            continue
        # In slices: the difference in double precision of a whole large map would need more memory than the operator.
        scale, difference = 0.0, 0.0
        for x, y in zip(a.reshape(-1).split(1 << 26), b.reshape(-1).split(1 << 26), strict=True):
            delta = (x.detach().to(torch.float64) - y.detach().to(torch.float64)).abs().max().item()
            if not math.isfinite(delta):
                return math.inf
            difference = max(difference, delta)
            scale = max(scale, y.abs().max().item())
        worst = max(worst, difference / max(scale, 1e-30))
    return worst


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that `torch.empty` returns with NaN inside the block: an element that is not written shows up."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def finite_error(result: Any) -> float:
    found = tensors(result)
    finite = found and all(bool(t.isfinite().all()) for t in found if t.is_floating_point())
    return 0.0 if finite else math.inf
