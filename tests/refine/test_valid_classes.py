"""Ragged class sets: the loop over images that every WSSS repository writes, bit for bit, without the loop."""

import pytest
import torch

from dmsa_kernels.refine import refine
from tests.helpers import require_backend

BACKENDS = ("reference", "eager", "triton")
DILATIONS = [1, 3]


def _batch(classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 3, 12, 14, generator=generator)
    masks = torch.rand(3, classes, 5, 6, generator=generator)
    valid = torch.rand(3, classes, generator=generator) > 0.4
    valid[0] = True
    valid[1] = False
    return image, masks, valid


def _loop(image, masks, valid, backend):
    """The hand-written loop: each image with its own classes."""
    out = torch.zeros(*masks.shape[:2], *image.shape[2:])
    for i in range(len(image)):
        keys = torch.nonzero(valid[i])[:, 0]
        if len(keys):
            out[i, keys] = refine(image[i : i + 1], masks[i : i + 1, keys], DILATIONS, 3, backend=backend)[0]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [3, 8, 20])
def test_equals_the_loop_bit_for_bit(backend, classes):
    require_backend(backend)
    if backend == "triton" and classes > 8:
        pytest.skip("8 classes show it; the interpreter takes a minute for 20")
    image, masks, valid = _batch(classes)
    actual = refine(image, masks, DILATIONS, 3, valid_classes=valid, backend=backend)
    assert torch.equal(actual, _loop(image, masks, valid, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_planes_are_not_read(backend):
    require_backend(backend)
    image, masks, valid = _batch(4)
    poisoned = masks.masked_fill(~valid[:, :, None, None], torch.nan)
    image.requires_grad_()
    leaf = poisoned.clone().requires_grad_()
    actual = refine(image, leaf, DILATIONS, 3, valid_classes=valid, backend=backend)
    assert torch.equal(actual, refine(image, masks, DILATIONS, 3, valid_classes=valid, backend=backend))
    assert actual[~valid].eq(0).all()
    actual.sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[~valid].eq(0).all()
    assert leaf.grad[0].ne(0).any()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_weights_do_not_reach_invalid_planes(backend):
    require_backend(backend)
    image, masks, valid = _batch(4)
    image[0, 0, 6, 6] = torch.nan
    valid[0, 2] = False
    actual = refine(image, masks, DILATIONS, 2, valid_classes=valid, backend=backend)
    assert actual[~valid].eq(0).all()
    assert actual[0, 0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_are_of_the_valid_classes(backend):
    require_backend(backend)
    image, masks, valid = _batch(4)
    masks = masks - 2  # all below the zeros of an invalid plane
    labels, values = refine(image, masks, DILATIONS, 3, valid_classes=valid, return_labels=True, backend=backend)
    planes = refine(image, masks, DILATIONS, 3, valid_classes=valid, backend=backend)
    for i in (0, 2):
        keys = torch.nonzero(valid[i])[:, 0]
        best = planes[i, keys].max(0)
        assert torch.equal(values[i], best.values)
        assert torch.equal(labels[i], keys[best.indices])
    assert labels[1].eq(0).all()
    assert values[1].eq(0).all()


def test_gradients_equal_the_loop():
    image, masks, valid = _batch(5)
    seed = torch.randn(3, 5, 12, 14)
    grads = []
    for run in ("batch", "loop"):
        leaves = [image.clone().requires_grad_(), masks.clone().requires_grad_()]
        out = refine(*leaves, DILATIONS, 3, valid_classes=valid) if run == "batch" else _loop(*leaves, valid, "eager")
        out.backward(seed)
        grads.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*grads, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
