import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dmsa import cli
from dmsa.commands import export as command
from dmsa.models import export
from dmsa.scoring.predictor import load_predictor
from dmsa.training.session import train
from dmsa_kernels import multi_dilation_dwconv
from tests.dmsa.runs import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("export") / "run"
    train(tiny_config(out, epochs=1), ["train.py"])
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    assert cli.main(["export", "--checkpoint", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def example(run):
    predictor = load_predictor(run)
    images = torch.randn(1, 3, 48, 48)
    logits = predictor.predict(images, (48, 48))[:, predictor.assignment]
    return images, logits


def test_files_that_are_there_stay_unless_forced(run, tmp_path, capsys):
    (tmp_path / "model.json").write_text("mine")
    command = ["export", "--checkpoint", str(run), "--out", str(tmp_path), "--formats", "safetensors"]
    assert cli.main(command) == 1
    assert "model.json: there already; --force replaces" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert cli.main([*command, "--force"]) == 0
    assert json.loads((tmp_path / "model.json").read_text())["classes"]


def test_files_and_facts(exported):
    names = {"model.safetensors", "model.pt2", "model.json"}
    if importlib.util.find_spec("onnx") is not None:
        names.add("model.onnx")
    assert {path.name for path in exported.iterdir()} == names
    facts = json.loads((exported / "model.json").read_text())
    assert facts["classes"][0] == "background"
    assert facts["rates"] == [1, 6, 12, 18]
    assert facts["mean"] == [0.485, 0.456, 0.406]
    assert len(facts["palette"]) == 7


def test_program_computes_the_same_without_our_operators(exported, example):
    program = torch.export.load(exported / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("dmsa" in target for target in targets)
    torch.testing.assert_close(program.module()(example[0]).detach(), example[1], atol=1e-4, rtol=0)


def test_weights_are_all_there(run, exported):
    with safe_open(exported / "model.safetensors", "pt") as stored:
        facts = json.loads(stored.metadata()["dmsa"])
        weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert facts == json.loads((exported / "model.json").read_text())
    segmenter = load_predictor(run).segmenter
    assert weights.keys() == segmenter.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in segmenter.state_dict().items())


def test_onnx_computes_the_same(exported, example):
    pytest.importorskip("onnx", reason="onnx is not installed")
    got = export.run_onnx((exported / "model.onnx").read_bytes(), example[0].numpy())
    np.testing.assert_allclose(got, example[1].numpy(), atol=1e-4)


def test_without_onnx_it_says_so(run, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    arguments = ["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--formats", "safetensors", "onnx"]
    assert cli.main(arguments) == 0
    assert "model.onnx: not written, onnx is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]


def test_a_file_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        export, "plain_dwconv", lambda x, weight, *rest: torch.zeros_like(x).repeat(1, len(weight), 1, 1)
    )
    predictor = load_predictor(run, torch.device("cpu"))
    # The pyramid's gain starts near 0; make what it adds matter.
    with torch.no_grad():
        predictor.segmenter.pyramid.gamma.fill_(2.0)
    monkeypatch.setattr(command, "load_predictor", lambda *arguments: predictor)
    arguments = ["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--formats", "torch"]
    assert cli.main(arguments) == 1
    assert "model.pt2 differs from the trained model" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.pt2").exists()


@pytest.mark.parametrize("options", [["--size", "50"], ["--size", "4"], ["--batch", "0"]])
def test_sizes_that_do_not_fit(run, capsys, options):
    assert cli.main(["export", "--checkpoint", str(run), *options]) == 1
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("reduce", ["concat", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_plain_convolutions_equal_the_operator(reduce, with_bias):
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(3, 4, 3, 3)
    bias = torch.randn(3, 4) if with_bias else None
    expected = multi_dilation_dwconv(x, weight, (1, 2, 5), bias, reduce)
    got = export.plain_dwconv(x, weight, bias, (1, 2, 5), reduce, "auto")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
