"""The report of a refined folder: scores of each class before and after, the threshold's curve, panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmsa.data.base import colour_map
from dmsa.data.listing import thin
from dmsa.files import write_atomically
from dmsa.refinement.folder import Job, Worker
from dmsa.refinement.refiner import THRESHOLDS
from dmsa.refinement.scores import Counts, class_ious, curve
from dmsa.scoring.table import markdown, percent
from dmsa.visualize import overlay, panel, png_bytes

PANEL_ROWS = 8
FILES = ("report.md", "report/panels.png", "report/thresholds.csv", "report/thresholds.png")


def score_rows(counts: Counts, names: Sequence[str]) -> list[list[str]]:
    """Return the table of IoU before and after, head first, mean last."""
    before, after = class_ious(counts.before), class_ious(counts.after)
    present = np.flatnonzero(~np.isnan(before))
    rows = [["class", "before", "after", "change"]]
    for i in present.tolist():
        name = names[i] if i < len(names) else f"class {i}"
        rows.append([name, percent(before[i], 1), percent(after[i], 1), f"{after[i] - before[i]:+.1f}"])
    means = before[present].mean(), after[present].mean()
    return [*rows, ["mean", percent(means[0], 1), percent(means[1], 1), f"{means[1] - means[0]:+.1f}"]]


def best_thresholds(counts: Counts) -> dict[str, tuple[float, float]]:
    """Return the background threshold with the highest mIoU, and that, before and after."""
    found = {}
    for name, swept in (("before", counts.swept_before), ("after", counts.swept_after)):
        values = curve(swept, counts.before)
        best = int(values.argmax())
        found[name] = float(THRESHOLDS[best]), float(values[best])
    return found


def write_report(
    out: Path,
    counts: Counts,
    images: int,
    settings: str,
    notes: Sequence[str],
    worker: Worker,
    jobs: Sequence[Job],
    names: Sequence[str],
) -> list[Path]:
    """Write `FILES` below `out`, those of the thresholds only where a threshold decides; return what was written."""
    (out / "report").mkdir(exist_ok=True)
    lines = ["# Masks before and after the refinement", "", settings, ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    lines += [f"IoU in percent over the pixels of {images} images:", "", *markdown(score_rows(counts, names)), ""]
    written = [out / "report.md"]
    if counts.swept:
        best = best_thresholds(counts)
        lines += ["Background threshold with the highest mIoU:", ""]
        lines += markdown(
            [["masks", "threshold", "mIoU"], *([k, f"{t:.2f}", f"{v:.1f}"] for k, (t, v) in best.items())]
        )
        lines += ["", "![mIoU against the background threshold](report/thresholds.png)", ""]
        written += _write_curve(out, counts)
    if picture := _panels(worker, jobs):
        lines += ["![image, before, after, truth](report/panels.png)", ""]
        written.append(write_atomically(out / "report" / "panels.png", lambda stream: stream.write(picture)))
    write_atomically(written[0], lambda stream: stream.write("\n".join(lines).encode()))
    return written


def _write_curve(out: Path, counts: Counts) -> list[Path]:
    before, after = curve(counts.swept_before, counts.before), curve(counts.swept_after, counts.before)
    rows = [f"{t:.2f},{b:.3f},{a:.3f}" for t, b, a in zip(THRESHOLDS, before, after, strict=True)]
    text = "\n".join(["threshold,miou_before,miou_after", *rows, ""])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for values, name in ((before, "before"), (after, "after")):
        best = int(values.argmax())
        (line,) = axis.plot(THRESHOLDS, values, label=f"{name}: {values[best]:.1f} at {THRESHOLDS[best]:.2f}")
        axis.plot(THRESHOLDS[best], values[best], "o", color=line.get_color())
    axis.set(xlabel="background threshold", ylabel="mIoU in %")
    axis.legend()
    return [
        write_atomically(out / "report" / "thresholds.csv", lambda stream: stream.write(text.encode())),
        write_atomically(
            out / "report" / "thresholds.png", lambda stream: figure.savefig(stream, format="png", dpi=120)
        ),
    ]


def _panels(worker: Worker, jobs: Sequence[Job]) -> bytes | None:
    palette = colour_map(255)
    rows = []
    for job in thin([job for job in jobs if job.counts_out is not None and job.counts_out.exists()], PANEL_ROWS):
        refined, photo, truth = worker.refine(job)
        if truth is not None:
            rows.append([photo, *(overlay(photo, ids, palette) for ids in (refined.coarse, refined.labels, truth))])
    return png_bytes(panel(rows, ("image", "before", "after", "truth"))) if rows else None
