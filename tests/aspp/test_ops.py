"""The registered operators: schemas and fakes, compilation, and what may not depend on the backend."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from dmsa_kernels import DepthwiseASPP, multi_dilation_dwconv
from dmsa_kernels.aspp import ops
from tests.aspp.test_functional import DMSA_RATES, make
from tests.helpers import registered

OPS = torch.ops.dmsa_kernels


@registered
@pytest.mark.parametrize("layout", ["nchw", "tokens", "sliced"])
@pytest.mark.parametrize("reduce", ["concat", "sum"])
def test_opcheck_forward(layout, reduce):
    x, weight, bias = make((2, 3, 6, 5), [1, 3], layout=layout)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(OPS.multi_dilation_dwconv.default, (*leaves, [1, 3], reduce, "eager"))


@registered
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 6), (2, 4, 6, 1), (1, 1, 5, 5), (0, 4, 5, 5)])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("rates", [[1, 2], [1, 9]])
def test_fake_strides_of_degenerate_maps(shape, layout, rates):
    x, weight, _ = make(shape, rates, layout=layout)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.multi_dilation_dwconv(mode.from_tensor(x), mode.from_tensor(weight), None, rates, "concat", "eager")
    assert ops.multi_dilation_dwconv(x, weight, None, rates, "concat", "eager").stride() == fake.stride()


@registered
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, False)])
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_opcheck_backward(needs, layout):
    x, weight, _ = make((2, 3, 6, 5), [1, 3], layout=layout)
    grad = torch.randn(2, 6, 6, 5)
    torch.library.opcheck(
        OPS.multi_dilation_dwconv_backward.default, (grad, x, weight, [1, 3], "concat", *needs, "eager")
    )


@registered
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_fullgraph_compile_gives_the_same_numbers(backend):
    x, weight, bias = make((2, 3, 6, 5), [1, 3])
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]

    def op(x, weight, bias):
        return multi_dilation_dwconv(x, weight, [1, 3], bias, backend=backend).square()

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(op(*leaves).sum(), leaves)
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected, strict=True):
        assert torch.equal(got, wanted)


@registered
def test_switching_rates_compiles_at_most_once_a_set():
    torch._dynamo.reset()
    module = DepthwiseASPP(3, 4, DMSA_RATES[0], pointwise_first=True)
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=count)
    x = torch.randn(2, 3, 20, 20)
    for rates in DMSA_RATES:
        compiled(x, rates)
    first_round = graphs
    assert first_round <= len(DMSA_RATES)
    for rates in DMSA_RATES * 2:
        compiled(x, rates)
    assert graphs == first_round
    torch._dynamo.reset()


def test_switching_rates_leaves_no_memory_behind():
    module = DepthwiseASPP(3, 4, DMSA_RATES[0], pointwise_first=True)
    x = torch.randn(2, 3, 20, 20, requires_grad=True)

    def one_cycle():
        for rates in DMSA_RATES:
            module(x, rates).sum().backward()
        module.zero_grad()
        x.grad = None
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    one_cycle()
    before = one_cycle()
    for _ in range(3):
        assert one_cycle() == before


def test_meta_tensors_give_shapes_and_strides():
    with torch.device("meta"):
        module = DepthwiseASPP(3, 4, (1, 2), norm=None)
        x = torch.empty(2, 5, 6, 3).permute(0, 3, 1, 2)
    y = multi_dilation_dwconv(x, module.weight, (1, 2), reduce="concat")
    assert y.shape == (2, 6, 5, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert module(x).shape == (2, 4, 5, 6)


def test_import_needs_neither_triton_nor_its_folder():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dmsa_kernels\n"
        "y = dmsa_kernels.multi_dilation_dwconv(torch.ones(1, 2, 5, 5), torch.ones(1, 2, 3, 3), [2])\n"
        "assert y.shape == (1, 1, 2, 5, 5) and not any('aspp.triton' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
