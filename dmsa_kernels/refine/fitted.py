"""Settings of the refinement that were fitted on photographs, for masks that are averages over cells."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmsa_kernels.refine.certainty import CertaintyAnchor
from dmsa_kernels.refine.spec import LCM, AffinitySpec

SMALLEST, LARGEST = 4, 64
FAR_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Dilations of the first pass as shares of a cell's side: within the cell, and as far as the next one."""
REACH = 24
"""Pixels that no dilation exceeds: further away, what looks alike is something else."""
NEAR_SHARES = (1 / 16, 1 / 8)
"""Dilations at full size: what half the pixels cannot show."""
ANCHOR = CertaintyAnchor(share=0.95, doubt=0.25)


@dataclass(frozen=True)
class FittedPreset:
    """Settings for one stride; :meth:`dmsa_kernels.PAR.for_stride` uses them.

    Attributes:
        far: dilations, in pixels of the image at half its size, and iterations of the first pass.
        dilations: in pixels, of the second pass, at full size.
        num_iter: its iterations T.
        anchor: share of the first masks that every iteration keeps.
        spec: constants of the affinity: PAR's, without the distance term, so that scores keep their scale.
    """

    far: tuple[tuple[int, ...], int]
    dilations: tuple[int, ...]
    num_iter: int
    anchor: CertaintyAnchor = ANCHOR
    spec: AffinitySpec = LCM


def fitted_preset(stride: float | Sequence[float]) -> FittedPreset:
    """Return the settings for cells of ``stride`` pixels, a number or rows and columns: dilations in proportion.

    Fitted on half of the photographs of `benchmarks/quality`, checked on the other half; docs/masks.md says what was
    searched.

    Raises:
        ValueError: ``stride`` is not a number from 4 to 64 pixels.
    """
    sides: Sequence[Any] = stride if isinstance(stride, (tuple, list)) else (stride, stride)
    if len(sides) != 2 or not all(isinstance(n, numbers.Real) and not isinstance(n, bool) for n in sides):
        raise ValueError(f"{stride=} must be a number from 4 to 64 pixels, or one for rows and one for columns")
    if not all(SMALLEST <= n <= LARGEST for n in sides):
        raise ValueError(f"{stride=} must be a number from 4 to 64 pixels; there is no fitted preset for others")
    side = math.sqrt(sides[0] * sides[1])
    far = {max(1, round(min(share * side, REACH) / 2)) for share in FAR_SHARES}
    near = {max(1, round(share * side)) for share in NEAR_SHARES}
    # a walk of twice the distance takes four times the steps; 20 cost less than PAR does
    steps = round(10 * min(max(side / REACH, 1) ** 2, 2))
    return FittedPreset((tuple(sorted(far)), steps), tuple(sorted(near)), 5)
