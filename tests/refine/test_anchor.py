"""A share of the first masks in every iteration: the definition, every backend, gradients, bad values; and cells."""

import pytest
import torch

from dmsa_kernels import PAMR, PAR, LocalConsistencyModule, local_affinity, propagate
from dmsa_kernels.refine import refine
from dmsa_kernels.refine.fitted import fitted_preset
from tests.helpers import LargestTensor, brute_propagate, registered, require_backend

OPS = torch.ops.dmsa_kernels
BACKENDS = ("reference", "eager", "triton")
DILATIONS = [1, 3]


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend(request.param)
    return request.param


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weights, masks, num_iter, anchor):
    """The formula with the loops over pixels of the test helper, one iteration at a time."""
    first = current = masks.double()
    for _ in range(num_iter):
        current = (1 - anchor) * brute_propagate(weights, current, DILATIONS, 1) + anchor * first
    return current


ANCHORS = {
    "number": 0.3,
    "scalar": torch.tensor(0.3),
    "map": 0.9 * rand(2, 1, 6, 7, seed=3),
    "one": rand(1, 1, 6, 7) / 2,
}


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS)
@pytest.mark.parametrize("classes", [2, 13])
def test_the_formula(backend, anchor, classes):
    if backend == "triton" and classes > 2 and anchor is not ANCHORS["map"]:
        pytest.skip("two classes, or a map, show it in the interpreter, which is slow")
    image, masks = rand(2, 3, 6, 7), rand(2, classes, 6, 7, seed=1)
    affinity = local_affinity(image, DILATIONS)
    expected = by_hand(affinity.weights, masks, 3, anchor)
    assert (propagate(affinity, masks, 3, anchor=anchor, backend=backend) - expected).abs().max() <= 2e-6
    labels, values = propagate(affinity, masks, 3, anchor=anchor, return_labels=True, backend=backend)
    assert torch.equal(labels, expected.argmax(1))
    assert (values - expected.amax(1)).abs().max() <= 2e-6


def test_an_anchor_of_zero_is_no_anchor(backend, monkeypatch):
    image, masks = rand(1, 3, 6, 7), rand(1, 3, 6, 7, seed=1)
    expected = refine(image, masks, DILATIONS, 2, backend=backend)
    assert torch.equal(refine(image, masks, DILATIONS, 2, anchor=0.0, backend=backend), expected)
    with LargestTensor() as without:
        refine(image, masks, DILATIONS, 2, backend=backend)
    with LargestTensor() as with_zero:
        refine(image, masks, DILATIONS, 2, anchor=0, backend=backend)
    assert with_zero.operators == without.operators  # nothing is computed for it
    zeros = refine(image, masks, DILATIONS, 2, anchor=torch.zeros(1, 1, 6, 7), backend=backend)
    assert (zeros - expected).abs().max() <= 1e-6


def test_valid_classes_and_16_bit_masks(backend):
    image, masks = rand(2, 3, 6, 7), rand(2, 3, 6, 7, seed=1)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    hidden = masks.masked_fill(~valid[:, :, None, None], torch.nan)
    options = {"anchor": ANCHORS["map"], "backend": backend}
    actual = refine(image, hidden, DILATIONS, 2, valid_classes=valid, **options)
    expected = refine(image, masks, DILATIONS, 2, **options)
    assert torch.equal(actual[valid], expected[valid])
    assert not actual[~valid].any()
    half = refine(image, masks.half(), DILATIONS, 2, **options)
    assert half.dtype == torch.float16
    assert (half - refine(image, masks.half().float(), DILATIONS, 2, **options)).abs().max() <= 5e-4


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_many_planes_in_chunks(backend, precision):
    image, masks = rand(1, 3, 6, 7), rand(1, 9, 6, 7, seed=1)
    options = {"anchor": 0.25, "precision": precision}
    actual = refine(image, masks, DILATIONS, 3, backend=backend, **options)
    expected = refine(image.double(), masks.double(), DILATIONS, 3, backend="reference", anchor=0.25)
    assert (actual - expected).abs().max() <= (2e-6 if precision == "exact" else 5e-3)


@pytest.mark.parametrize("leaves", ["image masks anchor", "anchor", "masks", "image"])
def test_gradients(backend, leaves):
    seed = rand(2, 3, 6, 7, seed=5)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    grads = []
    for dtype, which in ((torch.float32, backend), (torch.float64, "reference")):
        inputs = {"image": rand(2, 3, 6, 7), "masks": rand(2, 3, 6, 7, seed=1), "anchor": ANCHORS["map"]}
        inputs = {name: x.to(dtype, copy=True).requires_grad_(name in leaves) for name, x in inputs.items()}
        options = {"anchor": inputs["anchor"], "valid_classes": valid, "backend": which}
        refine(inputs["image"], inputs["masks"], DILATIONS, 2, **options).backward(seed.to(dtype))
        grads.append([inputs[name].grad for name in leaves.split()])
    for actual, expected in zip(*grads, strict=True):
        assert expected.abs().max() > 1e-3
        assert (actual - expected).norm() <= 1e-5 * expected.norm()


@registered
@pytest.mark.parametrize("num_iter", [0, 1, 3])
@pytest.mark.parametrize("valid", [None, torch.tensor([[True, False, True]])])
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradcheck(num_iter, valid, backend):
    leaves = [
        rand(1, 16, 4, 3, dtype=torch.float64) / 16,
        rand(1, 3, 4, 3, dtype=torch.float64),
        rand(1, 1, 4, 3) * 0.9,
    ]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def run(weights, masks, anchor):
        return OPS.propagate(weights, masks, [1, 5], num_iter, valid, backend, anchor)

    assert torch.autograd.gradcheck(run, leaves)


def test_the_gradient_of_one_number():
    image, masks = rand(1, 3, 6, 7).double(), rand(1, 3, 6, 7, seed=1).double()
    anchor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: refine(image, masks, [1], 2, anchor=a), anchor)


@registered
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_opcheck(backend):
    require_backend(backend)
    weights, masks, anchor = rand(1, 8, 5, 4) / 8, rand(1, 2, 5, 4, seed=1), rand(1, 1, 5, 4, seed=2) / 2
    arguments = ([1], 1, None, backend, anchor)
    torch.library.opcheck(OPS.propagate_labels.default, (weights, masks, *arguments))
    if backend == "eager":  # with gradients the interpreter takes a minute
        weights, masks, anchor = (x.requires_grad_() for x in (weights, masks, anchor))
        arguments = ([1], 2, None, backend, anchor)
    torch.library.opcheck(OPS.propagate.default, (weights, masks, *arguments))
    weights, masks, anchor = (x.detach() for x in (weights, masks, anchor))
    torch.library.opcheck(
        OPS.propagate_backward.default, (masks, weights, masks, [1], 1, None, True, True, backend, anchor, True)
    )


@registered
def test_compiles_without_graph_breaks():
    image, masks, anchor = rand(1, 3, 12, 16), rand(1, 3, 3, 4, seed=1), rand(1, 1, 12, 16) / 2

    def loss(image, masks, anchor):
        return refine(image, masks, DILATIONS, 2, anchor=anchor, stride=4).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [anchor.clone().requires_grad_() for _ in range(2)]
    compiled(image, masks, leaves[0]).backward()
    loss(image, masks, leaves[1]).backward()
    assert torch.allclose(leaves[0].grad, leaves[1].grad, atol=1e-6)


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        (1.0, ValueError, r"anchor=1.0 must be in \[0, 1\)"),
        (-0.1, ValueError, r"anchor=-0.1 must be in"),
        (float("nan"), ValueError, r"anchor=nan must be in"),
        ("0.2", TypeError, r"anchor='0.2' must be a number in \[0, 1\) or a tensor"),
        (True, TypeError, r"anchor=True must be a number"),
        (torch.ones(2, 1, 6, 7).long(), TypeError, r"anchor.dtype=torch.int64 must be a floating-point"),
        (torch.zeros(6, 7), ValueError, r"anchor.shape=\(6, 7\) must be \(2, 1, 3, 4\) or \(2, 1, 6, 7\)"),
        (torch.zeros(2, 4, 6, 7), ValueError, r"anchor.shape=\(2, 4, 6, 7\) must be"),
        (torch.zeros(3, 1, 6, 7), ValueError, r"anchor.shape=\(3, 1, 6, 7\) must be"),
        (torch.zeros(2, 1, 6, 7, device="meta"), ValueError, r"anchor.device=meta must be the masks' device, cpu"),
        (torch.full((2, 1, 6, 7), 1.5), ValueError, r"anchor must hold values in \[0, 1\) only, got 1.5 to 1.5"),
        (torch.tensor(float("nan")), ValueError, r"anchor must hold values in \[0, 1\) only"),
    ],
    ids=str,
)
def test_bad_anchors(anchor, error, message):
    with pytest.raises(error, match=message):
        refine(rand(2, 3, 6, 7), rand(2, 4, 3, 4), [1], 1, anchor=anchor)


def test_an_anchor_of_the_masks_size_is_resized_like_them():
    image, masks, small = rand(1, 3, 12, 16), rand(1, 2, 3, 4, seed=1), rand(1, 1, 3, 4, seed=2) / 2
    for options in ({}, {"stride": 4}):
        large = refine(image, small, [1], 0, **options)
        expected = refine(image, masks, DILATIONS, 3, anchor=large, **options)
        assert torch.equal(refine(image, masks, DILATIONS, 3, anchor=small, **options), expected)


# --- cells


def centred(cells, stride, size):
    """The value of every pixel by hand: bilinear between the cells' centres, the outer half cells constant."""
    out = torch.empty(*cells.shape[:2], *size)
    places = []
    for pixels, count, side in zip(size, cells.shape[2:], stride, strict=True):
        at = ((torch.arange(pixels) + 0.5) / side - 0.5).clamp(0, count - 1)
        low = at.floor().long().clamp(max=max(0, count - 2))
        places.append((low, (low + 1).clamp(max=count - 1), at - low))
    (y0, y1, fy), (x0, x1, fx) = places
    fy = fy[:, None]
    top = cells[..., y0, :][..., x0] * (1 - fx) + cells[..., y0, :][..., x1] * fx
    bottom = cells[..., y1, :][..., x0] * (1 - fx) + cells[..., y1, :][..., x1] * fx
    return out.copy_(top * (1 - fy) + bottom * fy)


@pytest.mark.parametrize(
    ("stride", "cells", "size"),
    [
        (16, (3, 4), (48, 64)),
        (16, (3, 4), (41, 50)),  # the last cells are cut off
        (16, (3, 4), (55, 79)),  # the map goes on behind the last cells
        (4.5, (4, 5), (18, 20)),
        ((8, 5), (2, 3), (16, 15)),
        (1, (6, 7), (6, 7)),
        (14, (1, 1), (14, 14)),
    ],
    ids=str,
)
def test_cells_come_to_their_place(stride, cells, size):
    masks = rand(2, 3, *cells)
    sides = stride if isinstance(stride, tuple) else (stride, stride)
    actual = refine(rand(2, 3, *size), masks, [1], 0, stride=stride)
    assert (actual - centred(masks, sides, size)).abs().max() <= 1e-5


def test_cells_of_averages_keep_an_edge_where_it_is():
    """A step between two cells stays there; aligned corners move it."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    cells = torch.nn.functional.avg_pool2d(mask, 8)
    image = rand(1, 3, 32, 32)
    off = {s: (refine(image, cells, [1], 0, stride=s) - mask).abs().mean() for s in (8, None)}
    assert off[8] < off[None]
    assert refine(image, cells, [1], 0, stride=8)[..., 12:20].mean() == 0.5


def test_labels_of_cells_are_resized_chunk_by_chunk(monkeypatch, backend):
    from dmsa_kernels.refine import ops

    image, masks = rand(1, 3, 16, 20), rand(1, 7, 4, 5, seed=1)
    whole = refine(image, masks, [1, 2], 2, stride=4, anchor=0.2, backend=backend)
    monkeypatch.setattr(ops, "LABEL_ELEMENTS", 3 * 16 * 20)
    labels, values = refine(image, masks, [1, 2], 2, stride=4, anchor=0.2, return_labels=True, backend=backend)
    assert torch.equal(labels, whole.argmax(1))
    assert torch.allclose(values, whole.amax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stride": 0}, ValueError, r"stride=0 must be at least 1 pixel"),
        ({"stride": float("nan")}, ValueError, r"stride=nan must be at least 1"),
        ({"stride": "16"}, TypeError, r"stride='16' must be a number of pixels"),
        ({"stride": (16, 16, 16)}, TypeError, r"must be a number of pixels, such as 16, or a pair"),
        ({"stride": 4, "resize": "image"}, ValueError, r"stride=4 enlarges the masks, which resize='image' does not"),
        ({"stride": 2}, ValueError, r"stride=\(2.0, 2.0\) cover \(6.0, 8.0\) pixels of an image of \(12, 16\)"),
        ({"stride": 8}, ValueError, r"a cell or more too few or too many"),
    ],
    ids=str,
)
def test_bad_strides(options, error, message):
    with pytest.raises(error, match=message):
        refine(rand(1, 3, 12, 16), rand(1, 2, 3, 4), [1], 1, **options)


# --- modules and fitted presets


def test_modules_take_both():
    image, masks = rand(1, 3, 12, 16), rand(1, 2, 3, 4, seed=1)
    for module, spec in (
        (PAR([1, 2], 2, stride=4, anchor=0.2), "par"),
        (PAMR(2, [1, 2], stride=4, anchor=0.2), "pamr"),
    ):
        expected = refine(image, masks, [1, 2], 2, spec=spec, stride=4, anchor=0.2)
        assert torch.equal(module(image, masks), expected)
        assert "stride=4, anchor=0.2" in repr(module)
        once = module(image, masks, anchor=rand(1, 1, 12, 16) / 2)
        assert torch.equal(once, refine(image, masks, [1, 2], 2, spec=spec, stride=4, anchor=rand(1, 1, 12, 16) / 2))
        module.anchor, module.stride = 0, None
        assert torch.equal(module(image, masks), refine(image, masks, [1, 2], 2, spec=spec))
    with pytest.raises(ValueError, match=r"anchor=2 must be in"):
        LocalConsistencyModule([1], 1, anchor=2)
    with pytest.raises(ValueError, match=r"stride=-4 must be"):
        PAR([1], 1, stride=-4)


@pytest.mark.parametrize("stride", [4, 8, 14, 16, 32, 64])
def test_for_stride(stride):
    preset = fitted_preset(stride)
    par = PAR.for_stride(stride)
    assert (par.dilations, par.num_iter) == (list(preset.dilations), preset.num_iter)
    assert (par.anchor, par.stride, par.spec) == (preset.anchor, stride, preset.spec)
    assert par.far == preset.far
    image, masks = rand(1, 3, 2 * stride, 3 * stride), rand(1, 2, 2, 3, seed=1)
    assert torch.equal(par(image, masks), par(image, masks, anchor=preset.anchor(masks)))


def test_presets_are_fitted_from_4_to_64_pixels():
    for stride in (3, 65, "16", True):
        with pytest.raises(ValueError, match=r"must be a number from 4 to 64"):
            PAR.for_stride(stride)
    assert PAR.for_stride(16, precision="fast", anchor=0.4).anchor == 0.4


def test_a_subclass_makes_itself():
    class Mine(PAR):
        pass

    assert type(Mine.for_stride(16)) is Mine
