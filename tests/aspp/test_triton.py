"""The kernels through Triton's interpreter, at sizes it can afford: the same budget as every other backend."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' module is imported

import pytest
import torch

from dmsa_kernels import DepthwiseASPP, multi_dilation_dwconv, plans, why_not_triton
from dmsa_kernels.aspp import launch
from tests.aspp.test_functional import REDUCTIONS, check, differentiate, make

pytestmark = pytest.mark.skipif(
    why_not_triton(torch.zeros(1)) is not None, reason="needs Triton and TRITON_INTERPRET=1 before the first import"
)


@pytest.fixture(autouse=True)
def fresh_plans():
    """Trace anew in every test: some change what a plan is made of."""
    plans.clear()
    yield
    plans.clear()


@pytest.mark.parametrize(
    ("shape", "rates", "layout", "reduce", "dtype"),
    [
        ((1, 6, 20, 20), [1, 6, 12, 18], "tokens", "concat", torch.float32),
        ((1, 6, 20, 20), [1, 3, 6, 9], "channels_last", "stack", torch.bfloat16),
        ((1, 2, 20, 20), [6, 12, 18], "nchw", "concat", torch.float16),
        ((1, 33, 7, 5), [1, 3], "tokens", "sum", torch.float32),
        ((2, 2, 9, 11), [2, 5], "sliced", "stack", torch.float32),
        ((2, 2, 9, 11), [2, 5], "expanded", "sum", torch.float32),
        ((1, 1, 20, 20), [18], "nchw", "stack", torch.float32),
        ((1, 3, 4, 5), [4, 5, 64], "channels_last", "sum", torch.float32),
        ((1, 2, 1, 9), [1, 4], "nchw", "concat", torch.float32),
        ((1, 3, 9, 1), [2], "tokens", "stack", torch.bfloat16),
    ],
)
def test_layouts_dtypes_and_odd_shapes(shape, rates, layout, reduce, dtype):
    x, weight, bias = make(shape, rates, dtype=dtype, layout=layout, bias=reduce != "stack")
    check(x, weight, rates, bias, reduce, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("k", [5, 7])
def test_large_filters(k):
    x, weight, bias = make((1, 3, 11, 8), [1, 2], k=k, layout="channels_last")
    check(x, weight, [1, 2], bias, "concat", "triton")


@pytest.mark.parametrize(("reduce", "dtype"), [("concat", torch.float32), ("sum", torch.bfloat16)])
def test_more_branches_than_a_launch_takes(reduce, dtype):
    rates = [1, 2, 1, 3, 5, 1, 2, 4, 3, 2]
    x, weight, bias = make((1, 2, 6, 5), rates, dtype=dtype, layout="tokens" if reduce == "sum" else "nchw")
    check(x, weight, rates, bias, reduce, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_expanded_gradient_of_a_sum(reduce, layout):
    x, weight, bias = make((1, 2, 6, 5), [1, 3], layout=layout)
    check(x, weight, [1, 3], bias, reduce, "triton", grad="ones")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_many_tiles_and_splits(monkeypatch, layout):
    small = launch.Plan(block_p=32, block_c=2, tiles=1, num_warps=4)
    monkeypatch.setattr("dmsa_kernels.aspp.triton.forward.gather_plan", lambda *_: small)
    monkeypatch.setattr("dmsa_kernels.aspp.triton.backward.weight_plan", lambda *_: small)
    plans.clear()
    x, weight, bias = make((2, 3, 7, 9), [1, 4], layout=layout)
    check(x, weight, [1, 4], bias, "concat", "triton")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_wide_offsets_change_nothing(monkeypatch, layout):
    x, weight, bias = make((1, 2, 6, 5), [1, 3], layout=layout)

    def run():
        return differentiate(
            lambda *a: multi_dilation_dwconv(a[0], a[1], [1, 3], a[2], backend="triton"), x, weight, bias, None
        )

    y, grads = run()
    monkeypatch.setattr("dmsa_kernels.aspp.triton.forward.needs_wide_offsets", lambda *_: True)
    monkeypatch.setattr("dmsa_kernels.aspp.triton.backward.needs_wide_offsets", lambda *_: True)
    plans.clear()
    wide_y, wide_grads = run()
    assert torch.equal(y, wide_y)
    assert all(torch.equal(grads[name], wide_grads[name]) for name in grads)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "property_"),
    [
        ((2, 2, 16, 8), 3, "is_flat"),
        ((1, 1, 32, 16), 3, "is_flat"),
        ((2, 2, 4, 128), 3, "is_rowwise"),
        ((1, 1, 3, 256), 5, "is_rowwise"),
    ],
)
def test_full_tiles_and_tiles_in_a_row_change_nothing(monkeypatch, shape, kernel_size, property_):
    from dmsa_kernels.aspp.triton import forward

    asked = getattr(forward, property_)
    x, weight, bias = make(shape, [1, 3, 9], k=kernel_size, layout="nchw")

    check(x, weight, [1, 3, 9], bias, "concat", "triton")
    grad = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))

    def run():
        plans.clear()
        return differentiate(
            lambda *a: multi_dilation_dwconv(a[0], a[1], [1, 3, 9], a[2], backend="triton"), x, weight, bias, grad
        )

    answers = []
    for module in ("forward", "backward"):
        name = f"dmsa_kernels.aspp.triton.{module}.{property_}"
        monkeypatch.setattr(name, lambda plan, *maps: answers.append(asked(plan, *maps)) or answers[-1])
    y, grads = run()
    assert answers
    assert all(answers)
    for module in ("forward", "backward"):
        monkeypatch.setattr(f"dmsa_kernels.aspp.triton.{module}.{property_}", lambda *_: False)
    other_y, other_grads = run()
    assert torch.equal(y, other_y)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_maps_with_gaps_or_part_of_a_tile_are_not_flat():
    from dmsa_kernels.aspp.triton.forward import is_flat

    plan = launch.Plan(block_p=128, block_c=1, tiles=1, num_warps=1)
    assert is_flat(plan, torch.empty(2, 3, 16, 8), torch.empty(2, 3, 16, 8)[:, 1:])
    assert not is_flat(plan, torch.empty(2, 3, 16, 9)[..., :8])
    assert not is_flat(plan, torch.empty(2, 3, 16, 8), torch.empty(2, 3, 16, 8).to(memory_format=torch.channels_last))
    assert not is_flat(plan, torch.empty(2, 3, 20, 20))
    assert not is_flat(plan, torch.empty(2, 3, 16, 1).expand(2, 3, 16, 8))


def test_wide_offsets_are_used_where_one_image_passes_2_to_the_31():
    from dmsa_kernels.aspp.triton.forward import needs_wide_offsets

    small = torch.empty(4, 64, 128, 128, device="meta")
    assert not needs_wide_offsets(small, 0, small, 0, 1, 128)
    many_images = torch.empty(1 << 16, 64, 128, 128, device="meta")
    assert not needs_wide_offsets(many_images, 0, many_images, 0, 1, 128)
    large = torch.empty(1, 2048, 1024, 1024, device="meta")
    assert needs_wide_offsets(large, 0, small, 0, 1, 128)
    assert needs_wide_offsets(small, 0, large, 0, 1, 128)
    outputs = torch.empty(1, 1024, 1024, 1024, device="meta")
    assert needs_wide_offsets(small, 0, outputs, outputs[0].numel(), 3, 128)


def test_one_kernel_serves_every_dilation_set():
    """Triton compiles anew for the value 1 and for multiples of 16; a launch has neither."""
    from dmsa_kernels.aspp.triton.forward import dilation_arguments, launch_dilations

    launched = launch_dilations(range(1, 65), 40)
    assert [value >> 1 for value in launched] == [min(dilation, 40) for dilation in range(1, 65)]
    assert all(value > 1 and value % 16 for value in launched)
    assert dilation_arguments(launched[:3]) == {f"d_{r}": (3, 5, 7)[min(r, 2)] for r in range(8)}


def test_empty_batch():
    x, weight, bias = make((0, 4, 5, 6), [1, 2])
    y, grads = differentiate(
        lambda *a: multi_dilation_dwconv(a[0], a[1], [1, 2], a[2], backend="triton"), x, weight, bias, None
    )
    assert y.shape == (0, 2, 4, 5, 6)
    assert not grads["weight"].any()
    assert not grads["bias"].any()


def test_nan_stays_in_its_neighbourhood():
    x, weight, _ = make((1, 2, 12, 12), [4])
    x[0, 0, 5, 6] = float("nan")
    y = multi_dilation_dwconv(x, weight, [4], reduce="sum", backend="triton")
    assert {(int(i), int(j)) for i, j in y[0, 0].isnan().nonzero()} == {(i, j) for i in (1, 5, 9) for j in (2, 6, 10)}
    assert not y[0, 1].isnan().any()


def test_module_agrees_with_eager():
    torch.manual_seed(0)
    module = DepthwiseASPP(4, 6, (1, 2, 9), pointwise_first=True, image_pooling=True, bias=True, backend="triton")
    x = torch.randn(2, 4, 6, 5)
    y = module(x)
    module.backend = "eager"
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width"),
    [(2, 1024, 128, 128), (4, 2048, 64, 64), (32, 384, 20, 20), (1, 1, 1, 1), (1, 3, 2500, 4000), (43, 384, 28, 28)],
)
def test_plans_cover_the_map(kernel_size, channels_last, dtype, batch, channels, height, width):
    pixels = height * width
    gather = launch.gather_plan(batch, channels, height, width, kernel_size, dtype, channels_last)
    weight = launch.weight_plan(batch, channels, height, width, 3, kernel_size, dtype, channels_last)
    for plan in (gather, weight):
        assert plan.tiles >= 1
        for value in (plan.block_p, plan.block_c):
            assert value == launch.power_of_two(value)
        assert plan.block_c == 1 or channels_last
        assert plan.block_p * plan.block_c <= 2048
    assert gather.block_p * gather.tiles < 2 * max(256, pixels)
