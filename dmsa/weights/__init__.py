"""Weights that ship with the package, and how to build the network that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

FOLDER = Path(__file__).parent


def shapes_vit_tiny() -> tuple[VisionTransformer, Path]:
    """The tiny backbone of the embedded data set.

    Returns:
        The untrained network, and the path of its weights (safetensors). ``README.md`` beside them holds the command,
        the seed and the measured quality.
    """
    from dmsa.models.conv_stem import ConvStem
    from dmsa.models.late_class import LateClassViT

    vit = LateClassViT(
        img_size=48,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        num_classes=0,
        embed_layer=ConvStem,
        dynamic_img_size=True,
    )
    return vit, FOLDER / "shapes_vit_tiny.safetensors"
