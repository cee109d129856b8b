"""Degenerate maps, dtypes, layouts and values that are not numbers, on every backend."""

import pytest
import torch

from dmsa_kernels.refine import AffinitySpec, local_affinity, propagate, refine
from tests.helpers import border, relative_norm, require_backend

BACKENDS = ("reference", "eager", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend(request.param)
    return request.param


def _pair(height=9, width=11, classes=2, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(batch, 3, height, width, generator=generator),
        torch.rand(batch, classes, height, width, generator=generator),
    )


def test_no_iterations_returns_the_resized_masks(backend):
    image, masks = _pair()
    assert torch.equal(refine(image, masks, [1], 0, backend=backend), masks)
    small = masks[..., ::2, ::2]
    expected = torch.nn.functional.interpolate(small, (9, 11), mode="bilinear", align_corners=True)
    assert torch.allclose(refine(image, small, [1], 0, backend=backend), expected, atol=1e-7)


def test_the_result_is_never_the_input(backend):
    image, masks = _pair()
    before = masks.clone()
    refine(image, masks, [1], 0, backend=backend).zero_()
    refine(image, masks, [1], 2, backend=backend).zero_()
    assert torch.equal(masks, before)


@pytest.mark.parametrize(("batch", "classes"), [(0, 2), (2, 0)])
def test_empty_batches_and_zero_classes(backend, batch, classes):
    image, masks = torch.rand(batch, 3, 9, 8, requires_grad=True), torch.rand(batch, classes, 4, 4, requires_grad=True)
    refined = refine(image, masks, [1, 2], 2, backend=backend)
    assert refined.shape == (batch, classes, 9, 8)
    refined.sum().backward()
    assert masks.grad.shape == masks.shape
    if batch == 0:
        labels, values = refine(image, masks, [1, 2], 2, return_labels=True, backend=backend)
        assert labels.shape == values.shape == (0, 9, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (2, 3)], ids=str)
def test_maps_narrower_than_the_dilation(backend, shape):
    image, masks = _pair(*shape)
    actual = refine(image, masks, [1, 30, 64], 3, backend=backend)
    expected = refine(image.double(), masks.double(), [1, 30, 64], 3, backend="reference")
    assert (actual - expected).abs().max() <= 2e-6
    if shape == (1, 1):
        assert torch.allclose(actual, masks * 1.01**3)


def test_masks_larger_than_the_image(backend):
    image, masks = _pair()
    masks = torch.rand(1, 2, 20, 31)
    actual = refine(image, masks, [1, 2], 2, backend=backend)
    assert actual.shape == (1, 2, 9, 11)
    expected = refine(image.double(), masks.double(), [1, 2], 2, backend="reference")
    assert (actual - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("spec", ["par", "pamr", "lcm"])
def test_flat_regions_are_averaged(backend, spec):
    image, masks = _pair(12, 12)
    image[..., :6] = 0.3  # constant padding
    image.requires_grad_()
    refined = refine(image, masks, [1, 2], 3, spec=spec, backend=backend)
    assert refined.isfinite().all()
    refined.sum().backward()
    assert image.grad.isfinite().all()
    flat = refine(torch.full_like(image, 0.1), masks, [1], 1, spec="pamr", backend=backend)
    inner = torch.nn.functional.avg_pool2d(masks, 3, 1) * 9 / 8 - masks[..., 1:-1, 1:-1] / 8
    assert torch.allclose(flat[..., 1:-1, 1:-1], inner, atol=1e-6)


def test_nan_in_the_image_stays_in_its_neighbourhood(backend):
    image, masks = _pair(15, 15)
    image[0, 1, 7, 7] = torch.nan
    refined = refine(image, masks, [1, 3], 1, backend=backend)
    reached = torch.zeros(15, 15, dtype=torch.bool)
    for d in (1, 3):
        reached[7 - d : 8 + d : d, 7 - d : 8 + d : d] = True
    assert torch.equal(refined[0, 0].isnan(), reached)


@pytest.mark.parametrize("spec", ["par", "pamr", AffinitySpec(sigma="none", alpha=0.7, eps=1e-6)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_are_finite_where_the_definition_is(backend, spec, value):
    image, masks = _pair(7, 9)
    image[0, 1, 0, 4] = value  # at the border, where neighbours are clamped
    grads = []
    for which, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (image, masks)]
        refine(*leaves, [2], 1, spec=spec, backend=which).sum().backward()
        grads.append([leaf.grad.isfinite() for leaf in leaves])
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)
        assert expected.any()


def test_nan_in_the_masks_spreads_one_step_an_iteration(backend):
    image, masks = _pair(15, 15)
    masks[0, 0, 7, 7] = torch.nan
    refined = refine(image, masks, [1], 2, backend=backend)
    assert torch.equal(refined[0, 0].isnan(), ~border(15, 15, 5))
    assert refined[0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(backend, dtype):
    image, masks = _pair(10, 12)
    image, masks = image.to(dtype), masks.to(dtype)
    actual = refine(image, masks, [1, 2], 5, backend=backend)
    expected = refine(image.double(), masks.double(), [1, 2], 5, backend="reference")
    assert actual.dtype == dtype
    # Half a unit in the last place of the result, and the float32 error beside it. Triton's interpreter cuts float32 to
    # bfloat16 instead of rounding it (a GPU rounds): a whole unit there.
    cut = backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    unit = torch.finfo(dtype).eps * (1 if cut else 0.5)
    assert ((actual.double() - expected).abs() <= expected.abs() * unit + 2e-6).all()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "transposed"])
def test_strides(backend, layout):
    image, masks = _pair(6, 7, batch=2)
    if layout == "channels_last":
        image_v, masks_v = (x.to(memory_format=torch.channels_last) for x in (image, masks))
    elif layout == "sliced":
        image_v = torch.nn.functional.pad(image, (2, 3, 1, 1))[..., 1:-1, 2:-3]
        masks_v = torch.nn.functional.pad(masks, (2, 3, 1, 1))[..., 1:-1, 2:-3]
    elif layout == "expanded":
        image_v, masks_v = image[:1].expand(2, -1, -1, -1), masks[:, :1].expand(-1, 2, -1, -1)
    else:
        image_v, masks_v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (image, masks))
    results = []
    for a, b in ((image_v, masks_v), (image_v.contiguous(), masks_v.contiguous())):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        refined = refine(a, b, [1, 2], 2, backend=backend)
        refined.sum().backward()  # an expanded gradient
        results.append((refined, a.grad, b.grad))
    for strided, contiguous in zip(*results, strict=True):
        assert relative_norm(strided, contiguous) <= 1e-6
    if layout == "channels_last":
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_largest_dilation_is_beyond_every_map(backend):
    image, masks = _pair(5, 6)
    actual = refine(image, masks, [2**30], 2, spec="pamr", backend=backend)
    assert torch.equal(actual, refine(image, masks, [6], 2, spec="pamr", backend=backend))


def test_planes_more_than_32_bits_apart():
    """Three channels 2.4 GB apart; only the pages that are touched take memory."""
    require_backend("triton")
    apart = 1_200_000_000
    try:
        memory = torch.empty(2 * apart + 20, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no 5 GB of address space: {error}")
    far = memory.as_strided((1, 3, 4, 5), (0, apart, 5, 1))
    near = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    affinity = local_affinity(far, [1], backend="triton")
    assert torch.equal(affinity.weights, local_affinity(near, [1], backend="triton").weights)
    refined = propagate(affinity, far, 1, backend="triton")
    assert torch.equal(refined, propagate(affinity, near, 1, backend="triton"))


def test_labels_where_every_valid_class_is_minus_infinity(backend):
    image, masks = _pair(5, 6, classes=3)
    masks[..., :2] = -torch.inf
    valid = torch.tensor([[False, True, True]])
    arguments = (image, masks, [1], 0)  # no iteration, in which an infinity times a weight of 0 would be NaN
    labels, values = refine(*arguments, valid_classes=valid, return_labels=True, backend=backend)
    assert labels[..., :2].eq(1).all()  # the lowest valid class, not class 0
    assert values[..., :2].eq(-torch.inf).all()
    assert torch.equal(labels[..., 2:], masks[:, 1:, :, 2:].argmax(1) + 1)


def test_labels_are_the_argmax(backend):
    image, masks = _pair(9, 11, classes=5)
    masks[:, 3] = masks[:, 1]  # ties
    masks[0, 2, 4, 4] = torch.nan
    labels, values = refine(image, masks, [1, 2], 2, return_labels=True, backend=backend)
    planes = refine(image, masks, [1, 2], 2, backend=backend)
    best = planes.max(1)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, best.indices)
    assert torch.equal(values.nan_to_num(-1), best.values.nan_to_num(-1))


def test_mixed_dtypes_of_image_and_masks(backend):
    image, masks = _pair()
    expected = refine(image.half().double(), masks.double(), [1], 2, backend="reference")
    assert (refine(image.half(), masks, [1], 2, backend=backend) - expected).abs().max() <= 2e-6
    if backend != "triton":
        assert refine(image, masks.double(), [1], 2, backend=backend).dtype == torch.float64
        assert refine(image.double(), masks, [1], 2, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("spec", ["par", "pamr", "lcm", AffinitySpec(sigma="centre_once", eps=1e-9)], ids=str)
def test_a_channel_without_contrast_says_nothing(backend, spec):
    """One value in all neighbours and another in the centre, as at a burnt-out sky: the others decide alone."""
    image = torch.full((1, 3, 3, 3), 1.0)
    image[:, 0, 1, 1] = 254 / 255
    image[:, 1:] = torch.tensor([[0.2, 0.5, 0.9], [0.2, 0.2, 0.9], [0.2, 0.5, 0.9]])
    weights = local_affinity(image, [1], spec=spec, backend=backend).weights[0, :, 1, 1]
    exact = local_affinity(image.double(), [1], spec=spec, backend="reference").weights[0, :, 1, 1]
    assert (weights - exact).abs().max() <= 1e-6
    if spec in ("par", "lcm"):
        assert exact[0] > 100 * exact[2]  # the left column looks like the centre, the right one does not


@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize(("alpha", "eps"), [(0.3, 1e-20), (0.3, 1e-40), (1e-200, 0.3e-8), (1e-200, 1e-45)])
def test_tiny_constants_give_no_nan(backend, exponent, alpha, eps):
    spec = AffinitySpec(exponent=exponent, alpha=alpha, eps=eps)
    image, masks = _pair(6, 9)
    image[..., :4] = 0.5
    leaf = image.clone().requires_grad_()
    refined = refine(leaf, masks, [1, 2], 1, spec=spec, backend=backend)
    assert refined.isfinite().all()
    if alpha > 1e-9:  # else the definition's gradient is beyond float32
        refined.sum().backward()
        assert leaf.grad.isfinite().all()
    flat = refine(torch.full_like(image, 0.5), masks, [1, 2], 1, spec=spec, backend=backend)
    uniform = refine(torch.full_like(image, 0.5), masks, [1, 2], 1, backend="reference")
    assert (flat - uniform).abs().max() <= 0.02  # but for the distance term, which alpha changes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_labels_of_16_bit_masks_are_not_decided_by_rounding(backend, dtype):
    """Scores that lie closer together than the dtype can tell apart after averaging."""
    image = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    masks = (0.5 + 0.004 * torch.rand(1, 12, 9, 11, generator=torch.Generator().manual_seed(1))).to(dtype)
    labels, values = refine(image, masks, [1, 2], 3, return_labels=True, backend=backend)
    exact = refine(image, masks.float(), [1, 2], 3, backend=backend)
    assert torch.equal(labels, exact.argmax(1))
    assert not torch.equal(exact.to(dtype).argmax(1), exact.argmax(1))
    assert values.dtype == dtype
