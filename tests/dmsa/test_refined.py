"""Predictions refined along the picture: where, and that every score says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from dmsa.commands import eval as eval_command
from dmsa.config import Config, load_preset, resolve_method
from dmsa.data import build
from dmsa.data.transforms import normalise
from dmsa.scoring.evaluate import evaluate
from dmsa.scoring.predictor import load_predictor
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.refined import refined, remarks
from dmsa.training.session import train
from tests.dmsa.runs import tiny_config


def with_refinement(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, refine="par"))


def test_refinement_follows_the_picture():
    config = load_preset("shapes")
    truth = (torch.arange(96) >= 36).long().expand(1, 96, 96)  # an edge inside a token of 8 pixels
    picture = normalise(torch.where(truth == 1, 220.0, 30.0)[:, None].expand(-1, 3, -1, -1))
    logits = 4 * F.one_hot(truth, 2).permute(0, 3, 1, 2).float()
    logits = F.adaptive_avg_pool2d(logits, 12) + torch.tensor([0.0, 0.6]).view(1, 2, 1, 1)

    def wrong(scores: torch.Tensor) -> int:
        enlarged = F.interpolate(scores, (96, 96), mode="bilinear", align_corners=False)
        return int((enlarged.argmax(1) != truth).sum())

    assert refined(logits, picture, config) is logits
    better = refined(logits, picture, with_refinement(config))
    assert better.shape == (1, 2, 48, 48)
    assert wrong(better) < 0.5 * wrong(logits)


def test_only_dmsa_plus_on_shapes_refines_by_itself():
    base = load_preset("shapes")
    on = {
        m: resolve_method(dataclasses.replace(base, method=m)).model.refine for m in ("dmsa", "transfgu", "dmsa_plus")
    }
    assert on == {"dmsa": "off", "transfgu": "off", "dmsa_plus": "par"}
    assert resolve_method(dataclasses.replace(load_preset("voc"), method="dmsa_plus")).model.refine == "off"
    assert remarks(base) == []


def test_a_run_says_it_and_eval_can_do_either(tmp_path, capsys):
    config = with_refinement(tiny_config(tmp_path / "run", epochs=1))
    (entry,) = train(config)["scores"]
    assert any("refined by PAR" in note for note in entry["notes"])
    images = torch.randn(1, 3, 48, 48)
    predictor = load_predictor(tmp_path / "run")
    assert predictor.predict(images).shape[-2:] == (24, 24)
    found = {}
    for how in ("par", "off"):
        words = ["--checkpoint", str(tmp_path / "run"), "--format", "json", "--workers", "0", "--refine", how]
        capsys.readouterr()
        assert eval_command.main(words) == 0
        found[how] = json.loads(capsys.readouterr().out)
    assert found["par"]["miou"] == pytest.approx(100 * entry["miou"], abs=1e-6)
    assert any("refined by PAR" in note for note in found["par"]["notes"])
    assert not any("refined by PAR" in note for note in found["off"]["notes"])
    with pytest.raises(ValueError, match="--refine"):
        eval_command.main(["--predictions", str(tmp_path), "--name", "shapes", "--refine", "par"])


def test_an_averaging_teacher_is_what_is_scored_and_used(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, teacher="ema", ema_momentum=0.5))
    scored = train(config)["scores"][-1]
    (tmp_path / "run/checkpoints/best.pt").unlink()
    predictor = load_predictor(tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    own = predictor.segmenter.trainable_state()
    assert all(torch.equal(own[key], value) for key, value in state["teacher"]["model"].items())
    assert not all(torch.equal(own[key], value) for key, value in state["student"].items())
    report = evaluate(predictor.predict, build(config.data, "val", config.train.seed), Protocol("transfgu", 48))
    assert report.scores.miou == pytest.approx(scored["miou"], abs=1e-9)
