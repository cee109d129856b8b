"""How fast images become training samples, and predictions become scores; both against the plain way.

    python -m benchmarks.measuring.bench_data                 # prints images per second and ratios
    pytest benchmarks/measuring/bench_data.py --benchmark-only

The plain ways: decode a file with Pillow and resize it, nothing else; and one `np.bincount` per image after the
label went through `np.vectorize` of a dict, as TransFGU's evaluation does. A ratio is the median over interleaved
repeats; it is not printed when the results differ.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring.rows import Candidate, Row
from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.base import SegmentationData, label_lookup, map_label, table
from dmsa.scoring.metrics import Histogram

CLASSES = 81


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(*works: Callable[[], object], repeats: int) -> list[list[float]]:
    """Return the seconds of every repeat of every work, taking turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for record, work in zip(times, works, strict=True):
            record.append(seconds(work))
    return times


def write_photos(folder: Path, count: int, labels: bool) -> None:
    """Write `count` JPEGs of 640 x 480 with a photograph's spectrum, and masks of a few regions if `labels`."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    if labels:
        (folder / "masks").mkdir()
        (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(CLASSES)))
    for i in range(count):
        pixels = np.zeros((480, 640, 3))
        for level in range(1, 9):  # half the amplitude an octave
            rough = rng.normal(size=(2**level, 2**level, 3)) * 64 / level
            for c in range(3):
                plane = Image.fromarray(rough[..., c].astype(np.float32)).resize((640, 480), Image.Resampling.BICUBIC)
                pixels[..., c] += np.array(plane)
        photo = Image.fromarray(np.clip(128 + pixels, 0, 255).astype(np.uint8))
        photo.save(folder / "images" / f"{i:04d}.jpg", quality=90)
        if labels:
            regions = Image.fromarray(rng.integers(0, CLASSES, (5, 6), dtype=np.uint8))
            regions.resize((640, 480), Image.Resampling.NEAREST, box=(0.3, 0.2, 5.8, 4.9)).save(
                folder / "masks" / f"{i:04d}.png"
            )


def plain(data: SegmentationData, side: int) -> None:
    """Decode every file of the data set, images and masks, and resize it, as an array."""
    for i in range(data.images):
        path = data.image_path(i)
        with Image.open(path) as image:
            np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
        if data.labels_from is not None:
            with Image.open(path.parents[1] / "masks" / f"{path.stem}.png") as mask:
                np.asarray(mask.resize((side, side), Image.Resampling.NEAREST))


def samples(data: SegmentationData) -> None:
    """Make a sample of every image."""
    for i in range(data.images):
        data[i]


def loading_speed(root: Path, split: str, repeats: int) -> tuple[float, float, float]:
    """Return images per second of whole samples and of plain decode + resize to the same side, and their ratio."""
    data = build(DataConfig(name="folder", root=str(root), classes=CLASSES), split)
    side = data[0]["image"].shape[-1]
    ours, theirs = interleaved(lambda: samples(data), lambda: plain(data, side), repeats=repeats)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return data.images / statistics.median(ours), data.images / statistics.median(theirs), ratio


def synthetic_masks(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions of 81 classes and COCO-Stuff id maps with some 255, uint8 `[n, 320, 320]`."""
    rng = np.random.default_rng(0)
    ids = np.array([int(k) for k in table("coco80")["stuffthingmap_id_to_contiguous"]] + [255], dtype=np.uint8)
    labels = ids[rng.integers(0, len(ids), (images, 320, 320), dtype=np.uint8)]
    return rng.integers(0, CLASSES, (images, 320, 320), dtype=np.uint8), labels


def evaluation_speed(images: int, repeats: int) -> tuple[float, bool]:
    """Return how many times faster the histogram is than the plain way, and whether the two are equal."""
    predictions, labels = (torch.from_numpy(x) for x in synthetic_masks(images))
    results: dict[str, torch.Tensor] = {}

    def ours() -> None:
        results["ours"] = histogram_at_once(predictions, labels)

    def plainly() -> None:
        results["plain"] = histogram_by_numpy(predictions, labels)

    mine, theirs = interleaved(ours, plainly, repeats=repeats)
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return ratio, torch.equal(results["ours"], results["plain"])


@functools.cache
def photos(count: int) -> tuple[tempfile.TemporaryDirectory, Path]:
    """Return a folder of photographs with masks, and the handle that deletes it at the end of the process."""
    handle = tempfile.TemporaryDirectory()
    write_photos(Path(handle.name), count, labels=True)
    return handle, Path(handle.name)


def one_thread(data: SegmentationData, work: Callable[[], None]) -> torch.Tensor:
    """Do the work on one thread, as a loader's worker does, and return the number of images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work()
    finally:
        torch.set_num_threads(threads)
    return torch.tensor([float(data.images)])


def histogram_by_numpy(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One label map through `np.vectorize` of a dict and one `np.bincount` for each image."""
    mapping = {int(k): v for k, v in table("coco80")["stuffthingmap_id_to_contiguous"].items()}
    to_class = np.vectorize({**mapping, 255: 255}.__getitem__)
    counts = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for pred, ids in zip(predictions.numpy(), labels.numpy(), strict=True):
        label = to_class(ids)
        valid = label < CLASSES
        pairs = CLASSES * label[valid] + pred[valid]
        counts += np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    return torch.from_numpy(counts)


def histogram_at_once(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The evaluator's histogram."""
    lut = label_lookup({int(k): v for k, v in table("coco80")["stuffthingmap_id_to_contiguous"].items()})
    histogram = Histogram(CLASSES)
    for pred, ids in zip(predictions.numpy(), labels.numpy(), strict=True):
        histogram.update(pred, map_label(ids, lut, "synthetic"))
    return torch.from_numpy(histogram.counts)


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """Loading for training and for evaluation, and the histogram; on the host whatever the device."""
    count, masks = (32, 100) if full else (12, 4)

    def loading(split: str) -> Row:
        def inputs(_: torch.device, seed: int) -> tuple[SegmentationData]:
            return (build(DataConfig(name="folder", root=str(photos(count)[1])), split),)

        def ours(data: SegmentationData) -> torch.Tensor:
            return one_thread(data, lambda: samples(data))

        def theirs(data: SegmentationData) -> torch.Tensor:
            side = 160 if split == "train" else 320
            return one_thread(data, lambda: plain(data, side))

        return Row(
            family="data",
            workload="loading",
            variant=split,
            dtype="uint8",
            shape=f"{count} JPEGs of 640x480",
            inputs=inputs,
            candidates=(
                Candidate("ours", ours, ours=True),
                Candidate("plain decode and resize", theirs),
            ),
            reference=lambda data: torch.tensor([float(count)]),
            items=count,
            scaled_from="" if full else "32 JPEGs of 640x480",
        )

    def maps(_: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        predictions, labels = synthetic_masks(masks)
        return torch.from_numpy(predictions), torch.from_numpy(labels)

    histogram = Row(
        family="data",
        workload="histogram",
        variant="81 classes",
        dtype="uint8",
        shape=f"{masks},320,320",
        inputs=maps,
        candidates=(
            Candidate("ours", histogram_at_once, ours=True),
            Candidate("np.vectorize and np.bincount", histogram_by_numpy),
        ),
        reference=histogram_by_numpy,
        tolerance=0.0,
        items=masks,
        scaled_from="" if full else "100,320,320",
    )
    return [loading("train"), loading("val"), histogram]


def test_data(measure, row):
    """Every workload through the harness."""
    measure(row)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="photographs")
    parser.add_argument("--masks", type=int, default=1000, help="synthetic predictions of 320 x 320")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one process of {os.cpu_count()} cores; medians of {options.repeats} interleaved repeats")
    for labels in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), options.images, labels)
            for split in ("train", "val"):
                ours, theirs, ratio = loading_speed(Path(folder), split, options.repeats)
                kind = f"{split} samples {'with' if labels else 'without'} masks"
                print(f"{kind:<28} {ours:6.0f} images/s, plain decode + resize {theirs:6.0f}, ratio {ratio:.2f}")
    ratio, equal = evaluation_speed(options.masks, 1 if options.masks >= 500 else options.repeats)
    if not equal:
        raise SystemExit("the histograms differ: no speed-up to report")
    print(f"histogram of {options.masks} masks of 81 classes: {ratio:.1f}x np.vectorize + np.bincount, equal counts")


if __name__ == "__main__":
    main()
