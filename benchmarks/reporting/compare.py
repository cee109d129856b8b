"""Regressions of one result file against another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.measuring.results import Result, human_bytes, number


def compare(old: Sequence[Result], new: Sequence[Result], threshold: float = 0.10) -> list[str]:
    """Return the regressions of `new` against `old`, one line each, worst first.

    A regression is a row of ours that got slower, or needs more memory, by more than `threshold`; that is no longer
    `ok`; or that is gone. Baselines are not judged.
    """
    now = {result.key: result for result in new}
    found: list[tuple[float, str]] = []
    for before in old:
        if not before.ours or before.status != "ok":
            continue
        name = "/".join(before.key[:4]) + f" {before.shape} {before.candidate}"
        after = now.get(before.key)
        if after is None:
            found.append((math.inf, f"{name}: no longer measured"))
            continue
        if after.status != "ok":
            found.append((math.inf, f"{name}: {after.status}: {after.note}"))
            continue
        slower = after.median_ms / before.median_ms - 1
        if slower > threshold:
            spread = ", within the spread of the samples" if after.p20_ms <= before.p80_ms else ""
            change = f"{number(before.median_ms)} -> {number(after.median_ms)} ms"
            found.append((slower, f"{name}: {100 * slower:.0f} % slower ({change}{spread})"))
        # Below 1 MB the allocator's rounding decides.
        if before.peak_bytes > 1 << 20 and after.peak_bytes / before.peak_bytes - 1 > threshold:
            more = after.peak_bytes / before.peak_bytes - 1
            change = f"{human_bytes(before.peak_bytes)} -> {human_bytes(after.peak_bytes)}"
            found.append((more, f"{name}: {100 * more:.0f} % more memory ({change})"))
    return [line for _, line in sorted(found, key=lambda item: -item[0])]
