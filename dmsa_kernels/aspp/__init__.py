"""Multi-dilation depthwise convolution and DepthwiseASPP."""
