"""How time and memory grow with the number of classes and of pixels: the report's plot.

pytest benchmarks/measuring/bench_sweep.py --benchmark-only
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.measuring import bench_refine, cases
from benchmarks.measuring.rows import Row

CHANNELS = {False: (1, 3, 10, 30, 90), True: (1, 3, 10, 30, 100, 300)}
SIDES = {False: (32, 64, 128, 256), True: (128, 256, 512, 1024, 2048)}
"""On a CPU (False) and at full size (True)."""


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """PAR with six dilations and ten iterations: one row a number of classes, one a side of the map."""
    side, channels = (256, 21) if full else (64, 3)
    sizes = [("sweep_channels", count, side) for count in CHANNELS[full]]
    sizes += [("sweep_pixels", channels, length) for length in SIDES[full]]
    result = []
    for name, count, length in sizes:
        case = cases.RefineCase(name, 1, count, length, length, cases.SIX, 10)
        row = bench_refine.refine_row(case, "", full)
        kept = tuple(candidate for candidate in row.candidates if candidate.name != "ours, fast")
        result.append(dataclasses.replace(row, candidates=kept))
    return result


def test_sweep(row: Row, measure) -> None:
    """Every size through the harness."""
    measure(row)
