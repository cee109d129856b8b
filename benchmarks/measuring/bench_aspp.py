"""The multi-dilation depthwise convolution against the library: one convolution a branch, then concatenation.

    pytest benchmarks/measuring/bench_aspp.py --benchmark-only

Ours and the baselines run in both layouts, each on inputs that are already in its layout. On a CPU the batch (and
for the two largest maps the channels) is scaled down, and the row says from what. The ceiling reads x once and writes
the branches once; the backward pass reads the branches' gradients and x once and writes the gradient of x once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring.rows import Candidate, Row
from dmsa_kernels import multi_dilation_dwconv
from dmsa_kernels.aspp import fused_dwconv_project

# name, shape, shape on a CPU, dilations
CASES = (
    ("dmsa_train_a", (32, 384, 20, 20), (8, 384, 20, 20), (1, 1, 2, 3)),
    ("dmsa_train_b", (32, 384, 20, 20), (8, 384, 20, 20), (1, 1, 3, 5)),
    ("dmsa_train_c", (32, 384, 20, 20), (8, 384, 20, 20), (1, 3, 6, 9)),
    ("dmsa_train_d", (32, 384, 20, 20), (8, 384, 20, 20), (1, 6, 12, 18)),
    ("dmsa_eval_a", (32, 384, 40, 40), (4, 384, 40, 40), (1, 1, 2, 3)),
    ("dmsa_eval_c", (32, 384, 40, 40), (4, 384, 40, 40), (1, 3, 6, 9)),
    ("dmsa_eval_d", (32, 384, 40, 40), (4, 384, 40, 40), (1, 6, 12, 18)),
    ("vit_224", (43, 384, 28, 28), (8, 384, 28, 28), (1, 3, 6, 9)),
    ("daformer", (2, 1024, 128, 128), (1, 256, 128, 128), (6, 12, 18)),
    ("deeplabv3plus", (4, 2048, 64, 64), (1, 1024, 64, 64), (12, 24, 36)),
    ("smp_deeplabv3plus", (8, 2048, 32, 32), (2, 2048, 32, 32), (12, 24, 36)),
)
# Rows with the pointwise projection behind the branches, and its width.
PROJECTED = {"dmsa_train_d": 384, "daformer": 256}
# Compiling takes longer than the row on a CPU.
COMPILED_ON_CPU = ("dmsa_train_d", "daformer")


def library(x: Tensor, weight: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Return ``[B, R * C, H, W]`` the plain way."""
    half = weight.shape[-1] // 2
    return torch.cat(
        [
            F.conv2d(x, weight[r, :, None], padding=d * half, dilation=d, groups=x.shape[1])
            for r, d in enumerate(dilations)
        ],
        1,
    )


def ours(x: Tensor, weight: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """Return ``[B, R * C, H, W]`` by one operator."""
    return multi_dilation_dwconv(x, weight, dilations, reduce="concat")


def inputs(device: torch.device, seed: int, *, shape, branches: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Draw the map and the gradient, each in both layouts, and the filters."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, channels, height, width = shape
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    weight = torch.randn(branches, channels, 3, 3, generator=generator, device=device).to(dtype)
    grad = torch.randn(batch, branches * channels, height, width, generator=generator, device=device).to(dtype)
    last = torch.channels_last
    return x, x.contiguous(memory_format=last), weight, grad, grad.contiguous(memory_format=last)


def run(
    x: Tensor,
    x_last: Tensor,
    weight: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    *,
    function: Callable,
    dilations: tuple[int, ...],
    channels_last: bool,
    backward: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Run one candidate on the inputs of its layout."""
    source, incoming = (x_last, grad_last) if channels_last else (x, grad)
    if not backward:
        with torch.no_grad():
            return function(source, weight, dilations)
    leaves = source.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(*leaves, dilations), leaves, incoming)


def exact(x: Tensor, _x_last: Tensor, weight: Tensor, grad: Tensor, _grad_last: Tensor, **arguments):
    """Return the library's result in float64."""
    wide = x.double(), x, weight.double(), grad.double(), grad
    return run(*wide, function=library, channels_last=False, **arguments)


def projected_inputs(device: torch.device, seed: int, *, shape, branches: int, width: int, dtype: torch.dtype):
    """Draw what :func:`inputs` draws, for an output of ``width`` channels, and the projection ``[width, R * C]``."""
    x, x_last, weight, _, _ = inputs(device, seed, shape=shape, branches=branches, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed + 1)
    inner = branches * shape[1]
    projection = (torch.randn(width, inner, generator=generator, device=device) / inner**0.5).to(dtype)
    grad = torch.randn(shape[0], width, *shape[2:], generator=generator, device=device).to(dtype)
    return x, x_last, weight, projection, grad, grad.contiguous(memory_format=torch.channels_last)


def run_projected(
    x: Tensor,
    x_last: Tensor,
    weight: Tensor,
    projection: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    *,
    branches: Callable | None,
    dilations: tuple[int, ...],
    channels_last: bool,
    backward: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Project what ``branches`` computes, or run the fused operator if it is ``None``."""
    source, incoming = (x_last, grad_last) if channels_last else (x, grad)

    def function(x, weight, projection):
        if branches is None:
            return fused_dwconv_project(x, weight, projection, dilations)
        return F.conv2d(branches(x, weight, dilations), projection[:, :, None, None])

    if not backward:
        with torch.no_grad():
            return function(source, weight, projection)
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (source, weight, projection))
    return torch.autograd.grad(function(*leaves), leaves, incoming)


def exact_projected(
    x: Tensor, _x_last: Tensor, weight: Tensor, projection: Tensor, grad: Tensor, _grad_last, **options
):
    """Return the library's result in float64."""
    wide = x.double(), x, weight.double(), projection.double(), grad.double(), grad
    return run_projected(*wide, branches=library, channels_last=False, **options)


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """The workloads, forward and forward with backward; 16-bit only where the hardware computes in it."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    made = []
    for dtype in dtypes:
        for name, shape, small, dilations in CASES:
            for backward in (False, True):
                made.append(
                    _row(name, shape if full else small, "" if full else shape, dilations, dtype, backward, full)
                )
                if name in PROJECTED:
                    made.append(
                        _projected_row(
                            name, shape if full else small, "" if full else shape, dilations, dtype, backward
                        )
                    )
    return made


def _row(name, shape, scaled_from, dilations, dtype: torch.dtype, backward: bool, full: bool) -> Row:
    run_as = functools.partial(run, dilations=dilations, backward=backward)
    candidates = [
        Candidate("ours", functools.partial(run_as, function=ours, channels_last=False), ours=True),
        Candidate("ours, channels_last", functools.partial(run_as, function=ours, channels_last=True), ours=True),
        Candidate("F.conv2d", functools.partial(run_as, function=library, channels_last=False)),
        Candidate("F.conv2d, channels_last", functools.partial(run_as, function=library, channels_last=True)),
    ]
    for suffix, channels_last in (("", False), (", channels_last", True)):
        compiled = torch.compile(library, dynamic=False)
        candidates.append(
            Candidate(
                f"torch.compile(F.conv2d{suffix})",
                functools.partial(run_as, function=compiled, channels_last=channels_last),
                compiled=True,
                why_not=None if full or name in COMPILED_ON_CPU else "on a CPU only compiled at two rows",
            )
        )
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    branches = len(dilations)
    passes = (1 + branches) + ((branches + 2) if backward else 0)
    return Row(
        family="aspp",
        workload=name,
        variant="forward+backward" if backward else "forward",
        dtype=str(dtype).removeprefix("torch."),
        shape=",".join(map(str, shape)),
        inputs=functools.partial(inputs, shape=shape, branches=branches, dtype=dtype),
        candidates=tuple(candidates),
        reference=functools.partial(exact, dilations=dilations, backward=backward),
        tolerance=2e-5 if dtype == torch.float32 else 2e-2,
        floor_bytes=passes * elements * dtype.itemsize,
        operations=(3 if backward else 1) * 2 * 9 * branches * elements,
        items=shape[0],
        scaled_from=",".join(map(str, scaled_from)),
        note=f"dilations {dilations}",
    )


def _projected_row(name, shape, scaled_from, dilations, dtype: torch.dtype, backward: bool) -> Row:
    run_as = functools.partial(run_projected, dilations=dilations, backward=backward)
    candidates = []
    # The unfused form first: it is what the module chooses.
    for title, branches in (("ours, unfused", ours), ("ours, fused", None), ("F.conv2d", library)):
        for suffix, channels_last in (("", False), (", channels_last", True)):
            call = functools.partial(run_as, branches=branches, channels_last=channels_last)
            candidates.append(Candidate(title + suffix, call, ours=branches is not library))
    batch, channels, height, width = shape
    pixels, branches, out_channels = batch * height * width, len(dilations), PROJECTED[name]
    # x read and y written; backward, the gradient of y and x read, the gradient of x written.
    planes = channels + out_channels + ((2 * channels + out_channels) if backward else 0)
    return Row(
        family="aspp",
        workload=f"{name}_projected",
        variant="forward+backward" if backward else "forward",
        dtype=str(dtype).removeprefix("torch."),
        shape=",".join(map(str, shape)),
        inputs=functools.partial(projected_inputs, shape=shape, branches=branches, width=out_channels, dtype=dtype),
        candidates=tuple(candidates),
        reference=functools.partial(exact_projected, dilations=dilations, backward=backward),
        tolerance=2e-5 if dtype == torch.float32 else 2e-2,
        floor_bytes=planes * pixels * dtype.itemsize,
        operations=(3 if backward else 1) * 2 * branches * channels * (9 + out_channels) * pixels,
        items=batch,
        scaled_from=",".join(map(str, scaled_from)),
        note=f"dilations {dilations}, projected to {out_channels} channels",
    )


def test_aspp(measure, row):
    """Every workload through the harness."""
    measure(row)
