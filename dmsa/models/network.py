"""A frozen network of timm, of any kind, as a source of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from dmsa.models.state import read_state


class FrozenNetwork(nn.Module):
    """A timm network that is never trained, untrained as built; `load_network` gives it its weights.

    Args:
        name: any timm network.

    Raises:
        ValueError: timm does not know it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f"network {name!r}: timm {timm.__version__} knows no such model")
        self.network: Any = timm.create_model(name, pretrained=False).requires_grad_(False).eval()
        self.mean: Tensor
        self.std: Tensor
        described = resolve_model_data_config(self.network)
        self.size: int = min(described["input_size"][1:])
        self.register_buffer("mean", torch.tensor(described["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(described["std"]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in eval mode: nothing of it is trained."""
        return super().train(False)

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images in [0, 1], ``[B, 3, S, S]``: last feature map ``[B, C, h, w]``, pooled feature ``[B, P]``."""
        features = self.network.forward_features((images - self.mean) / self.std)
        pooled = self.network.forward_head(features, pre_logits=True)
        if features.ndim == 3:  # tokens of a transformer
            features = features[:, getattr(self.network, "num_prefix_tokens", 0) :]
            side = round(features.shape[1] ** 0.5)
            features = features.unflatten(1, (side, side))
        if features.shape[1] != self.network.num_features:  # channels last
            features = features.permute(0, 3, 1, 2)
        return features, pooled

    @torch.no_grad()
    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images in [0, 1], ``[B, 3, H, W]``, with a CNN of stride 32.

        Returns:
            the last maps of strides 16 and 32, the latter enlarged, joined: ``[B, C, H/16, W/16]``; and the map that
            the network pools, ``[B, P, H/32, W/32]``.
        """
        top, (fine, coarse) = self.network.forward_intermediates((images - self.mean) / self.std, indices=[-2, -1])
        coarse = nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1), top

    @torch.no_grad()
    def pool(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Read every place of the pooled map as if it were a whole image.

        Args:
            top: ``[B, C, h, w]`` from `maps`.

        Returns:
            pooled features ``[B, h, w, P]`` and the classifier's logits ``[B, h, w, classes]``.
        """
        places = top.permute(0, 2, 3, 1)
        single = places.flatten(0, 2)[..., None, None]  # [B h w, C, 1, 1]
        read = (self.network.forward_head(single, pre_logits=True), self.network.forward_head(single))
        pooled, logits = (part.unflatten(0, places.shape[:3]) for part in read)
        return pooled, logits


class Standardised(nn.Module):
    """Features minus their mean, by their deviation, channel by channel: raw ones have a large mean in common.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, samples: Tensor) -> Standardised:
        """Take mean and deviation of `samples` ``[N, C]``; return itself."""
        self.mean.copy_(samples.mean(0))
        self.std.copy_(samples.std(0).clamp(min=1e-3))
        return self

    def forward(self, features: Tensor) -> Tensor:
        """``[..., C]`` → ``[..., C]``."""
        return (features - self.mean) / self.std


def load_network(name: str, weights: str | Path | None) -> FrozenNetwork:
    """Build a network with its weights.

    Args:
        name: any timm network.
        weights: a local file with timm's names (`.pth`, safetensors); `None` for timm's hub.

    Raises:
        ValueError: an unknown network, or weights of another one.
        FileNotFoundError: the weights are not there.
    """
    built = FrozenNetwork(name)
    if weights is None:
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # whatever the hub's client raises, the remedy is the same
            raise FileNotFoundError(
                f"weights of {name!r} are not here: download them and give the file as `--teacher-weights` "
                f"(timm's hub said {type(error).__name__}: {error})"
            ) from error
    elif not Path(weights).is_file():
        raise FileNotFoundError(f"weights {str(weights)!r} of {name!r} do not exist")
    else:
        state = read_state(Path(weights))
    try:
        built.network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} holds other weights than those of {name}: {error}") from error
    return built
