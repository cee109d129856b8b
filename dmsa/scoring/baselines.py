"""What a score on the embedded data set is worth: baselines that need no training, and the labels before training.

All background; k-means on patch colours and on the patch features of the untrained and of the given backbone; the
labels that the class activation map gives before and after the refinement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa.config import Config
from dmsa.data.base import IGNORE
from dmsa.labels.cam import CAMS
from dmsa.labels.fuse import fuse, refine_scores
from dmsa.models.encoder import Encoder, build_encoder
from dmsa.scoring.boundary import TOLERANCE, BoundaryScore
from dmsa.scoring.metrics import Histogram, Scores, scores

BATCH = 16


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
def cam_labels(dataset: Any, encoder: Encoder, centroids: Tensor, config: Config, par: Literal["on", "off"]) -> Tensor:
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
