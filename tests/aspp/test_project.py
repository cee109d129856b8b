"""The fused projection against float64 library convolutions on every backend, kernels through the interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' module is imported

import pytest
import torch
import torch.nn.functional as F

from dmsa_kernels import DepthwiseASPP, plans, why_not_triton
from dmsa_kernels.aspp import fused_dwconv_project, launch
from dmsa_kernels.aspp.layout import is_channels_last
from tests.aspp.budget import assert_within_budget, plain, require_convolution
from tests.aspp.test_functional import make
from tests.helpers import registered

needs_interpreter = pytest.mark.skipif(
    why_not_triton(torch.zeros(1)) is not None, reason="needs Triton and TRITON_INTERPRET=1 before the first import"
)
BACKENDS = ("eager", "reference", pytest.param("triton", marks=needs_interpreter))
NAMES = ("x", "weight", "projection", "bias", "offset")


def make_all(shape, rates, out_channels, k=3, dtype=torch.float32, layout="nchw"):
    """Draw x, weight, projection, bias and offset."""
    x, weight, bias = make(shape, rates, k=k, dtype=dtype, layout=layout)
    generator = torch.Generator().manual_seed(3)
    projection = torch.randn(out_channels, len(rates) * shape[1], generator=generator).to(dtype)
    offset = torch.randn(shape[0], out_channels, generator=generator).to(dtype)
    return x, weight, projection, bias, offset


def composed(x, weight, projection, bias, offset, rates):
    """Project the library's branches, in the layout of x as ours are, by a library convolution.

    The gradient of the projection is a product of matrices whose rounding depends on that layout.
    """
    branches = plain(x, weight, rates, bias, "concat")
    if is_channels_last(x):
        branches = branches.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(branches, projection[:, :, None, None])
    return y if offset is None else y + offset[:, :, None, None]


def differentiate(function, tensors, grad):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return y.detach(), torch.autograd.grad(
        y, present, torch.ones((), dtype=y.dtype).expand_as(y) if grad is None else grad
    )


def check(tensors, rates, backend, grad="random"):
    """Compare forward and gradients with float64, each within its derived budget, border and interior apart."""
    shape = (tensors[0].shape[0], tensors[2].shape[0], *tensors[0].shape[2:])
    incoming = None
    if grad == "random":
        incoming = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(tensors[0].dtype)

    def op(x, weight, projection, bias, offset):
        return fused_dwconv_project(x, weight, projection, rates, bias, offset, backend=backend)

    def library(*leaves):
        return composed(*leaves, rates)

    y, grads = differentiate(op, tensors, incoming)
    plain_y, plain_grads = differentiate(library, tensors, incoming)
    wide = [None if t is None else t.double() for t in tensors]
    exact_y, exact_grads = differentiate(library, wide, None if incoming is None else incoming.double())
    margin = min(rates) * (tensors[1].shape[-1] // 2)
    assert y.dtype == tensors[0].dtype
    assert_within_budget(y, plain_y, exact_y, "forward", margin)
    names = [name for name, tensor in zip(NAMES, tensors, strict=True) if tensor is not None]
    for name, actual, library_grad, exact in zip(names, grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(
            actual, library_grad, exact, f"gradient of {name}", margin if name == "x" and grad == "random" else None
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "rates", "out_channels", "layout", "dtype"),
    [
        ((1, 17, 20, 20), [6, 18], 5, "tokens", torch.float32),  # rate 18 on a small map
        ((2, 3, 9, 11), [1, 3], 17, "nchw", torch.float32),  # several images, neither width a multiple of a block
        ((1, 35, 7, 5), [2, 9], 3, "channels_last", torch.bfloat16),
        ((1, 6, 8, 9), [1, 64], 4, "sliced", torch.float16),
        ((1, 1, 1, 9), [2], 1, "nchw", torch.float32),
        ((1, 3, 6, 5), [1, 2], 2, "expanded", torch.float32),
    ],
)
def test_layouts_dtypes_and_odd_shapes(backend, shape, rates, out_channels, layout, dtype):
    require_convolution(dtype)
    check(make_all(shape, rates, out_channels, dtype=dtype, layout=layout), rates, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [5, 7])
def test_large_filters(backend, k):
    check(make_all((1, 3, 11, 8), [1, 2], 4, k=k, layout="channels_last"), [1, 2], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_and_offset_and_with_an_expanded_gradient(backend):
    x, weight, projection, _, _ = make_all((2, 4, 6, 5), [1, 3], 3)
    check((x, weight, projection, None, None), [1, 3], backend, grad=None)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_branches_than_a_launch_takes(dtype):
    rates = [1, 2, 1, 3, 5, 1, 2, 4, 3]
    check(make_all((1, 2, 6, 5), rates, 3, dtype=dtype), rates, "triton")


@pytest.mark.slow
@needs_interpreter
def test_several_blocks_of_output_channels(monkeypatch):
    narrow = launch.ProjectPlan(block_p=32, block_c=16, block_o=16, num_warps=4)
    monkeypatch.setattr("dmsa_kernels.aspp.triton.project.project_plan", lambda *_: narrow)
    plans.clear()
    check(make_all((2, 18, 7, 6), [1, 2], 35, layout="tokens"), [1, 2], "triton")


@needs_interpreter
def test_wide_offsets_change_nothing(monkeypatch):
    tensors = make_all((1, 3, 6, 5), [1, 3], 4)
    x, weight, projection, bias, offset = tensors
    y = fused_dwconv_project(x, weight, projection, [1, 3], bias, offset, backend="triton")
    monkeypatch.setattr("dmsa_kernels.aspp.triton.project.needs_wide_offsets", lambda *_: True)
    assert torch.equal(y, fused_dwconv_project(x, weight, projection, [1, 3], bias, offset, backend="triton"))


@needs_interpreter
def test_nan_stays_in_its_neighbourhood():
    x, weight, projection, _, _ = make_all((1, 2, 12, 12), [4], 3)
    x[0, 0, 5, 6] = float("nan")
    y = fused_dwconv_project(x, weight, projection, [4], backend="triton")
    assert {(int(i), int(j)) for i, j in y[0, 0].isnan().nonzero()} == {(i, j) for i in (1, 5, 9) for j in (2, 6, 10)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, weight, projection, bias, offset = make_all((0, 4, 5, 6), [1, 2], 3)
    leaves = [weight.requires_grad_(), projection.requires_grad_()]
    y = fused_dwconv_project(x, weight, projection, [1, 2], bias, offset, backend=backend)
    assert y.shape == (0, 3, 5, 6)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pointwise_first", [True, False])
@pytest.mark.parametrize("image_pooling", [True, False])
def test_fused_module_equals_unfused(backend, pointwise_first, image_pooling):
    torch.manual_seed(0)
    norm = "group" if pointwise_first else None  # without a norm the projection has a bias
    options = {"pointwise_first": pointwise_first, "image_pooling": image_pooling, "bias": True, "norm": norm}
    fused = DepthwiseASPP(3, 4, (1, 2, 9), **options, projection="fused", backend=backend)
    unfused = DepthwiseASPP(3, 4, (1, 2, 9), **options, projection="unfused", backend="eager").double()
    unfused.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 6, 5)
    rates = [3, 1, 2]
    actual, expected = fused(x, rates), unfused(x.double(), rates)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(actual.square().sum(), list(fused.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(unfused.parameters()))
    for got, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_auto_is_unfused_until_measured():
    module = DepthwiseASPP(3, 4, (1, 2))
    assert not module.fused
    assert not launch.fused_projection_is_faster()


def test_fused_module_follows_autocast():
    x = torch.randn(2, 3, 6, 5)
    module = DepthwiseASPP(3, 4, (1, 2), image_pooling=True, norm=None, activation=None, projection="fused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_autocast_around_the_backward_pass_changes_nothing():
    x, weight, projection, bias, offset = (t.requires_grad_() for t in make_all((2, 3, 6, 5), [1, 3], 4))
    y = fused_dwconv_project(x, weight, projection, [1, 3], bias, offset)
    leaves = x, weight, projection, bias, offset
    outside = torch.autograd.grad(y, leaves, y.detach(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, y.detach())
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@registered
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("present", [True, False])
def test_opcheck(layout, present):
    x, weight, projection, bias, offset = make_all((2, 3, 6, 5), [1, 3], 4, layout=layout)
    x, weight, projection, bias, offset = (t.detach().requires_grad_() for t in (x, weight, projection, bias, offset))
    if not present:
        bias = offset = None
    operator = torch.ops.dmsa_kernels.fused_dwconv_project.default
    torch.library.opcheck(operator, (x, weight, bias, projection, offset, [1, 3], "eager"))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradcheck(backend):
    tensors = [t.double().requires_grad_() for t in make_all((2, 2, 4, 5), [1, 3], 3)]
    x, weight, projection, bias, offset = tensors

    def op(x, weight, projection, bias, offset):
        return fused_dwconv_project(x, weight, projection, [1, 3], bias, offset, backend=backend)

    assert torch.autograd.gradcheck(op, (x, weight, projection, bias, offset))


@registered
def test_fullgraph_compile_gives_the_same_numbers():
    module = DepthwiseASPP(3, 4, (1, 2), image_pooling=True, projection="fused")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 5)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(x).square().sum(), parameters)
    for got, wanted in zip(torch.autograd.grad(compiled(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"projection\.shape", {"projection": torch.zeros(4, 5)}),
        (ValueError, r"projection\.shape", {"projection": torch.zeros(4, 6, 1, 1)}),
        (ValueError, r"projection\.shape", {"projection": torch.zeros(0, 6)}),
        (TypeError, r"projection\.dtype", {"projection": torch.zeros(4, 6).double()}),
        (TypeError, "projection must", {"projection": None}),
        (ValueError, r"offset\.shape", {"offset": torch.zeros(4)}),
        (TypeError, "offset must", {"offset": 1.0}),
        (ValueError, "backend", {"backend": "cpu"}),
    ],
)
def test_bad_arguments_are_named(error, message, change):
    x, weight, projection, bias, offset = make_all((2, 3, 6, 5), [1, 3], 4)
    arguments = {"x": x, "weight": weight, "projection": projection, "bias": bias, "offset": offset}
    with pytest.raises(error, match=message):
        fused_dwconv_project(**{**arguments, "dilations": [1, 3], **change})


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="projection"):
        DepthwiseASPP(3, 4, (1, 2), projection="split")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_channels", [1, 17, 384, 2048])
def test_plans_suit_a_matrix_product(dtype, out_channels):
    plan = launch.project_plan(out_channels, dtype, True)
    for value in (plan.block_p, plan.block_c, plan.block_o):
        assert value == launch.power_of_two(value) >= 16
    assert plan.block_p * plan.block_o <= 64 * 32 * plan.num_warps


def test_forward_mode_of_every_tensor():
    leaves = [t.requires_grad_() for t in make_all((2, 2, 5, 4), [1, 2], 3, dtype=torch.float64)]

    def project(x, weight, projection, bias, offset):
        return fused_dwconv_project(x, weight, projection, [1, 2], bias, offset)

    assert torch.autograd.gradcheck(project, leaves, check_forward_ad=True)


@pytest.mark.parametrize("projection", ["fused", "unfused"])
@pytest.mark.parametrize("pointwise_first", [True, False])
def test_forward_mode_of_the_module(projection, pointwise_first):
    module = DepthwiseASPP(
        3, 4, (1, 2), pointwise_first=pointwise_first, norm=None, activation=None, projection=projection
    )
    x, step = torch.randn(2, 1, 3, 6, 5)
    _, derivative = torch.func.jvp(module, (x,), (step,))
    torch.testing.assert_close(derivative, module(step) - module(torch.zeros_like(step)), rtol=1e-4, atol=1e-5)
