"""The atrous pyramid on the patch tokens of the last block (section 3.1 of the paper, arXiv 2303.00199)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmsa_kernels import DepthwiseASPP


class AtrousPyramid(nn.Module):
    """`gamma * ASPP(y)` for patch tokens y, gamma starting at 0 so that training begins at the plain backbone.

    Four branches at the four rates of the epoch: a 1x1 (its rate is inert) and three 3x3 depthwise ones, then a
    pointwise projection, norm and activation. One set of weights serves all rates. The norm is over one image (group
    norm with one group): a prediction then depends on no other image of the batch, and student, teacher, micro-batches
    and evaluation see the same function.

    Args:
        channels: width D of the tokens.
        image_pooling: add the global average branch.
    """

    def __init__(self, channels: int, image_pooling: bool = False) -> None:
        super().__init__()
        self.aspp = DepthwiseASPP(
            channels,
            channels,
            (1, 1, 2, 3),
            pointwise_first=True,
            image_pooling=image_pooling,
            norm="group",
            activation="gelu",
        )
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, grid: tuple[int, int], rates: tuple[int, ...] | None = None) -> Tensor:
        """Return what is to be added to the residual stream.

        Args:
            tokens: [B, h*w, D] patch tokens.
            grid: (h, w).
            rates: four dilation rates in tokens; those of the first rows of the rate table if unset.

        Returns:
            [B, h*w, D].
        """
        maps = self.aspp(tokens.transpose(1, 2).unflatten(2, grid), rates)  # [B, D, h, w]
        return self.gamma * maps.flatten(2).transpose(1, 2)
