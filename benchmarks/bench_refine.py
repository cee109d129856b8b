"""The refinement against the materialising implementation, padded slices and torch.compile of padded slices.

    pytest benchmarks/bench_refine.py --benchmark-only              # a GPU if there is one; a CPU at scaled sizes
    pytest benchmarks/bench_refine.py --benchmark-only -k afa_train

Ours must agree with float64 within the bound before anything is timed. On a CPU most rows run on a smaller map, as
their lines say; `afa_train` and `classes21`, the two targets there, run at full size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import baselines, cases
from benchmarks.harness import Candidate, Row
from dmsa_kernels.refine import local_affinity, propagate, refine

# Absolute bound of the issue, on scores in [0, 1]; "fast" rounds the affinity to 11 bits in every iteration.
EXACT, FAST = 2e-6, 1e-2


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
    return refine(
        image.double(), masks.double(), case.dilations, case.num_iter, spec=case.spec, backend="eager"
    ).float()


def _absolute(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected.double()).abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


def _refine_row(case: cases.RefineCase, scaled_from: str) -> Row:
    arguments = (case.dilations, case.num_iter, case.spec)
    keywords = {"dilations": case.dilations, "num_iter": case.num_iter, "spec": case.spec}
    large = case.materialised_bytes()

    def compiled(image: Tensor, masks: Tensor) -> Tensor:
        return baselines.compiled_padded_slices()(image, masks, *arguments)

    return Row(
        family="refine",
        workload=case.name,
        variant="refine",
        dtype="float32",
        shape=",".join(map(str, case.shape)),
        inputs=functools.partial(_inputs, case),
        candidates=(
            Candidate("ours", functools.partial(refine, **keywords), ours=True),
            Candidate("ours, fast", functools.partial(refine, precision="fast", **keywords), ours=True, tolerance=FAST),
            Candidate(
                "materialising",
                lambda image, masks: baselines.materialising(image, masks, *arguments),
                peak_bytes=3 * large,
            ),
            Candidate("padded slices", lambda image, masks: baselines.padded_slices(image, masks, *arguments)),
            Candidate("torch.compile(padded slices)", compiled, compiled=True),
        ),
        reference=functools.partial(_reference, case=case),
        tolerance=EXACT,
        error=_absolute,
        floor_bytes=case.floor_bytes(),
        cache_bytes=case.cache_bytes(),
        operations=case.operations,
        items=case.batch,
        scaled_from=scaled_from,
        launch_bound=case.launch_bound,
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

    return Row(
        family="refine",
        workload=case.name,
        variant="8 calls, one affinity",
        dtype="float32",
        shape=",".join(map(str, case.shape)),
        inputs=functools.partial(_inputs, case),
        candidates=(
            Candidate("ours", ours, ours=True),
            Candidate("materialising", eight, peak_bytes=3 * case.materialised_bytes()),
        ),
        reference=reference,
        tolerance=EXACT,
        error=_absolute,
        operations=8 * case.operations,
        launch_bound=case.launch_bound,
    )


def rows(device: torch.device, full: bool) -> list[Row]:
    """Every workload; scaled down where `full` is not set, with the two targets of the CPU path first."""
    table = cases.CASES if full else (cases.CASES[0], cases.CPU_TARGET, *cases.CASES[1:])
    result = []
    for case in table:
        shape = None if full else cases.CPU_SHAPES.get(case.name)
        scaled_from = "" if shape is None else ",".join(map(str, case.shape))
        result.append(_refine_row(case if shape is None else case.scaled(*shape), scaled_from))
    return [*result, _shared_affinity_row(cases.CASES[0])]


def test_refine(row: Row, measure) -> None:
    measure(row)
