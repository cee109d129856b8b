"""Settings of the refinement that were fitted on photographs, for masks that are averages over cells."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmsa_kernels.refine.certainty import CertaintyAnchor
from dmsa_kernels.refine.checks import anchor_map, check_cells, check_image, check_masks, check_stride
from dmsa_kernels.refine.functional import refine
from dmsa_kernels.refine.resize import halved, resize
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


def refine_twice(
    image: Tensor,
    masks: Tensor,
    far: tuple[Sequence[int], int],
    near: tuple[Sequence[int], int],
    *,
    stride: float | Sequence[float] | None,
    anchor: float | Tensor,
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
    **options: Any,
) -> Any:
    """Refine at half the image's size, then at full size.

    Args:
        image: guide, ``[B, K, H, W]``.
        masks: ``[B, C, h, w]``.
        far: dilations, in pixels of the halved image, and iterations of the first pass.
        near: those of the second pass, at full size.
        stride, anchor, valid_classes, return_labels: as in :func:`dmsa_kernels.refine`.
        **options: ``spec``, ``precision`` and ``backend`` of both passes.

    Returns:
        What :func:`dmsa_kernels.refine` returns, at the image's size.
    """
    check_image(image)
    check_masks(masks, "image", image.shape[0], image.device)
    given, size, cell = masks.shape[2:], image.shape[2:], check_stride(stride, "masks")
    if cell is not None:
        check_cells(masks, cell, size)
    hold = anchor_map(anchor, masks, size, given)
    if hold is not None and hold.shape[2:] != size:
        hold = resize(hold, size, cell)
    half = halved(image, given, cell)
    if cell is None:
        masks = halved(resize(masks, size, None), size, None)
    else:
        masks = resize(masks, half.shape[2:], [side / 2 for side in cell])
    options["valid_classes"] = valid_classes
    first = 0.0 if hold is None else halved(hold, given, cell)
    coarse: Any = refine(half, masks, *far, resize="none", anchor=first, **options)
    second = 0.0 if hold is None else hold
    return refine(image, coarse, *near, stride=2, anchor=second, return_labels=return_labels, **options)
