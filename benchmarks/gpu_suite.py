"""The proof on a GPU: one script that checks every kernel and measures every row, with a time budget.

    python -m benchmarks.gpu_suite --out FOLDER                        # everything, at most 9 minutes
    python -m benchmarks.gpu_suite --out FOLDER --sections rows --only 'aspp/*'
    python -m benchmarks.gpu_suite --out FOLDER --device cpu --seconds 60   # a dry run of the same code

Needs torch, triton and numpy; timm for the section `train`. FOLDER gets `log.txt` and `<device>.csv`, which belongs
into benchmarks/results (then `python -m benchmarks.reporting`). The suite always ends with what it has: sections and
rows that the budget does not reach are listed as not run. Exit status 1 if any check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import math
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import harness
from dmsa_kernels.backend import why_not_triton

ROW_MODULES = ("bench_refine", "bench_sweep", "bench_aspp", "bench_cam", "bench_step")
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
BUDGET_S = 540.0


class Suite:
    """What the sections share: the device, the clock, the log, the failures and the results."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.device = harness.pick_device(arguments.device)
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


# --- correctness ------------------------------------------------------------------------------------------------------


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
            captured = harness.tensors(call(*static))
        for tensor in static:
            tensor.copy_(suite.rand(*tensor.shape))
        graph.replay()
        torch.cuda.synchronize()
        plain = harness.tensors(call(*static))
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
        harness.release(suite.device)
        image, masks = suite.rand(batch, 3, height, width), suite.rand(batch, channels, height, width)
        for what, options in (("planes", {}), ("labels", {"return_labels": True})):

            def call(image=image, masks=masks, dilations=dilations, num_iter=num_iter, options=options):
                return refine(image, masks, dilations, num_iter, backend=suite.backend, **options)

            peak = image.nbytes + masks.nbytes + harness.peak_memory(call, suite.device)[0]
            suite.expect(peak < bound, f"{name}, {what}: {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
            suite.log(f"{name}, {what}: peak {peak / 1e9:.3f} GB of {bound / 1e9:.3f} GB, inputs included{scaled}")
        del image, masks
        harness.release(suite.device)


def section_tune(suite: Suite) -> None:
    """Measure the launch configurations of the training workloads; log what was chosen and how long it took."""
    from benchmarks.measuring.cases import CASES
    from dmsa_kernels.refine.warmup import warmup

    for case in CASES:
        if not suite.on_gpu:
            case = case.scaled(1, min(3, case.classes), 16, 16)
        if case.pixels * case.classes > 1 << 28:  # shares its bucket's configuration with a smaller one, or takes long
            continue
        if suite.left < 20:
            suite.not_run.append(f"tune: {case.name}")
            continue
        image = suite.rand(case.batch, 3, case.height, case.width)
        masks = suite.rand(*case.shape)
        for precision in ("exact", "fast"):
            start = time.monotonic()
            chosen = warmup(image, masks, case.dilations, case.num_iter, spec=case.spec, precision=precision)
            text = ", ".join(f"{kernel} {config}" for kernel, config in chosen.items()) or "nothing to tune here"
            suite.log(f"{case.name}, {precision}: {text} ({time.monotonic() - start:.1f} s)")


# --- rows -------------------------------------------------------------------------------------------------------------


def row_modules(suite: Suite) -> Iterator[tuple[str, Any]]:
    """Import the modules that list rows; one that cannot be imported here is named as not run."""
    for name in ROW_MODULES:
        try:
            yield name, importlib.import_module(f"benchmarks.measuring.{name}")
        except ImportError as error:
            suite.not_run.append(f"rows: {name}: {error}")


def section_rows(suite: Suite) -> None:
    """Every workload with all its baselines, written to the CSV row by row."""
    mach = harness.machine(suite.device)
    suite.log(mach.describe())
    path = suite.out / f"{slug(mach.hardware)}.csv"
    append = False
    for name, module in row_modules(suite):
        for row in module.rows(suite.device, full=suite.on_gpu):
            if suite.arguments.only and not fnmatch.fnmatch(row.name, suite.arguments.only):
                continue
            if suite.left < 5:
                suite.not_run.append(f"rows: {row.name}")
                continue
            if suite.arguments.skip_compiled:
                kept = tuple(candidate for candidate in row.candidates if not candidate.compiled)
                row = dataclasses.replace(row, candidates=kept)
            try:
                results = harness.measure(
                    row, mach, seconds=suite.arguments.row_seconds, deadline=time.monotonic() + max(1.0, suite.left - 5)
                )
            except Exception as error:
                traceback.print_exc()
                suite.fail(f"{row.name}: {type(error).__name__}: {error}")
                continue
            suite.log(harness.table(results))
            harness.write_csv(results, path, append=append)
            append = True
            for result in results:
                if result.ours and result.status in ("wrong", "error", "out of memory"):
                    suite.fail(f"{row.name}: {result.candidate}: {result.status}: {result.note}")
        suite.log(f"benchmarks.measuring.{name} done")


def slug(text: str) -> str:
    """Return a file name made from a device's name: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- tools and training -----------------------------------------------------------------------------------------------


def section_sanitizer(suite: Suite) -> None:
    """Run a few cases of the checks under compute-sanitizer: memory errors, then races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not suite.on_gpu or tool is None:
        suite.not_run.append("sanitizer: " + ("compute-sanitizer is not installed" if suite.on_gpu else "needs a GPU"))
        return
    for kind in ("memcheck", "racecheck"):
        limit = min(90.0, suite.left - 10)
        if limit < 20:
            suite.not_run.append(f"sanitizer: {kind}")
            continue
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite"]
        command += ["--out", str(suite.out / f"sanitizer-{kind}"), "--sections", "refine,aspp", "--cases", "4"]
        command += ["--seed", str(suite.arguments.seed), "--seconds", str(limit)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
        except subprocess.TimeoutExpired:
            suite.not_run.append(f"sanitizer: {kind} took longer than {limit:.0f} s")
            continue
        text = done.stdout + done.stderr
        (suite.out / f"sanitizer-{kind}.txt").write_text(text, encoding="utf-8")
        summary = [line.strip() for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        if not summary:
            suite.not_run.append(f"sanitizer: {kind} gave no summary; see sanitizer-{kind}.txt")
            continue
        suite.log(f"{kind}: {summary[-1]}")
        suite.expect(done.returncode != 9, f"{kind}: {summary[-1]}")


def section_train(suite: Suite) -> None:
    """Short training with everything on: labels by PAR, the pyramid, four losses, optimiser; losses finite and falling.

    First with the kernels alone, then the method's own training loop where timm is installed.
    """
    from dmsa_kernels.aspp import DepthwiseASPP
    from dmsa_kernels.refine import refine

    torch.manual_seed(suite.draw.getrandbits(30))
    side, classes, width = (160, 21, 64) if suite.on_gpu else (32, 4, 8)
    stem = torch.nn.Conv2d(3, width, 8, stride=8)
    pyramid = DepthwiseASPP(width, width, [1, 6, 12, 18], pointwise_first=True, backend=suite.backend)
    model = torch.nn.Sequential(stem, pyramid, torch.nn.Conv2d(width, classes, 1)).to(suite.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, scores = suite.rand(4, 3, side, side), suite.rand(4, classes, side // 2, side // 2)
    dilations = [1, 2, 4, 8, 12, 24] if suite.on_gpu else [1, 4]
    losses = []
    for step in range(12 if suite.on_gpu else 4):
        labels, _ = refine(
            images, scores, dilations, 10 if suite.on_gpu else 2, resize="image", return_labels=True, backend="auto"
        )
        target = labels[:, ::4, ::4]
        rates = ([1, 1, 2, 3], [1, 6, 12, 18])[step % 2]
        with torch.autocast(suite.device.type, dtype=torch.bfloat16):
            logits = model[2](pyramid(model[0](images), rates))
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    suite.log(f"kernels alone: loss {first:.3f} -> {last:.3f}")
    suite.expect(math.isfinite(last) and last < first, f"the loss went from {first} to {last}")
    for package in ("timm", "yaml", "sklearn"):
        if importlib.util.find_spec(package) is None:
            suite.not_run.append(f"train: the method's training loop needs {package}")
            return
    _train_method(suite)


def _train_method(suite: Suite) -> None:
    """Run `train.py` for two short epochs on the embedded data set, in a process of its own."""
    folder = suite.out / "run"
    options = [
        "--out",
        str(folder),
        "--train.epochs",
        "2",
        "--train.teacher_start",
        "1",
        "--train.teacher_interval",
        "1",
    ]
    options += ["--data.train_images", "64", "--data.val_images", "16", "--data.workers", "0", "--train.log_every", "1"]
    limit = max(20.0, min(150.0, suite.left - 5))
    root = Path(__file__).parents[1]
    if not (root / "train.py").exists():
        suite.not_run.append("train: train.py is not there")
        return
    try:
        done = subprocess.run(
            [sys.executable, "train.py", *options], capture_output=True, text=True, timeout=limit, cwd=root
        )
    except subprocess.TimeoutExpired:
        suite.not_run.append(f"train: train.py took longer than {limit:.0f} s")
        return
    (suite.out / "train.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    suite.expect(done.returncode == 0, f"train.py ended with {done.returncode}; see train.txt")
    suite.log("train.py: " + (done.stdout.strip().splitlines() or ["no output"])[-1])


SECTIONS: dict[str, Callable[[Suite], None]] = {
    "refine": section_refine,
    "aspp": section_aspp,
    "graph": section_graph,
    "memory": section_memory,
    "sanitizer": section_sanitizer,
    "train": section_train,
    "tune": section_tune,
    "rows": section_rows,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for log.txt and the CSV; made if it is not there")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cuda or cpu")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "eager"), help="what the checks test")
    parser.add_argument("--sections", default="all", help=f"comma-separated, of {', '.join(SECTIONS)}; or all")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="time budget of the whole call")
    parser.add_argument("--row-seconds", type=float, default=1.0, help="time of the timed rounds of one row")
    parser.add_argument("--only", default="", help="rows whose name matches, such as 'refine/afa_train/*'")
    parser.add_argument("--skip-compiled", action="store_true", help="leave the torch.compile baselines out")
    parser.add_argument("--cases", type=int, default=48, help="random cases of each correctness section")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random cases (drawn and logged if absent)")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().getrandbits(30)
    chosen = list(SECTIONS) if arguments.sections == "all" else arguments.sections.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise ValueError(f"sections={unknown} are not known; expected some of {', '.join(SECTIONS)}")

    suite = Suite(arguments)
    with contextlib.closing(suite.lines):
        suite.log(
            f"{suite.device}, backend under test {suite.backend}, seed {arguments.seed}, commit {harness.commit()}"
        )
        suite.log(", ".join(f"{name} {version}" for name, version in harness.versions().items()))
        for name in chosen:
            suite.section = name
            if suite.left < 5:
                suite.not_run.append(name)
                continue
            suite.log(f"--- {name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
            try:
                SECTIONS[name](suite)
            except Exception as error:
                traceback.print_exc()
                suite.fail(f"{type(error).__name__}: {error}")
        for line in suite.not_run:
            suite.log(f"not run: {line}")
        for line in suite.failures:
            suite.log(f"failed: {line}")
        suite.log(f"{len(suite.failures)} failures, {len(suite.not_run)} not run")
    return 1 if suite.failures else 0


if __name__ == "__main__":
    sys.exit(main())
