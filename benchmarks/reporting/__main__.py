"""Turn committed results into the README's tables and plot, and compare two result files.

python -m benchmarks.reporting                  # results/*.csv -> tables of the README, and the plot
python -m benchmarks.reporting --check          # exit status 1 if a page is not what the results give
python -m benchmarks.reporting compare OLD NEW  # regressions over 10 % by name; exit status 1 if there are any
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.results import RESULTS, Result, read_csv, result_files
from benchmarks.reporting.compare import compare
from benchmarks.reporting.plot import draw
from benchmarks.reporting.tables import SWEEPS, replace_between, tables

README = Path(__file__).parents[2] / "README.md"
FULL = Path(__file__).parents[1] / "README.md"
PLOT = RESULTS / "scaling.png"


def load(folder: Path = RESULTS) -> list[tuple[str, list[Result]]]:
    """Return the committed results: file stem and rows, in name order."""
    return [(path.stem, read_csv(path)) for path in result_files(folder)]


def _compare(arguments: argparse.Namespace) -> int:
    old, new = read_csv(arguments.old), read_csv(arguments.new)
    machines = [{(r.hardware, r.threads) for r in results} for results in (old, new)]
    if machines[0] != machines[1]:
        print(f"note: measured on different machines: {machines[0]} and {machines[1]}")
    regressions = compare(old, new, arguments.threshold / 100)
    both = {r.key for r in old if r.ours} & {r.key for r in new if r.ours}
    for line in regressions:
        print(f"regression: {line}")
    print(f"{len(both)} rows compared, {len(regressions)} regressions over {arguments.threshold:g} %")
    return 1 if regressions else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of CSV files")
    parser.add_argument("--readme", type=Path, default=README, help="page with the short table, between markers")
    parser.add_argument("--full", type=Path, default=FULL, help="page with every row, between markers")
    parser.add_argument("--plot", type=Path, default=PLOT, help="picture to write")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("compare", help="name the regressions of one file against another")
    sub.add_argument("old", type=Path)
    sub.add_argument("new", type=Path)
    sub.add_argument("--threshold", type=float, default=10.0, help="per cent")
    arguments = parser.parse_args(argv)
    if arguments.command == "compare":
        return _compare(arguments)

    files = load(arguments.results)
    sweeps = any(r.workload in SWEEPS for _, results in files for r in results)
    stale = []
    for path, short in ((arguments.readme, True), (arguments.full, False)):
        text = path.read_text(encoding="utf-8")
        plot = os.path.relpath(arguments.plot.resolve(), path.resolve().parent).replace(os.sep, "/")
        updated = replace_between(text, tables(files, plot if sweeps else None, short=short), str(path))
        if text != updated:
            stale.append(path)
            if not arguments.check:
                path.write_text(updated, encoding="utf-8")
    if arguments.check:
        for path in stale:
            print(f"{path} is not what the results give: run python -m benchmarks.reporting")
        return int(bool(stale))
    if sweeps:
        draw(files, arguments.plot)
    print(f"{sum(len(results) for _, results in files)} results of {len(files)} files; rewrote {len(stale)} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
