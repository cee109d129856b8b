"""Settings of the refinement that were fitted on photographs, for masks that are averages over cells."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from dmsa_kernels.refine.certainty import CertaintyAnchor
from dmsa_kernels.refine.spec import LCM, AffinitySpec

SMALLEST, LARGEST = 4, 64
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Dilations as shares of a cell's side: within the cell, where its share of a class is to be put in its place."""
BLOB_STRIDE = 24
"""From this stride on masks are taken to be activation maps of a CNN, whose blobs are wider than a cell."""
BLOB_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


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


def fitted_preset(stride: float) -> FittedPreset:
    """Return the settings for cells of ``stride`` pixels: dilations in proportion to the cell.

    Fitted on half of the photographs of `benchmarks/quality`, checked on the other half; docs/refine.md says what was
    searched.

    Raises:
        ValueError: ``stride`` is not a number from 4 to 64 pixels.
    """
    if isinstance(stride, bool) or not isinstance(stride, numbers.Real) or not SMALLEST <= stride <= LARGEST:
        raise ValueError(f"{stride=} must be a number from 4 to 64 pixels; there is no fitted preset for others")
    shares = BLOB_SHARES if stride >= BLOB_STRIDE else SHARES
    dilations = sorted({max(1, round(share * float(stride))) for share in shares})
    return FittedPreset(tuple(dilations), 10, CertaintyAnchor(share=0.6, power=2))
