"""`dmsa predict`: segment images with a checkpoint, as palette PNGs and as overlays with class names."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from dmsa.data.images import CorruptImageError, as_rgb, open_image
from dmsa.data.listing import IMAGE_SUFFIXES, few, list_files
from dmsa.files import claim_outputs, write_atomically
from dmsa.scoring.predictor import load_predictor
from dmsa.visualize import name_regions, overlay, png_bytes


@dataclass(frozen=True)
class PredictOptions:
    """Segment images with a checkpoint: one palette PNG of class ids and one overlay with class names for each."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="")]
    """Image files, folders of images, or quoted patterns."""
    checkpoint: str
    """Run folder (its best checkpoint) or checkpoint file of train.py."""
    out: str = "predictions"
    """Folder for NAME.png (class ids, VOC-style palette) and NAME_overlay.png."""
    overlay: bool = True
    """Also write the overlays."""
    force: bool = False
    """Replace results that are there already (never the images)."""


def find_images(words: Sequence[str], out: str) -> list[Path]:
    """Return the image files that files, folders and patterns name, in order and once each; say what is left out.

    Args:
        words: as the user gave them.
        out: folder of the results, which are no images.

    Raises:
        FileNotFoundError: a word that names nothing.
        ValueError: no words, or a folder of images that is `out`.
    """
    if not words:
        raise ValueError("IMAGES is empty: name image files, folders or patterns")
    found: dict[str, Path] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            results = os.path.relpath(os.path.realpath(out), os.path.realpath(path))
            if results == ".":
                raise ValueError(f"--out={out!r} is a folder of images; choose another, or results would be among them")
            listing = list_files(path, IMAGE_SUFFIXES, skip=(Path(results).as_posix(),))
            for note in listing.notes():
                print(note, file=sys.stderr)
            inside = [path / name for name in listing.files]
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(item) for item in sorted(glob.glob(word, recursive=True)) if Path(item).is_file()]
        if not inside:
            raise FileNotFoundError(
                f"IMAGES={word!r} is no image, no folder with images ({', '.join(IMAGE_SUFFIXES)}) and no pattern that "
                "matches one"
            )
        found.update({os.path.abspath(item): item for item in inside})
    return list(found.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for every file: its stem, and what it takes to tell them apart.

    That is the ending, where two in one folder differ by nothing else, and as many folders before the name as needed.
    Names may still be equal in the end (`x_a.jpg` beside `x/a.jpg` and `a.jpg`).
    """
    in_folder = Counter(path.with_suffix("") for path in paths)
    own = [f"{p.stem}_{p.suffix[1:]}" if in_folder[p.with_suffix("")] > 1 else p.stem for p in paths]
    names, depth = own, 0
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        counts = Counter(names)
        names = [
            "_".join([*path.parent.parts[-depth:], last]).replace("/", "") if counts[name] > 1 else name
            for path, last, name in zip(paths, own, names, strict=True)
        ]
    return names


def main(argv: list[str]) -> int:
    """Run `dmsa predict` with `argv` and return the exit status: 1 if an image could not be read."""
    options = tyro.cli(PredictOptions, args=argv, prog="dmsa predict")
    paths = find_images(options.images, options.out)
    kinds = ("", "_overlay") if options.overlay else ("",)
    stems = output_names(paths)
    predictor = load_predictor(options.checkpoint)
    folder = Path(options.out)
    claim_outputs(folder, [f"{stem}{kind}.png" for stem in stems for kind in kinds], inputs=paths, force=options.force)
    palette = predictor.classes.palette
    names = predictor.classes.classes if predictor.assignment is not None else predictor.names
    broken = []
    for path, name in zip(paths, stems, strict=True):
        try:
            with open_image(path) as opened:
                picture = as_rgb(opened)
        except CorruptImageError as error:
            broken.append(path)
            print(f"skipped: {error}", file=sys.stderr)
            continue
        ids = predictor.segment(picture)
        mask = Image.fromarray(ids, mode="P")
        mask.putpalette(palette.tobytes())
        _write_png(folder / f"{name}.png", mask)
        if options.overlay:
            drawn = name_regions(overlay(np.asarray(picture), ids, palette), ids, names)
            _write_png(folder / f"{name}_overlay.png", Image.fromarray(drawn))
    print(f"{len(paths) - len(broken)} images segmented into {folder} (epoch {predictor.epoch + 1})")
    if broken:
        print(f"{len(broken)} of {len(paths)} images could not be read: {few(broken)}", file=sys.stderr)
    if predictor.assignment is None:
        print("this run was never scored: ids are clusters without names", file=sys.stderr)
    return 1 if broken else 0


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda stream: stream.write(png_bytes(image)))
