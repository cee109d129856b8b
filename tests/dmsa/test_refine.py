"""`dmsa refine`: formats, matching of names, what is written, resuming, and the scores."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dmsa.commands.refine import main
from dmsa.refinement.maps import MaskFile, find_masks, read_maps
from dmsa.refinement.refiner import THRESHOLDS, Refined, Settings, cell_of, decide
from dmsa.refinement.scores import class_ious, count, curve

SIZE = (48, 64)
STRIDE = 8


def scene(seed):
    """A photograph uint8 [48, 64, 3] of two colours and noise, and its labels: 3 in a disc, 0 around it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    centre = generator.integers(18, 30, 2)
    disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 14**2
    photo = np.where(disc[..., None], (200, 60, 40), (40, 90, 160)) + generator.integers(-12, 12, (*SIZE, 3))
    return photo.astype(np.uint8), np.where(disc, 3, 0).astype(np.uint8)


def averages(label, value, stride=STRIDE):
    """Share of `value` in the cells, float32 [h, w]."""
    height, width = label.shape
    return (label == value).reshape(height // stride, stride, width // stride, stride).mean((1, 3)).astype(np.float32)


@pytest.fixture
def folders(tmp_path):
    """Three photographs in `images`, their labels in `truth`; `masks` is empty."""
    for name in ("images", "truth", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        photo, label = scene(i)
        Image.fromarray(photo).save(tmp_path / "images" / f"p{i}.png")
        Image.fromarray(label).save(tmp_path / "truth" / f"p{i}.png")
    return tmp_path


def truth(folders, i):
    return np.array(Image.open(folders / "truth" / f"p{i}.png"))


def write_cams(folders, key="cam", of=np.asarray):
    for i in range(3):
        stored = {"keys": of(np.array([2])), key: of(averages(truth(folders, i), 3)[None])}
        np.save(folders / "masks" / f"p{i}.npy", stored)


def refine(folders, *options, out="out"):
    return main(
        [str(folders / "images"), str(folders / "masks"), "--out", str(folders / out), "--workers", "1", *options]
    )


def agreement(folders, i, out="out"):
    return float((np.array(Image.open(folders / out / f"p{i}.png")) == truth(folders, i)).mean())


@pytest.mark.parametrize(("key", "of"), [("cam", np.asarray), ("high_res", torch.from_numpy), ("maps", np.asarray)])
def test_dictionaries_of_activation_maps(folders, key, of):
    write_cams(folders, key, of)
    assert refine(folders, "--background", "0.5") == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97


def test_dictionaries_of_class_numbers_and_archives(folders):
    for i in range(3):
        cells = averages(truth(folders, i), 3)
        if i:
            np.savez(folders / "masks" / f"p{i}.npz", keys=[0, 3], maps=cells[None])
        else:
            np.save(folders / "masks" / f"p{i}.npy", {2: cells})
    assert refine(folders, "--background", "0.5") == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97


def test_arrays_planes_and_indices(folders):
    shares = [averages(truth(folders, i), 3) for i in range(3)]
    four = np.stack([1 - shares[0], 0 * shares[0], 0 * shares[0], shares[0]])
    np.save(folders / "masks" / "p0.npy", (65535 * four).astype(np.uint16))
    (folders / "masks" / "p1").mkdir()
    for value, plane in ((0, 1 - shares[1]), (3, shares[1])):
        Image.fromarray((65535 * plane).astype(np.uint16)).save(folders / "masks" / "p1" / f"{value}.png")
    Image.fromarray(np.where(shares[2] > 0.5, 3, 0).astype(np.uint8)).save(folders / "masks" / "p2.png")
    assert refine(folders) == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.94


def test_one_file_a_class_beside_each_other(folders):
    for i in range(3):
        for value in (0, 3):
            plane = (255 * averages(truth(folders, i), value)).astype(np.uint8)
            Image.fromarray(plane).save(folders / "masks" / f"p{i}_{value}.png")
    assert refine(folders) == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97


def test_pixels_to_ignore_stay_ignored(folders):
    for i in range(3):
        ids = truth(folders, i)
        ids[:, :16] = 255
        Image.fromarray(ids).save(folders / "masks" / f"p{i}.png")
    assert refine(folders, "--stride", "8") == 0
    written = np.array(Image.open(folders / "out" / "p0.png"))
    assert (written[:, :16] == 255).all()
    assert (written[:, 16:] == truth(folders, 0)[:, 16:]).mean() > 0.97


def test_class_indices_without_the_class_0_and_of_ignored_pixels_alone(folders):
    for i, value in enumerate((3, 255, 7)):
        Image.new("L", SIZE[::-1], value).save(folders / "masks" / f"p{i}.png")
    assert refine(folders, "--stride", "8") == 0
    assert [np.unique(np.array(Image.open(folders / "out" / f"p{i}.png"))).tolist() for i in range(3)] == [
        [3],
        [255],
        [7],
    ]


def test_masks_larger_than_the_image(folders):
    for i in range(3):
        ids = truth(folders, i).repeat(3, 0).repeat(3, 1)
        Image.fromarray(ids).save(folders / "masks" / f"p{i}.png")
    assert refine(folders, "--stride", "4") == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97


def test_low_and_high_leave_pixels_out(folders):
    write_cams(folders)
    assert refine(folders, "--low", "0.2", "--high", "0.8", "--soft") == 0
    labels = np.array(Image.open(folders / "out" / "p0.png"))
    with np.load(folders / "out" / "soft" / "p0.npz") as soft:
        assert soft["keys"].tolist() == [3]
        scores = soft["maps"].astype(np.float32)[0]
    assert set(np.unique(labels)) == {0, 3, 255}
    clear = np.minimum(np.abs(scores - 0.2), np.abs(scores - 0.8)) > 1e-3  # away from what float16 rounds
    assert (labels == np.where(scores < 0.2, 0, np.where(scores < 0.8, 255, 3)))[clear].all()


def test_a_folder_of_background_maps(folders):
    write_cams(folders)
    (folders / "background").mkdir()
    for i in range(3):
        np.save(folders / "background" / f"p{i}.npy", 1 - averages(truth(folders, i), 3))
    assert refine(folders, "--background", str(folders / "background")) == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97


def test_a_missing_background_is_said_before_anything_is_written(folders):
    write_cams(folders)
    with pytest.raises(ValueError, match=r"no map of the background .* --background 0\.3"):
        refine(folders)
    assert not (folders / "out").exists()
    assert refine(folders, "--background", "none", "--first-class", "1") == 0
    assert (np.array(Image.open(folders / "out" / "p0.png")) == 3).all()


def test_scores_before_and_after_and_the_threshold(folders, capsys):
    write_cams(folders)
    assert refine(folders, "--background", "0.3", "--truth", str(folders / "truth")) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed
    assert "best background threshold after" in printed
    report = (folders / "out" / "report.md").read_text()
    assert "| class 3 |" in report
    for name in ("report/panels.png", "report/thresholds.png"):
        assert name in report
        Image.open(folders / "out" / name).verify()
    rows = (folders / "out" / "report" / "thresholds.csv").read_text().splitlines()
    assert len(rows) == 1 + len(THRESHOLDS)
    before, after = (float(cell) for cell in rows[1 + 50].split(",")[1:])
    assert after > before > 50


def test_the_same_command_goes_on_and_another_does_not_mix(folders, capsys):
    write_cams(folders)
    options = ("--background", "0.5", "--truth", str(folders / "truth"))
    assert refine(folders, *options) == 0
    first = capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (folders / "out").glob("*.png")}
    (folders / "out" / "p1.png").unlink()
    assert refine(folders, *options) == 0
    told = capsys.readouterr()
    assert "2 of 3 images are done already" in told.err
    assert told.out.splitlines()[1:] == first.splitlines()[1:]  # the scores are those of all images
    assert files[folders / "out" / "p0.png"] == (folders / "out" / "p0.png").stat().st_mtime_ns
    assert (folders / "out" / "p1.png").exists()
    with pytest.raises(ValueError, match=r"results of other settings: background was '0\.5'"):
        refine(folders, "--background", "0.6")
    assert refine(folders, "--background", "0.6", "--force") == 0
    assert json.loads((folders / "out" / "refine.json").read_text())["background"] == "0.6"


def test_inputs_and_foreign_files_are_never_replaced(folders):
    for i in range(3):
        Image.fromarray(truth(folders, i)).save(folders / "masks" / f"p{i}.png")
    with pytest.raises(ValueError, match="would replace what is read"):
        refine(folders, "--stride", "4", out="masks")
    with pytest.raises(ValueError, match="would replace what is read"):
        refine(folders, "--stride", "4", "--force", out="images")
    (folders / "out").mkdir()
    (folders / "out" / "p2.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="there already"):
        refine(folders, "--stride", "4")
    assert (folders / "out" / "p2.png").read_bytes() == b"mine"
    (folders / "other").mkdir()
    (folders / "other" / "report.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report\.md: there already"):
        refine(folders, "--stride", "4", "--truth", str(folders / "truth"), out="other")


def test_a_broken_file_costs_one_line_and_no_other_image(folders, capsys):
    write_cams(folders)
    (folders / "masks" / "p1.npy").write_bytes(b"broken")
    assert refine(folders, "--background", "0.5") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "p1" in line and "skipped" in line]
    assert len(said) == 1
    assert agreement(folders, 2) > 0.97
    assert not (folders / "out" / "p1.png").exists()
    write_cams(folders)
    assert refine(folders, "--background", "0.5") == 0
    assert agreement(folders, 1) > 0.97


class Program:
    def __reduce__(self):
        return os.system, ("echo run",)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"keys": Program(), "cam": np.zeros((1, 2, 2))}, r"refused to call .*system"),
        ({"keys": np.array([1, 2]), "cam": np.zeros((1, 2, 2))}, r"2 keys for maps of shape \(1, 2, 2\)"),
        ({"cam": np.zeros((1, 2, 2))}, "no 'keys'"),
        ({"keys": np.array([1]), "cam": np.full((1, 2, 2), np.nan)}, "not finite"),
        ({"something": 1}, "holds something; expected `keys`"),
        ({1: np.zeros((2, 2)), 2: np.zeros((3, 3))}, "differ in size"),
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\); expected scores"),
        (np.full((4, 4), 300), "class indices up to 300"),
    ],
)
def test_contents_that_are_no_masks(tmp_path, stored, message):
    np.save(tmp_path / "a.npy", stored, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_maps([MaskFile(tmp_path / "a.npy")], 0)


def test_names_that_two_files_could_mean(folders):
    write_cams(folders)
    np.savez(folders / "masks" / "p1.npz", keys=[3], maps=np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match=r"masks in .* differ only by their ending"):
        refine(folders, "--background", "0.5")
    (folders / "masks" / "p1.npz").unlink()
    Image.new("RGB", (4, 4)).save(folders / "images" / "p1.jpg")
    with pytest.raises(ValueError, match=r"IMAGES in .* differ only by their ending"):
        refine(folders, "--background", "0.5")
    (folders / "images" / "p1.jpg").unlink()
    (folders / "images" / "p1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 masks have no image"):
        refine(folders, "--background", "0.5")


def test_a_photograph_whose_name_ends_in_a_number_is_no_class(tmp_path):
    for name in ("p_1.png", "p_1_3.png", "p_1_0.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    images = {"p": tmp_path, "p_1": tmp_path}
    assert list(find_masks(tmp_path, images)[0]) == ["p_1", "p_1_0", "p_1_3"]
    (tmp_path / "p_1.png").unlink()
    found, _ = find_masks(tmp_path, images)
    assert [file.class_id for file in found["p_1"]] == [0, 3]


def test_cells_are_squares_of_the_stride_where_those_fit():
    assert cell_of((48, 64), (48, 64), 16) is None
    assert cell_of((50, 64), (4, 4), 16) == (16, 16)
    assert cell_of((50, 64), (3, 4), 16) == (16, 16)
    assert cell_of((48, 64), (12, 16), 16) == (4, 4)
    assert cell_of((375, 500), (14, 14), None) == (375 / 14, 500 / 14)


@pytest.mark.parametrize(
    "options", [{"low": 0.2}, {"low": 0.5, "high": 0.2}, {"stride": 0.5}, {"stride": float("nan")}]
)
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match="--"):
        Settings(**options)


def test_the_curve_is_what_deciding_at_each_threshold_scores():
    generator = np.random.default_rng(0)
    scores = generator.random((2, 20, 30)).astype(np.float32)
    label = generator.choice([0, 2, 5, 255], (20, 30)).astype(np.uint8)
    labels = decide((2, 5), scores, (0.4, 0.4))
    counts = count(Refined(labels, (2, 5), scores, labels, scores, swept=True), label)
    values = curve(counts.swept_after, counts.after)
    for i in range(0, len(THRESHOLDS), 10):
        at = decide((2, 5), scores, (float(THRESHOLDS[i]), float(THRESHOLDS[i])))
        again = count(Refined(at, (2, 5), scores, at, scores, swept=False), label)
        assert values[i] == pytest.approx(np.nanmean(class_ious(again.after)), abs=1e-9)


def test_an_image_without_classes_is_background():
    assert (decide((), np.zeros((0, 4, 5)), (0.3, 0.3)) == 0).all()


def test_every_file_of_several_processes(folders):
    write_cams(folders)
    assert refine(folders, "--background", "0.5", "--workers", "2") == 0
    assert min(agreement(folders, i) for i in range(3)) > 0.97
