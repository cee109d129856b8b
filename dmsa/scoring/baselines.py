"""What a score on the embedded data set is worth: baselines that need no training, and the labels before training.

A run on `shapes` ends with these rows in its report: all background; k-means on patch colours and on the patch
features of the untrained and of the given backbone; the labels that the class activation map gives before and after
the refinement; and TransFGU, trained with the run's own budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa.config import Config, resolve_method
from dmsa.data.base import IGNORE
from dmsa.labels.cam import CAMS
from dmsa.labels.fuse import fuse, refine_scores
from dmsa.models.encoder import Encoder, build_encoder
from dmsa.scoring.metrics import Histogram, Scores, scores

if TYPE_CHECKING:
    from dmsa.training.trainer import Trainer

TOLERANCE = 2
"""Pixels by which a boundary may be off in the boundary F-score."""
BATCH = 16


def boundaries(label: Tensor) -> Tensor:
    """Pixels whose right or lower neighbour has another class, bool ``[B, H, W]`` for ``label [B, H, W]``."""
    edge = torch.zeros_like(label, dtype=torch.bool)
    edge[:, :, :-1] |= label[:, :, 1:] != label[:, :, :-1]
    edge[:, :-1] |= label[:, 1:] != label[:, :-1]
    return edge


class BoundaryScore:
    """Boundary F-score of a set, whatever the classes are called: precision and recall of class borders.

    Args:
        tolerance: A border pixel counts as found if the other map has one within this many rows and columns.
    """

    def __init__(self, tolerance: int = TOLERANCE) -> None:
        if tolerance < 0:
            raise ValueError(f"{tolerance=}: expected a number of pixels, at least 0")
        self.tolerance = tolerance
        self.counts = np.zeros(4, dtype=np.int64)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Count the borders of class maps ``[B, H, W]``; names of classes do not matter."""
        found, wanted = boundaries(predicted), boundaries(label)
        near_found, near_wanted = self._widen(found), self._widen(wanted)
        hits = (found & near_wanted, found, wanted & near_found, wanted)
        self.counts += np.array([int(hit.sum()) for hit in hits])

    def _widen(self, edge: Tensor) -> Tensor:
        size = 2 * self.tolerance + 1
        return F.max_pool2d(edge[:, None].float(), size, stride=1, padding=self.tolerance)[:, 0] > 0

    @property
    def value(self) -> float:
        """F-score in percent; 0 where nothing is found."""
        hit, found, recalled, wanted = self.counts.tolist()
        precision, recall = hit / max(found, 1), recalled / max(wanted, 1)
        return 200 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def samples(dataset: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of a validation set: ``image``, ``guide``, ``label``."""
    for start in range(0, len(dataset), BATCH):
        chunk = [dataset[index] for index in range(start, min(start + BATCH, len(dataset)))]
        yield {key: torch.stack([sample[key] for sample in chunk]) for key in ("image", "guide", "label")}


def score_labels(dataset: Any, predicted: Tensor, num_classes: int) -> tuple[Scores, float]:
    """Scores (one match over the set) and boundary F-score of class maps.

    Args:
        dataset: Validation set.
        predicted: int64 ``[n, H, W]``, in the order of the set.
        num_classes: Number of classes, the background included.
    """
    histogram, border = Histogram(num_classes), BoundaryScore()
    start = 0
    for batch in samples(dataset):
        label = batch["label"]
        part = predicted[start : start + len(label)]
        start += len(label)
        histogram.update(part.where(label != IGNORE, IGNORE), label)
        border.update(part, label)
    return scores(histogram.counts), border.value


def patch_colours(dataset: Any, patch: int) -> Tensor:
    """Mean colour of every patch, ``[n, h, w, 3]``."""
    pooled = [F.avg_pool2d(batch["guide"], patch) for batch in samples(dataset)]
    return torch.cat(pooled).permute(0, 2, 3, 1)


@torch.no_grad()
def patch_features(dataset: Any, encoder: Encoder) -> Tensor:
    """Final patch tokens, of unit length, ``[n, h, w, D]``."""
    device = next(encoder.parameters()).device
    done = []
    for batch in samples(dataset):
        images = batch["image"].to(device)
        patches, _ = encoder(images)
        done.append(F.normalize(patches.float(), dim=-1).unflatten(1, encoder.grid(images)).cpu())
    return torch.cat(done)


def cluster_patches(features: Tensor, clusters: int, side: int, seed: int) -> Tensor:
    """k-means of ``[n, h, w, D]``, as class maps ``[n, side, side]`` (nearest neighbour)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    flat = features.flatten(0, 2).numpy()
    with threadpool_limits(1, user_api="openmp"):
        found = KMeans(clusters, n_init=3, random_state=seed).fit_predict(flat)
    maps = torch.from_numpy(found.astype(np.int64)).view(features.shape[:3])
    return F.interpolate(maps[:, None].float(), (side, side), mode="nearest")[:, 0].long()


@torch.no_grad()
def cam_labels(dataset: Any, encoder: Encoder, centroids: Tensor, config: Config, par: str) -> Tensor:
    """Labels that the class activation map alone gives, ``[n, H, W]``, refined by PAR (`par` = "on") or not."""
    device = next(encoder.parameters()).device
    labels = dataclasses.replace(config.labels, par=par, label_grid="pixels")
    done = []
    for batch in samples(dataset):
        attended = encoder.features(batch["image"].to(device))
        cam = CAMS[config.labels.cam](encoder, attended, centroids.to(device))
        fused = fuse(cam, None, dataset.things_only, config.labels.background_threshold)
        refined = refine_scores(fused, batch["guide"].to(device), labels)
        side = batch["label"].shape[-2:]
        done.append(F.interpolate(refined, side, mode="bilinear", align_corners=False).argmax(1).cpu())
    return torch.cat(done)


def untrained_rows(config: Config, dataset: Any, encoder: Encoder, centroids: Tensor) -> list[dict[str, Any]]:
    """Rows (a) all background, (b) clusterings, (c) labels of the class activation map.

    Args:
        config: The run.
        dataset: Validation set with labels.
        encoder: The run's backbone.
        centroids: ``[n_things + n_stuff, D]``.

    Returns:
        Rows with ``method``, ``miou`` and ``accuracy`` in percent, ``boundary`` (F-score in percent), ``protocol``,
        ``source``.
    """
    side, classes, seed = config.data.size, dataset.num_classes, config.train.seed
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    untrained = build_encoder(config.model.encoder, "random").to(next(encoder.parameters()).device)
    torch.set_rng_state(generator_state)

    def clustered(features: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: cluster_patches(features(), classes, side, seed)

    makers: dict[str, tuple[Callable[[], Tensor], str]] = {
        "all background": (lambda: torch.zeros(len(dataset), side, side, dtype=torch.int64), "no network"),
        "k-means on patch colours": (
            clustered(lambda: patch_colours(dataset, encoder.patch_size)),
            f"{classes} clusters",
        ),
        "k-means on patch features, untrained backbone": (
            clustered(lambda: patch_features(dataset, untrained)),
            f"{classes} clusters",
        ),
        "k-means on patch features, this backbone": (
            clustered(lambda: patch_features(dataset, encoder)),
            f"{classes} clusters",
        ),
        "CAM labels before PAR": (lambda: cam_labels(dataset, encoder, centroids, config, "off"), "no training"),
        "CAM labels after PAR": (lambda: cam_labels(dataset, encoder, centroids, config, "on"), "no training"),
    }
    rows = []
    for method, (make, source) in makers.items():
        found, border = score_labels(dataset, make(), classes)
        rows.append(
            {
                "method": method,
                "miou": 100 * found.miou,
                "accuracy": 100 * found.accuracy,
                "boundary": border,
                "protocol": "transfgu",
                "source": f"{source}; boundary F {border:.1f} within {TOLERANCE} px",
            }
        )
    return rows


def transfgu_row(config: Config, trainer: Trainer) -> dict[str, Any]:
    """Train TransFGU (pyramid, PAR and segmentation loss off) with the same data, seed and budget; return its row."""
    from dmsa.training.trainer import Trainer as Runner

    twin = resolve_method(dataclasses.replace(config, method="transfgu", out=str(Path(config.out) / "transfgu")))
    runner = Runner(twin, trainer.device, trainer.argv)
    try:
        best = runner.run()["best"]
    finally:
        runner.close()
    return {
        "method": "transfgu (best epoch)",
        "miou": 100 * best["miou"],
        "accuracy": 100 * best["accuracy"],
        "protocol": best["protocol"],
        "source": f"same budget, epoch {best['epoch'] + 1}",
    }


def score_baselines(config: Config, trainer: Trainer) -> list[dict[str, Any]]:
    """The rows that a finished run's report shows beside its own; for `train.baselines` only.

    All processes call this; the untrained rows are made by the first.
    """
    from dmsa import distributed

    if not config.train.baselines or getattr(trainer.val_data, "labels_from", None) is None:
        return []
    rows: list[dict[str, Any]] = []
    if distributed.is_main():
        rows = untrained_rows(config, trainer.val_data, trainer.encoder, trainer.centroids["vectors"])
    if config.method != "transfgu":
        rows.append(transfgu_row(config, trainer))
    return rows
