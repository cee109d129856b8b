"""A vision transformer whose class token joins in the last block only."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor


class PatchBlock(Block):
    """timm's block, which the first token passes untouched and unseen unless ``reads_class``."""

    reads_class = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, 1 + N, D]`` → the same shape."""
        if self.reads_class:
            return super().forward(x, *args, **kwargs)
        return torch.cat([x[:, :1], super().forward(x[:, 1:], *args, **kwargs)], dim=1)


class LateClassViT(VisionTransformer):
    """A `VisionTransformer` whose class token meets the patches in the last block only.

    As the class-attention layers of CaiT (Touvron et al. 2021), but within the last ordinary block. Whatever the class
    token says then comes through that block's attention row, which is what the class activation map differentiates;
    where earlier blocks have told it already, the row's gradient does not name the classes.

    Args:
        **kwargs: Of timm's ``VisionTransformer``, one class token and no other prefix token.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, block_fn=PatchBlock)
        if self.num_prefix_tokens != 1:
            raise ValueError(f"{self.num_prefix_tokens=}: expected the class token alone")
        self.blocks[-1].reads_class = True
