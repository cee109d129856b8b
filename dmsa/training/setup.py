"""What a run needs before its first step, apart from data: numerics, sizes that fit, the optimiser."""

from __future__ import annotations

import os

import torch
from torch import nn

from dmsa.config import Config
from dmsa.models.encoder import Encoder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up_torch(config: Config) -> None:
    """Let torch choose deterministic algorithms if the run asks for them."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def check_sizes(config: Config, encoder: Encoder) -> None:
    """Check what depends on the encoder before hours go into the feature bank.

    Raises:
        ValueError: an image side that the patch size does not divide, or a width that the heads do not.
    """
    patch, width = encoder.patch_size, encoder.embed_dim
    for name in ("size", "crop"):
        side = getattr(config.data, name)
        if side % patch:
            raise ValueError(
                f"data.{name}={side} is not a multiple of the patch size {patch} of {config.model.encoder}; "
                f"the nearest are {side // patch * patch} and {(side // patch + 1) * patch}"
            )
    heads = config.model.decoder_heads
    if width % heads:
        fitting = [number for number in range(1, 17) if width % number == 0]
        raise ValueError(
            f"model.decoder_heads={heads} does not divide the width {width} of {config.model.encoder}; "
            f"choose one of {', '.join(map(str, fitting))}"
        )


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return Adam over the trained parameters, with weight decay on all but biases, norms and gains."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.Adam(groups, lr=config.train.lr, fused=trained[0].device.type == "cuda")
