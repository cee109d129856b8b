"""The constants of the affinity: one frozen dataclass and the presets that public code uses."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch

SIGMA_MODES = ("neighbours", "centred", "centre_once", "none")
NEIGHBOUR_OFFSETS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Offsets (dy, dx) of the eight neighbours in units of the dilation: row-major, the centre left out."""


def number(name: str, value: Any) -> float:
    """Return ``value``, a number of Python or numpy or a tensor of one element without a gradient, as Python's number.

    Raises:
        TypeError: anything else; the message names it.
    """
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.dtype.is_complex:
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} requires a gradient, but constants have none here: detach it, call under torch.no_grad(),"
                " or keep the pasted module to learn it"
            )
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    return value if isinstance(value, (int, float)) else float(value)


@dataclass(frozen=True)
class AffinitySpec:
    """How an affinity is computed from a guide image ``I``; see :func:`dmsa_kernels.local_affinity`.

    With ``r`` the difference between a neighbour and its centre, the score of neighbour ``p`` is
    ``-mean_k (|r_k| / (alpha * sigma_k + eps)) ** exponent``, and its weight
    ``softmax_p(score) + position_weight * softmax_p(-(distance_p / (std(distance) * alpha + eps)) ** 2)``.

    Args:
        exponent: 1 (PAMR) or 2 (PAR).
        alpha: factor on the standard deviation, > 0.
        sigma: samples of the standard deviation (ddof=1): ``"neighbours"`` the P neighbours (PAR), ``"centred"``
            those and the centre once per dilation (PAMR), ``"centre_once"`` those and the centre once,
            ``"none"`` sigma is 1.
        eps: added to ``alpha * sigma``, > 0, in the image's unit.
        position_weight: weight of the distance term, >= 0; the weights of a pixel sum to ``1 + position_weight``.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    exponent: float = 2.0
    alpha: float = 0.3
    sigma: str = "neighbours"
    eps: float = 0.3e-8
    position_weight: float = 0.01

    def __post_init__(self) -> None:
        for name in ("exponent", "alpha", "eps", "position_weight"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if self.exponent not in (1, 2):
            raise ValueError(f"exponent={self.exponent!r} must be 1 (as PAMR) or 2 (as PAR)")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r} must be positive and finite")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps={self.eps!r} must be positive and finite: flat regions divide by it")
        if not (math.isfinite(self.position_weight) and self.position_weight >= 0):
            raise ValueError(f"position_weight={self.position_weight!r} must be at least 0 and finite")
        if self.sigma not in SIGMA_MODES:
            raise ValueError(f"sigma={self.sigma!r} is not one of {', '.join(SIGMA_MODES)}")


PAR = AffinitySpec()
"""Pixel-Adaptive Refinement (AFA, CVPR 2022; rulixiang/afa ``wetr/PAR.py``). Its eps is inside the factor alpha."""

PAMR = AffinitySpec(exponent=1.0, alpha=0.1, sigma="centred", eps=1e-8, position_weight=0.0)
"""Pixel-Adaptive Mask Refinement (CVPR 2020; visinf/1-stage-wseg ``models/mods/pamr.py``)."""

LCM = AffinitySpec(position_weight=0.0)
"""Local consistency module of Box2Mask: PAR without the distance term, differentiated through the masks."""

PRESETS = {"par": PAR, "pamr": PAMR, "lcm": LCM}


def resolve_spec(spec: AffinitySpec | str) -> AffinitySpec:
    """Return ``spec`` itself, or the preset of that name (``"par"``, ``"pamr"``, ``"lcm"``).

    Raises:
        ValueError: no preset has that name.
        TypeError: neither a name nor an :class:`AffinitySpec`.
    """
    if isinstance(spec, AffinitySpec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"{spec=} must be an AffinitySpec or one of the names {', '.join(PRESETS)}")
    if spec not in PRESETS:
        raise ValueError(f"{spec=} is not one of {', '.join(PRESETS)}; pass an AffinitySpec for other constants")
    return PRESETS[spec]


def offsets(dilations: list[int]) -> list[tuple[int, int]]:
    """Offsets (dy, dx) in pixels of the P = 8 * len(dilations) neighbours, in the order of the weights."""
    return [(dy * d, dx * d) for d in dilations for dy, dx in NEIGHBOUR_OFFSETS]


def sigma_centre_count(sigma: str, dilations: list[int]) -> int:
    """How often the centre pixel counts among the samples of the standard deviation."""
    return {"neighbours": 0, "centred": len(dilations), "centre_once": 1, "none": 0}[sigma]


def position_vector(dilations: list[int], alpha: float, eps: float, position_weight: float) -> list[float]:
    """The distance term of the P weights, the same for every pixel: ``position_weight * softmax(...)``."""
    distance = [math.hypot(dy, dx) for dy, dx in offsets(dilations)]
    mean = sum(distance) / len(distance)
    std = math.sqrt(sum((d - mean) ** 2 for d in distance) / (len(distance) - 1))
    scale, nearest = std * alpha + eps, min(distance)
    # relative to the nearest neighbour's score, which a scale close to 0 would take out of range
    unnormalised = [
        math.exp(-(d - nearest) / scale * ((d + nearest) / scale)) if d > nearest else 1.0 for d in distance
    ]
    total = sum(unnormalised)
    return [position_weight * value / total for value in unnormalised]
