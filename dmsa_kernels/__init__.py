"""Exact, fast kernels for pixel-adaptive refinement and multi-dilation depthwise convolution."""

from dmsa_kernels._version import __version__
from dmsa_kernels.aspp import DepthwiseASPP, multi_dilation_dwconv
from dmsa_kernels.backend import why_not_triton

__all__ = ["DepthwiseASPP", "__version__", "multi_dilation_dwconv", "why_not_triton"]
