"""How fast images become training samples, and predictions become scores; both against the plain way.

    python -m benchmarks.bench_data                 # prints images per second and ratios
    pytest benchmarks/bench_data.py --benchmark-only

The plain ways: decode a file with Pillow and resize it, nothing else; and one `np.bincount` per image after the
label went through `np.vectorize` of a dict, as TransFGU's evaluation does. A ratio is the median over interleaved
repeats; it is not printed when the results differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.base import SegmentationData, label_lookup, map_label, table
from dmsa.metrics import Histogram

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
    mapping = {int(k): v for k, v in table("coco80")["stuffthingmap_id_to_contiguous"].items()}
    lut = label_lookup(mapping)
    predictions, labels = synthetic_masks(images)
    results: dict[str, np.ndarray] = {}

    def ours() -> None:
        histogram = Histogram(CLASSES)
        for pred, ids in zip(predictions, labels, strict=True):
            histogram.update(pred, map_label(ids, lut, "synthetic"))
        results["ours"] = histogram.reduce()

    def plainly() -> None:
        to_class = np.vectorize({**mapping, 255: 255}.__getitem__)
        counts = np.zeros((CLASSES, CLASSES), dtype=np.int64)
        for pred, ids in zip(predictions, labels, strict=True):
            label = to_class(ids)
            valid = label < CLASSES
            pairs = CLASSES * label[valid] + pred[valid]
            counts += np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
        results["plain"] = counts

    mine, theirs = interleaved(ours, plainly, repeats=repeats)
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return ratio, bool(np.array_equal(results["ours"], results["plain"]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 photographs with masks."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, 32, labels=True)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples(benchmark, photos, split):
    """Samples of 32 photographs."""
    data = build(DataConfig(name="folder", root=str(photos)), split)
    benchmark(samples, data)


def test_plain_decode_and_resize(benchmark, photos):
    """Decode and resize of the same photographs, nothing else."""
    benchmark(plain, build(DataConfig(name="folder", root=str(photos)), "train"), 160)


def test_histogram_of_one_image(benchmark):
    """One 320 x 320 prediction of 81 classes."""
    predictions, _ = synthetic_masks(1)
    benchmark(Histogram(CLASSES).update, predictions[0], predictions[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="photographs")
    parser.add_argument("--masks", type=int, default=1000, help="synthetic predictions of 320 x 320")
    parser.add_argument("--repeats", type=int, default=5)
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
