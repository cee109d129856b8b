"""Cluster centroids of the feature bank: the classes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dmsa import distributed
from dmsa.config import Config
from dmsa.labels.cache import content_key, load_arrays, save_arrays
from dmsa.labels.feature_bank import FeatureBank, bank_identity, build_feature_bank
from dmsa.models.encoder import Encoder

EXACT_LIMIT = 200_000
"""Up to so many features, k-means sees all of them in every iteration; beyond, batches of them."""


@dataclass(frozen=True)
class Centroids:
    """One direction per class: things first, then stuff."""

    vectors: Tensor
    """float32 [K, D], K = n_things + n_stuff, not normalised."""
    n_things: int
    n_stuff: int
    provenance: dict[str, Any] = field(default_factory=dict)
    """Encoder weights, data set, crops, seed."""

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file; it is complete whenever it exists."""
        save_arrays(
            Path(path),
            vectors=self.vectors.numpy(),
            counts=np.array([self.n_things, self.n_stuff]),
            provenance=np.array(json.dumps(self.provenance, sort_keys=True)),
        )

    @classmethod
    def load(cls, path: str | Path) -> Centroids:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file holds something else.
        """
        arrays = load_arrays(Path(path))
        if set(arrays) != {"vectors", "counts", "provenance"}:
            raise ValueError(f"{path} holds {sorted(arrays)}, not centroids")
        try:
            n_things, n_stuff = map(int, arrays["counts"])
            provenance = json.loads(str(arrays["provenance"]))
            return cls(torch.from_numpy(arrays["vectors"]), n_things, n_stuff, provenance)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no centroids: {error}") from error


def cluster(bank: FeatureBank, n_things: int, n_stuff: int, seed: int = 0) -> Centroids:
    """Cluster the foreground into things and the background into stuff, by k-means (L2, scikit-learn).

    Args:
        bank: from `build_feature_bank`.
        n_things: clusters of the foreground crops.
        n_stuff: clusters of the background crops; 0 for data sets of things.
        seed: of the initial centres. The result is the same on every run of the same machine.

    Raises:
        ValueError: fewer crops than clusters, or crops with NaN or infinite features.
    """
    groups = (("foreground", bank.foreground, n_things), ("background", bank.background, n_stuff))
    for name, features, count in groups:
        if count < 0:
            raise ValueError(f"{count} clusters of {name} crops asked for; expected at least 0")
        if len(features) < count:
            raise ValueError(
                f"the feature bank has {len(features)} {name} crops, too few for {count} clusters; "
                "use more images (`--labels.bank-images`, `--data.train-images`) or smaller scales"
            )
        if not np.isfinite(features).all():
            raise ValueError(f"the {name} crops have features that are not finite; are the encoder's weights sound?")
    vectors = [_centres(features, count, seed) for _, features, count in groups if count]
    if not vectors:
        raise ValueError(f"{n_things=} and {n_stuff=}: no class to find")
    provenance = {**bank.provenance, "n_things": n_things, "n_stuff": n_stuff, "seed": seed}
    return Centroids(torch.from_numpy(np.concatenate(vectors)), n_things, n_stuff, provenance)


def prepare_centroids(
    encoder: Encoder, dataset: Any, config: Config, cache_dir: str | Path, *, batch: int | None = None
) -> Centroids:
    """Build the feature bank and cluster it, or read the centroids of an earlier run with the same content key.

    In a distributed run all processes call this: the crops are shared out, rank 0 clusters, and every process gets the
    same centroids; if rank 0 fails, all of them raise.

    Args:
        encoder: on the device where it is to run.
        dataset: the training images; see `build_feature_bank`.
        config: reads `data`, `labels` and `train.seed`.
        cache_dir: folder for the feature bank's parts and the centroids; shared or not between hosts.
        batch: crops per forward pass; see `build_feature_bank`.
    """
    n_things, seed = dataset.n_things, config.train.seed
    n_stuff = 0 if dataset.things_only else dataset.n_stuff
    key = content_key(**bank_identity(encoder, dataset, config), n_things=n_things, n_stuff=n_stuff, seed=seed)
    path = Path(cache_dir) / f"centroids-{key}.npz"
    known = distributed.on_main(lambda: Centroids.load(path) if path.is_file() else None)
    if known is not None:
        return known
    bank = build_feature_bank(encoder, dataset, config, cache_dir, batch=batch)

    def make() -> Centroids:
        centroids = cluster(cast(FeatureBank, bank), n_things, n_stuff, seed)  # rank 0 has it, and makes them
        centroids.save(path)
        return centroids

    return distributed.on_main(make)


def _centres(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    if len(features) <= EXACT_LIMIT:
        kmeans = KMeans(count, n_init=4, random_state=seed)
    else:
        kmeans = MiniBatchKMeans(count, n_init=4, batch_size=16384, random_state=seed)
    # one OpenMP thread: with more, partial sums are added in the order in which threads finish
    with threadpool_limits(1, user_api="openmp"):
        return kmeans.fit(features).cluster_centers_.astype(np.float32)
