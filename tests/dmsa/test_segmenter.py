"""Student, decoder and pyramid: what is trained, what is not, and equality with the plain backbone at the start."""

from __future__ import annotations

import pytest
import torch

from dmsa.config import LossConfig
from dmsa.models.aspp import AtrousPyramid
from dmsa.models.decoder import MaskTransformer
from dmsa.models.segmenter import Segmenter
from dmsa.training.losses import total_loss
from tests.dmsa.tiny import tiny_config, tiny_encoder


def tiny_segmenter(**options) -> Segmenter:
    torch.manual_seed(1)
    return Segmenter(tiny_config(**options), 5, tiny_encoder())


def step(segmenter: Segmenter, optimiser: torch.optim.Optimizer, rates=(1, 6, 12, 18)) -> None:
    torch.manual_seed(2)
    output = segmenter(torch.randn(2, 3, 48, 48), rates)
    label = torch.randint(0, 5, (2, 6, 6))
    terms = total_loss(output, label, torch.ones(2, 6, 6).bool(), LossConfig(), things_only=True, n_things=4)
    optimiser.zero_grad()
    terms["total"].backward()
    optimiser.step()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("aspp", ["mhsa", "neck", "off"])
def test_shapes_and_unit_class_tokens(aspp):
    segmenter = tiny_segmenter(aspp=aspp, aspp_image_pooling=True)
    output = segmenter(torch.randn(2, 3, 40, 56), (1, 3, 6, 9))
    assert output["logits"].shape == (2, 5, 5, 7)
    assert output["class_tokens"].shape == (2, 5, 48)
    torch.testing.assert_close(output["class_tokens"].norm(dim=-1), torch.ones(2, 5))
    # LayerNorm over classes at its initial weights
    torch.testing.assert_close(output["logits"].mean(1), torch.zeros(2, 5, 7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rates", [(1, 1, 2, 3), (1, 1, 3, 5), (1, 3, 6, 9), (1, 6, 12, 18)])
def test_with_gamma_zero_the_encoder_is_plain_dino_exactly(rates):
    segmenter = tiny_segmenter()
    encoder, images = segmenter.encoder, torch.randn(2, 3, 40, 56)
    patches, cls = encoder.tail(encoder.frozen(images), (5, 7), rates, segmenter.pyramid)
    with torch.no_grad():
        expected = encoder.vit.forward_features(images)
    assert torch.equal(patches, expected[:, 1:])
    assert torch.equal(cls, expected[:, 0])


def test_pyramid_refines_the_patches_and_bypasses_the_class_token():
    segmenter = tiny_segmenter()
    encoder, images = segmenter.encoder, torch.randn(2, 3, 48, 48)
    plain, plain_cls = encoder(images)
    with torch.no_grad():
        segmenter.pyramid.gamma.fill_(0.5)
    attended = encoder.features(images)
    patches, cls = encoder.tail(attended, (6, 6), (1, 1, 2, 3), segmenter.pyramid)
    assert not torch.allclose(patches, plain)
    torch.testing.assert_close(cls, plain_cls)
    other, _ = encoder.tail(attended, (6, 6), (1, 1, 3, 5), segmenter.pyramid)
    assert not torch.allclose(patches, other)
    # x + y + gamma ASPP(y), then the rest of the block, by hand
    y = attended.output
    maps = segmenter.pyramid.aspp(y[:, 1:].transpose(1, 2).unflatten(2, (6, 6)), (1, 1, 2, 3))
    x = attended.tokens[:, 1:] + y[:, 1:] + 0.5 * maps.flatten(2).transpose(1, 2)
    block = encoder.vit.blocks[-1]
    torch.testing.assert_close(patches, encoder.vit.norm(x + block.mlp(block.norm2(x))))


def test_first_rate_is_inert():
    pyramid = AtrousPyramid(8)
    with torch.no_grad():
        pyramid.gamma.fill_(1)
    tokens = torch.randn(1, 12, 8)
    torch.testing.assert_close(pyramid(tokens, (3, 4), (1, 1, 2, 3)), pyramid(tokens, (3, 4), (9, 1, 2, 3)))


@pytest.mark.parametrize("aspp", ["mhsa", "neck"])
def test_training_changes_pyramid_and_decoder_and_nothing_else(aspp):
    segmenter = tiny_segmenter(aspp=aspp).train()
    encoder = {key: value.clone() for key, value in segmenter.encoder.state_dict().items()}
    start = segmenter.trainable_state()
    optimiser = torch.optim.Adam(segmenter.trainable_parameters().values(), lr=1e-2)
    step(segmenter, optimiser)
    first = segmenter.trainable_state()
    # with gamma 0 no gradient reaches the pyramid's weights: gamma moves first
    assert "pyramid.gamma" in changed(start, first)
    assert any(key.startswith("decoder.") for key in changed(start, first))
    step(segmenter, optimiser)
    second = segmenter.trainable_state()
    everything = {key for key in start if key.startswith("pyramid.")}
    assert changed(first, second) >= everything
    assert changed(encoder, segmenter.encoder.state_dict()) == set()
    assert not any(name.startswith("encoder.") for name in segmenter.trainable_parameters())
    assert len(segmenter.trainable_parameters()) == len(list(segmenter.pyramid.parameters())) + len(
        list(segmenter.decoder.parameters())
    )


def test_frozen_features_are_computed_once_and_shared():
    segmenter = tiny_segmenter().eval()
    images = torch.randn(2, 3, 48, 48)
    expected = segmenter(images, (1, 1, 3, 5))["logits"]
    calls = []
    segmenter.encoder.vit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    shared = segmenter.encoder.features(images)
    assert torch.equal(segmenter(None, (1, 1, 3, 5), frozen=shared)["logits"], expected)
    torch.testing.assert_close(segmenter.twin()(None, (1, 1, 3, 5), frozen=shared)["logits"], expected)
    assert calls == [1]
    tokens = segmenter.encoder.frozen(images)
    assert torch.equal(segmenter.from_frozen(tokens, (6, 6), (1, 1, 3, 5))["logits"], expected)
    with pytest.raises(ValueError, match="images is None"):
        segmenter(None)


def test_twin_shares_the_encoder_and_nothing_else():
    segmenter = tiny_segmenter()
    twin = segmenter.twin()
    assert twin.encoder is segmenter.encoder
    assert not twin.trainable_parameters()
    assert not twin.training
    own = {parameter.data_ptr() for parameter in segmenter.decoder.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in twin.decoder.parameters())
    assert segmenter.trainable_parameters()


def test_trainable_state_round_trips_and_refuses_others():
    source, target = tiny_segmenter(), Segmenter(tiny_config(), 5, tiny_encoder())
    target.load_trainable_state(source.trainable_state())
    assert changed(source.trainable_state(), target.trainable_state()) == set()
    with pytest.raises(ValueError, match=r"missing pyramid\.gamma"):
        target.load_trainable_state(tiny_segmenter(aspp="off").trainable_state())
    with pytest.raises(ValueError, match=r"class_tokens is \(4, 48\), expected \(5, 48\)"):
        target.load_trainable_state(Segmenter(tiny_config(), 4, tiny_encoder()).trainable_state())


def test_class_tokens_start_orthogonal():
    tokens = MaskTransformer(7, 48, heads=3).class_tokens
    torch.testing.assert_close(tokens @ tokens.T, torch.eye(7), atol=1e-5, rtol=0)


def test_bf16_autocast_trains():
    segmenter = tiny_segmenter().train()
    optimiser = torch.optim.Adam(segmenter.trainable_parameters().values(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        step(segmenter, optimiser)
        step(segmenter, optimiser)
    assert all(value.isfinite().all() for value in segmenter.trainable_state().values())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads=7 does not divide the encoder's width 48"):
        Segmenter(tiny_config(decoder_heads=7), 5, tiny_encoder())
    with pytest.raises(ValueError, match="num_classes=0"):
        Segmenter(tiny_config(), 0, tiny_encoder())
    with pytest.raises(ValueError, match=r"config\.aspp='inside'"):
        Segmenter(tiny_config(aspp="inside"), 5, tiny_encoder())
