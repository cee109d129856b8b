"""Against the public code people use today, in double precision; interior and border pixels apart."""

import pytest
import torch

from dmsa_kernels import PAMR, PAR
from dmsa_kernels.refine import refine
from tests.helpers import border, golden, relative_norm, require_backend

NAMES = ("pamr_default", "pamr_small", "par_afa_224", "par_dilation_beyond_image", "par_odd_batch")
SMALL = ("pamr_small", "par_dilation_beyond_image", "par_odd_batch")
CASES = [(name, backend) for name in NAMES for backend in ("reference", "eager", "triton")]
WITH_GRADIENTS = [
    (name, backend)
    for name in SMALL
    for backend in ("reference", "eager", "triton")
    if (name, backend) != ("par_odd_batch", "reference")  # 15 s for what the two small files show as well
]


def _require(name, backend, interpretable):
    require_backend(backend)
    if backend == "triton" and name not in interpretable and not torch.cuda.is_available():
        pytest.skip("minutes in Triton's interpreter, which takes about 17 ms a program; runs on a GPU")


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_forward(name, backend):
    _require(name, backend, interpretable=("pamr_small", "par_dilation_beyond_image"))
    data = golden(name)
    refined = refine(
        data["image"], data["masks"], data["dilations"], data["num_iter"], spec=data["kind"], backend=backend
    )
    assert refined.dtype == torch.float32
    error = (refined.double() - data["refined_fp64"]).abs()
    edge = border(*error.shape[2:], 4)
    assert error[..., edge].max() <= 2e-6
    assert error[..., ~edge].max() <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pamr_default", "par_afa_224"])
def test_triton_on_a_corner_of_the_large_files(name):
    """Their settings and pixels on two tiles, which the interpreter can do; the expected values are the definition's.

    The files' own values do not serve: with dilation 24 and ten iterations every pixel depends on the whole map.
    """
    require_backend("triton")
    data = golden(name)
    image, masks = data["image"][..., :12, :32], data["masks"][..., :3, :8]
    arguments = (data["dilations"], data["num_iter"])
    actual = refine(image, masks, *arguments, spec=data["kind"], backend="triton")
    expected = refine(image.double(), masks.double(), *arguments, spec=data["kind"], backend="reference")
    assert (actual - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(("name", "backend"), WITH_GRADIENTS)
def test_gradients(name, backend):
    _require(name, backend, interpretable=("par_dilation_beyond_image",))
    data = golden(name)
    image, masks = data["image"].requires_grad_(), data["masks"].requires_grad_()
    refined = refine(image, masks, data["dilations"], data["num_iter"], spec=data["kind"], backend=backend)
    refined.backward(data["grad_refined"].float())
    for leaf, expected in ((image, data["grad_image"]), (masks, data["grad_masks"])):
        edge = border(*leaf.shape[2:], 2)
        assert relative_norm(leaf.grad[..., edge], expected[..., edge]) <= 3e-5
        assert relative_norm(leaf.grad[..., ~edge], expected[..., ~edge]) <= 3e-5


@pytest.mark.parametrize("name", NAMES)
def test_drop_in_modules(name):
    data = golden(name)
    if data["kind"] == "par":
        module = PAR(data["dilations"], data["num_iter"])
    else:
        module = PAMR(data["num_iter"], data["dilations"])
    assert (module(data["image"], data["masks"]).double() - data["refined_fp64"]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["pamr_small", "par_odd_batch"])
def test_fast_keeps_the_labels(name):
    data = golden(name)
    arguments = (data["image"], data["masks"], data["dilations"], data["num_iter"])
    fast = refine(*arguments, spec=data["kind"], precision="fast")
    expected = data["refined_fp64"]
    best = expected.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    agree = fast.argmax(1) == expected.argmax(1)
    assert agree[clear].double().mean() >= 0.999


@pytest.mark.parametrize(("spec", "growth"), [("par", 1.01), ("pamr", 1.0)])
@pytest.mark.parametrize("num_iter", [1, 10])
@pytest.mark.parametrize("seed", range(4))
def test_fast_is_within_its_documented_bound(spec, growth, num_iter, seed):
    """Sparse masks and strong contrasts, where the error is largest; 1 % for the float32 sums."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, 40, 44, generator=generator).round()
    masks = (torch.rand(1, 4, 40, 44, generator=generator) > 0.5).float()
    arguments = (image, masks, [1, 2, 4, 8, 12, 24], num_iter)
    error = (refine(*arguments, spec=spec, precision="fast") - refine(*arguments, spec=spec)).abs().max()
    assert 0 < error <= 1.01 * num_iter * growth**num_iter * 2**-11
