"""A class token on top of a frozen CNN, from unlabelled images: it learns to say what the CNN sees where it looks.

The second stage of the recipe `formula`, with the CNN's pooled feature in the place of names: the class token tells the
CNN's feature of whatever it attends to, in the proportion of its attention, with any share of the attention moved to
one patch. Where to look is not taught by labels either: the attention learns where the CNN's own classifier finds most,
and what differs from the border of the crop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmsa import distributed
from dmsa.models.hybrid import NetworkStem
from dmsa.models.network import Standardised, load_network
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.dino import Pictures, find_images, random_crop
from dmsa.pretrain.formula import class_tokens
from dmsa.pretrain.loop import Recipe

SCALE = (0.2, 1.0)
"""Area of a crop, as a fraction of the image."""
STATISTICS_CROPS = 64
"""Crops from which mean and deviation of the features are taken."""
ATTENTION_WEIGHT = 0.5


def evidence(pooled: Tensor, logits: Tensor) -> Tensor:
    """Return how much there is to see at every place, ``[B, N]``, each of its two parts standardised by image.

    The log-sum-exp of the classifier's logits, and the distance (one minus the mean cosine) from the border.

    Args:
        pooled: standardised features of every place, ``[B, h, w, P]``.
        logits: the classifier's, ``[B, h, w, classes]``.
    """
    unit = F.normalize(pooled, dim=-1)
    border = torch.zeros(unit.shape[1:3], dtype=torch.bool, device=unit.device)
    border[0] = border[-1] = border[:, 0] = border[:, -1] = True
    away = -torch.einsum("bhwp,bp->bhw", unit, unit[:, border].mean(1))
    parts = [part.flatten(1) for part in (logits.logsumexp(-1), away)]
    first, second = ((part - part.mean(1, keepdim=True)) / part.std(1, keepdim=True).clamp(min=1e-6) for part in parts)
    return first + second


def build(config: PretrainConfig, vit: VisionTransformer) -> Recipe:
    """Modules, loss and after-step hook of the recipe, for `dmsa.pretrain.loop.run`; loads the CNN into `vit`.

    Raises:
        FileNotFoundError: No images, or no weights of the CNN.
        ValueError: Another encoder than `hybrid:NETWORK`, or weights of another network.
    """
    stem = vit.patch_embed.proj
    if not isinstance(stem, NetworkStem):
        raise ValueError(f"encoder={config.encoder!r}: the recipe 'hybrid' needs hybrid:NETWORK, a CNN of timm")
    pictures = Pictures(find_images(config.images, "hybrid"), 2 * config.size)
    name = config.encoder.partition(":")[2]
    stem.network.load_state_dict(load_network(name, config.teacher_weights).state_dict())

    def crops(count: int, generator: torch.Generator) -> Tensor:
        drawn = pictures.draw(count, generator)
        return torch.stack([random_crop(image, config.size, SCALE, generator) for image in drawn])

    def read(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps for the tokens, and pooled features and logits of every token's place."""
        maps, top = stem.network.maps(images)
        enlarged = F.interpolate(top, maps.shape[-2:], mode="bilinear", align_corners=False)
        return maps, *stem.network.pool(enlarged)

    maps, pooled, _ = read(crops(STATISTICS_CROPS, torch.Generator().manual_seed(config.seed)))
    stem.scale.fit(maps.permute(0, 2, 3, 1).flatten(0, 2))
    wanted = Standardised(pooled.shape[-1]).fit(pooled.flatten(0, 2))
    modules = nn.ModuleDict({"vit": vit, "head": nn.Linear(vit.embed_dim, pooled.shape[-1]), "wanted": wanted})

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = crops(config.batch, generator)
        maps, pooled, logits = distributed.by_parts(lambda own: read(images[own]), config.batch)
        places = wanted(pooled)
        aim = evidence(places, logits).softmax(-1)
        places = places.flatten(1, 2)  # [B, N, P]
        shift = torch.rand(places.shape[:2], generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            token, moved, attention = distributed.by_parts(
                lambda own: class_tokens(vit, stem.embed(maps[own]), shift[own]), config.batch
            )
        share = attention / attention.sum(-1, keepdim=True)
        seen = torch.einsum("bn,bnp->bp", share.detach(), places)
        of_whole = F.cosine_similarity(modules["head"](token.float()), seen, dim=-1).mean()
        named = torch.lerp(seen[:, None], places, shift[..., None])
        of_moved = F.cosine_similarity(modules["head"](moved.float()), named, dim=-1).mean()
        loss_attention = -(aim * (share + 1e-6).log()).sum(-1).mean()
        return {
            "loss": 2 - of_whole - of_moved + ATTENTION_WEIGHT * loss_attention,
            "whole_cosine": of_whole,
            "moved_cosine": of_moved,
            "loss_attention": loss_attention,
        }

    return modules, loss_of_step, lambda step: None
