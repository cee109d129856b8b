"""The certainty of masks, and the fitted presets whose anchor follows from it."""

import pytest
import torch

from dmsa_kernels import PAR, certainty
from dmsa_kernels.refine.certainty import CertaintyAnchor
from dmsa_kernels.refine.fitted import fitted_preset


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(masks):
    ordered = masks.sort(1, descending=True).values
    margin = (ordered[:, 0] - ordered[:, 1]).flatten(1).mean(1)
    return margin / (masks.flatten(1).amax(1) - masks.flatten(1).amin(1))


def test_certainty_is_the_mean_margin_over_the_range():
    masks = rand(3, 5, 6, 7)
    torch.testing.assert_close(certainty(masks).flatten(), by_hand(masks))
    torch.testing.assert_close(certainty(7 * masks - 3), certainty(masks))


def test_one_hot_masks_are_sure_and_equal_ones_are_not():
    labels = torch.randint(4, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    hot = torch.zeros(2, 4, 8, 8).scatter_(1, labels, 1.0)
    assert certainty(hot).flatten().tolist() == [1, 1]
    assert certainty(torch.full((2, 4, 8, 8), 0.25)).flatten().tolist() == [0, 0]


def test_a_single_class_is_compared_with_its_minimum():
    masks = rand(2, 1, 6, 7)
    least, most = (masks.flatten(1).amin(1), masks.flatten(1).amax(1))
    torch.testing.assert_close(certainty(masks).flatten(), (masks.flatten(1).mean(1) - least) / (most - least))


def test_classes_that_are_not_valid_are_not_looked_at():
    masks, valid = rand(3, 4, 6, 7), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    filled = masks.masked_fill(~valid[:, :, None, None], float("nan"))
    found = certainty(filled, valid).flatten()
    torch.testing.assert_close(found[0], by_hand(masks[:1, [0, 1, 3]])[0])
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


def test_noise_lowers_it():
    label = torch.randint(3, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    hot = torch.zeros(1, 3, 8, 8).scatter_(1, label, 1.0)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = [certainty(hot + sigma * noise).item() for sigma in (0, 0.3, 0.5)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("stride", [4, 6.5, 8, 14, 16, 24, 32, 45.3, 64])
def test_presets_fit_the_cell(stride):
    preset = fitted_preset(stride)
    assert list(preset.dilations) == sorted(set(preset.dilations))
    assert preset.dilations[0] >= 1
    assert preset.dilations[-1] <= stride
    assert len(preset.dilations) * preset.num_iter <= 6 * 10  # the cost of PAR as public code runs it


def test_a_cell_of_two_sides_has_the_preset_of_their_mean():
    par = PAR.for_stride((30.5, 45.75))
    assert par.dilations == list(fitted_preset((30.5 * 45.75) ** 0.5).dilations)
    assert par(rand(1, 3, 61, 183), rand(1, 2, 2, 4)).shape == (1, 2, 61, 183)
    with pytest.raises(ValueError, match=r"must be a number from 4 to 64"):
        PAR.for_stride([8, 8, 8])


def test_the_anchor_of_a_preset_comes_from_the_first_masks():
    par, image, masks = PAR.for_stride(8), rand(2, 3, 32, 40), rand(2, 4, 4, 5)
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
    assert labels.shape == (2, 32, 40)
