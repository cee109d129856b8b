import json
import shutil

import pytest
from PIL import Image

from dmsa import cli
from dmsa.commands.doctor import main
from dmsa.data import sources
from dmsa.data.coco import CURATED_FILE
from dmsa.data.doctor import examine
from tests.data import fixtures


def test_a_complete_voc(tmp_path, capsys):
    fixtures.voc(tmp_path)
    assert main([str(tmp_path), "--name", "voc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    voc = tmp_path / "VOCdevkit/VOC2012"
    assert lines[0] == "voc: usable"
    assert [line.split()[0] for line in lines[1:5]] == ["there"] * 4
    assert lines[1].endswith(f"{voc}/ImageSets/Segmentation/train.txt: 3 (officially 1464)")
    assert lines[3].endswith(f"{voc}/JPEGImages: 5 (officially 17125)")
    assert lines[5:] == [
        "  train 3 images (officially 1464), labels from SegmentationClass",
        "  val   2 images (officially 1449), labels from SegmentationClass",
    ]


def test_missing_files_come_with_their_source_one_by_one(tmp_path, capsys):
    fixtures.voc(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    shutil.rmtree(voc / "SegmentationClass")
    (voc / "ImageSets/Segmentation/train.txt").unlink()
    assert main(["--root", str(tmp_path), "--name", "voc"]) == 1
    text = capsys.readouterr().out
    source = "from VOCtrainval_11-May-2012.tar, host.robots.ox.ac.uk/pascal/VOC/voc2012 (needed)"
    assert text.startswith("voc: NOT usable for train and val\n  missing  list of the training images ")
    for path in (voc / "ImageSets/Segmentation/train.txt", voc / "SegmentationClass"):
        assert f"{path}: {source}" in text
    assert "1 of 2 split lists are missing" in text


def test_some_missing_files_are_counted_and_the_first_few_named(tmp_path, capsys):
    fixtures.voc(tmp_path, val=8)
    for i in range(7):
        (tmp_path / f"VOCdevkit/VOC2012/JPEGImages/2007_val{i}.jpg").unlink()
    assert main([str(tmp_path), "--name", "voc"]) == 1
    text = capsys.readouterr().out
    assert "7 of 8 images of voc val are missing" in text
    assert "2007_val0.jpg, 2007_val1.jpg, 2007_val2.jpg, 2007_val3.jpg, 2007_val4.jpg and 2 more" in text
    assert "  train 3 images" in text  # which is whole


def test_augmented_voc_from_sbd_or_from_a_list(tmp_path, capsys):
    labels = fixtures.voc(tmp_path)
    assert main([str(tmp_path), "--name", "voc_aug"]) == 1
    text = capsys.readouterr().out
    assert "absent   SBD's labels" in text
    assert "benchmark.tgz" in text
    fixtures.sbd(tmp_path, labels)
    assert main([str(tmp_path), "--name", "voc_aug"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'benchmark_RELEASE/dataset/cls'}: 6 (officially 11355)" in text
    assert "train 7 images (officially 10582), labels from SegmentationClass, SBD cls/*.mat" in text


def test_without_a_name_all_that_was_begun_is_looked_at(tmp_path, capsys):
    fixtures.voc(tmp_path)
    assert main([str(tmp_path)]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
    assert heads == ["voc: usable", "voc_aug: NOT usable for train"]
    shutil.rmtree(tmp_path / "VOCdevkit")
    assert main([str(tmp_path)]) == 1
    heads = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
    assert heads == [f"{name}: NOT usable for train and val" for name in ("voc", "voc_aug", "coco80", "coco_stuff27")]


def test_coco_says_which_labels_are_used_and_what_is_not_needed(tmp_path, capsys):
    for split in ("train2017", "val2017"):
        fixtures.coco(tmp_path, split, maps=False)
    assert main([str(tmp_path), "--name", "coco80"]) == 0
    text = capsys.readouterr().out
    assert "val   3 images (officially 5000), labels from instances_val2017.json" in text
    assert "(not needed with the instances" in text
    assert main([str(tmp_path), "--name", "coco_stuff27"]) == 1
    text = capsys.readouterr().out
    maps = tmp_path / "stuffthingmaps/val2017"
    assert f"{CURATED_FILE}: `dmsa prepare` makes it from the maps (only for the protocol stego)" in text
    assert f"{maps}: from stuffthingmaps_trainval2017.zip, github.com/nightrome/cocostuff" in text
    assert "train 3 images (officially 118287), no labels (cannot be scored)" in text
    fixtures.coco(tmp_path, "val2017")
    (tmp_path / "curated/val2017").mkdir(parents=True)
    (tmp_path / "curated/val2017" / CURATED_FILE).write_text("000000000001\n\n000000000002\n")
    assert main([str(tmp_path), "--name", "coco_stuff27"]) == 0
    assert f"{CURATED_FILE}: 2 (officially 2175)" in capsys.readouterr().out


def test_official_counts_are_recognised(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.SPLIT_IMAGES, "voc", {"train": 3, "val": 2})
    fixtures.voc(tmp_path)
    main([str(tmp_path), "--name", "voc"])
    assert "val   2 images (the official number)" in capsys.readouterr().out


def test_decoding_finds_broken_files(tmp_path, capsys):
    fixtures.voc(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2012"
    assert main([str(tmp_path), "--name", "voc", "--decode"]) == 0
    (voc / "JPEGImages/2007_train1.jpg").write_bytes(b"not an image")
    fixtures.write_palette(voc / "SegmentationClass/2007_val0.png", fixtures.blocks([0, 77]))
    assert main([str(tmp_path), "--name", "voc"]) == 0  # nobody looked
    capsys.readouterr()
    assert main([str(tmp_path), "--name", "voc", "--decode"]) == 1
    text = capsys.readouterr().out
    assert "1 broken: cannot decode" in text
    assert "2007_train1.jpg" in text
    assert "2007_val0.png holds ids outside the table: [77]" in text


def test_decoding_says_what_it_decoded_and_what_was_unusual(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        fixtures.write_image(tmp_path / f"images/{i}.jpg", 48, 64)
        fixtures.write_grey(tmp_path / f"masks/{i}.png", fixtures.blocks([0, 1, 255, 255], 48, 64))
    Image.open(tmp_path / "images/0.jpg").save(tmp_path / "images/0.jpg", exif=exif)  # its mask is as it is stored
    fixtures.write_image(tmp_path / "images/1.jpg", 64, 48)
    Image.open(tmp_path / "images/1.jpg").convert("CMYK").save(tmp_path / "images/1.jpg", exif=exif)
    (tmp_path / "images/._0.jpg").write_bytes(b"")
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    assert main([str(tmp_path), "--name", "folder"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "folder: usable",
        "  3 classes: 0 background (background), 1 cat (thing), 2 dog (thing)",
        "  train 3 images, labels from masks",
        f"        left out of {tmp_path}/images: 1 hidden (._0.jpg)",
        "  val   3 images, labels from masks",
        f"        left out of {tmp_path}/images: 1 hidden (._0.jpg)",
        "  3 images are in both splits: a score on them is no score on unseen images",
    ]
    assert main([str(tmp_path), "--name", "folder", "--decode"]) == 0
    assert capsys.readouterr().out.splitlines()[4:6] == [
        "        decoded 3 images of 48 x 64 to 48 x 64 pixels; 2 of 3 classes occur in their labels (not dog), 50.0 % "
        "of the pixels are 255 (ignored)",
        "        unusual: 1 in CMYK (1); 1 on their side (EXIF orientation 6), and so are their labels (0); 1 turned "
        "upright as EXIF says (orientation 6) (1)",
    ]


def test_binary_masks_of_0_and_255_are_not_usable(tmp_path, capsys):
    for i in range(2):
        fixtures.write_image(tmp_path / f"images/{i}.jpg", 48, 64)
        fixtures.write_grey(tmp_path / f"masks/{i}.png", fixtures.blocks([0, 255]))
    assert main([str(tmp_path), "--name", "folder"]) == 1
    assert "they hold only 0, 255, and 255 means 'ignore'" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    assert main([str(tmp_path), "--name", "folder", "--decode"]) == 1
    text = capsys.readouterr().out
    assert "all labels together hold background alone, beside 255 (binary masks are 0 and 1)" in text


def test_json_holds_the_same(tmp_path, capsys):
    fixtures.voc(tmp_path)
    assert main([str(tmp_path), "--name", "voc", "--format", "json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert (content["name"], content["usable"]) == ("voc", True)
    assert [split["images"] for split in content["splits"]] == [3, 2]
    assert [file["count"] for file in content["files"]] == [3, 2, 5, 5]
    assert {file["archive"] for file in content["files"]} == {"VOCtrainval_11-May-2012.tar"}


def test_folders_and_shapes(tmp_path, capsys):
    fixtures.write_image(tmp_path / "images/a.jpg")
    assert main([str(tmp_path), "--name", "folder"]) == 0
    assert "val   1 images, no labels (cannot be scored)" in capsys.readouterr().out
    assert main(["--name", "shapes"]) == 0
    assert "shapes: usable" in capsys.readouterr().out
    (tmp_path / "images/a.jpg").unlink()
    assert main([str(tmp_path), "--name", "folder"]) == 1
    assert "no images" in capsys.readouterr().out


def test_a_wrong_root_and_no_root(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith(f"dmsa doctor: there is no folder {tmp_path / 'nowhere'}; `dmsa prepare")
    with pytest.raises(ValueError, match="expected --root"):
        main([])
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--name", "vocs"])
    assert stop.value.code == 2


def test_nothing_is_written(tmp_path):
    fixtures.voc(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("voc", "voc_aug", "coco80", "coco_stuff27", "folder"):
        examine(name, str(tmp_path), decode=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_help_reads(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "dmsa doctor" in text
    assert "exit status" in text
    assert all(word in text for word in ("--root", "--name", "--decode", "--format"))
