"""`dmsa export`: a checkpoint's segmenter as safetensors, as a `torch.export` program and as ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from dmsa.config import to_dict
from dmsa.files import claim_outputs, write_atomically
from dmsa.models.export import Deployed, run_onnx, to_onnx, to_program
from dmsa.scoring.predictor import Predictor, load_predictor

FILES = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's segmenter for deployment, and check it against the model that was trained."""

    checkpoint: str
    """Run folder (its best checkpoint) or checkpoint file of train.py."""
    out: str = "exported"
    """Folder for model.safetensors, model.pt2, model.onnx and model.json."""
    formats: tuple[Literal["safetensors", "torch", "onnx"], ...] = ("safetensors", "torch", "onnx")
    """What to write: all weights, a torch.export program, an ONNX graph (if `onnx` is installed)."""
    size: int | None = None
    """Side in pixels of the input; that of the run's evaluation if unset."""
    batch: int = 1
    """Images per call of the program and the graph."""
    force: bool = False
    """Replace files that are there already."""
    tolerance: float = 1e-4
    """Largest difference to the trained model's scores that passes the check."""


def describe(predictor: Predictor, model: Deployed, size: int) -> dict[str, Any]:
    """Return what a user of the files must know: names, colours, normalisation, shapes."""
    from dmsa.data.transforms import MEAN, STD

    matched = predictor.assignment is not None
    return {
        "input": f"images, float32 [B, 3, {size}, {size}], (pixel / 255 - mean) / std, RGB, squashed to a square",
        "output": f"logits, float32 [B, {predictor.classes.num_classes}, {size}, {size}]; argmax over the second axis",
        "mean": list(MEAN),
        "std": list(STD),
        "classes": list(predictor.classes.classes) if matched else predictor.names,
        "palette": predictor.classes.palette.tolist(),
        "encoder": predictor.config.model.encoder,
        "rates": list(model.rates),
        "epoch": predictor.epoch,
        "config": to_dict(predictor.config),
    }


def main(argv: list[str]) -> int:
    """Run `dmsa export` with `argv` and return the exit status.

    Raises:
        ValueError: the size does not fit the patches, or an exported file computes something else.
    """
    options = tyro.cli(ExportOptions, args=argv, prog="dmsa export")
    predictor = load_predictor(options.checkpoint, torch.device("cpu"))
    size = predictor.config.data.size if options.size is None else options.size
    patch = predictor.segmenter.encoder.patch_size
    if size < patch or size % patch:
        raise ValueError(f"--size={size} must be a multiple of the encoder's patch size {patch}")
    if options.batch < 1:
        raise ValueError(f"--batch={options.batch} must be at least 1")
    formats = [name for name in FILES if name in options.formats]
    if "onnx" in formats and importlib.util.find_spec("onnx") is None:
        print("model.onnx: not written, onnx is not installed (pip install onnx)")
        formats.remove("onnx")
    files = [FILES[name] for name in formats]
    facts_file, *model_files = claim_outputs(options.out, ["model.json", *files], force=options.force)
    paths = dict(zip(formats, model_files, strict=True))
    order = predictor.assignment or range(predictor.classes.num_classes)
    model = Deployed(predictor.segmenter, predictor.rates((size // patch, size // patch)), list(order)).eval()
    example = torch.randn(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(example)
    facts = describe(predictor, model, size)
    if predictor.config.model.refine != "off":
        print("the run refines its predictions by PAR; the exported files hold the network alone, unrefined")
    _write(facts_file, json.dumps(facts, indent=1).encode())
    program = to_program(model, example) if {"torch", "onnx"} & set(formats) else None
    if "safetensors" in formats:
        _write_safetensors(paths["safetensors"], model, facts, example, expected, options.tolerance)
    if program is not None and "torch" in formats:
        stream = io.BytesIO()
        torch.export.save(program, stream)
        loaded = torch.export.load(io.BytesIO(stream.getvalue())).module()
        _check("model.pt2", lambda: loaded(example).detach(), expected, options.tolerance)
        _write(paths["torch"], stream.getvalue())
    if program is not None and "onnx" in formats:
        content = to_onnx(program, example)
        got = torch.from_numpy(run_onnx(content, example.numpy()))
        _check("model.onnx", lambda: got, expected, options.tolerance)
        _write(paths["onnx"], content)
    print(f"wrote {options.out}: input [{options.batch}, 3, {size}, {size}], {predictor.classes.num_classes} classes")
    return 0


def _write_safetensors(
    path: Path,
    model: Deployed,
    facts: dict[str, Any],
    example: Tensor,
    expected: Tensor,
    tolerance: float,
) -> None:
    from safetensors.torch import load, save

    state = {name: value.contiguous() for name, value in model.segmenter.state_dict().items()}
    content = save(state, metadata={"dmsa": json.dumps(facts)})
    kept = {name: value.clone() for name, value in state.items()}
    try:
        model.segmenter.load_state_dict({name: torch.zeros_like(value) for name, value in kept.items()})
        model.segmenter.load_state_dict(load(content))
        with torch.no_grad():
            _check(path.name, lambda: model(example), expected, tolerance)
    finally:
        model.segmenter.load_state_dict(kept)
    _write(path, content)


def _check(name: str, compute: Callable[[], Tensor], expected: Tensor, tolerance: float) -> None:
    """Compare with the trained model; a file that computes something else is not written."""
    difference = float((compute() - expected).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{name} differs from the trained model by {difference:.2e}, more than --tolerance={tolerance}: not written"
        )
    print(f"{name}: largest difference to the trained model {difference:.2e}")


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda stream: stream.write(content))
