import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.transforms import (
    MEAN,
    STD,
    Augmentation,
    TrainTransform,
    ValTransform,
    denormalise,
    normalise,
    recolour,
    resample_label,
    sample_rng,
)
from tests.data import fixtures

CONFIG = DataConfig(size=64, crop=32)


def coded(height=60, width=80):
    """Return an image whose red and green are the column and the row, and the label of 8 x 8 cells of the same."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    image = np.stack([x * 255 / width, y * 255 / height, 0 * x + 128], -1).round().astype(np.uint8)
    return image, (y // (height / 8) * 8 + x // (width / 8)).astype(np.uint8)


def test_image_guide_and_label_share_one_geometry():
    image, label = coded()
    transform = TrainTransform(CONFIG, seed=3)
    flips = set()
    for index in range(40):
        sample = transform(image, label, index=index)
        flips.add(Augmentation.draw(sample_rng(3, 0, index), CONFIG.crop_scale).flip)
        red, green = sample["guide"][:2]
        # Cell of every pixel, by what it shows and by its label; they may differ only at the cells' borders.
        column, row = (8 * red), (8 * green)
        inside = ((column % 1 - 0.5).abs() < 0.4) & ((row % 1 - 0.5).abs() < 0.4)
        assert inside.float().mean() > 0.4
        assert torch.equal((row.long() * 8 + column.long())[inside], sample["label"][inside])
    assert flips == {True, False}


def test_the_image_is_the_guide_unless_it_is_recoloured():
    image, label = coded()
    image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    transform = TrainTransform(CONFIG, seed=0)
    same = 0
    for index in range(200):
        sample = transform(image, label, index=index)
        a = Augmentation.draw(sample_rng(0, 0, index), CONFIG.crop_scale)
        plain = a.jitter is None and not a.grey and a.blur is None
        equal = torch.allclose(denormalise(sample["image"]), sample["guide"], atol=1e-5)
        assert equal if plain else not equal or (a.blur or 1) < 0.3  # a blur of 0.1 pixels changes nothing
        same += plain
    assert 60 < same < 120  # .7 * .8 * .8 of 200 is 90


def test_augmentation_has_the_stated_distribution():
    drawn = [Augmentation.draw(sample_rng(0, 0, i), (0.4, 1.0)) for i in range(4000)]
    area = np.array([a.side**2 for a in drawn])
    assert 0.4 <= area.min() < 0.41
    assert 0.99 < area.max() <= 1
    assert abs(area.mean() - 0.7) < 0.01
    assert all(a.left >= 0 and a.left + a.side <= 1 and a.top >= 0 and a.top + a.side <= 1 for a in drawn)
    for rate, wanted in (
        (np.mean([a.flip for a in drawn]), 0.5),
        (np.mean([a.jitter is not None for a in drawn]), 0.3),
        (np.mean([a.grey for a in drawn]), 0.2),
        (np.mean([a.blur is not None for a in drawn]), 0.2),
    ):
        assert abs(rate - wanted) < 0.03
    jitter = np.array([a.jitter for a in drawn if a.jitter])
    assert (np.abs(jitter.min(0) - [0.2, 0.2, 0.2, -0.2]) < 0.01).all()
    assert (np.abs(jitter.max(0) - [1.8, 1.8, 1.8, 0.2]) < 0.01).all()
    assert {a.jitter_order[0] for a in drawn} == {0, 1, 2, 3}


def test_recolouring_does_what_its_names_say():
    image = Image.fromarray(coded()[0])
    plain = Augmentation(0, 0, 1, False, None, (0, 1, 2, 3), False, None)
    assert recolour(image, plain) is image
    grey = np.array(recolour(image, dataclasses.replace(plain, grey=True)))
    assert (grey[..., 0] == grey[..., 1]).all()
    half = np.array(recolour(image, dataclasses.replace(plain, jitter=(0.5, 1, 1, 0)))).astype(float)
    assert np.abs(half - np.array(image) / 2).max() <= 6  # brightness, and HSV's rounding
    turned = recolour(Image.new("RGB", (4, 4), (255, 0, 0)), dataclasses.replace(plain, jitter=(1, 1, 1, 1 / 3)))
    assert np.abs(np.array(turned).astype(int) - [0, 255, 0]).max() <= 3
    checks = Image.fromarray((np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.array(recolour(checks, dataclasses.replace(plain, blur=2.0))).std() < 10


def test_label_resampling_takes_the_pixel_at_the_centre():
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert resample_label(label, (3, 4)) is not label
    np.testing.assert_array_equal(resample_label(label, (3, 4)), label)
    np.testing.assert_array_equal(resample_label(label, (6, 8)), label.repeat(2, 0).repeat(2, 1))
    for size in ((2, 3), (7, 5), (1, 1)):
        want = np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
        np.testing.assert_array_equal(resample_label(label, size), want)


def test_validation_squashes_without_chance():
    image, label = coded()
    transform = ValTransform(CONFIG)
    sample = transform(image, label)
    assert sample["size"] == (60, 80)
    assert sample["image"].shape == (3, 64, 64)
    want = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal((sample["guide"] * 255).round().permute(1, 2, 0).numpy(), want)
    assert torch.equal(sample["image"], transform(image, label, index=5, epoch=9)["image"])
    assert set(sample["label"].unique().tolist()) == set(range(64))


def test_normalisation_is_imagenets():
    pixels = torch.tensor([0, 128, 255]).view(3, 1, 1)
    want = (pixels.double().flatten() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    assert torch.allclose(normalise(pixels).flatten().double(), want, atol=1e-6)
    assert torch.allclose(denormalise(normalise(pixels)), pixels / 255, atol=1e-6)


def write(root, count=6):
    for i in range(count):
        fixtures.write_image(root / f"{i}.jpg", seed=i)
    return DataConfig(name="folder", root=str(root), size=32, crop=16)


def collect(data, workers, epochs):
    loader = DataLoader(data, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    images = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        images.append(torch.cat([batch["image"] for batch in loader]))
    return images


def test_the_sequence_does_not_depend_on_the_workers(tmp_path):
    config = dataclasses.replace(write(tmp_path), repeat=2)
    alone = collect(build(config, "train", seed=7), 0, 2)
    for workers in (1, 2):
        assert all(
            torch.equal(a, b) for a, b in zip(alone, collect(build(config, "train", seed=7), workers, 2), strict=True)
        )
    assert alone[0].shape[0] == 12
    assert not torch.equal(alone[0], alone[1])  # another epoch
    assert not torch.equal(alone[0][:6], alone[0][6:])  # another visit of the same images
    assert not torch.equal(alone[0], collect(build(config, "train", seed=8), 0, 1)[0])


def test_corrupt_images_are_replaced_counted_and_named_once(tmp_path):
    config = write(tmp_path)
    (tmp_path / "2.jpg").write_bytes(b"")
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) // 2])
    data = build(config, "train")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = [data[i]["name"] for i in range(6)]
    assert names == ["0", "1", "4", "4", "4", "5"]
    assert [data[i]["index"] for i in (2, 3)] == [4, 4]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2  # each once, though both were met twice
    assert re.search(r"skipped: cannot decode .*2\.jpg.*\(1 skipped so far\)", messages[0])
    assert re.search(r"skipped: cannot decode .*3\.jpg.*truncated.*\(2 skipped so far\)", messages[1])
    assert data.skipped() == ["2", "3"]


def test_what_workers_skip_is_known_to_the_parent(tmp_path):
    config = write(tmp_path)
    (tmp_path / "1.jpg").write_bytes(b"no image")
    data = build(config, "train")
    names = [name for batch in DataLoader(data, batch_size=2, num_workers=2) for name in batch["name"]]
    assert names == ["0", "2", "2", "3", "4", "5"]
    assert data.skipped() == ["1"]


def test_nothing_left_is_an_error(tmp_path):
    config = write(tmp_path, 2)
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="none of the 2 images"),
    ):
        build(config, "train")[0]


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (20, 10), 77).save(tmp_path / "grey.jpg")
    Image.new("RGBA", (20, 10), (10, 20, 30, 128)).save(tmp_path / "rgba.png")
    Image.new("P", (20, 10), 0).save(tmp_path / "palette.png")
    Image.new("CMYK", (20, 10)).save(tmp_path / "cmyk.jpg")
    config = DataConfig(name="folder", root=str(tmp_path), size=32, crop=16)
    for split in ("train", "val"):
        data = build(config, split)
        assert all(data[i]["image"].shape[0] == 3 for i in range(4))
    assert data.raw(1)[0].shape == (10, 20, 3)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.4), (0.5, 1.1)])
def test_bad_crop_scale(scale):
    with pytest.raises(ValueError, match=r"config\.crop_scale="):
        TrainTransform(dataclasses.replace(CONFIG, crop_scale=scale))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"config\.crop=0"):
        TrainTransform(dataclasses.replace(CONFIG, crop=0))
    with pytest.raises(ValueError, match=r"config\.size=0"):
        ValTransform(dataclasses.replace(CONFIG, size=0))
    with pytest.raises(ValueError, match="seed=-1"):
        TrainTransform(CONFIG, seed=-1)
    with pytest.raises(ValueError, match=r"image\.shape=\(4, 4\)"):
        ValTransform(CONFIG)(np.zeros((4, 4), dtype=np.uint8), None)
    with pytest.raises(ValueError, match="split='test'"):
        build(CONFIG, "test")
    with pytest.raises(ValueError, match=r"config\.name='vocs'"):
        build(dataclasses.replace(CONFIG, name="vocs"), "val")


def test_limits_spread_over_the_set(tmp_path):
    config = dataclasses.replace(write(tmp_path), train_images=3, repeat=2, val_images=2)
    train, val = build(config, "train"), build(config, "val")
    assert (len(train), train.images, len(val)) == (6, 3, 2)
    assert [train.image_name(i) for i in range(3)] == ["0", "2", "4"]
    with pytest.raises(ValueError, match="limit=0"):
        build(dataclasses.replace(config, val_images=0), "val")
    with pytest.raises(IndexError, match="index=6"):
        train[6]


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_decoded_at_a_smaller_scale_keep_the_geometry(tmp_path, split):
    """A JPEG much larger than the crop is decoded at a fraction of its size; its mask is not."""
    height, width = 601, 799  # no multiple of the decoder's 8
    image, label = coded(height, width)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images/a.jpg", quality=98, subsampling=0)
    fixtures.write_palette(tmp_path / "masks/a.png", label)
    config = DataConfig(name="folder", root=str(tmp_path), size=64, crop=32, repeat=20)
    data = build(config, split, seed=1)
    with Image.open(tmp_path / "images/a.jpg") as opened:
        opened.draft("RGB", (64, 64))
        assert opened.size[0] < width / 4  # or this test tests nothing
    for index in range(len(data)):
        sample = data[index]
        column, row = 8 * sample["guide"][0], 8 * sample["guide"][1]
        inside = ((column % 1 - 0.5).abs() < 0.35) & ((row % 1 - 0.5).abs() < 0.35)
        assert inside.float().mean() > 0.3
        assert torch.equal((row.long() * 8 + column.long())[inside], sample["label"][inside])
