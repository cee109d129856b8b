"""A convolutional patch embedding for timm's VisionTransformer."""

from __future__ import annotations

import math

from timm.layers import PatchEmbed
from torch import nn


class ConvStem(PatchEmbed):
    """Patch embedding of stacked stride-2 convolutions: overlapping windows, and a nonlinearity before the first block.

    A drop-in for timm's `PatchEmbed` (pass it as ``embed_layer``): only ``proj`` differs, a 7×7 convolution followed
    by 3×3 ones, each halving the map, and a 1×1 projection. The token grid is that of a plain patch embedding.
    Against a plain one it gives small vision transformers texture filters early ("Early convolutions help
    transformers see better", Xiao et al. 2021).

    Raises:
        ValueError: The patch size is not a power of two of at least 4.
    """

    def __init__(self, img_size=224, patch_size: int = 8, in_chans: int = 3, embed_dim: int = 128, **kwargs) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        stages = math.log2(patch_size)
        if stages != int(stages) or stages < 2:
            raise ValueError(f"{patch_size=}: expected a power of two of at least 4")
        widths = [max(embed_dim >> (int(stages) - i), 16) for i in range(1, int(stages))] + [embed_dim]
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            kernel = 7 if i == 0 else 3
            layers += [nn.Conv2d(in_chans, width, kernel, stride=2, padding=kernel // 2), nn.GELU()]
            in_chans = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, 1))
