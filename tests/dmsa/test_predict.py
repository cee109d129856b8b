import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dmsa import checkpoint, cli, visualize
from dmsa.commands.predict import find_images, output_names
from dmsa.data.classes import Classes
from dmsa.data.transforms import normalise
from dmsa.scoring.predictor import load_predictor
from dmsa.training import report
from dmsa.training.session import train
from dmsa.visualize import colourise, heatmap, name_regions, overlay, panel
from tests.dmsa.runs import ROOT, lines, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("predict") / "run"
    train(tiny_config(out, epochs=1), ["train.py"])
    return out


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (60, 90, 3)), ("b.jpg", (40, 40, 3)), ("deep/a.png", (33, 71, 3))):
        Image.fromarray((rng.random(shape) * 255).astype(np.uint8)).save(folder / name)
    return folder


def test_predictor_gives_the_students_logits(run):
    predictor = load_predictor(run)
    assert predictor.config == tiny_config(run, epochs=1)
    images = torch.randn(2, 3, 48, 48)
    logits = predictor.predict(images)
    assert logits.shape == (2, 7, 6, 6)
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    predictor.segmenter.load_trainable_state(state["student"])
    expected = predictor.segmenter(images, tuple(state["rates"]))["logits"]
    assert torch.equal(logits, expected.detach())
    assert predictor.predict(images, (50, 70)).shape == (2, 7, 50, 70)
    assert not logits.requires_grad


def test_dmsa_eval_scores_what_the_run_logged(run, capsys):
    assert cli.main(["eval", "--checkpoint", str(run), "--format", "json", "--workers", "0", "--batch", "3"]) == 0
    values = json.loads(capsys.readouterr().out)
    logged = [line for line in lines(run) if "miou" in line][-1]
    assert (values["dataset"], values["images"], values["size"]) == ("shapes", 4, 48)
    assert values["miou"] == pytest.approx(100 * logged["miou"], abs=1e-9)
    assert values["accuracy"] == pytest.approx(100 * logged["accuracy"], abs=1e-9)
    assert [entry["cluster"] for entry in values["classes"]] == load_predictor(run).assignment
    assert cli.main(["eval", "--checkpoint", str(run), "--protocol", "native", "--workers", "0"]) == 0
    assert "protocol  native: all images" in capsys.readouterr().out


def test_fixed_rates_are_used_where_the_run_says_so(run, tmp_path):
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    assert load_predictor(run).rates((6, 6)) == (1, 6, 12, 18)
    state["config"]["rates"]["eval_rates"] = "fixed"
    torch.save(state, tmp_path / "fixed.pt")
    assert load_predictor(tmp_path / "fixed.pt").rates((6, 6)) == (1, 1, 2, 3)


def test_predicted_ids_become_the_classes_they_were_matched_with(run):
    predictor = load_predictor(run)
    picture = Image.fromarray((np.random.default_rng(1).random((30, 50, 3)) * 255).astype(np.uint8))
    got = predictor.segment(picture)
    assert got.shape == (30, 50)
    pixels = torch.from_numpy(np.array(picture.resize((48, 48), Image.Resampling.BILINEAR, reducing_gap=2.0)))
    raw = predictor.predict(normalise(pixels.permute(2, 0, 1))[None], (30, 50)).argmax(1)[0].numpy()
    back = np.array(predictor.assignment)[got]
    assert (back == raw).all()
    assert predictor.names[predictor.assignment[3]] == predictor.classes.classes[3]


def test_other_encoder_weights_are_refused(run, tmp_path):
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    torch.save({**state, "encoder": "0" * 64}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other encoder weights"):
        load_predictor(tmp_path / "other.pt")


def test_command_writes_palette_pngs_and_overlays(run, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"not an image")
    out = tmp_path / "out"
    assert cli.main(["predict", str(photos), "--checkpoint", str(run), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "3 images segmented" in printed.out
    assert "skipped" in printed.err
    assert "1 of 4 images could not be read" in printed.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{name}{kind}.png" for name in ("photos_a", "b", "deep_a") for kind in ("", "_overlay")
    )
    mask = Image.open(out / "photos_a.png")
    assert (mask.mode, mask.size) == ("P", (90, 60))
    assert np.array(mask).max() < 7
    predictor = load_predictor(run)
    assert mask.getpalette()[:21] == predictor.classes.palette.flatten().tolist()
    drawn = Image.open(out / "b_overlay.png")
    assert (drawn.mode, drawn.size) == ("RGB", (40, 40))


def test_command_without_images_or_checkpoint(run, tmp_path, capsys):
    assert cli.main(["predict", "--checkpoint", str(run)]) == 1
    assert "IMAGES is empty" in capsys.readouterr().err
    assert cli.main(["predict", "nothing/*.jpg", "--checkpoint", str(run)]) == 1
    assert "IMAGES='nothing/*.jpg'" in capsys.readouterr().err
    assert cli.main(["predict", str(ROOT), "--checkpoint", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err


def test_evaluation_of_the_run_repeats_its_score(run, capsys):
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    assert cli.main(["eval", "--checkpoint", str(run), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"{100 * state['best']['miou']:.2f}" in printed
    assert f"{100 * state['best']['accuracy']:.2f}" in printed


def test_images_by_folder_file_and_pattern(photos):
    found = find_images([str(photos / "*.png"), str(photos)], "out")
    assert [path.name for path in found] == ["a.png", "b.jpg", "a.png"]
    names = output_names(found)
    assert len(set(names)) == 3
    assert output_names([photos / "a.png", photos / "a.jpg"]) == ["a_png", "a_jpg"]


def test_output_names_tell_images_apart():
    def names(*paths):
        return output_names([Path(path) for path in paths])

    assert names("x/a.jpg", "x/a.png", "y/a.jpg") == ["a_jpg", "a_png", "a"]
    assert names("x/a.jpg", "y/a.jpg", "y/b.jpg") == ["x_a", "y_a", "b"]
    assert names("u/x/a.jpg", "v/x/a.jpg", "a.jpg") == ["u_x_a", "v_x_a", "a"]
    assert names("a.b.jpg", "a.c.jpg") == ["a.b", "a.c"]


def digest(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("images", "out", "message"),
    [
        (["a.png"], ".", r"would replace what is read: .*a\.png"),
        (["a.png", "b.jpg"], ".", r"would replace what is read: .*a\.png"),
        (["."], ".", "is a folder of images; choose another"),
        (["deep"], "../photos/deep/", "is a folder of images; choose another"),
        (["a.jpg", "a_overlay.jpg"], "new", r"a_overlay\.png: several inputs would be written there"),
        (["b.jpg"], "a.png", "--out='.*a.png' cannot be made: there is a file of this name"),
    ],
)
def test_images_are_never_replaced(run, photos, monkeypatch, capsys, images, out, message):
    for name in ("a.jpg", "a_overlay.jpg"):
        Image.new("RGB", (9, 9)).save(photos / name)
    monkeypatch.chdir(photos)
    before = digest(photos)
    for force in ([], ["--force"]):
        assert cli.main(["predict", *images, "--checkpoint", str(run), "--out", out, *force]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert digest(photos) == before


def test_results_are_replaced_on_request_only_and_are_no_images(run, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    command = ["predict", ".", "--checkpoint", str(run), "--out", "results", "--no-overlay"]
    assert cli.main(command) == 0
    before = digest(photos / "results")
    assert len(before) == 3
    assert cli.main(command) == 1
    assert "there already; --force replaces" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0
    assert digest(photos / "results") == before


def test_listing_says_what_it_leaves_out(photos, capsys):
    (photos / "._a.png").write_bytes(b"")
    (photos / "c.heic").write_bytes(b"")
    assert len(find_images([str(photos)], "out")) == 3
    assert capsys.readouterr().err == f"left out of {photos}: 1 hidden (._a.png); 1 with the ending .heic (c.heic)\n"


def test_a_picture_on_its_side_is_segmented_upright(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = (np.random.default_rng(0).random((40, 70, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels.mean(2).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    out = tmp_path / "out"
    assert cli.main(["predict", str(tmp_path), "--checkpoint", str(run), "--out", str(out)]) == 0
    upright, turned = (np.array(Image.open(out / f"{name}.png")) for name in ("upright", "turned"))
    assert upright.shape == (40, 70)
    np.testing.assert_array_equal(upright, turned)
    assert Image.open(out / "turned_overlay.png").size == (70, 40)
    assert np.array(Image.open(out / "deep_overlay.png")).std() > 10


@pytest.mark.parametrize("command", ["predict", "export"])
def test_help_reads_well(command):
    done = subprocess.run(
        [sys.executable, "-m", "dmsa.cli", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--checkpoint" in done.stdout
    assert "run folder" in done.stdout.lower()
    assert ("IMAGES" in done.stdout) == (command == "predict")


# Pictures


def test_colours_and_unknown_ids():
    palette = np.array([[0, 0, 0], [10, 20, 30]], dtype=np.uint8)
    assert colourise(np.array([[0, 1, 255]]), palette).tolist() == [[[0, 0, 0], [10, 20, 30], [224, 224, 192]]]
    with pytest.raises(ValueError, match="labels hold id 2"):
        colourise(np.array([[2]]), palette)


def test_heatmap_rises_and_takes_nan():
    shades = heatmap(np.array([[np.nan, -1.0, 0.0, 0.5, 1.0, 7.0]])).astype(int).sum(-1)[0]
    assert shades[0] == shades[1] == shades[2] < shades[3] < shades[4] == shades[5]


def test_overlay_draws_edges_and_names():
    image = np.full((60, 80, 3), 100, dtype=np.uint8)
    labels = np.zeros((60, 80), dtype=np.uint8)
    labels[:, 40:] = 1
    palette = np.array([[0, 0, 0], [250, 0, 0]], dtype=np.uint8)
    drawn = overlay(image, labels, palette)
    assert (drawn[:, 40] == 255).all()
    assert drawn[5, 5].tolist() == [45, 45, 45]
    named = name_regions(drawn, labels, ["left", "right"])
    assert named.shape == drawn.shape
    assert (named != drawn).any(axis=(0, 2))[:40].any()
    assert (named != drawn).any(axis=(0, 2))[40:].any()
    assert (name_regions(drawn, labels, []) == drawn).all()


def test_a_large_picture_is_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    labels = np.repeat(np.array([[0, 1]], dtype=np.uint8), 35, 1).repeat(50, 0)
    palette = rng.integers(0, 256, (2, 3), dtype=np.uint8)
    whole = overlay(image, labels, palette)
    monkeypatch.setattr(visualize, "PIXELS_AT_ONCE", 100)
    np.testing.assert_array_equal(overlay(image, labels, palette), whole)
    assert (name_regions(whole, labels, ["a", "b"]) != whole).any()


def test_panel_is_a_titled_table():
    cell = np.full((10, 10, 3), 7, dtype=np.uint8)
    drawn = panel([[cell] * 6, [cell] * 6], legend=[("a", (1, 2, 3)), ("b", (4, 5, 6))], side=32)
    assert drawn.size == (4 + 6 * 36, 20 + 2 * 36 + 18 + 4)
    with pytest.raises(ValueError, match="a row holds 5 pictures, expected 6"):
        panel([[cell] * 5])


@pytest.mark.parametrize("assignment", [[1, 0, 2], None])
def test_a_panels_legend_has_the_classes_of_predictions_too(monkeypatch, assignment):
    size = (8, 8)
    maps = {name: torch.full((1, *size), value) for name, value in (("teacher", 0), ("refined", 1), ("prediction", 2))}
    classes = Classes("toy", ("sky", "sea", "sand"), np.eye(3, dtype=np.uint8) * 200, False, 2, 1)
    task = SimpleNamespace(
        classes=classes, device="cpu", explain=lambda batch, epoch: {"cam": torch.zeros(1, 3, *size), **maps}
    )
    sample = {"image": torch.zeros(3, *size), "guide": torch.zeros(3, *size), "label": torch.full(size, 1)}
    drawn = {}
    monkeypatch.setattr(report, "panel", lambda rows, legend: drawn.update(legend=legend))
    report.draw_panels(task, [sample], [0], 0, assignment)
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    matched = list(zip(classes.classes, colours, strict=True))
    clusters = [("sea", colours[1]), *zip(["cluster 0", "cluster 1", "cluster 2"], colours, strict=True)]
    assert drawn["legend"] == (matched if assignment else clusters)
