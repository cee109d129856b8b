"""The depthwise filters of the separable ASPP heads in use, to and from ``weight`` ``[R, C, k, k]``.

An atrous branch of such a head is a depthwise convolution, then a pointwise one, norm and activation of its own; mmseg
also has a norm and an activation between the two. :class:`DepthwiseASPP` projects all depthwise outputs at once and has
nothing in between, so that only the filters map one to one: branch r of ``weight`` is a head's ``[C, 1, k, k]``. The
rest of the head (pointwise convolutions, norms, the 1 x 1 and the pooling branch) stays where it is, and
:func:`multi_dilation_dwconv` replaces its R depthwise convolutions.

Names read off open-mmlab/mmsegmentation ``mmseg/models/decode_heads/sep_aspp_head.py`` with open-mmlab/mmcv
``mmcv/cnn/bricks/depthwise_separable_conv_module.py``, qubvel-org/segmentation_models.pytorch
``segmentation_models_pytorch/decoders/deeplabv3/decoder.py`` and VainF/DeepLabV3Plus-Pytorch ``network/_deeplab.py``
(torchvision's names, 3 x 3 convolutions made separable; torchvision's own heads are not). No convolution has a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# The name of a branch's depthwise filters inside its head; {} is the branch's place among all branches, of which the
# first is the 1 x 1 in every head here.
HEAD_KEYS = {
    "mmseg": "aspp_modules.{}.depthwise_conv.conv.weight",
    "segmentation_models_pytorch": "convs.{}.0.0.weight",
    "torchvision": "convs.{}.0.body.0.weight",
}


def depthwise_from_head(state: Mapping[str, Tensor], style: str, prefix: str | None = None) -> Tensor:
    """Return the depthwise filters ``[R, C, k, k]`` of a separable ASPP head, its atrous branches in their order.

    Args:
        state: the head's or the whole model's state dict.
        style: ``"mmseg"`` (``DepthwiseSeparableASPPHead``, DAFormer's and HRDA's heads),
            ``"segmentation_models_pytorch"`` (``DeepLabV3Plus``, and ``DeepLabV3`` with separable branches),
            ``"torchvision"`` (its DeepLab names with separable convolutions), or a pattern of one's own with ``{}`` for
            the branch, such as ``"branches.{}.depthwise.weight"``.
        prefix: what stands before these names, such as ``"decode_head."``, ``"decode_head.fuse_layer."`` (DAFormer),
            ``"decoder.aspp.0."``, ``"decoder.aspp."``, ``"classifier.aspp."``; ``None`` finds it if there is one head.

    Raises:
        ValueError: ``style`` is unknown, no branch or several heads are found, the head is not separable, or a branch
            is not depthwise or has another shape than the first.
    """
    name = re.escape(_pattern(style)).replace(r"\{\}", r"(\d+)")
    before = r"((?:.*\.)?)" if prefix is None else f"({re.escape(prefix)})"
    heads: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(before + name, key)
        if match:
            heads.setdefault(match[1], {})[int(match[2])] = value
    if not heads:
        wanted = ("" if prefix is None else prefix) + _pattern(style)
        full = _full_branch(state, style, before)
        if full is not None:
            raise ValueError(
                f"{style=}, {prefix=}: no {wanted!r} in the state dict; its branches are full convolutions"
                f" ({full!r} is {list(state[full].shape)}): the head is not separable, and has no depthwise filters"
            )
        raise ValueError(f"{style=}, {prefix=}: no {wanted!r} in the state dict; keys: {sorted(state)[:5]}")
    if len(heads) > 1:
        raise ValueError(f"{style=}: several heads in the state dict, choose one by prefix: {sorted(heads)}")
    (filters,) = heads.values()
    first = filters[min(filters)]
    for place, value in filters.items():
        if value.dim() != 4 or value.shape[1] != 1 or value.shape != first.shape:
            raise ValueError(
                f"branch {place}: {value.shape=}, expected depthwise filters [C, 1, k, k], alike in all branches"
            )
    return torch.stack([filters[place][:, 0] for place in sorted(filters)])


def depthwise_to_head(weight: Tensor, style: str, prefix: str = "", first: int = 1) -> dict[str, Tensor]:
    """Return the entries of a head's state dict that hold the depthwise filters ``weight`` ``[R, C, k, k]``.

    Load them with ``head.load_state_dict(entries, strict=False)``.

    Args:
        weight: ``[R, C, k, k]``.
        style: as in :func:`depthwise_from_head`.
        prefix: what stands before the names.
        first: the place of the first atrous branch among the head's: 1 behind a 1 x 1 branch, 0 without one.

    Raises:
        ValueError: ``style`` is unknown, ``weight`` is not ``[R, C, k, k]`` or ``first`` is negative.
    """
    pattern = _pattern(style)
    if weight.dim() != 4:
        raise ValueError(f"{weight.shape=}, expected [R, C, k, k]")
    if first < 0:
        raise ValueError(f"{first=}, expected at least 0")
    return {
        prefix + pattern.replace("{}", str(place)): value.unsqueeze(1).clone()
        for place, value in enumerate(weight.detach(), start=first)
    }


def _full_branch(state: Mapping[str, Tensor], style: str, before: str) -> str | None:
    """Return the key of a branch's full k x k convolution, where the depthwise one would be in a separable head."""
    branches = re.escape(_pattern(style).split("{}")[0])
    for key, value in sorted(state.items()):
        inside = re.match(before + branches + r"\d+\.", key)
        if inside and value.dim() == 4 and value.shape[1] > 1 and value.shape[2] > 1:
            return key
    return None


def _pattern(style: str) -> str:
    if style not in HEAD_KEYS and style.count("{}") != 1:
        raise ValueError(f"{style=} is not one of {', '.join(HEAD_KEYS)}, nor a pattern with one {{}}")
    return HEAD_KEYS.get(style, style)
