"""A convolutional patch embedding for timm's VisionTransformer, which starts from oriented energies."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

ORIENTATIONS = 8
PERIODS = (4.0, 6.5, 10.0)
"""Periods of the Gabor filters that the first layer starts from, in pixels."""
KERNEL = 9


def gabor_filters() -> Tensor:
    """Unit-norm Gabor filters without mean, on luminance: ``[2 · PERIODS · ORIENTATIONS, 3, KERNEL, KERNEL]``."""
    axis = torch.arange(KERNEL, dtype=torch.float32) - KERNEL // 2
    envelope = torch.exp(-(axis[None] ** 2 + axis[:, None] ** 2) / (2 * (KERNEL / 4) ** 2))
    filters = []
    for phase in (0, math.pi / 2):
        for period in PERIODS:
            for step in range(ORIENTATIONS):
                angle = math.pi * step / ORIENTATIONS
                along = axis[None] * math.cos(angle) + axis[:, None] * math.sin(angle)
                wave = torch.cos(2 * math.pi * along / period + phase) * envelope
                wave = wave - wave.mean()
                filters.append(wave / wave.norm())
    return torch.stack(filters)[:, None] * torch.tensor([0.3, 0.6, 0.2]).view(3, 1, 1)


class OrientedStem(nn.Module):
    """Magnitudes of learnt filters (Gabor ones at first), contrast-normalised, then stride-2 convolutions.

    The magnitude makes the first layer blind to which of two colours is the lighter one, the layer norm blind to
    their contrast: what is left is texture.

    Args:
        patch_size: Total stride, a power of two of at least 4.
        dim: Width of a token.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        filters = gabor_filters()
        self.filters = nn.Conv2d(3, len(filters), KERNEL, stride=2, padding=KERNEL // 2)
        self.norm = nn.LayerNorm(len(filters))
        widths = [len(filters)] + [3 * dim // 4] * (patch_size.bit_length() - 3) + [dim]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.project = nn.Conv2d(dim, dim, 1)
        with torch.no_grad():
            self.filters.weight.copy_(filters)
        nn.init.zeros_(cast(Tensor, self.filters.bias))
        for conv in [*self.convs, self.project]:  # keeps the variance through the stack; torch's default loses it
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W]`` → ``[B, dim, H / patch_size, W / patch_size]``."""
        x = self.filters(x).abs()
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.project(x)


class ConvStem(PatchEmbed):
    """A drop-in for timm's `PatchEmbed` (pass it as ``embed_layer``): same token grid, `OrientedStem` as projection.

    Convolutional stems help small vision transformers ("Early convolutions help transformers see better", Xiao et al.
    2021); starting from Gabor filters saves a small training the time that it needs to find them.

    Raises:
        ValueError: The patch size is not a power of two of at least 4, or the images have not three channels.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 8, in_chans: int = 3, embed_dim: int = 128, **kwargs: Any
    ) -> None:
        if patch_size < 4 or patch_size & (patch_size - 1):
            raise ValueError(f"{patch_size=}: expected a power of two of at least 4")
        if in_chans != 3:
            raise ValueError(f"{in_chans=}: expected 3 channels")
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        self.proj = OrientedStem(patch_size, embed_dim)
