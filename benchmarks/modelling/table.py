"""The committed predictions, and the table of them in NOTES.md. Nothing in either was measured on a GPU.

python -m benchmarks.modelling.table --predict   # every row for every GPU -> results/predicted.csv, and the table
python -m benchmarks.modelling.table --write     # the table alone, from that file
python -m benchmarks.modelling.table --check     # exit status 1 if NOTES.md is not what the file gives
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.results import RESULTS
from benchmarks.modelling import gpus
from benchmarks.modelling.cost_model import NOTES
from benchmarks.reporting.tables import renew

FILE = RESULTS / "predicted.csv"
BEGIN, END = "<!-- predictions:begin -->", "<!-- predictions:end -->"
GPUS = ("H100", "A100", "3090", "4090")
COLUMNS = (
    "gpu", "row", "launches", "predicted_host_us", "predicted_device_us", "least_device_us", "most_device_us",
    "device_bound", "bound", "ceiling_us", "registers", "spills",
)  # fmt: skip
"""None of them is a column of a measurement: readers of results tell those by ``family``."""


def line(row: dict) -> dict[str, str]:
    """Return a row of the model as a line of the file."""
    times = {
        "predicted_host_us": row["host_s"],
        "predicted_device_us": row["device_s"],
        "least_device_us": row["device_bytes_s"],
        "most_device_us": row["device_lines_s"],
        "ceiling_us": row["ceiling"],
    }
    known = {key: f"{1e6 * seconds:.4g}" for key, seconds in times.items()}
    return {column: known.get(column, str(row.get(column, ""))) for column in COLUMNS}


def write(path: Path, lines: Sequence[dict[str, str]]) -> None:
    """Write the file of predictions."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path = FILE) -> list[dict[str, str]]:
    """Read the file of predictions."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(lines: Sequence[dict[str, str]]) -> str:
    """Return a Markdown table of exact refinement and of the convolution's forward pass: time, bound, share."""
    found = {(item["gpu"], item["row"]): item for item in lines}
    present = [gpu for gpu in GPUS if any(key[0] == gpu for key in found)]
    rows = [row for row in dict.fromkeys(row for _, row in found) if "exact" in row or row.endswith("forward")]
    head = "| row | " + " | ".join(gpus.GPUS[gpu].name for gpu in present) + " |"
    text = [
        f"Predicted device time of a call in us, launches' gaps included; what bounds it; share of the ceiling (least"
        f" to most, over what L1 reads in a clock). All {len(lines)} rows: `results/{FILE.name}`.",
        "",
        head,
        "|---" * (1 + len(present)) + "|",
    ]
    for row in rows:
        cells = []
        for gpu in present:
            item = found.get((gpu, row))
            if item is None:
                cells.append("")
                continue
            ceiling = float(item["ceiling_us"])
            least, middle, most = (
                ceiling / float(item[key]) for key in ("most_device_us", "predicted_device_us", "least_device_us")
            )
            shares = f"{middle:.0%}" + (f" ({least:.0%} to {most:.0%})" if f"{least:.0%}" != f"{most:.0%}" else "")
            cells.append(f"{float(item['predicted_device_us']):.0f} {item['device_bound']}, {shares}")
        text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelling.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--predict", action="store_true", help="run the model, then as --write")
    choice.add_argument("--write", action="store_true", help="put the table between the markers")
    choice.add_argument("--check", action="store_true", help="write nothing; fail if the table is out of date")
    parser.add_argument(
        "--gpu", nargs="+", choices=GPUS, default=GPUS, help="with --predict: the others stay as they are"
    )
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--notes", type=Path, default=NOTES)
    arguments = parser.parse_args(argv)
    if arguments.predict:
        from benchmarks.modelling.__main__ import predictions

        kept = read(arguments.file) if arguments.file.exists() else []
        for gpu in arguments.gpu:
            kept = [item for item in kept if item["gpu"] != gpu] + [line(row) for row in predictions(gpu, "")]
            write(arguments.file, sorted(kept, key=lambda item: GPUS.index(item["gpu"])))
    text = table(read(arguments.file))
    if not (arguments.predict or arguments.write or arguments.check):
        print(text)
        return 0
    return renew(
        arguments.notes, text, (BEGIN, END), "python -m benchmarks.modelling.table --write", check=arguments.check
    )


if __name__ == "__main__":
    sys.exit(main())
