"""What a folder of predictions may leave open, and what a score of odd labels says."""

import json

import numpy as np
import pytest
import torch

from dmsa.commands.eval import main
from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.scoring.evaluate import evaluate, evaluate_predictions
from tests.data import fixtures

LABEL = np.repeat(np.array([[1], [0]], dtype=np.uint8), 20, 0).repeat(50, 1)  # [40, 50]


def halves(root, *names):
    """Write images `names` with the label LABEL and return the data set."""
    for name in names:
        fixtures.write_image(root / "data/images" / f"{name}.jpg", 40, 50)
        fixtures.write_grey(root / "data/masks" / f"{name}.png", LABEL)
    return build(DataConfig(name="folder", root=str(root / "data")), "val")


def test_two_predictions_of_one_name_are_refused(tmp_path):
    data = halves(tmp_path, "a", "b")
    for name in ("crf/a", "raw/a", "b"):
        fixtures.write_grey(tmp_path / "pred" / f"{name}.png", LABEL)
    with pytest.raises(ValueError, match=r"1 images have several predictions in .*: a: crf/a\.png, raw/a\.png"):
        evaluate_predictions(tmp_path / "pred", data, "native")
    fixtures.write_grey(tmp_path / "pred/a.png", LABEL)  # named as the image: no doubt is left
    report = evaluate_predictions(tmp_path / "pred", data, "native")
    assert report.scores.accuracy == 1.0
    assert f"left out of {tmp_path}/pred: 2 of no image (crf/a.png, raw/a.png)" in report.notes()
    fixtures.write_grey(tmp_path / "pred/a.PNG", LABEL)
    with pytest.raises(ValueError, match=r"predictions in .*pred differ only by their ending, a\.PNG, a\.png"):
        evaluate_predictions(tmp_path / "pred", data, "native")


def test_one_prediction_for_two_images_is_refused(tmp_path):
    data = halves(tmp_path, "x/1", "y/1")
    fixtures.write_grey(tmp_path / "pred/1.png", LABEL)
    with pytest.raises(ValueError, match=r"1 predictions in .* a name that several images share: 1\.png: x/1, y/1"):
        evaluate_predictions(tmp_path / "pred", data, "native", allow_missing=True)
    (tmp_path / "pred/1.png").unlink()
    fixtures.write_grey(tmp_path / "pred/x/1.png", LABEL)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*: y/1\.png"):  # x/1.png is not y's
        evaluate_predictions(tmp_path / "pred", data, "native")


def test_255_in_predictions_is_a_choice_that_the_report_names(tmp_path, capsys):
    halves(tmp_path, "a")
    pred = LABEL.copy()
    pred[:10, :25] = 255  # a quarter of class 1
    fixtures.write_grey(tmp_path / "pred/a.png", pred)
    command = ["--predictions", f"{tmp_path}/pred", "--name", "folder", "--root", f"{tmp_path}/data", "--workers", "0"]
    command += ["--protocol", "native", "--format", "json"]
    with pytest.raises(ValueError, match=r"a\.png holds ids outside the table: \[255\].*--predicted-255 ignore"):
        main(command)
    for choice, accuracy, iou, words in (
        ("ignore", 100.0, 100.0, "12.5 % of the labelled pixels are 255 in the prediction: not in the score"),
        ("wrong", 87.5, 75.0, "12.5 % of the labelled pixels are 255 in the prediction: counted as misses"),
    ):
        assert main([*command, "--predicted-255", choice]) == 0
        values = json.loads(capsys.readouterr().out)
        assert (values["accuracy"], values["classes"][1]["iou"], values["classes"][0]["iou"]) == (accuracy, iou, 100.0)
        assert words in values["notes"]


def test_a_prediction_on_its_side_is_refused(tmp_path):
    data = halves(tmp_path, "a")
    fixtures.write_grey(tmp_path / "pred/a.png", LABEL.T)
    for protocol in ("native", "transfgu"):
        with pytest.raises(ValueError, match=r"a\.png is \(50, 40\), the annotation \(40, 50\): it lies on its side"):
            evaluate_predictions(tmp_path / "pred", data, protocol)


def test_no_image_is_no_score(tmp_path):
    data = halves(tmp_path, "a")
    (tmp_path / "data/images/a.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of 1 images could be scored: cannot decode .*a\.jpg: the file is empty"
    ):
        evaluate(lambda images: torch.zeros(len(images), 2, 4, 4), data, "native")


def test_labels_of_one_class_are_no_score(tmp_path):
    halves(tmp_path, "a")
    fixtures.write_grey(tmp_path / "data/masks/a.png", np.where(LABEL == 1, 255, 0))
    (tmp_path / "data/classes.txt").write_text("background\nthing\n")
    data = build(DataConfig(name="folder", root=str(tmp_path / "data")), "val")
    report = evaluate(lambda images: torch.zeros(len(images), 2, 4, 4), data, "native")
    assert report.ignored == 0.5
    assert "the labels hold background alone of 2 classes: no real score" in report.notes()
    assert "there are no published scores on folder to compare with" in report.notes()
    assert "50.0 % of the pixels ignored (255)" in report.text()
    with pytest.raises(ValueError, match="the network's logits are infinite or NaN"):
        evaluate(lambda images: torch.full((len(images), 2, 4, 4), torch.nan), data, "native")
