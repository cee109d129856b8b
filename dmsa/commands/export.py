"""`dmsa export`: a checkpoint's segmenter as safetensors, as a `torch.export` program and as ONNX."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dmsa.config import to_dict
from dmsa.files import write_atomically
from dmsa.scoring.predictor import Predictor, load_predictor


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
    tolerance: float = 1e-4
    """Largest difference to the trained model's scores that passes the check."""


class Deployed(nn.Module):
    """Images `[B, 3, S, S]`, ImageNet-normalised, to class scores `[B, K, S, S]`: what is exported.

    Channels are classes of the data set where the run was scored, else predicted ids.
    """

    def __init__(self, predictor: Predictor, size: int) -> None:
        super().__init__()
        # Nothing is trained from here on, and a program may not hold constants that ask for gradients.
        self.segmenter = predictor.segmenter.requires_grad_(False)
        patch = predictor.segmenter.encoder.patch_size
        self.rates = predictor.rates((size // patch, size // patch))
        order = predictor.assignment or list(range(predictor.classes.num_classes))
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, bilinearly enlarged to the images' size."""
        logits = self.segmenter(images, self.rates)["logits"]
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)[:, self.order]


def plain_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str, backend: str
) -> Tensor:
    """Say the multi-dilation depthwise operator in convolutions, so that a program needs no library to run."""
    branches, channels, side, _ = weight.shape
    outputs = []
    for branch in range(branches):
        dilation = int(dilations[branch])
        outputs.append(
            F.conv2d(
                x,
                weight[branch].unsqueeze(1).to(x.dtype),
                None if bias is None else bias[branch].to(x.dtype),
                padding=dilation * (side // 2),
                dilation=dilation,
                groups=channels,
            )
        )
    return torch.stack(outputs).sum(0) if reduce == "sum" else torch.cat(outputs, 1)


def to_program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return `model` as a `torch.export` program of ATen operators alone, for inputs of the shape of `example`."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(model, (example,), strict=False)
        operator = torch.ops.dmsa_kernels.multi_dilation_dwconv.default
        return program.run_decompositions({operator: plain_dwconv})


class _AsModule(nn.Module):
    """A program's graph as a module that may be told to evaluate, which the graph itself refuses."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._graph = [program.module()]

    def forward(self, images: Tensor) -> Tensor:
        return self._graph[0](images)


def to_onnx(program: torch.export.ExportedProgram, example: Tensor) -> bytes:
    """Return a program as an ONNX graph with input `images` and output `logits`.

    Raises:
        ImportError: `onnx` is not installed.
    """
    import onnx

    stream = io.BytesIO()
    # The exporter that needs nothing but onnx; it warns that there is a newer one, and traces a graph without branches.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _AsModule(program),
            (example,),
            stream,
            input_names=["images"],
            output_names=["logits"],
            dynamo=False,
        )
    content = stream.getvalue()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    return content


def run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    """Return the graph's output for `images`, by onnxruntime if it is installed, else by onnx's own interpreter."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return session.run(None, {"images": images})[0]
    import onnx
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"images": images})[0]


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
    size = options.size or predictor.config.data.size
    patch = predictor.segmenter.encoder.patch_size
    if size < patch or size % patch:
        raise ValueError(f"--size={size} must be a multiple of the encoder's patch size {patch}")
    if options.batch < 1:
        raise ValueError(f"--batch={options.batch} must be at least 1")
    model = Deployed(predictor, size).eval()
    example = torch.randn(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(example)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = describe(predictor, model, size)
    _write(folder / "model.json", json.dumps(facts, indent=1).encode())
    program = None
    if {"torch", "onnx"} & set(options.formats):
        program = to_program(model, example)
    if "safetensors" in options.formats:
        _write_safetensors(folder / "model.safetensors", model, facts, example, expected, options.tolerance)
    if "torch" in options.formats:
        stream = io.BytesIO()
        torch.export.save(program, stream)
        loaded = torch.export.load(io.BytesIO(stream.getvalue())).module()
        _check("model.pt2", lambda: loaded(example).detach(), expected, options.tolerance)
        _write(folder / "model.pt2", stream.getvalue())
    if "onnx" in options.formats:
        if importlib.util.find_spec("onnx") is None:
            print("model.onnx: not written, onnx is not installed (pip install onnx)")
        else:
            content = to_onnx(program, example)
            got = torch.from_numpy(run_onnx(content, example.numpy()))
            _check("model.onnx", lambda: got, expected, options.tolerance)
            _write(folder / "model.onnx", content)
    print(f"wrote {folder}: input [{options.batch}, 3, {size}, {size}], {predictor.classes.num_classes} classes")
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
