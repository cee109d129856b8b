"""Local-affinity refinement: PAR, PAMR and their kin.

The package is callable: ``dmsa_kernels.refine(image, masks, ...)`` is :func:`dmsa_kernels.refine.functional.refine`,
so that the public function and the folder can share the field's name.
"""

import sys
from types import ModuleType

from dmsa_kernels.refine.certainty import certainty
from dmsa_kernels.refine.functional import Affinity, local_affinity, propagate, refine
from dmsa_kernels.refine.modules import LCM, PAMR, PAR, LocalConsistencyModule
from dmsa_kernels.refine.spec import AffinitySpec

__all__ = [
    "LCM",
    "PAMR",
    "PAR",
    "Affinity",
    "AffinitySpec",
    "LocalConsistencyModule",
    "certainty",
    "local_affinity",
    "propagate",
    "refine",
]


class _CallablePackage(ModuleType):
    def __call__(self, *args, **kwargs):
        return refine(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
