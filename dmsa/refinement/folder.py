"""A folder of masks: which image, mask and truth belong together, what is done already, and doing the rest."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from dmsa.data.base import colour_map
from dmsa.data.images import as_rgb, open_image, read_mask
from dmsa.data.listing import IMAGE_SUFFIXES, by_stem, few, list_files
from dmsa.files import claim_outputs, write_atomically
from dmsa.refinement.maps import MASK_SUFFIXES, Maps, MaskFile, find_masks, read_maps, read_plane
from dmsa.refinement.refiner import Refined, Refiner, Settings, add_background
from dmsa.refinement.scores import Counts, count
from dmsa.visualize import png_bytes

RECORD = "refine.json"
"""What the outputs of a folder were made with."""


@dataclass(frozen=True)
class Job:
    """One image: what is read and what is written."""

    name: str
    image: Path
    masks: tuple[MaskFile, ...]
    background: Path | None = None
    truth: Path | None = None
    label_out: Path | None = None
    soft_out: Path | None = None
    counts_out: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        return [self.image, *(file.path for file in self.masks), *filter(None, (self.background, self.truth))]

    @property
    def outputs(self) -> list[Path]:
        """Every file that is written."""
        return list(filter(None, (self.label_out, self.soft_out, self.counts_out)))

    @property
    def done(self) -> bool:
        """Whether all outputs are there."""
        return all(path.exists() for path in self.outputs)


@dataclass(frozen=True)
class Plan:
    """All images of a folder.

    Attributes:
        jobs: every image that has masks.
        notes: what was left out, in words.
    """

    jobs: list[Job]
    notes: list[str]


@dataclass(frozen=True)
class Reading:
    """How masks are read: class of the key 0, and whether the maps must bring class 0 along."""

    first_class: int = 0
    needs_background: bool = True


class NoBackgroundError(ValueError):
    """Maps without class 0, and nothing that takes its place."""


def files_by_name(folder: Path, suffixes: Sequence[str], option: str) -> dict[str, Path]:
    """Return the files below `folder` by name, the path below the folder without its ending.

    Raises:
        FileNotFoundError: no such folder, or none of these files in it.
        ValueError: files that differ in their ending only.
    """
    found = by_stem(list_files(folder, suffixes).files, folder, f"files of {option}")
    if not found:
        reason = f"has none of {', '.join(suffixes)}" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{option}={str(folder)!r} {reason}")
    return {name: folder / file for name, file in found.items()}


def plan(
    images: Path,
    masks: Path,
    out: Path,
    *,
    background: Path | None,
    truth: Path | None,
    labels: bool,
    soft: bool,
) -> Plan:
    """Match images, masks, background maps and true masks by name.

    Raises:
        FileNotFoundError: nothing in a folder, masks without image, or background maps or truths missing.
        ValueError: names that two files could mean.
    """
    photos = files_by_name(images, IMAGE_SUFFIXES, "IMAGES")
    found, notes = find_masks(masks, photos)
    if orphans := [name for name in found if name not in photos]:
        raise FileNotFoundError(f"{len(orphans)} of {len(found)} masks have no image in {images}: {few(orphans)}")
    beside = {
        option: files_by_name(folder, suffixes, option) if folder else None
        for option, folder, suffixes in (
            ("--background", background, MASK_SUFFIXES),
            ("--truth", truth, (".png",)),
        )
    }
    for option, files in beside.items():
        if files is not None and (missing := [name for name in found if name not in files]):
            raise FileNotFoundError(f"{len(missing)} of {len(found)} images have no file in {option}: {few(missing)}")
    maps, truths = beside["--background"], beside["--truth"]
    jobs = [
        Job(
            name,
            photos[name],
            tuple(found[name]),
            background=maps[name] if maps is not None else None,
            truth=truths[name] if truths is not None else None,
            label_out=out / f"{name}.png" if labels else None,
            soft_out=out / "soft" / f"{name}.npz" if soft else None,
            counts_out=out / "counts" / f"{name}.npz" if truths is not None else None,
        )
        for name in sorted(found)
    ]
    if unused := len(photos) - len(found):
        notes = [*notes, f"{unused} images have no mask"]
    return Plan(jobs, notes)


def prepare(
    out: Path, jobs: Sequence[Job], record: dict[str, object], *, others: Sequence[str] = (), force: bool
) -> list[Job]:
    """Make the folder, and return the images that are still to be done.

    An earlier run with the same `record` is continued; one with another is not mixed with this.

    Args:
        out: the folder.
        jobs: all images.
        record: what decides the outputs.
        others: names of files that will be written besides.
        force: replace what is there.

    Raises:
        ValueError: the folder holds results of other settings, or an output would replace an input.
        FileExistsError: an output is there that no earlier run of this command made.
    """
    file = out / RECORD
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not force else None
    if earlier is not None and earlier != record:
        differing = [f"{key} was {earlier.get(key)!r}" for key in record if earlier.get(key) != record[key]]
        raise ValueError(f"{out} holds results of other settings: {few(differing)}; --force replaces, or another --out")
    todo = [job for job in jobs if earlier is None or not job.done]
    outputs = [path.relative_to(out).as_posix() for job in todo for path in job.outputs] + list(others)
    inputs = [path for job in jobs for path in job.inputs]
    claim_outputs(out, outputs, inputs=inputs, force=force or earlier is not None)
    for folder in {path.parent for job in todo for path in job.outputs}:
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda stream: stream.write(json.dumps(record, indent=1).encode()))
    return todo


def check_background(jobs: Sequence[Job], reading: Reading, settings: Settings) -> None:
    """Read the first masks that can be read, and raise `NoBackgroundError` if those of the set need other options."""
    for job in jobs:
        try:
            read_job(job, reading, settings)
        except NoBackgroundError:
            raise
        except (ValueError, OSError):
            continue
        return


def read_photo(path: Path) -> np.ndarray:
    """Return a photograph, uint8 `[H, W, 3]`."""
    with open_image(path) as opened:
        return np.array(as_rgb(opened))


def read_job(job: Job, reading: Reading, settings: Settings) -> tuple[np.ndarray, Maps, np.ndarray | None]:
    """Return photograph, maps (with their background) and true mask of an image.

    Raises:
        ValueError: files that cannot be used; the message names one.
        OSError: a file cannot be read.
    """
    maps = read_maps(job.masks, reading.first_class)
    try:
        maps = add_background(maps, settings, None if job.background is None else read_plane(job.background))
    except ValueError as error:
        raise ValueError(f"{job.masks[0].path}: {error}") from error
    scores = maps.ignored is None and maps.ids
    if reading.needs_background and scores and 0 not in maps.ids and settings.thresholds is None:
        raise NoBackgroundError(
            f"{job.masks[0].path} has no map of the background (class 0): give its score, such as --background 0.3, or"
            " a folder of maps, or --background none if there is no such class"
        )
    photo = read_photo(job.image)
    truth = None if job.truth is None else read_mask(job.truth)
    if truth is not None and truth.shape != photo.shape[:2]:
        raise ValueError(f"{job.truth} is of size {truth.shape}, its image of {photo.shape[:2]}")
    return photo, maps, truth


@dataclass
class Worker:
    """Reads, refines and writes one image after another; sent to the processes."""

    settings: Settings
    reading: Reading
    device: str = "cpu"
    threads: int | None = None
    _refiner: Refiner | None = field(default=None, repr=False)

    def refine(self, job: Job) -> tuple[Refined, np.ndarray, np.ndarray | None]:
        """Return the refined masks of an image, the photograph and the true mask; nothing is written."""
        if self._refiner is None:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            self._refiner = Refiner(self.settings, torch.device(self.device))
        photo, maps, truth = read_job(job, self.reading, self.settings)
        return self._refiner(photo, maps), photo, truth

    def __call__(self, job: Job) -> str | None:
        """Refine and write one image; return in one line why it could not be read."""
        try:
            refined, _, truth = self.refine(job)
        except (ValueError, OSError) as error:
            return f"{job.name}: {error}".replace("\n", " ")
        if job.soft_out is not None:
            keys, maps = np.asarray(refined.ids), refined.scores.astype(np.float16)
            _write(job.soft_out, lambda stream: np.savez_compressed(stream, keys=keys, maps=maps))
        if job.counts_out is not None and truth is not None:
            counts = count(refined, truth)
            _write(job.counts_out, lambda stream: np.savez_compressed(stream, **vars(counts)))
        if job.label_out is not None:
            picture = Image.fromarray(refined.labels, mode="P")
            picture.putpalette(colour_map(256).tobytes())
            _write(job.label_out, lambda stream: stream.write(png_bytes(picture)))
        return None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    content = io.BytesIO()
    write(content)
    write_atomically(path, lambda stream: stream.write(content.getvalue()))


def run(worker: Worker, jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, str | None]]:
    """Yield every image when it is done, in any order, with the reason why it could not be read."""
    if processes <= 1:
        for job in jobs:
            yield job, worker(job)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_in_process, worker, job): job for job in jobs}
        for finished in as_completed(waiting):
            yield waiting[finished], finished.result()


_OF_THIS_PROCESS: dict[str, Worker] = {}


def _in_process(worker: Worker, job: Job) -> str | None:
    return _OF_THIS_PROCESS.setdefault("worker", worker)(job)


def total_counts(jobs: Sequence[Job]) -> tuple[Counts, int]:
    """Return the sum of the counts that were written, and of how many images."""
    total, images = Counts.none(), 0
    for job in jobs:
        if job.counts_out is not None and job.counts_out.exists():
            with np.load(job.counts_out) as stored:
                total += Counts(**{name: stored[name] for name in stored.files})
            images += 1
    return total, images
