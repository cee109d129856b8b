"""What differs between the supported versions of PyTorch and Triton; nothing else asks for a version."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

OLDEST_TRITON = (3, 0)


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Return Triton's major and minor version, or ``None`` where it is not installed. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            major, minor, *_ = importlib.metadata.version(distribution).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return OLDEST_TRITON  # importable without metadata: built by hand, so the import itself will tell
