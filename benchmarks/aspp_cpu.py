"""Eager against one library convolution a branch on a CPU, call by call in turn, for a number of threads.

    python -m benchmarks.aspp_cpu --threads 2

Prints one line a map, dilation set, layout and pass: the median wall-clock times of both, and the median and quartiles
of the ratio (library over ours, above 1 is ours faster) of neighbouring calls, which other work on the machine disturbs
alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import torch

from benchmarks.bench_aspp import inputs, library, ours, run

CASES = (
    ((4, 384, 20, 20), (1, 6, 12, 18)),
    ((4, 384, 20, 20), (1, 1, 2, 3)),
    ((2, 384, 40, 40), (1, 6, 12, 18)),
    ((2, 384, 40, 40), (1, 1, 2, 3)),
    ((1, 256, 128, 128), (6, 12, 18)),
)


def seconds(call, tensors) -> float:
    """Time one call."""
    start = time.perf_counter()
    call(*tensors)
    return time.perf_counter() - start


def compare(shape, dilations, channels_last: bool, backward: bool, rounds: int) -> str:
    """Return the line of one case."""
    tensors = inputs(torch.device("cpu"), 0, shape=shape, branches=len(dilations), dtype=torch.float32)
    arguments = {"dilations": dilations, "channels_last": channels_last, "backward": backward}
    calls = [functools.partial(run, function=function, **arguments) for function in (ours, library)]
    for call in calls:
        call(*tensors)
    mine, plain = [], []
    for i in range(rounds):
        # Each goes first in every other round: the second one finds the inputs in cache.
        for call, times in ((calls[0], mine), (calls[1], plain))[:: 1 if i % 2 else -1]:
            times.append(seconds(call, tensors))
    ratios = [b / a for a, b in zip(mine, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    layout = "channels_last" if channels_last else "NCHW"
    passes = "forward+backward" if backward else "forward"
    return (
        f"{shape!s:19} {dilations!s:14} {layout:13} {passes:16} ours {1e3 * statistics.median(mine):7.2f} ms  "
        f"library {1e3 * statistics.median(plain):7.2f} ms  ratio {middle:.2f} ({low:.2f} to {high:.2f})"
    )


def main() -> None:
    """Measure every case; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each in one case")
    parser.add_argument("--match", default="", help="only lines whose shape, dilations and layout contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for shape, dilations in CASES:
        for channels_last in (False, True):
            if arguments.match not in f"{shape} {dilations} {'channels_last' if channels_last else 'NCHW'}":
                continue
            for backward in (False, True):
                print(compare(shape, dilations, channels_last, backward, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
