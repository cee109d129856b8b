"""The baselines of the embedded data set, by hand and against each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dmsa import data
from dmsa.config import load_preset
from dmsa.models.encoder import build_encoder
from dmsa.scoring.baselines import (
    cam_labels,
    cluster_patches,
    patch_features,
    score_labels,
    untrained_rows,
)
from dmsa.scoring.boundary import BoundaryScore, boundaries
from dmsa.training import session
from dmsa.training.session import train
from tests.dmsa.runs import tiny_config


@pytest.fixture(scope="module")
def setting():
    preset = load_preset("shapes")
    config = dataclasses.replace(preset, data=dataclasses.replace(preset.data, size=64, crop=64, val_images=6))
    dataset = data.build(config.data, "val", 0)
    encoder = build_encoder("shapes_vit_tiny")
    centroids = torch.randn(6, encoder.embed_dim, generator=torch.Generator().manual_seed(0))
    return config, dataset, encoder, centroids


def test_boundaries_by_hand():
    label = torch.tensor([[[0, 0, 1], [0, 0, 1], [2, 2, 2]]])
    wanted = [[False, True, False], [True, True, True], [False, False, False]]
    assert boundaries(label)[0].tolist() == wanted


def test_boundary_score_by_hand():
    label = torch.zeros(1, 12, 12, dtype=torch.int64)
    label[:, :, 6:] = 1
    same, near, far = (BoundaryScore(tolerance=2) for _ in range(3))
    same.update(label + 3, label)  # names of classes do not matter
    assert same.value == 100
    near.update(label.roll(2, 2).index_fill(2, torch.tensor([0, 1]), 0), label)
    assert near.value == 100
    far.update(label.roll(3, 2).index_fill(2, torch.tensor([0, 1, 2]), 0), label)
    assert far.value == 0
    nothing = BoundaryScore()
    nothing.update(torch.zeros_like(label), label)
    assert nothing.value == 0
    # One true line and one false: precision 1/2, recall 1.
    doubled = BoundaryScore(tolerance=1)
    predicted = label.clone()
    predicted[:, :, :2] = 2
    doubled.update(predicted, label)
    assert doubled.value == pytest.approx(100 * 2 * 0.5 / 1.5)
    with pytest.raises(ValueError, match="tolerance=-1"):
        BoundaryScore(-1)


def test_perfect_labels_score_100_under_any_names(setting):
    _, dataset, _, _ = setting
    truth = torch.stack([dataset[i]["label"] for i in range(len(dataset))])
    shuffled = torch.tensor([3, 0, 5, 1, 6, 2, 4])[truth]
    found, border = score_labels(dataset, shuffled, 7)
    assert found.miou == found.accuracy == 1
    assert border == 100


def test_cluster_patches_finds_separate_groups():
    features = torch.zeros(2, 4, 4, 3)
    features[:, :, 2:] = torch.tensor([5.0, 0, 0])
    maps = cluster_patches(features, 2, 8, seed=0)
    assert maps.shape == (2, 8, 8)
    assert len(maps[:, :, :4].unique()) == len(maps[:, :, 4:].unique()) == 1
    assert maps[0, 0, 0] != maps[0, 0, 7]


def test_rows_are_complete_and_reproducible(setting):
    config, dataset, encoder, centroids = setting
    rows = untrained_rows(config, dataset, encoder, centroids)
    again = untrained_rows(config, dataset, encoder, centroids)
    assert rows == again
    assert [row["method"].split(",")[0] for row in rows] == [
        "all background",
        "k-means on patch colours",
        "k-means on patch features",
        "k-means on patch features",
        "CAM labels before PAR",
        "CAM labels after PAR",
    ]
    truth = np.stack([dataset[i]["label"].numpy() for i in range(len(dataset))])
    assert rows[0]["accuracy"] == pytest.approx(100 * (truth == 0).mean())
    assert rows[3]["miou"] > rows[2]["miou"] > 0
    assert all(0 <= row[key] <= 100 for row in rows for key in ("miou", "accuracy", "boundary"))


def test_cam_labels_leave_the_generator_and_the_grid_alone(setting):
    config, dataset, encoder, centroids = setting
    state = torch.get_rng_state()
    labels = cam_labels(dataset, encoder, centroids, config, "on")
    assert torch.equal(torch.get_rng_state(), state)
    assert labels.shape == (6, 64, 64)
    assert labels.min() >= 0
    assert labels.max() <= 6


@pytest.mark.slow
def test_dmsa_plus_starts_from_better_labels_than_the_clusterings():
    from dmsa.config import resolve_method
    from dmsa.labels.clustering import cluster
    from dmsa.labels.feature_bank import build_feature_bank

    preset = load_preset("shapes")
    config = dataclasses.replace(
        preset, data=dataclasses.replace(preset.data, train_images=48, val_images=24, workers=0)
    )
    encoder = build_encoder("shapes_vit_tiny")
    train, val = (data.build(config.data, split, 5) for split in ("train", "val"))
    best = {}
    for method in ("dmsa", "dmsa_plus"):
        resolved = resolve_method(dataclasses.replace(config, method=method))
        centroids = cluster(build_feature_bank(encoder, train, resolved), 6, 0).vectors
        labels = cam_labels(val, encoder, centroids, resolved, "on")
        best[method] = score_labels(val, labels, 7)[0].miou
    clusters = cluster_patches(patch_features(val, encoder), 7, 96, seed=0)
    assert best["dmsa_plus"] > best["dmsa"] > 0.4
    assert best["dmsa_plus"] > score_labels(val, clusters, 7)[0].miou


def test_a_finished_run_is_compared_once_and_both_reports_say_so(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(session, "untrained_rows", lambda *parts: made.append(parts) or untrained_rows(*parts))
    train(tiny_config(tmp_path / "run", epochs=1, baselines=True), ["train.py"])
    own, twin = ((tmp_path / name / "report.md").read_text() for name in ("run", "run/transfgu"))
    assert len(made) == 1
    assert own.startswith("# DMSA on shapes")
    assert twin.startswith("# TransFGU")
    for report in (own, twin):
        assert "All 1 epochs are done" in report
        assert "| k-means on patch features, this backbone |" in report
    assert "| transfgu (best epoch) |" in own
    assert "| transfgu (best epoch) |" not in twin
