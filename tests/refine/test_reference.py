"""The definition against loops over pixels that share no code with it."""

import dataclasses

import pytest
import torch

from dmsa_kernels.refine import AffinitySpec, reference
from dmsa_kernels.refine.spec import LCM, PAMR, PAR
from tests.helpers import brute_affinity, brute_propagate

SPECS = [
    PAR,
    PAMR,
    LCM,
    AffinitySpec(exponent=1, alpha=0.5, sigma="centre_once", eps=1e-3, position_weight=0.2),
    AffinitySpec(exponent=2, alpha=0.2, sigma="none", eps=1e-6, position_weight=0.0),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dilations", [[1], [2, 1, 2], [7]], ids=str)
def test_affinity(spec, dilations):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    weights = reference.local_affinity(image, dilations, fast=False, **dataclasses.asdict(spec))
    assert weights.dtype == torch.float64
    assert torch.allclose(weights, brute_affinity(image, dilations, spec), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dilations", [[1], [2, 1, 2], [7]], ids=str)
def test_propagation(dilations):
    torch.manual_seed(0)
    weights = torch.rand(2, 8 * len(dilations), 5, 4, dtype=torch.float64) / (8 * len(dilations))
    masks = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    refined = reference.propagate(weights, masks, dilations, 3, None)
    assert torch.allclose(refined, brute_propagate(weights, masks, dilations, 3), rtol=0, atol=1e-12)


def test_result_dtypes():
    image = torch.rand(1, 3, 4, 4)
    constants = dataclasses.asdict(PAR)
    assert reference.local_affinity(image, [1], fast=False, **constants).dtype == torch.float32
    assert reference.local_affinity(image, [1], fast=True, **constants).dtype == torch.float16
    weights = reference.local_affinity(image.half(), [1], fast=False, **constants)
    assert weights.dtype == torch.float32
    assert reference.propagate(weights, image.bfloat16(), [1], 1, None).dtype == torch.bfloat16


def test_it_is_plain_differentiable_pytorch():
    image = torch.rand(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def weights(x):
        return reference.local_affinity(x, [1, 2], fast=False, **dataclasses.asdict(PAR))

    assert torch.autograd.gradcheck(weights, image)
