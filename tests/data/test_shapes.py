"""The procedural set: exact, reproducible, disjoint splits, and hard for colours."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.shapes import OUTLINES, PALETTE, TEXTURES, THINGS, Shapes, render

CONFIG = DataConfig(name="shapes", size=96, crop=64, train_images=40, val_images=20)


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    pairs = [render(0, "val", index, 96) for index in range(80)]
    return np.stack([image for image, _ in pairs]), np.stack([label for _, label in pairs])


def test_same_seed_same_picture_and_splits_differ():
    image, label = render(3, "train", 5, 64)
    again, label_again = render(3, "train", 5, 64)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    others = [render(3, "val", 5, 64), render(4, "train", 5, 64), render(3, "train", 6, 64)]
    assert all((image != other).mean() > 0.5 for other, _ in others)


def test_no_picture_of_train_is_in_val():
    def digests(split: str) -> set[bytes]:
        return {render(0, split, index, 32)[0].tobytes() for index in range(60)}

    train, val = digests("train"), digests("val")
    assert len(train) == len(val) == 60
    assert not train & val


def test_composition_does_not_depend_on_the_size():
    _, small = render(0, "train", 1, 48)
    _, large = render(0, "train", 1, 144)
    assert (large[1::3, 1::3] == small).mean() > 0.97


def test_label_is_pixel_exact():
    # The background is untextured and the noise small: painting over the objects changes exactly their pixels.
    image, label = render(0, "val", 2, 96)
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (96, 96, 3)
    assert label.shape == (96, 96)
    inside, outside = label > 0, label == 0
    # Neighbouring pixels on two sides of a label border differ far more often than two pixels of the background do.
    step = np.abs(image[:, 1:].astype(int) - image[:, :-1]).max(-1) > 40
    border = inside[:, 1:] & outside[:, :-1] | outside[:, 1:] & inside[:, :-1]
    flat = outside[:, 1:] & outside[:, :-1]
    assert step[border].mean() > 0.75
    assert step[flat].mean() < 0.15


def test_shares_and_number_of_objects(pictures):
    _, label = pictures
    share = np.bincount(label.ravel(), minlength=7) / label.size
    assert 0.4 < share[0] < 0.7
    assert share[1:].min() > 0.03
    assert share[1:].max() < 0.13
    kinds = [len(np.unique(one[one > 0])) for one in label]
    assert min(kinds) >= 1
    assert max(kinds) <= 4
    assert len(set(kinds)) >= 3


def test_objects_span_several_tokens(pictures):
    _, label = pictures
    areas = [np.count_nonzero(one == kind) for one in label for kind in np.unique(one[one > 0])]
    assert np.median(areas) > 12 * 8 * 8  # tokens of 8 pixels


def test_every_class_has_its_own_outline_and_texture():
    outlines, textures = zip(*THINGS.values(), strict=True)
    assert len(set(outlines)) == len(set(textures)) == len(THINGS)
    assert set(outlines) == set(OUTLINES)
    assert set(textures) == set(TEXTURES)
    axis = np.linspace(-1.2, 1.2, 97)
    y, x = axis[:, None], axis[None, :]
    for a, b in itertools.combinations(OUTLINES.values(), 2):
        first, second = a(x, y), b(x, y)
        assert (first & second).sum() / (first | second).sum() < 0.9


def test_mean_colour_says_nothing_about_the_class(pictures):
    image, label = pictures
    overall = image[label > 0].mean(0)
    spread = image[label > 0].std(0)
    for kind in range(1, 7):
        assert (np.abs(image[label == kind].mean(0) - overall) < 0.35 * spread).all()


def test_clustering_colours_fails(pictures):
    image, label = (array[:40, ::2, ::2] for array in pictures)
    clusters = KMeans(7, n_init=2, random_state=0).fit_predict(image.reshape(-1, 3).astype(np.float32))
    table = np.bincount(label.ravel().astype(int) * 7 + clusters, minlength=49).reshape(7, 7)
    table = table[:, linear_sum_assignment(table, maximize=True)[1]]
    iou = table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal())
    assert iou.mean() < 0.12  # all background gives 0.08


def test_dataset_follows_the_interface():
    train, val = build(CONFIG, "train", seed=1), build(CONFIG, "val", seed=1)
    assert isinstance(train, Shapes)
    assert (len(train), len(val)) == (40, 20)
    assert train.classes == ["background", *THINGS]
    assert (train.num_classes, train.n_things, train.n_stuff, train.things_only) == (7, 6, 0, True)
    assert train.palette.shape == (7, 3)
    assert train.palette.dtype == np.uint8
    assert len(np.unique(PALETTE, axis=0)) == 7
    sample = train[0]
    assert sample["image"].shape == sample["guide"].shape == (3, 64, 64)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].shape == (64, 64)
    assert sample["label"].dtype == torch.int64
    assert 0 <= sample["guide"].min() <= sample["guide"].max() <= 1
    whole = val[3]
    assert whole["image"].shape == (3, 96, 96)
    assert tuple(whole["size"]) == (96, 96)
    image, label = val.raw(3)
    np.testing.assert_array_equal(whole["label"].numpy(), label)
    np.testing.assert_array_equal((whole["guide"] * 255).round().permute(1, 2, 0).numpy(), image)


def test_epochs_change_the_crop_and_not_the_picture():
    train = build(CONFIG, "train", seed=0)
    first, picture = train[7]["guide"], train.raw(7)[0].copy()
    train.set_epoch(1)
    assert not torch.equal(first, train[7]["guide"])
    np.testing.assert_array_equal(picture, train.raw(7)[0])
    train.set_epoch(0)
    torch.testing.assert_close(first, train[7]["guide"], rtol=0, atol=0)


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("dmsa.data.shapes.CACHE_BYTES", 3 * 4 * 96**2)
    val = build(CONFIG, "val")
    pictures = [val.raw(index)[0].copy() for index in range(6)]
    assert len(val._cache) == 3
    for index in (0, 5, 2):
        np.testing.assert_array_equal(val.raw(index)[0], pictures[index])


@pytest.mark.parametrize(
    ("change", "split", "seed", "message"),
    [
        ({}, "test", 0, "split"),
        ({}, "train", -1, "seed"),
        ({"size": 16}, "train", 0, "config.size=16"),
        ({"train_images": 0}, "train", 0, "train_images=0"),
        ({"val_images": -2}, "val", 0, "val_images=-2"),
    ],
)
def test_bad_arguments_are_named(change, split, seed, message):
    config = DataConfig(**{"name": "shapes", "size": 96, **change})
    with pytest.raises(ValueError, match=message):
        Shapes(config, split, seed)


def test_rendering_is_fast():
    began = time.process_time()
    for index in range(40):
        render(0, "train", index, 96)
    # Processor time: 200 pictures a second and core are promised on an idle machine, half of it must hold on any.
    assert 40 / (time.process_time() - began) > 100
