"""Scores of unsupervised segmentation: one int64 histogram, one Hungarian match over the whole set, mIoU, accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
PIXELS_AT_ONCE = 2**22


def _to_numpy(ids: np.ndarray | Tensor) -> np.ndarray:
    return ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)


class Histogram:
    """Counts pixels by (label, prediction); memory is `num_classes`^2 whatever the number of images.

    Integer counts make the result independent of the order, the batch size and the number of processes.

    Attributes:
        num_classes: K.
        counts: int64 `[K, K]`, this process's pixels; rows are labels, columns predictions.
        unpredicted: int64 `[K]`, by label: pixels whose prediction is 255, in none of `counts`.
        ignored: int64 `[1]`, pixels whose label is 255.

    Args:
        num_classes: classes, background included, 1..254 (masks are 8 bit and 255 means ignore).
        gaps: predictions may be 255 where the label is not.

    Raises:
        ValueError: `num_classes` is out of range.
    """

    def __init__(self, num_classes: int, gaps: bool = False) -> None:
        if not 1 <= num_classes <= 254:
            raise ValueError(f"expected 1..254 classes (8-bit masks, 255 = ignore), got {num_classes=}")
        self.num_classes, self.gaps = num_classes, gaps
        self._all = np.zeros(num_classes**2 + num_classes + 1, dtype=np.int64)  # one array, to be reduced at once
        pairs, self.unpredicted, self.ignored = np.split(self._all, [num_classes**2, num_classes**2 + num_classes])
        self.counts = pairs.reshape(num_classes, num_classes)
        # Label -> offset of its row; 255 goes to one extra row, ids that do not exist to another.
        rows = np.full(256, num_classes + 1)
        rows[:num_classes] = np.arange(num_classes)
        rows[IGNORE] = num_classes
        self._row = (rows * num_classes).astype(np.uint16)

    def update(self, pred: np.ndarray | Tensor, label: np.ndarray | Tensor) -> None:
        """Count the pixels of one or many images.

        Args:
            pred: ids 0..K-1, any shape and integer dtype; without `gaps`, 255 only where the label is 255.
            label: ids 0..K-1 or 255 (not counted), of the same shape.

        Raises:
            ValueError: shapes differ or ids are out of range; nothing is counted then.
            TypeError: `pred` or `label` is not of integers.
        """
        pred, label = _to_numpy(pred), _to_numpy(label)
        for name, ids in (("pred", pred), ("label", label)):
            if ids.dtype.kind not in "iub":
                raise TypeError(f"expected integer class ids, got {name}.dtype={ids.dtype}")
        if pred.shape != label.shape:
            raise ValueError(f"expected the same shape, got {pred.shape=} {label.shape=}")
        pred, label = (self._bytes(name, ids) for name, ids in (("pred", pred), ("label", label)))
        k = self.num_classes
        unpredicted = np.zeros(256, dtype=np.int64)
        pairs = self._row[label]
        if pred.size and pred.max() >= k:
            gap = (pred == IGNORE) & (label != IGNORE)
            outside = (pred >= k) & (pred != IGNORE) if self.gaps else ((pred >= k) & (pred != IGNORE)) | gap
            if outside.any():
                raise ValueError(f"pred has ids {np.unique(pred[outside]).tolist()}; expected 0..{k - 1}")
            unpredicted = np.bincount(label[gap], minlength=256)
            pairs[gap] = self._row[IGNORE]
            pred = np.where(pred == IGNORE, 0, pred)
        pairs += pred
        flat, counts = pairs.ravel(), np.zeros((k + 2) * k, dtype=np.int64)
        for start in range(0, flat.size, PIXELS_AT_ONCE):  # bincount makes 8 bytes of every pixel
            counts += np.bincount(flat[start : start + PIXELS_AT_ONCE], minlength=len(counts))
        if counts[(k + 1) * k :].any() or unpredicted[k:IGNORE].any():
            wrong = np.unique(label[(label >= k) & (label != IGNORE)]).tolist()
            raise ValueError(f"label has ids {wrong}; expected 0..{k - 1}, or 255 for pixels to ignore")
        self.counts += counts[: k * k].reshape(k, k)
        self.unpredicted += unpredicted[:k]
        self.ignored += counts[k * k : (k + 1) * k].sum() - unpredicted.sum()

    @staticmethod
    def _bytes(name: str, ids: np.ndarray) -> np.ndarray:
        if ids.dtype == np.uint8:
            return ids
        if ids.size and (ids.min() < 0 or ids.max() > 255):
            raise ValueError(f"{name} has ids {ids.min()}..{ids.max()}; expected 0..255")
        return ids.astype(np.uint8)

    def add(self, other: Histogram) -> None:
        """Count the pixels of another histogram of the same classes too."""
        self._all += other._all

    def reduce(self) -> Histogram:
        """Return the histogram of all processes' pixels; this one stays as it is."""
        whole = Histogram(self.num_classes, self.gaps)
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            whole._all[:] = self._all
            return whole
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(self._all, device=device)
        dist.all_reduce(total)
        whole._all[:] = total.cpu().numpy()
        return whole


@dataclass(frozen=True)
class Scores:
    """Scores as fractions (0..1); a mean over nothing is NaN."""

    miou: float
    """Mean of `iou` over the classes that occur."""
    accuracy: float
    """Pixels whose matched prediction equals the label, as a fraction of the pixels with a label."""
    iou: np.ndarray
    """float64 `[K]` in the order of the classes; NaN for a class that is neither in a label nor predicted."""
    assignment: np.ndarray
    """int64 `[K]`: the predicted id (cluster) that stands for every class."""
    things: float
    """Mean of `iou` over the things; NaN if the kinds were not given."""
    stuff: float
    """Mean of `iou` over the rest (for data sets of things: the background)."""
    confusion: np.ndarray
    """int64 `[K, K]`: the histogram with its columns in the order of the classes."""


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def scores(
    hist: np.ndarray,
    match: bool = True,
    things: np.ndarray | None = None,
    unpredicted: np.ndarray | None = None,
) -> Scores:
    """Return the scores of a histogram.

    IoU_k = TP / (TP + FP + FN); mIoU is the nanmean in the order of the classes, accuracy = trace / total (TransFGU,
    `utils/metric.py`). With `match`, the columns are first permuted so that the trace is largest: one Hungarian match
    over the whole set, background included.

    Args:
        hist: integers `[K, K]`, rows labels, columns predictions, from :class:`Histogram`.
        match: predictions are clusters; otherwise they are taken as class ids.
        things: bool `[K]`, which classes are things.
        unpredicted: int64 `[K]`, by label: pixels without a prediction that count as wrong.

    Raises:
        ValueError: `hist` is not square, has negative counts or is not of integers; `things` has another length.
    """
    hist = np.asarray(hist)
    if hist.ndim != 2 or hist.shape[0] != hist.shape[1] or hist.dtype.kind not in "iu" or (hist < 0).any():
        raise ValueError(f"expected counts [K, K] of integers >= 0, got {hist.shape=} {hist.dtype=}")
    hist = hist.astype(np.int64)
    if things is not None and np.shape(things) != hist.shape[:1]:
        raise ValueError(f"expected one bool a class, got {np.shape(things)=} for {len(hist)} classes")
    assignment = np.arange(len(hist))
    if match:
        from scipy.optimize import linear_sum_assignment

        assignment = linear_sum_assignment(hist, maximize=True)[1].astype(np.int64)
    confusion = hist[:, assignment]
    correct = np.diagonal(confusion)
    gaps = np.zeros(len(hist), dtype=np.int64) if unpredicted is None else np.asarray(unpredicted)
    union = confusion.sum(0) + confusion.sum(1) - correct + gaps
    iou = np.full(len(hist), np.nan)
    np.divide(correct, union, out=iou, where=union > 0)
    total = int(confusion.sum() + gaps.sum())
    is_thing = None if things is None else np.asarray(things, dtype=bool)
    return Scores(
        miou=_mean(iou),
        accuracy=int(correct.sum()) / total if total else float("nan"),
        iou=iou,
        assignment=assignment,
        things=float("nan") if is_thing is None else _mean(iou[is_thing]),
        stuff=float("nan") if is_thing is None else _mean(iou[~is_thing]),
        confusion=confusion,
    )


def things_of(dataset: Any) -> np.ndarray:
    """Return which classes of a data set are things, bool `[K]`; needs `num_classes`, `n_things`, `things_only`."""
    first = int(dataset.things_only)
    kinds = np.zeros(dataset.num_classes, dtype=bool)
    kinds[first : first + dataset.n_things] = True
    return kinds
