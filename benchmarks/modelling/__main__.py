"""Predicted times of the operators' rows on GPUs that are not here. Nothing on this page was measured on a GPU.

    python -m benchmarks.modelling                           # an H100
    python -m benchmarks.modelling --gpu A100 3090 4090      # others: kernels are compiled for each
    python -m benchmarks.modelling --write FILE              # also as JSON lines, for --before
    python -m benchmarks.modelling --before FILE             # beside an older state

Needs a C compiler ``cc``. Host times are processor times of this machine, over a driver that does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.modelling import gpus, stub

BEFORE = Path(__file__).parent / "before.jsonl"


def predictions(gpu: str, match: str) -> list[dict]:
    """Return the rows of one GPU, computed in a process that finds the stub."""
    with tempfile.TemporaryDirectory() as folder:
        environment = stub.prepare(Path(folder), gpus.GPUS[gpu].capability)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.modelling.predictions", "--gpu", gpu]
        run = subprocess.run(
            [*command, "--match", match], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return [json.loads(line) for line in run.stdout.splitlines()]


def table(rows: Sequence[dict], before: dict[tuple[str, str], dict]) -> list[str]:
    """Return a Markdown table: times in microseconds, the older state's in brackets."""
    head = (
        "row", "launches", "host over the stub", "device", "range", "bound", "share of the ceiling", "range",
        "end to end", "registers",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def both(row: dict, value, text: str) -> str:
        old = before.get((row["gpu"], row["row"]))
        return text.format(value(row)) + (f" ({text.format(value(old))})" if old else "")

    for row in rows:
        spills = f", {row['spills']} spills" if row["spills"] else ""
        cells = (
            row["row"],
            both(row, lambda r: r["launches"], "{}"),
            both(row, lambda r: 1e6 * r["stub_host_s"], "{:.0f}"),
            both(row, lambda r: 1e6 * r["device_s"], "{:.0f}"),
            f"{1e6 * row['device_bytes_s']:.0f} to {1e6 * row['device_lines_s']:.0f}",
            both(row, lambda r: r["bound"], "{}"),
            both(row, lambda r: r["ceiling"] / r["device_s"], "{:.0%}"),
            f"{row['ceiling'] / row['device_lines_s']:.0%} to {row['ceiling'] / row['device_bytes_s']:.0%}",
            both(row, lambda r: 1e6 * max(r["device_s"], r["host_s"]), "{:.0f}"),
            both(row, lambda r: r["registers"], "{}") + spills,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", nargs="+", choices=[name for name, gpu in gpus.GPUS.items() if gpu.capability], default=["H100"]
    )
    parser.add_argument("--match", default="", help="only rows whose name contains this")
    parser.add_argument("--write", type=Path, help="write the predictions to this file")
    parser.add_argument("--before", type=Path, default=BEFORE, help="predictions of an older state to print beside")
    arguments = parser.parse_args(argv)
    before = {}
    if arguments.before.exists():
        for line in arguments.before.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            before[row["gpu"], row["row"]] = row
    found = []
    for name in arguments.gpu:
        rows = predictions(name, arguments.match)
        found += rows
        gpu = gpus.GPUS[name]
        print(
            f"{gpu.name}, predicted. Assumed: {gpu.clock_hz / 1e9:g} GHz, L1 {gpu.l1_bytes_per_s / 1e12:.1f}, L2"
            f" {gpu.l2_bytes_per_s / 1e12:g}, device memory {gpu.copy_bytes_per_s / 1e12:.2g} TB/s,"
            f" {1e6 * gpus.LAUNCH_GAP_S:g} us between launches, {1e6 * gpus.DRIVER_LAUNCH_S:g} us of the driver for"
            f" each, {1e6 * gpus.MEETING_S:g} us in which all programs of a launch wait for each other (resident)."
            " Times in us; L1 reads words of different banks in a clock; range: any 128 bytes, to one line."
            " Ceiling: the taps at the L1 rate (refinement), device memory (convolution).\n"
        )
        print("\n".join(table(rows, before)), flush=True)
    if arguments.write:
        arguments.write.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
