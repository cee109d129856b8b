"""The refinements that are compared: photograph and cells in, scores of the photograph's size out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels import PAMR, PAR

PUBLIC = [1, 2, 4, 8, 12, 24]
Method = Callable[[Tensor, Tensor, float], Tensor]
"""`(image [1, 3, H, W] 0..255, cells [1, C, h, w], stride) -> scores [1, C, H, W]`"""


def aligned(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """Cells enlarged to their place, bilinear: what a refinement must beat."""
    return PAR([1], 0, stride=stride)(image[:, :1], masks)


def corners_aligned(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """Enlarged with `align_corners=True`, as public code does before a refinement."""
    return F.interpolate(masks, image.shape[2:], mode="bilinear", align_corners=True)


def par_half(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """PAR 1-24 at half the photograph's resolution, as AFA runs it."""
    half = F.interpolate(image, [n // 2 for n in image.shape[2:]], mode="bilinear", align_corners=False)
    refined = PAR(PUBLIC, 10)(half, masks)
    return F.interpolate(refined, image.shape[2:], mode="bilinear", align_corners=False)


def fitted(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """The preset of the stride."""
    return PAR.for_stride(stride)(image, masks)


def dense_crf(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """Dense CRF of `pydensecrf2` with the parameters of most public code: 10 iterations, 3/3 and 80/13/10."""
    import pydensecrf.densecrf as crf
    from pydensecrf.utils import unary_from_softmax

    scores = aligned(image, masks, stride)[0].clamp_min(1e-5)
    scores = (scores / scores.sum(0)).numpy()
    classes, height, width = scores.shape
    field = crf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(scores)))
    photo = np.ascontiguousarray(image[0].permute(1, 2, 0).byte().numpy())
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=80, srgb=13, rgbim=photo, compat=10)
    return torch.from_numpy(np.array(field.inference(10)).reshape(1, classes, height, width))


def guided_filter(image: Tensor, masks: Tensor, stride: float) -> Tensor:
    """Guided filter of OpenCV: radius one cell, eps 1e-3 of the squared range."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    photo = np.ascontiguousarray(image[0].permute(1, 2, 0).byte().numpy())
    planes = aligned(image, masks, stride)[0].numpy()
    made = cv2.ximgproc.createGuidedFilter(photo, int(stride), 1e-3 * 255**2)
    return torch.from_numpy(np.stack([made.filter(np.ascontiguousarray(plane)) for plane in planes])).unsqueeze(0)


@dataclass(frozen=True)
class Named:
    """A method, its name in the tables, and the package it needs besides ours."""

    name: str
    run: Method
    package: str | None = None
    module: str | None = None

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        try:
            return self.module is not None and not importlib.import_module(self.module)
        except ImportError:
            return True


def _drop_in(module: torch.nn.Module) -> Method:
    return lambda image, masks, stride: module(image, masks)


def _in_place(dilations: list[int], anchor: float = 0.0) -> Method:
    return lambda image, masks, stride: PAR(dilations, 10, stride=stride, anchor=anchor)(image, masks)


METHODS = (
    Named("aligned cells", aligned),
    Named("corners aligned", corners_aligned),
    Named("PAR 1-24, as public code runs it", _drop_in(PAR(PUBLIC, 10))),
    Named("PAR 1-24 at half resolution (AFA)", par_half),
    Named("PAMR 8, 16", _drop_in(PAMR(10, [8, 16]))),
    Named("PAR 1-24, cells in place", _in_place(PUBLIC)),
    Named("PAR 1-8, cells in place", _in_place([1, 2, 4, 8])),
    Named("PAR 1-8, anchor 0.2", _in_place([1, 2, 4, 8], anchor=0.2)),
    Named("PAR.for_stride", fitted),
    Named("dense CRF", dense_crf, "pydensecrf2", "pydensecrf"),
    Named("guided filter", guided_filter, "opencv-contrib-python-headless", "cv2.ximgproc"),
)
