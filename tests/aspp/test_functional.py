"""The operator against float64 library convolutions: forward, every gradient, layouts, edge cases, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from dmsa_kernels import multi_dilation_dwconv
from dmsa_kernels.aspp import eager
from tests.aspp.budget import assert_within_budget, plain, regions, require_convolution

BACKENDS = ("eager", "reference")
REDUCTIONS = ("stack", "concat", "sum")
DMSA_RATES = ([1, 1, 2, 3], [1, 1, 3, 5], [1, 3, 6, 9], [1, 6, 12, 18])


def make(shape, rates, k=3, dtype=torch.float32, bias=True, layout="nchw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "tokens":
        tokens = torch.randn(batch, height * width + 1, channels, generator=generator).to(dtype)
        x = tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))
    elif layout == "sliced":
        x = torch.randn(batch, channels + 2, height + 3, 2 * width, generator=generator).to(dtype)
        x = x[:, 1:-1, 2:-1, ::2]
    elif layout == "expanded":
        x = x[:, :, :1].expand(shape)
    weight = torch.randn(len(rates), channels, k, k, generator=generator).to(dtype)
    offsets = torch.randn(len(rates), channels, generator=generator).to(dtype) if bias else None
    return x, weight, offsets


def differentiate(function, x, weight, bias, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = function(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    grads = torch.autograd.grad(y, leaves, grad if grad is not None else torch.ones((), dtype=y.dtype).expand_as(y))
    return y.detach(), dict(zip(("x", "weight", "bias"), grads, strict=False))


def check(x, weight, rates, bias, reduce, backend, grad="random"):
    """Compare forward and gradients with float64, each within its derived budget, border and interior apart."""

    def op(x, weight, bias):
        return multi_dilation_dwconv(x, weight, rates, bias, reduce, backend=backend)

    def library(x, weight, bias):
        return plain(x, weight, rates, bias, reduce)

    out = library(x, weight, bias)
    incoming = None
    if grad == "random":
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    y, grads = differentiate(op, x, weight, bias, incoming)
    plain_y, plain_grads = differentiate(library, x, weight, bias, incoming)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact_y, exact_grads = differentiate(library, *wide, None if incoming is None else incoming.double())
    margin = min(rates) * (weight.shape[-1] // 2)
    assert y.dtype == x.dtype
    assert_within_budget(y, plain_y, exact_y, "forward", margin)
    for name, exact in exact_grads.items():
        assert grads[name].dtype == x.dtype
        assert_within_budget(
            grads[name], plain_grads[name], exact, f"gradient of {name}", margin if name == "x" else None
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "tokens", "sliced", "expanded"])
def test_every_layout_and_reduction(backend, reduce, layout):
    rates = [1, 6, 18]
    x, weight, bias = make((2, 6, 20, 20), rates, layout=layout)
    check(x, weight, rates, bias, reduce, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_sizes_and_dtypes(backend, k, dtype):
    require_convolution(dtype)
    rates = [1, 2, 5]
    x, weight, bias = make((2, 5, 13, 17), rates, k=k, dtype=dtype, layout="channels_last")
    check(x, weight, rates, bias, "stack", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rates", DMSA_RATES)
@pytest.mark.parametrize("bias", [True, False])
def test_paper_rates_on_the_training_grid(backend, rates, bias):
    x, weight, offsets = make((2, 7, 20, 20), rates, bias=bias, layout="tokens")
    check(x, weight, rates, offsets, "concat", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ((1, 1, 20, 20), [18]),
        ((2, 1, 1, 9), [1, 4]),
        ((1, 3, 9, 1), [2]),
        ((1, 3, 4, 5), [4, 5, 64]),
        ((3, 33, 7, 5), [3, 3, 1]),
    ],
)
def test_odd_shapes_and_dilations_beyond_the_map(backend, shape, rates):
    x, weight, bias = make(shape, rates)
    check(x, weight, rates, bias, "stack", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_expanded_gradient_of_a_sum(backend, reduce, layout):
    rates = [1, 3]
    x, weight, bias = make((2, 4, 9, 8), rates, layout=layout)
    check(x, weight, rates, bias, reduce, backend, grad="ones")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_sliced_gradient(backend, layout):
    rates = [1, 3]
    x, weight, bias = make((2, 4, 9, 8), rates, layout=layout)
    wide = torch.randn(2, 2, 9, 4, 16)
    sliced = wide.permute(0, 1, 3, 2, 4)[..., ::2]

    def op(x, weight, bias):
        return multi_dilation_dwconv(x, weight, rates, bias, backend=backend)

    _, grads = differentiate(op, x, weight, bias, sliced)
    _, dense = differentiate(op, x, weight, bias, sliced.contiguous())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, dense[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    rates = [1, 2]
    x, weight, bias = make((0, 4, 5, 6), rates)
    y, grads = differentiate(
        lambda *a: multi_dilation_dwconv(a[0], a[1], rates, a[2], "concat", backend=backend), x, weight, bias, None
    )
    assert y.shape == (0, 8, 5, 6)
    assert grads["x"].shape == x.shape
    assert not grads["weight"].any()
    assert not grads["bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_maps_are_cut_into_tiles(backend, monkeypatch):
    rates = [1, 3]
    for layout in ("nchw", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            for elements in (1, 40, 300):
                monkeypatch.setattr(eager, "TILE_ELEMENTS", elements)
                x, weight, bias = make((2, 5, 7, 9), rates, layout=layout, dtype=dtype)
                for reduce in REDUCTIONS:
                    check(x, weight, rates, bias, reduce, backend)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widest", [True, False])
def test_the_library_takes_a_few_images_at_a_time(layout, dtype, widest, monkeypatch):
    monkeypatch.setattr(eager, "_has_avx512", lambda: widest)  # padding up to 6 by the library, or up to 4
    monkeypatch.setattr(eager, "LIBRARY_ELEMENTS", 2 * 5 * 7 * 9)
    for rates in ([1, 1, 2, 3], [1, 5, 9]):
        x, weight, bias = make((5, 5, 7, 9), rates, layout=layout, dtype=dtype)
        for reduce in REDUCTIONS:
            check(x, weight, rates, bias, reduce, "eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(backend, reduce, layout):
    rates = [1, 2, 9]
    x, weight, bias = make((2, 2, 5, 4), rates, dtype=torch.float64, layout=layout)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: multi_dilation_dwconv(x, w, rates, b, reduce, backend=backend), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_input_is_kept(backend):
    rates = [1, 2]
    for layout in ("channels_last", "tokens"):
        x, weight, bias = make((2, 4, 6, 5), rates, layout=layout)
        x.requires_grad_()
        y = multi_dilation_dwconv(x, weight, rates, bias, "concat", backend=backend)
        assert y.is_contiguous(memory_format=torch.channels_last)
        tokens = y.flatten(2).transpose(1, 2)
        assert tokens.data_ptr() == y.data_ptr()
        assert tokens.is_contiguous()
        assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=torch.channels_last)
    x, weight, bias = make((2, 4, 6, 5), rates)
    assert multi_dilation_dwconv(x, weight, rates, bias, backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_neighbourhood(backend):
    x, weight, _ = make((1, 2, 12, 12), [4])
    x[0, 0, 5, 6] = float("nan")
    y = multi_dilation_dwconv(x, weight, [4], reduce="sum", backend=backend)
    reached = {(int(i), int(j)) for i, j in y[0, 0].isnan().nonzero()}
    assert reached == {(i, j) for i in (1, 5, 9) for j in (2, 6, 10)}
    assert not y[0, 1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(backend, dtype):
    rates = [1, 6]
    x, weight, bias = make((2, 3, 20, 20), rates)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    if dtype == torch.float16:
        require_convolution(dtype)  # where there is none, autocast refuses the dtype on a CPU
    with torch.autocast("cpu", dtype):
        y = multi_dilation_dwconv(*leaves[:2], rates, leaves[2], backend=backend)
        doubled = multi_dilation_dwconv(x.double(), weight.double(), rates, backend=backend)
    assert y.dtype == dtype
    assert doubled.dtype == torch.float64
    lowered = multi_dilation_dwconv(*(t.detach().to(dtype) for t in leaves[:2]), rates, bias.to(dtype), backend=backend)
    assert torch.equal(y, lowered)
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_backward_pass_changes_nothing(backend):
    rates = [1, 6]
    leaves = [t.requires_grad_() for t in make((2, 3, 20, 20), rates)]
    y = multi_dilation_dwconv(*leaves[:2], rates, leaves[2], backend=backend)
    outside = torch.autograd.grad(y, leaves, y.detach(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, y.detach())
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_deterministic(backend):
    rates = [1, 6, 12]
    x, weight, bias = make((3, 8, 20, 20), rates)
    first, second = (
        differentiate(
            lambda *a: multi_dilation_dwconv(a[0], a[1], rates, a[2], backend=backend), x, weight, bias, None
        )[1]
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_needed_gradients_are_computed():
    x, weight, bias = make((1, 2, 5, 5), [1, 2])
    weight.requires_grad_()
    y = multi_dilation_dwconv(x, weight, [1, 2], bias)
    y.sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_double_backward_is_refused():
    x, weight, _ = make((1, 2, 5, 5), [1])
    x.requires_grad_()
    weight.requires_grad_()
    y = multi_dilation_dwconv(x, weight, [1])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def bad_calls():
    x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(2, 2, 3, 3)
    return [
        ("x.shape", ValueError, {"x": x[0]}),
        ("x.shape", ValueError, {"x": x[:, :0], "weight": weight[:, :0]}),
        ("x.shape", ValueError, {"x": x[:, :, :0]}),
        ("x.dtype", TypeError, {"x": x.long()}),
        ("x must be", TypeError, {"x": [1.0]}),
        ("weight.shape", ValueError, {"weight": weight[..., :2]}),
        ("weight.shape", ValueError, {"weight": torch.zeros(2, 2, 4, 4)}),
        ("weight.shape", ValueError, {"weight": torch.zeros(2, 3, 3, 3)}),
        ("weight.shape", ValueError, {"weight": weight[:0], "dilations": []}),
        ("weight.dtype", TypeError, {"weight": weight.double()}),
        ("weight.device", ValueError, {"weight": weight.to("meta")}),
        ("bias.shape", ValueError, {"bias": torch.zeros(2, 3)}),
        ("dilations", ValueError, {"dilations": [1]}),
        ("dilations", ValueError, {"dilations": []}),
        ("dilations", ValueError, {"dilations": [1, 0]}),
        ("dilations", ValueError, {"dilations": [1, -2]}),
        ("dilations", TypeError, {"dilations": [1, 2.0]}),
        ("dilations", TypeError, {"dilations": [1, True]}),
        ("dilations", TypeError, {"dilations": 2}),
        ("x.dtype", TypeError, {"x": x.to(torch.float8_e4m3fn), "weight": weight.to(torch.float8_e4m3fn)}),
        ("reduce", ValueError, {"reduce": "mean"}),
        ("backend", ValueError, {"backend": "cuda"}),
    ]


@pytest.mark.parametrize(("message", "error", "change"), bad_calls())
def test_bad_arguments_are_named(message, error, change):
    arguments = {"x": torch.zeros(1, 2, 5, 5), "weight": torch.zeros(2, 2, 3, 3), "dilations": [1, 2]}
    with pytest.raises(error, match=message):
        multi_dilation_dwconv(**{**arguments, **change})


def test_budget_catches_an_error_at_the_border_alone():
    exact = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    good, bad = exact.float(), exact.float()
    bad[..., 0, 0] += 1e-3
    assert_within_budget(good, good, exact, "y", 1)
    with pytest.raises(AssertionError, match="border"):
        assert_within_budget(bad, good, exact, "y", 1)
    assert set(regions(exact, 3)) == {"border"}
    assert regions(exact, 1)["interior"].numel() == 16


@pytest.mark.parametrize("reduce", ["stack", "concat", "sum"])
@pytest.mark.parametrize("leaves", ["x", "weight", "bias", "x weight bias"])
def test_forward_mode_equals_the_library(reduce, leaves):
    rates = [1, 3]
    given = dict(zip(("x", "weight", "bias"), make((2, 3, 6, 5), rates, dtype=torch.float64), strict=True))
    moving = {name: given[name] for name in leaves.split()}
    steps = tuple(torch.randn_like(tensor) for tensor in moving.values())

    def run(operator):
        def at(*values):
            return operator(**{**given, **dict(zip(moving, values, strict=True))}, reduce=reduce)

        return torch.func.jvp(at, tuple(moving.values()), steps)

    ours = run(lambda x, weight, bias, reduce: multi_dilation_dwconv(x, weight, rates, bias, reduce))
    wanted = run(lambda x, weight, bias, reduce: plain(x, weight, rates, bias, reduce))
    for got, exact in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, exact)
        assert exact.abs().max() > 0


def test_jacobians_in_forward_and_reverse_mode_agree():
    x, weight, _ = make((1, 2, 4, 4), [1, 2], dtype=torch.float64)

    def plane(x):
        return multi_dilation_dwconv(x, weight, [1, 2], reduce="sum")

    reverse = torch.autograd.functional.jacobian(plane, x)
    torch.testing.assert_close(torch.func.jacfwd(plane)(x), reverse)


def test_forward_mode_under_autocast_and_over_reverse_mode():
    x, weight, _ = make((1, 2, 4, 4), [1])
    with torch.autocast("cpu", torch.bfloat16):
        value, derivative = torch.func.jvp(lambda x: multi_dilation_dwconv(x, weight, [1]), (x,), (x,))
    assert derivative.dtype == torch.bfloat16
    assert torch.equal(derivative, value)  # linear, without a bias
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), x)
        y = multi_dilation_dwconv(dual, weight, [1]).square().sum()
        with pytest.raises(RuntimeError, match="differentiable once: its backward pass got a forward-mode derivative"):
            torch.autograd.grad(y, dual)
