"""A segmenter for deployment: as a `torch.export` program without operators of ours, and as an ONNX graph."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmsa.models.segmenter import Segmenter


class Deployed(nn.Module):
    """Images `[B, 3, S, S]`, ImageNet-normalised, to class scores `[B, K, S, S]`: what is exported.

    Args:
        segmenter: is frozen.
        rates: dilation rates for images of the size that is exported.
        order: predicted id that stands for every class, the output's channels.
    """

    def __init__(self, segmenter: Segmenter, rates: Sequence[int], order: Sequence[int]) -> None:
        super().__init__()
        # Nothing is trained from here on, and a program may not hold constants that ask for gradients.
        self.segmenter = segmenter.requires_grad_(False)
        self.rates = tuple(rates)
        self.order: Tensor
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
            cast(Any, stream),  # documented, but not in its annotation
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
