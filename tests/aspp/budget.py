"""The error that a correct low-precision implementation may make, derived from the library's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def require_convolution(dtype: torch.dtype) -> None:
    """Skip a test whose yardstick, the library's convolution on a CPU, does not exist in ``dtype`` (torch < 2.2)."""
    try:
        F.conv2d(torch.zeros(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no convolution to compare with: {error}")


def plain(x: Tensor, weight: Tensor, dilations, bias: Tensor | None, reduce: str) -> Tensor:
    """Compute the branches the way every ASPP head does: one library convolution a branch, then stack, cat or sum."""
    half = weight.shape[-1] // 2
    branches = [
        F.conv2d(
            x,
            weight[r, :, None],
            None if bias is None else bias[r],
            padding=dilation * half,
            dilation=dilation,
            groups=x.shape[1],
        )
        for r, dilation in enumerate(dilations)
    ]
    if reduce == "sum":
        return torch.stack(branches).sum(0)
    return torch.stack(branches, 1) if reduce == "stack" else torch.cat(branches, 1)


def regions(value: Tensor, margin: int) -> dict[str, Tensor]:
    """Split ``[..., H, W]`` into its border, ``margin`` wide, and its interior; empty regions are left out."""
    height, width = value.shape[-2:]
    inside = torch.zeros(height, width, dtype=torch.bool, device=value.device)
    if margin < min(height, width) / 2:
        inside[margin : height - margin, margin : width - margin] = True
    parts = {"interior": value[..., inside], "border": value[..., ~inside]}
    return {name: part for name, part in parts.items() if part.numel()}


def assert_within_budget(actual: Tensor, plain_result: Tensor, exact: Tensor, what: str, margin: int | None = None):
    """Assert that ``actual`` errs at most twice as much as ``plain_result``, plus one rounding, in every region.

    Args:
        actual: the result under test, in low precision.
        plain_result: the library's result from the same inputs, in the same precision.
        exact: the same in float64.
        what: the name in the failure message.
        margin: width of the border that is judged apart; ``None`` judges the whole tensor at once.
    """
    assert actual.shape == exact.shape, f"{what}: {actual.shape=}, expected {exact.shape}"
    rounding = torch.finfo(actual.dtype).eps
    split = (lambda value: {"all": value}) if margin is None else (lambda value: regions(value, margin))
    actuals, plains, exacts = split(actual.double()), split(plain_result.double()), split(exact)
    for name, wanted in exacts.items():
        if not wanted.numel():
            continue
        error = (actuals[name] - wanted).abs().max()
        budget = 2 * (plains[name] - wanted).abs().max() + rounding * wanted.abs().max()
        assert error <= budget, f"{what}, {name}: error {error:.3g} over the budget {budget:.3g}"
