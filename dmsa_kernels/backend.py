"""Which implementation runs, and why not another one.

Three backends compute every operator: ``triton`` (CUDA and ROCm devices, or the CPU through Triton's
interpreter), ``eager`` (plain PyTorch, fast, any device and dtype) and ``reference`` (the definition, slow).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from dmsa_kernels.compat import OLDEST_TRITON, triton_version

BACKENDS = ("auto", "triton", "eager", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# One launch for all iterations of small maps, for those who do not say: on once `benchmarks.gpu_suite` has proven it.
_RESIDENT_BY_DEFAULT = False
_resident: bool | None = None


def _is_set(variable: str, default: bool = False) -> bool:
    value = os.environ.get(variable, "")
    return value.lower() in ("1", "true", "yes", "on") if value else default


def _interpreting() -> bool:
    return _is_set("TRITON_INTERPRET")


def wants_resident() -> bool:
    """Return whether small maps may take one launch for all iterations: ``DMSA_RESIDENT``, read at every call."""
    return _is_set("DMSA_RESIDENT", _RESIDENT_BY_DEFAULT) if _resident is None else _resident


@contextlib.contextmanager
def resident(on: bool) -> Iterator[None]:
    """Inside the block, of all threads, :func:`wants_resident` is ``on``: to measure with and without."""
    global _resident
    before, _resident = _resident, on
    try:
        yield
    finally:
        _resident = before


def why_not_triton(*tensors: Tensor) -> str | None:
    """Return the reason the Triton kernels cannot take ``tensors``, or ``None`` when they can.

    Args:
        tensors: the operator's tensor arguments, any shape. Without tensors, asks about the installation alone.
    """
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install triton)"
    if version < OLDEST_TRITON:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST_TRITON))
        return f"triton is {found}; the kernels need {oldest} or newer, which torch 2.4 and later bring"
    for tensor in tensors:
        if tensor.device.type == "cpu" and not _interpreting():
            return "tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 to debug the kernels)"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"tensors are on {tensor.device.type!r}; the kernels run on CUDA and ROCm devices"
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            return f"tensors are {tensor.dtype}; the kernels take float32, float16 and bfloat16"
    return None


def resolve(backend: str, *tensors: Tensor) -> str:
    """Return the backend that runs: ``"triton"``, ``"eager"`` or ``"reference"``.

    Args:
        backend: ``"auto"`` takes Triton on GPU tensors and eager elsewhere; any other name is that backend or an error.
        tensors: the operator's tensor arguments.

    Raises:
        ValueError: ``backend`` is not one of :data:`BACKENDS`.
        RuntimeError: ``backend="triton"`` and the kernels cannot take the tensors; the message is the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} is not one of {', '.join(BACKENDS)}")
    if backend in ("eager", "reference"):
        return backend
    if backend == "auto":
        on_gpu = bool(tensors) and all(tensor.is_cuda for tensor in tensors)
        return "triton" if on_gpu and why_not_triton(*tensors) is None else "eager"
    reason = why_not_triton(*tensors)
    if reason is not None:
        raise RuntimeError(f"backend='triton' cannot run: {reason}")
    return "triton"
