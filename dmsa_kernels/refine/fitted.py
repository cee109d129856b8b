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
CELL_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Dilations as shares of a cell's side: within the cell, where its share of a class is to be put in its place."""
CELL_ANCHOR = CertaintyAnchor(share=0.9, power=1.5)
BLOB_STRIDE = 24
"""From this stride on masks are taken to be activation maps of a CNN, whose blobs are wider than a cell."""
BLOB_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
BLOB_ANCHOR = CertaintyAnchor(share=0.6, power=2)


@dataclass(frozen=True)
class FittedPreset:
    """Settings for one stride; :meth:`dmsa_kernels.PAR.for_stride` uses them.

    Attributes:
        dilations: in pixels.
        num_iter: iterations T.
        anchor: share of the first masks that every iteration keeps.
        spec: constants of the affinity: PAR's, without the distance term, so that scores keep their scale.
    """

    dilations: tuple[int, ...]
    num_iter: int
    anchor: CertaintyAnchor
    spec: AffinitySpec = LCM


def fitted_preset(stride: float | Sequence[float]) -> FittedPreset:
    """Return the settings for cells of ``stride`` pixels, a number or rows and columns: dilations in proportion.

    Fitted on half of the photographs of `benchmarks/quality`, checked on the other half; docs/refine.md says what was
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
    shares, anchor = (BLOB_SHARES, BLOB_ANCHOR) if side >= BLOB_STRIDE else (CELL_SHARES, CELL_ANCHOR)
    dilations = sorted({max(1, round(share * side)) for share in shares})
    return FittedPreset(tuple(dilations), 10, anchor)
