"""What tests of the operators share; tested in test_helpers.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dmsa_kernels.backend import why_not_triton
from dmsa_kernels.compat import REGISTERS_OPERATORS
from dmsa_kernels.refine import AffinitySpec

GOLDEN = Path(__file__).parent / "data" / "golden"


registered = pytest.mark.skipif(
    not REGISTERS_OPERATORS, reason=f"torch {torch.__version__}: operators are registered from 2.4 on"
)
"""Marks a test of what only a registered operator has: torch.ops, opcheck, fakes, the compiler's full graph."""


def require_backend(backend: str) -> None:
    """Skip, with the reason, a test of Triton kernels that cannot run here."""
    if backend != "triton":
        return
    reason = why_not_triton(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        pytest.skip(f"the Triton kernels cannot run: {reason}")


def golden(name: str) -> dict[str, Tensor | str | int | list[int]]:
    """Arrays of a golden file as tensors, its settings as Python values."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        data = {key: torch.from_numpy(archive[key]) for key in archive if archive[key].ndim > 1}
        return {
            **data,
            "kind": str(archive["kind"]),
            "dilations": archive["dilations"].tolist(),
            "num_iter": int(archive["num_iter"]),
        }


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def border(height: int, width: int, band: int) -> Tensor:
    """Bool [H, W]: pixels fewer than ``band`` pixels away from the map's edge."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[band : max(band, height - band), band : max(band, width - band)] = True
    return ~inside


def brute_affinity(image: Tensor, dilations: list[int], spec: AffinitySpec) -> Tensor:
    """The affinity [B, P, H, W] written as loops over pixels, with Python's floats; independent of the package."""
    batch, channels, height, width = image.shape
    pixels = image.double().tolist()
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    weights = torch.zeros(batch, 8 * len(dilations), height, width, dtype=torch.float64)
    distances = [d * math.sqrt(i * i + j * j) for d in dilations for i, j in around]
    spread = _deviation(distances) * spec.alpha + spec.eps
    position = _softmax([-((distance / spread) ** 2) for distance in distances])
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                scores = [0.0] * len(distances)
                for k in range(channels):
                    plane = pixels[b][k]
                    centre = plane[y][x]
                    near = [
                        plane[min(max(y + i * d, 0), height - 1)][min(max(x + j * d, 0), width - 1)]
                        for d in dilations
                        for i, j in around
                    ]
                    if spec.sigma == "neighbours":
                        sigma = _deviation(near)
                    elif spec.sigma == "centred":
                        sigma = _deviation(near + [centre] * len(dilations))
                    elif spec.sigma == "centre_once":
                        sigma = _deviation([*near, centre])
                    else:
                        sigma = 1.0
                    for p, value in enumerate(near):
                        scaled = abs(value - centre) / (spec.alpha * sigma + spec.eps)
                        scores[p] -= scaled**spec.exponent / channels
                for p, (a, r) in enumerate(zip(_softmax(scores), position, strict=True)):
                    weights[b, p, y, x] = a + spec.position_weight * r
    return weights


def brute_propagate(weights: Tensor, masks: Tensor, dilations: list[int], num_iter: int) -> Tensor:
    """The propagation written as loops over pixels; independent of the package."""
    batch, _classes, height, width = masks.shape
    masks = masks.double()
    around = [(i * d, j * d) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    for _ in range(num_iter):
        refined = torch.zeros_like(masks)
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    for p, (dy, dx) in enumerate(around):
                        source = masks[b, :, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                        refined[b, :, y, x] += weights[b, p, y, x].double() * source
        masks = refined
    return masks


def _deviation(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [value / math.fsum(exponentials) for value in exponentials]


class LargestTensor(TorchDispatchMode):
    """Records the storage size in elements of the largest tensor that any operator returns inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, size)
        return result
