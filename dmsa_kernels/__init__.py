"""Exact, fast kernels for pixel-adaptive refinement and multi-dilation depthwise convolution."""

from dmsa_kernels._version import __version__
from dmsa_kernels.aspp import DepthwiseASPP, multi_dilation_dwconv
from dmsa_kernels.backend import why_not_triton
from dmsa_kernels.refine import (
    LCM,
    PAMR,
    PAR,
    Affinity,
    AffinitySpec,
    LocalConsistencyModule,
    certainty,
    local_affinity,
    propagate,
)
from dmsa_kernels.refine.warmup import warmup

__all__ = [
    "LCM",
    "PAMR",
    "PAR",
    "Affinity",
    "AffinitySpec",
    "DepthwiseASPP",
    "LocalConsistencyModule",
    "__version__",
    "certainty",
    "local_affinity",
    "multi_dilation_dwconv",
    "propagate",
    "warmup",
    "why_not_triton",
]
