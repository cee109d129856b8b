"""Drop-in modules: signatures, attributes, state dicts and live parameters of the code they replace."""

import copy
import dataclasses
import inspect
import io
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from dmsa_kernels import LCM, PAMR, PAR
from dmsa_kernels.refine import refine
from dmsa_kernels.refine.spec import PAR as PAR_SPEC

IMAGE, MASKS = torch.rand(1, 3, 9, 8), torch.rand(1, 2, 4, 4)


def test_positional_order_and_defaults_are_upstreams():
    assert list(inspect.signature(PAR).parameters)[:2] == ["dilations", "num_iter"]
    pamr = inspect.signature(PAMR).parameters
    assert list(pamr)[:2] == ["num_iter", "dilations"]
    assert (pamr["num_iter"].default, list(pamr["dilations"].default)) == (1, [1])


def test_argument_names_are_upstreams():
    assert torch.equal(PAR([1], 2)(imgs=IMAGE, masks=MASKS), PAR([1], 2)(IMAGE, MASKS))
    assert torch.equal(PAMR(2, [1])(x=IMAGE, mask=MASKS), PAMR(2, [1])(IMAGE, MASKS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": [0]}, "positive integers"),
        ({"num_iter": -1}, "num_iter=-1"),
        ({"resize": "up"}, "resize='up'"),
        ({"precision": "half"}, "precision='half'"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
@pytest.mark.parametrize("module", [PAR, PAMR, LCM])
def test_bad_options_are_refused_when_the_module_is_made(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"dilations": [1], "num_iter": 1, **options})


def test_dilations_of_any_kind_can_be_read_again():
    for dilations in ((d for d in (1, 2)), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)):
        module = PAR(dilations, 1)
        assert module.dilations == [1, 2]
        assert torch.equal(module(IMAGE, MASKS), module(IMAGE, MASKS))


def test_copies_and_replicas_compute_the_same():
    for module in (PAR([1, 2], 2), PAMR(2, [1, 2])):
        expected = module(IMAGE, MASKS)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module._replicate_for_data_parallel()):
            assert torch.equal(twin(IMAGE, MASKS), expected)


def test_par_and_pamr_call_refine():
    assert torch.equal(PAR([1, 2], 3)(IMAGE, MASKS), refine(IMAGE, MASKS, [1, 2], 3, spec="par"))
    assert torch.equal(PAMR(3, [1, 2])(IMAGE, MASKS), refine(IMAGE, MASKS, [1, 2], 3, spec="pamr"))
    small = PAR([1, 2], 3, resize="image")(IMAGE, MASKS)
    assert torch.equal(small, refine(IMAGE, MASKS, [1, 2], 3, resize="image"))


def test_lcm_is_differentiable_and_wants_equal_sizes():
    masks = torch.rand(1, 2, 9, 8, requires_grad=True)
    module = LCM([2], 4)
    (masks - module(IMAGE, masks)).abs().sum().backward()
    assert masks.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="resize='none'"):
        module(IMAGE, MASKS)


def test_par_attributes():
    par = PAR(dilations=[1, 2], num_iter=5)
    assert (par.w1, par.w2, par.dim, par.num_iter, par.dilations) == (0.3, 0.01, 2, 5, [1, 2])
    ring = [math.sqrt(2), 1, math.sqrt(2), 1, 1, math.sqrt(2), 1, math.sqrt(2)]
    assert par.pos.shape == (1, 1, 16, 1, 1)
    assert torch.allclose(par.pos.flatten(), torch.tensor([*ring, *(2 * r for r in ring)]))


def test_attributes_set_later_take_effect():
    par = PAR([1, 2], 3)
    par.w1, par.w2 = 0.5, 0.2
    spec = dataclasses.replace(PAR_SPEC, alpha=0.5, eps=0.5e-8, position_weight=0.2)
    assert torch.equal(par(IMAGE, MASKS), refine(IMAGE, MASKS, [1, 2], 3, spec=spec))
    par.dilations, par.num_iter = [3], 1
    assert torch.equal(par(IMAGE, MASKS), refine(IMAGE, MASKS, [3], 1, spec=spec))
    par.w1 = -1
    with pytest.raises(ValueError, match="alpha=-1"):
        par(IMAGE, MASKS)


def _one_hot(order):
    kernel = torch.zeros(len(order), 1, 3, 3)
    for i, (y, x) in enumerate(order):
        kernel[i, 0, y, x] = 1
    return kernel


def test_old_state_dicts_load_strictly_and_equal_the_buffers():
    nine = [(y, x) for y in range(3) for x in range(3)]
    eight = [place for place in nine if place != (1, 1)]
    centre = _one_hot([(1, 1)]).expand(8, 1, 3, 3)
    old_par = {"kernel": _one_hot(eight)}
    old_pamr = {
        "aff_x.kernel": centre - _one_hot(eight),
        "aff_m.kernel": _one_hot(eight),
        "aff_std.kernel": _one_hot(nine),
    }
    for module, old in ((PAR([1], 1), old_par), (PAMR(1, [1]), old_pamr), (LCM([1], 1), old_par)):
        new = module.state_dict()
        assert new.keys() == old.keys()
        assert all(torch.equal(new[key], old[key]) for key in old)
        module.load_state_dict(old, strict=True)


def test_they_have_no_parameters_and_move_with_to():
    module = PAMR(2, [1]).half()
    assert not list(module.parameters())
    assert module(IMAGE.half(), MASKS.half()).dtype == torch.float32  # as the code that is replaced


@pytest.mark.parametrize("module", [PAR([1], 2), PAMR(2, [1])], ids=["par", "pamr"])
def test_options_of_forward(module):
    valid = torch.tensor([[True, False]])
    refined = module(IMAGE, MASKS, valid_classes=valid)
    assert refined[:, 1].eq(0).all()
    labels, values = module(IMAGE, MASKS, return_labels=True)
    assert torch.equal(labels, module(IMAGE, MASKS).argmax(1))
    assert values.shape == (1, 9, 8)
    assert "num_iter=2" in repr(module)


def test_import_needs_no_triton_and_has_no_side_effects():
    script = """
import sys, warnings
warnings.simplefilter("error")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("blocked")
import torch
blocked = Block()
sys.meta_path.insert(0, blocked)
before = set(sys.modules)
import dmsa_kernels
new = set(sys.modules) - before
assert not any(name.split(".")[0] in ("triton", "timm", "sklearn", "PIL", "matplotlib") for name in new), new
assert not any("refine.triton." in name for name in new), new
from dmsa_kernels.refine import refine
image, masks = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 8, 8)
a = refine(image, masks, [1, 2], 3, backend="reference")
b = refine(image, masks, [1, 2], 3, backend="eager")
assert torch.allclose(a, b, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [PAR([1], 2), PAMR(2, [1]), LCM([1], 2, resize="masks")], ids=["par", "pamr", "lcm"])
def test_one_image_for_many_masks_and_the_reverse(module):
    images, stacks = torch.rand(3, 3, 9, 8), torch.rand(3, 2, 4, 4)
    valid = torch.tensor([[True, False], [True, True], [False, True]])
    many = module(images[:1], stacks, valid_classes=valid)
    for i in range(3):
        assert torch.equal(many[i], module(images[:1], stacks[i : i + 1], valid_classes=valid[i : i + 1])[0])
    reverse = module(images, stacks[:1])
    labels, _ = module(images, stacks[:1], return_labels=True)
    for i in range(3):
        assert torch.equal(reverse[i], module(images[i : i + 1], stacks[:1])[0])
    assert torch.equal(labels, reverse.argmax(1))
    shared = module(images, stacks[:1], valid_classes=valid[:1])
    assert torch.equal(shared[:, 0], reverse[:, 0])
    assert not shared[:, 1].any()
    with pytest.raises(ValueError, match="must have the batch size of image, 3"):
        module(images, stacks[:2])
    assert module(images[:1], stacks[:0]).shape == (0, 2, 9, 8)


@pytest.mark.parametrize("module", [PAR([1], 1), PAMR(1, [1]), LCM([1], 1, resize="masks")], ids=["par", "pamr", "lcm"])
def test_onnx_export_says_that_there_is_no_operator(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        options = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
        with pytest.raises(RuntimeError, match="ONNX has no operator for the refinement: export the network"):
            torch.onnx.export(module, (IMAGE, MASKS), io.BytesIO(), **options)


def test_masks_of_8_bits():
    eight = getattr(torch, "float8_e4m3fn", None)
    if eight is None:
        pytest.skip(f"torch {torch.__version__} has no float8")
    masks = MASKS.to(eight)
    labels, values = PAR([1], 2)(IMAGE, masks, return_labels=True)
    expected = PAR([1], 2)(IMAGE, masks.float())
    assert torch.equal(labels, expected.argmax(1))
    assert torch.equal(values, expected.amax(1))
    with pytest.raises(TypeError, match=r"masks.dtype=torch.float8_e4m3fn must be one of .*with masks.float"):
        refine(IMAGE, masks, [1], 2, return_labels=True)
