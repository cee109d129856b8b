"""Which calls of an operator pass by the dispatcher: only those that it would hand on unchanged."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dmsa_kernels import compat
from dmsa_kernels.aspp import ops
from tests.helpers import registered

pytestmark = registered


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def direct(monkeypatch):
    """What every call to an operator decided."""
    decisions = []
    decide = compat._is_direct
    monkeypatch.setattr(compat, "_is_direct", lambda args: decisions.append(decide(args)) or decisions[-1])
    return decisions


def convolve(x, weight):
    return ops.multi_dilation_dwconv(x, weight, None, [1, 2], "concat", "eager")


def tensors(**options):
    return torch.rand(2, 3, 5, 4, **options), torch.rand(2, 3, 3, 3, **options)


@pytest.mark.parametrize("gradients", ["off", "no leaf"])
def test_plain_calls_are_direct_and_equal_the_registered_operator(direct, gradients):
    x, weight = tensors()
    weight = torch.nn.Parameter(weight, requires_grad=gradients == "off")
    with torch.set_grad_enabled(gradients != "off"):
        out = convolve(x, weight)
    registered = torch.ops.dmsa_kernels.multi_dilation_dwconv(x, weight, None, [1, 2], "concat", "eager")
    assert direct == [True]
    assert torch.equal(out, registered)


def test_the_backward_pass_is_direct(direct):
    x, weight = tensors(requires_grad=True)
    convolve(x, weight).sum().backward()
    assert direct == [False, True]  # the forward pass keeps what the backward pass needs
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_gradient_through_a_gradient_still_raises(direct):
    x, weight = tensors(requires_grad=True)
    (grad,) = torch.autograd.grad(convolve(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_transforms_modes_and_traces_see_the_operator(direct):
    x, weight = tensors()
    batched = torch.vmap(convolve, (0, None))(x[:, None], weight)
    assert torch.equal(batched[:, 0], convolve(x, weight))
    graph = make_fx(convolve)(x, weight)
    assert "dmsa_kernels.multi_dilation_dwconv" in graph.code
    with torch.profiler.profile() as profile:
        convolve(x, weight)
    assert any("dmsa_kernels::multi_dilation_dwconv" in event.key for event in profile.key_averages())
    assert direct.count(True) == 1  # the call that vmap is compared with


@pytest.mark.parametrize("kind", ["meta", "subclass", "negated"])
def test_other_tensors_take_the_dispatcher(direct, kind):
    x, weight = tensors()
    if kind == "meta":
        assert convolve(x.to("meta"), weight.to("meta")).shape == (2, 6, 5, 4)
    elif kind == "subclass":
        assert torch.equal(convolve(x.as_subclass(Subclass), weight), convolve(x, weight))
    else:
        negated = torch.complex(x, -x).conj().imag  # equals x, and is stored as -x
        assert negated.is_neg()
        assert torch.equal(convolve(negated, weight), convolve(x, weight))
    assert direct[0] is False


def test_without_the_private_names_every_call_takes_the_dispatcher(direct, monkeypatch):
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    convolve(*tensors())
    assert direct == [False]
