"""Fusion, refinement and the pseudo label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dmsa.config import LabelConfig
from dmsa.labels.fuse import fuse, negative_label, normalize_cam, pseudo_label, refine_scores
from dmsa_kernels import PAR

CONFIG = LabelConfig(par_iterations=3, par_dilations=(1, 2))


def test_normalization_is_joint_over_classes_and_pixels():
    cam = torch.tensor([[[[1.0, 3.0]], [[5.0, 2.0]]], [[[7.0, 7.0]], [[7.0, 7.0]]]])  # [2, 2, 1, 2]
    expected = torch.tensor([[[[0.0, 0.5]], [[1.0, 0.25]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    assert torch.equal(normalize_cam(cam), expected)
    assert normalize_cam(cam[:0]).shape == (0, 2, 1, 2)


def test_things_get_a_background_channel_in_front():
    cam = torch.tensor([0.0, 0.04, 0.5, 1.0]).view(1, 1, 2, 2)
    scores = fuse(cam, None, things_only=True)
    torch.testing.assert_close(scores[0, 0].flatten(), torch.tensor([0.1, 0.06, 0.0, 0.0]))
    assert torch.equal(scores[:, 1:], cam)
    assert torch.equal(fuse(cam, None, things_only=False), cam)


def test_teacher_makes_half_of_the_scores():
    cam, teacher = torch.rand(2, 3, 4, 4), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(
        fuse(cam, teacher, True), 0.5 * teacher.softmax(1) + 0.5 * fuse(cam, None, things_only=True)
    )
    with pytest.raises(ValueError, match=r"teacher_logits\.shape"):
        fuse(cam, teacher, things_only=False)


def test_constant_cam_gives_background_everywhere():
    found = pseudo_label(torch.full((1, 3, 4, 4), 2.0), None, torch.rand(1, 3, 16, 16), True, CONFIG)
    assert (found.label == 0).all()
    assert found.scores.isfinite().all()
    assert not found.foreground.any()


@pytest.mark.parametrize("guide_size", [(32, 32), (34, 50), (7, 9)])
def test_refinement_is_par_at_half_the_crop_or_all_of_it_or_pooled_to_the_tokens(guide_size):
    scores, guide = torch.rand(2, 3, 4, 4), torch.rand(2, 3, *guide_size)
    half = (guide_size[0] // 2, guide_size[1] // 2)
    small = F.interpolate(guide, half, mode="bilinear", antialias=True)
    expected = PAR(CONFIG.par_dilations, CONFIG.par_iterations)(small, scores)
    pixels = refine_scores(scores, guide, replace(CONFIG, label_grid="pixels"))
    assert pixels.shape == (2, 3, *half)
    torch.testing.assert_close(pixels, expected)
    tokens = refine_scores(scores, guide, replace(CONFIG, label_grid="tokens"))
    torch.testing.assert_close(tokens, F.adaptive_avg_pool2d(expected, (4, 4)))
    whole = refine_scores(scores, guide, replace(CONFIG, par_resolution="full"))
    torch.testing.assert_close(whole, PAR(CONFIG.par_dilations, CONFIG.par_iterations)(guide, scores))


def test_refinement_follows_the_edges_of_the_guide():
    guide = torch.zeros(1, 3, 32, 32)
    guide[..., :20] = 1.0
    scores = torch.full((1, 2, 4, 4), 0.5)
    scores[0, 0, :, :2], scores[0, 1, :, 3:] = 0.9, 0.9
    pixels = refine_scores(scores, guide, LabelConfig(label_grid="pixels")).argmax(1)[0]
    # the guide's edge is at column 10 of 16 and not at 8, where the scores alone would put it
    assert (pixels[:, :10] == 0).all()
    assert (pixels[:, 11:] == 1).all()


@pytest.mark.parametrize("label_grid", ["tokens", "pixels"])
def test_par_off(label_grid):
    scores = torch.rand(1, 3, 4, 4)
    plain = refine_scores(scores, torch.rand(1, 3, 32, 32), LabelConfig(par="off", label_grid=label_grid))
    expected = scores if label_grid == "tokens" else F.interpolate(scores, 16, mode="bilinear", align_corners=True)
    assert torch.equal(plain, expected)


@pytest.mark.parametrize("label_grid", ["tokens", "pixels"])
@pytest.mark.parametrize("things_only", [True, False])
def test_pseudo_label_is_the_argmax_of_its_scores(label_grid, things_only):
    config = replace(CONFIG, label_grid=label_grid)
    teacher = torch.randn(2, 4 if things_only else 3, 4, 4)
    found = pseudo_label(torch.rand(2, 3, 4, 4), teacher, torch.rand(2, 3, 32, 32), things_only, config)
    side = 4 if label_grid == "tokens" else 16
    assert found.label.shape == found.foreground.shape == (2, side, side)
    assert torch.equal(found.label, found.scores.argmax(1))
    assert found.foreground.dtype == torch.bool


def test_labels_do_not_depend_on_the_rest_of_the_batch():
    cam, guide = torch.rand(3, 4, 4, 4), torch.rand(3, 3, 32, 32)
    together = pseudo_label(cam, None, guide, True, CONFIG)
    alone = pseudo_label(cam[1:2], None, guide[1:2], True, CONFIG)
    torch.testing.assert_close(together.scores[1:2], alone.scores)


def test_negative_label_permutes_the_channels_of_the_whole_batch():
    scores = torch.rand(2, 5, 3, 3)
    generator = torch.Generator().manual_seed(3)
    permutation = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    expected = scores[:, permutation].argmax(1)
    assert torch.equal(negative_label(scores, generator=generator), expected)
    assert torch.equal(negative_label(scores, permutation), expected)
    with pytest.raises(ValueError, match=r"permutation\.shape"):
        negative_label(scores, torch.arange(4))


def test_bad_arguments_are_named():
    scores = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"guide\.shape"):
        refine_scores(scores, torch.rand(2, 3, 32, 32), CONFIG)
    with pytest.raises(ValueError, match=r"labels\.par='yes'"):
        refine_scores(scores, torch.rand(1, 3, 32, 32), replace(CONFIG, par="yes"))


def test_81_classes_at_batch_43_never_hold_all_neighbours():
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError as error:
        pytest.skip(f"this kernel does not reset the memory high-water mark: {error}")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    before = kilobytes("VmRSS")
    cam, guide = torch.rand(43, 80, 20, 20), torch.rand(43, 3, 160, 160)
    pseudo_label(cam, None, guide, True, LabelConfig(par_iterations=1))
    used = 1024 * (kilobytes("VmHWM") - before)
    neighbours = 43 * 81 * 48 * 80 * 80 * 4
    assert used < neighbours / 4
