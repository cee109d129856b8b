"""DepthwiseASPP: an atrous spatial pyramid of depthwise branches and one pointwise projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmsa_kernels.aspp.functional import (
    KERNEL_SIZES,
    check_dilations,
    fused_dwconv_project,
    list_of_dilations,
    multi_dilation_dwconv,
)
from dmsa_kernels.aspp.launch import fused_projection_is_faster
from dmsa_kernels.backend import BACKENDS

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "sync_batch": nn.SyncBatchNorm,
    "group": lambda channels: nn.GroupNorm(1, channels),
}
PROJECTIONS = ("auto", "fused", "unfused")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class DepthwiseASPP(nn.Module):
    """Depthwise branches at several dilations, concatenated, then pointwise projection, norm and activation.

    ``y = activation(norm(projection([branch_1(x), ..., branch_R(x), mean(x)])))`` where branch r is a k x k depthwise
    convolution at ``dilations[r]`` and the image mean is there with ``image_pooling=True``. The parameters do not
    depend on the dilations, so that :meth:`forward` may take another set at every call (DMSA, arXiv 2303.00199,
    section 3.1 and Table 1, changes them every epoch). With ``pointwise_first=True`` the first branch is the pyramid's
    1 x 1: one factor a channel, whose dilation is inert, as in the four-rate pyramid 1, 6, 12, 18 of DeepLab.

    Args:
        channels: channels C of the input.
        out_channels: channels of the output.
        dilations: the branches' default dilations, in pixels, at least 1; their number R is fixed by it.
        kernel_size: 3, 5 or 7.
        pointwise_first: make branch 1 a 1 x 1 depthwise one (``scale`` ``[C]``) and leave R - 1 k x k branches.
        image_pooling: append the mean of the map over its pixels to what is projected.
        bias: give the depthwise branches a bias; the projection has one where ``norm`` is ``None``.
        norm: ``"batch"``, ``"sync_batch"``, ``"group"`` (one group), a factory ``channels -> nn.Module``, or ``None``.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, a factory ``() -> nn.Module``, or ``None``.

    Other Parameters:
        projection: ``"unfused"`` writes the branches and projects them; ``"fused"`` projects them where they are
            computed and computes them again in the backward pass (:func:`fused_dwconv_project`): less memory, the same
            parameters, and an image mean that is projected once an image; ``"auto"`` is the one that was measured
            faster, see :func:`dmsa_kernels.aspp.launch.fused_projection_is_faster`.
        backend: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``, as in :func:`multi_dilation_dwconv`.

    Shape:
        ``[B, channels, H, W]``, any strides, to ``[B, out_channels, H, W]``.

    Attributes:
        weight: ``[R, C, k, k]`` (``[R - 1, C, k, k]`` behind a pointwise first branch).
        scale: ``[C]`` of a pointwise first branch, or ``None``.
        bias: ``[R, C]``, or ``None``.
        projection: ``nn.Conv2d`` over ``R * C`` channels (``(R + 1) * C`` with image pooling), branch after branch.

    Raises:
        TypeError: ``dilations`` is not a sequence of integers.
        ValueError: another argument is out of its range; the message names it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        dilations: Sequence[int],
        kernel_size: int = 3,
        *,
        pointwise_first: bool = False,
        image_pooling: bool = False,
        bias: bool = False,
        norm: str | Callable[[int], nn.Module] | None = "batch",
        activation: str | Callable[[], nn.Module] | None = "relu",
        projection: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name}={value}, expected at least 1")
        if kernel_size not in KERNEL_SIZES:
            raise ValueError(f"{kernel_size=} is not one of {KERNEL_SIZES}")
        dilations = list_of_dilations(dilations)
        if len(dilations) < 1 + pointwise_first:
            raise ValueError(f"{dilations=}, expected at least {1 + pointwise_first} with {pointwise_first=}")
        check_dilations(dilations, len(dilations))
        if projection not in PROJECTIONS:
            raise ValueError(f"{projection=} is not one of {', '.join(PROJECTIONS)}")
        if backend not in BACKENDS:
            raise ValueError(f"{backend=} is not one of {', '.join(BACKENDS)}")
        self.channels, self.out_channels, self.kernel_size = channels, out_channels, kernel_size
        self.dilations = tuple(dilations)
        self.pointwise_first, self.image_pooling, self.backend = pointwise_first, image_pooling, backend
        self.fused = projection == "fused" or (projection == "auto" and fused_projection_is_faster())
        branches = len(dilations)
        self.weight = nn.Parameter(torch.empty(branches - pointwise_first, channels, kernel_size, kernel_size))
        self.scale = nn.Parameter(torch.empty(channels)) if pointwise_first else None
        self.bias = nn.Parameter(torch.empty(branches, channels)) if bias else None
        self.projection = nn.Conv2d((branches + image_pooling) * channels, out_channels, 1, bias=norm is None)
        self.norm = _make(norm, NORMS, "norm", out_channels)
        self.activation = _make(activation, ACTIVATIONS, "activation")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as PyTorch initialises the same convolutions: uniform within one over the root of the fan-in."""
        bound = 1 / self.kernel_size
        nn.init.uniform_(self.weight, -bound, bound)
        if self.scale is not None:
            nn.init.uniform_(self.scale, -1, 1)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.projection.reset_parameters()

    def forward(self, x: Tensor, dilations: Sequence[int] | None = None) -> Tensor:
        """Return ``[B, out_channels, H, W]`` for ``x`` ``[B, channels, H, W]``.

        Args:
            x: the map, any strides; a view of tokens ``[B, H * W, C]`` is not copied.
            dilations: R dilations for this call, instead of those the module was made with.

        Raises:
            TypeError: ``dilations`` is not a sequence of integers, or the dtype of ``x`` is not the parameters'.
            ValueError: the number of dilations is not the module's, one is below 1, or ``x`` is not
                ``[B, channels, H, W]``.
        """
        dilations = list_of_dilations(self.dilations if dilations is None else dilations)
        check_dilations(dilations, len(self.dilations))
        weight, dilations = self._filters(x, dilations)
        y = self._fused(x, weight, dilations) if self.fused else self._unfused(x, weight, dilations)
        return self.activation(self.norm(y))

    def _filters(self, x: Tensor, dilations: list[int]) -> tuple[Tensor, list[int]]:
        """Return the filters ``[R, C, k, k]`` of all branches and their dilations."""
        if self.scale is None:
            return self.weight, dilations
        # A filter with only its centre set, so far dilated that every other tap is outside the map and is skipped: the
        # 1 x 1 branch rides along in the same pass over x.
        half = self.kernel_size // 2
        centre = F.pad(self.scale[:, None, None], (half, half, half, half))  # [C, k, k]
        return torch.cat([centre[None], self.weight]), [max(x.shape[2:], default=1), *dilations[1:]]

    def _unfused(self, x: Tensor, weight: Tensor, dilations: list[int]) -> Tensor:
        """Return the projection ``[B, out_channels, H, W]`` of the branches, written side by side."""
        y = multi_dilation_dwconv(x, weight, dilations, self.bias, "concat", backend=self.backend)
        if self.image_pooling:
            y = torch.cat([y, x.mean((2, 3), keepdim=True).to(y.dtype).expand(-1, -1, *x.shape[2:])], 1)
        return self.projection(y)

    def _fused(self, x: Tensor, weight: Tensor, dilations: list[int]) -> Tensor:
        """Return the same; the projected mean is one vector an image."""
        projection = self.projection.weight[:, :, 0, 0]  # [out_channels, (R + image_pooling) * C]
        offset = self.projection.bias
        if self.image_pooling:
            width = weight.shape[0] * self.channels
            offset = F.linear(x.mean((2, 3)), projection[:, width:], offset)  # [B, out_channels]
            projection = projection[:, :width]
        elif offset is not None:
            offset = offset.expand(x.shape[0], -1)
        return fused_dwconv_project(x, weight, projection, dilations, self.bias, offset, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.out_channels}, dilations={self.dilations}, kernel_size={self.kernel_size}, "
            f"pointwise_first={self.pointwise_first}, image_pooling={self.image_pooling}, bias={self.bias is not None}"
        )


def _make(choice, known, name, *args) -> nn.Module:
    """Build what ``choice`` names in ``known``, or calls, with ``args``; ``None`` is the identity."""
    if choice is None:
        return nn.Identity()
    if isinstance(choice, str):
        if choice not in known:
            raise ValueError(f"{name}={choice!r} is not one of {', '.join(known)}, a factory or None")
        choice = known[choice]
    return choice(*args)
