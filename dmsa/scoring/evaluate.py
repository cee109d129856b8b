"""Scoring a network, or a folder of predicted masks of any method.

A network's predictions and another method's PNG files take the same way: protocol, histogram, one match, report.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmsa import distributed
from dmsa.data.images import CorruptImageError, read_mask
from dmsa.data.listing import by_stem, few, list_files
from dmsa.data.sources import OFFICIAL_CURATED, SPLIT_IMAGES
from dmsa.data.transforms import normalise, to_tensor
from dmsa.scoring.metrics import IGNORE, Histogram, scores, things_of
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.table import Report, Skip
from dmsa.scoring.upsample import upsampled_labels

Predicted255 = Literal["refuse", "ignore", "wrong"]
"""What a prediction of 255 gets where the label is a class: an error, no place in the score, or a miss."""


class _Work(Dataset):
    """This process's share of the images: `read(index)` of each, or the error that came instead."""

    def __init__(self, indices: Sequence[int], read: Callable[[int], Any]) -> None:
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


class _CountMasks:
    """The histogram of a prediction and its label, seen as the protocol wants them; masks may be large."""

    def __init__(self, dataset: Any, protocol: Protocol, files: dict[int, Path], gaps: bool) -> None:
        self.dataset = dataset
        self.protocol = protocol
        self.files = files
        self.gaps = gaps

    def __call__(self, index: int) -> Histogram:
        label = _required(_label(self.dataset, index), self.dataset, index)
        path, k = self.files[index], self.dataset.num_classes
        pred = read_mask(path)
        outside = (pred >= k) & (pred != IGNORE) if self.gaps else pred >= k
        if outside.any():
            gaps = "; or --predicted-255 ignore (255 is not scored) or wrong (a miss)" if IGNORE in pred else ""
            raise ValueError(
                f"{path} holds ids outside the table: {np.unique(pred[outside]).tolist()}; "
                f"expected 0..{k - 1}, one of {k} clusters or classes for every pixel{gaps}"
            )
        if pred.shape != label.shape and pred.shape == label.shape[::-1]:
            raise ValueError(f"{path} is {pred.shape}, the annotation {label.shape}: it lies on its side")
        histogram = Histogram(k, self.gaps)
        histogram.update(self.protocol.prediction(pred, label.shape), self.protocol.label(label))
        return histogram


def _required(label: np.ndarray | None, dataset: Any, index: int) -> np.ndarray:
    if label is None:
        raise ValueError(f"image {_name(dataset, index)} of {dataset.name!r} has no label to score against")
    return label


def _readable(items: list[tuple], dataset: Any, skipped: list[Skip]) -> list:
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
        raise ValueError(
            "; ".join([f"data set {dataset.name!r} has no labels to score against", *getattr(dataset, "left_out", [])])
        )
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
    remarks: Sequence[str] = (),
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
        remarks: what the report must say about the network.

    Raises:
        ValueError: no labels, unknown ids in a label (the message names the file), or logits of another shape or that
            are infinite or NaN.
        FileNotFoundError: the protocol needs a curated list that has not been made.
    """
    protocol = _checked(dataset, protocol, batch, workers)
    indices, curated = _indices(dataset, protocol)
    share = distributed.shard(len(indices))
    work = _Work(indices[share.start : share.stop], _ReadImage(dataset, protocol))
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
        if not logits.isfinite().all():
            raise ValueError("the network's logits are infinite or NaN; there is no score")
        start = 0
        for size, run in itertools.groupby(label.shape for _, label in good):  # images of one size at once
            end = start + len(list(run))
            predicted = upsampled_labels(logits[start:end], size).cpu().numpy()
            for pred, (_, label) in zip(predicted, good[start:end], strict=True):
                histogram.update(pred, label)
            start = end
    remarks = [*getattr(dataset, "left_out", []), *remarks]
    return _report(dataset, protocol, curated, len(indices), histogram, skipped, [], method, True, remarks)


def evaluate_predictions(
    folder: str | Path,
    dataset: Any,
    protocol: Protocol | str,
    *,
    match: bool = True,
    allow_missing: bool = False,
    predicted_255: Predicted255 = "refuse",
    batch: int = 16,
    workers: int = 0,
    progress: bool = False,
    method: str | None = None,
) -> Report:
    """Score a folder of predicted masks, of whatever method.

    Args:
        folder: PNG files, palette or 8-bit grey, with ids 0..K-1 as pixels, named as the images (the folder before the
            name may be left out or be another where that leaves no doubt); of the annotation's size, of the
            protocol's, or of any other size, which is taken as a mask of the whole image.
        dataset: a validation set with labels.
        protocol: how to score.
        match: ids are clusters, to be matched to classes; otherwise they are class ids.
        allow_missing: score the images that have a prediction when others have none; the report lists those.
        predicted_255: what 255 in a prediction means where the label is a class: `refuse` is an error, `ignore` leaves
            the pixel out of the score, `wrong` counts it as a miss; the report says how many there were.
        batch: images read at a time.
        workers: processes that decode masks.
        progress: show a progress bar on rank 0.
        method: name of the row in the report; the folder's name if unset.

    Raises:
        FileNotFoundError: no folder, or images without a prediction (the first few and their number).
        ValueError: ids outside the table, a prediction that two images could mean, or the reverse; the message names
            the files.
    """
    protocol = _checked(dataset, protocol, batch, workers)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of predictions {folder}")
    indices, curated = _indices(dataset, protocol)
    files, remarks = _predictions(folder, dataset)
    missing = [_name(dataset, index) for index in indices if index not in files]
    if missing and (not allow_missing or len(missing) == len(indices)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(indices)} images of {dataset.name} val have no prediction in {folder}: "
            f"{few([f'{name}.png' for name in missing])}. Predictions are PNG files named as the images; "
            "--allow-missing scores the others" + "".join(f"; {remark}" for remark in remarks)
        )
    scored = [index for index in indices if index in files]
    share = distributed.shard(len(scored))
    work = _Work(scored[share.start : share.stop], _CountMasks(dataset, protocol, files, predicted_255 != "refuse"))
    histogram = Histogram(dataset.num_classes, gaps=predicted_255 != "refuse")
    skipped: list[Skip] = []
    for items in _batches(work, batch, workers, progress):
        for part in _readable(items, dataset, skipped):
            histogram.add(part)
    name = method or folder.resolve().name
    remarks += getattr(dataset, "left_out", [])
    return _report(
        dataset, protocol, curated, len(indices), histogram, skipped, missing, name, match, remarks, predicted_255
    )


def _predictions(folder: Path, dataset: Any) -> tuple[dict[int, Path], list[str]]:
    """Return the prediction of every image that has one, and what was left out of the folder.

    Raises:
        ValueError: an image has several, or a prediction several images.
    """
    listing = list_files(folder, (".png",))
    found = by_stem(listing.files, folder, "predictions")
    images = dataset.images if hasattr(dataset, "images") else len(dataset)
    names = [_name(dataset, index) for index in range(images)]
    elsewhere = defaultdict(list)  # last part of the name -> predictions that no image is named as
    for stem in found.keys() - set(names):
        elsewhere[Path(stem).name].append(stem)
    chosen = {index: [n] if n in found else sorted(elsewhere[Path(n).name]) for index, n in enumerate(names)}
    users = Counter(stem for stems in chosen.values() for stem in stems)
    doubts = [(names[index], stems) for index, stems in chosen.items() if len(stems) > 1]
    if doubts:
        several = [f"{name}: {few([found[stem] for stem in stems])}" for name, stems in doubts]
        raise ValueError(f"{len(doubts)} images have several predictions in {folder}: {few(several, 3)}")
    shared = [stem for stem, count in users.items() if count > 1]
    if shared:
        several = [f"{found[stem]}: {few([names[i] for i, s in chosen.items() if stem in s])}" for stem in shared[:3]]
        raise ValueError(
            f"{len(shared)} predictions in {folder} have a name that several images share: {few(several, 3)}; expected "
            "them in folders as the images"
        )
    unused = sorted(file for stem, file in found.items() if stem not in users)
    notes = listing.notes() + (
        [f"left out of {folder}: {len(unused)} of no image ({few(unused, 3)})"] if unused else []
    )
    return {index: folder / found[stems[0]] for index, stems in chosen.items() if stems}, notes


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
    remarks: Sequence[str],
    predicted_255: Predicted255 = "refuse",
) -> Report:
    skipped = list(itertools.chain.from_iterable(distributed.gather_objects(skipped)))
    things = things_of(dataset)
    kinds = ["thing" if thing else "stuff" for thing in things]
    if dataset.things_only:
        kinds[0] = "background"
    if len(skipped) + len(missing) == wanted:
        raise ValueError(f"none of {wanted} images could be scored: {few([skip.reason for skip in skipped])}")
    whole = histogram.reduce()
    counted = whole.counts.sum(1)
    gaps, ignored = int(whole.unpredicted.sum()), int(whole.ignored.sum())
    return Report(
        method=method,
        dataset=dataset.name,
        classes=list(dataset.classes),
        kinds=kinds,
        labels_from=getattr(dataset, "labels_from", None) or "the data set itself",
        protocol=protocol,
        conditions=protocol.describe(curated),
        scores=scores(
            whole.counts,
            match=match,
            things=things,
            unpredicted=whole.unpredicted if predicted_255 == "wrong" else None,
        ),
        images=wanted - len(skipped) - len(missing),
        wanted=wanted,
        skipped=skipped,
        missing=missing,
        partial=getattr(dataset, "total", 0) > getattr(dataset, "images", 0),
        matched=match,
        ignored=ignored / max(1, ignored + gaps + int(counted.sum())),
        official=OFFICIAL_CURATED if curated else SPLIT_IMAGES.get(dataset.name, {}).get("val"),
        remarks=[*_pixel_remarks(dataset, counted + whole.unpredicted, gaps, predicted_255), *remarks],
    )


def _pixel_remarks(dataset: Any, labelled: np.ndarray, gaps: int, predicted_255: Predicted255) -> list[str]:
    """Return what a reader must know about the pixels; `labelled` counts them by the class of their label."""
    remarks = []
    occur = [dataset.classes[k] for k in np.flatnonzero(labelled)]
    if len(occur) < min(2, dataset.num_classes):
        remarks.append(
            f"the labels hold {few(occur) or 'no class'} alone of {dataset.num_classes} classes: no real score"
        )
    if gaps:
        what = {"ignore": "not in the score", "wrong": "counted as misses"}[predicted_255]
        remarks.append(f"{100 * gaps / labelled.sum():.1f} % of the labelled pixels are 255 in the prediction: {what}")
    return remarks
