"""Formula-driven supervision: endless pictures of procedural categories, labelled for free.

As in FractalDB (Kataoka et al. 2020) and Visual Atoms (Takashima et al. 2023) a network learns to tell categories
that a formula makes up. Here a category is a texture (an operator on oblique gratings) inside a smooth, star-convex
outline; every instance has its own angle, scale, phase, place and two colours. Pictures hold several instances on a
cluttered background. Labels are free, and serve what DMSA takes from a backbone: a class token that names what it
attends to, and attention in the last block that covers the objects (DINO's does so by itself after long training on
photographs). The gradient of Eq. 5 asks what the class token would say if more of its attention went to one patch;
that is what is trained here, with attention that moves to one patch by any share from 0 to 1. Patch tokens are never
labelled.

None of the textures and outlines of the data set ``shapes`` can be drawn: its gratings stand at right angles, while
those of a category stand at 20 to 65 degrees (`ANGLE`); a single grating is no operator here; its outlines are discs
and polygons, while these are Fourier curves with two harmonics of unequal order (`LOBES`, `AMPLITUDE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmsa import distributed
from dmsa.models.encoder import blocks_before_last
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.loop import Recipe
from dmsa.pretrain.quality import normalise

OPERATORS = ("product", "maximum", "minimum", "rings", "three_waves", "modulated", "patchwork")
PERIOD = (5.0, 13.0)
"""Periods of the gratings, in pixels."""
ANGLE = (20.0, 65.0)
"""Angle between two gratings of one texture, in degrees: never parallel, never perpendicular."""
LOBES = (3, 7)
"""Order of an outline's first harmonic; the second one is higher by one or two."""
AMPLITUDE = (0.12, 0.3)
"""Amplitude of an outline's harmonics, relative to its mean radius."""


@dataclass(frozen=True)
class Categories:
    """Parameters of ``N`` categories; every field has ``N`` rows."""

    operator: Tensor
    """Index into `OPERATORS`, int64 ``[N]``."""
    period: Tensor
    """Periods of three gratings in pixels, ``[N, 3]``."""
    angle: Tensor
    """Directions of three gratings in radians, the first is 0, ``[N, 3]``."""
    threshold: Tensor
    """Value of the texture's field between its two colours, ``[N]``."""
    hardness: Tensor
    """Steepness of the step between the two colours, ``[N]``."""
    depth: Tensor
    """Depth of the modulation in radians, ``[N]``."""
    lobes: Tensor
    """Orders of the outline's two harmonics, ``[N, 2]``."""
    amplitude: Tensor
    """Amplitudes of the two harmonics, ``[N, 2]``."""
    twist: Tensor
    """Phase of the second harmonic in radians, ``[N]``."""

    def __len__(self) -> int:
        return len(self.operator)

    def take(self, index: Tensor) -> Categories:
        """The categories ``index`` (any shape) as another table of that shape."""
        return Categories(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def draw_categories(count: int, seed: int) -> Categories:
    """Draw ``count`` categories.

    Raises:
        ValueError: Fewer than two categories.
    """
    if count < 2:
        raise ValueError(f"{count=}: expected at least 2 categories")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    first = torch.randint(LOBES[0], LOBES[1] + 1, (count,), generator=generator)
    second = first + torch.randint(1, 3, (count,), generator=generator)
    side = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    turn = torch.deg2rad(uniform(*ANGLE, count, 2))
    # The second grating stands at +-turn; the third beyond it, by another oblique angle.
    angle = torch.stack([torch.zeros(count), side * turn[:, 0], -side * turn[:, 1]], dim=1)
    return Categories(
        operator=torch.arange(count) % len(OPERATORS),
        period=uniform(*PERIOD, count, 3),
        angle=angle,
        threshold=uniform(-0.4, 0.4, count),
        hardness=torch.where(torch.rand(count, generator=generator) < 0.35, 4.0, 20.0),
        depth=uniform(1.0, 2.5, count),
        lobes=torch.stack([first, second], dim=1),
        amplitude=uniform(*AMPLITUDE, count, 2) * torch.tensor([1.0, 0.6]),
        twist=uniform(0, 2 * math.pi, count),
    )


def outline(c: Categories, x: Tensor, y: Tensor) -> Tensor:
    """Whether ``(x, y)`` lies inside: ``[..., H, W]``, in units of the mean radius; ``c`` has the shape ``[...]``."""
    theta = torch.atan2(y, x)
    lobes, amplitude = c.lobes[..., None, None, :].to(x.dtype), c.amplitude[..., None, None, :]
    edge = (
        1
        + amplitude[..., 0] * torch.cos(lobes[..., 0] * theta)
        + amplitude[..., 1] * torch.cos(lobes[..., 1] * theta + c.twist[..., None, None])
    )
    return x * x + y * y < edge * edge


def texture(c: Categories, x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    """Share of the second colour, in [0, 1], at ``(x, y)`` (``[..., H, W]``, pixels); ``phase [..., 3]`` in radians."""
    wave = 2 * math.pi / c.period
    cos, sin = (wave * torch.cos(c.angle))[..., None, None, :], (wave * torch.sin(c.angle))[..., None, None, :]
    arguments = [x * cos[..., i] + y * sin[..., i] + phase[..., None, None, i] for i in range(3)]
    a, b, d = (torch.sin(argument) for argument in arguments)
    rings = torch.sin(torch.sqrt(x * x + y * y) * wave[..., None, None, 0] + phase[..., None, None, 0])
    operator = c.operator[..., None, None]
    field = torch.where(operator == 0, a * b, torch.maximum(a, b))
    field = torch.where(operator == 2, torch.minimum(a, b), field)
    field = torch.where(operator == 3, (rings + 0.6 * b) / 1.3, field)
    field = torch.where(operator == 4, (a + b + d) / 1.6, field)
    field = torch.where(operator == 5, torch.sin(arguments[0] + c.depth[..., None, None] * b), field)
    field = torch.where(operator == 6, torch.where(b > 0, a, d), field)
    return torch.sigmoid(c.hardness[..., None, None] * (field - c.threshold[..., None, None]))


def _background(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth mixtures of colours with flat ellipses and bars, ``[batch, 3, size, size]`` in [0, 1]."""
    image = torch.rand(batch, 3, 4, 4, generator=generator)
    image = F.interpolate(image, size=(size, size), mode="bilinear", align_corners=True)
    axis = (torch.arange(size) + 0.5) / size
    for number in range(8):
        r = torch.rand(batch, 8, 1, 1, generator=generator)
        angle = r[:, 0] * math.pi
        dy, dx = axis[:, None] - r[:, 1], axis[None, :] - r[:, 2]  # [B, S, 1], [B, 1, S]
        along, across = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        thin = number % 4 == 3
        a = 0.1 + 0.3 * r[:, 3] if thin else 0.04 + 0.14 * r[:, 3]
        b = 0.012 if thin else 0.04 + 0.14 * r[:, 4]
        box, ellipse = (along.abs() < a) & (across.abs() < b), (along / a) ** 2 + (across / b) ** 2 < 1
        mask = box if number % 2 else ellipse
        # Not every picture gets this piece.
        mask = mask & (torch.rand(batch, 1, 1, generator=generator) < 0.6)
        image = torch.where(mask[:, None], r[:, 5:8], image)
    return image


def draw_batch(
    categories: Categories, batch: int, size: int, generator: torch.Generator, objects: int = 3
) -> tuple[Tensor, Tensor]:
    """Draw pictures with one to ``objects`` instances each.

    Args:
        categories: What to draw from.
        batch: Number of pictures.
        size: Side in pixels.
        generator: Source of all randomness.
        objects: Largest number of instances in a picture.

    Returns:
        Pictures in [0, 1], ``[batch, 3, size, size]``, and the category of every pixel, int64
        ``[batch, size, size]``, -1 for the background.
    """
    kind = torch.randint(len(categories), (batch, objects), generator=generator)
    c = categories.take(kind)
    r = torch.rand(batch, objects, 12, generator=generator)[..., None, None]  # [B, O, 12, 1, 1]
    present = torch.arange(objects) < torch.randint(1, objects + 1, (batch, 1), generator=generator)
    axis = torch.arange(size) + 0.5
    # The fewer the objects, the larger they may be.
    number = present.sum(1)[:, None, None, None]
    radius = size * (0.2 + (0.14 + 0.12 * (number == 1)) * r[:, :, 0])
    dy = axis[:, None] - size * (0.12 + 0.76 * r[:, :, 1])
    dx = axis[None, :] - size * (0.12 + 0.76 * r[:, :, 2])
    angle = 2 * math.pi * r[:, :, 3]
    cos, sin = angle.cos(), angle.sin()
    x, y = dx * cos + dy * sin, dy * cos - dx * sin  # [B, O, S, S]
    inside = outline(c, x / radius, y / radius) & present[..., None, None]
    scale = torch.exp(-0.25 + 0.55 * r[:, :, 4])
    phase = 2 * math.pi * torch.rand(batch, objects, 3, generator=generator)
    centre = size * 0.15 * (r[:, :, 5:7] - 0.5)  # rings are not centred on the outline
    ink = texture(c, x / scale - centre[:, :, 0], y / scale - centre[:, :, 1], phase)

    pairs = torch.rand(batch, objects, 8, 2, 3, generator=generator)
    light = pairs @ torch.tensor([0.299, 0.587, 0.114])
    best = ((light[..., 0] - light[..., 1]).abs() >= 0.25).float().argmax(dim=2)  # the first with enough contrast
    colours = pairs[torch.arange(batch)[:, None], torch.arange(objects), best][..., None, None]  # [B, O, 2, 3, 1, 1]

    image = _background(batch, size, generator)
    owner = torch.full((batch, size, size), -1, dtype=torch.int64)
    for o in range(objects):
        painted = colours[:, o, 0] + (colours[:, o, 1] - colours[:, o, 0]) * ink[:, o, None]
        image = torch.where(inside[:, o, None], painted, image)
        owner = torch.where(inside[:, o], kind[:, o, None, None], owner)
    slope = 0.6 * (torch.rand(batch, 2, 1, 1, generator=generator) - 0.5)
    shade = 1 + slope[:, 0] * (axis[:, None] / size - 0.5) + slope[:, 1] * (axis[None, :] / size - 0.5)
    image = image * shade[:, None]
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.15, blurred, image)
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1), owner


@dataclass(frozen=True)
class Targets:
    """What the tokens of a batch shall say and where the class token shall look."""

    patches: Tensor
    """Category of every patch, int64 ``[B, N]``; ``categories`` for the background, -100 where no one covers 60 %."""
    shares: Tensor
    """Shares of the categories in the visible object area, ``[B, categories]``; zeros where there is no object."""
    attention: Tensor
    """Shares of the patches in the visible object area, ``[B, N]``; zeros where there is no object."""


def targets(owner: Tensor, patch: int, categories: int) -> Targets:
    """Targets of pictures whose pixels belong to ``owner`` (int64 ``[B, S, S]``, -1 for the background).

    Args:
        owner: From `draw_batch`.
        patch: Side of a patch in pixels; it divides ``S``.
        categories: Number of categories.
    """
    batch, side, _ = owner.shape
    grid = side // patch
    tiles = owner.unflatten(1, (grid, patch)).unflatten(3, (grid, patch)).transpose(2, 3).reshape(batch, grid**2, -1)
    majority = tiles.mode(dim=-1).values  # [B, N]
    clear = (tiles == majority[..., None]).float().mean(-1) >= 0.6
    flat = owner.flatten(1)
    area = torch.zeros(batch, categories).scatter_add_(1, flat.clamp(min=0), (flat >= 0).float())
    covered = (tiles >= 0).float().sum(-1)
    return Targets(
        patches=torch.where(majority < 0, categories, majority).where(clear, -100),
        shares=area / area.sum(1, keepdim=True).clamp(min=1),
        attention=covered / covered.sum(1, keepdim=True).clamp(min=1),
    )


class FormulaHead(nn.Module):
    """One cosine classifier for all class tokens, and an easier auxiliary task.

    Hundreds of categories give hardly a gradient to an untrained network. The auxiliary linear layer names only the
    category's operator (one of seven) and gets learning off the ground; it is dropped with the head.

    Args:
        dim: Width of a token.
        operator: Index into `OPERATORS` of each category, int64 ``[categories]``.
    """

    operator: Tensor

    def __init__(self, dim: int, operator: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(operator), dim) * dim**-0.5)
        self.background = nn.Linear(dim, 1)
        self.log_scale = nn.Parameter(torch.tensor(math.log(12.0)))
        self.auxiliary = nn.Linear(dim, len(OPERATORS))
        self.register_buffer("operator", operator.clone(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., D]`` → logits ``[..., categories]``."""
        scale = self.log_scale.clamp(max=math.log(40.0)).exp()
        return scale * F.linear(F.normalize(tokens, dim=-1), F.normalize(self.weight, dim=-1))

    def with_background(self, tokens: Tensor) -> Tensor:
        """``[..., D]`` → logits ``[..., categories + 1]``, the last one the background's."""
        return torch.cat([self(tokens), self.background(tokens)], dim=-1)


OPERATOR_WEIGHT, ATTENTION_WEIGHT = 0.5, 0.5
NAMES_FIRST = 0.6
"""Share of the training in which names alone are learnt: all at the same time takes far longer."""


def class_tokens(vit: VisionTransformer, embedded: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the class token says of a picture, and what it would say if its attention in the last block moved.

    Args:
        vit: timm's ``VisionTransformer`` with a class token and ordinary attention (no gate, no dropout).
        embedded: Of its patch embedding, ``[B, h, w, D]``.
        shift: Share of the attention that moves to a patch, ``[B, N]``, from 0 to 1. The tokens then teach the
            attention nothing. ``None``: all of it moves, and the picture's own class token teaches the attention.

    Returns:
        The class token ``[B, D]``; those with moved attention ``[B, N, D]``; and the attention to the patches, mean
        over the heads, ``[B, N]``.
    """
    x = blocks_before_last(vit, embedded)
    last, prefix = vit.blocks[-1], vit.num_prefix_tokens
    attention = last.attn
    query, key, value = attention.qkv(last.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    query, key = attention.q_norm(query[:, :1]), attention.k_norm(key)
    rows = (torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale).float().softmax(-1)  # [B, heads, 1, T]
    seen = rows if shift is None else rows.detach()
    context = torch.einsum("bhqk,bkhd->bqhd", seen.to(value.dtype), value).flatten(2)  # [B, 1, D]
    patches = value[:, prefix:].flatten(2)  # [B, N, D]
    moved = patches if shift is None else torch.lerp(context, patches, shift[..., None].to(context.dtype))
    token = x[:, :1] + last.ls1(attention.proj(attention.norm(torch.cat([context, moved], dim=1))))
    token = vit.norm(token + last.ls2(last.mlp(last.norm2(token))))
    return token[:, 0], token[:, 1:], rows[:, :, 0, prefix:].mean(1)


def formula_loss(
    head: FormulaHead,
    token: Tensor,
    moved: Tensor,
    attention: Tensor,
    wanted: Targets,
    shift: Tensor | None = None,
    patch_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Sum of four cross-entropies, and accuracies.

    First (`shift` unset) the class token names the categories in the proportion of their areas, and the one that
    attends to a single patch that patch's category or the background. Then both name whatever they attend to,
    background included, in the proportion of the attention, and the attention is spread over the objects. Both also
    name the operators: of the objects by their areas, and of a patch on an object by the share that moved there.

    Args:
        head: The classifiers.
        token: Class tokens ``[B, D]``.
        moved: Those with moved attention, ``[B, N, D]``.
        attention: The last block's class-token attention to the patches, mean over heads, ``[B, N]``.
        wanted: From `targets`.
        shift: What `class_tokens` was given.
        patch_weight: Weight of what the class tokens with moved attention name, categories and operators.
    """
    categories = wanted.shares.shape[1]
    known = wanted.patches >= 0
    patches = known.sum().clamp(min=1)
    own = F.one_hot(wanted.patches.clamp(min=0), categories + 1).to(token.dtype)  # [B, N, categories + 1]
    if shift is None:
        of_class = head(token)
        loss_class = F.cross_entropy(of_class, wanted.shares)
        names = own
    else:
        mass = attention.detach() * known
        seen = torch.einsum("bn,bnc->bc", mass / mass.sum(1, keepdim=True).clamp(min=1e-6), own)
        of_class = head.with_background(token)
        loss_class = F.cross_entropy(of_class, seen)
        names = torch.lerp(seen[:, None], own, shift[..., None])
    of_patches = head.with_background(moved)
    loss_patch = F.cross_entropy(of_patches[known], names[known], reduction="sum") / patches
    operators = wanted.shares @ F.one_hot(head.operator, len(OPERATORS)).to(wanted.shares.dtype)
    things = known & (wanted.patches < categories)
    category = wanted.patches[things]
    of_operators = F.cross_entropy(head.auxiliary(moved[things]), head.operator[category], reduction="none")
    if shift is not None:
        of_operators = shift[things] * of_operators
    on_objects = things.sum().clamp(min=1)
    loss_operator = F.cross_entropy(head.auxiliary(token), operators) + patch_weight * of_operators.sum() / on_objects
    spread = attention / attention.sum(-1, keepdim=True)
    loss_attention = -(wanted.attention * (spread + 1e-6).log()).sum(-1).mean()
    with torch.no_grad():
        accuracy = (of_class[:, :categories].argmax(-1) == wanted.shares.argmax(-1)).float().mean()
        accuracy_patch = (of_patches[things].argmax(-1) == category).float().sum() / on_objects
    return {
        "loss": loss_class
        + patch_weight * loss_patch
        + OPERATOR_WEIGHT * loss_operator
        + (0.0 if shift is None else ATTENTION_WEIGHT) * loss_attention,
        "loss_class": loss_class,
        "loss_patch": loss_patch,
        "loss_operator": loss_operator,
        "loss_attention": loss_attention,
        "accuracy_class": accuracy,
        "accuracy_patch": accuracy_patch,
    }


def build(config: PretrainConfig, vit: VisionTransformer) -> Recipe:
    """Modules, loss and after-step hook of the recipe, for `dmsa.pretrain.loop.run`."""
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
            token, moved, attention = distributed.by_parts(
                lambda own: class_tokens(
                    vit, vit.patch_embed(normalise(images[own])), None if shift is None else shift[own]
                ),
                batch,
            )
        wanted = targets(owner, patch, config.categories)
        return formula_loss(head, token.float(), moved.float(), attention, wanted, shift, config.patch_weight)

    return nn.ModuleDict({"vit": vit, "head": head}), loss_of_step, lambda step: None
