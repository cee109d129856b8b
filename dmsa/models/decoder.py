"""The mask transformer: class tokens and patch tokens attend to each other, their cosines are the masks (Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskTransformer(nn.Module):
    """Decode patch tokens into one score map per class.

    The class tokens are appended to the patch tokens and pass through transformer blocks with them; then
    `logits = LayerNorm_K( normalised patches . normalised class tokens )`.
    Source: Segmenter (arXiv 2105.05633), as TransFGU uses it (`models/mask_transformer/decoder.py`).

    Args:
        num_classes: K, at least 1.
        dim: width D of the incoming tokens and of the decoder, a multiple of `heads`.
        layers: transformer blocks.
        heads: attention heads.
        dropout: of attention and MLP, in training. With any, a step's losses depend on how the batch is split.
    """

    def __init__(self, num_classes: int, dim: int, layers: int = 2, heads: int = 6, dropout: float = 0.0) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        if num_classes < 1:
            raise ValueError(f"{num_classes=} must be at least 1")
        if heads < 1 or dim % heads:
            raise ValueError(
                f"{heads=} does not divide the encoder's width {dim}; choose another `--model.decoder-heads`"
            )
        self.num_classes = num_classes
        self.proj_in = nn.Linear(dim, dim)
        self.class_tokens = nn.Parameter(torch.empty(num_classes, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, proj_drop=dropout, attn_drop=dropout, norm_layer=nn.LayerNorm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.proj_patches = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.mask_norm = nn.LayerNorm(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.orthogonal_(self.class_tokens)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Decode `patches` [B, N, D].

        Returns:
            logits [B, N, K] and decoded class tokens [B, K, D] of unit length.
        """
        classes = self.class_tokens.expand(len(patches), -1, -1)
        x = torch.cat([self.proj_in(patches), classes], dim=1)  # [B, N + K, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches, classes = x[:, : -self.num_classes], x[:, -self.num_classes :]
        patches = nn.functional.normalize(patches @ self.proj_patches, dim=-1)
        classes = nn.functional.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2)), classes
