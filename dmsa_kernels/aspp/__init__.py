"""Multi-dilation depthwise convolution and DepthwiseASPP."""

from dmsa_kernels.aspp.functional import multi_dilation_dwconv
from dmsa_kernels.aspp.modules import DepthwiseASPP

__all__ = ["DepthwiseASPP", "multi_dilation_dwconv"]
