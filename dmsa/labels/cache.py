"""Where the slow results of a run are kept: files named after everything they depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dmsa.files import cannot_write, write_atomically

KEY_LENGTH = 16


def content_key(**facts: Any) -> str:
    """Return a short key of JSON-serialisable facts; equal facts give equal keys, in any order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def weights_key(module: nn.Module) -> str:
    """Return a short key of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:KEY_LENGTH]


def dataset_key(dataset: Any) -> str:
    """Return a short key of a data set: its name, classes, names and file sizes of its images, first and last image.

    An image that is exchanged for another one under its name is noticed by the size of its file: all pixels of a large
    set would take minutes to read.
    """
    count = image_count(dataset)
    digest = hashlib.sha256(json.dumps([getattr(dataset, "name", type(dataset).__name__), count]).encode())
    digest.update(json.dumps(list(getattr(dataset, "classes", ()))).encode())
    if hasattr(dataset, "image_name"):
        for index in range(count):
            digest.update(f"{dataset.image_name(index)} {_file_size(dataset, index)}\n".encode())
    for index in sorted({0, count - 1}):
        try:
            digest.update(np.ascontiguousarray(dataset.pixels(index)).tobytes())
        except ValueError as error:  # a damaged image is skipped later; its name already is part of the key
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()[:KEY_LENGTH]


def _file_size(dataset: Any, index: int) -> int | None:
    """Return the bytes of an image's file, `None` where it has none or cannot be asked."""
    try:
        return dataset.image_path(index).stat().st_size
    except (AttributeError, TypeError, OSError):  # no files, or made by a rule; a missing file is skipped later
        return None


def image_count(dataset: Any) -> int:
    """Return how many different images a data set has, not counting repetitions."""
    return dataset.images if hasattr(dataset, "images") else len(dataset)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to an `.npz` file that is complete whenever it exists.

    Raises:
        OSError: full disk, read-only folder; names the file.
    """
    kept = "What was finished before is kept"
    contents: dict[str, Any] = arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error, kept) from error
    write_atomically(path, lambda stream: np.savez(stream, **contents), consequence=kept)


def load_arrays(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """Read the arrays `keys` (all if none is named) of an `.npz` file of plain arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or damaged, or holds something else; nothing in it is executed.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in keys or content.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, deflate and array headers each fail in their own ways
        raise ValueError(
            f"{path} cannot be read as plain arrays ({type(error).__name__}: {error}); "
            "delete it, and the next run makes it anew"
        ) from error
