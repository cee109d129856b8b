"""``dmsa pretrain``: make a backbone without any labelled data, by formula or by self-distillation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

VERSION = 2
"""Raised when a recipe or the shipped architecture changes, so that older checkpoints are not taken up."""


@dataclass(frozen=True)
class PretrainConfig:
    """Make a backbone for people without DINO weights."""

    recipe: Literal["formula", "dino"] = "formula"
    """Procedural categories with free labels, or self-distillation on a folder of unlabelled images."""
    out: str = "runs/pretrain"
    """Run folder: checkpoint, metrics, encoder.safetensors, report.json. The same command again resumes."""
    encoder: str = "shapes_vit_tiny"
    """Any timm ViT by name, or `shapes_vit_tiny`."""
    images: str | None = None
    """Folder of images, searched recursively (recipe `dino`)."""
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
    seed: int = 0
    """Seed of categories, initial weights and every step."""
    stop_after: int | None = None
    """Stop (resumably) after so many steps of this process."""


def build_backbone(name: str, size: int) -> nn.Module:
    """An untrained timm vision transformer without a classifier.

    Raises:
        ValueError: Not a vision transformer that timm knows, or one without a class token or with an unusual last
            block; or a size that is no multiple of its patches.
    """
    import timm

    from dmsa.models.encoder import check_architecture

    if name == "shapes_vit_tiny":
        from dmsa.weights import shapes_vit_tiny

        vit = shapes_vit_tiny()[0]
    elif timm.is_model(name) and name.startswith(("vit_", "deit", "test_vit")):
        vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, img_size=size)
    else:
        raise ValueError(f"encoder={name!r}: expected 'shapes_vit_tiny' or a vision transformer of timm (vit_*, deit*)")
    try:
        check_architecture(vit)
    except TypeError as error:
        raise ValueError(f"encoder={name!r}: {error}") from error
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):  # timm's 0.02 is made for wide networks and long trainings
            nn.init.xavier_uniform_(module.weight)
    patch = vit.patch_embed.patch_size[0]
    if size % patch:
        raise ValueError(f"{size=}: expected a multiple of the patch size of {name}, {patch}")
    return vit


def save_encoder(vit: nn.Module, path: Path) -> None:
    """Write the weights as fp16 safetensors (they load into fp32 parameters without a word)."""
    from safetensors.torch import save_file

    half = {key: value.detach().half().contiguous() for key, value in vit.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    save_file(half, partial)
    partial.replace(path)


def _formula(config: PretrainConfig, vit: nn.Module):
    from dmsa.pretrain.formula import (
        NAMES_FIRST,
        FormulaHead,
        class_tokens,
        draw_batch,
        draw_categories,
        formula_loss,
        targets,
    )
    from dmsa.pretrain.quality import normalise

    categories = draw_categories(config.categories, config.seed)
    head = FormulaHead(vit.embed_dim, categories.operator)
    patch = vit.patch_embed.patch_size[0]
    # Several sizes keep attention and positions usable on grids that the training size does not have.
    sizes = [max(patch, round(config.size * share / patch) * patch) for share in (2 / 3, 1, 1, 1, 4 / 3, 2)]

    def loss_of_step(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        batch = max(1, config.batch * config.size**2 // size**2)  # the same number of pixels in every step
        images, owner = draw_batch(categories, batch, size, generator)
        names_only = step < NAMES_FIRST * config.steps
        shift = None if names_only else torch.rand(batch, (size // patch) ** 2, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            token, moved, attention = class_tokens(vit, normalise(images), shift)
        wanted = targets(owner, patch, config.categories)
        return formula_loss(head, token.float(), moved.float(), attention, wanted, shift, config.patch_weight)

    return nn.ModuleDict({"vit": vit, "head": head}), loss_of_step, lambda step: None


def pretrain(config: PretrainConfig) -> dict[str, object]:
    """Train, write ``encoder.safetensors`` and measure it.

    Returns:
        The report: settings, steps done, quality before and after (`dmsa.pretrain.quality.Quality`).

    Raises:
        ValueError: Settings that do not fit together, or a checkpoint of other settings.
        FileNotFoundError: Recipe ``dino`` without a folder of images.
    """
    from dmsa.pretrain.loop import run
    from dmsa.pretrain.quality import measure

    for name in ("steps", "batch", "size", "threads", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: expected at least 1")
    if not 0 <= config.patch_weight < float("inf"):
        raise ValueError(f"patch_weight={config.patch_weight}: expected a number of at least 0")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vit = build_backbone(config.encoder, config.size)
    if config.recipe == "formula":
        modules, loss_of_step, after_step = _formula(config, vit)
    else:
        from dmsa.pretrain.dino import build

        modules, loss_of_step, after_step = build(config, vit)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    free = {"out", "steps", "cooldown", "threads", "checkpoint_minutes", "log_every", "report_pictures", "stop_after"}
    settings = {"version": VERSION, **{key: value for key, value in asdict(config).items() if key not in free}}
    report: dict[str, object] = {"settings": asdict(config)}
    if config.report_pictures:
        report["untrained"] = measure(vit, pictures=config.report_pictures).table()
        print(f"untrained {report['untrained']}", flush=True)
    figures: dict[str, float] = {}
    modules.train()
    for figures in run(
        modules,
        loss_of_step,
        after_step,
        out=out,
        steps=config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        cooldown=config.cooldown,
        seed=config.seed,
        settings=settings,
        checkpoint_minutes=config.checkpoint_minutes,
        log_every=config.log_every,
        stop_after=config.stop_after,
    ):
        print(" ".join(f"{name} {value:g}" for name, value in figures.items()), flush=True)
    save_encoder(vit, out / "encoder.safetensors")
    report["last"] = figures
    if config.report_pictures:
        report["trained"] = measure(vit, pictures=config.report_pictures).table()
        print(f"trained   {report['trained']}", flush=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
