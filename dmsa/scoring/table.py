"""Score tables: how a score is written, beside the published ones, and the report of one evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dmsa.data.base import table
from dmsa.data.listing import few
from dmsa.files import claim_outputs, write_atomically
from dmsa.scoring.metrics import Scores
from dmsa.scoring.protocols import Protocol


def percent(value: float | None, digits: int = 2) -> str:
    """Return a score in percent as it stands in tables, `-` where there is none (None, NaN)."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and, for several values, their standard deviation (of the sample)."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table for a terminal; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a markdown table; the first row is the head."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


PAPER_SIZE = 320  # pixels, of the network's input in published scores
REPORT_FILES = ("eval.txt", "eval.md", "eval.json", "confusion.png")
SCORE_HEAD = ("method", "mIoU", "accuracy", "protocol", "source")


def score_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of methods, head first, from rows as of :func:`paper_rows`."""
    cells = [[r["method"], percent(r["miou"]), percent(r["accuracy"]), r["protocol"], r["source"]] for r in rows]
    return [list(SCORE_HEAD), *cells]


def paper_rows(dataset: str) -> list[dict[str, Any]]:
    """Return the published rows of a data set (percent) with their protocol and source; none for the user's own."""
    rows = table("paper")["rows"]
    return [{k: v for k, v in row.items() if k != "dataset"} for row in rows if row["dataset"] == dataset]


@dataclass(frozen=True)
class Skip:
    """An image that could not be scored."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The scores of one method on one data set, and what they mean."""

    method: str
    dataset: str
    classes: list[str]
    kinds: list[str]
    """`thing`, `stuff` or `background`, one a class."""
    labels_from: str
    protocol: Protocol
    conditions: str
    """The protocol in words."""
    scores: Scores
    images: int
    """Images scored."""
    wanted: int
    """Images that this protocol scores."""
    skipped: list[Skip]
    """Images or masks that could not be decoded."""
    missing: list[str]
    """Images without a prediction."""
    partial: bool
    """Whether the data set was limited to some of its images."""
    matched: bool
    """Whether predictions are clusters, matched to classes, or class ids."""
    ignored: float
    """Share of the pixels whose label is 255."""
    official: int | None
    """Images of the official set that the published scores are of; `None` if there is none."""
    remarks: list[str]
    """What else a reader must know: files that were left out, pixels without a prediction."""

    def notes(self) -> list[str]:
        """Return what a reader must know about images, pixels and what the score can be compared with."""
        notes = []
        if self.skipped:
            names = few([f"{skip.name} ({skip.reason})" for skip in self.skipped])
            notes.append(f"{len(self.skipped)} images could not be decoded and are not in the score: {names}")
        if self.missing:
            notes.append(f"{len(self.missing)} images have no prediction and are not in the score: {few(self.missing)}")
        if self.partial:
            notes.append(f"scored on {self.wanted} images drawn from a larger set: not comparable with the whole set")
        elif self.images < self.wanted:
            notes.append(f"scored {self.images} of {self.wanted} images: not comparable with the whole set")
        elif self.official not in (None, self.wanted):
            notes.append(
                f"the official set has {self.official} images, not {self.wanted}: published scores do not compare"
            )
        if not self.matched:
            notes.append("predictions were taken as class ids: no Hungarian match")
        published = paper_rows(self.dataset)
        if not published:
            notes.append(f"there are no published scores on {self.dataset} to compare with")
        elif self.protocol.name not in {row["protocol"] for row in published} or self.protocol.size != PAPER_SIZE:
            notes.append(
                f"published scores are of other protocols than {self.protocol.name} at {self.protocol.size} px: they "
                "do not compare"
            )
        return [*notes, *self.remarks]

    def rows(self) -> list[dict[str, Any]]:
        """Return this run's row and the published ones of the same data set, in percent."""
        own = {
            "method": self.method,
            "miou": 100 * self.scores.miou,
            "accuracy": 100 * self.scores.accuracy,
            "protocol": self.protocol.name,
            "source": "this evaluation",
        }
        return [own, *paper_rows(self.dataset)]

    def entry(self) -> dict[str, Any]:
        """Return what a run keeps of an evaluation, as plain values; scores as fractions."""
        s = self.scores
        return {
            **{name: getattr(s, name) for name in ("miou", "accuracy", "things", "stuff")},
            "iou": s.iou.tolist(),
            "assignment": s.assignment.tolist(),
            "images": self.images,
            "protocol": self.protocol.name,
            "conditions": self.conditions,
            "notes": self.notes(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; scores in percent, NaN as None."""
        s = self.scores
        return {
            "method": self.method,
            "dataset": self.dataset,
            "labels_from": self.labels_from,
            "protocol": self.protocol.name,
            "size": self.protocol.size,
            "conditions": self.conditions,
            "images": self.images,
            "ignored_pixels": 100 * self.ignored,
            "images_of_split": self.wanted,
            "miou": _or_none(s.miou),
            "accuracy": _or_none(s.accuracy),
            "things_miou": _or_none(s.things),
            "stuff_miou": _or_none(s.stuff),
            "matched": self.matched,
            "classes": [
                {"id": i, "name": name, "kind": kind, "iou": _or_none(s.iou[i]), "cluster": int(s.assignment[i])}
                for i, (name, kind) in enumerate(zip(self.classes, self.kinds, strict=True))
            ],
            "confusion": s.confusion.tolist(),
            "skipped": [{"name": skip.name, "reason": skip.reason} for skip in self.skipped],
            "missing": self.missing,
            "notes": self.notes(),
            "published": paper_rows(self.dataset),
        }

    def json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def _tables(self) -> tuple[list[list[str]], list[list[str]], list[tuple[str, str]]]:
        s = self.scores
        classes = [["id", "class", "kind", "IoU", "cluster"]]
        classes += [
            [str(i), name, kind, percent(100 * s.iou[i]), str(s.assignment[i])]
            for i, (name, kind) in enumerate(zip(self.classes, self.kinds, strict=True))
        ]
        facts = [
            (
                "data set",
                f"{self.dataset} val, {self.images} images, labels from {self.labels_from}, {100 * self.ignored:.1f} % "
                "of the pixels ignored (255)",
            ),
            ("protocol", self.conditions),
            *(("note", note) for note in self.notes()),
        ]
        return score_rows(self.rows()), classes, facts

    def _means(self) -> str:
        other = "background" if "background" in self.kinds else "stuff"
        return f"mIoU of things {percent(100 * self.scores.things)}, of {other} {percent(100 * self.scores.stuff)}"

    def text(self) -> str:
        """Return the report for a terminal."""
        rows, classes, facts = self._tables()
        lines = [f"{key:<9} {value}" for key, value in facts]
        return "\n".join([*lines, "", *columns(rows), "", self._means(), "", *columns(classes)])

    def markdown(self) -> str:
        """Return the report as markdown."""
        rows, classes, facts = self._tables()
        lines = [f"- {key}: {value}" for key, value in facts]
        return "\n".join([*lines, "", *markdown(rows), "", self._means(), "", *markdown(classes)])

    def draw(self, path: str | Path | BinaryIO) -> None:
        """Write the confusion picture, a PNG: one row a class, its pixels' share in every predicted class."""
        from matplotlib.figure import Figure

        k = len(self.classes)
        counts = self.scores.confusion
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        side = 3 + 0.22 * k
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
        size = 8 if k <= 30 else 6
        axes.set_xticks(range(k), self.classes, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(k), self.classes, fontsize=size, parse_math=False)
        axes.set_xlabel("prediction" + (" (clusters after the match)" if self.matched else ""))
        axes.set_ylabel("label")
        axes.set_title(
            f"{self.dataset}, protocol {self.protocol.name}: "
            f"mIoU {percent(100 * self.scores.miou)}, accuracy {percent(100 * self.scores.accuracy)}",
            fontsize=10,
        )
        figure.colorbar(shown, ax=axes, shrink=0.6, label="share of the label's pixels")
        figure.savefig(path, format="png", dpi=110)

    def write(self, folder: str | Path, force: bool = False) -> list[Path]:
        """Write `REPORT_FILES` into `folder` and return their paths; `force` replaces those that are there."""
        paths = claim_outputs(folder, REPORT_FILES, force=force)
        for path, content in zip(paths, (self.text(), self.markdown(), self.json()), strict=False):
            _write_text(path, f"{content}\n")
        write_atomically(paths[-1], self.draw)
        return paths


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda stream: stream.write(text.encode(errors="backslashreplace")))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else 100 * float(value)
