"""DepthwiseASPP against the layers it stands for, and its arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmsa_kernels import DepthwiseASPP


def by_layers(module, x, dilations):
    """Compute the pyramid branch by branch with library layers."""
    branches = []
    rates = list(dilations)
    if module.pointwise_first:
        branches.append(F.conv2d(x, module.scale[:, None, None, None], groups=x.shape[1]))
        rates = rates[1:]
    for weight, d in zip(module.weight, rates, strict=True):
        padding = d * (module.kernel_size // 2)
        branches.append(F.conv2d(x, weight[:, None], padding=padding, dilation=d, groups=x.shape[1]))
    if module.bias is not None:
        branches = [y + b[:, None, None] for y, b in zip(branches, module.bias, strict=True)]
    if module.image_pooling:
        branches.append(x.mean((2, 3), keepdim=True).expand_as(x))
    return module.activation(
        module.norm(F.conv2d(torch.cat(branches, 1), module.projection.weight, module.projection.bias))
    )


@pytest.mark.parametrize("pointwise_first", [True, False])
@pytest.mark.parametrize("image_pooling", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_module_is_the_pyramid(pointwise_first, image_pooling, bias, kernel_size):
    torch.manual_seed(0)
    module = DepthwiseASPP(
        5, 7, (1, 6, 12), kernel_size, pointwise_first=pointwise_first, image_pooling=image_pooling, bias=bias
    ).double()
    x = torch.randn(2, 5, 20, 19, dtype=torch.float64)
    for rates in (None, [2, 3, 25]):
        actual, expected = module(x, rates), by_layers(module, x, rates or (1, 6, 12))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        parameters = list(module.parameters())
        for got, wanted in zip(
            torch.autograd.grad(actual.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_the_rate_of_a_pointwise_branch_is_inert():
    module = DepthwiseASPP(3, 4, (1, 1, 2, 3), pointwise_first=True)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(module(x, [1, 1, 2, 3]), module(x, [7, 1, 2, 3]))


def test_parameters_do_not_depend_on_the_rates():
    one, other = DepthwiseASPP(3, 4, (1, 1, 2, 3)), DepthwiseASPP(3, 4, (1, 6, 12, 18))
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(one(x, (1, 6, 12, 18)), other(x))


def test_tokens_enter_and_leave_without_a_copy():
    module = DepthwiseASPP(8, 6, (1, 2), norm="group", activation=None)
    tokens = torch.randn(2, 30, 8)
    y = module(tokens.transpose(1, 2).unflatten(2, (6, 5)))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["batch", "sync_batch", "group", None, nn.InstanceNorm2d])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", None, nn.Tanh])
def test_norms_and_activations(norm, activation):
    module = DepthwiseASPP(3, 4, (1, 2), norm=norm, activation=activation)
    if norm != "sync_batch":  # the library's own refuses the CPU in training
        assert module(torch.randn(2, 3, 6, 6)).shape == (2, 4, 6, 6)
    assert (module.projection.bias is None) == (norm is not None)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("channels=0", {"channels": 0}),
        ("out_channels=0", {"out_channels": 0}),
        ("kernel_size", {"kernel_size": 4}),
        ("dilations", {"dilations": ()}),
        ("dilations", {"dilations": (1,), "pointwise_first": True}),
        ("dilations", {"dilations": (1, 0)}),
        ("norm", {"norm": "layer"}),
        ("activation", {"activation": "step"}),
        ("backend", {"backend": "cpu"}),
    ],
)
def test_bad_arguments_are_named(message, change):
    with pytest.raises(ValueError, match=message):
        DepthwiseASPP(**{"channels": 3, "out_channels": 4, "dilations": (1, 2), **change})


def test_a_call_with_another_number_of_rates_is_refused():
    with pytest.raises(ValueError, match="dilations"):
        DepthwiseASPP(3, 4, (1, 2))(torch.randn(1, 3, 5, 5), [1, 2, 3])


@pytest.mark.parametrize("pointwise_first", [True, False])
@pytest.mark.parametrize("projection", ["fused", "unfused"])
@pytest.mark.parametrize("shape", [(3,), (2, 30, 3), (1, 5, 6, 6)])
def test_a_map_of_another_shape_is_refused(pointwise_first, projection, shape):
    module = DepthwiseASPP(3, 4, (1, 2), pointwise_first=pointwise_first, projection=projection)
    with pytest.raises(ValueError, match=r"x\.shape"):
        module(torch.randn(shape))


def test_a_single_rate_is_no_set():
    with pytest.raises(TypeError, match="dilations"):
        DepthwiseASPP(3, 4, 2)
    with pytest.raises(TypeError, match="dilations"):
        DepthwiseASPP(3, 4, (1, 2))(torch.randn(1, 3, 5, 5), 2)
