"""Pre-training: the categories, the recipes, resuming, the stem, the quality report and the shipped weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch

from dmsa.commands.pretrain import main
from dmsa.data.base import table as data_table
from dmsa.data.shapes import OUTLINES, PERIOD, TEXTURES, THINGS
from dmsa.models.conv_stem import ConvStem
from dmsa.models.encoder import Encoder, build_encoder
from dmsa.models.late_class import LateClassViT
from dmsa.models.network import load_network
from dmsa.models.shapes_vit import WEIGHTS
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.dino import random_crop, sinkhorn
from dmsa.pretrain.formula import (
    ANGLE,
    LOBES,
    OPERATORS,
    FormulaHead,
    class_tokens,
    draw_batch,
    draw_categories,
    formula_loss,
    outline,
    targets,
    texture,
)
from dmsa.pretrain.hybrid import evidence
from dmsa.pretrain.loop import learning_rate
from dmsa.pretrain.quality import (
    mean_iou,
    measure,
    normalise,
    patch_labels,
    super_categories,
    tokens_and_attention,
)
from dmsa.pretrain.run import build_backbone, pretrain
from tests.data.fixtures import coco as coco_root

TINY = {"encoder": "shapes_vit_tiny", "size": 32, "batch": 4, "threads": 1, "log_every": 2, "report_pictures": 0}
MEASURE = {"pictures": 16, "crops": 48, "size": 64}


def spectra(images: np.ndarray) -> np.ndarray:
    """Rotation-invariant fingerprint of textures ``[N, S, S]``: how the energy spreads over rings and over angles.

    Scale-invariant too: frequencies are counted in units of the strongest ring.
    """
    size = images.shape[-1]
    window = np.hanning(size)[:, None] * np.hanning(size)[None]
    centred = (images - images.mean((1, 2), keepdims=True)) * window
    power = np.abs(np.fft.fftshift(np.fft.fft2(centred), axes=(1, 2))) ** 2
    axis = np.arange(size) - size // 2
    radius, angle = np.hypot(axis[:, None], axis[None]), np.arctan2(axis[:, None], axis[None]) % np.pi
    done = []
    for one in power:
        rings = np.bincount(radius.astype(int).ravel(), one.ravel())[: size // 2]
        peak = 2 + np.argmax(rings[2:])
        # 24 angles, of the energy between 0.6 and 2.6 times the strongest frequency, in 3 bands
        fingerprint = []
        for low, high in ((0.6, 1.25), (1.25, 1.8), (1.8, 2.6)):
            band = (radius >= low * peak) & (radius < high * peak)
            fingerprint.append(np.bincount((angle[band] * 24 / np.pi).astype(int) % 24, one[band], minlength=24))
        done.append(np.stack(fingerprint))
    done = np.stack(done)
    # Rotations shift the angles: the magnitude of the Fourier transform along them does not change.
    done = np.abs(np.fft.rfft(done, axis=-1)).reshape(len(images), -1)
    return done / np.linalg.norm(done, axis=1, keepdims=True)


def draw_shapes_texture(name: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    axis = np.arange(96) / (rng.uniform(*PERIOD) * 96)  # the sizes that the set draws at its default
    turn, shift = rng.uniform(0, math.pi), rng.random(2)
    y, x = axis[:, None], axis[None, :]
    u, v = x * math.cos(turn) + y * math.sin(turn) + shift[0], y * math.cos(turn) - x * math.sin(turn) + shift[1]
    return TEXTURES[name](u, v, rng).astype(float)


def test_categories_exclude_the_classes_of_shapes_by_construction():
    categories = draw_categories(400, 0)
    # Every texture of `shapes` is built on axes at right angles or on none; no two gratings of a category are
    # perpendicular or parallel, and no category is a single grating.
    assert not set(OPERATORS) & set(TEXTURES)
    degrees = torch.rad2deg(categories.angle)
    assert (degrees[:, 0] == 0).all()
    for i, j in ((0, 1), (0, 2)):
        between = (degrees[:, i] - degrees[:, j]).abs()
        assert between.min() >= ANGLE[0]
        assert between.max() <= ANGLE[1]
    # Every outline of `shapes` is a disc or has straight edges; those of the categories have two harmonics.
    assert (categories.lobes[:, 0] >= LOBES[0]).all()
    assert (categories.lobes[:, 0] != categories.lobes[:, 1]).all()
    assert (categories.amplitude > 0.05).all()


@pytest.mark.slow
def test_no_category_has_an_outline_of_shapes():
    categories = draw_categories(400, 0)
    axis = torch.linspace(-1.6, 1.6, 49)
    y, x = axis[:, None].expand(49, 49), axis[None, :].expand(49, 49)
    drawn = outline(categories, x.expand(400, 49, 49), y.expand(400, 49, 49)).flatten(1).float()  # [400, P]
    for name, kind in THINGS.items():
        best = torch.zeros(400)
        for turn in torch.linspace(0, 2 * math.pi, 25)[:-1]:
            for scale in (0.9, 1.0, 1.1, 1.2, 1.3):
                u, v = (x * turn.cos() + y * turn.sin()) / scale, (y * turn.cos() - x * turn.sin()) / scale
                held_out = torch.from_numpy(OUTLINES[kind[0]](u.numpy(), v.numpy())).flatten().float()
                common = drawn @ held_out
                best = torch.maximum(best, common / (drawn.sum(1) + held_out.sum() - common))
        assert best.max() < 0.93, f"{name}: a category's outline overlaps it by {best.max():.3f}"
    # The measure would find an outline of `shapes` among them, even half a step off in angle and size.
    for name, kind in THINGS.items():
        shape = OUTLINES[kind[0]]
        held_out = torch.from_numpy(shape(x.numpy(), y.numpy()))
        turn, scale = math.pi / 24, 1.05
        u, v = (x * math.cos(turn) + y * math.sin(turn)) / scale, (y * math.cos(turn) - x * math.sin(turn)) / scale
        copy = torch.from_numpy(shape(u.numpy(), v.numpy()))
        found = (copy & held_out).sum() / (copy | held_out).sum()
        assert found > 0.8, f"{name}: {found:.3f}"


def direction(images: np.ndarray) -> np.ndarray:
    """Share of the energy of textures ``[N, S, S]`` in their strongest sector of 37 degrees; 1 for a single grating."""
    size = images.shape[-1]
    window = np.hanning(size)[:, None] * np.hanning(size)[None]
    power = np.fft.fft2((images - images.mean((1, 2), keepdims=True)) * window)
    power = np.abs(np.fft.fftshift(power, axes=(1, 2))) ** 2
    axis = np.arange(size) - size // 2
    sector = np.minimum((np.arctan2(axis[:, None], axis[None]) % np.pi * 24 / np.pi).astype(int), 23).ravel()
    counts = np.stack([np.bincount(sector, one.ravel(), minlength=24) for one in power])
    wide = sum(np.roll(counts, shift, axis=1) for shift in range(-2, 3))
    return wide.max(1) / counts.sum(1)


def test_no_category_has_a_texture_of_shapes():
    count = 400
    categories = draw_categories(count, 0)
    axis = torch.arange(96.0)
    y, x = axis[:, None].expand(count, 96, 96), axis[None, :].expand(count, 96, 96)
    drawn = (texture(categories, x - 48, y - 48, torch.zeros(count, 3)) > 0.5).numpy().astype(float)
    held_out = {name: np.stack([draw_shapes_texture(name, seed) for seed in range(6)]) for name in TEXTURES}
    # Stripes: all energy in one direction.
    assert direction(held_out["stripes"]).min() > 0.90
    assert direction(drawn).max() < 0.88
    # The others: their fingerprint is closer to their own in another size and angle than to any category's.
    prints = spectra(drawn)
    for name in set(TEXTURES) - {"stripes"}:
        own = spectra(held_out[name])
        itself = (own @ own.T)[np.triu_indices(6, 1)].mean()
        assert (prints @ own.T).mean(1).max() < itself, name


def test_draw_batch_is_reproducible_and_labels_are_where_the_objects_are():
    categories = draw_categories(20, 1)
    image, owner = draw_batch(categories, 8, 48, torch.Generator().manual_seed(5))
    again, owner_again = draw_batch(categories, 8, 48, torch.Generator().manual_seed(5))
    assert torch.equal(image, again)
    assert torch.equal(owner, owner_again)
    other, _ = draw_batch(categories, 8, 48, torch.Generator().manual_seed(6))
    assert not torch.equal(image, other)
    assert image.shape == (8, 3, 48, 48)
    assert image.min() >= 0
    assert image.max() <= 1
    assert owner.min() == -1
    assert owner.max() < 20
    assert (owner >= 0).flatten(1).any(1).all()
    assert 0.2 < (owner >= 0).float().mean() < 0.7


def test_targets_by_hand():
    owner = torch.full((1, 8, 8), -1)
    owner[0, :4, :4] = 2  # one whole patch
    owner[0, :4, 4:6] = 1  # half a patch: unclear
    owner[0, 4:, :1] = 0  # a quarter of a patch: background prevails
    wanted = targets(owner, 4, 3)
    assert wanted.patches.tolist() == [[2, -100, 3, 3]]
    torch.testing.assert_close(wanted.shares, torch.tensor([[4.0, 8.0, 16.0]]) / 28)
    torch.testing.assert_close(wanted.attention, torch.tensor([[16.0, 8.0, 4.0, 0.0]]) / 28)


def test_a_picture_without_objects_has_only_background():
    wanted = targets(torch.full((2, 8, 8), -1), 4, 3)
    assert (wanted.patches == 3).all()
    head = FormulaHead(16, torch.tensor([0, 1, 2]))
    attention = torch.full((2, 4), 0.25)
    for shift in (None, torch.rand(2, 4)):
        figures = formula_loss(head, torch.randn(2, 16), torch.randn(2, 4, 16), attention, wanted, shift)
        for name in ("loss_operator", "loss_attention"):
            assert figures[name] == 0
        assert (figures["loss_class"] == 0) == (shift is None)
        assert figures["loss_patch"] > 0


def test_moved_attention_can_be_left_untrained():
    owner = torch.full((1, 8, 8), -1)
    owner[0, :4] = 0
    head = FormulaHead(16, torch.tensor([0, 1]))
    token, moved = torch.randn(1, 16, requires_grad=True), torch.randn(1, 4, 16, requires_grad=True)
    for weight, trained in ((0.0, False), (1.0, True)):
        figures = formula_loss(head, token, moved, torch.full((1, 4), 0.25), targets(owner, 4, 2), None, weight)
        of_token, of_moved = torch.autograd.grad(figures["loss"], (token, moved))
        assert of_token.abs().max() > 0
        assert bool(of_moved.abs().max() > 0) == trained


def test_names_come_first():
    owner = torch.full((1, 8, 8), -1)
    owner[0, :4] = 0
    wanted, shift = targets(owner, 4, 2), torch.rand(1, 4)
    head, attention = FormulaHead(16, torch.tensor([0, 1])), torch.full((1, 4), 0.25, requires_grad=True)
    token, moved = torch.randn(1, 16), torch.randn(1, 4, 16)
    formula_loss(head, token, moved, attention, wanted)["loss"].backward()
    assert attention.grad is None or attention.grad.abs().max() == 0
    formula_loss(head, token, moved, attention, wanted, shift)["loss"].backward()
    assert attention.grad.abs().max() > 0


def test_class_tokens_name_what_they_attend_to():
    owner = torch.full((1, 8, 8), -1)
    owner[0, :4, :4], owner[0, 4:, 4:] = 0, 1
    wanted = targets(owner, 4, 2)
    head, token, moved = FormulaHead(16, torch.tensor([0, 1])), torch.randn(1, 16), torch.randn(1, 4, 16)
    attention, shift = torch.tensor([[0.5, 0.1, 0.2, 0.2]]), torch.tensor([[1.0, 0.5, 0.0, 0.25]])
    figures = formula_loss(head, token, moved, attention, wanted, shift)
    seen = torch.tensor([0.5, 0.2, 0.3])  # categories 0 and 1, then background
    own = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]])
    of_class, of_moved = (head.with_background(t).log_softmax(-1)[0] for t in (token, moved))
    torch.testing.assert_close(figures["loss_class"], -(seen * of_class).sum())
    names = shift[0, :, None] * own + (1 - shift[0, :, None]) * seen
    torch.testing.assert_close(figures["loss_patch"], -(names * of_moved).sum(-1).mean())


@pytest.mark.slow
def test_class_tokens_with_moved_attention():
    torch.manual_seed(0)
    vit = build_backbone("shapes_vit_tiny", 32).eval()
    encoder, images = Encoder(vit), torch.randn(2, 3, 32, 32)
    attended = encoder.features(images)

    def told(row):
        return encoder.class_token(attended, (row.unsqueeze(2) @ attended.values).flatten(1))

    shift = torch.rand(2, 16)
    for given in (None, shift):
        token, moved, attention = class_tokens(vit, vit.patch_embed(images), given)
        torch.testing.assert_close(token, vit(images))
        torch.testing.assert_close(attention, attended.attention[..., 1:].mean(1))
        for patch in (0, 13):
            share = (torch.ones(2) if given is None else given[:, patch])[:, None, None]
            row = (1 - share) * attended.attention
            row[..., 1 + patch] += share[..., 0]
            torch.testing.assert_close(moved[:, patch], told(row))


def test_only_the_first_stage_teaches_attention_through_the_class_token():
    torch.manual_seed(0)
    vit, images = build_backbone("shapes_vit_tiny", 32), torch.randn(1, 3, 32, 32)
    weight = vit.blocks[-1].attn.qkv.weight
    for shift, learns in ((None, True), (torch.rand(1, 16), False)):
        (gradient,) = torch.autograd.grad(class_tokens(vit, vit.patch_embed(images), shift)[0].square().sum(), weight)
        assert bool(gradient[: 2 * vit.embed_dim].abs().max() > 0) == learns  # queries and keys
        assert gradient[2 * vit.embed_dim :].abs().max() > 0


def test_attention_costs_least_on_the_objects():
    owner = torch.full((1, 8, 8), -1)
    owner[0, :4] = 0
    head, token, moved = FormulaHead(16, torch.tensor([0, 1])), torch.randn(1, 16), torch.randn(1, 4, 16)
    wanted = targets(owner, 4, 2)
    maps = [[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0, 0, 0.5, 0.5]]
    costs = [formula_loss(head, token, moved, torch.tensor([m]), wanted)["loss_attention"].item() for m in maps]
    assert costs[0] == pytest.approx(math.log(2), abs=1e-4)
    assert costs == sorted(costs[:2]) + costs[2:]
    assert costs[0] < costs[1] < costs[2] < costs[3]


def test_sinkhorn_uses_every_prototype_and_follows_the_scores():
    scores = torch.nn.functional.normalize(torch.randn(64, 16), dim=1) @ torch.eye(16)
    assignment = sinkhorn(scores, iterations=20)
    torch.testing.assert_close(assignment.sum(1), torch.ones(64))
    torch.testing.assert_close(assignment.sum(0), torch.full((16,), 4.0), rtol=0.02, atol=0.02)
    # A bias towards one prototype is what centring cannot take away; Sinkhorn does.
    biased = scores + 5 * torch.nn.functional.one_hot(torch.tensor(3), 16)
    torch.testing.assert_close(sinkhorn(biased, iterations=20), assignment, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(sinkhorn(torch.zeros(4, 3))).all()


@pytest.mark.parametrize("shape", [(3, 40, 60), (3, 5, 90), (3, 200, 20)])
def test_random_crop_of_any_shape(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        crop = random_crop(image, 24, (0.1, 1.0), torch.Generator().manual_seed(seed))
        assert crop.shape == (3, 24, 24)
        assert crop.min() >= 0
        assert crop.max() <= 1


def test_learning_rate_warms_up_stays_and_cools_down():
    rates = [learning_rate(step, 4000, 1.0, 0.25) for step in range(4000)]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[199] == rates[2000] == 1
    assert rates[3000] == pytest.approx(1)
    assert rates[3500] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    # The plateau does not depend on the length: a run may be prolonged.
    assert rates[2500] == learning_rate(2500, 9000, 1.0, 0.25)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_conv_stem_has_the_grid_of_a_patch_embedding(patch):
    stem = ConvStem(64, patch, 3, 32)
    assert stem(torch.randn(2, 3, 64, 64)).shape == (2, (64 // patch) ** 2, 32)
    assert stem.grid_size == (64 // patch, 64 // patch)
    with pytest.raises(ValueError, match="patch_size=6"):
        ConvStem(64, 6, 3, 32)


def test_the_class_token_meets_the_patches_in_the_last_block_only():
    torch.manual_seed(0)
    vit = build_backbone("shapes_vit_tiny", 32).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        x = vit._pos_embed(vit.patch_embed(images))
        patches = x[:, 1:]
        for block in vit.blocks[:-1]:
            other = torch.cat([torch.randn_like(x[:, :1]), x[:, 1:]], dim=1)
            x = block(x)
            # The class token comes out as it went in, and no patch sees which one it was.
            torch.testing.assert_close(x[:, 1:], block(other)[:, 1:])
            torch.testing.assert_close(x[:, 0], (vit.cls_token + vit.pos_embed[:, :1])[:, 0].expand(2, -1))
        assert not torch.allclose(x[:, 1:], patches)
        assert not torch.allclose(vit.blocks[-1](x)[0, 0], vit.blocks[-1](x)[1, 0])
    with pytest.raises(ValueError, match="num_prefix_tokens=3"):
        LateClassViT(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, reg_tokens=2)


def test_mean_iou_and_patch_labels_by_hand():
    label = np.array([0, 0, 1, 1])
    assert mean_iou(np.array([1, 1, 0, 0]), label, 2, match=True) == 100
    assert mean_iou(np.array([1, 1, 0, 0]), label, 2, match=False) == 0
    assert mean_iou(np.array([0, 1, 1, 1]), label, 2, match=False) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    square = np.zeros((1, 4, 4), dtype=np.uint8)
    square[0, :2, 2:] = 2
    square[0, 3, 3] = 1
    assert patch_labels(square, 2, 3).tolist() == [[[0, 2], [0, 0]]]


def test_attention_row_is_the_one_of_the_network():
    torch.manual_seed(0)
    vit = build_backbone("shapes_vit_tiny", 32).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens, attention = tokens_and_attention(vit, images)
    assert attention.shape == (2, 24)
    with torch.no_grad():
        torch.testing.assert_close(tokens, vit.forward_features(images))
        # The class token's output changes along the attended values only.
        last = vit.blocks[-1]
        seen: list[torch.Tensor] = []
        last.attn.fused_attn = False
        last.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
        vit.forward_features(images)
    torch.testing.assert_close(attention, seen[0][:, :, 0, 1:].mean(1))


@pytest.mark.parametrize("recipe", ["formula", "dino", "distil", "hybrid"])
def test_resume_is_bit_identical(recipe, photos, strong, tmp_path):
    common = {**TINY, "recipe": recipe, "steps": 6, "images": None if recipe == "formula" else str(photos)}
    common |= strong if recipe in ("distil", "hybrid") else {}
    common |= {"encoder": f"hybrid:{strong['teacher']}"} if recipe == "hybrid" else {}
    common |= {"categories": 12, "prototypes": 8, "local_crops": 2}
    pretrain(PretrainConfig(**common, out=str(tmp_path / "whole")))
    first = PretrainConfig(**common, out=str(tmp_path / "parts"), stop_after=3)
    pretrain(first)
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["step"] == 3
    pretrain(first)
    whole = torch.load(tmp_path / "whole/last.pt", weights_only=True)
    parts = torch.load(tmp_path / "parts/last.pt", weights_only=True)
    assert whole["step"] == parts["step"] == 6
    assert whole["modules"].keys() == parts["modules"].keys()
    assert all(torch.equal(value, parts["modules"][key]) for key, value in whole["modules"].items())
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
def test_formula_learns_names(tmp_path, monkeypatch):
    monkeypatch.setattr("dmsa.pretrain.formula.NAMES_FIRST", 1.0)  # what comes then is another task with other losses
    torch.manual_seed(0)
    config = PretrainConfig(
        **{**TINY, "batch": 16, "log_every": 1}, categories=7, steps=160, lr=2e-3, out=str(tmp_path), seed=1
    )
    pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names, patches = ([line[key] for line in lines] for key in ("loss_class", "loss_patch"))
    assert np.mean(names[-20:]) < 0.97 * math.log(7)  # chance
    assert np.mean(patches[-20:]) < 0.7 * np.mean(patches[:5])


@pytest.mark.slow
def test_distillation_learns_the_network(photos, strong, tmp_path):
    config = PretrainConfig(
        **{**TINY, **strong, "log_every": 1, "batch": 8},
        recipe="distil",
        images=str(photos),
        steps=40,
        out=str(tmp_path),
    )
    pretrain(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("patch_cosine", "class_cosine"):
        assert abs(lines[0][name]) < 0.3
        assert np.mean([line[name] for line in lines[-5:]]) > lines[0][name] + 0.1


@pytest.mark.parametrize(
    ("name", "channels", "pooled"), [("test_resnet", 96, 96), ("test_vit", 64, 64), ("test_mambaout", 64, 256)]
)
def test_strong_network_of_any_layout(name, channels, pooled, tmp_path):
    path = tmp_path / "weights.pth"
    network = timm.create_model(name, pretrained=False).eval()
    torch.save(network.state_dict(), path)
    strong = load_network(name, path).train()
    images = torch.rand(2, 3, strong.size, strong.size)
    features, whole = strong.read(images)
    assert features.shape[:2] == (2, channels)
    assert features.shape[2] == features.shape[3]
    assert whole.shape == (2, pooled)
    if name == "test_resnet":
        torch.testing.assert_close(features.mean((2, 3)), whole)
        torch.testing.assert_close(network.get_classifier()(whole), network((images - strong.mean) / strong.std))


def test_hybrid_tells_what_it_attends_to_and_loads(photos, strong, tmp_path):
    name = f"hybrid:{strong['teacher']}"
    values = {**TINY, **strong, "encoder": name, "log_every": 1, "batch": 8, "size": 64}
    pretrain(PretrainConfig(**values, recipe="hybrid", images=str(photos), steps=60, out=str(tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for figure in ("whole_cosine", "moved_cosine"):
        assert np.mean([line[figure] for line in lines[-5:]]) > lines[0][figure] + 0.1
    assert np.mean([line["loss_attention"] for line in lines[-5:]]) < lines[0]["loss_attention"]
    encoder = build_encoder(name, tmp_path / "encoder.safetensors")
    network = load_network(strong["teacher"], strong["teacher_weights"])
    images = torch.rand(2, 3, 96, 64)
    found, top = encoder.vit.patch_embed.proj.network.maps(images)
    whole = network.network.forward_features((images - network.mean) / network.std)
    torch.testing.assert_close(top, whole, rtol=0.02, atol=0.02 * whole.std().item())  # weights are kept in 16 bits
    assert found.shape[2:] == (6, 4)
    patches, token = encoder(normalise(images))
    assert patches.shape == (2, 24, encoder.embed_dim)
    assert torch.isfinite(token).all()
    with pytest.raises(FileNotFoundError, match="recipe hybrid"):
        build_encoder(name)


def test_evidence_is_where_the_classifier_finds_much_away_from_the_border():
    logits = torch.zeros(1, 5, 5, 3)
    logits[0, 2, 3] = 4
    places = torch.tensor([1.0, 0.0]).expand(1, 5, 5, 2).clone()
    places[0, 2, 2] = torch.tensor([0.0, 1.0])
    found = evidence(places, logits)[0].view(5, 5)
    assert sorted(found.flatten().topk(2).indices.tolist()) == [12, 13]
    torch.testing.assert_close(found.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert torch.isfinite(evidence(torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 4))).all()


def test_any_timm_vit_and_the_saved_file_loads(tmp_path):
    from safetensors.torch import load_file

    config = PretrainConfig(**{**TINY, "encoder": "test_vit", "batch": 2}, categories=7, steps=1, out=str(tmp_path))
    pretrain(config)
    state = load_file(tmp_path / "encoder.safetensors")
    assert all(value.dtype == torch.float16 for value in state.values())
    build_backbone("test_vit", 32).load_state_dict(state)


@pytest.mark.parametrize("recipe", ["formula", "dino"])
def test_begins_with_given_weights(recipe, photos, tmp_path):
    """A step at a rate of nothing leaves them as they are, up to the file's 16 bits; training goes on from them."""
    from safetensors.torch import load_file

    shipped = load_file(WEIGHTS)
    config = {**TINY, "recipe": recipe, "steps": 1, "weight_decay": 0.0, "start": "shipped"}
    config |= {"images": str(photos)} if recipe == "dino" else {}
    pretrain(PretrainConfig(**config, lr=1e-12, out=str(tmp_path / "same")))
    same = load_file(tmp_path / "same" / "encoder.safetensors")
    assert same.keys() == shipped.keys()
    assert all(torch.allclose(same[key].float(), shipped[key].float(), atol=1e-3) for key in shipped)
    pretrain(PretrainConfig(**config, lr=1e-2, out=str(tmp_path / "on")))
    on = load_file(tmp_path / "on" / "encoder.safetensors")
    assert not any(torch.equal(on[key], shipped[key]) for key in shipped if key.endswith("attn.qkv.weight"))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    config = {**TINY, "batch": 2, "steps": 1, "out": str(tmp_path)}
    pretrain(PretrainConfig(**config, categories=7))
    with pytest.raises(ValueError, match=r"categories.*7, 8"):
        pretrain(PretrainConfig(**config, categories=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "dino"], "needs a folder of images"),
        (["--recipe", "dino", "--images", "{empty}"], "holds 0 images"),
        (["--recipe", "distil"], "'distil' needs a folder of images"),
        (["--recipe", "distil", "--images", "{photos}"], "needs a network of timm"),
        (["--recipe", "distil", "--images", "{photos}", "--teacher", "resnet51"], "network 'resnet51'"),
        (
            ["--recipe", "distil", "--images", "{photos}", "--teacher", "resnet18", "--teacher-weights", "no.pth"],
            "'no.pth' of 'resnet18' do not exist",
        ),
        (
            [
                "--recipe",
                "distil",
                "--images",
                "{photos}",
                "--teacher",
                "test_resnet",
                "--teacher-weights",
                "{weights}",
            ],
            "other weights than those of test_resnet",
        ),
        (["--encoder", "resnet18"], "encoder='resnet18'"),
        (["--start", "no.safetensors"], "no.safetensors does not exist"),
        (["--start", "shipped", "--encoder", "test_vit"], "another architecture than 'test_vit'"),
        (["--size", "30"], "multiple of the patch size"),
        (["--recipe", "hybrid", "--images", "{photos}"], "needs hybrid:NETWORK"),
        (["--recipe", "hybrid", "--images", "{photos}", "--encoder", "hybrid:resnet51"], "network 'resnet51'"),
        (["--recipe", "hybrid", "--images", "{photos}", "--encoder", "hybrid:test_vit"], "network 'test_vit'"),
        (["--steps", "0"], "steps=0"),
        (["--categories", "1"], "at least 2 categories"),
        (["--patch-weight", "-1"], "patch_weight=-1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, photos, strong, tmp_path, capsys):
    places = {"{empty}": str(tmp_path), "{photos}": str(photos), "{weights}": strong["teacher_weights"]}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--report-pictures", "0"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_super_categories_are_cocos():
    table = super_categories()
    names = {name: number for number, name in enumerate(data_table("coco80")["names"])}
    assert table[0] == 0
    assert table[255] == table[81] == 255
    assert set(table[1:81]) == set(range(1, 13))
    assert table[names["dog"]] == table[names["giraffe"]] != table[names["person"]]
    assert table[names["cup"]] == table[names["knife"]] != table[names["pizza"]]


def test_report_on_photographs(tmp_path, strong):
    for split in ("train2017", "val2017"):
        coco_root(tmp_path / "coco", split, images=6)
    images = str(tmp_path / "coco" / "train2017")
    values = {**TINY, **strong, "encoder": f"hybrid:{strong['teacher']}", "recipe": "hybrid", "size": 64, "steps": 1}
    report = pretrain(
        PretrainConfig(**values, images=images, report_root=str(tmp_path / "coco"), out=str(tmp_path / "run"))
    )
    for when in ("untrained_photos", "trained_photos"):
        assert report[when].keys() == {"probe_miou", "patch_kmeans_miou", "attention_auc", "attention_iou"}
        assert all(0 <= value <= 100 for value in report[when].values())
    assert report["trained_photos"] == json.loads((tmp_path / "run/report.json").read_text())["trained_photos"]


@pytest.mark.slow
def test_shipped_weights_are_small_and_better_than_none():
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size < 8e6
    torch.manual_seed(0)
    vit = build_backbone("shapes_vit_tiny", 64)
    untrained = measure(vit, **MEASURE)
    vit.load_state_dict(load_file(WEIGHTS))
    shipped = measure(vit, **MEASURE)
    assert shipped.probe_miou > untrained.probe_miou + 15
    assert shipped.patch_kmeans_miou > untrained.patch_kmeans_miou + 5
    assert shipped.crop_accuracy > untrained.crop_accuracy + 15
    assert shipped.attention_auc > 75
    assert (WEIGHTS.parent / "README.md").read_text().count("dmsa pretrain") >= 1
