import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dmsa import cli
from dmsa.commands.eval import main
from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.base import table
from dmsa.data.coco import CURATED_FILE
from dmsa.scoring import upsample
from dmsa.scoring.evaluate import evaluate, evaluate_predictions
from dmsa.scoring.metrics import Histogram
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.table import paper_rows
from tests.data import fixtures

K = 4


def folder_set(root, images=7):
    """Write images of several sizes whose masks are noise of K ids and 255, and return the data set's config."""
    rng = np.random.default_rng(0)
    for i in range(images):
        height, width = 20 + 3 * i, 34 - 2 * i
        fixtures.write_image(root / "images" / f"{i}.jpg", height, width, seed=i)
        ids = rng.integers(0, K, (height, width), dtype=np.uint8)
        ids[0, :4] = 255
        fixtures.write_palette(root / "masks" / f"{i}.png", ids)
    (root / "classes.txt").write_text("sky, thing\nsea, thing\nsand, stuff\nsun, stuff\n")
    return DataConfig(name="folder", root=str(root), size=24, crop=8)


def colours(images):
    """Predict from the mean colour of 4 x 4 cells: depends on the image alone, not on the batch."""
    cells = F.adaptive_avg_pool2d(images, 4)
    weight = torch.tensor([[1.0, -1, 0], [0, 1, -1], [-1, 0, 1], [0.3, 0.3, 0.3]])
    return torch.einsum("kc,bchw->bkhw", weight, cells)


@pytest.mark.parametrize("protocol", ["transfgu", "stego", "native"])
def test_the_result_does_not_depend_on_batch_or_workers(tmp_path, protocol):
    data = build(folder_set(tmp_path), "val")
    reports = [
        evaluate(colours, data, Protocol(protocol, 24), batch=batch, workers=workers)
        for batch, workers in ((1, 0), (3, 0), (7, 1), (100, 2))
    ]
    for report in reports[1:]:
        np.testing.assert_array_equal(report.scores.confusion, reports[0].scores.confusion)
    assert reports[0].images == reports[0].wanted == 7
    pixels = sum((data.raw(i)[1] != 255).sum() for i in range(7))
    if protocol == "native":
        assert reports[0].scores.confusion.sum() == pixels
    else:
        assert 7 * 24 * 20 < reports[0].scores.confusion.sum() < 7 * 24 * 24


def test_every_pixel_is_scored_as_by_a_loop(tmp_path):
    data = build(folder_set(tmp_path), "val")
    for name in ("transfgu", "native"):
        want = np.zeros((K, K), dtype=np.int64)
        for i in range(7):
            sample, (_, label) = data[i], data.raw(i)
            if name == "transfgu":
                label = sample["label"].numpy()
            logits = F.interpolate(colours(sample["image"][None]), label.shape, mode="bilinear", align_corners=False)
            pred = logits[0].argmax(0).numpy()
            for t in range(K):
                want[t] += np.bincount(pred[label == t], minlength=K)
        s = evaluate(colours, data, Protocol(name, 24), batch=4).scores
        np.testing.assert_array_equal(s.confusion, want[:, s.assignment])


def run_rank(rank, world, root, folder):
    """Evaluate as one of `world` processes and leave the result in `folder`."""
    torch.set_num_threads(1)
    if world > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    data = build(DataConfig(name="folder", root=str(root), size=24, crop=8), "val")
    report = evaluate(colours, data, Protocol("native", 24), batch=2)
    result = (report.scores.confusion, report.scores.miou, report.images, [skip.name for skip in report.skipped])
    (folder / f"{world}-{rank}.pickle").write_bytes(pickle.dumps(result))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_one_and_three_processes_agree_to_the_last_pixel(tmp_path):
    root = tmp_path / "data"
    folder_set(root)  # 7 images: 3 does not divide them
    (root / "images" / "4.jpg").write_bytes(b"broken")
    threads = torch.get_num_threads()
    run_rank(0, 1, root, tmp_path)
    torch.set_num_threads(threads)
    # The exit status of every process is checked: one that dies fails the test instead of stopping it for good.
    torch.multiprocessing.spawn(run_rank, args=(3, root, tmp_path), nprocs=3)
    confusion, miou, images, skipped = pickle.loads((tmp_path / "1-0.pickle").read_bytes())
    assert (images, skipped) == (6, ["4"])
    assert confusion.dtype == np.int64
    for rank in range(3):
        other, *rest = pickle.loads((tmp_path / f"3-{rank}.pickle").read_bytes())
        np.testing.assert_array_equal(other, confusion)
        assert rest == [miou, images, skipped]


def test_perfect_predictions_score_one_whatever_the_cluster_names(tmp_path):
    config = folder_set(tmp_path / "data")
    data = build(config, "val")
    renamed = np.array([2, 0, 3, 1, *range(4, 255), 0], dtype=np.uint8)
    for i in range(7):
        fixtures.write_palette(tmp_path / "pred" / f"{i}.png", renamed[data.raw(i)[1]])
    for protocol in ("transfgu", "stego", "native"):
        report = evaluate_predictions(tmp_path / "pred", data, Protocol(protocol, 24), workers=0)
        assert report.scores.miou == report.scores.accuracy == report.scores.things == report.scores.stuff == 1
        assert report.scores.assignment.tolist() == [2, 0, 3, 1]
        assert report.kinds == ["thing", "thing", "stuff", "stuff"]
    plain = evaluate_predictions(tmp_path / "pred", data, Protocol("native"), match=False)
    assert plain.scores.accuracy == 0
    assert "no Hungarian match" in plain.text()


def test_masks_of_other_sizes_are_masks_of_the_whole_image():
    protocol = Protocol("transfgu", 8)
    label = np.arange(12 * 16).reshape(12, 16).astype(np.uint8)
    np.testing.assert_array_equal(protocol.prediction(label, (12, 16)), protocol.label(label))
    np.testing.assert_array_equal(protocol.prediction(label.repeat(3, 0).repeat(3, 1), (12, 16)), protocol.label(label))
    exact = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert protocol.prediction(exact, (12, 16)) is exact
    assert Protocol("native").prediction(exact, (16, 24)).shape == (16, 24)


def test_stego_takes_the_centre_at_the_short_side():
    protocol = Protocol("stego", 10)
    for height, width in ((20, 40), (40, 20), (20, 20), (33, 47)):
        y, x = np.mgrid[:height, :width]
        rows, columns = (protocol.label(v.astype(np.uint8)) for v in (y, x))
        assert rows.shape == (10, 10)
        side = min(height, width)
        for values, length in ((rows[:, 0], height), (columns[0], width)):
            assert abs((values.min() + values.max()) / 2 - (length - 1) / 2) <= side / 20 + 0.5
            assert values.max() - values.min() <= side
        image = np.stack([y, x, 0 * x], -1).astype(np.uint8)
        shown = np.array(protocol.image(image)).astype(int)
        assert np.abs(shown[..., 0] - rows).max() <= side / 10
        assert np.abs(shown[..., 1] - columns).max() <= side / 10


def test_stego_scores_the_curated_images_alone(tmp_path):
    fixtures.coco(tmp_path)
    data = build(DataConfig(name="coco_stuff27", root=str(tmp_path), size=32), "val")

    def zeros(images):
        return torch.zeros(len(images), 27, 2, 2)

    with pytest.raises(FileNotFoundError, match="dmsa prepare"):
        evaluate(zeros, data, "stego")
    path = tmp_path / "curated/val2017" / CURATED_FILE
    path.parent.mkdir(parents=True)
    path.write_text("000000000003\n")
    report = evaluate(zeros, data, "stego")
    assert report.images == report.wanted == 1
    assert "curated images, short side 320, centre crop" in report.text()
    assert evaluate(zeros, data, "transfgu").images == 3
    path.write_text("000000000007\n")
    with pytest.raises(ValueError, match="names images that coco_stuff27 val does not have: 000000000007"):
        evaluate(zeros, data, "stego")


def test_a_corrupt_image_is_named_counted_and_left_out(tmp_path):
    config = folder_set(tmp_path)
    before = evaluate(colours, build(config, "val"), Protocol("native", 24))
    (tmp_path / "images/2.jpg").write_bytes(b"broken")
    data = build(config, "val")
    for workers in (0, 2):
        report = evaluate(colours, data, Protocol("native", 24), batch=3, workers=workers)
        assert [skip.name for skip in report.skipped] == ["2"]
        assert report.images == 6
        assert before.scores.confusion.sum() - report.scores.confusion.sum() == 26 * 30 - 4
        for text in (report.text(), report.markdown(), report.json()):
            assert "1 images could not be decoded and are not in the score: 2 (cannot decode" in text
            assert "scored 6 of 7 images: not comparable" in text


def test_missing_predictions_are_listed(tmp_path):
    data = build(folder_set(tmp_path / "data"), "val")
    with pytest.raises(FileNotFoundError, match="no folder of predictions"):
        evaluate_predictions(tmp_path / "pred", data, "native")
    fixtures.write_palette(tmp_path / "pred/0.png", data.raw(0)[1] % K)
    with pytest.raises(
        FileNotFoundError, match=r"6 of 7 images of folder val have no prediction in .*1\.png, .*and 1 more"
    ):
        evaluate_predictions(tmp_path / "pred", data, "native")
    report = evaluate_predictions(tmp_path / "pred", data, "native", allow_missing=True)
    assert report.images == 1
    assert report.missing == list("123456")
    assert "6 images have no prediction and are not in the score: 1, 2, 3, 4, 5 and 1 more" in report.text()
    assert "not comparable" in report.text()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_predictions_and_labels_name_the_file(tmp_path, workers):
    data = build(folder_set(tmp_path / "data"), "val")
    for i in range(7):
        fixtures.write_palette(tmp_path / "pred" / f"{i}.png", data.raw(i)[1] % K)
    good = (tmp_path / "pred/3.png").read_bytes()
    fixtures.write_palette(tmp_path / "pred/3.png", data.raw(3)[1])  # with 255: not a prediction
    with pytest.raises(ValueError, match=r"pred.3\.png holds ids outside the table: \[255\]; expected 0\.\.3") as error:
        evaluate_predictions(tmp_path / "pred", data, "native", workers=workers)
    assert "Traceback" not in str(error.value)
    Image.new("RGB", (4, 4)).save(tmp_path / "pred/3.png")
    with pytest.raises(ValueError, match=r"3\.png is a RGB image of colours"):
        evaluate_predictions(tmp_path / "pred", data, "native", workers=workers)
    (tmp_path / "pred/3.png").write_bytes(good[:60])
    report = evaluate_predictions(tmp_path / "pred", data, "native", workers=workers)
    assert [skip.name for skip in report.skipped] == ["3"]
    (tmp_path / "pred/3.png").write_bytes(good)
    fixtures.write_palette(tmp_path / "data/masks/5.png", np.full((35, 24), 9))
    with pytest.raises(ValueError, match=r"masks.5\.png holds ids outside the table: \[9\]"):
        evaluate_predictions(tmp_path / "pred", data, "native", workers=workers)


def test_bad_arguments(tmp_path):
    data = build(folder_set(tmp_path), "val")
    with pytest.raises(ValueError, match="batch=0"):
        evaluate(colours, data, "native", batch=0)
    with pytest.raises(ValueError, match="name='stegos'"):
        evaluate(colours, data, "stegos")
    with pytest.raises(ValueError, match="size=0"):
        Protocol("native", 0)
    with pytest.raises(ValueError, match=r"logits \[B, K, h, w\] with B = 7 and K = 4, got logits\.shape="):
        evaluate(lambda images: images, data, "native")
    (tmp_path / "bare").mkdir()
    fixtures.write_image(tmp_path / "bare/0.jpg")
    bare = build(DataConfig(name="folder", root=str(tmp_path / "bare")), "val")
    with pytest.raises(ValueError, match="data set 'folder' has no labels to score against"):
        evaluate(colours, bare, "native")


def test_memory_does_not_grow_with_the_number_of_images():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, K, (2, 64, 64), dtype=np.uint8)
    image = np.zeros((64, 64, 3), dtype=np.uint8)

    class Toy(list):
        name, num_classes, n_things, things_only, classes = "toy", K, 4, False, list("abcd")

        def raw(self, index):
            return image, masks[index % 2]

    def peak(images):
        tracemalloc.start()
        report = evaluate(colours, Toy(range(images)), Protocol("native", 32), batch=4)
        assert report.scores.confusion.sum() == images * 64 * 64
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(8)
    assert peak(400) < peak(40) + 100_000  # 400 masks alone are 1.6 MB


@pytest.mark.parametrize("at_once", [1, 8 * 9, 2 * 8 * 9, 2 * K * 8 * 9])
def test_upsampling_in_parts_makes_no_difference(monkeypatch, at_once):
    logits = torch.randn(5, K, 3, 3, generator=torch.Generator().manual_seed(0))
    logits[:, :, 0] = 1.0  # equal scores: the lowest id
    whole = F.interpolate(logits, (8, 9), mode="bilinear", align_corners=False).argmax(1)
    monkeypatch.setattr(upsample, "UPSAMPLED_VALUES", at_once)
    assert torch.equal(upsample.upsampled_labels(logits, (8, 9)), whole.to(torch.uint8))


def test_81_classes_of_a_large_picture_take_the_memory_of_few(monkeypatch):
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.values = max(self.values, out.untyped_storage().nbytes() // 4)
            return out

    monkeypatch.setattr(upsample, "UPSAMPLED_VALUES", 4 * 300 * 400)
    with Largest() as largest:
        assert upsample.upsampled_labels(torch.randn(2, 81, 8, 8), (300, 400)).shape == (2, 300, 400)
    assert largest.values == 4 * 300 * 400  # of 81


# --- reports and the command ---------------------------------------------------------------------------------


def test_paper_rows_are_the_papers():
    def numbers(name):
        return [(r["method"], r["miou"], r["accuracy"]) for r in paper_rows(name)]

    assert numbers("coco_stuff27") == [
        ("IIC", 2.36, 21.02), ("PiCIE", 11.88, 37.2), ("TransFGU", 16.19, 44.52), ("DMSA", 17.82, 46.43)
    ]  # fmt: skip
    assert numbers("coco80") == [
        ("MaskContrast", 3.73, 8.81), ("TransFGU", 12.69, 64.31), ("DMSA", 14.69, 69.7), ("CAUSE-TR", 21.2, 75.2)
    ]  # fmt: skip
    assert numbers("voc")[:3] == [("MaskContrast", 35.0, 79.84), ("TransFGU", 37.15, 83.59), ("DMSA", 37.2, 83.61)]
    assert numbers("voc_aug") == [("TransFGU", 33.14, 79.7), ("DMSA", 38.13, 83.1)]
    assert paper_rows("folder") == []
    for row in table("paper")["rows"]:
        assert row["protocol"]
        assert row["source"]


@pytest.fixture
def voc_predictions(tmp_path):
    labels = fixtures.voc(tmp_path / "data")
    for name, ids in labels.items():
        if "val" in name:
            fixtures.write_palette(tmp_path / "mine" / f"{name}.png", ids % 21)
    return [
        "--predictions",
        str(tmp_path / "mine"),
        "--name",
        "voc",
        "--root",
        str(tmp_path / "data"),
        "--workers",
        "0",
    ]


def test_text_has_protocol_rows_and_classes_in_order(voc_predictions, capsys):
    assert main(voc_predictions) == 0
    text = capsys.readouterr().out
    assert "protocol  transfgu: all images, squashed to 320x320" in text
    lines = text.splitlines()
    rows = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("method"))) :]]
    assert rows[1][:4] == ["mine", "100.00", "100.00", "transfgu"]
    assert rows[4][:4] == ["DMSA", "37.20", "83.61", "transfgu"]
    ids = [line.split()[0] for line in lines[-21:]]
    assert ids == [str(i) for i in range(21)]
    assert lines[-21].split()[1:3] == ["background", "background"]
    assert lines[-1].split() == ["20", "tvmonitor", "thing", "100.00", "20"]
    assert "mIoU of things 100.00, of background 100.00" in text


def test_markdown_and_json(voc_predictions, capsys):
    assert main([*voc_predictions, "--format", "markdown", "--protocol", "native", "--method", "oracle"]) == 0
    text = capsys.readouterr().out
    assert "| method | mIoU | accuracy | protocol | source |\n|---|---|---|---|---|\n| oracle | 100.00 |" in text
    assert "- protocol: native: all images" in text
    assert main([*voc_predictions, "--format", "json", "--protocol", "stego", "--size", "16"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["protocol"], values["size"], values["miou"], values["images"]) == ("stego", 16, 100.0, 2)
    assert [c["name"] for c in values["classes"]] == table("voc")["names"]
    assert values["classes"][3]["iou"] is None  # no bird in sight
    assert [r["method"] for r in values["published"]] == ["MaskContrast", "TransFGU", "DMSA", "CAUSE-TR"]


def test_report_files_and_confusion_picture(voc_predictions, tmp_path, capsys):
    assert main([*voc_predictions, "--out", str(tmp_path / "report")]) == 0
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "confusion.png", "eval.json", "eval.md", "eval.txt"
    ]  # fmt: skip
    assert (tmp_path / "report/eval.txt").read_text() == capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"eval\.txt and 3 more: there already; --force"):
        main([*voc_predictions, "--out", str(tmp_path / "report")])
    assert main([*voc_predictions, "--out", str(tmp_path / "report"), "--force"]) == 0
    with Image.open(tmp_path / "report/confusion.png") as picture:
        assert min(picture.size) > 500
        assert len(np.unique(np.array(picture.convert("L")))) > 50


def test_a_limited_set_says_so(voc_predictions, capsys):
    assert main([*voc_predictions, "--images", "1"]) == 0
    assert "scored on 1 images drawn from a larger set: not comparable" in capsys.readouterr().out


def test_a_score_says_what_it_does_not_compare_with(voc_predictions, capsys):
    for options, words in (
        ([], "the official set has 1449 images, not 2: published scores do not compare"),
        (
            ["--protocol", "native"],
            "published scores are of other protocols than native at 320 px: they do not compare",
        ),
        (["--size", "64"], "published scores are of other protocols than transfgu at 64 px: they do not compare"),
    ):
        assert main([*voc_predictions, *options]) == 0
        assert words in capsys.readouterr().out


def test_contradicting_options_are_refused(voc_predictions):
    with pytest.raises(ValueError, match="expected a positive number of images, got limit=0"):
        main([*voc_predictions, "--images", "0"])
    with pytest.raises(ValueError, match="expected one of --predictions and --checkpoint, got none"):
        main(["--name", "voc"])
    with pytest.raises(ValueError, match="got both"):
        main([*voc_predictions, "--checkpoint", "run"])
    with pytest.raises(ValueError, match="needs --name"):
        main(voc_predictions[:2])


def test_misspelt_options_get_a_suggestion_and_help_reads(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--prediction", "x"])
    assert stop.value.code == 2
    assert "--predictions" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "dmsa eval" in text
    assert all(f"--{name}" in text for name in ("predictions", "checkpoint", "protocol", "out", "allow-missing"))


def test_the_command_prints_errors_without_a_traceback(voc_predictions, tmp_path, capsys):
    (tmp_path / "mine/2007_val1.png").unlink()
    assert cli.main(["eval", *voc_predictions]) == 1
    assert capsys.readouterr().err.startswith("dmsa eval: 1 of 2 images of voc val have no prediction in ")


def test_evaluation_is_five_times_faster_than_per_image_python_maps():
    from benchmarks.measuring.bench_data import evaluation_speed

    ratio, equal = evaluation_speed(images=12, repeats=3)
    assert equal
    assert ratio > 5


def test_histogram_handles_a_batch_at_once():
    histogram = Histogram(K)
    masks = np.random.default_rng(0).integers(0, K, (3, 8, 8), dtype=np.uint8)
    histogram.update(masks, masks)
    assert np.trace(histogram.counts) == masks.size
