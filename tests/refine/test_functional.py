"""Validation: every bad argument is named, shown, and answered with what was expected, before anything is computed."""

import dataclasses

import numpy as np
import pytest
import torch

from dmsa_kernels import Affinity, AffinitySpec, local_affinity, propagate
from dmsa_kernels.refine import refine
from dmsa_kernels.refine.spec import LCM, PAMR, PAR, resolve_spec
from tests.helpers import LargestTensor

IMAGE = torch.rand(2, 3, 6, 5)
MASKS = torch.rand(2, 4, 3, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": IMAGE.numpy()}, TypeError, r"image must be a tensor .* got ndarray"),
        ({"image": IMAGE[0]}, ValueError, r"image.shape=\(3, 6, 5\) must have four dimensions"),
        ({"image": (IMAGE * 255).byte()}, TypeError, r"image.dtype=torch.uint8 .* image.float\(\)"),
        ({"image": IMAGE.to_sparse()}, TypeError, r"image.layout=torch.sparse_coo must be torch.strided"),
        ({"image": IMAGE[:, :0]}, ValueError, r"image.shape=\(2, 0, 6, 5\) must have at least one channel"),
        ({"image": IMAGE[..., :0]}, ValueError, r"image.shape=\(2, 3, 6, 0\) must have at least one pixel"),
        ({"masks": None}, TypeError, r"masks must be a tensor .* got NoneType"),
        ({"masks": MASKS[0]}, ValueError, r"masks.shape=\(4, 3, 2\) must have four dimensions, \[B, C, H, W\]"),
        ({"masks": MASKS.long()}, TypeError, r"masks.dtype=torch.int64 .* masks.float\(\)"),
        ({"masks": MASKS.to(torch.complex64)}, TypeError, r"masks.dtype=torch.complex64"),
        ({"masks": MASKS[:1]}, ValueError, r"masks.shape=\(1, 4, 3, 2\) must have the batch size of image, 2"),
        ({"masks": MASKS.to("meta")}, ValueError, r"masks.device=meta must be the device of image, cpu"),
        ({"masks": MASKS[:, :, :0]}, ValueError, r"masks.shape=\(2, 4, 0, 2\) must have at least one pixel"),
        ({"dilations": 2}, TypeError, r"dilations=2 must be a sequence"),
        ({"dilations": "12"}, TypeError, r"dilations='12' must be a sequence"),
        ({"dilations": []}, ValueError, r"dilations=\[\] must hold at least one"),
        ({"dilations": [1, 0]}, ValueError, r"dilations=\[1, 0\] must hold positive integers only, got 0"),
        ({"dilations": [-3]}, ValueError, r"positive integers only, got -3"),
        ({"dilations": [1, 2**30 + 1]}, ValueError, r"at most 2\^30, got 1073741825"),
        ({"dilations": [1.0]}, TypeError, r"dilations=\[1.0\] must hold integers only, got 1.0"),
        ({"dilations": [True]}, TypeError, r"integers only, got True"),
        ({"num_iter": -1}, ValueError, r"num_iter=-1 must be at least 0"),
        ({"num_iter": 1.5}, TypeError, r"num_iter=1.5 must be an integer"),
        ({"num_iter": True}, TypeError, r"num_iter=True must be an integer"),
        ({"spec": "crf"}, ValueError, r"spec='crf' is not one of par, pamr, lcm"),
        ({"spec": 2}, TypeError, r"spec=2 must be an AffinitySpec or one of the names"),
        ({"resize": "image→masks"}, ValueError, r"resize='image→masks' is not one of masks, image, none"),
        ({"resize": "none"}, ValueError, r"resize='none' needs equal map sizes, image.shape=\(2, 3, 6, 5\) and"),
        ({"precision": "half"}, ValueError, r"precision='half' is not one of exact, fast"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda' is not one of auto, triton, eager, reference"),
        ({"valid_classes": [[True]]}, TypeError, r"valid_classes must be a bool tensor \[B, C\], got list"),
        ({"valid_classes": torch.ones(2, 4)}, TypeError, r"valid_classes.dtype=torch.float32 must be torch.bool"),
        ({"valid_classes": torch.ones(4).bool()}, ValueError, r"valid_classes.shape=\(4,\) must be .* \(2, 4\)"),
        (
            {"valid_classes": torch.ones(2, 4, device="meta").bool()},
            ValueError,
            r"valid_classes.device=meta must be the masks' device, cpu",
        ),
        ({"masks": MASKS[:, :0], "return_labels": True}, ValueError, r"return_labels=True needs at least one class"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_of_refine(changes, error, message):
    arguments = {"image": IMAGE, "masks": MASKS, "dilations": [1, 2], "num_iter": 2, **changes}
    with LargestTensor() as seen, pytest.raises(error, match=message):
        refine(**arguments)
    assert seen.elements == 0, "something was computed before the check"


def test_bad_arguments_of_propagate():
    affinity = local_affinity(IMAGE, [1])
    with pytest.raises(TypeError, match="affinity must come from local_affinity, got Tensor"):
        propagate(affinity.weights, MASKS, 1)
    with pytest.raises(ValueError, match=r"masks.shape=\(2, 4, 3, 2\) must have the affinity's map size, \(6, 5\)"):
        propagate(affinity, MASKS, 1)
    with pytest.raises(ValueError, match="batch size of affinity, 2"):
        propagate(affinity, torch.rand(1, 4, 6, 5), 1)
    with pytest.raises(ValueError, match="num_iter=-2"):
        propagate(affinity, torch.rand(2, 4, 6, 5), -2)
    with pytest.raises(ValueError, match="backend='fast'"):
        propagate(affinity, torch.rand(2, 4, 6, 5), 1, backend="fast")


@pytest.mark.parametrize(
    ("weights", "dilations", "error", "message"),
    [
        (torch.rand(2, 7, 6, 5), (1,), ValueError, r"shape=\(2, 7, 6, 5\) must have 8 weights a pixel"),
        (torch.rand(2, 16, 6, 5), (1,), ValueError, r"must have 8 weights a pixel"),
        (torch.rand(2, 8, 30), (1,), ValueError, r"affinity.weights.shape=\(2, 8, 30\) must have four dimensions"),
        (torch.ones(2, 8, 6, 5).long(), (1,), TypeError, r"affinity.weights.dtype=torch.int64"),
        (torch.rand(2, 8, 6, 5), (0,), ValueError, r"positive integers only, got 0"),
    ],
)
def test_a_foreign_affinity_is_checked_before_it_is_read(weights, dilations, error, message):
    with pytest.raises(error, match=message):
        propagate(Affinity(weights, dilations), torch.rand(2, 4, 6, 5), 1)


@pytest.mark.parametrize("argument", ["image", "masks"])
def test_forward_mode_is_refused_not_dropped(argument):
    def run(x):
        return refine(**{"image": IMAGE, "masks": MASKS, argument: x}, dilations=[1], num_iter=1)

    x = {"image": IMAGE, "masks": MASKS}[argument]
    with pytest.raises(RuntimeError, match=f"{argument} carries a forward-mode derivative"):
        torch.func.jvp(run, (x,), (x,))


def test_vmap_equals_the_batch():
    def single(image, masks):
        return refine(image[None], masks[None], [1], 2)[0]

    assert torch.equal(torch.vmap(single)(IMAGE, MASKS), refine(IMAGE, MASKS, [1], 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exponent": 3}, ValueError, r"exponent=3 must be 1 .* or 2"),
        ({"exponent": "2"}, TypeError, r"exponent='2' must be a number, not str"),
        ({"alpha": 0}, ValueError, r"alpha=0 must be positive"),
        ({"alpha": float("nan")}, ValueError, r"alpha=nan must be positive and finite"),
        ({"eps": 0.0}, ValueError, r"eps=0.0 must be positive .* flat regions divide by it"),
        ({"position_weight": -0.1}, ValueError, r"position_weight=-0.1 must be at least 0"),
        ({"position_weight": True}, TypeError, r"position_weight=True must be a number, not bool"),
        ({"sigma": "std"}, ValueError, r"sigma='std' is not one of neighbours, centred, centre_once, none"),
    ],
)
def test_bad_specs(changes, error, message):
    with pytest.raises(error, match=message):
        AffinitySpec(**changes)


def test_presets_are_the_published_constants():
    assert dataclasses.astuple(PAR) == (2, 0.3, "neighbours", 0.3e-8, 0.01)
    assert dataclasses.astuple(PAMR) == (1, 0.1, "centred", 1e-8, 0)
    assert dataclasses.astuple(LCM) == (2, 0.3, "neighbours", 0.3e-8, 0)
    assert [resolve_spec(name) for name in ("par", "pamr", "lcm")] == [PAR, PAMR, LCM]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAR.alpha = 1.0


def test_one_affinity_serves_many_masks():
    affinity = local_affinity(IMAGE, (1, 2))
    assert affinity.weights.shape == (2, 16, 6, 5)
    assert affinity.dilations == (1, 2)
    for classes in (1, 3):
        masks = torch.rand(2, classes, 6, 5)
        assert torch.equal(propagate(affinity, masks, 3), refine(IMAGE, masks, [1, 2], 3))


def test_affinity_moves_and_keeps_its_gradient():
    affinity = local_affinity(IMAGE.clone().requires_grad_(), [1])
    moved = affinity.to(torch.float64)
    assert isinstance(moved, Affinity)
    assert moved.weights.dtype == torch.float64
    assert moved.weights.requires_grad


def test_integers_of_other_libraries_are_integers():
    expected = refine(IMAGE, MASKS, [1, 2], 2)
    assert torch.equal(refine(IMAGE, MASKS, np.array([1, 2]), np.int64(2)), expected)
    assert torch.equal(refine(IMAGE, MASKS, (d for d in (1, 2)), 2), expected)


@pytest.mark.parametrize("resize", ["masks", "image"])
def test_resize_directions(resize):
    refined = refine(IMAGE, MASKS, [1], 2, resize=resize)
    size = (6, 5) if resize == "masks" else (3, 2)
    interpolate = torch.nn.functional.interpolate
    image = interpolate(IMAGE, size, mode="bilinear", align_corners=True)
    masks = interpolate(MASKS, size, mode="bilinear", align_corners=True)
    expected = refine(image, masks, [1], 2, resize="none")
    assert refined.shape == (2, 4, *size)
    assert torch.allclose(refined, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_package_itself_is_callable(precision):
    import dmsa_kernels

    actual = dmsa_kernels.refine(IMAGE, MASKS, [1], 2, precision=precision)
    assert torch.equal(actual, refine(IMAGE, MASKS, [1], 2, precision=precision))
