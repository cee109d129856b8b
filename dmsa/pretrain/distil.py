"""Distillation of any network of timm into a vision transformer, on any folder of unlabelled images.

The student's patch tokens learn the network's features at their place, its class token the pooled feature of the crop:
for people with a strong network (a CNN trained on their kind of images) and no vision transformer of that kind.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from dmsa.models.encoder import read_state
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.dino import find_images, load, random_crop
from dmsa.pretrain.loop import Recipe
from dmsa.pretrain.quality import normalise

SCALE = (0.2, 1.0)
"""Area of a crop, as a fraction of the image."""
STATISTICS_CROPS = 64
"""Crops from which mean and deviation of the network's features are taken."""


class StrongNetwork(nn.Module):
    """A frozen network of timm, and what is learnt from it: its last feature map and its pooled feature.

    Args:
        name: any timm network.
        weights: a local file with timm's names (`.pth`, safetensors); `None` for timm's hub.

    Raises:
        ValueError: no name, an unknown one, or weights of another network.
        FileNotFoundError: the weights are not there.
    """

    def __init__(self, name: str | None, weights: str | None) -> None:
        super().__init__()
        if name is None or not timm.is_model(name):
            raise ValueError(f"teacher={name!r}: the recipe 'distil' needs a network of timm, such as resnet50.a1_in1k")
        if weights is None:
            try:
                self.network = timm.create_model(name, pretrained=True)
            except Exception as error:  # whatever the hub's client raises, the remedy is the same
                raise FileNotFoundError(
                    f"weights of teacher={name!r} are not here: download them and give the file as `--teacher-weights` "
                    f"(timm's hub said {type(error).__name__}: {error})"
                ) from error
        else:
            if not Path(weights).is_file():
                raise FileNotFoundError(f"teacher_weights={weights!r} does not exist")
            self.network = timm.create_model(name, pretrained=False)
            try:
                self.network.load_state_dict(read_state(Path(weights)))
            except RuntimeError as error:
                raise ValueError(f"teacher_weights={weights!r} are not those of {name}: {error}") from error
        described = resolve_model_data_config(self.network)
        self.size: int = min(described["input_size"][1:])
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(described["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(described["std"]).view(3, 1, 1))

    def train(self, mode: bool = True) -> StrongNetwork:
        """Stay in eval mode: nothing of it is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images in [0, 1], ``[B, 3, S, S]``: feature map ``[B, C, h, w]`` and pooled feature ``[B, P]``."""
        features = self.network.forward_features((images - self.mean) / self.std)
        pooled = self.network.forward_head(features, pre_logits=True)
        if features.ndim == 3:  # tokens of a transformer
            features = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            side = round(features.shape[1] ** 0.5)
            features = features.unflatten(1, (side, side))
        if features.shape[1] != self.network.num_features:  # channels last
            features = features.permute(0, 3, 1, 2)
        return features, pooled


class Standardised(nn.Module):
    """Features minus their mean, by their deviation, channel by channel: raw ones have a large mean in common.

    Args:
        samples: ``[N, C]``.
    """

    def __init__(self, samples: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", samples.mean(0))
        self.register_buffer("std", samples.std(0).clamp(min=1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """``[..., C]`` → ``[..., C]``."""
        return (features - self.mean) / self.std


def build(config: PretrainConfig, vit: nn.Module) -> Recipe:
    """Modules, loss and after-step hook of the recipe, for `dmsa.pretrain.loop.run`.

    The loss is one minus the cosine of the standardised features and what a linear layer reads from the student's
    tokens, averaged over the patches, plus the same of the pooled feature and the class token.

    Raises:
        FileNotFoundError: No images, or no weights of the network.
        ValueError: No network, or weights of another one.
    """
    files = find_images(config.images, "distil")
    teacher = StrongNetwork(config.teacher, config.teacher_weights)
    side = max(config.size, teacher.size)
    grid = config.size // vit.patch_embed.patch_size[0]

    def crops(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(files), (count,), generator=generator).tolist()
        return torch.stack([random_crop(load(files[i], 2 * side), side, SCALE, generator) for i in chosen])

    def shrunk(images: Tensor, size: int) -> Tensor:
        return images if size == side else F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    def wanted(images: Tensor) -> tuple[Tensor, Tensor]:
        features, pooled = teacher(shrunk(images, teacher.size))
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
            "patch_scale": Standardised(patches.flatten(0, 1)),
            "class_scale": Standardised(pooled),
        }
    )

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        images = crops(config.batch, generator)
        patches, pooled = wanted(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            tokens = vit.forward_features(normalise(shrunk(images, config.size)))
        read = modules["patch_head"](tokens[:, vit.num_prefix_tokens :].float())
        of_patches = F.cosine_similarity(read, modules["patch_scale"](patches), dim=-1).mean()
        of_class = F.cosine_similarity(
            modules["class_head"](tokens[:, 0].float()), modules["class_scale"](pooled), dim=-1
        ).mean()
        return {"loss": 2 - of_patches - of_class, "patch_cosine": of_patches, "class_cosine": of_class}

    return modules, loss_of_step, lambda step: None
