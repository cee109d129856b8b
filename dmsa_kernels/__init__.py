"""Exact, fast kernels for pixel-adaptive refinement and multi-dilation depthwise convolution."""

from dmsa_kernels._version import __version__
from dmsa_kernels.backend import why_not_triton

__all__ = ["__version__", "why_not_triton"]
