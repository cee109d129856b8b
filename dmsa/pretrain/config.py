"""The options of a pretraining run, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PretrainConfig:
    """Make a backbone for people without DINO weights."""

    recipe: Literal["formula", "dino", "distil", "hybrid"] = "formula"
    """Procedural categories with free labels; or, on a folder of unlabelled images, self-distillation, the distillation
    of a network that is there already, or a class token on top of a CNN that is."""
    out: str = "runs/pretrain"
    """Run folder: checkpoint, metrics, encoder.safetensors, report.json. The same command again resumes."""
    encoder: str = "shapes_vit_tiny"
    """Any timm ViT by name, or `shapes_vit_tiny`; for the recipe `hybrid`, `hybrid:NAME` with any timm CNN by name."""
    start: str | None = None
    """Weights to begin with: a file such as `encoder.safetensors`, or `shipped`, the package's of `shapes_vit_tiny`;
    untrained if unset."""
    images: str | None = None
    """Folder of images, searched recursively (all recipes but `formula`)."""
    teacher: str | None = None
    """Any timm network by name (recipe `distil`)."""
    teacher_weights: str | None = None
    """Local file of its weights (recipe `hybrid`: of the CNN's); timm's hub if unset."""
    size: int = 48
    """Side of the training pictures (or of the large crops) in pixels, a multiple of the patch size."""
    steps: int = 8000
    """Optimiser steps; more may be asked for when resuming."""
    batch: int = 64
    """Pictures of this size a step; fewer larger ones, more smaller ones."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of matrices and kernels."""
    cooldown: float = 0.25
    """Share of the steps over which the rate falls to zero."""
    categories: int = 400
    """Number of procedural categories (recipe `formula`)."""
    patch_weight: float = 1.0
    """Weight of what class tokens with moved attention say (recipe `formula`); 0 trains on whole pictures alone."""
    prototypes: int = 512
    """Number of prototypes of the head (recipe `dino`)."""
    local_crops: int = 4
    """Small crops an image beside the two large ones (recipe `dino`)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of the network."""
    threads: int = 2
    """CPU threads."""
    checkpoint_minutes: float = 3.0
    """Time between checkpoints."""
    log_every: int = 50
    """Steps between log lines."""
    report_pictures: int = 120
    """Pictures of `shapes` on which the report measures the features; 0 for no report."""
    report_root: str | None = None
    """A COCO root on whose photographs the report measures the features too: 12 super-categories of things."""
    seed: int = 0
    """Seed of categories, initial weights and every step."""
    stop_after: int | None = None
    """Stop (resumably) after so many steps of this process."""
