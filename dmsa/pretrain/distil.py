"""Distillation of any network of timm into a vision transformer, on any folder of unlabelled images.

The student's patch tokens learn the network's features at their place, its class token the pooled feature of the crop:
for people with a strong network (a CNN trained on their kind of images) and no vision transformer of that kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmsa import distributed
from dmsa.models.network import Standardised, load_network
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.dino import Pictures, find_images, random_crop
from dmsa.pretrain.loop import Recipe
from dmsa.pretrain.quality import normalise

SCALE = (0.2, 1.0)
"""Area of a crop, as a fraction of the image."""
STATISTICS_CROPS = 64
"""Crops from which mean and deviation of the network's features are taken."""


def build(config: PretrainConfig, vit: VisionTransformer) -> Recipe:
    """Modules, loss and after-step hook of the recipe, for `dmsa.pretrain.loop.run`.

    The loss is one minus the cosine of the standardised features and what a linear layer reads from the student's
    tokens, averaged over the patches, plus the same of the pooled feature and the class token.

    Raises:
        FileNotFoundError: No images, or no weights of the network.
        ValueError: No network, or weights of another one.
    """
    files = find_images(config.images, "distil")
    if config.teacher is None:
        raise ValueError("teacher=None: the recipe 'distil' needs a network of timm, such as resnet50.a1_in1k")
    teacher = load_network(config.teacher, config.teacher_weights)
    side = max(config.size, teacher.size)
    pictures = Pictures(files, 2 * side)
    grid = config.size // vit.patch_embed.patch_size[0]

    def crops(count: int, generator: torch.Generator) -> Tensor:
        drawn = pictures.draw(count, generator)
        return torch.stack([random_crop(image, side, SCALE, generator) for image in drawn])

    def shrunk(images: Tensor, size: int) -> Tensor:
        return images if size == side else F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    def wanted(images: Tensor) -> tuple[Tensor, Tensor]:
        features, pooled = teacher.read(shrunk(images, teacher.size))
        features = F.interpolate(features, (grid, grid), mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2), pooled

    generator = torch.Generator().manual_seed(config.seed)
    seen = [
        wanted(crops(min(config.batch, STATISTICS_CROPS), generator))
        for _ in range(-(-STATISTICS_CROPS // config.batch))
    ]
    patches, pooled = (torch.cat(parts) for parts in zip(*seen, strict=True))
    modules = nn.ModuleDict(
        {
            "vit": vit,
            "patch_head": nn.Linear(vit.embed_dim, patches.shape[-1]),
            "class_head": nn.Linear(vit.embed_dim, pooled.shape[-1]),
            "patch_scale": Standardised(patches.shape[-1]).fit(patches.flatten(0, 1)),
            "class_scale": Standardised(pooled.shape[-1]).fit(pooled),
        }
    )

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = crops(config.batch, generator)
        patches, pooled = distributed.by_parts(lambda own: wanted(images[own]), config.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            (tokens,) = distributed.by_parts(
                lambda own: (vit.forward_features(normalise(shrunk(images[own], config.size))),), config.batch
            )
        read = modules["patch_head"](tokens[:, vit.num_prefix_tokens :].float())
        of_patches = F.cosine_similarity(read, modules["patch_scale"](patches), dim=-1).mean()
        of_class = F.cosine_similarity(
            modules["class_head"](tokens[:, 0].float()), modules["class_scale"](pooled), dim=-1
        ).mean()
        return {"loss": 2 - of_patches - of_class, "patch_cosine": of_patches, "class_cosine": of_class}

    return modules, loss_of_step, lambda step: None
