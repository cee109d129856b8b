"""The class activation map: golden arrays, the per-class autograd loop, and where it degenerates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmsa.labels.cam import (
    CAMS,
    attention_gradient_cam,
    carries_mass,
    class_attention_gradient,
    feature_cam,
    single_patch_cam,
)
from dmsa.models.encoder import Encoder
from tests.dmsa.test_encoder import GOLDEN, KINDS
from tests.dmsa.tiny import tiny_encoder, tiny_vit


def gradient_loop(vit, images, centroids, prefix):
    """One backward pass per class and image through a plain ViT, by the definition. Returns row and gradient."""
    seen = {}

    def attention(module, x):
        batch, length, _ = x.shape
        qkv = module.qkv(x).reshape(batch, length, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = module.q_norm(query), module.k_norm(key)
        weights = (query @ key.transpose(-2, -1) * module.scale).softmax(-1)
        weights.retain_grad()
        seen["weights"] = weights
        return module.proj((weights @ value).transpose(1, 2).flatten(2))

    block = vit.blocks[-1]
    vit.requires_grad_(True)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for other in vit.blocks[:-1]:
        x = other(x)
    x = x + block.ls1(attention(block.attn, block.norm1(x)))
    cls = vit.norm(x + block.ls2(block.mlp(block.norm2(x))))[:, 0]
    gradients = []
    for centroid in centroids:
        seen["weights"].grad = None
        F.cosine_similarity(cls, centroid[None]).sum().backward(retain_graph=True)
        gradients.append(seen["weights"].grad.mean(1)[:, 0, prefix:])
    return seen["weights"].detach().mean(1)[:, 0, prefix:], torch.stack(gradients, 1)


def map_loop(row, gradients):
    """The formula, class by class and image by image."""
    maps = torch.zeros_like(gradients)
    for b in range(gradients.shape[0]):
        for k in range(gradients.shape[1]):
            positive = gradients[b, k].clamp(min=0)
            order = positive.argsort()
            below = positive[order].cumsum(0) / positive.sum()
            kept = torch.zeros_like(positive)
            for place, index in enumerate(order):
                if below[place] > 1 - 0.8:
                    kept[index] = positive[index]
            maps[b, k] = (row[b] / row[b].max() + kept) * (gradients[b, k] >= 0)
    return maps


def test_cam_equals_golden():
    with np.load(GOLDEN) as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    vit = tiny_vit(dynamic_img_size=False)
    vit.load_state_dict({key[6:]: value for key, value in golden.items() if key.startswith("state/")})
    cam = attention_gradient_cam(vit, golden["image"], golden["centroids"], batch_parity=True)
    torch.testing.assert_close(cam, golden["cam"], atol=1e-5, rtol=1e-5)
    ours = attention_gradient_cam(vit, golden["image"], golden["centroids"])
    alone = torch.cat([attention_gradient_cam(vit, image[None], golden["centroids"]) for image in golden["image"]])
    torch.testing.assert_close(ours, alone)
    assert not torch.allclose(ours, golden["cam"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_equals_the_autograd_loop(kind):
    vit = tiny_vit(**KINDS[kind]).double()
    encoder = Encoder(vit)
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    centroids = 3 * torch.randn(5, 48, dtype=torch.float64)
    prefix = encoder.num_prefix_tokens
    attended = encoder.features(images, output=False)
    gradient = class_attention_gradient(encoder, attended, centroids)[..., prefix:]
    cam = attention_gradient_cam(encoder, attended, centroids)
    row, expected = gradient_loop(vit, images, centroids, prefix)
    assert (gradient - expected).abs().max() < 1e-14
    assert (cam.flatten(2) - map_loop(row, expected)).abs().max() < 1e-14
    assert cam.dtype == torch.float64
    assert cam.shape == (2, 5, 5, 7)


def test_shared_features_give_the_same_maps():
    encoder, images, centroids = tiny_encoder(), torch.randn(2, 3, 48, 48), torch.randn(4, 48)
    shared = encoder.features(images)
    for cam in CAMS.values():
        torch.testing.assert_close(cam(encoder, shared, centroids), cam(encoder, images, centroids))


def test_feature_cam_is_the_rectified_cosine():
    encoder, images, centroids = tiny_encoder(), torch.randn(2, 3, 48, 48), torch.randn(4, 48)
    patches, _ = encoder(images)
    expected = F.cosine_similarity(patches[:, None], centroids[None, :, None], dim=-1).relu()
    torch.testing.assert_close(feature_cam(encoder, images, centroids).flatten(2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_single_patch_cam_moves_all_attention_to_one_patch(kind):
    encoder, images, centroids = Encoder(tiny_vit(**KINDS[kind])), torch.randn(2, 3, 40, 56), torch.randn(5, 48)
    attended, prefix = encoder.features(images), encoder.num_prefix_tokens
    row = attended.attention[..., prefix:].mean(1)  # [B, N]
    maps = single_patch_cam(encoder, images, centroids)
    assert maps.shape == (2, 5, 5, 7)
    for patch in (0, 17, 34):
        moved = torch.zeros_like(attended.attention)
        moved[..., prefix + patch] = 1
        token = encoder.class_token(attended, (moved.unsqueeze(2) @ attended.values).flatten(1))  # [B, D]
        cosine = F.cosine_similarity(token[:, None], centroids[None], dim=-1).relu()
        expected = cosine * (row[:, patch] / row.amax(1))[:, None]
        torch.testing.assert_close(maps.flatten(2)[..., patch], expected)
    assert not maps.requires_grad
    assert maps.max() > 0


@pytest.mark.parametrize("make", CAMS.values(), ids=CAMS)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "autocast features only"])
def test_cam_under_every_mode(mode, make):
    encoder, images, centroids = tiny_encoder(), torch.randn(2, 3, 48, 48), torch.randn(4, 48)
    expected = make(encoder, images, centroids)
    context = torch.autocast("cpu", torch.bfloat16) if "autocast" in mode else getattr(torch, mode)()
    with context:
        cam = encoder.features(images) if mode == "autocast features only" else make(encoder, images, centroids)
    if mode == "autocast features only":
        cam = make(encoder, cam, centroids)
    assert not cam.requires_grad
    assert cam.dtype == torch.float32
    # bf16 tokens may move a value across the threshold or the sign: compare what both kept
    both = (cam > 0) & (expected > 0)
    assert both.sum() > 0.9 * (expected > 0).sum()
    tolerance = 0.1 if "autocast" in mode else 1e-6
    torch.testing.assert_close(cam[both], expected[both], atol=tolerance, rtol=tolerance)


def test_cam_leaves_no_trace():
    encoder, images = tiny_encoder(), torch.randn(1, 3, 48, 48, requires_grad=True)
    centroids = torch.randn(4, 48, requires_grad=True)
    assert not attention_gradient_cam(encoder, images, centroids).requires_grad
    assert images.grad is None
    assert centroids.grad is None
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_degenerate_centroids_and_batches():
    encoder, images = tiny_encoder(), torch.randn(2, 3, 48, 48)
    zero = attention_gradient_cam(encoder, images, torch.zeros(3, 48))
    assert zero.isfinite().all()
    assert attention_gradient_cam(encoder, images, torch.zeros(0, 48)).shape == (2, 0, 6, 6)
    assert attention_gradient_cam(encoder, images[:0], torch.randn(3, 48)).shape == (0, 3, 6, 6)
    # a centroid along the class token itself has gradient zero up to rounding
    _, cls = encoder(images[:1])
    assert attention_gradient_cam(encoder, images[:1], cls).isfinite().all()
    # a class token of length zero, and a class token that attends to nothing but itself
    with torch.no_grad():
        encoder.vit.norm.weight.zero_()
        encoder.vit.norm.bias.zero_()
    assert attention_gradient_cam(encoder, images, torch.randn(3, 48)).isfinite().all()
    encoder, tokens = tiny_encoder(), torch.zeros(1, 37, 48)
    attended = encoder.attend(tokens, (6, 6))
    alone = F.one_hot(torch.zeros(1, 3, dtype=torch.long), 37).float()
    assert attention_gradient_cam(encoder, replace(attended, attention=alone), torch.randn(3, 48)).isfinite().all()
    with pytest.raises(ValueError, match=r"centroids\.shape"):
        attention_gradient_cam(encoder, images, torch.randn(3, 47))


def test_carries_mass_keeps_the_largest_entries():
    evidence = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert carries_mass(evidence, 0.8).tolist() == [[True, False, True, True], [False] * 4]
    assert carries_mass(evidence, 0.75)[0].tolist() == [True, False, True, True]
    assert carries_mass(evidence, 0.65)[0].tolist() == [True, False, True, False]
