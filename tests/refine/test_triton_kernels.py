"""The Triton launchers against the double-precision reference: on a GPU, or through the interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' modules are imported

from dmsa_kernels import compat, plans, tuning, why_not_triton
from dmsa_kernels.refine import eager, reference
from dmsa_kernels.refine.spec import LCM, PAMR, PAR, AffinitySpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    why_not_triton(torch.zeros(1, device=DEVICE)) is not None,
    reason="needs Triton and TRITON_INTERPRET=1 before the first import",
)
DILATIONS = [1, 3, 7]
SPECS = {
    "par": PAR,
    "pamr": PAMR,
    "centre_once": AffinitySpec(sigma="centre_once"),
    "none": AffinitySpec(sigma="none", alpha=0.1, position_weight=0.0),
}


@pytest.fixture(scope="module")
def kernels():
    from dmsa_kernels.refine.triton import affinity, backward, propagate

    return affinity, propagate, backward


@pytest.fixture(autouse=True)
def fresh_plans():
    """Trace anew in every test: some change what a plan is made of."""
    plans.clear()
    yield
    plans.clear()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill every fresh tensor with NaN, so that an element nobody writes is seen."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-7)

        monkeypatch.setattr(torch, name, filled)


def constants(spec: AffinitySpec) -> dict:
    return {
        "exponent": spec.exponent,
        "alpha": spec.alpha,
        "sigma": spec.sigma,
        "eps": spec.eps,
        "position_weight": spec.position_weight,
    }


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values ``[B, C, H, W]`` in another memory layout."""
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        wide = torch.zeros(x.shape[0], x.shape[1] + 1, x.shape[2] + 2, 2 * x.shape[3], dtype=x.dtype, device=x.device)
        wide[:, 1:, 1:-1, ::2] = x
        return wide[:, 1:, 1:-1, ::2]
    return x


def close(actual: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, reach: int) -> None:
    """Assert an error of at most twice the eager float32 path's plus one rounding, interior and border apart.

    Args:
        actual: the kernels' result.
        exact: the double-precision result.
        low: what the eager path gives in the same precision, the yardstick of the budget.
        reach: width of the border band, in pixels.
    """
    assert actual.dtype == low.dtype
    assert actual.shape == exact.shape
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    height, width = exact.shape[-2:]
    inside = torch.zeros(height, width, dtype=torch.bool, device=exact.device)
    inside[reach : height - reach, reach : width - reach] = True
    for name, band in (("interior", inside), ("border", ~inside)):
        if band.any():
            error = (actual.double() - exact)[..., band].abs().max().item()
            budget = 2 * (low.double() - exact)[..., band].abs().max().item() + 4 * rounding
            assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("shape", "kind"), [((2, 3, 17, 19), "contiguous"), ((1, 1, 5, 33), "sliced")])
def test_affinity(kernels, spec, shape, kind):
    image = strided(rand(*shape), kind)
    image[..., :12] = 0.25  # flat: sigma is exactly 0 there
    weights = kernels[0].local_affinity(image, DILATIONS, fast=False, **constants(spec))
    exact = reference.local_affinity(image.double(), DILATIONS, fast=False, **constants(spec))
    close(weights, exact, eager.local_affinity(image, DILATIONS, fast=False, **constants(spec)), 7)


@pytest.mark.parametrize("scale", [1.0, 255.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_affinity_of_half_images_and_many_channels(kernels, dtype, scale):
    image = strided(rand(1, 6, 9, 10, dtype=dtype) * scale, "channels_last")
    weights = kernels[0].local_affinity(image, [1, 2], fast=False, **constants(PAR))
    exact = reference.local_affinity(image.double(), [1, 2], fast=False, **constants(PAR))
    close(weights, exact, eager.local_affinity(image, [1, 2], fast=False, **constants(PAR)), 2)
    fast = kernels[0].local_affinity(image, [1, 2], fast=True, **constants(PAR))
    assert fast.dtype == torch.float16
    assert (fast.double() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.max()


def test_flat_image_has_uniform_weights(kernels):
    weights = kernels[0].local_affinity(
        torch.full((1, 3, 6, 6), 0.1, device=DEVICE), [1, 2], fast=False, **constants(PAMR)
    )
    assert torch.equal(weights, torch.full_like(weights, 1 / 16))


def test_nan_pixel_stays_in_its_neighbourhood(kernels):
    image = rand(1, 3, 16, 16)
    image[0, 1, 8, 8] = float("nan")
    weights = kernels[0].local_affinity(image, [1, 2], fast=False, **constants(PAR))
    touched = weights.isnan().any(1)[0].nonzero()
    assert len(touched) == 17
    assert (touched - 8).abs().max() == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_iter", [1, 3])
@pytest.mark.parametrize(
    ("channels", "shape", "kind", "dtype"),
    [
        (1, (9, 11), "contiguous", torch.float32),
        (3, (9, 11), "contiguous", torch.float32),
        (3, (9, 11), "sliced", torch.float32),
        (4, (1, 6), "channels_last", torch.float32),
        (13, (10, 37), "contiguous", torch.float32),
        (8, (9, 11), "channels_last", torch.float16),
        (2, (9, 11), "contiguous", torch.bfloat16),
    ],
)
def test_propagate(kernels, num_iter, channels, shape, kind, dtype):
    masks = strided(rand(2, channels, *shape, dtype=dtype, seed=1), kind)
    before = masks.clone()
    weights = reference.local_affinity(rand(2, 3, *shape), DILATIONS, fast=False, **constants(PAR))
    out = kernels[1].propagate(weights, masks, DILATIONS, num_iter, None)
    exact = reference.propagate(weights.double(), masks.double(), DILATIONS, num_iter, None)
    close(out, exact, eager.propagate(weights, masks, DILATIONS, num_iter, None), 7)
    assert out.stride() == torch.empty_like(masks).stride()
    assert torch.equal(masks, before)


@pytest.mark.slow
def test_propagate_fast(kernels):
    weights = reference.local_affinity(rand(1, 3, 12, 12), [1, 2], fast=False, **constants(PAR))
    masks = rand(1, 21, 12, 12, seed=1)
    exact = reference.propagate(weights.double(), masks.double(), [1, 2], 4, None)
    out = kernels[1].propagate(weights.half(), masks, [1, 2], 4, None)
    # half an ulp of float16 for the weights and for each of the four planes, with values that stay below 2
    assert (out - exact).abs().max() <= 10 * torch.finfo(torch.float16).eps * exact.abs().max()


def test_no_iteration_returns_a_copy(kernels):
    masks = rand(1, 2, 4, 4)
    valid = torch.tensor([[True, False]], device=DEVICE)
    out = kernels[1].propagate(rand(1, 8, 4, 4), masks, [1], 0, valid)
    assert out.data_ptr() != masks.data_ptr()
    assert torch.equal(out[:, 0], masks[:, 0])
    assert not out[:, 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 13])
def test_valid_classes_equal_the_loop_over_images(kernels, channels):
    weights = reference.local_affinity(rand(2, 3, 9, 11), DILATIONS, fast=False, **constants(PAR))
    masks = rand(2, channels, 9, 11, seed=1)
    valid = torch.zeros(2, channels, dtype=torch.bool, device=DEVICE)
    valid[0, 1], valid[1, 0], valid[1, channels - 1] = True, True, True
    hidden = masks.masked_fill(~valid[:, :, None, None], float("nan"))  # planes that are not valid are not read
    out = kernels[1].propagate(weights, hidden, DILATIONS, 2, valid)
    labels, values = kernels[1].propagate_labels(weights, hidden, DILATIONS, 2, valid)
    for image in range(2):
        chosen = valid[image].nonzero()[:, 0]
        one = masks[image, chosen][None]
        expected = kernels[1].propagate(weights[image][None], one, DILATIONS, 2, None)
        assert torch.equal(out[image, chosen], expected[0])
        assert torch.equal(labels[image], chosen[expected[0].argmax(0)])
        assert torch.equal(values[image], expected[0].amax(0))
    assert not out[~valid].any()


@pytest.mark.slow
def test_labels_in_chunks_break_ties_and_let_nan_win(kernels, monkeypatch):
    monkeypatch.setattr(tuning, "plan_chunks", lambda *sizes: (1, 1))
    weights = torch.full((2, 8, 5, 5), 1 / 8, device=DEVICE)
    masks = rand(2, 9, 5, 5).round()
    masks[0, 6, 2, 2] = float("nan")
    labels, values = kernels[1].propagate_labels(weights, masks, [1], 1, None)
    whole = kernels[1].propagate(weights, masks, [1], 1, None)
    expected = whole.max(1)
    assert torch.equal(labels, expected.indices)
    assert torch.equal(values.nan_to_num(9.0), expected.values.nan_to_num(9.0))


@pytest.mark.slow
@pytest.mark.parametrize(("has_tuples", "splits"), [(True, True), (True, False), (False, False)])
def test_weights_held_and_read_again_are_the_same(kernels, monkeypatch, has_tuples, splits):
    """Before Triton 3.7 a kernel reads one tap at a time; before 3.4, without tuples, it reads the weights again."""
    if has_tuples and not compat.triton_has_tuples():
        pytest.skip("this Triton has no tuples")
    monkeypatch.setattr(compat, "triton_has_tuples", lambda: has_tuples)
    monkeypatch.setattr(compat, "triton_splits_in_registers", lambda: splits)
    assert kernels[1].holds_weights(16) == has_tuples
    plans.clear()
    weights = reference.local_affinity(rand(1, 3, 6, 7), [1, 2], fast=False, **constants(PAR))
    masks = rand(1, 5, 6, 7, seed=1)
    exact = reference.propagate(weights.double(), masks.double(), [1, 2], 2, None)
    low = eager.propagate(weights, masks, [1, 2], 2, None)
    out = kernels[1].propagate(weights, masks, [1, 2], 2, None)
    close(out, exact, low, reach=2)
    if has_tuples:
        monkeypatch.setattr(tuning, "MIN_PLANAR_BYTES", 0)
        plans.clear()
        assert torch.equal(kernels[1].propagate(weights, masks, [1, 2], 2, None), out)
    grad = rand(1, 5, 6, 7, seed=2)
    needed = {"need_weights": False, "need_masks": True}
    found = kernels[2].propagate_backward(grad, weights, masks, [1, 2], 2, None, **needed)[1]
    double = grad.double(), weights.double(), masks.double()
    exact = reference.propagate_backward(*double, [1, 2], 2, None, **needed)[1]
    close(found, exact, eager.propagate_backward(grad, weights, masks, [1, 2], 2, None, **needed)[1], reach=2)


@pytest.mark.slow
def test_chunks_are_exact(kernels, monkeypatch):
    weights = reference.local_affinity(rand(3, 3, 6, 7), [1, 2], fast=False, **constants(PAR))
    masks = rand(3, 9, 6, 7, seed=1)
    whole = kernels[1].propagate(weights, masks, [1, 2], 2, None)
    monkeypatch.setattr(tuning, "plan_chunks", lambda *sizes: (2, 1))
    plans.clear()
    assert torch.equal(kernels[1].propagate(weights, masks, [1, 2], 2, None), whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_iter", [1, 2, 3])
def test_masks_that_are_not_packed_give_the_same(kernels, monkeypatch, num_iter):
    """The first iteration reads masks as they are and the last writes them so, in chunks and for labels as well."""
    weights = reference.local_affinity(rand(2, 3, 5, 7), [1, 3], fast=False, **constants(PAR))
    arguments = weights, rand(2, 7, 5, 7, seed=1), [1, 3], num_iter, None
    whole, labels = kernels[1].propagate(*arguments), kernels[1].propagate_labels(*arguments)
    monkeypatch.setattr(tuning, "MIN_PLANAR_BYTES", 0)
    for images, groups in ((2, 2), (1, 1)):
        monkeypatch.setattr(tuning, "plan_chunks", lambda *sizes, plan=(images, groups): plan)
        plans.clear()
        assert torch.equal(kernels[1].propagate(*arguments), whole)
        for a, b in zip(kernels[1].propagate_labels(*arguments), labels, strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("least", [0, 1 << 40])
def test_eight_dilations(kernels, monkeypatch, least):
    """More weights than leave room for the taps' places; masks packed, and read and written as they are."""
    monkeypatch.setattr(tuning, "MIN_PLANAR_BYTES", least)
    plans.clear()
    dilations = [1, 2, 3, 4, 5, 6, 7, 9]
    weights = reference.local_affinity(rand(1, 3, 5, 6), dilations, fast=False, **constants(PAR))
    masks = rand(1, 7, 5, 6, seed=1)
    exact = reference.propagate(weights.double(), masks.double(), dilations, 3, None)
    low = eager.propagate(weights, masks, dilations, 3, None)
    close(kernels[1].propagate(weights, masks, dilations, 3, None), exact, low, reach=9)


@pytest.mark.slow
@pytest.mark.parametrize("row_stride", [2, 3, 8])
def test_tiles_of_distant_rows_are_exact(kernels, monkeypatch, row_stride):
    """Eleven tiles of two rows, of which the last is not full, in blocks of ``row_stride`` and what is left."""
    dilations, needed = [2, 5], {"need_weights": True, "need_masks": True}
    weights = reference.local_affinity(rand(1, 3, 21, 14), dilations, fast=False, **constants(PAR))
    masks, grad = rand(1, 1, 21, 14, seed=1), rand(1, 1, 21, 14, seed=2)
    found = []
    for stride in (1, row_stride):
        step = tuning.Step(tuning.Config(2, 16, 1), stride, 1)
        monkeypatch.setattr(tuning, "plan_step", lambda *sizes, step=step, most_warps: step)
        plans.clear()
        gradients = kernels[2].propagate_backward(grad, weights, masks, dilations, 2, None, **needed)
        found.append((kernels[1].propagate(weights, masks, dilations, 2, None), *gradients))
    for contiguous, distant in zip(*found, strict=True):
        assert torch.equal(contiguous, distant)
    double = reference.propagate(weights.double(), masks.double(), dilations, 2, None)
    close(found[1][0], double, eager.propagate(weights, masks, dilations, 2, None), reach=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "shape", "use_valid"), [(1, (6, 7), False), (4, (5, 6), True), (3, (2, 5), False), (2, (1, 1), False)]
)
def test_propagate_backward(kernels, channels, shape, use_valid):
    dilations, batch = [1, 4], 2 if use_valid else 1
    weights = reference.local_affinity(rand(batch, 3, *shape), dilations, fast=False, **constants(LCM))
    masks = strided(rand(batch, channels, *shape, seed=1), "sliced")
    grad = rand(1, 1, 1, 1).expand(masks.shape) if channels == 3 else rand(*masks.shape, seed=2)
    valid = rand(batch, channels, seed=3) > 0.4 if use_valid else None
    needed = {"need_weights": True, "need_masks": True}
    arguments = (dilations, 2, valid)
    got = kernels[2].propagate_backward(grad, weights, masks, *arguments, **needed)
    double = (grad.double(), weights.double(), masks.double())
    exact = reference.propagate_backward(*double, *arguments, **needed)
    low = eager.propagate_backward(grad, weights, masks, *arguments, **needed)
    for a, b, c in zip(got, exact, low, strict=True):
        close(a, b, c, 1)
    # the same bits again, and without the other gradient
    only = kernels[2].propagate_backward(grad, weights, masks, *arguments, need_weights=False, need_masks=True)
    assert only[0].numel() == 0
    assert torch.equal(only[1], got[1])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_affinity_backward(kernels, spec):
    image = strided(rand(1, 2, 5, 7), "channels_last")
    image[..., :3] = 0.5
    grad = rand(1, 16, 5, 7, seed=1)
    got = kernels[2].local_affinity_backward(grad, image, [1, 3], **constants(spec))
    exact = reference.local_affinity_backward(grad, image.double(), [1, 3], **constants(spec))
    assert exact.isfinite().all()
    relative = (got.double() - exact).norm() / exact.norm()
    assert relative <= 3e-6, relative
    assert got.stride() == image.stride()


def test_affinity_backward_of_a_flat_image_is_zero(kernels):
    image = torch.full((1, 3, 4, 4), 0.3, device=DEVICE)
    assert not kernels[2].local_affinity_backward(rand(1, 8, 4, 4), image, [1], **constants(PAR)).any()


def test_offsets_beyond_32_bits_are_seen_on_meta_tensors(kernels):
    from dmsa_kernels.refine.triton.common import needs_int64

    def meta(*shape):
        return torch.empty(shape, device="meta")

    assert not needs_int64(meta(1, 8, 1024, 1024))
    assert needs_int64(meta(1, 1281, 2048, 1024))
    assert needs_int64(meta(1, 3, 8, 8), meta(33, 1, 8192, 8192)[::8])
    assert needs_int64(meta(1, 3, 8, 8).as_strided((2, 1, 1, 1), (2**31, 1, 1, 1)))
    assert not needs_int64(meta(0, 3, 8192, 8192))


@pytest.mark.slow
def test_wide_offsets_give_the_same_result(kernels, monkeypatch):
    affinity, propagate, backward = kernels
    image, masks, grad = rand(1, 3, 5, 6), rand(1, 5, 5, 6, seed=1), rand(1, 5, 5, 6, seed=2)

    def run():
        weights = affinity.local_affinity(image, [1, 2], fast=False, **constants(PAR))
        valid = torch.ones(1, 5, dtype=torch.bool, device=DEVICE)
        needed = {"need_weights": True, "need_masks": True}
        return (
            weights,
            propagate.propagate(weights, masks, [1, 2], 2, valid),
            *propagate.propagate_labels(weights, masks, [1, 2], 1, valid),
            *backward.propagate_backward(grad, weights, masks, [1, 2], 2, None, **needed),
            backward.local_affinity_backward(weights, image, [1, 2], **constants(PAR)),
        )

    narrow = run()
    for module in kernels:
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    plans.clear()
    assert all(torch.equal(a, b) for a, b in zip(narrow, run(), strict=True))


def test_threads_without_room_take_fewer_channels_and_warps(monkeypatch):
    from dmsa_kernels import compat
    from dmsa_kernels.refine.triton import propagate as kernels

    cpu, half = torch.device("cpu"), torch.float16
    chosen = {}
    for name, capability, hip in (
        ("hopper", (9, 0), None),
        ("ada", (8, 9), None),
        ("blackwell", (12, 0), None),
        ("amd", None, "6.2"),
    ):
        monkeypatch.setattr(compat, "compute_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        widths = [kernels.plane_width(24, half, 8 * count, False, cpu) for count in (3, 5, 8)]
        chosen[name] = widths, [kernels.most_warps(24, width, "", cpu) for width in (4, 8)]
        assert kernels.plane_width(24, half, 40, True, cpu) == 4
    held = 32 if compat.triton_has_tuples() else 8
    assert chosen == {
        "hopper": ([8, 8, 8], [held, held]),
        "ada": ([8, 8, 8], [held, 8]),
        "blackwell": ([8, 4, 4], [held, 8]),
        "amd": ([8, 8, 4], [held, held]),
    }
    assert kernels.most_warps(64, 4, "in", cpu) == kernels.most_warps(56, 2, "", cpu) == 8
    monkeypatch.setattr(compat, "triton_has_tuples", lambda: False)
    assert kernels.most_warps(8, 4, "", cpu) == 8
