"""Two transformer blocks on the feature maps of a frozen CNN: a backbone where a strong CNN is all there is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from torch import Tensor, nn

from dmsa.models.late_class import LateClassViT
from dmsa.models.network import FrozenNetwork, Standardised

HYBRID = "hybrid:"
"""What the names of these backbones begin with; the rest is timm's name of the CNN."""
PATCH, DIM, DEPTH, HEADS = 16, 256, 2, 4


class NetworkStem(nn.Module):
    """The CNN's maps of strides 16 and 32, standardised, through one linear layer.

    Args:
        name: a timm CNN of total stride 32.
        dim: width of a token.

    Raises:
        ValueError: timm does not know the network, or it has no maps of these strides.
    """

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.network = FrozenNetwork(name)
        try:
            maps, top = self.network.maps(torch.zeros(1, 3, 64, 64))
        except (AttributeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"network {name!r}: expected a CNN whose intermediate maps timm gives out") from error
        if maps.shape[-1] != 64 // PATCH or top.shape[-1] != 2:
            raise ValueError(f"network {name!r} has no maps of the strides 16 and 32")
        self.scale = Standardised(maps.shape[1])
        self.project = nn.Linear(maps.shape[1], dim)
        self.mean: Tensor
        self.std: Tensor
        # encoders are given ImageNet-normalised images, the network wants them in [0, 1]
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def embed(self, maps: Tensor) -> Tensor:
        """Turn the network's maps ``[B, C, h, w]`` into tokens ``[B, h, w, dim]``."""
        return self.project(self.scale(maps.permute(0, 2, 3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Turn normalised images ``[B, 3, H, W]`` into ``[B, dim, H / 16, W / 16]``."""
        return self.embed(self.network.maps(x * self.std + self.mean)[0]).permute(0, 3, 1, 2)


class NetworkEmbed(PatchEmbed):
    """A drop-in for timm's `PatchEmbed`: same token grid, `NetworkStem` as projection."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = PATCH,
        in_chans: int = 3,
        embed_dim: int = DIM,
        *,
        network: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        self.proj = NetworkStem(network, embed_dim)


def hybrid_vit(name: str, size: int = 224) -> LateClassViT:
    """Return the untrained backbone `hybrid:NETWORK`.

    Args:
        name: with the prefix `HYBRID`.
        size: side of the images that the position embeddings are made for.

    Raises:
        ValueError: timm does not know the network, or it has no maps of strides 16 and 32.
    """
    return LateClassViT(
        img_size=size,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        embed_layer=functools.partial(NetworkEmbed, network=name.removeprefix(HYBRID)),
        dynamic_img_size=True,
    )
