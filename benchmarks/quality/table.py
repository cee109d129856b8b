"""Scores and times of every method, as CSV, markdown and one plot."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.methods import Named
from benchmarks.quality.photos import Photo, cells, tensor
from dmsa.data.base import IGNORE


@dataclass(frozen=True)
class Row:
    """One method on the photographs of one kind and half.

    Attributes:
        miou: percent, mean over the photographs of their mean over the classes that occur.
        change: that of the cells, enlarged in place, subtracted.
        seconds: of one core, mean for a photograph; processor time, so that other processes do not count.
    """

    kind: str
    half: str
    photos: int
    stride: int
    noise: float
    method: str
    miou: float
    change: float
    seconds: float


def miou(labels: Tensor, truth: np.ndarray, classes: int) -> float:
    """Mean intersection over union in percent of the classes 0..C-1, all of which occur in `truth` [H, W]."""
    known = truth != IGNORE
    pairs = truth[known].astype(np.int64) * classes + labels.numpy()[known]
    counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    correct = np.diagonal(counts)
    return float(100 * np.mean(correct / (counts.sum(0) + counts.sum(1) - correct)))


def measure(photo: Photo, methods: Sequence[Named], stride: int, noise: float) -> list[tuple[float, float]]:
    """Return mIoU in percent and seconds of every method on one photograph; the first is what is subtracted."""
    image, masks = tensor(photo.image), cells(photo, stride, noise)
    found = []
    for method in methods:
        start = time.process_time()
        with torch.no_grad():
            scores = method.run(image, masks, stride)
        seconds = time.process_time() - start
        found.append((miou(scores[0].argmax(0), photo.label, photo.classes), seconds))
    return found


def rows_of(
    photos: Sequence[Photo], methods: Sequence[Named], strides: Sequence[int], noises: Sequence[float]
) -> Iterable[Row]:
    """Yield the rows of each kind and half as they are done."""
    for kind, half in sorted({(photo.kind, photo.half) for photo in photos}):
        group = [photo for photo in photos if (photo.kind, photo.half) == (kind, half)]
        for stride in strides:
            for noise in noises:
                found = np.array([measure(photo, methods, stride, noise) for photo in group])  # [photos, methods, 2]
                scores, seconds = found[..., 0].mean(0), found[..., 1].mean(0)
                for i, method in enumerate(methods):
                    change = scores[i] - scores[0]
                    yield Row(kind, half, len(group), stride, noise, method.name, scores[i], change, seconds[i])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with three digits."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            writer.writerow([f"{v:.3f}" if isinstance(v, float) else v for v in asdict(row).values()])


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`write_csv` wrote."""
    with open(path, newline="") as stream:
        return [
            Row(r["kind"], r["half"], int(r["photos"]), int(r["stride"]), float(r["noise"]), r["method"],
                float(r["miou"]), float(r["change"]), float(r["seconds"]))
            for r in csv.DictReader(stream)
        ]  # fmt: skip


def means(rows: Sequence[Row], halves: Sequence[str]) -> dict[tuple[str, int, float], tuple[float, ...]]:
    """Return mIoU, change, the smallest change of a kind, and seconds, by method, stride and noise.

    Every kind counts the same, however many photographs it has.
    """
    found = {}
    for key in dict.fromkeys((row.method, row.stride, row.noise) for row in rows):
        kinds: dict[str, list[Row]] = {}
        for row in rows:
            if (row.method, row.stride, row.noise) == key and row.half in halves:
                kinds.setdefault(row.kind, []).append(row)
        if not kinds:
            continue
        weighted = np.array(
            [
                np.average([(r.miou, r.change, r.seconds) for r in group], axis=0, weights=[r.photos for r in group])
                for group in kinds.values()
            ]
        )
        score, change, seconds = weighted.mean(0)
        found[key] = float(score), float(change), float(weighted[:, 1].min()), float(seconds)
    return found


def markdown(rows: Sequence[Row], halves: Sequence[str]) -> list[str]:
    """Return the table: a row a method, a column each stride and noise."""
    table = means(rows, halves)
    columns = sorted({(stride, noise) for _, stride, noise in table})
    heads = [f"{stride} px, {f'noise {noise:g}' if noise else 'clean'}" for stride, noise in columns]
    lines = [f"| method | {' | '.join(heads)} | seconds |", "|" + "---|" * (len(columns) + 2)]
    for method in dict.fromkeys(name for name, _, _ in table):
        cells_, times = [], []
        for column in columns:
            score, change, worst, seconds = table[(method, *column)]
            times.append(seconds)
            cells_.append(f"{score:.1f}" if change == 0 else f"{score:.1f} ({change:+.1f}, {worst:+.1f})")
        lines.append(f"| {method} | {' | '.join(cells_)} | {np.mean(times):.2f} |")
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the change of mIoU against time: a panel a stride, hollow for clean cells."""
    from matplotlib.figure import Figure

    table = means(rows, ("fit", "check"))
    strides = sorted({stride for _, stride, _ in table})
    noises = sorted({noise for _, _, noise in table})
    names = [name for name in dict.fromkeys(name for name, _, _ in table) if name != "aligned cells"]
    figure = Figure(figsize=(5 * len(strides), 4.6), layout="constrained")
    for axis, stride in zip(figure.subplots(1, len(strides), sharey=True, squeeze=False)[0], strides, strict=True):
        for i, name in enumerate(names):
            for noise in (noises[0], noises[min(1, len(noises) - 1)]):
                _, change, _, seconds = table[name, stride, noise]
                axis.plot(
                    seconds,
                    change,
                    marker="oooooosDP^v<>"[i % 13],
                    color=f"C{i % 10}",
                    fillstyle="full" if noise else "none",
                    linestyle="",
                    markersize=9 if name == "PAR.for_stride" else 6,
                    label=name if noise else None,
                )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=f"cells of {stride} pixels", xlabel="seconds a photograph, one core", xscale="log")
    axis_left = figure.axes[0]
    axis_left.set_ylabel(f"change of mIoU; full: noise {noises[min(1, len(noises) - 1)]:g}, hollow: clean")
    handles, labels = axis_left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
