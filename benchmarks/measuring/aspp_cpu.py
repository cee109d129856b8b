"""Eager against the library in both layouts on a CPU, call by call in turn, and the library against itself.

    python -m benchmarks.measuring.aspp_cpu --threads 2

Every line is a workload of bench_aspp.py at its size on a CPU, a dilation set, an input layout and a pass, and compares
on the same input, with the result in the layout of the input:

- ours;
- plain: one `F.conv2d` a branch, then `cat`;
- converted: the same in the other memory layout, with the conversions to it and back;
- plain once more, the control: what its ratio to plain differs from 1 by is noise.

Times are medians, of calls that each follow one of the same candidate, as in a loop of its own; ratios (plain and
converted over ours, control over plain) are medians over rounds, whose calls are neighbours that other work on the
machine disturbs alike, with quartiles. A line says `slower` where plain or converted
over ours is below 1 and below the lower quartile of the control. A result that differs from the double-precision one by
more than 2e-5 gets no ratio. At the end, the table of plain over ours in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time

import torch

from benchmarks.measuring import bench_aspp
from benchmarks.measuring.bench_aspp import exact, inputs, library, ours, run
from benchmarks.measuring.gate import relative_error

PAPER = ((1, 1, 2, 3), (1, 1, 3, 5), (1, 3, 6, 9), (1, 6, 12, 18))
MAPS = dict.fromkeys(small for _, _, small, dilations in bench_aspp.CASES if dilations in PAPER)
CASES = [(shape, dilations) for shape in MAPS for dilations in PAPER] + [
    (small, dilations) for _, _, small, dilations in bench_aspp.CASES if dilations not in PAPER
]
PASSES = ("forward", "forward+backward")
TOLERANCE = 2e-5


def converted(x, weight, dilations):
    """Return what :func:`library` does, computed in the layout that ``x`` does not have."""
    here, there = torch.contiguous_format, torch.channels_last
    if not x.is_contiguous():
        here, there = there, here
    return library(x.contiguous(memory_format=there), weight, dilations).contiguous(memory_format=here)


def seconds(call, tensors) -> float:
    """Time one call."""
    start = time.perf_counter()
    call(*tensors)
    return time.perf_counter() - start


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios of two lists of times, round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(numerator, denominator, strict=True)], n=4)
    return low, middle, high


def compare(shape, dilations, channels_last: bool, backward: bool, budget: float) -> tuple[str, str]:
    """Return the line of one case, and its cell in the table."""
    tensors = inputs(torch.device("cpu"), 0, shape=shape, branches=len(dilations), dtype=torch.float32)
    arguments = {"dilations": dilations, "backward": backward}
    candidates = {"ours": ours, "plain": library, "converted": converted, "control": library}
    calls = {
        name: functools.partial(run, function=function, channels_last=channels_last, **arguments)
        for name, function in candidates.items()
    }
    layout = "channels_last" if channels_last else "NCHW"
    title = f"{shape!s:20} {dilations!s:14} {layout:13} {PASSES[backward]:16}"
    expected = exact(*tensors, **arguments)
    for name in ("ours", "plain", "converted"):
        error = relative_error(calls[name](*tensors), expected)
        if error > TOLERANCE:
            return f"{title} {name} is wrong: relative error {error:.1e}", "wrong"
    del expected
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, end = random.Random(0), time.perf_counter() + budget
    while len(times["ours"]) < 5 or time.perf_counter() < end:
        # In random order, and after a call of its own: a call finds the allocator as it leaves it itself.
        for name in order.sample(list(calls), len(calls)):
            calls[name](*tensors)
            times[name].append(seconds(calls[name], tensors))
    noise = ratio(times["control"], times["plain"])
    ratios = {name: ratio(times[name], times["ours"]) for name in ("plain", "converted")}
    slower = [name for name, (_, middle, _) in ratios.items() if middle < min(1, noise[0])]
    quartiles = "  ".join(
        f"{name} {middle:.2f} ({low:.2f} to {high:.2f})"
        for name, (low, middle, high) in {**ratios, "control": noise}.items()
    )
    milliseconds = ", ".join(f"{name} {1e3 * statistics.median(times[name]):.2f}" for name in ("ours", "plain"))
    verdict = f"  slower than {' and '.join(slower)}" if slower else ""
    cell = f"{ratios['plain'][1]:.2f}x{' slower' if slower else ''}"
    return f"{title} {milliseconds} ms  {quartiles}{verdict}", cell


def main() -> None:
    """Measure every case; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each line, at least 5 rounds")
    parser.add_argument("--match", default="", help="only cases whose shape and dilations contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    columns = [(layout, backward) for backward in (False, True) for layout in ("NCHW", "channels_last")]
    table = [
        "| map, dilations | " + " | ".join(f"{PASSES[backward]} {layout}" for layout, backward in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for shape, dilations in CASES:
        if arguments.match not in f"{shape} {dilations}":
            continue
        cells = [f"{list(shape)}, {' '.join(map(str, dilations))}"]
        for layout, backward in columns:
            line, cell = compare(shape, dilations, layout == "channels_last", backward, arguments.seconds)
            print(line, flush=True)
            cells.append(cell)
        table.append("| " + " | ".join(cells) + " |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
