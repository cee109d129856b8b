"""The tiny backbone of the embedded data set, whose weights ship with the package (`dmsa/weights`)."""

from __future__ import annotations

from pathlib import Path

from dmsa.models.conv_stem import ConvStem
from dmsa.models.late_class import LateClassViT

WEIGHTS = Path(__file__).parents[1] / "weights" / "shapes_vit_tiny.safetensors"


def shapes_vit_tiny() -> LateClassViT:
    """Return the untrained network; `README.md` beside `WEIGHTS` holds their command, seed and measured quality."""
    return LateClassViT(
        img_size=48,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        num_classes=0,
        embed_layer=ConvStem,
        dynamic_img_size=True,
    )
