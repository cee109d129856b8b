"""The checks of `benchmarks.gpu_suite`: every operator on random inputs, in CUDA graphs, and within memory bounds."""

from __future__ import annotations

import argparse
import math
import random
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.gate import tensors
from benchmarks.measuring.machines import pick_device
from benchmarks.measuring.memory import peak_memory, release
from dmsa_kernels.backend import why_not_triton

EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Suite:
    """What the sections share: the device, the clock, the log, the failures and the results."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = pick_device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.deadline = self.start + arguments.seconds
        self.section = ""
        self.failures: list[str] = []
        self.not_run: list[str] = []
        self.lines = (self.out / "log.txt").open("w", encoding="utf-8")
        self.draw = random.Random(arguments.seed)

    @property
    def backend(self) -> str:
        """The backend under test: the one asked for, or the kernels where they can run and eager where not."""
        if self.arguments.backend != "auto":
            return self.arguments.backend
        return "triton" if why_not_triton(torch.empty(1, device=self.device)) is None else "eager"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def log(self, text: str = "") -> None:
        for line in text.split("\n"):
            stamped = f"{time.monotonic() - self.start:6.1f} s  {line}"
            print(stamped, flush=True)
            self.lines.write(stamped + "\n")
        self.lines.flush()

    def fail(self, text: str) -> None:
        self.failures.append(f"{self.section}: {text}")
        self.log(f"FAILED {text}")

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.fail(text)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.draw.getrandbits(48))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator(), device=self.device).to(dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=self.generator(), device=self.device).to(dtype)


def layouts(suite: Suite, x: Tensor) -> Tensor:
    """Return the values of `x` under strides drawn at random: plain, channels last, or a slice of a larger tensor."""
    kind = suite.draw.choice(["plain", "channels_last", "slice", "expanded"])
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "slice":
        larger = torch.full([x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 3], math.nan, dtype=x.dtype)
        larger = larger.to(x.device)
        larger[:, 1:, 1:-1, 2:-1] = x
        return larger[:, 1:, 1:-1, 2:-1]
    if kind == "expanded":
        return x[:1].expand_as(x)
    return x


def border_mask(height: int, width: int, reach: int) -> Tensor:
    """Return a bool map `[H, W]`: pixels from which a tap at distance `reach` leaves the map."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
    inside = (y >= reach) & (y < height - reach) & (x >= reach) & (x < width - reach)
    return ~inside


def errors(result: Tensor, expected: Tensor, border: Tensor) -> dict[str, float]:
    """Return the largest difference over interior and border pixels, relative to the largest expected value.

    A NaN or an infinity counts as infinite; tensors whose last two dimensions are not the map's have one region.
    """
    delta = (result.detach().double() - expected.detach().double()).abs().cpu()
    delta = torch.where(delta.isfinite(), delta, math.inf)
    scale = max(expected.detach().abs().max().item(), 1e-30) if expected.numel() else 1.0
    if delta.shape[-2:] != border.shape:
        return {"all": delta.max().item() / scale if delta.numel() else 0.0}
    regions = {"interior": delta[..., ~border], "border": delta[..., border]}
    return {name: values.max().item() / scale for name, values in regions.items() if values.numel()}


def plain_refine(image: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, spec: Any) -> tuple:
    """Return weights and refined masks by the formula, differentiated by autograd: sets the error budget in float32."""
    height, width = image.shape[2:]

    def taps(x: Tensor) -> Tensor:  # [B, K, H, W] -> [B, K, P, H, W]
        found = []
        for dilation in dilations:
            for dy in (-dilation, 0, dilation):
                for dx in (-dilation, 0, dilation):
                    if dy or dx:
                        rows = (torch.arange(height, device=x.device) + dy).clamp(0, height - 1)
                        columns = (torch.arange(width, device=x.device) + dx).clamp(0, width - 1)
                        found.append(x[:, :, rows[:, None], columns])
        return torch.stack(found, 2)

    neighbours, centre = taps(image), image[:, :, None]
    copies = {"neighbours": 0, "centre_once": 1, "centred": len(dilations), "none": 0}[spec.sigma]
    samples = torch.cat([neighbours, *[centre] * copies], 2)
    variance = samples.var(2, keepdim=True)
    positive = variance > 0  # the derivative of the root at 0 is infinite
    sigma = torch.where(positive, variance, 1.0).sqrt() * positive if spec.sigma != "none" else 1.0
    scores = -(((neighbours - centre).abs() / (spec.alpha * sigma + spec.eps)) ** spec.exponent).mean(1)
    weights = scores.softmax(1)
    if spec.position_weight:
        steps = [math.hypot(y, x) * d for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
        distance = torch.tensor(steps, dtype=weights.dtype, device=weights.device)
        position = -((distance / (distance.std() * spec.alpha + spec.eps)) ** 2)
        weights = weights + spec.position_weight * position.softmax(0)[:, None, None]
    for _ in range(num_iter):
        masks = (taps(masks) * weights[:, None]).sum(2)
    return weights, masks


def judge(
    suite: Suite,
    name: str,
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    border: Tensor,
) -> float:
    """Compare outputs and gradients with double precision; return the largest error as a share of its budget.

    The budget is twice the error of the plain form in float32 on the same rounded inputs, plus four roundings of the
    output's type.
    """
    worst = 0.0
    for i, (a, b, c) in enumerate(zip(got, plain, expected, strict=True)):
        if a.shape != c.shape:
            suite.fail(f"{name}: output {i} has shape {tuple(a.shape)}, expected {tuple(c.shape)}")
            continue
        slack = max(errors(b, c, border).values(), default=0.0)
        for region, error in errors(a, c, border).items():
            budget = 2 * slack + 4 * EPSILON[dtype] + 1e-6
            worst = max(worst, error / budget)
            suite.expect(error <= budget, f"{name}: output {i}, {region}: error {error:.2e} over {budget:.2e}")
    return worst


def section_refine(suite: Suite) -> None:
    """Affinity, propagation, labels and every gradient on random shapes, dtypes, layouts and constants."""
    from dmsa_kernels.refine import AffinitySpec, local_affinity, propagate

    worst, count = 0.0, 0
    for case in _cases(suite, "refine"):
        draw = suite.draw
        small = not suite.on_gpu
        dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
        side = 20 if small else 90
        batch, guide = draw.randint(1, 3), draw.choice([1, 3, 3, 4])
        channels = draw.choice([1, 2, 3, 4] if small else [1, 2, 3, 4, 7, 21, 33, 81])
        height, width = draw.randint(1, side), draw.randint(1, side)
        dilations = draw.sample([1, 2, 4, 8, 12, 24, 48, 64], draw.randint(1, 2 if small else 6))
        num_iter = draw.randint(0, 3 if small else 12)
        spec = AffinitySpec(
            exponent=draw.choice([1.0, 2.0]),
            alpha=draw.choice([0.1, 0.3]),
            sigma=draw.choice(["neighbours", "centred", "centre_once", "none"]),
            eps=1e-8,
            position_weight=draw.choice([0.0, 0.01]),
        )
        unit = 1.0 if spec.sigma == "none" else draw.choice([1.0, 255.0])
        image = layouts(suite, suite.rand(batch, guide, height, width) * unit)
        masks = layouts(suite, suite.rand(batch, channels, height, width).to(dtype))
        valid = (suite.rand(batch, channels) > 0.3) if draw.random() < 0.4 else None
        grad = suite.randn(batch, channels, height, width)
        name = (
            f"case {case}: masks {batch},{channels},{height},{width} {dtype}, guide {guide}, {dilations}, T={num_iter},"
            f" {spec}, valid={valid is not None}, strides {tuple(masks.stride())}"
        )

        def run(
            backend: str, compute: torch.dtype, tensors=(image, masks, grad), options=(dilations, num_iter, spec, valid)
        ):
            source, planes, upstream = tensors
            offsets, steps, constants, classes = options
            wide = compute if compute == torch.float64 else torch.float32
            source = source.to(wide).detach().requires_grad_()
            planes = planes.to(compute).detach().requires_grad_()
            if backend == "plain":
                kept = planes if classes is None else planes * classes[:, :, None, None]
                weights, out = plain_refine(source, kept, offsets, steps, constants)
            else:
                affinity = local_affinity(source, offsets, spec=constants, backend=backend)
                weights = affinity.weights
                out = propagate(affinity, planes, steps, valid_classes=classes, backend=backend)
            wanted = [planes, source] if steps else [planes]
            return [weights, out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]

        try:
            outputs = run(suite.backend, dtype), run("plain", torch.float32), run("reference", torch.float64)
            worst = max(worst, judge(suite, name, *outputs, dtype, border_mask(height, width, max(dilations))))
            affinity = local_affinity(image, dilations, spec=spec, backend=suite.backend)
            out = propagate(affinity, masks, num_iter, valid_classes=valid, backend=suite.backend)
            labels, values = propagate(
                affinity, masks, num_iter, valid_classes=valid, return_labels=True, backend=suite.backend
            )
            best = out if valid is None else out.masked_fill(~valid[:, :, None, None], -math.inf)
            some = torch.ones(batch, 1, 1, device=suite.device) if valid is None else valid.any(1)[:, None, None]
            picked = out.gather(1, labels[:, None])[:, 0]
            same = torch.where(some.bool(), (picked == best.max(1).values) & (values == picked), labels == 0)
            suite.expect(bool(same.all()), f"{name}: {int((~same).sum())} labels are not the argmax of the planes")
        except Exception as error:
            traceback.print_exc()
            suite.fail(f"{name}: {type(error).__name__}: {error}")
        count += 1
    suite.log(f"{count} cases; largest error over its budget {worst:.2f}")


def section_aspp(suite: Suite) -> None:
    """Multi-dilation depthwise convolution and its gradients on random shapes, dtypes, layouts and reductions."""
    from dmsa_kernels.aspp import multi_dilation_dwconv

    worst, count = 0.0, 0
    for case in _cases(suite, "aspp"):
        draw = suite.draw
        small = not suite.on_gpu
        dtype = (torch.float32, torch.float16, torch.bfloat16)[case % 3]
        batch, kernel, branches = draw.randint(1, 3), draw.choice([3, 3, 5, 7]), draw.randint(1, 4)
        channels = draw.choice([1, 3, 8] if small else [1, 3, 8, 31, 64, 130, 384])
        height, width = draw.randint(1, 16 if small else 70), draw.randint(1, 16 if small else 70)
        dilations = [draw.choice([1, 2, 3, 5, 6, 9, 12, 18, 36]) for _ in range(branches)]
        reduce = draw.choice(["stack", "concat", "sum"])
        with_bias = draw.random() < 0.5
        x = suite.randn(batch, channels, height, width, dtype=dtype)
        if draw.random() < 0.3:
            x = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (height, width))
        else:
            x = layouts(suite, x)
        weight = suite.randn(branches, channels, kernel, kernel, dtype=dtype)
        bias = suite.randn(branches, channels, dtype=dtype) if with_bias else None
        shape = {
            "stack": (batch, branches, channels, height, width),
            "concat": (batch, branches * channels, height, width),
            "sum": (batch, channels, height, width),
        }[reduce]
        grad = suite.randn(*shape, dtype=dtype)
        name = (
            f"case {case}: x {batch},{channels},{height},{width} {dtype} strides {tuple(x.stride())}, k={kernel},"
            f" {dilations}, {reduce}, bias={with_bias}"
        )

        def run(
            backend: str,
            compute: torch.dtype,
            tensors: tuple = (x, weight, bias, grad),
            options: tuple = (dilations, reduce),
        ) -> list[Tensor]:
            wanted = [tensor.to(compute).detach().requires_grad_() for tensor in tensors[:3] if tensor is not None]
            source, filters, *offset = wanted
            out = multi_dilation_dwconv(source, filters, options[0], *offset, reduce=options[1], backend=backend)
            return [out, *torch.autograd.grad(out, wanted, tensors[3].to(out.dtype))]

        try:
            reach = (kernel // 2) * max(dilations)
            outputs = run(suite.backend, dtype), run("reference", torch.float32), run("reference", torch.float64)
            worst = max(worst, judge(suite, name, *outputs, dtype, border_mask(height, width, reach)))
        except Exception as error:
            traceback.print_exc()
            suite.fail(f"{name}: {type(error).__name__}: {error}")
        count += 1
    suite.log(f"{count} cases; largest error over its budget {worst:.2f}")


def _cases(suite: Suite, kind: str) -> Iterator[int]:
    """Count cases up to the number asked for, or until the section's share of the time is used up."""
    end = time.monotonic() + min(0.15 * suite.arguments.seconds, suite.left)
    for case in range(suite.arguments.cases):
        if time.monotonic() > end:
            suite.not_run.append(f"{kind}: cases {case}..{suite.arguments.cases - 1}")
            return
        yield case


def section_graph(suite: Suite) -> None:
    """Capture every operator in a CUDA graph, replay it on other inputs, and compare bit by bit with a plain call."""
    if not suite.on_gpu:
        suite.not_run.append("graph: CUDA graphs need a GPU")
        return
    from dmsa_kernels.aspp import multi_dilation_dwconv
    from dmsa_kernels.refine import refine

    def refining(image: Tensor, masks: Tensor) -> Tensor:
        return refine(image, masks, [1, 2, 4, 8, 12, 24], 10, backend=suite.backend)

    def labelling(image: Tensor, masks: Tensor) -> tuple:
        return refine(image, masks, [8, 16], 10, spec="pamr", return_labels=True, backend=suite.backend)

    def gradients(image: Tensor, masks: Tensor) -> tuple:
        leaf, planes = image.detach().requires_grad_(), masks.detach().requires_grad_()
        out = refine(leaf, planes, [1, 2, 4], 5, spec="lcm", backend=suite.backend)
        return torch.autograd.grad(out.square().sum(), [leaf, planes])

    def convolving(x: Tensor, weight: Tensor) -> tuple:
        leaf, filters = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = multi_dilation_dwconv(leaf, filters, [1, 6, 12, 18], backend=suite.backend)
        return out, *torch.autograd.grad(out.square().sum(), [leaf, filters])

    maps = ((1, 3, 64, 96), (1, 5, 64, 96))
    for name, call, shapes in (
        ("refine", refining, maps),
        ("labels", labelling, maps),
        ("refine, gradients", gradients, maps),
        ("dwconv, gradients", convolving, ((2, 64, 20, 20), (4, 64, 3, 3))),
    ):
        static = [suite.rand(*shape) for shape in shapes]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tensors(call(*static))
        for tensor in static:
            tensor.copy_(suite.rand(*tensor.shape))
        graph.replay()
        torch.cuda.synchronize()
        plain = tensors(call(*static))
        same = all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))
        suite.expect(same, f"{name}: a replayed graph and a plain call differ")
        suite.log(f"{name}: captured, replay equals a plain call: {same}")


MEMORY_BOUNDS = (
    # workload, masks, dilations, T, bound on everything allocated on a GPU (inputs included)
    ("openvoc_ade847", (1, 1281, 512, 683), [8, 16], 10, 4.0e9),
    ("remote_sensing", (1, 6, 6000, 6000), [1, 2, 4], 10, 8.0e9),
)


def section_memory(suite: Suite) -> None:
    """The two workloads that run out of memory today, with everything allocated counted, inputs included.

    On a CPU height and width are a sixteenth, and the bound is the size of the masks' neighbourhoods (B·C·P·H·W).
    """
    from dmsa_kernels.refine import refine

    for name, (batch, channels, height, width), dilations, num_iter, bound in MEMORY_BOUNDS:
        scaled = ""
        if not suite.on_gpu:
            height, width, scaled = height // 16, width // 16, " (height and width divided by 16)"
            num_iter = 2
            bound = 4 * batch * channels * 8 * len(dilations) * height * width
        release(suite.device)
        image, masks = suite.rand(batch, 3, height, width), suite.rand(batch, channels, height, width)
        for what, options in (("planes", {}), ("labels", {"return_labels": True})):

            def call(image=image, masks=masks, dilations=dilations, num_iter=num_iter, options=options):
                return refine(image, masks, dilations, num_iter, backend=suite.backend, **options)

            peak = image.nbytes + masks.nbytes + peak_memory(call, suite.device)[0]
            suite.expect(peak < bound, f"{name}, {what}: {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
            suite.log(f"{name}, {what}: peak {peak / 1e9:.3f} GB of {bound / 1e9:.3f} GB, inputs included{scaled}")
        del image, masks
        release(suite.device)
