"""Drop-in modules: the names, positional order, attributes and state-dict keys of the public code they replace.

What can be set or called there works here, or raises with what to do instead; nothing is ignored without a word.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmsa_kernels.compat import is_compiling
from dmsa_kernels.refine import spec as presets
from dmsa_kernels.refine.checks import check_dilations, check_options
from dmsa_kernels.refine.fitted import fitted_preset, refine_twice
from dmsa_kernels.refine.functional import refine
from dmsa_kernels.refine.reference import neighbour
from dmsa_kernels.refine.spec import NEIGHBOUR_OFFSETS, AffinitySpec, offsets, resolve_spec

if TYPE_CHECKING:
    # a share, a map, or a function of masks and valid_classes that gives one
    Anchor = float | Tensor | Callable[[Tensor, Tensor | None], Tensor]


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


def _broadcast(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """One image for a batch of masks, or the reverse, as the replaced code's arithmetic does it."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (image, masks)):
        return image, masks  # refine says what is wrong
    images, stacks = image.shape[0], masks.shape[0]
    if images == 1 and stacks != 1:
        image = image.expand(stacks, -1, -1, -1)
    elif stacks == 1 and images != 1:
        masks = masks.expand(images, -1, -1, -1)
    return image, masks


def _overrides(module: nn.Module, own: Callable[..., Any]) -> bool:
    """Whether a method of this file is overridden in a subclass, or replaced on its class or on the instance."""
    replaced = getattr(type(module), own.__name__) is not own
    return replaced or (not is_compiling() and own.__name__ in vars(module))


@functools.lru_cache(maxsize=64)
def _with_constants(spec: AffinitySpec, alpha: float, eps: float, position_weight: float) -> AffinitySpec:
    """Return ``spec`` with other constants; kept, because every call of a module asks for it."""
    return dataclasses.replace(spec, alpha=alpha, eps=eps, position_weight=position_weight)


class _Kernel(nn.Module):
    """Has a buffer named ``kernel``: nothing computes with it, old checkpoints have it."""

    kernel: Tensor

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        name = f"{prefix}kernel"
        given = state_dict.get(name)
        if isinstance(given, Tensor) and not torch.equal(given.to(self.kernel), self.kernel):
            errors.append(f"{name} holds other filters than the shifts to the eight neighbours, the only ones here")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class _Refinement(nn.Module):
    """Dilations, iterations and the options of :func:`refine`, shared by the drop-ins.

    Options:
        spec: other constants than the module's own, a preset's name or an :class:`AffinitySpec`.
        resize: ``"masks"``, ``"image"`` or ``"none"``; see :func:`dmsa_kernels.refine`.
        stride: pixels of the cells that the masks are averages over; see :func:`dmsa_kernels.refine`.
        anchor: share of the first masks that every iteration keeps, in [0, 1), or a function of the masks and
            ``valid_classes`` that gives it.
        precision: ``"exact"`` or ``"fast"``.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``.

    All of them are attributes that may be set at any time. Masks of 16 bits give a float32 result, as they do in the
    code that is replaced, so that no label comes from rounded scores.
    """

    def __init__(
        self,
        dilations: Sequence[int],
        num_iter: int,
        *,
        spec: AffinitySpec | str,
        resize: str = "masks",
        stride: float | Sequence[float] | None = None,
        anchor: Anchor = 0.0,
        precision: str = "exact",
        backend: str = "auto",
    ):
        super().__init__()
        checked, *_ = check_options(
            dilations,
            num_iter,
            resize=resize,
            precision=precision,
            backend=backend,
            stride=stride,
            anchor=0.0 if callable(anchor) else anchor,
        )
        # a list stays the caller's, as in the code that is replaced; an iterator could be read only once
        self.dilations: Sequence[int] = dilations if isinstance(dilations, (list, tuple)) else checked
        self.num_iter = num_iter
        self.resize = resize
        self.stride = stride
        self.anchor = anchor
        self.precision = precision
        self.backend = backend
        self._spec = resolve_spec(spec)

    @property
    def spec(self) -> AffinitySpec:
        """The constants used by the next call."""
        return self._spec

    def _refine(self, image: Tensor, masks: Tensor, anchor: Anchor | None, **options: Any) -> Any:
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "ONNX has no operator for the refinement: export the network without it and refine its scores"
                " afterwards (dmsa_kernels.refine.refine exports, given a translation of your own of"
                " dmsa_kernels::local_affinity and dmsa_kernels::propagate)"
            )
        if isinstance(masks, Tensor) and masks.is_floating_point() and masks.dtype != torch.float64:
            masks = masks.float()
        anchor = self.anchor if anchor is None else anchor
        if callable(anchor):
            anchor = anchor(masks, options.get("valid_classes"))
        given = masks
        image, masks = _broadcast(image, masks)
        valid = options.get("valid_classes")
        if masks is not given and isinstance(valid, Tensor) and valid.dim() == 2 and valid.shape[0] == 1:
            options["valid_classes"] = valid.expand(masks.shape[0], -1)
        return self._compute(image, masks, anchor, **options)

    def _compute(self, image: Tensor, masks: Tensor, anchor: float | Tensor, **options: Any) -> Any:
        return refine(
            image,
            masks,
            self.dilations,
            self.num_iter,
            spec=self.spec,
            resize=self.resize,
            stride=self.stride,
            anchor=anchor,
            precision=self.precision,
            backend=self.backend,
            **options,
        )

    def extra_repr(self) -> str:
        shown = f"dilations={list(self.dilations)}, num_iter={self.num_iter}, resize={self.resize!r}"
        if self.stride is not None:
            shown += f", stride={self.stride}"
        if isinstance(self.anchor, Tensor) or callable(self.anchor) or self.anchor != 0:
            shown += f", anchor={self.anchor}"
        return shown


class _WithNeighbours(_Kernel, _Refinement):
    """What PAR and the local consistency module share: the buffer and the gathering of neighbours."""

    def __init__(self, dilations: Sequence[int], num_iter: int, **options: Any):
        super().__init__(dilations, num_iter, **options)
        self.register_buffer("kernel", _shift_kernel())

    def get_dilated_neighbors(self, x: Tensor) -> Tensor:
        """The P neighbours ``[B, C, P, H, W]`` of every pixel of x ``[B, C, H, W]``, which no refinement here needs."""
        return torch.stack([neighbour(x, dy, dx) for dy, dx in offsets(list(self.dilations))], 2)

    def _refine(self, image: Tensor, masks: Tensor, anchor: Anchor | None, **options: Any) -> Any:
        if _overrides(self, _GET_DILATED_NEIGHBORS):
            raise TypeError(
                f"{type(self).__name__} overrides get_dilated_neighbors, which the fused refinement does not call:"
                " override forward as well, or keep the pasted module for other neighbourhoods"
            )
        return super()._refine(image, masks, anchor, **options)


_GET_DILATED_NEIGHBORS = _WithNeighbours.get_dilated_neighbors


class PAR(_WithNeighbours):
    """Pixel-Adaptive Refinement, a drop-in for the ``PAR`` of AFA (rulixiang/afa ``wetr/PAR.py``).

    AFA, ToCo, DuPL, SeCo, MoRe (masks are resized to the image)::

        from wetr.PAR import PAR                     # before
        from dmsa_kernels import PAR                 # after
        par = PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])

    WeCLIP, ExCEL, CGAA (the image is resized to the masks)::

        from WeCLIP_model.PAR import PAR             # before
        from dmsa_kernels import PAR                 # after
        par = PAR(num_iter=20, dilations=[1, 2, 4, 8, 12, 24], resize="image")

    Masks of a patch network, with settings fitted for cells of that size: ``PAR.for_stride(16)``.

    Args:
        dilations: positive integers in pixels.
        num_iter: iterations.
        eps: added to the standard deviation before the factor ``w1``, > 0; 1e-8, in ClusterCAM 1e-5.
        options: ``spec``, ``resize``, ``stride``, ``anchor``, ``precision``, ``backend``; those of
            :func:`dmsa_kernels.refine`. A ``spec`` sets ``w1``, ``w2`` and ``eps``.

    Attributes:
        w1: factor on the standard deviation (0.3); a number, or a tensor of one that needs no gradient.
        w2: weight of the distance term (0.01); likewise.
        eps: see above.
        dim: dimension of the neighbours in upstream's tensors, always 2.
        pos: distances of the neighbours, ``[1, 1, P, 1, 1]``, in pixels unless set to something else.
        far: dilations and iterations of a first pass on the image at half its size, which only ``for_stride`` sets.
    """

    dim = 2
    far: tuple[Sequence[int], int] | None = None

    def __init__(self, dilations: Sequence[int], num_iter: int, *, eps: float | None = None, **options: Any):
        constants = resolve_spec(options.pop("spec", presets.PAR))
        super().__init__(dilations, num_iter, spec=constants, **options)
        self.w1: Any = constants.alpha
        self.w2: Any = constants.position_weight
        self.eps: Any = (1e-8 if constants is presets.PAR else constants.eps / constants.alpha) if eps is None else eps
        self._pos: Tensor | None = None
        _ = self.spec  # an eps out of range is told now

    @classmethod
    def for_stride(cls, stride: float | Sequence[float], **options: Any) -> PAR:
        """Return a module fitted for masks that are averages over cells of ``stride`` x ``stride`` pixels, 4 to 64.

        It refines twice: at half the image's size, with dilations up to a cell, then at full size, with short ones.
        Dilations are in proportion to the cell; the anchor follows the masks, image by image
        (:class:`dmsa_kernels.refine.certainty.CertaintyAnchor`).

        Args:
            stride: side of a cell in pixels, such as the patch size of a ViT, or a pair for rows and columns.
            options: ``precision``, ``backend``, or another ``anchor``, such as 0.1 for masks of zeros and ones.

        Raises:
            ValueError: no number or pair from 4 to 64.
        """
        preset = fitted_preset(stride)
        settings = {"spec": preset.spec, "anchor": preset.anchor, "stride": stride, **options}
        module = cls(list(preset.dilations), preset.num_iter, **settings)
        module.far = preset.far
        return module

    @property
    def spec(self) -> AffinitySpec:
        """The constants used by the next call: upstream divides by ``(sigma + eps) * w1``."""
        w1, w2, eps = (presets.number(name, getattr(self, name)) for name in ("w1", "w2", "eps"))
        if not eps > 0:
            raise ValueError(f"{eps=} must be positive: flat regions divide by it")
        return _with_constants(self._spec, w1, w1 * eps, w2)

    def get_pos(self) -> Tensor:
        """The distances of the P neighbours in pixels, ``[1, 1, P, 1, 1]``."""
        return torch.tensor([math.hypot(dy, dx) for dy, dx in offsets(list(self.dilations))]).view(1, 1, -1, 1, 1)

    @property
    def pos(self) -> Tensor:
        return self.get_pos() if self._pos is None else self._pos

    @pos.setter
    def pos(self, value: Tensor) -> None:
        self._pos = value

    def _compute(self, image: Tensor, masks: Tensor, anchor: float | Tensor, **options: Any) -> Any:
        if self.far is None:
            return super()._compute(image, masks, anchor, **options)
        if self.resize != "masks":
            raise ValueError(f"resize={self.resize!r} must be 'masks' with settings of for_stride")
        constants: dict[str, Any] = {"spec": self.spec, "precision": self.precision, "backend": self.backend}
        near = (self.dilations, self.num_iter)
        return refine_twice(image, masks, self.far, near, stride=self.stride, anchor=anchor, **constants, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.far is None else f", far={self.far}")

    def _check_pos(self) -> None:
        if self._pos is None and not _overrides(self, _GET_POS):
            return
        given, own = self.pos.detach().cpu().flatten(), _GET_POS(self).flatten()
        if given.shape != own.shape or not torch.allclose(given.to(own), own):
            raise ValueError(
                f"pos={given.tolist()} are not the distances of dilations={list(self.dilations)}, the ones built in."
                " For others add your term to local_affinity(image, dilations, spec=AffinitySpec(position_weight=0.0))"
                ".weights and call propagate(Affinity(weights, dilations), masks, num_iter)"
            )

    def forward(
        self,
        imgs: Tensor,
        masks: Tensor,
        anchor: Anchor | None = None,
        valid_classes: Tensor | None = None,
        return_labels: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine masks ``[B, C, h, w]`` along imgs ``[B, K, H, W]``; see :func:`dmsa_kernels.refine`.

        ``anchor`` is this call's instead of the module's.
        """
        self._check_pos()
        return self._refine(imgs, masks, anchor, valid_classes=valid_classes, return_labels=return_labels)


_GET_POS = PAR.get_pos


class LocalConsistencyModule(_WithNeighbours):
    """Local consistency module of Box2Mask (LiWentomng/BoxInstSeg ``levelset_loss.py``): PAR without the distance term.

    On maps of equal size, and differentiable through the masks::

        lcm = LocalConsistencyModule(num_iter=10, dilations=[2])
        loss = (lcm(imgs, pred_phis) - pred_phis).abs().sum()

    Args:
        dilations: positive integers in pixels.
        num_iter: iterations.
        options: ``spec``, ``resize`` (here ``"none"``), ``stride``, ``anchor``, ``precision``, ``backend``; those of
            :func:`dmsa_kernels.refine`. A ``spec`` sets ``alpha``.

    Attributes:
        alpha: factor on the standard deviation (0.3); a number, or a tensor of one that needs no gradient.
    """

    def __init__(self, dilations: Sequence[int], num_iter: int, **options: Any):
        constants = resolve_spec(options.pop("spec", presets.LCM))
        super().__init__(dilations, num_iter, spec=constants, **{"resize": "none", **options})
        self.alpha: Any = constants.alpha
        self._eps = 1e-8 if constants is presets.LCM else constants.eps / constants.alpha

    @property
    def spec(self) -> AffinitySpec:
        """The constants used by the next call: upstream divides by ``(sigma + 1e-8) * alpha``."""
        alpha = presets.number("alpha", self.alpha)
        return dataclasses.replace(self._spec, alpha=alpha, eps=alpha * self._eps)

    def get_kernel(self) -> Tensor:
        """The eight shifts, ``[8, 1, 3, 3]``."""
        return _shift_kernel()

    def forward(
        self,
        imgs: Tensor,
        pred_phis: Tensor,
        anchor: Anchor | None = None,
        valid_classes: Tensor | None = None,
        return_labels: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine pred_phis ``[B, C, H, W]`` along imgs ``[B, K, H, W]``; options as those of :class:`PAR`."""
        if _overrides(self, _GET_KERNEL):
            raise TypeError(f"{type(self).__name__} overrides get_kernel, which the fused refinement does not call")
        return self._refine(imgs, pred_phis, anchor, valid_classes=valid_classes, return_labels=return_labels)


_GET_KERNEL = LocalConsistencyModule.get_kernel
LCM = LocalConsistencyModule
"""The name of the preset. Box2Mask's function of the same name, the loss above, is its caller's."""


class _LocalAffinity(_Kernel):
    """A submodule of the replaced PAMR, computed without its convolution; x [B, K, H, W] -> [B, K, P, H, W]."""

    def __init__(self, dilations: Sequence[int], kernel: Tensor):
        super().__init__()
        self.register_buffer("kernel", kernel)
        self.dilations = dilations
        self.weight_check = kernel.clone()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([neighbour(x, dy, dx) for dy, dx in offsets(list(self.dilations))], 2)


class _LocalAffinityAbs(_LocalAffinity):
    """Distances to the neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - x.unsqueeze(2)).abs()


class _LocalStDev(_LocalAffinity):
    """Standard deviation [B, K, 1, H, W], the centre counted once a dilation."""

    def forward(self, x: Tensor) -> Tensor:
        centres = x.unsqueeze(2).expand(-1, -1, len(self.dilations), -1, -1)
        return torch.cat([super().forward(x), centres], 2).std(2, keepdim=True)


class _Unstated(int):
    """A default that a caller did not write down."""


_ITERATIONS, _DILATIONS = _Unstated(1), (_Unstated(1),)


class PAMR(_Refinement):
    """Pixel-Adaptive Mask Refinement, a drop-in for the ``PAMR`` of 1-stage-wseg (``models/mods/pamr.py``).

    1-stage-wseg, TCL, SCLIP, NACLIP, Talk2DINO::

        from pamr import PAMR                        # before
        from dmsa_kernels import PAMR                # after
        pamr = PAMR(num_iter=10, dilations=[8, 16]).to(device)
        masks = pamr(image, logits)

    Copies of it have other defaults (10 iterations and dilations up to 24 in WILSON and sdov), so a default that is
    taken is told by a warning: write both arguments down.

    Args:
        num_iter: iterations; 1, as in 1-stage-wseg.
        dilations: positive integers in pixels; [1], as in 1-stage-wseg.
        options: ``spec``, ``resize``, ``stride``, ``anchor``, ``precision``, ``backend``; those of
            :func:`dmsa_kernels.refine`.

    Attributes:
        aff_x, aff_m, aff_std: absolute differences, copies and standard deviation of the neighbourhood as modules with
            ``dilations`` and ``weight_check``; the refinement takes their dilations and computes without them.
    """

    def __init__(self, num_iter: int = _ITERATIONS, dilations: Sequence[int] = _DILATIONS, **options: Any):
        unstated = [f"num_iter={num_iter}"] if num_iter is _ITERATIONS else []
        unstated += [f"dilations={list(map(int, dilations))}"] if dilations is _DILATIONS else []
        if unstated:
            warnings.warn(
                f"PAMR() takes {' and '.join(unstated)}, the defaults of 1-stage-wseg; copies of the class have others"
                " (WILSON, sdov: num_iter=10, dilations=[1, 2, 4, 8, 12, 24]). Write down what yours has",
                stacklevel=2,
            )
        # a list stays the caller's, as in the base class, and the three share it
        shared = [1] if dilations is _DILATIONS else dilations
        shared = shared if isinstance(shared, (list, tuple)) else check_dilations(shared)
        super().__init__(shared, 1 if num_iter is _ITERATIONS else num_iter, **{"spec": presets.PAMR, **options})
        self.aff_x = _LocalAffinityAbs(shared, _shift_kernel(centre=1.0, neighbour=-1.0))
        self.aff_m = _LocalAffinity(shared, _shift_kernel())
        self.aff_std = _LocalStDev(shared, _shift_kernel(keep_centre_tap=True))

    @property
    def dilations(self) -> Sequence[int]:
        """Those of ``aff_x``, ``aff_m`` and ``aff_std``, where upstream keeps them; setting them sets all three."""
        x, m, std = (list(module.dilations) for module in (self.aff_x, self.aff_m, self.aff_std))
        if not x == m == std:
            raise ValueError(f"aff_x.dilations={x}, aff_m.dilations={m} and aff_std.dilations={std} must be the same")
        return self.aff_x.dilations

    @dilations.setter
    def dilations(self, value: Sequence[int]) -> None:
        for module in self.children():
            module.dilations = value  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        anchor: Anchor | None = None,
        valid_classes: Tensor | None = None,
        return_labels: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Refine mask ``[B, C, h, w]`` along the image x ``[B, K, H, W]``; options as those of :class:`PAR`."""
        for name, own in (("aff_x", _LocalAffinityAbs), ("aff_m", _LocalAffinity), ("aff_std", _LocalStDev)):
            module = getattr(self, name)
            if type(module) is not own or (not is_compiling() and "forward" in vars(module)):
                raise TypeError(
                    f"{name} was replaced, but the fused refinement does not call it: override forward as well"
                )
        return self._refine(x, mask, anchor, valid_classes=valid_classes, return_labels=return_labels)
