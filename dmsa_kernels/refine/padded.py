"""Planes with a replicated margin, whose shifted views are their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from dmsa_kernels.refine.spec import offsets


class Padded:
    """Planes [..., H, W] inside a buffer that is padded by replication, and the views of their P neighbours.

    The margin is cut at the map's size: a neighbour further away is the border pixel in any case.
    """

    def __init__(self, shape: tuple[int, ...], dilations: list[int], dtype: torch.dtype, device: torch.device):
        *batch, height, width = shape
        self.shifts = [
            (max(-height + 1, min(height - 1, dy)), max(-width + 1, min(width - 1, dx)))
            for dy, dx in offsets(dilations)
        ]
        self.top = max(dy for dy, _ in self.shifts)
        self.left = max(dx for _, dx in self.shifts)
        self.batch, self.height, self.width = batch, height, width
        self.buffer = torch.empty(
            (*batch, height + 2 * self.top, width + 2 * self.left), dtype=dtype, device=device
        )  # [..., H + 2 top, W + 2 left]
        self.inner = self.rows(0, height)
        self.views = self.neighbours(0, height)
        self.margins = self._margins()

    def _margins(self) -> list[tuple[Tensor, Tensor]]:
        """The parts of the margin and the border line that each repeats: left and right, then above and below."""
        top, left, bottom, right = self.top, self.left, self.top + self.height, self.left + self.width
        middle = self.buffer[..., top:bottom, :]
        pairs = [
            (middle[..., :left], middle[..., left : left + 1]),
            (middle[..., right:], middle[..., right - 1 : right]),
            (self.buffer[..., :top, :], self.buffer[..., top : top + 1, :]),
            (self.buffer[..., bottom:, :], self.buffer[..., bottom - 1 : bottom, :]),
        ]
        return [(margin, border) for margin, border in pairs if margin.numel()]

    def rows(self, start: int, stop: int, dy: int = 0, dx: int = 0) -> Tensor:
        """View [..., stop - start, W] of the rows ``start:stop`` moved by (dy, dx)."""
        *strides, stride, _ = self.buffer.stride()
        offset = (self.top + start + dy) * stride + self.left + dx
        return self.buffer.as_strided((*self.batch, stop - start, self.width), (*strides, stride, 1), offset)

    def neighbours(self, start: int, stop: int) -> list[Tensor]:
        """The P views of the neighbours of the rows ``start:stop``, each [..., stop - start, W]."""
        return [self.rows(start, stop, dy, dx) for dy, dx in self.shifts]

    def fill(self) -> None:
        """Replicate the border of ``inner`` into the margin."""
        for margin, border in self.margins:
            margin.copy_(border)

    def fold(self) -> None:
        """Add the margin to the border of ``inner``: the adjoint of :meth:`fill`."""
        top, left, bottom, right = self.top, self.left, self.top + self.height, self.left + self.width
        if top:
            self.buffer[..., top, :] += self.buffer[..., :top, :].sum(-2)
            self.buffer[..., bottom - 1, :] += self.buffer[..., bottom:, :].sum(-2)
        if left:
            middle = self.buffer[..., top:bottom, :]
            middle[..., left] += middle[..., :left].sum(-1)
            middle[..., right - 1] += middle[..., right:].sum(-1)
