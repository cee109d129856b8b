"""The certainty of masks, and the fitted presets whose anchor follows from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmsa_kernels import PAR, certainty
from dmsa_kernels.refine import refine
from dmsa_kernels.refine.certainty import CertaintyAnchor
from dmsa_kernels.refine.fitted import fitted_preset


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(masks):
    """One image [C, h, w] in float64, as loops."""
    planes = masks.double().numpy()
    classes, height, width = planes.shape
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), mode="edge")
    smooth = np.zeros_like(planes)
    for y in range(height):
        for x in range(width):
            smooth[:, y, x] = padded[:, y : y + 3, x : x + 3].mean((1, 2))
    ordered = np.sort(smooth, 0)
    others = ordered[:-1].mean(0) if classes > 1 else smooth.min()
    apart = (ordered[-1] - others).mean()
    inner = planes[:, 1:-1, 1:-1]
    beside = planes[:, :-2, 1:-1] + planes[:, 2:, 1:-1] + planes[:, 1:-1, :-2] + planes[:, 1:-1, 2:]
    steps = np.sort(np.abs(inner - beside / 4).ravel())
    noise = steps[(len(steps) - 1) // 2] / (0.6744897501960817 * 1.25**0.5)
    return apart / (smooth.max() - smooth.min()) / (1 + min(noise / apart / 0.6, 4) ** 8)


def regions(size=24):
    """Three classes in blocks of eight, one-hot."""
    label = torch.arange(size).div(8, rounding_mode="floor")
    label = (label[:, None] + label[None]) % 3
    return F.one_hot(label, 3).permute(2, 0, 1)[None].float()


def noisy(sigma, size=24):
    masks = regions(size)
    return masks + sigma * torch.randn(masks.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.4, 0.6])
def test_certainty_is_how_far_the_best_class_stands_out_without_noise(sigma):
    masks = noisy(sigma)
    assert certainty(masks).item() == pytest.approx(by_hand(masks[0]), rel=1e-3, abs=1e-9)
    torch.testing.assert_close(certainty(7 * masks - 3), certainty(masks), rtol=1e-4, atol=1e-6)


def test_one_hot_regions_are_sure_and_equal_masks_are_not():
    assert certainty(regions(96)).item() > 0.75
    assert certainty(torch.full((2, 4, 8, 8), 0.25)).flatten().tolist() == [0, 0]


def test_classes_with_equal_masks_that_vary_are_not_sure():
    ramp = torch.arange(12.0).expand(1, 2, 8, 12)
    assert certainty(ramp).item() == 0
    assert PAR.for_stride(8)(torch.rand(1, 3, 64, 96), ramp).isfinite().all()


def test_a_single_class_is_compared_with_its_minimum():
    masks = rand(2, 1, 6, 7).cumsum(2)
    for i in range(2):
        assert certainty(masks)[i].item() == pytest.approx(by_hand(masks[i]), rel=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (5, 2)])
def test_maps_of_one_or_two_cells_have_a_certainty(size):
    found = certainty(rand(2, 3, *size))
    assert ((found >= 0) & (found <= 1)).all()


def test_classes_that_are_not_valid_are_not_looked_at():
    masks, valid = rand(3, 4, 6, 7).cumsum(2), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    filled = masks.masked_fill(~valid[:, :, None, None], float("nan"))
    found = certainty(filled, valid).flatten()
    assert found[0].item() == pytest.approx(by_hand(masks[0, [0, 1, 3]]), rel=1e-3)
    torch.testing.assert_close(found[1], certainty(masks[1:2, 2:3]).flatten()[0])
    assert found[2] == 0


def test_masks_without_classes_or_images_and_values_that_are_not_finite():
    assert certainty(rand(2, 0, 3, 3)).flatten().tolist() == [0, 0]
    assert certainty(rand(0, 2, 3, 3)).shape == (0, 1, 1, 1)
    masks = rand(1, 3, 4, 4)
    masks[0, 0, 0, 0], masks[0, 1, 1, 1] = float("nan"), float("inf")
    assert torch.isfinite(certainty(masks)).all()
    with pytest.raises(ValueError, match=r"masks.shape=\(3, 4\) must have four dimensions"):
        certainty(rand(3, 4))


def test_noise_lowers_it_until_nothing_is_kept():
    found = [certainty(noisy(sigma)).item() for sigma in (0, 0.3, 0.6, 2)]
    assert found == sorted(found, reverse=True)
    anchor = CertaintyAnchor(share=0.95, doubt=0.25)
    kept = [anchor(noisy(sigma)).max().item() for sigma in (0, 0.3, 0.6)]
    assert kept[0] == pytest.approx(0.95 * (found[0] - 0.25) / 0.75)
    assert kept[0] > kept[1] > kept[2] == 0
    assert anchor(noisy(0)).shape == (1, 1, 24, 24)


@pytest.mark.parametrize("stride", [4, 6.5, 8, 14, 16, 24, 32, 45.3, 64])
def test_presets_fit_the_cell(stride):
    preset = fitted_preset(stride)
    far, steps = preset.far
    for dilations in (far, preset.dilations):
        assert list(dilations) == sorted(set(dilations))
        assert dilations[0] >= 1
    assert 2 * far[-1] <= min(stride + 1, 24)
    # a quarter of the pixels in the first pass; no more than PAR as public code runs it
    assert len(far) * steps / 4 + len(preset.dilations) * preset.num_iter <= 6 * 10


def test_a_cell_of_two_sides_has_the_preset_of_their_mean():
    par = PAR.for_stride((30.5, 45.75))
    assert par.dilations == list(fitted_preset((30.5 * 45.75) ** 0.5).dilations)
    assert par(rand(1, 3, 61, 183), rand(1, 2, 2, 4)).shape == (1, 2, 61, 183)
    with pytest.raises(ValueError, match=r"must be a number from 4 to 64"):
        PAR.for_stride([8, 8, 8])


def test_the_anchor_of_a_preset_comes_from_the_first_masks():
    par, image = PAR.for_stride(8), rand(2, 3, 96, 96)
    masks = torch.cat([regions(12).expand(2, -1, -1, -1), 0.1 * rand(2, 1, 12, 12)], 1)
    anchor = par.anchor
    assert isinstance(anchor, CertaintyAnchor)
    assert torch.equal(par(image, masks), par(image, masks, anchor=anchor(masks)))
    assert not torch.equal(par(image, masks), par(image, masks, anchor=0.0))
    valid = torch.tensor([[True, True, False, True], [False, True, True, False]])
    for i in range(2):
        alone = par(image[i : i + 1], masks[i : i + 1, valid[i]])
        torch.testing.assert_close(
            par(image, masks, valid_classes=valid)[i : i + 1, valid[i]], alone, rtol=0, atol=1e-6
        )
    labels, values = par(image, masks, return_labels=True)
    torch.testing.assert_close(values, par(image, masks).amax(1), rtol=0, atol=1e-6)
    assert labels.shape == (2, 96, 96)


@pytest.mark.parametrize("size", [(255, 257), (241, 250), (256, 256), (16, 1)])
def test_a_preset_refines_at_half_size_and_then_at_full_size(size):
    par, image = PAR.for_stride(16), rand(1, 3, *size)
    masks = rand(1, 2, -(-size[0] // 16), -(-size[1] // 16), seed=1)
    anchor = par.anchor(masks)[:, :, :1, :1]
    half = F.avg_pool2d(image, 2, ceil_mode=True)
    enlarged = refine(half, masks, [1], 0, stride=8)
    dilations, steps = par.far
    options = {"spec": par.spec, "anchor": anchor[0, 0, 0, 0]}
    first = refine(half, enlarged, dilations, steps, **options)
    expected = refine(image, first, par.dilations, par.num_iter, stride=2, **options)
    torch.testing.assert_close(par(image, masks), expected, rtol=0, atol=1e-6)


def test_cells_that_end_before_the_image_does():
    par = PAR.for_stride(16, anchor=0.1)
    assert par(rand(1, 3, 255, 241), rand(1, 2, 15, 15)).shape == (1, 2, 255, 241)
    with pytest.raises(ValueError, match=r"cover \(240.0, 240.0\) pixels of an image of \(256, 241\)"):
        par(rand(1, 3, 256, 241), rand(1, 2, 15, 15))


def test_a_preset_takes_masks_and_anchors_of_the_images_size_and_has_gradients():
    par = PAR.for_stride(8, anchor=0.2)
    par.stride = None
    masks = rand(1, 2, 17, 24).requires_grad_()
    anchor = torch.full((1, 1, 17, 24), 0.2, requires_grad=True)
    scores = par(rand(1, 3, 17, 24), masks)
    torch.testing.assert_close(par(rand(1, 3, 17, 24), masks, anchor=anchor), scores)
    par(rand(1, 3, 17, 24), masks, anchor=anchor).square().sum().backward()
    assert torch.isfinite(masks.grad).all()
    assert anchor.grad.abs().sum() > 0
    par.resize = "image"
    with pytest.raises(ValueError, match="resize='image' must be 'masks'"):
        par(rand(1, 3, 17, 24), masks)


def test_a_module_made_by_hand_refines_once():
    assert PAR([1, 2], 3).far is None
    assert "far" not in repr(PAR([1, 2], 3))
    assert "far=((" in repr(PAR.for_stride(8))
