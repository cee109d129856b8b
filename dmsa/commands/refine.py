"""`dmsa refine`: refine a folder of pseudo masks along the edges of their photographs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from dmsa.data.listing import few, read_lines
from dmsa.refinement.folder import Reading, Worker, check_background, plan, prepare, run, total_counts
from dmsa.refinement.refiner import Preset, Settings
from dmsa.refinement.report import FILES, best_thresholds, score_rows, write_report
from dmsa.scoring.table import columns


@dataclass(frozen=True)
class RefineOptions:
    """Refine pseudo masks along the edges of their photographs: class indices, soft maps, class activation maps."""

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="")]
    """Folder of photographs."""
    masks: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MASKS", help_behavior_hint="")]
    """Folder of masks, named as the photographs: class indices NAME.png (255 is ignored); scores NAME.npy or NAME.npz,
    or NAME/ID.png, NAME_ID.png; dictionaries with `keys` and `high_res`, `cam` or `maps`. Any size."""
    out: Path
    """Folder for NAME.png (class indices in VOC's colours); the same command again goes on where it stopped."""
    stride: float | None = None
    """Side in pixels of the masks' cells, such as the patch size of a ViT; by default the image's size over the mask's
    (16 for masks of the image's size)."""
    preset: Preset = "fitted"
    """fitted: PAR with settings for the stride. par: dilations 1 to 24, 10 iterations. pamr: 8 and 16, 10 iterations.
    none: cells enlarged in place."""
    background: str | None = None
    """Score of the background where the maps have no class 0, or a folder of its maps, or `none` if there is no such
    class."""
    low: float | None = None
    """With --high, instead of --background: below it a pixel is background."""
    high: float | None = None
    """From it on a pixel is of its class; between --low and --high it is ignored (255)."""
    first_class: int | None = None
    """Class of the key 0 of a dictionary, and of the first plane of an array: 1 with a background that is added, else
    0."""
    labels: bool = True
    """Write class indices."""
    soft: bool = False
    """Write the refined scores: soft/NAME.npz with `keys` and `maps`, 16-bit floats."""
    truth: Path | None = None
    """Folder of true masks NAME.png: scores before and after, the best background threshold, report.md."""
    classes: Path | None = None
    """File of class names, one a line from class 0 on, for the report."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    workers: int | None = None
    """Processes; by default one a core, at most 8, and one with a GPU."""
    force: bool = False
    """Replace earlier outputs of --out."""


def _settings(options: RefineOptions) -> tuple[Settings, Reading, Path | None]:
    """Settings, how to read, and the folder of background maps."""
    threshold, folder = None, None
    if options.background not in (None, "none"):
        try:
            threshold = float(options.background)
        except ValueError:
            folder = Path(options.background)
    settings = Settings(options.preset, options.stride, threshold, options.low, options.high)
    if options.low is not None and options.background is not None:
        raise ValueError(f"--low and --high take the place of --background {options.background}")
    added = folder is not None or settings.thresholds is not None
    first = options.first_class if options.first_class is not None else int(added)
    return settings, Reading(first, needs_background=options.background != "none"), folder


def main(argv: list[str]) -> int:
    """Run `dmsa refine` with `argv` and return the exit status: 1 if a file could not be read.

    Raises:
        ValueError: options that contradict each other, names that two files could mean, results of other settings.
        FileNotFoundError: files are missing.
        FileExistsError: an output is there already.
    """
    options = tyro.cli(RefineOptions, args=argv, prog="dmsa refine")
    if not (options.labels or options.soft or options.truth):
        raise ValueError("nothing to write: leave --no-labels out, or add --soft or --truth")
    settings, reading, backgrounds = _settings(options)
    names = read_lines(options.classes) if options.classes else []
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    processes = options.workers
    if processes is None:
        processes = min(os.cpu_count() or 1, 8) if device == "cpu" else 1
    if processes < 1:
        raise ValueError(f"--workers {processes} must be at least 1")

    found = plan(
        options.images,
        options.masks,
        options.out,
        background=backgrounds,
        truth=options.truth,
        labels=options.labels,
        soft=options.soft,
    )
    check_background(found.jobs, reading, settings)
    asked = ("images", "masks", "preset", "stride", "background", "low", "high", "first_class", "truth")
    record = {key: _plain(getattr(options, key)) for key in asked}
    reports = FILES if options.truth is not None else ()
    todo = prepare(options.out, found.jobs, record, others=reports, force=options.force)
    notes = list(found.notes)
    if len(todo) < len(found.jobs):
        print(f"{len(found.jobs) - len(todo)} of {len(found.jobs)} images are done already", file=sys.stderr)
    processes = min(processes, max(1, len(todo)))
    worker = Worker(settings, reading, device, threads=1 if processes > 1 else None)
    broken = []
    for job, reason in tqdm(run(worker, todo, processes), total=len(todo), unit="image", disable=not todo):
        if reason is not None:
            broken.append(job.name)
            tqdm.write(f"skipped {reason}", file=sys.stderr)
    if broken:
        notes.append(f"{len(broken)} of {len(found.jobs)} images could not be read: {few(broken)}")
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{len(todo) - len(broken)} images refined into {options.out}")
    if options.truth is not None and len(broken) < len(found.jobs):
        counts, images = total_counts(found.jobs)
        print("\n".join(columns(score_rows(counts, names))))
        for name, (threshold, miou) in best_thresholds(counts).items() if counts.swept else ():
            print(f"best background threshold {name}: {threshold:.2f}, mIoU {miou:.1f}")
        described = ", ".join(f"{key} {value}" for key, value in record.items() if value is not None)
        written = write_report(options.out, counts, images, described, notes, worker, found.jobs, names)
        print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    return 1 if broken else 0


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
