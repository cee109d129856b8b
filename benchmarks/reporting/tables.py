"""The pages' tables, from results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measuring.results import Result, human_bytes, number
from dmsa.scoring.table import markdown

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
    rows = [head]
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
        rows.append(cells)
    return markdown(rows)


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


def replace_between(text: str, section: str, where: str = "README.md", markers: tuple[str, str] = (BEGIN, END)) -> str:
    """Return `text` with what is between the markers replaced.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    first, last = markers
    begin, end = text.find(first), text.find(last)
    if begin < 0 or end < begin:
        raise ValueError(f"{where} must hold the lines {first} and {last}, in this order, where the tables belong")
    return text[: begin + len(first)] + "\n" + section.rstrip() + "\n" + text[end:]


def renew(path: Path, section: str, markers: tuple[str, str], command: str, *, check: bool) -> int:
    """Put ``section`` between the markers of a file; return the exit status.

    Args:
        path: the file.
        section: what belongs there.
        markers: the lines before and behind it.
        command: what writes the section, named if it is out of date.
        check: write nothing; the status is 1 if it is out of date.
    """
    before = path.read_text(encoding="utf-8")
    after = replace_between(before, section, path.name, markers)
    if not check:
        path.write_text(after, encoding="utf-8")
    elif before != after:
        print(f"{path.name} is not up to date: run {command}")
        return 1
    return 0
