"""`benchmarks.learning`: variants, replaced labels, what is counted, and a short run that is the trainer's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.learning import copied, learn, main, parse_variant, shuffled, token_labels
from dmsa import data
from dmsa.config import from_dict, load_preset, resolve_method
from dmsa.models.encoder import build_encoder
from dmsa.scoring.baselines import cluster_patches, patch_features, score_labels
from dmsa.training.session import train
from tests.dmsa.runs import tiny_config


def test_a_variant_is_a_method_and_options():
    base = load_preset("shapes")
    config, answers = parse_variant("transfgu:train.lr=3e-4:labels.par_dilations=[1, 2]:answers=truth", base)
    expected = resolve_method(dataclasses.replace(base, method="transfgu"))
    assert config.train.lr == 3e-4
    assert dataclasses.replace(config, train=base.train) == dataclasses.replace(expected, labels=config.labels)
    assert answers == "truth"
    assert parse_variant("dmsa", base) == (base, "labels")
    for wrong in (
        "dmso",
        "dmsa:train.lr",
        "dmsa:train.lrr=1",
        "dmsa:answers=no",
        "dmsa:train.lr=-1",
        "dmsa:labels.bank_crop=24",
    ):
        with pytest.raises(ValueError, match=wrong.partition(":")[2].partition("=")[0] or "method"):
            parse_variant(wrong, base)


def test_shuffled_labels_keep_the_confusion_and_lose_the_place():
    truth = torch.arange(3).view(1, 3, 1).expand(4, 3, 900).contiguous()
    label = truth.clone()
    label[:, 1, :300] = 2  # a third of class 1, all in one place
    drawn = shuffled(label, truth, 3, torch.Generator().manual_seed(0))
    assert (drawn[:, ::2] == truth[:, ::2]).all()
    for place in (slice(0, 300), slice(300, 900)):
        assert (drawn[:, 1, place] == 2).float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_copied_counts_objects_taken_for_others():
    truth = torch.tensor([1, 1, 1, 1, 0, 2])
    label = torch.tensor([2, 2, 0, 1, 2, 2])
    assert copied(torch.tensor([2, 1, 0, 1, 2, 2]), label, truth).tolist() == [1, 2]
    assert copied(torch.tensor([2, 2]), torch.tensor([2, 2]), torch.tensor([255, 1])).tolist() == [1, 1]


def test_token_labels_are_majorities():
    label = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, 0]]])
    assert token_labels(label, (1, 2), 3).tolist() == [[[1, 2]]]
    unknown = torch.tensor([[[255, 255, 255, 0], [255, 255, 255, 255]]])
    assert token_labels(unknown, (1, 2), 3).tolist() == [[[255, 0]]]


def test_shuffled_labels_stay_where_the_truth_is_unknown():
    truth = torch.tensor([[[0, 0, 255, 255, 1]]])
    label = torch.tensor([[[1, 1, 0, 1, 0]]])
    assert shuffled(label, truth, 2, torch.Generator().manual_seed(0)).tolist() == label.tolist()


@pytest.mark.slow
def test_scores_are_those_of_the_trainer(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=2)
    trained = train(config)["scores"]
    names = ["dmsa", "dmsa:answers=shuffled"]
    found = list(learn(names, config, every=2, cache=tmp_path / "cache", both=True))
    assert [(name, epoch, step) for name, epoch, step, _ in found] == [
        *((f"{name}, labels", 0, 0) for name in names),
        *((f"{name}{how}", epoch, 2 * epoch) for epoch in (1, 2) for name in names for how in ("", ", refined")),
    ]
    for entry, (_, _, _, figures) in zip(trained, found[2::4], strict=True):
        assert figures["miou"] == pytest.approx(100 * entry["miou"], abs=1e-3)
        assert figures["accuracy"] == pytest.approx(100 * entry["accuracy"], abs=1e-3)
        wrong = figures["lost"] + figures["invented"] + figures["mixed up"]
        assert wrong == pytest.approx(100 - figures["accuracy"], abs=1e-3)
        assert figures["wrong near borders"] + figures["wrong elsewhere"] == pytest.approx(wrong, abs=1e-3)
    plain, refined = found[-2][3], found[-1][3]
    assert plain["copied val"] == refined["copied val"]


@pytest.mark.slow
def test_an_average_is_measured_as_the_trainer_scores_it(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=2, batch=4)
    model = {"weights": None, "teacher": "ema", "refine": "par"}  # random weights predict one class
    config = from_dict({"model": model, "labels": {"background_threshold": 0.8}}, base=config)
    trained = train(config)["scores"]
    clusters, *found = learn(["dmsa"], config, every=4, cache=tmp_path / "cache", both=True, clusters=True)
    val, encoder = data.build(config.data, "val", 0), build_encoder(config.model.encoder, None)
    expected, border = score_labels(val, cluster_patches(patch_features(val, encoder), 7, 48, 0), 7)
    assert clusters[3]["miou"] == pytest.approx(100 * expected.miou)
    assert clusters[3]["boundary"] == pytest.approx(border)
    for entry, (_, _, _, own), (name, _, _, other) in zip(trained, found[1::2], found[2::2], strict=True):
        assert own["miou"] == pytest.approx(100 * entry["miou"], abs=1e-3)
        assert name == "dmsa, not refined"
        assert abs(own["miou"] - other["miou"]) > 0.1


def test_bad_variant_is_one_line(capsys):
    assert main(["dmsa:answers=no"]) == 2
    assert "answers=no" in capsys.readouterr().err
