"""Drop-in modules: the names, positional order, attributes and state-dict keys of the public code they replace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmsa_kernels.refine import spec as presets
from dmsa_kernels.refine.functional import check_options, refine
from dmsa_kernels.refine.spec import NEIGHBOUR_OFFSETS, AffinitySpec


def _shift_kernel(*, centre: float = 0.0, neighbour: float = 1.0, keep_centre_tap: bool = False) -> Tensor:
    """One 3x3 filter a neighbour, [8 or 9, 1, 3, 3]: ``neighbour`` at its place, ``centre`` added in the middle."""
    taps = list(NEIGHBOUR_OFFSETS)
    if keep_centre_tap:
        taps.insert(4, (0, 0))
    kernel = torch.zeros(len(taps), 1, 3, 3)
    for i, (dy, dx) in enumerate(taps):
        kernel[i, 0, 1, 1] = centre
        kernel[i, 0, 1 + dy, 1 + dx] = neighbour
    return kernel


class _Kernel(nn.Module):
    """Holds a buffer named ``kernel``; nothing computes with it, old checkpoints have it."""

    def __init__(self, kernel: Tensor):
        super().__init__()
        self.register_buffer("kernel", kernel)


class _Refinement(nn.Module):
    """Dilations, iterations and the options of :func:`refine`, shared by the drop-ins."""

    def __init__(
        self, dilations: Sequence[int], num_iter: int, *, spec: AffinitySpec, resize: str, precision: str, backend: str
    ):
        super().__init__()
        checked, _ = check_options(dilations, num_iter, resize=resize, precision=precision, backend=backend)
        # a list stays the caller's, as in the code that is replaced; an iterator could be read only once
        self.dilations = dilations if isinstance(dilations, (list, tuple)) else checked
        self.num_iter = num_iter
        self.resize = resize
        self.precision = precision
        self.backend = backend
        self._spec = spec

    @property
    def spec(self) -> AffinitySpec:
        """The constants used by the next call."""
        return self._spec

    def forward(
        self, imgs: Tensor, masks: Tensor, *, valid_classes: Tensor | None = None, return_labels: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine masks ``[B, C, h, w]`` along imgs ``[B, K, H, W]``; see :func:`dmsa_kernels.refine`."""
        return refine(
            imgs,
            masks,
            self.dilations,
            self.num_iter,
            spec=self.spec,
            resize=self.resize,
            valid_classes=valid_classes,
            return_labels=return_labels,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"dilations={list(self.dilations)}, num_iter={self.num_iter}, resize={self.resize!r}"


class PAR(_Refinement):
    """Pixel-Adaptive Refinement, a drop-in for the ``PAR`` of AFA (rulixiang/afa ``wetr/PAR.py``).

    AFA, ToCo, DuPL, SeCo, MoRe (masks are resized to the image)::

        from wetr.PAR import PAR                     # before
        from dmsa_kernels import PAR                 # after
        par = PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])

    WeCLIP, ExCEL, CGAA (the image is resized to the masks)::

        from WeCLIP_model.PAR import PAR             # before
        from dmsa_kernels import PAR                 # after
        par = PAR(num_iter=20, dilations=[1, 2, 4, 8, 12, 24], resize="image")

    Args:
        dilations: positive integers in pixels.
        num_iter: iterations.
        resize: ``"masks"``, ``"image"`` or ``"none"``; see :func:`dmsa_kernels.refine`.
        precision: ``"exact"`` or ``"fast"``.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    Attributes:
        w1: factor on the standard deviation (0.3); setting it takes effect.
        w2: weight of the distance term (0.01); setting it takes effect.
        dim: dimension of the neighbours in upstream's tensors, always 2.
        pos: distances of the neighbours in pixels, ``[1, 1, P, 1, 1]``.
    """

    dim = 2

    def __init__(
        self,
        dilations: Sequence[int],
        num_iter: int,
        *,
        resize: str = "masks",
        precision: str = "exact",
        backend: str = "auto",
    ):
        super().__init__(dilations, num_iter, spec=presets.PAR, resize=resize, precision=precision, backend=backend)
        self.register_buffer("kernel", _shift_kernel())
        self.w1 = presets.PAR.alpha
        self.w2 = presets.PAR.position_weight

    @property
    def pos(self) -> Tensor:
        distances = [math.hypot(dy, dx) for dy, dx in presets.offsets(list(self.dilations))]
        return torch.tensor(distances).view(1, 1, -1, 1, 1)

    @property
    def spec(self) -> AffinitySpec:
        """The constants used by the next call: upstream divides by ``(sigma + 1e-8) * w1``."""
        return dataclasses.replace(self._spec, alpha=self.w1, eps=self.w1 * 1e-8, position_weight=self.w2)


class PAMR(_Refinement):
    """Pixel-Adaptive Mask Refinement, a drop-in for the ``PAMR`` of 1-stage-wseg (``models/mods/pamr.py``).

    1-stage-wseg, TCL, SCLIP, NACLIP, Talk2DINO::

        from pamr import PAMR                        # before
        from dmsa_kernels import PAMR                # after
        pamr = PAMR(num_iter=10, dilations=[8, 16]).to(device)
        masks = pamr(image, logits)

    Args:
        num_iter: iterations.
        dilations: positive integers in pixels.
        resize: ``"masks"``, ``"image"`` or ``"none"``; see :func:`dmsa_kernels.refine`.
        precision: ``"exact"`` or ``"fast"``.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.
    """

    def __init__(
        self,
        num_iter: int = 1,
        dilations: Sequence[int] = (1,),
        *,
        resize: str = "masks",
        precision: str = "exact",
        backend: str = "auto",
    ):
        super().__init__(dilations, num_iter, spec=presets.PAMR, resize=resize, precision=precision, backend=backend)
        self.aff_x = _Kernel(_shift_kernel(centre=1.0, neighbour=-1.0))
        self.aff_m = _Kernel(_shift_kernel())
        self.aff_std = _Kernel(_shift_kernel(keep_centre_tap=True))

    def forward(  # type: ignore[override]  # the replaced module's names of the two arguments
        self, x: Tensor, mask: Tensor, *, valid_classes: Tensor | None = None, return_labels: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine mask ``[B, C, h, w]`` along the image x ``[B, K, H, W]``; see :func:`dmsa_kernels.refine`."""
        return super().forward(x, mask, valid_classes=valid_classes, return_labels=return_labels)


class LCM(_Refinement):
    """Local consistency module of Box2Mask: PAR without the distance term, on maps of equal size.

    Differentiable through the masks: ``loss = (masks - lcm(image, masks)).abs().sum()``.

    Args:
        dilations: positive integers in pixels.
        num_iter: iterations.
        resize: ``"none"``, ``"masks"`` or ``"image"``; see :func:`dmsa_kernels.refine`.
        precision: ``"exact"`` or ``"fast"``.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.
    """

    def __init__(
        self,
        dilations: Sequence[int],
        num_iter: int,
        *,
        resize: str = "none",
        precision: str = "exact",
        backend: str = "auto",
    ):
        super().__init__(dilations, num_iter, spec=presets.LCM, resize=resize, precision=precision, backend=backend)
        self.register_buffer("kernel", _shift_kernel())
