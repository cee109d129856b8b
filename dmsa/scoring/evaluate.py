"""Scoring a network, or a folder of predicted masks of any method.

A network's predictions and another method's PNG files take the same way: protocol, histogram, one match, report.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmsa import distributed
from dmsa.data.images import CorruptImageError, read_mask
from dmsa.data.listing import few, list_files
from dmsa.data.transforms import normalise, to_tensor
from dmsa.scoring.metrics import Histogram, scores, things_of
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.table import Report, Skip

UPSAMPLED_VALUES = 2**26  # logits that are upsampled at once, at most: 256 MiB in fp32


class _Work(Dataset):
    """This process's share of the images: `read(index)` of each, or the error that came instead."""

    def __init__(self, indices: Sequence[int], read: Callable[[int], tuple]) -> None:
        self.indices = indices
        self.read = read

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple:
        index = int(self.indices[position])
        try:
            return index, self.read(index), None
        except (ValueError, OSError) as error:  # carried to the parent, so that its message is not a worker's traceback
            return index, None, error


def _as_it_is(batch: list) -> list:
    return batch


class _ReadImage:
    """Image and label of a data set as the protocol wants them."""

    def __init__(self, dataset: Any, protocol: Protocol) -> None:
        self.dataset = dataset
        self.protocol = protocol

    def __call__(self, index: int) -> tuple[Tensor, np.ndarray]:
        image, label = self.dataset.raw(index)
        return to_tensor(self.protocol.image(image)), self.protocol.label(_required(label, self.dataset, index))


class _ReadMasks:
    """A prediction and the label of a data set as the protocol wants them."""

    def __init__(self, dataset: Any, protocol: Protocol, files: dict[int, Path]) -> None:
        self.dataset = dataset
        self.protocol = protocol
        self.files = files

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        label = _required(_label(self.dataset, index), self.dataset, index)
        pred = read_mask(self.files[index])
        k = self.dataset.num_classes
        if pred.size and pred.max() >= k:
            raise ValueError(
                f"{self.files[index]} holds ids outside the table: {np.unique(pred[pred >= k]).tolist()}; "
                f"expected 0..{k - 1}, one of {k} clusters or classes for every pixel"
            )
        return self.protocol.prediction(pred, label.shape), self.protocol.label(label)


def _required(label: np.ndarray | None, dataset: Any, index: int) -> np.ndarray:
    if label is None:
        raise ValueError(f"image {_name(dataset, index)} of {dataset.name!r} has no label to score against")
    return label


def _readable(items: list[tuple], dataset: Any, skipped: list[Skip]) -> list[tuple]:
    """Return what could be read; append what could not be decoded to `skipped`, and raise any other error."""
    for index, _, error in items:
        if isinstance(error, CorruptImageError):
            skipped.append(Skip(_name(dataset, index), str(error)))
        elif error is not None:
            raise error
    return [read for _, read, error in items if error is None]


def _name(dataset: Any, index: int) -> str:
    return getattr(dataset, "image_name", str)(index)


def _label(dataset: Any, index: int) -> np.ndarray | None:
    """Return a label without decoding the image where the data set can do that."""
    return dataset.read_label(index) if hasattr(dataset, "read_label") else dataset.raw(index)[1]


def _batches(work: _Work, batch: int, workers: int, progress: bool) -> Iterator[list]:
    loader = DataLoader(
        work,
        batch_size=batch,
        num_workers=min(workers, len(work)),
        collate_fn=_as_it_is,
    )
    if not (progress and distributed.is_main()):
        return iter(loader)
    from tqdm import tqdm

    return iter(tqdm(loader, desc="evaluation", unit="batch", leave=False))


def _indices(dataset: Any, protocol: Protocol) -> tuple[list[int], bool]:
    """Return the images to score, and whether they are the curated ones."""
    curated = getattr(dataset, "curated", None)
    chosen = curated() if curated and protocol.curated else None
    if chosen is not None:
        return chosen, True
    return list(range(dataset.images if hasattr(dataset, "images") else len(dataset))), False


def _checked(dataset: Any, protocol: Protocol | str, batch: int, workers: int) -> Protocol:
    if batch < 1 or workers < 0:
        raise ValueError(f"expected batch >= 1 and workers >= 0, got {batch=} {workers=}")
    if getattr(dataset, "labels_from", "") is None:
        raise ValueError(f"data set {dataset.name!r} has no labels to score against")
    return Protocol(protocol) if isinstance(protocol, str) else protocol


@torch.no_grad()
def evaluate(
    predict_fn: Callable[[Tensor], Tensor],
    dataset: Any,
    protocol: Protocol | str,
    *,
    batch: int = 16,
    workers: int = 0,
    progress: bool = False,
    method: str = "this run",
) -> Report:
    """Score a network on a data set; every process takes its share and all return the same report.

    The histogram is of integers, no image is counted twice, and nothing is padded: the result does not depend on the
    number of processes, nor on `batch` as far as `predict_fn` does not.

    Args:
        predict_fn: normalised images float32 `[B, 3, S, S]`, S = `protocol.size`, on the CPU -> logits `[B, K, h, w]`
            of any size and device, K = `dataset.num_classes`. Logits are upsampled, bilinear, to the label's size.
        dataset: a validation set with labels (:mod:`dmsa.data`); `raw` is read, its own transform is not used.
        protocol: how to score; a name means the papers' size of 320.
        batch: images per call of `predict_fn`.
        workers: processes that decode images.
        progress: show a progress bar on rank 0.
        method: name of the row in the report.

    Raises:
        ValueError: no labels, unknown ids in a label (the message names the file), or logits of another shape.
        FileNotFoundError: the protocol needs a curated list that has not been made.
    """
    protocol = _checked(dataset, protocol, batch, workers)
    indices, curated = _indices(dataset, protocol)
    share = distributed.shard(len(indices))
    work = _Work(np.asarray(indices)[share.start : share.stop], _ReadImage(dataset, protocol))
    histogram = Histogram(dataset.num_classes)
    skipped: list[Skip] = []
    for items in _batches(work, batch, workers, progress):
        good = _readable(items, dataset, skipped)
        if not good:
            continue
        images = normalise(torch.stack([image for image, _ in good]))
        logits = predict_fn(images)
        if logits.ndim != 4 or logits.shape[:2] != (len(good), dataset.num_classes):
            raise ValueError(
                f"expected logits [B, K, h, w] with B = {len(good)} and K = {dataset.num_classes}, got {logits.shape=}"
            )
        for pred, label in zip(_argmax(logits, [label.shape for _, label in good]), good, strict=True):
            histogram.update(pred, label[1])
    return _report(dataset, protocol, curated, len(indices), histogram, skipped, [], method, True)


def _argmax(logits: Tensor, sizes: list[tuple[int, int]]) -> Iterable[np.ndarray]:
    """Yield the argmax of `logits` `[B, K, h, w]` upsampled to each image's size, uint8, in bounded memory."""
    start = 0
    for (height, width), run in itertools.groupby(sizes):
        end = start + len(list(run))
        step = max(1, UPSAMPLED_VALUES // (logits.shape[1] * height * width))
        for first in range(start, end, step):
            part = logits[first : min(first + step, end)].float()
            full = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
            yield from full.argmax(1).to(torch.uint8).cpu().numpy()
        start = end


def evaluate_predictions(
    folder: str | Path,
    dataset: Any,
    protocol: Protocol | str,
    *,
    match: bool = True,
    allow_missing: bool = False,
    batch: int = 16,
    workers: int = 0,
    progress: bool = False,
    method: str | None = None,
) -> Report:
    """Score a folder of predicted masks, of whatever method.

    Args:
        folder: PNG files, palette or 8-bit grey, with ids 0..K-1 as pixels, named as the images; of the annotation's
            size, of the protocol's, or of any other size, which is taken as a mask of the whole image.
        dataset: a validation set with labels.
        protocol: how to score.
        match: ids are clusters, to be matched to classes; otherwise they are class ids.
        allow_missing: score the images that have a prediction when others have none; the report lists those.
        batch: images read at a time.
        workers: processes that decode masks.
        progress: show a progress bar on rank 0.
        method: name of the row in the report; the folder's name if unset.

    Raises:
        FileNotFoundError: no folder, or images without a prediction (the first few and their number).
        ValueError: ids outside the table; the message names the file and the ids.
    """
    protocol = _checked(dataset, protocol, batch, workers)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of predictions {folder}")
    indices, curated = _indices(dataset, protocol)
    found = {os.path.splitext(f)[0]: folder / f for f in list_files(folder, (".png",)).files}
    by_stem = {Path(name).name: path for name, path in found.items()}
    files, missing = {}, []
    for index in indices:
        name = _name(dataset, index)
        path = found.get(name) or by_stem.get(Path(name).name)
        if path is None:
            missing.append(name)
        else:
            files[index] = path
    if missing and (not allow_missing or not files):
        raise FileNotFoundError(
            f"{len(missing)} of {len(indices)} images of {dataset.name} val have no prediction in {folder}: "
            f"{few([f'{name}.png' for name in missing])}. Predictions are PNG files named as the images; "
            "--allow-missing scores the others"
        )
    scored = [index for index in indices if index in files]
    share = distributed.shard(len(scored))
    work = _Work(np.asarray(scored)[share.start : share.stop], _ReadMasks(dataset, protocol, files))
    histogram = Histogram(dataset.num_classes)
    skipped: list[Skip] = []
    for items in _batches(work, batch, workers, progress):
        for pred, label in _readable(items, dataset, skipped):
            histogram.update(pred, label)
    name = method or folder.resolve().name
    return _report(dataset, protocol, curated, len(indices), histogram, skipped, missing, name, match)


def _report(
    dataset: Any,
    protocol: Protocol,
    curated: bool,
    wanted: int,
    histogram: Histogram,
    skipped: list[Skip],
    missing: list[str],
    method: str,
    match: bool,
) -> Report:
    skipped = list(itertools.chain.from_iterable(distributed.gather_objects(skipped)))
    things = things_of(dataset)
    kinds = ["thing" if thing else "stuff" for thing in things]
    if dataset.things_only:
        kinds[0] = "background"
    return Report(
        method=method,
        dataset=dataset.name,
        classes=list(dataset.classes),
        kinds=kinds,
        labels_from=getattr(dataset, "labels_from", None) or "the data set itself",
        protocol=protocol,
        conditions=protocol.describe(curated),
        scores=scores(histogram.reduce(), match=match, things=things),
        images=wanted - len(skipped) - len(missing),
        wanted=wanted,
        skipped=skipped,
        missing=missing,
        partial=getattr(dataset, "total", 0) > getattr(dataset, "images", 0),
        matched=match,
    )
