"""The frozen backbone: equal to plain timm, whatever the ViT, and loaded from every kind of file."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from dmsa.models.encoder import DINO_FILES, Encoder, build_encoder, load_weights
from tests.dmsa.tiny import tiny_encoder, tiny_vit

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "transfgu_attention_cam.npz"
KINDS = {  # ViTs that differ in what surrounds the class-token attention
    "plain": {},
    "registers": {"reg_tokens": 2},
    "layer_scale": {"init_values": 0.5},
    "no_qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
}


def joined(encoder: Encoder, images: torch.Tensor, **options) -> torch.Tensor:
    patches, cls = encoder.tail(encoder.frozen(images), encoder.grid(images), **options)
    return torch.cat([cls[:, None], patches], dim=1)


def test_tokens_and_attention_rows_equal_golden():
    with np.load(GOLDEN) as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    encoder = tiny_encoder(dynamic_img_size=False)
    encoder.vit.load_state_dict({key[6:]: value for key, value in golden.items() if key.startswith("state/")})
    torch.testing.assert_close(joined(encoder, golden["image"]), golden["tokens"], atol=1e-5, rtol=1e-5)
    rows = encoder.attention(encoder.frozen(golden["image"]), encoder.grid(golden["image"]))
    torch.testing.assert_close(rows, golden["cls_attention"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [(48, 48), (40, 64), (8, 8)])
def test_split_backbone_is_bit_equal_to_timm(kind, fused, size):
    vit = tiny_vit(**KINDS[kind])
    for block in vit.blocks:
        block.attn.fused_attn = fused
    encoder = Encoder(vit)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = vit.forward_features(images)
    patches, cls = encoder(images)
    assert torch.equal(patches, expected[:, vit.num_prefix_tokens :])
    assert torch.equal(cls, expected[:, 0])


def test_encoder_stays_frozen_and_in_eval_mode():
    encoder = tiny_encoder(proj_drop_rate=0.5, attn_drop_rate=0.5)
    encoder.train()
    images = torch.randn(1, 3, 48, 48, requires_grad=True)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not joined(encoder, images).requires_grad
    assert torch.equal(joined(encoder, images), joined(encoder, images))


@pytest.mark.parametrize("name", [*DINO_FILES, "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_named_backbones_build_and_run(name):
    encoder = build_encoder(name, "random")
    side = 2 * encoder.patch_size
    patches, cls = encoder(torch.randn(1, 3, side, side))
    assert patches.shape == (1, 4, encoder.embed_dim)
    assert cls.shape == (1, encoder.embed_dim)
    assert encoder.depth == 12


def test_bf16_autocast_and_compile_of_the_frozen_part():
    encoder = tiny_encoder()
    images = torch.randn(2, 3, 48, 48)
    exact = encoder.frozen(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = joined(encoder, images)
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), joined(encoder, images), atol=0.1, rtol=0.1)
    encoder.compile_frozen(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(encoder.frozen(images), exact)


def test_images_of_the_wrong_size_are_named():
    encoder = tiny_encoder()
    for shape in [(3, 48, 48), (1, 1, 48, 48), (1, 3, 44, 48), (1, 3, 0, 48)]:
        with pytest.raises(ValueError, match=r"images\.shape"):
            encoder.frozen(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"tokens\.shape"):
        encoder.attend(torch.zeros(1, 30, 48), (6, 6))
    with pytest.raises(ValueError, match="output=False"):
        encoder.tail(encoder.features(torch.zeros(1, 3, 48, 48), output=False), (6, 6))


def test_models_without_class_token_attention_are_refused():
    with pytest.raises(TypeError, match="ResNet"):
        Encoder(timm.create_model("resnet18"))
    with pytest.raises(TypeError, match="class token"):
        tiny_encoder(class_token=False, global_pool="avg")
    with pytest.raises(TypeError, match="DiffAttention"):
        tiny_encoder(attn_layer="diff", num_heads=4)
    with pytest.raises(ValueError, match=r"vit_small_patch8_224\.dino"):
        build_encoder("vit_small_patch8_224.dinoo", "random")


def dino_files(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, Path]:
    """The same weights in every form they are passed around in."""
    paths = {kind: folder / f"{kind}.pth" for kind in ("plain", "teacher", "state_dict")}
    torch.save(state, paths["plain"])
    prefixed = {f"module.backbone.{key}": value for key, value in state.items()}
    heads = {"module.head.mlp.0.weight": torch.zeros(3, 3)}
    arguments = argparse.Namespace(arch="vit_small", lr=0.1)
    torch.save({"teacher": prefixed | heads, "student": {}, "epoch": 3, "args": arguments}, paths["teacher"])
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in state.items()}}, paths["state_dict"])
    paths["safetensors"] = folder / "weights.safetensors"
    save_file({**state, "head.weight": torch.zeros(2, 2)}, paths["safetensors"])
    return paths


def test_weights_load_from_every_kind_of_file(tmp_path):
    source = tiny_vit()
    for kind, path in dino_files(tmp_path, source.state_dict()).items():
        encoder = Encoder(tiny_vit(init_values=None))
        with torch.no_grad():
            encoder.vit.norm.weight.zero_()
        load_weights(encoder, path)
        for key, value in source.state_dict().items():
            assert torch.equal(encoder.vit.state_dict()[key], value), (kind, key)


def test_weights_of_another_image_size_are_resampled(tmp_path):
    torch.save(tiny_vit(img_size=96).state_dict(), tmp_path / "large.pth")
    encoder = tiny_encoder()
    load_weights(encoder, tmp_path / "large.pth")
    assert encoder.vit.pos_embed.shape == (1, 37, 48)


def test_weights_of_another_architecture_list_the_first_differing_keys(tmp_path):
    torch.save(tiny_vit(embed_dim=24).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"keys differ, first cls_token is \(1, 1, 24\), expected \(1, 1, 48\)"):
        load_weights(tiny_encoder(), tmp_path / "narrow.pth")
    torch.save(tiny_vit(depth=2).state_dict(), tmp_path / "shallow.pth")
    with pytest.raises(ValueError, match=r"first missing blocks\.2\.norm1\.weight"):
        load_weights(tiny_encoder(), tmp_path / "shallow.pth")
    torch.save(tiny_vit(depth=4).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"first unexpected blocks\.3\.norm1\.weight"):
        load_weights(tiny_encoder(), tmp_path / "deep.pth")


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_files_that_are_no_checkpoint_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, I am not a safetensors file")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weights": Payload()}, tmp_path / "evil.pth")
    for name in ("text.pth", "text.safetensors", "list.pth", "evil.pth"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_weights(tiny_encoder(), tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_missing_weights_say_what_to_download_and_where_to_put_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"dino_deitsmall8_pretrain\.pth.*--model\.weights"):
        build_encoder("vit_small_patch8_224.dino", tmp_path / "absent.pth")

    def offline(name, pretrained, **options):
        if pretrained:
            raise OSError("no network")
        return tiny_vit()

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"dino_vitbase16_pretrain\.pth(?s:.)*no network"):
        build_encoder("vit_base_patch16_224.dino")
    with pytest.raises(FileNotFoundError, match="model's page"):
        build_encoder("vit_tiny_patch16_224")


def test_weights_from_the_hub_are_loaded(monkeypatch):
    hub = tiny_vit(init_values=0.5)
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **_: hub if pretrained else tiny_vit(init_values=1)
    )
    encoder = build_encoder("vit_small_patch8_224.dino")
    assert torch.equal(encoder.vit.blocks[0].ls1.gamma, hub.blocks[0].ls1.gamma)


def test_shipped_backbone_builds_by_name_and_says_what_is_missing(tmp_path):
    encoder = build_encoder("shapes_vit_tiny", "random")
    patches, _ = encoder(torch.randn(1, 3, 24, 32))
    assert patches.shape == (1, 12, encoder.embed_dim)
    with pytest.raises(FileNotFoundError, match="ship with the package"):
        build_encoder("shapes_vit_tiny", tmp_path / "absent.safetensors")
