"""State dicts of the separable ASPP heads in use, to and from :class:`DepthwiseASPP`.

A separable atrous branch of those heads is a depthwise convolution followed by a pointwise one, each with its own norm
and activation; `DepthwiseASPP` projects all depthwise outputs at once. What maps one to one is therefore the depthwise
filters: branch r of ``weight`` ``[R, C, k, k]`` is the head's ``[C, 1, k, k]``. The rest of such a head (pointwise
convolutions, norms, the 1 x 1 and the pooling branch) stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Names of the depthwise filters of atrous branch r = 0, 1, 2: the heads list their 1 x 1 branch first.
HEAD_KEYS = {
    "mmseg": "aspp_modules.{}.depthwise_conv.conv.weight",
    "segmentation_models_pytorch": "aspp.0.convs.{}.0.0.weight",
    "torchvision": "classifier.0.convs.{}.0.weight",
}
_MAX_BRANCHES = 64


def depthwise_from_head(state: Mapping[str, Tensor], style: str, prefix: str = "") -> Tensor:
    """Return the depthwise filters ``[R, C, k, k]`` of a separable ASPP head, atrous branches in their order.

    Args:
        state: the head's (or whole model's) state dict.
        style: a key of :data:`HEAD_KEYS`: ``"mmseg"`` (``DepthwiseSeparableASPPHead``, DAFormer's and HRDA's heads),
            ``"segmentation_models_pytorch"`` (DeepLabV3Plus decoder) or ``"torchvision"`` (DeepLabV3 naming with
            depthwise branch convolutions).
        prefix: what stands before the names in ``state``, such as ``"decode_head."``.

    Raises:
        ValueError: ``style`` is unknown, no branch is found, or a branch is not depthwise or of another shape.
    """
    pattern = _pattern(style, prefix)
    filters = [state[pattern.format(r)] for r in range(1, _MAX_BRANCHES) if pattern.format(r) in state]
    if not filters:
        raise ValueError(f"{prefix=}: no {pattern.format('<branch>')!r} in the state dict; keys: {sorted(state)[:5]}")
    for r, value in enumerate(filters):
        if value.dim() != 4 or value.shape[1] != 1 or value.shape != filters[0].shape:
            raise ValueError(
                f"branch {r}: {value.shape=}, expected depthwise filters [C, 1, k, k], alike in all branches"
            )
    return torch.stack([value[:, 0] for value in filters])


def depthwise_to_head(weight: Tensor, style: str, prefix: str = "") -> dict[str, Tensor]:
    """Return the entries of a head's state dict that hold the depthwise filters ``weight`` ``[R, C, k, k]``.

    Load them with ``head.load_state_dict(entries, strict=False)``.

    Raises:
        ValueError: ``style`` is unknown or ``weight`` is not ``[R, C, k, k]``.
    """
    pattern = _pattern(style, prefix)
    if weight.dim() != 4:
        raise ValueError(f"{weight.shape=}, expected [R, C, k, k]")
    return {pattern.format(r): value.unsqueeze(1).clone() for r, value in enumerate(weight.detach(), start=1)}


def _pattern(style: str, prefix: str) -> str:
    if style not in HEAD_KEYS:
        raise ValueError(f"{style=} is not one of {', '.join(HEAD_KEYS)}")
    return prefix.replace("{", "{{").replace("}", "}}") + HEAD_KEYS[style]
