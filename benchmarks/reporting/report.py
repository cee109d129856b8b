"""Turn committed results into the README's tables and plot, and compare two result files.

python -m benchmarks.reporting                  # results/*.csv -> tables of the README, and the plot
python -m benchmarks.reporting --check          # exit status 1 if a page is not what the results give
python -m benchmarks.reporting compare OLD NEW  # regressions over 10 % by name; exit status 1 if there are any
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measuring.harness import RESULTS, Result, human_bytes, number, read_csv, result_files

README = Path(__file__).parents[2] / "README.md"
FULL = Path(__file__).parents[1] / "README.md"
PLOT = RESULTS / "scaling.png"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SWEEPS = {"sweep_channels": "channels C", "sweep_pixels": "pixels H·W"}
"""Workloads whose rows differ in one size only: drawn, not tabulated."""
FAMILIES = {
    "refine": "Refinement (PAR, PAMR)",
    "aspp": "Multi-dilation depthwise convolution",
    "cam": "Class activation maps",
    "step": "Training step",
    "data": "Data and evaluation",
}
NOT_MEASURED = "not measured yet"
SHORT = {
    ("refine", "refine"): ("afa_train", "classes21", "one_stage", "dmsa_voc", "openvoc_ade", "diffcut"),
    ("aspp", "forward"): ("dmsa_train_d", "daformer"),
    ("aspp", "forward+backward"): ("dmsa_train_d", "daformer"),
    ("cam", "maps"): (),
    ("step", ""): (),
}
"""Rows of the front page's table by family and variant; all workloads where none is named."""


# --- tables -----------------------------------------------------------------------------------------------------------


def load(folder: Path = RESULTS) -> list[tuple[str, list[Result]]]:
    """Return the committed results: file stem and rows, in name order."""
    return [(path.stem, read_csv(path)) for path in result_files(folder)]


def rows_of(results: Iterable[Result]) -> list[list[Result]]:
    """Group results into rows: the candidates of one operator on one workload."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.key[:-1], []).append(result)
    return list(groups.values())


def _time(result: Result) -> str:
    if result.status == "ok":
        text = f"{number(result.median_ms)} ms"
        if not math.isnan(result.graph_ms):
            text += f" ({number(result.graph_ms)} in a graph)"
        return text
    if result.status == "out of memory":
        return result.note.split(" (")[0]
    if result.status == "skipped" and result.note.startswith("needs about"):
        return result.note.split(";")[0]
    return result.status


def _baseline(result: Result) -> str:
    text = _time(result)
    if result.status == "ok" and not math.isnan(result.speedup):
        return f"{number(result.speedup)}x ({text})"
    return text


def _memory(result: Result) -> str:
    return human_bytes(result.peak_bytes) if result.status == "ok" and result.peak_bytes >= 0 else ""


def family_table(results: Sequence[Result]) -> list[str]:
    """Return one markdown table: a line per row, our time, our share of the ceilings, every baseline's factor."""
    groups = rows_of(results)
    baselines = list(dict.fromkeys(result.candidate for group in groups for result in group if not result.ours))
    variants = list(dict.fromkeys(r.candidate for group in groups for r in group if r.ours))
    ceilings = any(not math.isnan(result.percent_copy) for result in results)
    head = ["workload", "shape", *variants, *(["% of copy"] if ceilings else []), "peak memory", *baselines]
    if baselines:
        head.append("peak of the worst baseline")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups:
        by_name = {result.candidate: result for result in group}
        first = group[0]
        ours = next((result for result in group if result.ours), first)
        name = first.workload + ("" if first.variant == "refine" else f", {first.variant}")
        if first.dtype not in ("float32", ""):
            name += f", {first.dtype}"
        shape = first.shape + (f" (full: {first.scaled_from})" if first.scaled_from else "")
        cells = [name, shape, *(_time(by_name[v]) if v in by_name else "" for v in variants)]
        if ceilings:
            cells.append("" if math.isnan(ours.percent_copy) else f"{ours.percent_copy:.0f}")
        cells.append(_memory(ours))
        cells += [_baseline(by_name[b]) if b in by_name else "" for b in baselines]
        if baselines:
            peaks = [max(r.peak_bytes, r.estimate_bytes if r.status != "ok" else 0) for r in group if not r.ours]
            cells.append(human_bytes(max(peaks)) if peaks and max(peaks) > 0 else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def conditions(results: Sequence[Result]) -> str:
    """Return the sentence that says on what and with what a file was measured."""
    first = results[0]
    parts = [first.hardware, f"torch {first.torch}", f"triton {first.triton or 'not installed'}"]
    if first.device == "cpu":
        parts.append(f"{first.threads} threads")
    parts += [f"copy bandwidth {number(first.copy_gb_per_s)} GB/s", f"commit {first.commit}", first.date]
    return ", ".join(parts)


def front_page(result: Result) -> bool:
    """Tell whether a result belongs into the short table."""
    for (family, variant), workloads in SHORT.items():
        if result.family == family and result.variant.startswith(variant) and result.dtype == "float32":
            return not workloads or (result.workload in workloads and result.variant == variant)
    return False


def tables(files: Sequence[tuple[str, Sequence[Result]]], plot: str | None = None, *, short: bool = False) -> str:
    """Return the section between the markers: every row, or those of the front page if `short`."""
    lines = [
        "A baseline's cell is how many times longer than ours it took in the same process (median of interleaved "
        "rounds), then its own time. Nothing is given where the correctness check failed. Peak memory is what a call "
        "allocates beyond its inputs.",
        "",
    ]
    for stem, results in files:
        if not results:
            continue
        lines += [f"**{conditions(results)}** (`benchmarks/results/{stem}.csv`)", ""]
        shown = [r for r in results if r.workload not in SWEEPS and (front_page(r) or not short)]
        for family in dict.fromkeys(result.family for result in shown):
            lines += [f"{FAMILIES.get(family, family)}:", ""]
            lines += [*family_table([result for result in shown if result.family == family]), ""]
    if not any(results and results[0].device == "cuda" for _, results in files):
        lines += [
            f"**GPU**: {NOT_MEASURED}. `python -m benchmarks.gpu_suite --out FOLDER` on a machine with a GPU runs "
            "every row above at full size, with the same baselines, and writes the CSV that this section is made from.",
            "",
        ]
    if plot:
        lines += [f"![Time and peak memory against the number of channels and of pixels]({plot})", ""]
    return "\n".join(lines)


def replace_between(text: str, section: str, where: str = "README.md") -> str:
    """Return `text` with what is between the markers replaced.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{where} must hold the lines {BEGIN} and {END}, in this order, where the tables belong")
    return text[: begin + len(BEGIN)] + "\n" + section.rstrip() + "\n" + text[end:]


# --- plot -------------------------------------------------------------------------------------------------------------


def sweep_series(results: Sequence[Result], workload: str) -> dict[str, list[tuple[int, Result]]]:
    """Return the points of one sweep: candidate to (size, result), in order of size.

    The size is C for `sweep_channels` and H·W for `sweep_pixels`, read from the shape `B,C,H,W`.
    """
    series: dict[str, list[tuple[int, Result]]] = {}
    for result in results:
        if result.workload == workload and result.status == "ok":
            _, channels, height, width = (int(item) for item in re.findall(r"\d+", result.shape)[:4])
            size = channels if workload == "sweep_channels" else height * width
            series.setdefault(result.candidate, []).append((size, result))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def draw(files: Sequence[tuple[str, Sequence[Result]]], path: Path) -> bool:
    """Draw time and peak memory against size, from the last file that holds the sweeps; tell whether there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [(stem, results) for stem, results in files if any(r.workload in SWEEPS for r in results)]
    if not chosen:
        return False
    # A GPU's file rather than a CPU's, if there are both.
    results = max(chosen, key=lambda item: item[1][0].device == "cuda")[1]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (workload, label) in enumerate(SWEEPS.items()):
        for name, points in sweep_series(results, workload).items():
            sizes = [size for size, _ in points]
            style = {"linewidth": 2.2, "zorder": 3} if points[0][1].ours else {"linewidth": 1.2}
            axes[0, column].plot(sizes, [r.median_ms for _, r in points], marker="o", markersize=4, label=name, **style)
            memory = [r.peak_bytes / 1e6 for _, r in points]
            axes[1, column].plot(sizes, memory, marker="o", markersize=4, label=name, **style)
        for axis, quantity in zip(axes[:, column], ("time, ms", "peak memory, MB"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=quantity)
            axis.grid(True, which="major", linewidth=0.4)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"PAR, 6 dilations, 10 iterations, float32 on {results[0].hardware}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


# --- comparison -------------------------------------------------------------------------------------------------------


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
