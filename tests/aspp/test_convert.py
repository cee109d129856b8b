"""Filters of the separable ASPP heads in use: their key names, their shapes, and what the operator makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmsa_kernels import DepthwiseASPP, multi_dilation_dwconv
from dmsa_kernels.aspp.convert import depthwise_from_head, depthwise_to_head


def norm(channels):
    return {"weight": (channels,), "bias": (channels,), "running_mean": (channels,), "running_var": (channels,)}


def entries(prefix, parts):
    return {f"{prefix}{name}": shape for name, shape in parts.items()}


def mmseg_head(channels, width, prefix):
    """The atrous pyramid of mmseg's separable head: ConvModules, one 1 x 1 and three separable."""
    keys = entries(prefix, {"aspp_modules.0.conv.weight": (width, channels, 1, 1)})
    for r in (1, 2, 3):
        for part, shape, out in (
            ("depthwise_conv", (channels, 1, 3, 3), channels),
            ("pointwise_conv", (width, channels, 1, 1), width),
        ):
            keys |= entries(f"{prefix}aspp_modules.{r}.{part}.", {"conv.weight": shape})
            keys |= entries(f"{prefix}aspp_modules.{r}.{part}.bn.", norm(out))
    # Separable too, but no branch of the pyramid.
    return keys | {f"{prefix}bottleneck.depthwise_conv.conv.weight": (4 * width, 1, 3, 3)}


def sequential_head(channels, width, prefix, depthwise, pointwise):
    """The atrous pyramid of torchvision's naming: ``convs``, each a sequence whose first entry is separable."""
    keys = entries(prefix, {"convs.0.0.weight": (width, channels, 1, 1)}) | entries(f"{prefix}convs.0.1.", norm(width))
    for r in (1, 2, 3):
        keys |= entries(
            f"{prefix}convs.{r}.0.", {depthwise: (channels, 1, 3, 3), pointwise: (width, channels, 1, 1)}
        ) | entries(f"{prefix}convs.{r}.1.", norm(width))
    return keys | entries(
        prefix, {"convs.4.1.weight": (width, channels, 1, 1), "project.0.weight": (width, width, 1, 1)}
    )


# style, prefix in the whole model, shapes, a depthwise key as the public code spells it
HEADS = {
    "mmseg DeepLabV3+": ("mmseg", "decode_head.", mmseg_head(2048, 512, "decode_head.")),
    "DAFormer": ("mmseg", "decode_head.fuse_layer.", mmseg_head(1024, 256, "decode_head.fuse_layer.")),
    "smp DeepLabV3Plus": (
        "segmentation_models_pytorch",
        "decoder.aspp.0.",
        sequential_head(2048, 256, "decoder.aspp.0.", "0.weight", "1.weight"),
    ),
    "smp DeepLabV3, separable": (
        "segmentation_models_pytorch",
        "decoder.aspp.",
        sequential_head(512, 256, "decoder.aspp.", "0.weight", "1.weight"),
    ),
    "torchvision names, separable": (
        "torchvision",
        "classifier.aspp.",
        sequential_head(2048, 256, "classifier.aspp.", "body.0.weight", "body.1.weight"),
    ),
}
DEPTHWISE_KEYS = {
    "mmseg DeepLabV3+": "decode_head.aspp_modules.2.depthwise_conv.conv.weight",
    "DAFormer": "decode_head.fuse_layer.aspp_modules.2.depthwise_conv.conv.weight",
    "smp DeepLabV3Plus": "decoder.aspp.0.convs.2.0.0.weight",
    "smp DeepLabV3, separable": "decoder.aspp.convs.2.0.0.weight",
    "torchvision names, separable": "classifier.aspp.convs.2.0.body.0.weight",
}


@pytest.mark.parametrize("head", HEADS)
def test_filters_of_heads_load_and_save(head):
    style, prefix, shapes = HEADS[head]
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    channels = state[DEPTHWISE_KEYS[head]].shape[0]
    module = DepthwiseASPP(channels, 4, (6, 12, 18))
    with torch.no_grad():
        module.weight.copy_(depthwise_from_head(state, style))
    assert torch.equal(module.weight, depthwise_from_head(state, style, prefix))
    assert torch.equal(module.weight[1], state[DEPTHWISE_KEYS[head]][:, 0])
    saved = depthwise_to_head(module.weight, style, prefix)
    assert len(saved) == 3
    for key, value in saved.items():
        assert torch.equal(value, state[key]), key


def test_the_operator_replaces_the_depthwise_convolutions_of_a_head():
    channels, rates = 6, (2, 5, 9)
    convs = nn.ModuleList([nn.Conv2d(channels, 4, 1, bias=False)])
    for rate in rates:
        depthwise = nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False)
        convs.append(nn.Sequential(nn.Sequential(depthwise, nn.Conv2d(channels, 4, 1, bias=False))))
    head = nn.ModuleDict({"convs": convs})
    weight = depthwise_from_head(head.state_dict(), "segmentation_models_pytorch", "")
    x = torch.randn(2, channels, 12, 11)
    y = multi_dilation_dwconv(x, weight, rates)
    for r in range(3):
        torch.testing.assert_close(convs[r + 1][0][1](y[:, r]), convs[r + 1](x), rtol=1e-5, atol=1e-5)
    missing, unexpected = head.load_state_dict(
        depthwise_to_head(2 * weight, "segmentation_models_pytorch"), strict=False
    )
    assert not unexpected
    assert all("convs.0." in key or key.endswith(".0.1.weight") for key in missing)
    torch.testing.assert_close(convs[2][0][0](x), 2 * y[:, 1], rtol=1e-5, atol=1e-5)


def test_a_head_whose_first_branch_is_atrous():
    weight = torch.randn(4, 3, 3, 3)
    saved = depthwise_to_head(weight, "mmseg", first=0)
    assert "aspp_modules.0.depthwise_conv.conv.weight" in saved
    assert torch.equal(depthwise_from_head(saved, "mmseg"), weight)


def test_a_pattern_of_ones_own_and_more_than_ten_branches():
    weight = torch.randn(12, 3, 5, 5)
    saved = depthwise_to_head(weight, "branches.{}.dw.weight", "model.")
    assert "model.branches.12.dw.weight" in saved
    assert torch.equal(depthwise_from_head(saved, "branches.{}.dw.weight"), weight)


def test_of_several_heads_one_must_be_chosen():
    student, teacher = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    state = depthwise_to_head(student, "mmseg", "model.") | depthwise_to_head(teacher, "mmseg", "ema_model.")
    with pytest.raises(ValueError, match=r"ema_model\."):
        depthwise_from_head(state, "mmseg")
    assert torch.equal(depthwise_from_head(state, "mmseg", "model."), student)


@pytest.mark.parametrize(
    ("style", "key"),
    [
        ("segmentation_models_pytorch", "decoder.aspp.convs.1.0.weight"),
        ("mmseg", "decode_head.aspp_modules.1.conv.weight"),
        ("torchvision", "classifier.classifier.0.convs.1.0.weight"),
    ],
)
def test_a_head_of_full_convolutions_is_not_separable(style, key):
    state = {key.replace(".1.", ".0.", 1): torch.zeros(4, 6, 1, 1), key: torch.zeros(4, 6, 3, 3)}
    with pytest.raises(ValueError, match=r"full convolutions \('.*' is \[4, 6, 3, 3\]\): the head is not separable"):
        depthwise_from_head(state, style)


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="style"):
        depthwise_from_head({}, "detectron")
    with pytest.raises(ValueError, match="aspp_modules"):
        depthwise_from_head({"a": torch.zeros(1)}, "mmseg")
    with pytest.raises(ValueError, match="no 'convs"):  # torchvision's own head is not separable
        depthwise_from_head({"classifier.0.convs.1.0.weight": torch.zeros(256, 2048, 3, 3)}, "torchvision")
    with pytest.raises(ValueError, match="depthwise"):
        depthwise_from_head({"convs.1.0.weight": torch.zeros(256, 2048, 3, 3)}, "convs.{}.0.weight")
    with pytest.raises(ValueError, match="branch 2"):
        depthwise_from_head({"b.1.w": torch.zeros(4, 1, 3, 3), "b.2.w": torch.zeros(5, 1, 3, 3)}, "b.{}.w")
    with pytest.raises(ValueError, match="weight"):
        depthwise_to_head(torch.zeros(3, 3), "mmseg")
    with pytest.raises(ValueError, match="first"):
        depthwise_to_head(torch.zeros(1, 3, 3, 3), "mmseg", first=-1)
