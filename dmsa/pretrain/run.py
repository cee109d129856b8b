"""A pretraining run: the backbone before, the recipe's steps, the backbone after, measured."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dmsa import distributed
from dmsa.files import claim_outputs, write_atomically
from dmsa.models.encoder import Encoder, check_architecture, load_weights
from dmsa.models.hybrid import HYBRID, hybrid_vit
from dmsa.models.shapes_vit import WEIGHTS, shapes_vit_tiny
from dmsa.pretrain import dino, distil, formula, hybrid
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.loop import run
from dmsa.pretrain.quality import measure, measure_photos

VERSION = 2
"""Raised when a recipe or the shipped architecture changes, so that older checkpoints are not taken up."""


def build_backbone(name: str, size: int) -> VisionTransformer:
    """An untrained timm vision transformer without a classifier.

    Raises:
        ValueError: Not a vision transformer that timm knows, or one without a class token or with an unusual last
            block; or a size that is no multiple of its patches.
    """
    vit: VisionTransformer
    if name == "shapes_vit_tiny":
        vit = shapes_vit_tiny()
    elif name.startswith(HYBRID):
        vit = hybrid_vit(name, size)
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


def begin_with(vit: VisionTransformer, start: str, name: str) -> None:
    """Fill `vit` from a file, or from the one in the package if `start` is "shipped".

    Raises:
        FileNotFoundError: No such file.
        ValueError: Weights of another network.
    """
    filled = Encoder(copy.deepcopy(vit))  # which freezes what it holds
    load_weights(filled, WEIGHTS if start == "shipped" else start, name)
    vit.load_state_dict(filled.vit.state_dict())


def save_encoder(vit: nn.Module, path: Path) -> None:
    """Write the weights as fp16 safetensors (they load into fp32 parameters without a word)."""
    state = {key: value.detach().contiguous() for key, value in vit.state_dict().items()}
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    write_atomically(path, lambda stream: stream.write(save(half)))


def pretrain(config: PretrainConfig) -> dict[str, object]:
    """Train, write ``encoder.safetensors`` and measure it; processes that torchrun started share the batches.

    Returns:
        The report: settings, steps done, quality before and after (`dmsa.pretrain.quality.Quality`).

    Raises:
        ValueError: Settings that do not fit together, or a checkpoint of other settings.
        FileNotFoundError: A recipe other than ``formula`` without a folder of images, or no weights of the network.
    """
    for name in ("steps", "batch", "size", "threads", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: expected at least 1")
    if not 0 <= config.patch_weight < float("inf"):
        raise ValueError(f"patch_weight={config.patch_weight}: expected a number of at least 0")
    # The recipe `formula` draws pictures of up to twice the size, and a quarter as many.
    smallest = max(1, config.batch // 4) if config.recipe == "formula" else config.batch
    _, processes = distributed.launched()
    if processes > smallest:
        raise ValueError(
            f"{processes} processes cannot share batches of {smallest} images (batch={config.batch}, recipe "
            f"{config.recipe!r}); start at most {smallest}, or choose a larger batch"
        )
    with distributed.process_group():
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> dict[str, object]:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    vit = build_backbone(config.encoder, config.size)
    if config.start is not None:
        begin_with(vit, config.start, config.encoder)
    recipes = {"formula": formula.build, "dino": dino.build, "distil": distil.build, "hybrid": hybrid.build}
    build = recipes[config.recipe]
    modules, loss_of_step, after_step = build(config, vit)
    out = Path(config.out)
    files = ("encoder.safetensors", "report.json")
    distributed.on_main(
        lambda: claim_outputs(
            out, files, force=(out / "last.pt").exists(), remedy="no run made them, choose another --out"
        )
    )
    free = {"out", "steps", "cooldown", "threads", "checkpoint_minutes", "log_every", "stop_after"}
    free |= {"report_pictures", "report_root", *(() if config.start else ("start",))}
    settings = {"version": VERSION, **{key: value for key, value in asdict(config).items() if key not in free}}
    report: dict[str, object] = {"settings": asdict(config)}
    distributed.on_main(lambda: _measure(config, vit, "start" if config.start else "untrained", report))
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
        if distributed.is_main():
            print(" ".join(f"{name} {value:g}" for name, value in figures.items()), flush=True)
    report["last"] = figures

    def finish() -> dict[str, object]:
        save_encoder(vit, out / "encoder.safetensors")
        _measure(config, vit, "trained", report)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    return distributed.on_main(finish)


def _measure(config: PretrainConfig, vit: nn.Module, when: str, report: dict[str, object]) -> None:
    """Measure the features as the options ask for; print the figures and note them in the report."""
    if config.report_pictures:
        report[when] = measure(vit, pictures=config.report_pictures).table()
        print(f"{when:<9} {report[when]}", flush=True)
    if config.report_root:
        report[f"{when}_photos"] = measure_photos(vit, config.report_root, seed=config.seed).table()
        print(f"{when:<9} photographs {report[f'{when}_photos']}", flush=True)
