"""Centroids: known clusters are found, files round-trip, too few crops are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmsa.labels.clustering import Centroids, cluster, prepare_centroids
from dmsa.labels.feature_bank import FeatureBank
from tests.dmsa.test_feature_bank import CONFIG, Pictures
from tests.dmsa.tiny import tiny_encoder


def bank(foreground: int = 60, background: int = 40) -> FeatureBank:
    """Tight groups around 3 foreground and 2 background corners of a cube."""
    random = np.random.default_rng(0)
    corners = 10 * np.eye(8, dtype=np.float32)
    noise = random.normal(0, 0.1, (foreground + background, 8)).astype(np.float32)
    fore = corners[np.arange(foreground) % 3] + noise[:foreground]
    back = corners[3 + np.arange(background) % 2] + noise[foreground:]
    return FeatureBank(fore, back, np.arange(foreground), np.arange(background), {"encoder": "none"})


def test_things_come_from_the_foreground_and_stuff_from_the_background():
    found = cluster(bank(), 3, 2, seed=1)
    assert found.vectors.shape == (5, 8)
    assert found.vectors.dtype == torch.float32
    assert sorted(found.vectors[:3].argmax(1).tolist()) == [0, 1, 2]
    assert sorted(found.vectors[3:].argmax(1).tolist()) == [3, 4]
    nearest = torch.from_numpy(bank().foreground[::3]).mean(0)
    torch.testing.assert_close(found.vectors[found.vectors.argmax(1) == 0][0], nearest, atol=1e-4, rtol=1e-4)
    assert found.provenance == {"encoder": "none", "n_things": 3, "n_stuff": 2, "seed": 1}


def test_same_seed_same_centroids():
    assert torch.equal(cluster(bank(), 3, 0, seed=4).vectors, cluster(bank(), 3, 0, seed=4).vectors)


def test_large_banks_are_clustered_in_batches(monkeypatch):
    monkeypatch.setattr("dmsa.labels.clustering.EXACT_LIMIT", 50)
    assert sorted(cluster(bank(), 3, 2).vectors.argmax(1).tolist()) == [0, 1, 2, 3, 4]


def test_file_round_trip(tmp_path):
    found = cluster(bank(), 3, 2)
    found.save(tmp_path / "centroids.npz")
    read = Centroids.load(tmp_path / "centroids.npz")
    assert torch.equal(read.vectors, found.vectors)
    assert (read.n_things, read.n_stuff, read.provenance) == (3, 2, found.provenance)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match=r"other\.npz holds \['a'\], not centroids"):
        Centroids.load(tmp_path / "other.npz")


def test_impossible_requests_are_named():
    with pytest.raises(ValueError, match="2 foreground crops, too few for 3 clusters"):
        cluster(bank(foreground=2), 3, 0)
    with pytest.raises(ValueError, match="0 background crops, too few for 1 clusters"):
        cluster(bank(background=0), 3, 1)
    with pytest.raises(ValueError, match="no class to find"):
        cluster(bank(), 0, 0)
    broken = bank()
    broken.foreground[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        cluster(broken, 3, 2)


def test_centroids_are_prepared_once(tmp_path, monkeypatch):
    encoder = tiny_encoder()
    first = prepare_centroids(encoder, Pictures(things_only=False), CONFIG, tmp_path)
    assert first.vectors.shape == (3, 48)
    monkeypatch.setattr("dmsa.labels.clustering.build_feature_bank", None)
    again = prepare_centroids(encoder, Pictures(things_only=False), CONFIG, tmp_path)
    assert torch.equal(first.vectors, again.vectors)
