"""What the on-line class activation maps cost, against one plain forward pass and against one backward pass per class;
and what batching the crops of the feature bank brings, against one image after the other.

    python -m benchmarks.measuring.bench_cam                  # prints the ratios
    pytest benchmarks/measuring/bench_cam.py --benchmark-only

Random weights: speed does not depend on them. The plain forward pass is timm's own, unfrozen blocks or not, without
gradients. The loop over classes is what TransFGU does (`models/segmenter/segmenter_thingstuff.py`): one backward pass
through the whole network for each class; a kinder variant stops at the attention of the last block.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.gate import relative_error
from benchmarks.measuring.harness import percentile
from benchmarks.measuring.machines import pick_device
from benchmarks.measuring.rows import Candidate, Row
from dmsa.config import Config, DataConfig, LabelConfig
from dmsa.labels.cam import KEPT_MASS, attention_gradient_cam, carries_mass
from dmsa.labels.feature_bank import SquashedImages, build_feature_bank, cut, window_shares, windows
from dmsa.models.encoder import Encoder, build_encoder

BACKBONE = "vit_small_patch8_224.dino"
SIZE = 160


@functools.cache
def encoder(name: str, device: torch.device) -> Encoder:
    """The frozen backbone, untrained."""
    torch.manual_seed(0)
    return build_encoder(name, "random").to(device)


@functools.cache
def trainable_vit(name: str, device: torch.device) -> torch.nn.Module:
    """The same network with gradients in its parameters, as TransFGU holds it."""
    return copy.deepcopy(encoder(name, device).vit).requires_grad_(True)


def plain_forward(images: Tensor, centroids: Tensor) -> Tensor:
    """One forward pass of the backbone."""
    with torch.no_grad():
        return encoder(BACKBONE, images.device).vit.forward_features(images)


def maps_at_once(images: Tensor, centroids: Tensor) -> Tensor:
    """All maps in closed form."""
    return attention_gradient_cam(encoder(BACKBONE, images.device), images, centroids)


def maps_by_loop(images: Tensor, centroids: Tensor, whole_network: bool) -> Tensor:
    """One backward pass per class, by the definition."""
    vit = trainable_vit(BACKBONE, images.device)
    *before, block = vit.blocks
    with torch.set_grad_enabled(whole_network):
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for other in before:
            x = other(x)
    attention = block.attn
    normed = block.norm1(x)
    query, key, value = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1)
    if not whole_network:
        weights = weights.detach().requires_grad_()
    weights.retain_grad()
    x = x + block.ls1(attention.proj((weights @ value).transpose(1, 2).flatten(2)))
    token = vit.norm(x + block.ls2(block.mlp(block.norm2(x))))[:, 0]
    gradients = []
    for centroid in centroids:
        loss = F.cosine_similarity(token, centroid[None]).sum()
        if whole_network:
            vit.zero_grad()
            weights.grad = None
            loss.backward(retain_graph=True)
            gradient = weights.grad
        else:
            (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
        gradients.append(gradient.mean(1)[:, 0, 1:])
    gradient = torch.stack(gradients, 1)  # [B, K, N]
    row = weights.detach().mean(1)[:, 0, 1:]
    row = row / row.amax(-1, keepdim=True)
    evidence = gradient.relu()
    maps = torch.where(gradient >= 0, row[:, None] + evidence * carries_mass(evidence, KEPT_MASS), 0)
    side = images.shape[-1] // vit.patch_embed.patch_size[0]
    return maps.unflatten(-1, (side, side))


def reference(images: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and tokens in double precision (the maps' formula is tested against the loop to 1e-14)."""
    double = Encoder(copy.deepcopy(encoder(BACKBONE, images.device).vit).double())
    with torch.no_grad():
        tokens = double.vit.forward_features(images.double())
    return attention_gradient_cam(double, images.double(), centroids.double()), tokens


def map_error(result: Tensor, expected: tuple[Tensor, Tensor]) -> float:
    """Error of maps (mean, relative to the largest value: rounding may move an entry across a threshold) or tokens."""
    maps, tokens = expected
    if result.shape == tokens.shape:
        return relative_error(result, tokens)
    if result.shape != maps.shape or not result.isfinite().all():
        return float("inf")
    return ((result.double() - maps).abs().mean() / maps.abs().max()).item()


def images_and_centroids(device: torch.device, seed: int, *, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Normalised noise images, and centroids."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    width = encoder(BACKBONE, device).embed_dim
    return images.to(device), torch.randn(classes, width, generator=generator).to(device)


class Pictures:
    """Noise with a bright square, as the feature bank reads it."""

    name, classes, n_things, n_stuff, things_only = "pictures", ("background", "a"), 1, 0, True

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed

    def pixels(self, index: int) -> np.ndarray:
        random = np.random.default_rng((self.seed, index))
        image = random.integers(0, 100, (240, 320, 3), dtype=np.uint8)
        image[60:160, 80:200] += 120
        return image


def bank_at_once(config: Config, device: torch.device, pictures: Pictures) -> Tensor:
    """The feature bank as it is built."""
    return torch.from_numpy(build_feature_bank(encoder(config.model.encoder, device), pictures, config).foreground)


@contextlib.contextmanager
def attention(net: Encoder, fused: bool) -> Iterator[None]:
    """Run all blocks with fused attention, or with one that writes down every weight."""
    modules = [block.attn for block in net.vit.blocks]
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = fused
    yield
    for module, value in zip(modules, before, strict=True):
        module.fused_attn = value


def bank_by_loop(config: Config, device: torch.device, pictures: Pictures, fused: bool = True) -> Tensor:
    """One image after the other, its crops one by one: fewer than a full batch, TransFGU runs them singly.

    Every pass is the whole network, as there. `fused` is kinder than the public code, which materialises attention.
    """
    with attention(encoder(config.model.encoder, device), fused), torch.no_grad():
        return _bank_by_loop(config, device, pictures)


def _bank_by_loop(config: Config, device: torch.device, pictures: Pictures) -> Tensor:
    net, size = encoder(config.model.encoder, device), config.data.size
    side = 2 * size // net.patch_size
    boxes = windows((side, side), config.labels.bank_scales)
    squashed, features = SquashedImages(pictures, range(pictures.images), 2 * size), []
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for i in range(pictures.images):
        image = (squashed[i].to(device).float() / 255 - mean) / std
        attended = net.features(image[None])
        row = attended.attention[0, :, net.num_prefix_tokens :].mean(0)
        shares = window_shares((row > row.mean()).view(1, *attended.grid), boxes)[0]
        for (top, left, length), share in zip(boxes, shares.tolist(), strict=True):
            if share > 0.5:
                box = tuple(net.patch_size * v for v in (top, left, length))
                features.append(net(cut(image, [box], size))[1])
    return torch.cat(features).cpu()


def bank_config(full: bool) -> Config:
    """ViT-S/8 at 320 px; on a CPU the shipped backbone at 96 px."""
    name, size = (BACKBONE, 320) if full else ("shapes_vit_tiny", 96)
    base = Config(data=DataConfig(size=size, workers=0), labels=LabelConfig())
    return replace(base, model=replace(base.model, encoder=name))


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """The workloads; on a CPU smaller batches and fewer classes for the loops."""
    batch, looped = (32, 20) if full else (1, 4)
    forward = Candidate("one plain forward pass", plain_forward)
    ours = Candidate("ours", maps_at_once, ours=True)
    loops = (
        Candidate("backward pass per class (TransFGU)", functools.partial(maps_by_loop, whole_network=True)),
        Candidate("backward pass per class, last block", functools.partial(maps_by_loop, whole_network=False)),
    )

    def cam(classes: int, candidates: tuple[Candidate, ...], scaled_from: str) -> Row:
        return Row(
            family="cam",
            workload=f"vit_s8_{SIZE}_k{classes}",
            variant="maps",
            dtype="float32",
            shape=f"{batch},3,{SIZE},{SIZE} x {classes}",
            inputs=functools.partial(images_and_centroids, batch=batch, classes=classes),
            candidates=candidates,
            reference=reference,
            tolerance=1e-4,
            error=map_error,
            items=batch,
            scaled_from="" if full else scaled_from,
        )

    config, pictures = bank_config(full), 64 if full else 4
    bank = Row(
        family="cam",
        workload="feature_bank",
        variant="crops",
        dtype="float32",
        shape=f"{pictures} images, {config.model.encoder}, {config.data.size} px",
        inputs=lambda _, seed: (Pictures(pictures, seed),),
        candidates=(
            Candidate("ours", functools.partial(bank_at_once, config, device), ours=True),
            Candidate("image by image, crop by crop", functools.partial(bank_by_loop, config, device)),
            Candidate(
                "the same, attention materialised (DINO's code)",
                functools.partial(bank_by_loop, config, device, fused=False),
            ),
        ),
        reference=functools.partial(bank_by_loop, config, device),
        tolerance=1e-3,
        items=pictures,
        scaled_from="" if full else f"64 images, {BACKBONE}, 320 px",
    )
    return [
        cam(80, (ours, forward), f"32,3,{SIZE},{SIZE} x 80"),
        cam(looped, (ours, forward, *loops), f"32,3,{SIZE},{SIZE} x 20"),
        bank,
    ]


def test_cam(measure, row):
    """Every workload through the harness."""
    measure(row)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(
    ours: Callable[[], object], others: list[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """Return the median over interleaved repeats of (others' time / ours' time), the first round left out."""
    times = [[seconds(run, device) for run in (ours, *others)] for _ in range(repeats + 1)][1:]
    return [percentile([line[i] / line[0] for line in times], 50) for i in range(1, len(others) + 1)]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description="Cost of the class activation maps and of the feature bank.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--loop-classes", type=int, default=20, help="classes of the backward loops")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("maps", "bank"), help="print one of the two results")
    parser.add_argument("--bank-encoder", help="backbone of the feature bank")
    parser.add_argument("--bank-size", type=int, help="side of a crop in pixels")
    parser.add_argument("--bank-images", type=int)
    parser.add_argument("--bank-scales", type=float, nargs="+", help="window sides, as fractions of the image")
    parser.add_argument("--bank-repeats", type=int, default=3)
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.only != "bank":
        print_maps(options, device)
    if options.only != "maps":
        print_bank(options, device)


def print_maps(options: argparse.Namespace, device: torch.device) -> None:
    """Print what the maps cost."""
    print(f"ViT-S/8, {options.batch} x {SIZE} px, {device}, medians of {options.repeats} interleaved repeats")
    images, centroids = images_and_centroids(device, 0, batch=options.batch, classes=options.classes)
    expected = reference(images, centroids)
    error = map_error(maps_at_once(images, centroids), expected)
    some = centroids[: options.loop_classes]
    loops = {
        "whole network (TransFGU)": functools.partial(maps_by_loop, images, some, True),
        "last block only": functools.partial(maps_by_loop, images, some, False),
    }
    errors = [error] + [map_error(run(), (expected[0][:, : len(some)], expected[1])) for run in loops.values()]
    if max(errors) > 1e-4:
        raise SystemExit(f"the maps differ ({errors}): no ratio to report")
    (pace,) = ratios(
        functools.partial(plain_forward, images, centroids),
        [functools.partial(maps_at_once, images, centroids)],
        device,
        options.repeats,
    )
    print(f"{options.classes} maps cost {pace:.2f} plain forward passes")
    for name, run in loops.items():
        times = [
            (seconds(run, device), seconds(functools.partial(plain_forward, images, centroids), device))
            for _ in range(3)
        ]
        cost = statistics.median(a / b for a, b in times)
        print(f"{len(some)} maps by one backward pass per class, {name}, cost {cost:.1f} plain forward passes")


def print_bank(options: argparse.Namespace, device: torch.device) -> None:
    """Print what the feature bank gains by its batches."""
    full = device.type == "cuda"
    config, pictures = bank_config(full), Pictures(options.bank_images or (64 if full else 2), 0)
    config = replace(
        config,
        data=replace(config.data, size=options.bank_size or config.data.size),
        model=replace(config.model, encoder=options.bank_encoder or config.model.encoder),
        labels=replace(config.labels, bank_scales=tuple(options.bank_scales or config.labels.bank_scales)),
    )
    once = functools.partial(bank_at_once, config, device, pictures)
    loops = [functools.partial(bank_by_loop, config, device, pictures, fused=fused) for fused in (True, False)]
    expected, found = loops[0](), once()
    error = relative_error(found, expected) if found.shape == expected.shape else float("inf")
    if error > 1e-3:
        raise SystemExit(f"the features differ ({error}): no ratio to report")
    kinder, public = ratios(once, loops, device, options.bank_repeats)
    what = f"{config.model.encoder}, {config.data.size} px, {pictures.images} images, {len(found)} crops"
    print(f"feature bank ({what}; {torch.get_num_threads()} threads):")
    print(f"  {kinder:.2f}x the speed of a loop over images and crops, whole network, fused attention")
    print(f"  {public:.2f}x the speed of the same loop with materialised attention, as in DINO's public code")


if __name__ == "__main__":
    main()
