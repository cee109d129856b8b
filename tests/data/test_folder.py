import numpy as np
import pytest
from PIL import Image

from dmsa.config import DataConfig
from dmsa.data import build
from tests.data import fixtures


def config(root, **changes):
    return DataConfig(name="folder", root=str(root), size=32, crop=16, **changes)


def fill(root, count=3, split=""):
    for i in range(count):
        fixtures.write_image(root / "images" / split / f"{i}.{'jpg' if i else 'png'}", seed=i)


def test_images_alone(tmp_path):
    for i in range(3):
        fixtures.write_image(tmp_path / "holiday" / f"{i}.jpg", seed=i)
    data = build(config(tmp_path, classes=5), "train")
    assert (len(data), data.num_classes, data.n_things, data.n_stuff) == (3, 5, 3, 2)
    assert data.image_name(1) == "holiday/1"
    assert (data[1]["label"] == 255).all()
    assert data.raw(0)[1] is None
    assert len(build(config(tmp_path), "val")) == 3


def test_masks_and_names(tmp_path):
    for split in ("train", "val"):
        fill(tmp_path, split=split)
        for i in range(3):
            fixtures.write_palette(tmp_path / "masks" / split / f"{i}.png", fixtures.blocks([0, 1, 255]))
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    data = build(config(tmp_path), "val")
    assert data.classes == ["background", "cat", "dog"]
    assert (data.n_things, data.n_stuff, data.things_only) == (2, 0, True)
    np.testing.assert_array_equal(data.raw(0)[1], fixtures.blocks([0, 1, 255]))
    (tmp_path / "classes.txt").write_text("cat, thing\nsky, stuff\nwater, stuff\n")
    data = build(config(tmp_path), "val")
    assert data.classes == ["cat", "sky", "water"]
    assert (data.n_things, data.n_stuff, data.things_only) == (1, 2, False)


def test_without_names_both_splits_count_the_same_classes(tmp_path):
    for split, ids in (("train", [0, 1]), ("val", [0, 6, 255])):
        fill(tmp_path, 1, split=split)
        fixtures.write_grey(tmp_path / "masks" / split / "0.png", fixtures.blocks(ids))
    assert [build(config(tmp_path), split).num_classes for split in ("train", "val")] == [7, 7]


def test_some_masks_missing(tmp_path):
    fill(tmp_path, 8)
    fixtures.write_grey(tmp_path / "masks" / "0.png", fixtures.blocks([0, 1]))
    with pytest.raises(FileNotFoundError, match=r"7 of 8 masks of val are missing in .*1\.png, .* and 2 more"):
        build(config(tmp_path), "val")


def test_ids_outside_the_names(tmp_path):
    fill(tmp_path, 1)
    fixtures.write_grey(tmp_path / "masks" / "0.png", fixtures.blocks([0, 3, 9]))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"0\.png holds ids outside the table: \[3, 9\]; expected 0\.\.1 \(2 ids\)"):
        build(config(tmp_path), "val")[0]


def test_16_bit_masks(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "masks").mkdir()
    ids = fixtures.blocks([0, 1]).astype(np.uint16)
    Image.fromarray(ids).save(tmp_path / "masks/0.png")
    Image.fromarray(ids * 300).save(tmp_path / "masks/1.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    data = build(config(tmp_path), "val")
    np.testing.assert_array_equal(data.raw(0)[1], ids)
    with pytest.raises(ValueError, match=r"1\.png holds ids up to 300"):
        data.raw(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 classes"),
        ("a, animal\n", "has kinds animal"),
        ("sky, stuff\ncat, thing\n", "things before stuff"),
        ("background\nsky, stuff\n", "has a background and stuff"),
    ],
)
def test_bad_class_names(tmp_path, text, message):
    fill(tmp_path, 1)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt {message}|classes\.txt .*{message}"):
        build(config(tmp_path), "val")


def test_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        build(config(tmp_path / "absent"), "val")
    with pytest.raises(FileNotFoundError, match="no images"):
        build(config(tmp_path), "val")
    with pytest.raises(ValueError, match=r"needs a folder of images.*--data\.root FOLDER of train\.py, --root FOLDER"):
        build(DataConfig(name="folder"), "val")


def test_two_images_of_one_name(tmp_path):
    fixtures.write_image(tmp_path / "a.jpg")
    fixtures.write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"images in .* differ only by their ending, a\.jpg, a\.png"):
        build(config(tmp_path), "val")


# --- masks whose classes cannot be told ------------------------------------------------------------------------


def with_masks(root, *masks):
    for i, mask in enumerate(masks):
        fixtures.write_image(root / "images" / f"{i}.jpg")
        fixtures.write_grey(root / "masks" / f"{i}.png", fixtures.blocks(mask))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([[0, 255], [255]], r"they hold only 0, 255, and 255 means 'ignore' \(binary masks are 0 and 1\)"),
        ([[255]], "they hold only 255, and 255 means"),
        ([[3], [3]], "they hold only 3$"),
        ([[0, 128]], r"they hold 0, 128: 2 of the ids 0\.\.128"),
        ([[0, 85, 170], [170]], r"they hold 0, 85, 170: 3 of the ids 0\.\.170"),
    ],
)
def test_masks_without_class_names(tmp_path, masks, message):
    with_masks(tmp_path, *masks)
    with pytest.raises(ValueError, match=rf"two classes at least in the {len(masks)} masks in .*masks.*{message}"):
        build(config(tmp_path), "val")
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(180)))
    assert build(config(tmp_path), "val").num_classes == 180


# --- names and places that two readers could understand differently ----------------------------------------------


def test_one_split_folder_needs_the_other(tmp_path):
    fill(tmp_path, split="train")
    assert len(build(config(tmp_path), "train")) == 3
    with pytest.raises(FileNotFoundError, match=r"no .*images/val, beside the other split; expected both train, val"):
        build(config(tmp_path), "val")
    fill(tmp_path, 1, split="val")
    fixtures.write_image(tmp_path / "images/beside.jpg")
    fixtures.write_image(tmp_path / "above.jpg")
    data = build(config(tmp_path), "val")
    assert len(data) == 1
    assert data.left_out == [
        f"left out: 1 images in {tmp_path}, since there is {tmp_path}/images (above.jpg)",
        f"left out: 1 images in {tmp_path}/images that are in no split (beside.jpg)",
    ]


@pytest.mark.parametrize("name", ["Images", "MASKS", "classes.txt.txt", "Classes.txt"])
def test_names_that_are_almost_right(tmp_path, name):
    fixtures.write_image(tmp_path / "a.jpg")
    (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=rf"{name} is not read under this name; expected '{name[:7].lower().rstrip('.')}"
    ):
        build(config(tmp_path), "val")


def test_masks_in_the_wrong_place_are_not_overlooked(tmp_path):
    for split in ("train", "val"):
        fill(tmp_path, 1, split=split)
    fixtures.write_grey(tmp_path / "masks/0.png", fixtures.blocks([0, 1]))
    with pytest.raises(FileNotFoundError, match=r"no masks \(\.png\) in .*masks/val"):
        build(config(tmp_path), "val")
    (tmp_path / "masks/0.png").unlink()
    fixtures.write_grey(tmp_path / "masks/val/0.png", fixtures.blocks([0, 1]))
    train, val = (build(config(tmp_path), split) for split in ("train", "val"))
    assert (train.labels_from, val.labels_from) == (None, "masks/val")
    assert train.left_out == [f"no masks in {tmp_path}/masks/train"]


def test_masks_of_another_kind_are_not_overlooked(tmp_path):
    fill(tmp_path, 1)
    fixtures.write_image(tmp_path / "masks/0.jpg")
    with pytest.raises(FileNotFoundError, match=r"no masks \(\.png\) in .*masks; left out .*: 1 with the ending \.jpg"):
        build(config(tmp_path), "val")
    fixtures.write_grey(tmp_path / "masks/0.PNG", fixtures.blocks([0, 1]))
    fixtures.write_grey(tmp_path / "masks/1.png", fixtures.blocks([0, 1]))
    data = build(config(tmp_path), "val")
    np.testing.assert_array_equal(data.raw(0)[1], fixtures.blocks([0, 1]))
    assert data.left_out == [
        f"left out of {tmp_path}/masks: 1 with the ending .jpg (0.jpg)",
        f"left out: 1 masks in {tmp_path}/masks without an image (1)",
    ]
    fixtures.write_grey(tmp_path / "masks/0.png", fixtures.blocks([0, 1]))
    with pytest.raises(ValueError, match=r"masks in .* differ only by their ending, 0\.PNG, 0\.png"):
        build(config(tmp_path), "val")
