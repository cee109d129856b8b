"""The refinement against the materialising implementation, padded slices and torch.compile of padded slices.

    pytest benchmarks/measuring/bench_refine.py --benchmark-only    # a GPU if there is one; a CPU at scaled sizes
    pytest benchmarks/measuring/bench_refine.py --benchmark-only -k afa_train

Ours must agree with float64 within the bound before anything is timed. On a CPU most rows run on a smaller map, as
their lines say; `afa_train` and `classes21`, the two targets there, run at full size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import baselines, cases, resident
from benchmarks.measuring.rows import Candidate, Row
from dmsa_kernels import backend
from dmsa_kernels.refine import local_affinity, propagate, refine
from dmsa_kernels.refine.warmup import warmup

# Absolute bounds on scores in [0, 1]. "exact" promises 1e-5: PAMR on the smooth maps drawn here divides by small
# deviations, and every float32 form, the baselines too, is 2e-6 to 4e-6 off. "fast" rounds the affinity to 11 bits.
EXACT, FAST = 1e-5, 1e-2
# Share of pixels whose label may differ from the reference's: random scores have near-ties.
LABELS = 1e-3
# Weights from which on only a corner of the map is checked against the reference, and the side of that corner.
LARGE, CORNER = 400_000_000, 512
COMPILED_ON_CPU = ("afa_train", "classes21")
LABEL_CASES = ("openvoc_voc", "openvoc_ade847")
GRADIENT_CASES = ("afa_train", "dmsa_voc")
HALF_CASES = ("dmsa_coco", "openvoc_ade")


def _inputs(case: cases.RefineCase, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """A smooth image with noise, so that neither sigma nor the affinity is trivial, and scores in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    size = (case.height, case.width)
    coarse = torch.rand(case.batch, 3, 8, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)
    image += 0.05 * torch.rand(case.batch, 3, *size, generator=generator)
    masks = torch.rand(case.batch, case.classes, *size, generator=generator)
    return image.to(device), masks.to(device)


def _reference(image: Tensor, masks: Tensor, case: cases.RefineCase) -> Tensor:
    """The padded slices in double precision; of a very large map its corner, with what that depends on.

    Not our own code, so that a mistake in all of it shows.
    """
    sides = [min(side, _kept(case) + case.num_iter * max(case.dilations)) for side in (case.height, case.width)]
    image, masks = (x[:, :, : sides[0], : sides[1]].double() for x in (image, masks))
    result = baselines.padded_slices(image, masks, case.dilations, case.num_iter, case.spec)
    return result[:, :, : _kept(case), : _kept(case)].float()


def _kept(case: cases.RefineCase) -> int:
    """Rows and columns that are compared."""
    return CORNER if case.pixels * case.neighbours > LARGE else max(case.height, case.width)


def _absolute(result: Tensor, expected: Tensor) -> float:
    height, width = expected.shape[-2:]
    difference = (result[..., :height, :width].double() - expected.double()).abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


def _row(case: cases.RefineCase, variant: str, dtype: torch.dtype = torch.float32, **rest: Any) -> Row:
    """Return a row with what the rows of a case have in common."""
    common = {"inputs": functools.partial(_inputs, case), "launch_bound": case.launch_bound}
    return Row(
        family="refine",
        workload=case.name,
        variant=variant,
        dtype=str(dtype).removeprefix("torch."),
        shape=",".join(map(str, case.shape)),
        **(common | rest),
    )


def refine_row(case: cases.RefineCase, scaled_from: str, full: bool, dtype: torch.dtype = torch.float32) -> Row:
    arguments = (case.dilations, case.num_iter, case.spec)
    keywords = {"dilations": case.dilations, "num_iter": case.num_iter, "spec": case.spec}
    large = case.materialised_bytes()
    masks_bytes = 4 * case.pixels * case.classes
    weights_bytes = 4 * case.pixels * case.neighbours

    def compiled(image: Tensor, masks: Tensor) -> Tensor:
        return baselines.compiled_padded_slices()(image, masks.float(), *arguments)

    def inputs(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        image, masks = _inputs(case, device, seed)
        return image, masks.to(dtype)

    def one_launch(image: Tensor, masks: Tensor) -> Tensor:
        with backend.resident(True):
            return refine(image, masks, **keywords)

    together = Candidate("ours, one launch where it fits", one_launch, ours=True, why_not=resident.WHY_NOT_MEASURED)
    chunks = Candidate(
        "materialising, 30 classes at a time",
        lambda image, masks: baselines.materialising_by_chunks(image, masks.float(), *arguments),
        peak_bytes=3 * large * min(30, case.classes) // max(case.classes, 1) + 2 * masks_bytes,
    )
    # The compiler takes minutes a row on a CPU; the rows of the CPU path's targets have it.
    skip_compiled = None if full or case.name in COMPILED_ON_CPU else "on a CPU only compiled at the target rows"
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    return _row(
        case,
        "refine",
        dtype,
        inputs=inputs,
        candidates=(
            *(
                Candidate(
                    name,
                    functools.partial(refine, precision=precision, **keywords),
                    tune=functools.partial(warmup, precision=precision, **keywords),
                    ours=True,
                    tolerance=tolerance,
                )
                for name, precision, tolerance in (("ours", "exact", None), ("ours, fast", "fast", FAST))
            ),
            *([together] if case.launch_bound and full else []),
            Candidate(
                "materialising",
                lambda image, masks: baselines.materialising(image, masks.float(), *arguments),
                peak_bytes=3 * large,
            ),
            *([chunks] if case.classes > 30 else []),
            Candidate(
                "padded slices",
                lambda image, masks: baselines.padded_slices(image, masks.float(), *arguments),
                peak_bytes=5 * masks_bytes + 4 * weights_bytes,
            ),
            Candidate("torch.compile(padded slices)", compiled, compiled=True, why_not=skip_compiled),
        ),
        reference=functools.partial(_reference, case=case),
        tolerance=EXACT + 2 * rounding,
        error=_absolute,
        floor_bytes=case.floor_bytes(dtype.itemsize),
        cache_bytes=case.cache_bytes(dtype.itemsize),
        operations=case.operations,
        items=case.batch,
        scaled_from=scaled_from,
        note=case.note,
    )


def _shared_affinity_row(case: cases.RefineCase) -> Row:
    """Eight mask stacks of one image, as a training iteration of AFA has them: one affinity serves all."""

    def ours(image: Tensor, masks: Tensor) -> Tensor:
        affinity = local_affinity(image, case.dilations, spec=case.spec)
        return torch.stack([propagate(affinity, masks, case.num_iter) for _ in range(8)])

    def eight(image: Tensor, masks: Tensor) -> Tensor:
        return torch.stack(
            [baselines.materialising(image, masks, case.dilations, case.num_iter, case.spec) for _ in range(8)]
        )

    def reference(image: Tensor, masks: Tensor) -> Tensor:
        return _reference(image, masks, case).expand(8, *case.shape)

    return _row(
        case,
        "8 calls, one affinity",
        candidates=(
            Candidate("ours", ours, ours=True),
            Candidate("materialising", eight, peak_bytes=3 * case.materialised_bytes()),
        ),
        reference=reference,
        tolerance=EXACT,
        error=_absolute,
        operations=8 * case.operations,
    )


def _labels_row(case: cases.RefineCase, scaled_from: str) -> Row:
    """Labels without a second copy of the planes, against planes and argmax."""
    arguments = (case.dilations, case.num_iter, case.spec)

    def ours(image: Tensor, masks: Tensor) -> Tensor:
        return refine(image, masks, case.dilations, case.num_iter, spec=case.spec, return_labels=True)[0]

    return _row(
        case,
        "labels",
        candidates=(
            Candidate("ours", ours, ours=True),
            Candidate(
                "materialising",
                lambda image, masks: baselines.materialising(image, masks, *arguments).argmax(1),
                peak_bytes=3 * case.materialised_bytes(),
            ),
            Candidate(
                "padded slices", lambda image, masks: baselines.padded_slices(image, masks, *arguments).argmax(1)
            ),
        ),
        reference=lambda image, masks: _reference(image, masks, case).argmax(1),
        tolerance=LABELS,
        scaled_from=scaled_from,
    )


def _gradient_row(case: cases.RefineCase, scaled_from: str) -> Row:
    """Forward and the gradients of masks and image, as Box2Mask's and PAR's differentiable uses need them."""
    arguments = (case.dilations, case.num_iter, case.spec)

    def inputs(device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        image, masks = _inputs(case, device, seed)
        return image, masks, torch.linspace(-1, 1, case.width, device=device).expand_as(masks)

    def gradients(run):
        def call(image: Tensor, masks: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
            leaves = [image.detach().requires_grad_(), masks.detach().requires_grad_()]
            with torch.enable_grad():
                out = run(*leaves, *arguments)
                return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))

        return call

    def ours(image: Tensor, masks: Tensor, dilations: tuple[int, ...], num_iter: int, spec: str) -> Tensor:
        return refine(image, masks, dilations, num_iter, spec=spec)

    def reference(image: Tensor, masks: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        return gradients(baselines.padded_slices)(image.double(), masks.double(), upstream)

    # Autograd keeps the neighbours of every iteration.
    kept = case.num_iter * case.materialised_bytes()
    return _row(
        case,
        "forward+backward",
        inputs=inputs,
        candidates=(
            Candidate("ours", gradients(ours), ours=True),
            Candidate("materialising", gradients(baselines.materialising), peak_bytes=kept),
            Candidate("padded slices", gradients(baselines.padded_slices), peak_bytes=kept),
        ),
        reference=reference,
        # The gradient of the image passes the reciprocal of small deviations.
        tolerance=3e-4,
        scaled_from=scaled_from,
    )


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """Every workload; scaled down where `full` is not set, with the two targets of the CPU path first."""
    table = cases.CASES if full else (cases.CASES[0], cases.CPU_TARGET, *cases.CASES[1:])
    result, others = [], []
    for case in table:
        shape = None if full else cases.CPU_SHAPES.get(case.name)
        scaled_from = "" if shape is None else ",".join(map(str, case.shape))
        sized = case if shape is None else case.scaled(*shape)
        result.append(refine_row(sized, scaled_from, full))
        if case.name in LABEL_CASES:
            others.append(_labels_row(sized, scaled_from))
        if case.name in GRADIENT_CASES:
            # Everything that autograd keeps for the baselines must fit.
            small = sized.scaled(1, sized.classes, 80, 80) if not full else sized.scaled(1, *sized.shape[1:])
            others.append(_gradient_row(small, "" if small == case else ",".join(map(str, case.shape))))
        if full and case.name in HALF_CASES:
            others += [refine_row(sized, scaled_from, full, dtype) for dtype in (torch.float16, torch.bfloat16)]
    return [*result, _shared_affinity_row(cases.CASES[0]), *others]


def test_refine(row: Row, measure) -> None:
    """Every workload through the harness."""
    measure(row)
