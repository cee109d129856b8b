"""The feature bank: windows by hand, features by a plain loop, caching, resuming, sharding."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmsa.config import Config, DataConfig, LabelConfig
from dmsa.data.folder import Folder
from dmsa.data.images import CorruptImageError
from dmsa.data.transforms import MEAN, STD
from dmsa.labels import feature_bank
from dmsa.labels.cache import dataset_key
from dmsa.labels.feature_bank import FeatureBank, build_feature_bank, class_tokens, cut, window_shares, windows
from tests.dmsa.tiny import tiny_encoder

CONFIG = Config(data=DataConfig(size=48, workers=0), labels=LabelConfig(bank_scales=(0.5, 0.35)))


class Pictures:
    """Random images of several sizes, each with a bright square."""

    name = "pictures"
    classes = ("background", "a", "b")
    n_things, n_stuff, things_only = 2, 0, True

    def __init__(self, count: int = 5, damaged: tuple[int, ...] = (), things_only: bool = True) -> None:
        self.images, self.damaged, self.things_only = count, damaged, things_only
        self.n_stuff = 0 if things_only else 1
        self.read: list[int] = []

    def image_name(self, index: int) -> str:
        return f"picture{index}"

    def pixels(self, index: int) -> np.ndarray:
        self.read.append(index)
        if index in self.damaged:
            raise CorruptImageError(f"picture{index}.jpg", "truncated")
        random = np.random.default_rng(index)
        image = random.integers(0, 90, (60 + index, 80, 3), dtype=np.uint8)
        image[10:40, 20:50] += 150
        return image


def equal(first: FeatureBank, second: FeatureBank) -> bool:
    keys = ("foreground", "background", "foreground_image", "background_image")
    return all(np.array_equal(getattr(first, key), getattr(second, key)) for key in keys)


def test_windows_have_a_stride_of_half_a_side():
    found = windows((8, 10), (0.5, 0.25))
    assert found[:4] == [(0, 0, 4), (0, 2, 4), (0, 4, 4), (0, 6, 4)]
    assert [box for box in found if box[2] == 4] == [(t, x, 4) for t in (0, 2, 4) for x in (0, 2, 4, 6)]
    assert sum(box[2] == 2 for box in found) == 7 * 9
    assert windows((2, 2), (0.1,)) == [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]
    for scales in ((), (0.0,), (1.5,)):
        with pytest.raises(ValueError, match="scales"):
            windows((8, 8), scales)


def test_window_shares_count_the_foreground():
    foreground = torch.rand(3, 8, 10) > 0.5
    boxes = windows((8, 10), (0.5, 0.3))
    for (top, left, side), share in zip(boxes, window_shares(foreground, boxes).T, strict=True):
        patch = foreground[:, top : top + side, left : left + side]
        torch.testing.assert_close(share, patch.float().mean((1, 2)))


def test_cut_resizes_each_window():
    image, boxes = torch.randn(3, 40, 40), [(0, 0, 8), (4, 8, 16), (8, 0, 8)]
    for crop, (top, left, side) in zip(cut(image, boxes, 16), boxes, strict=True):
        expected = F.interpolate(image[None, :, top : top + side, left : left + side], (16, 16), mode="bilinear")
        torch.testing.assert_close(crop, expected[0])


def test_class_tokens_are_the_encoder_s_own():
    encoder, crops = tiny_encoder(), torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(class_tokens(encoder, crops), encoder(crops)[1])


@pytest.mark.parametrize("things_only", [True, False])
@pytest.mark.parametrize("batch", [3, 500])
def test_bank_equals_a_loop_over_images_and_crops(things_only, batch):
    encoder, dataset = tiny_encoder(), Pictures(3, things_only=things_only)
    bank = build_feature_bank(encoder, dataset, CONFIG, batch=batch, image_batch=2)
    from PIL import Image

    found = {"foreground": [], "background": []}
    for index in range(dataset.images):
        image = np.array(Image.fromarray(dataset.pixels(index)).resize((96, 96), Image.Resampling.BILINEAR)) / 255
        image = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1).float()
        row = encoder.attention(encoder.frozen(image[None]), (12, 12))[0, :, 1:].mean(0).view(12, 12)
        mask = (row > row.mean()).float()
        for top, left, side in windows((12, 12), (0.5, 0.35)):
            share = mask[top : top + side, left : left + side].mean()
            kind = "foreground" if share > 0.5 else "background" if 1 - share > 0.8 and not things_only else None
            if kind:
                crop = image[:, 8 * top : 8 * (top + side), 8 * left : 8 * (left + side)]
                found[kind].append(encoder(F.interpolate(crop[None], (48, 48), mode="bilinear"))[1])
    for kind, tokens in found.items():
        expected = torch.cat(tokens) if tokens else torch.zeros(0, 48)
        torch.testing.assert_close(torch.from_numpy(getattr(bank, kind)), expected, atol=1e-4, rtol=1e-4)
        assert len(getattr(bank, f"{kind}_image")) == len(expected)
    assert len(found["foreground"]) > 10
    assert np.all(np.diff(bank.foreground_image) >= 0)


def test_batches_fit_the_caches_of_a_cpu():
    encoder = tiny_encoder()
    side = encoder.patch_size
    assert feature_bank.batch_for(encoder, 16 * side, 128) == 8
    assert feature_bank.batch_for(encoder, 16 * side, 3) == 3
    assert feature_bank.batch_for(encoder, 100 * side, 128) == 1
    assert feature_bank.batch_for(tiny_encoder().to("meta"), 16 * side, 128) == 128


def test_cache_is_read_again_and_continued_after_a_stop(tmp_path, monkeypatch, capsys):
    """A group of images is written once it took long enough; a stop costs what came after it, and changes no bit."""
    monkeypatch.setattr(feature_bank, "PART_SECONDS", 0.0)
    encoder, dataset = tiny_encoder(), Pictures()
    expected = build_feature_bank(encoder, dataset, CONFIG, image_batch=2)
    real, done = feature_bank._extract, []

    def stop_in_the_second_group(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(feature_bank, "_extract", stop_in_the_second_group)
    with pytest.raises(KeyboardInterrupt):
        build_feature_bank(encoder, dataset, CONFIG, tmp_path, image_batch=2)
    monkeypatch.setattr(feature_bank, "_extract", real)
    dataset.read.clear()
    capsys.readouterr()
    assert equal(build_feature_bank(encoder, dataset, CONFIG, tmp_path, image_batch=2), expected)
    shown = capsys.readouterr().err
    assert "feature bank:  40%" in shown, "two of five images are in the finished part"
    assert "5/5" in shown
    assert set(dataset.read) == {0, 2, 3, 4}, "0 and 4 for the key; 0 and 1 are in the finished part"
    assert dataset.read.count(0) == 1
    dataset.read.clear()
    assert equal(build_feature_bank(encoder, dataset, CONFIG, tmp_path, image_batch=2), expected)
    assert sorted(dataset.read) == [0, 4]
    assert "feature bank" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp*"))


def test_files_are_written_early_and_hold_no_more_than_their_share(tmp_path, monkeypatch):
    def files(seconds: float, images: int) -> int:
        monkeypatch.setattr(feature_bank, "PART_SECONDS", seconds)
        monkeypatch.setattr(feature_bank, "PART_IMAGES", images)
        folder = tmp_path / f"{seconds}-{images}"
        build_feature_bank(tiny_encoder(), Pictures(5), CONFIG, folder, image_batch=1)
        return len(list(folder.rglob("part-*.npz")))

    assert files(0.0, 256) == 5
    assert files(60.0, 256) == 1
    assert files(60.0, 2) == 3


def test_progress_is_shown_from_the_first_image(capsys):
    build_feature_bank(tiny_encoder(), Pictures(3), CONFIG)
    printed = capsys.readouterr().err
    assert "feature bank:   0%" in printed
    assert "3/3" in printed


def test_key_depends_on_weights_data_and_configuration(tmp_path):
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    encoder = tiny_encoder()
    build_feature_bank(encoder, Pictures(2), CONFIG, tmp_path)
    build_feature_bank(encoder, Pictures(2), replace(CONFIG, out="elsewhere"), tmp_path)
    assert folders() == 1
    build_feature_bank(encoder, Pictures(3), CONFIG, tmp_path)
    build_feature_bank(encoder, Pictures(2), replace(CONFIG, labels=LabelConfig(bank_scales=(0.5,))), tmp_path)
    smaller = replace(CONFIG.labels, bank_crop=24)
    build_feature_bank(encoder, Pictures(2), replace(CONFIG, labels=smaller), tmp_path)
    with torch.no_grad():
        encoder.vit.norm.bias.add_(1)
    build_feature_bank(encoder, Pictures(2), CONFIG, tmp_path)
    assert folders() == 5


def test_crops_have_a_size_of_their_own(monkeypatch):
    encoder, sides = tiny_encoder(), []
    monkeypatch.setattr(feature_bank, "class_tokens", lambda e, crops: sides.append(crops.shape[2:]) or e(crops)[1])
    for crop, side in ((None, 48), (24, 24)):
        sides.clear()
        build_feature_bank(encoder, Pictures(2), replace(CONFIG, labels=replace(CONFIG.labels, bank_crop=crop)))
        assert {tuple(shape) for shape in sides} == {(side, side)}
    with pytest.raises(ValueError, match=r"bank_crop=20 is not a multiple"):
        build_feature_bank(encoder, Pictures(2), replace(CONFIG, labels=replace(CONFIG.labels, bank_crop=20)))


def test_damaged_images_are_skipped_by_name():
    encoder = tiny_encoder()
    with pytest.warns(UserWarning, match=r"skipped 1 damaged images: .*picture1\.jpg"):
        bank = build_feature_bank(encoder, Pictures(3, damaged=(1,)), CONFIG)
    assert set(bank.foreground_image) == {0, 2}
    with pytest.warns(UserWarning, match="skipped 2"):
        bank = build_feature_bank(encoder, Pictures(2, damaged=(0, 1)), CONFIG)
    assert bank.foreground.shape == (0, 48)


def test_fewer_images_are_spread_evenly():
    bank = build_feature_bank(tiny_encoder(), Pictures(5), replace(CONFIG, labels=LabelConfig(bank_images=2)))
    assert set(bank.foreground_image) == {0, 2}


def test_size_must_fit_the_patches():
    with pytest.raises(ValueError, match=r"config\.data\.size=50"):
        build_feature_bank(tiny_encoder(), Pictures(1), replace(CONFIG, data=DataConfig(size=50)))
    with pytest.raises(ValueError, match=r"bank_images=0"):
        build_feature_bank(tiny_encoder(), Pictures(1), replace(CONFIG, labels=LabelConfig(bank_images=0)))


SHARD = """
import sys
import torch
import torch.distributed as dist
from dmsa.labels import feature_bank
from dmsa.labels.cache import dataset_key
from dmsa.labels.clustering import prepare_centroids
from tests.dmsa.test_feature_bank import CONFIG, Pictures
from tests.dmsa.tiny import tiny_encoder

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
feature_bank.PART_SECONDS = 0.0
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
data = Pictures()
centroids = prepare_centroids(tiny_encoder(), data, CONFIG, f"{out}/cache{rank}")
centroids.save(f"{out}/{rank}.npz")
if rank:
    # Images 0 and 4 are read for the key, the last ones are this process's share.
    assert 2 <= len(set(data.read) - {0, 4}) <= 3, data.read
"""


@pytest.mark.slow
def test_two_processes_share_the_crops_and_get_the_same_centroids(tmp_path):
    from dmsa.labels.clustering import Centroids, prepare_centroids

    arguments = [sys.executable, "-c", SHARD]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "store"), str(tmp_path)], cwd=root) for rank in (0, 1)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    first, second = (Centroids.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert torch.equal(first.vectors, second.vectors)
    alone = prepare_centroids(tiny_encoder(), Pictures(), CONFIG, tmp_path / "alone")
    torch.testing.assert_close(alone.vectors, first.vectors, atol=1e-4, rtol=1e-4)
    assert alone.provenance == first.provenance


def test_an_exchanged_image_changes_the_key(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(Pictures().pixels(i)).save(tmp_path / "images" / f"{i}.png")

    def key():
        return dataset_key(Folder(DataConfig(root=str(tmp_path)), "train"))

    before = key()
    assert key() == before
    (tmp_path / "images" / "1.png").touch()
    assert key() == before  # a copy of the folder keeps its bank
    Image.fromarray(Pictures().pixels(1)[:30]).save(tmp_path / "images" / "1.png")
    assert key() != before
