"""Checkpoint files of backbones: tensors by name, nothing executed, and what keeps them from being loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name; nothing in the file is executed.

    Raises:
        ValueError: it is not a checkpoint of plain tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        # DINO's full checkpoints also hold the training arguments as a Namespace, which is plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint makes the unpickler raise almost anything
        raise ValueError(
            f"{path} cannot be read as a checkpoint of plain tensors (only such files are loaded): {error}"
        ) from error
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, or a 'teacher' entry with them")
    return content


def differing_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps `state` from being loaded where `expected` is: keys that differ, and shapes, one text each."""
    return [
        *(f"missing {key}" for key in expected if key not in state),
        *(f"unexpected {key}" for key in state if key not in expected),
        *(
            f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ),
    ]
