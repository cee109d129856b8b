"""The fast path against the definition: both layouts, all specs, odd shapes, both gradients, memory."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmsa_kernels.refine import AffinitySpec, eager, local_affinity, propagate, reference, refine
from dmsa_kernels.refine.padded import Padded
from dmsa_kernels.refine.spec import LCM, PAMR, PAR
from tests.helpers import LargestTensor, border, relative_norm

SPECS = [
    PAR,
    PAMR,
    LCM,
    AffinitySpec(exponent=1, alpha=0.5, sigma="centre_once", eps=1e-3, position_weight=0.2),
    AffinitySpec(exponent=2, alpha=0.7, sigma="none", eps=1e-6, position_weight=0.0),
]
SHAPES = [(13, 17), (1, 9), (9, 1), (2, 31), (1, 1)]


def _pair(shape, channels=3, classes=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, channels, *shape, generator=generator)
    return image, torch.rand(batch, classes, *shape, generator=generator)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(spec, shape):
    image, masks = _pair(shape)
    dilations = [1, 5, 2]
    actual = refine(image, masks, dilations, 4, spec=spec, backend="eager")
    expected = refine(image.double(), masks.double(), dilations, 4, spec=spec, backend="reference")
    error = (actual.double() - expected).abs()
    edge = border(*shape, 2)
    assert error[..., edge].max() <= 2e-6
    assert error[..., ~edge].numel() == 0 or error[..., ~edge].max() <= 2e-6


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (1, 7)], ids=str)
def test_gradients_equal_the_definition(spec, shape):
    image, masks = (x.double() for x in _pair(shape, classes=3))
    seed = torch.randn_like(masks)
    grads = []
    for backend in ("eager", "reference"):
        leaves = [image.clone().requires_grad_(), masks.clone().requires_grad_()]
        refine(*leaves, [1, 3], 3, spec=spec, backend=backend).backward(seed)
        grads.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*grads, strict=True):
        assert relative_norm(actual, expected) <= 1e-10


@pytest.mark.parametrize("channels", [1, 5, 81])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (255, 0), (4.5, -2.1)], ids=["unit", "0-255", "normalised"])
def test_images_of_any_range_and_depth(channels, scale, shift):
    image, masks = _pair((19, 23), channels=channels, batch=1)
    image = image * scale + shift
    actual = refine(image, masks, [1, 4], 5, backend="eager")
    expected = refine(image.double(), masks.double(), [1, 4], 5, backend="reference")
    assert (actual.double() - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("classes", [1, 2, eager.GATHER_CLASSES - 1, eager.GATHER_CLASSES, 21, 81])
def test_both_layouts(classes):
    image, masks = _pair((11, 14), classes=classes)
    affinity = local_affinity(image, [1, 2, 20])
    actual = propagate(affinity, masks, 3, backend="eager")
    expected = propagate(affinity, masks, 3, backend="reference")
    assert (actual - expected).abs().max() <= 1e-6


def test_layout_depends_on_one_image_alone():
    def weights(batch, height):
        return torch.empty(batch, 48, height, 1000, device="meta", dtype=torch.float32)

    assert not eager._gathers(weights(1, 10), 21)  # not on the CPU
    small = torch.empty(1, 8, 4, 4)
    assert eager._gathers(small, eager.GATHER_CLASSES)
    assert not eager._gathers(small, eager.GATHER_CLASSES - 1)
    assert not eager._gathers(small.double(), 21)
    huge = torch.empty(1, 1).expand(eager.GATHER_WEIGHTS // 8 + 1, 1).unsqueeze(0).unsqueeze(0).expand(1, 8, -1, 1)
    assert huge.numel() > eager.GATHER_WEIGHTS
    assert not eager._gathers(huge, 21)


def test_chunks_of_rows_and_planes_change_nothing(monkeypatch):
    image, masks = (x.double() for x in _pair((21, 18), classes=5))
    results = []
    for elements in (eager.SWEEP_ELEMENTS, 100):
        monkeypatch.setattr(eager, "SWEEP_ELEMENTS", elements)
        leaf = image.clone().requires_grad_()
        refined = refine(leaf, masks, [1, 6], 4, backend="eager")
        refined.sum().backward()
        results.append((refined, leaf.grad))
    for whole, chunked in zip(*results, strict=True):
        assert relative_norm(chunked, whole) <= 1e-12


@pytest.mark.parametrize(("classes", "dtype"), [(3, torch.float32), (21, torch.float32), (21, torch.float64)])
def test_memory_is_bounded(classes, dtype):
    image, masks = _pair((40, 44), classes=classes, batch=2)
    image, masks = image.to(dtype), masks.to(dtype)
    dilations = [1, 2, 4, 8]
    taps, pixels = 8 * len(dilations), 40 * 44
    padded = (40 + 16) * (44 + 16)
    with torch.no_grad(), LargestTensor() as largest:
        refine(image, masks, dilations, 3, backend="eager")
    assert largest.elements <= max(2 * taps * pixels, 2 * classes * padded)
    weights = torch.rand(2, taps, 40, 44, dtype=dtype)
    with LargestTensor() as largest:
        eager.propagate_backward(masks, weights, masks, dilations, 3, None, need_weights=True, need_masks=True)
    assert largest.elements <= max(2 * taps * pixels, 2 * classes * padded)


def test_constant_neighbourhood_has_no_deviation():
    for value in (0.1, 1 / 3, 254.7):
        guide = eager._Guide(torch.full((1, 2, 9, 9), value), [1, 2, 3], 2.0, 0.3, "neighbours", 0.3e-8)
        assert guide.deviation(0, 9)[1].eq(0).all()
    weights = eager.local_affinity(torch.full((1, 2, 9, 9), 254.7), [1, 2, 3], fast=False, **dataclasses.asdict(LCM))
    assert weights.sub(1 / 24).abs().max() <= 1e-8


def test_no_weight_is_subnormal():
    """Multiplying by subnormal weights made the propagation of a photograph's masks twice as slow."""
    image = torch.zeros(1, 1, 12, 12)
    image[..., 6:] = 1.0
    image += 0.1 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    spec = dataclasses.replace(LCM, alpha=0.1)
    exact = reference.local_affinity(image, [1, 2], fast=False, **dataclasses.asdict(spec))
    tiny = torch.finfo(torch.float32).tiny
    assert (exact < tiny).any()
    weights = eager.local_affinity(image, [1, 2], fast=False, **dataclasses.asdict(spec))
    assert (weights >= tiny).all()
    assert (weights - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("sigma", ["neighbours", "centred", "centre_once"])
def test_deviation_of_small_variation_on_a_large_value(sigma):
    torch.manual_seed(0)
    image = 1000 + torch.randint(0, 3, (1, 1, 12, 12)).float() * 2**-10
    spec = dataclasses.replace(PAR, sigma=sigma)
    weights = eager.local_affinity(image, [1, 2], fast=False, **dataclasses.asdict(spec))
    expected = reference.local_affinity(image, [1, 2], fast=False, **dataclasses.asdict(spec))
    assert (weights - expected).abs().max() <= 1e-5


def test_padding_and_its_adjoint():
    padded = Padded((2, 3, 4), [1, 9], torch.float64, torch.device("cpu"))
    assert padded.buffer.shape == (2, 3 + 2 * 2, 4 + 2 * 3)  # cut at the map's size
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    padded.inner.copy_(x)
    padded.fill()
    filled = padded.buffer.clone()
    y = torch.randn_like(filled)
    padded.buffer.copy_(y)
    padded.fold()
    assert torch.allclose((filled * y).sum(), (x * padded.inner).sum())


class _Calls(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_an_accelerator_is_not_waited_for():
    # Meta tensors take the accelerator's path; a constant made on the host would have to be copied to the device.
    image, masks = torch.empty(1, 3, 9, 11, device="meta"), torch.empty(1, 4, 9, 11, device="meta")
    with _Calls() as calls:
        weights = eager.local_affinity(
            image, [1, 2], exponent=2.0, alpha=0.3, sigma="neighbours", eps=1e-8, position_weight=0.01, fast=False
        )
        eager.propagate(weights, masks, [1, 2], 2, torch.ones(1, 4, dtype=torch.bool, device="meta"))
    waiting = {name for name in calls.names if "lift_fresh" in name or "_local_scalar" in name or "nonzero" in name}
    assert calls.names, "the mode saw nothing"
    assert not waiting, waiting
