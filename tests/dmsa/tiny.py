"""Small models for tests."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

from dmsa.config import ModelConfig
from dmsa.models.encoder import Encoder


def tiny_vit(**options) -> VisionTransformer:
    """A ViT of width 48, 3 blocks and 3 heads whose attention is not uniform, for 48 px images at patch size 8."""
    torch.manual_seed(0)
    arguments = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    vit = VisionTransformer(**{**arguments, "dynamic_img_size": True, **options})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


def tiny_encoder(**options) -> Encoder:
    return Encoder(tiny_vit(**options))


def tiny_config(**options) -> ModelConfig:
    return ModelConfig(**{"decoder_layers": 1, "decoder_heads": 3, **options})
