"""Self-distillation on any folder of unlabelled images: a student learns what a slow teacher says of another crop.

As in DINO (Caron et al. 2021), with the teacher's assignment made by Sinkhorn and Knopp's algorithm (SwAV, Caron et
al. 2020; DINOv2) instead of centring, which collapses on small data: every prototype gets the same share of a batch.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmsa import distributed
from dmsa.data.images import as_rgb, open_image
from dmsa.data.listing import IMAGE_SUFFIXES, list_files
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.loop import Recipe
from dmsa.pretrain.quality import normalise

STUDENT_TEMPERATURE = 0.1
SINKHORN_TEMPERATURE = 0.05
TEACHER_MOMENTUM = 0.99
LOCAL_SCALE, GLOBAL_SCALE = (0.1, 0.4), (0.4, 1.0)
"""Areas of small and large crops, as fractions of the image."""
MIN_IMAGES = 2
CACHE_BYTES = 512 << 20
"""Memory for decoded pictures."""


def sinkhorn(scores: Tensor, temperature: float = SINKHORN_TEMPERATURE, iterations: int = 3) -> Tensor:
    """Soft assignment of samples to prototypes, with equal use of the prototypes.

    Args:
        scores: Cosines of ``N`` samples with ``K`` prototypes, ``[N, K]``.
        temperature: Divides the scores; the smaller, the harder the assignment.
        iterations: Alternations between equal columns and equal rows.

    Returns:
        ``[N, K]``: rows sum to 1, columns to about ``N / K``.
    """
    assignment = (scores.double() - scores.max()).div(temperature).exp()
    for _ in range(iterations):
        assignment = assignment / assignment.sum(0, keepdim=True).clamp(min=1e-300)
        assignment = assignment / assignment.sum(1, keepdim=True).clamp(min=1e-300)
    return assignment.to(scores.dtype)


class ProjectionHead(nn.Module):
    """Class token → cosine with each prototype: a two-layer perceptron, then normalised prototypes.

    Args:
        dim: Width of the class token.
        prototypes: Number of prototypes.
    """

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, dim]`` → ``[N, prototypes]`` in [-1, 1]."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


def find_images(folder: str | None, recipe: str = "dino") -> list[Path]:
    """All image files below ``folder``, sorted; `recipe` is who asks, for the message.

    Raises:
        FileNotFoundError: No folder given, it is not there, or it holds fewer than two images.
    """
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(
            f"images={folder!r}: the recipe {recipe!r} needs a folder of images (jpg, png, tif, ...)"
        )
    listing = list_files(folder, IMAGE_SUFFIXES)
    if len(listing.files) < MIN_IMAGES:
        found = "; ".join([f"images={folder!r} holds {len(listing.files)} images", *listing.notes()])
        raise FileNotFoundError(
            f"{found}; expected at least {MIN_IMAGES} files with one of the endings {IMAGE_SUFFIXES}"
        )
    for note in listing.notes():
        print(note, file=sys.stderr)
    return [Path(folder) / name for name in listing.files]


def load(path: Path, longest: int) -> Tensor:
    """The image as uint8 ``[3, H, W]``, shrunk so that its shorter side is at most ``longest``."""
    with open_image(path) as opened:
        opened.draft("RGB", (longest, longest))
        image = as_rgb(opened)
    share = longest / min(image.size)
    if share < 1:
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Pictures:
    """Decoded pictures of a folder by number, the latest ones kept in memory.

    Args:
        files: from `find_images`.
        longest: of the shorter side, see `load`.
    """

    def __init__(self, files: list[Path], longest: int) -> None:
        self.files, self.longest = files, longest
        self._cache: dict[int, Tensor] = {}
        self._bytes = 0

    def __getitem__(self, index: int) -> Tensor:
        """uint8 ``[3, H, W]``."""
        if index not in self._cache:
            image = load(self.files[index], self.longest)
            self._bytes += image.numel()
            while self._cache and self._bytes > CACHE_BYTES:
                self._bytes -= self._cache.pop(next(iter(self._cache))).numel()
            self._cache[index] = image
        return self._cache[index]

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Return `count` pictures drawn with replacement."""
        return [self[i] for i in torch.randint(len(self.files), (count,), generator=generator).tolist()]


def random_crop(image: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """One augmented crop of ``image`` (uint8 ``[3, H, W]``): float ``[3, size, size]`` in [0, 1].

    Area, aspect, place, flips, brightness, contrast, channel mixture (a stand-in for saturation and hue), grey, blur.
    """
    r = torch.rand(12, generator=generator).tolist()
    _, height, width = image.shape
    area = height * width * (scale[0] + (scale[1] - scale[0]) * r[0])
    aspect = math.exp((r[1] - 0.5) * 2 * math.log(4 / 3))
    h = int(min(max(round(math.sqrt(area / aspect)), 2), height))
    w = int(min(max(round(math.sqrt(area * aspect)), 2), width))
    top, left = int(r[2] * (height - h + 1)), int(r[3] * (width - w + 1))
    crop = image[None, :, top : top + h, left : left + w].float() / 255
    crop = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
    if r[4] < 0.5:
        crop = crop.flip(-1)
    if r[5] < 0.8:
        mix = torch.eye(3) + 0.25 * torch.randn(3, 3, generator=generator)
        crop = torch.einsum("ij,jhw->ihw", mix / mix.sum(1, keepdim=True).clamp(min=0.4), crop)
        crop = (crop - crop.mean()) * (0.6 + 0.8 * r[6]) + crop.mean() * (0.6 + 0.8 * r[7])
    if r[8] < 0.2:
        crop = crop.mean(0, keepdim=True).expand(3, -1, -1)
    if r[9] < 0.3:
        crop = F.avg_pool2d(crop[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return crop.clamp(0, 1)


def build(config: PretrainConfig, vit: VisionTransformer) -> Recipe:
    """Modules, loss and after-step hook of the recipe, for `dmsa.pretrain.loop.run`.

    Raises:
        FileNotFoundError: No images.
        ValueError: Fewer than two images a batch, or fewer than two prototypes.
    """
    if config.batch < 2 or config.prototypes < 2:
        raise ValueError(f"{config.batch=}, {config.prototypes=}: self-distillation needs at least 2 of each")
    pictures = Pictures(find_images(config.images), 2 * config.size)
    patch = vit.patch_embed.patch_size[0]
    small = max(patch, config.size * 5 // 8 // patch * patch)
    head = ProjectionHead(vit.embed_dim, config.prototypes)
    teacher = nn.ModuleDict({"vit": copy.deepcopy(vit), "head": copy.deepcopy(head)}).requires_grad_(False)
    student = nn.ModuleDict({"vit": vit, "head": head})

    def project(network: nn.ModuleDict, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            vit = cast(VisionTransformer, network["vit"])
            (tokens,) = distributed.by_parts(
                lambda own: (vit.forward_features(normalise(images[own]))[:, 0],), len(images)
            )
        return network["head"](tokens.float())

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = pictures.draw(config.batch, generator)
        large = torch.stack([random_crop(p, config.size, GLOBAL_SCALE, generator) for _ in range(2) for p in batch])
        teacher.eval()
        with torch.no_grad():
            aim = [sinkhorn(scores) for scores in project(teacher, large).chunk(2)]
        views = list(project(student, large).chunk(2))
        if config.local_crops:
            crops = [random_crop(p, small, LOCAL_SCALE, generator) for _ in range(config.local_crops) for p in batch]
            views += list(project(student, torch.stack(crops)).chunk(config.local_crops))
        terms = [
            -(target * (view / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()
            for i, target in enumerate(aim)
            for j, view in enumerate(views)
            if i != j
        ]
        used = torch.cat(aim).mean(0)
        # Perplexity of the mean assignment over the number of prototypes: 1 is even use, near 0 is a collapse.
        even = torch.exp(-(used * used.clamp(min=1e-12).log()).sum()) / len(used)
        same = (aim[0].argmax(-1) == aim[1].argmax(-1)).float().mean()
        return {"loss": torch.stack(terms).mean(), "prototype_use": even, "agreement": same}

    @torch.no_grad()
    def after_step(step: int) -> None:
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - TEACHER_MOMENTUM)

    return nn.ModuleDict({"vit": vit, "head": head, "teacher": teacher}), loss_of_step, after_step
