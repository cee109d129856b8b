"""Multi-dilation depthwise convolution and DepthwiseASPP."""

from dmsa_kernels.aspp.functional import fused_dwconv_project, multi_dilation_dwconv
from dmsa_kernels.aspp.modules import DepthwiseASPP

__all__ = ["DepthwiseASPP", "fused_dwconv_project", "multi_dilation_dwconv"]
