"""The quality benchmark: splits, cells, scores, methods and tables."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.quality import cams
from benchmarks.quality.__main__ import main
from benchmarks.quality.methods import METHODS, aligned
from benchmarks.quality.photos import Photo, cells, load_folder, split, tensor
from benchmarks.quality.table import Row, markdown, means, miou, read_csv, write_csv


def photo(height=40, width=48):
    """Two halves, a line that is ignored between them."""
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[:, width // 2] = 255
    image = np.where(label[..., None] == 1, 200, 30).astype(np.uint8).repeat(3, 2)
    return Photo("made_1", "made", "check", image, label)


def test_frames_of_a_scene_are_on_one_side():
    names = [f"davis_{scene}_{i:05d}" for scene in "abcd" for i in range(3)]
    names += [f"camvid_{i:04d}" for i in range(10)] + [f"bsds_{i}" for i in range(4)]
    halves = split(names)
    assert {len({halves[f"davis_{scene}_{i:05d}"] for i in range(3)}) for scene in "abcd"} == {1}
    assert [halves[f"camvid_{i:04d}"] for i in range(10)] == ["fit"] * 5 + ["check"] * 5
    assert sorted(halves[f"bsds_{i}"] for i in range(4)) == ["check"] * 2 + ["fit"] * 2
    assert split(list(reversed(names))) == halves


def test_cells_are_averages_and_their_noise_repeats():
    made = photo()
    clean = cells(made, 8, 0.0)
    assert clean.shape == (1, 2, 5, 6)
    assert clean[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert clean[0, 1, 0].tolist() == [0, 0, 0, 7 / 8, 1, 1]  # a column of eight is ignored
    noisy = cells(made, 8, 0.5)
    assert torch.equal(noisy, cells(made, 8, 0.5))
    torch.testing.assert_close((noisy - clean) / 0.5, (cells(made, 8, 0.25) - clean) / 0.25)


def test_miou_counts_known_pixels_only():
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    assert miou(torch.tensor([[0, 0, 1, 0]]), truth, 2) == 100
    assert miou(torch.tensor([[0, 1, 1, 1]]), truth, 2) == pytest.approx(50)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_gives_scores_of_the_photograph(method):
    if method.missing:
        pytest.skip(f"needs {method.package}")
    made = photo()
    with torch.no_grad():
        scores = method.run(tensor(made.image), cells(made, 8, 0.1), 8)
    assert scores.shape == (1, 2, 40, 48)
    assert miou(scores[0].argmax(0), made.label, 2) > 85


def test_aligned_cells_are_bilinear_between_centres():
    made = photo()
    masks = cells(made, 8, 0.3)
    expected = F.interpolate(masks, scale_factor=8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(aligned(tensor(made.image), masks, 8), expected)


def test_kinds_count_the_same_and_the_worst_is_named():
    rows = [
        Row("a", "fit", 1, 8, 0.3, "x", 50.0, -1.0, 1.0),
        Row("a", "check", 3, 8, 0.3, "x", 70.0, 3.0, 1.0),
        Row("b", "check", 1, 8, 0.3, "x", 90.0, 5.0, 2.0),
    ]
    assert means(rows, ("fit", "check")) == {("x", 8, 0.3): pytest.approx((77.5, 3.5, 2.0, 1.5))}
    assert means(rows, ("fit",)) == {("x", 8, 0.3): pytest.approx((50, -1, -1, 1))}
    assert markdown(rows, ("check",))[2] == "| x | 80.0 (+4.0, +3.0) | 1.50 |"


def test_csv_round_trip(tmp_path):
    rows = [Row("a", "fit", 1, 8, 0.25, "x, y", 50.125, -1.5, 0.25)]
    write_csv(rows, tmp_path / "q.csv")
    assert read_csv(tmp_path / "q.csv") == rows


def test_the_command_on_a_folder(tmp_path, capsys):
    made = photo(32, 32)
    for folder, picture in (("images", made.image), ("masks", made.label)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            Image.fromarray(picture).save(tmp_path / folder / f"made_{i}.png")
    assert {p.half for p in load_folder(tmp_path)} == {"fit", "check"}
    out = tmp_path / "out"
    main(["--photos", str(tmp_path), "--out", str(out), "--strides", "8", "--noises", "0", "0.3"])
    printed = capsys.readouterr().out
    assert "| PAR.for_stride |" in printed
    assert "(1 made)" in printed
    assert (out / "quality.md").read_text() == printed.rstrip("\n") + "\n"
    Image.open(out / "quality.png").verify()
    before = (out / "quality.csv").read_text()
    main(["--draw", "--out", str(out)])
    assert (out / "quality.csv").read_text() == before


def test_no_class_of_imagenet_belongs_to_two():
    indices = [index for group in cams.IMAGENET.values() for index in group]
    assert sorted(cams.IMAGENET) == list(range(1, 21))
    assert len(set(indices)) == len(indices)
    assert 0 <= min(indices) <= max(indices) < 1000
