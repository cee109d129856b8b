"""What each operator costs: bytes, operations, launches; predicted times; and how far the model is from measurements.

    python -m benchmarks.modelling.cost_model             # prints the page
    python -m benchmarks.modelling.cost_model --write     # puts it between the markers in benchmarks/NOTES.md
    python -m benchmarks.modelling.cost_model --check     # exit status 1 if NOTES.md is not what the results give

A time is predicted as `calls + operations / rate + bytes / bandwidth` on a CPU, with the three constants of each
operator fitted to the committed results, and as the larger of the device-memory and the cache time over an assumed
efficiency on a GPU, plus the launches. No number for a GPU on this page was measured.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from benchmarks.measuring.cases import CASES, SIX, RefineCase
from benchmarks.measuring.results import RESULTS, Result, number, read_csv, result_files
from benchmarks.modelling import gpus
from benchmarks.modelling.fit import fit, measured
from benchmarks.modelling.gpus import Gpu
from benchmarks.reporting.tables import renew
from dmsa.scoring.table import markdown
from dmsa_kernels import tuning

NOTES = Path(__file__).parents[1] / "NOTES.md"
BEGIN, END = "<!-- cost model:begin -->", "<!-- cost model:end -->"


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes."""

    floor_bytes: int
    """Every input of the whole operator read once, every output written once."""
    device_bytes: int
    """What the kernels move through device memory: the stored affinity, and planes that do not stay in L2."""
    l2_bytes: int
    """What L2 delivers: of every plane the different pixels that a tile's taps meet, and the weights."""
    cache_bytes: int
    """Loads from the first-level cache."""
    operations: int
    """Floating-point operations, a multiply-add counting two."""
    launches: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def affinity_cost(case: RefineCase, guide: int = 3) -> Cost:
    """Affinity of a guide `[B, K, H, W]` in float32: K planes read, P weights written; two passes over the neighbours.

    A thread keeps its samples: P·K neighbour loads. About 11 operations a neighbour and channel, as in the workload
    table.
    """
    read = 4 * case.pixels * guide
    loads = case.pixels * case.neighbours * guide
    moved = read + 4 * case.pixels * case.neighbours
    return Cost(read, moved, moved, 4 * loads, 11 * loads, 1)


def propagate_cost(case: RefineCase, l2_bytes: int = 40 << 20) -> Cost:
    """T iterations over float32 masks `[B, C, H, W]`, in the chunks and tiles that the kernels take.

    Where a chunk's weights and its two planes fit into three quarters of the L2 cache, masks are read and written once
    and weights once a chunk. Otherwise every iteration passes device memory.
    """
    batch, channels, height, width = case.shape
    neighbours, map_size = case.neighbours, height * width
    side = tuning.plane_width(channels, 4)
    groups = -(-channels // side)
    plane, weight = 4 * map_size * side, 4 * map_size * neighbours
    images, some = tuning.plan_chunks(batch, groups, plane, weight, map_size * neighbours * side, 1, l2_bytes)
    chunks = -(-batch // images) * -(-groups // some)
    step = tuning.plan_step("propagate_fwd", None, case.dilations, side, images, some, height, width)
    masks, weights = 4 * case.pixels * channels, 4 * case.pixels * neighbours
    once = 2 * masks + weights * -(-groups // some)
    stays = images * (weight + 2 * some * plane) <= 0.75 * l2_bytes
    met = tuning.distinct_taps(case.dilations, step.config.block_h, step.config.block_w, step.row_stride)
    from_l2 = 4 * case.pixels * groups * side * (min(met, neighbours) + 1) + weights * -(-groups // step.groups_each)
    loads = case.cache_bytes()
    return Cost(
        2 * masks,
        once if stays else once * case.num_iter,
        round(from_l2 * case.num_iter),
        loads,
        loads // 2,  # a multiply-add for each load of four bytes
        chunks * (case.num_iter + (0 if side == 1 or images * some * plane >= tuning.MIN_PLANAR_BYTES else 2)),
    )


def refine_cost(case: RefineCase, l2_bytes: int = 40 << 20) -> Cost:
    """Affinity and propagation; the weights between the two count as moved, not as floor."""
    return affinity_cost(case) + propagate_cost(case, l2_bytes)


def materialising_bytes(case: RefineCase) -> int:
    """Bytes that the implementation people paste moves: six passes over B·C·P·H·W in every iteration.

    One-hot shift convolutions write it, the concatenation reads and writes it, the product with the weights reads and
    writes it, the sum reads it.
    """
    return 6 * case.num_iter * case.materialised_bytes()


def dwconv_cost(batch: int, channels: int, height: int, width: int, branches: int, *, backward: bool = False) -> Cost:
    """Multi-dilation depthwise 3 x 3 convolution in float32: x read once, R outputs written once.

    Backward: R gradients and x are read once for the gradient of x and once for that of the weights, one is written.
    """
    elements = batch * channels * height * width
    moved = 4 * elements * (2 * branches + 2 if backward else branches + 1)
    taps = 9 * elements * branches * (2 if backward else 1)
    return Cost(moved, moved, moved, 4 * taps, 2 * taps, 3 if backward else 1)


def vit_operations(tokens: int, width: int = 384, blocks: int = 12) -> int:
    """Forward pass of ViT blocks on one image: 12 D^2 multiply-adds a token in the layers, 2 N D in the attention."""
    return blocks * (24 * tokens * width * width + 4 * tokens * tokens * width)


GPUS = tuple(gpus.GPUS.values())
SHOWN = gpus.GPUS["H200"]
"""Whose counts and bound the tables show."""
KERNEL_EFFICIENCY = 0.7
"""Assumed share of the tighter ceiling that the kernels reach: the target, not a measurement."""
LAUNCH_S = 4e-6
"""Assumed time of a launch from PyTorch that is not hidden behind the previous kernel."""
LIBRARY_EFFICIENCY = 0.8
"""Assumed share of the memory bandwidth that PyTorch's own elementwise kernels reach."""


def terms(cost: Cost, gpu: Gpu) -> dict[str, float]:
    """Return the seconds that each of an operator's counts would take alone."""
    rates = {
        "memory": cost.device_bytes / gpu.memory_bytes_per_s,
        "L2": cost.l2_bytes / gpu.l2_bytes_per_s,
        "L1": cost.cache_bytes / gpu.l1_bytes_per_s,
        "arithmetic": cost.operations / gpu.fp32_flops,
    }
    return {name: seconds / KERNEL_EFFICIENCY for name, seconds in rates.items()} | {
        "launches": cost.launches * LAUNCH_S
    }


def predicted_seconds(cost: Cost, gpu: Gpu) -> float:
    """Predict the time of an operator on a GPU."""
    found = terms(cost, gpu)
    launches = found.pop("launches")
    return max(found.values()) + launches


def bound_by(cost: Cost, gpu: Gpu) -> str:
    """Name the largest term of the prediction."""
    found = terms(cost, gpu)
    return max(found, key=found.__getitem__)


ASPP_WORKLOADS = {
    # name: B, C, H, W, R
    "vit 20x20": (32, 384, 20, 20, 4),
    "vit 40x40": (32, 384, 40, 40, 4),
    "vit 28x28": (43, 384, 28, 28, 4),
    "daformer": (2, 1024, 128, 128, 3),
    "deeplabv3+": (4, 2048, 64, 64, 3),
    "smp": (8, 2048, 32, 32, 3),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together."""

    gpu: Gpu
    count: int
    allreduce_gb_per_s: float
    """Assumed bandwidth of a ring all-reduce on one GPU's link."""
    loader_workers: int
    """Data-loader processes of each GPU."""


CLUSTERS = (
    Cluster(gpus.GPUS["3090"], 6, 10, 8),
    Cluster(gpus.GPUS["A100"], 64, 20, 8),
    Cluster(gpus.GPUS["H100"], 64, 40, 8),
)
MATRIX_EFFICIENCY = 0.4
"""Assumed share of the matrix rate that the ViT's layers reach."""
LAUNCHES_A_STEP = 1_500
"""Assumed kernels of one training step (12 blocks, maps, refinement, decoder twice, losses, optimiser), uncompiled."""
TRAINABLE_PARAMETERS = 5_500_000
"""Last block, pyramid, two decoder blocks and class tokens at width 384, to the nearest half million."""
IMAGES_PER_WORKER_S = 80.0
"""Assumed samples a second and worker (JPEG of 640x480, crop, jitter, blur) where no measurement is committed."""
COCO_IMAGES, COCO_VAL = 118_287, 5_000
EPOCHS, BATCH = 200, 256
CROP_TOKENS, VAL_TOKENS, BANK_TOKENS = 401, 1_601, 6_401
BANK_WINDOWS, BANK_KEPT = 142, 0.6
"""Windows of an image at scales .5 .4 .3 .2, and the assumed share of them that becomes a crop."""


@dataclass(frozen=True)
class RunPrediction:
    """Hours of the paper's COCO run by part, of all epochs together."""

    hours: dict[str, float]

    @property
    def step(self) -> float:
        """Hours of the steps: the host launches while the device computes, the loader works beside both."""
        h = self.hours
        return max(h["network"] + h["refinement"], h["launches"], h["data"]) + h["all-reduce"]

    @property
    def total(self) -> float:
        return self.hours["bank"] + self.step + self.hours["evaluation"]

    @property
    def dominant(self) -> str:
        """The longest part of a training run; what is hidden behind a longer one costs nothing."""
        h = self.hours
        beside = {"network": h["network"] + h["refinement"], "launches": h["launches"], "data": h["data"]}
        longest = max(beside, key=beside.__getitem__)
        shown = ["network", "refinement"] if longest == "network" else [longest]
        part = max([*shown, "bank", "all-reduce"], key=h.__getitem__)
        return {"bank": "feature bank", "data": "data loading"}.get(part, part)


def loader_rate(files: Sequence[tuple[str, Sequence[Result]]]) -> float:
    """Return the measured samples a second of one loader process, or the assumption where there is none."""
    rates = [
        1e3 * result.items / result.median_ms
        for _, results in files
        for result in results
        if (result.workload, result.variant, result.ours, result.status) == ("loading", "train", True, "ok")
    ]
    return max(rates, default=IMAGES_PER_WORKER_S)


def predict_run(classes: int, cluster: Cluster, images_per_worker_s: float = IMAGES_PER_WORKER_S) -> RunPrediction:
    """Predict the hours of the paper's COCO run, networks in bfloat16, with `classes` channels to refine."""
    gpu = cluster.gpu
    rate = MATRIX_EFFICIENCY * gpu.bf16_flops
    steps = math.ceil(COCO_IMAGES / BATCH)
    share = math.ceil(BATCH / cluster.count)  # the largest one: the others wait for it
    # Frozen blocks once; the last block by the student forward and backward and by the teacher; the same for the
    # decoder's two blocks; the maps cost a third of a forward pass.
    image_operations = (
        vit_operations(CROP_TOKENS) * 4 / 3
        + 4 * vit_operations(CROP_TOKENS, blocks=1)
        + 4 * vit_operations(CROP_TOKENS + classes, blocks=2)
    )
    network = EPOCHS * steps * share * image_operations / rate
    cost = refine_cost(RefineCase("step", share, classes, 80, 80, SIX, 10), gpu.l2_bytes)
    refinement = EPOCHS * steps * predicted_seconds(cost, gpu)
    ring = 2 * (cluster.count - 1) / cluster.count * 4 * TRAINABLE_PARAMETERS / (cluster.allreduce_gb_per_s * 1e9)
    crops = BANK_WINDOWS * BANK_KEPT
    bank = COCO_IMAGES * (vit_operations(BANK_TOKENS) + crops * vit_operations(VAL_TOKENS)) / (rate * cluster.count)
    evaluation = EPOCHS * COCO_VAL * vit_operations(VAL_TOKENS) * 1.2 / (rate * cluster.count)
    loaded = EPOCHS * COCO_IMAGES / (cluster.count * cluster.loader_workers * images_per_worker_s)
    seconds = {
        "bank": bank,
        "network": network,
        "refinement": refinement,
        "launches": EPOCHS * steps * LAUNCHES_A_STEP * LAUNCH_S,
        "data": loaded,
        "all-reduce": EPOCHS * steps * ring,
        "evaluation": evaluation,
    }
    return RunPrediction({part: spent / 3600.0 for part, spent in seconds.items()})


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [*markdown([head, *lines]), ""]


def _milliseconds(seconds: float) -> str:
    return number(1e3 * seconds, 2)


def _operator_table(
    title: str, letters: str, workloads: Iterable[tuple[str, tuple, Callable[[Gpu], Cost]]]
) -> list[str]:
    """Return the counts and predictions of workloads: each a name, its sizes, and its cost on a GPU."""
    counts = ["floor, MB", "L1 loads, GB", "L2, GB", "GFLOP", "launches"]
    head = [title, letters, *counts, *(f"{gpu.name}, ms" for gpu in GPUS), "bound by (H200)"]
    return _table(head, (_operator_line(*workload) for workload in workloads))


def _operator_line(name: str, sizes: tuple, cost: Callable[[Gpu], Cost]) -> list[str]:
    costs = [cost(gpu) for gpu in GPUS]
    shown = costs[GPUS.index(SHOWN)]
    return [
        name,
        ", ".join(map(str, sizes)),
        number(shown.floor_bytes / 1e6),
        number(shown.cache_bytes / 1e9),
        number(shown.l2_bytes / 1e9),
        number(shown.operations / 1e9),
        str(shown.launches),
        *(_milliseconds(predicted_seconds(c, gpu)) for c, gpu in zip(costs, GPUS, strict=True)),
        bound_by(shown, SHOWN),
    ]


def _section(title: str, text: str = "") -> list[str]:
    return [f"### {title}", "", *([text, ""] if text else [])]


def page(files: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """Return the text between the markers of NOTES.md."""
    lines = _section(
        "Rates used",
        "From public datasheets and architecture papers, except for L2, which is assumed (of MI300X: its Infinity "
        "Cache), and an H100's clock (sustained). Assumed: "
        f"kernels reach {KERNEL_EFFICIENCY:.0%} of the tighter ceiling (the "
        f"target), a launch takes {LAUNCH_S * 1e6:.0f} us, PyTorch's elementwise kernels reach "
        f"{LIBRARY_EFFICIENCY:.0%} of the bandwidth, the ViT's layers {MATRIX_EFFICIENCY:.0%} of the matrix rate.",
    )
    lines += _table(
        ["GPU", "memory, GB/s", "L2, GB/s", "L1, GB/s", "L1 from", "fp32, TFLOP/s", "bf16 matrix, TFLOP/s", "L2, MB"],
        (
            [
                g.name,
                f"{g.memory_bytes_per_s / 1e9:.0f}",
                f"{g.l2_bytes_per_s / 1e9:.0f}",
                f"{g.l1_bytes_per_s / 1e9:.0f}",
                f"{g.multiprocessors} x {g.l1_bytes_per_clock} B x {g.clock_hz / 1e9:g} GHz",
                f"{g.fp32_flops / 1e12:g}",
                f"{g.bf16_flops / 1e12:g}",
                str(g.l2_bytes >> 20),
            ]
            for g in GPUS
        ),
    )
    lines += _section("Refinement: counts and predictions (float32; nothing here was measured)")
    lines += _operator_table(
        "workload",
        "B,C,H,W,dilations,T",
        ((c.name, (*c.shape, c.dilations, c.num_iter), lambda gpu, c=c: refine_cost(c, gpu.l2_bytes)) for c in CASES),
    )
    lines += [
        "The implementation that is pasted from repository to repository moves six passes over B·C·P·H·W elements in "
        "every iteration; predicted with the same rates, and how many times longer that is than the prediction above:",
        "",
    ]
    lines += _table(
        ["workload", *[gpu.name for gpu in GPUS]],
        ([case.name, *(_materialising(gpu, case) for gpu in GPUS)] for case in CASES),
    )
    lines += _section("Depthwise convolution: counts and predictions (float32, 3x3; nothing here was measured)")
    for title, passes in (("forward", (False,)), ("forward + backward", (False, True))):
        lines += _operator_table(
            f"workload, {title}",
            "B,C,H,W,R",
            (
                (name, sizes, lambda _, z=sizes, n=passes: _total(dwconv_cost(*z, backward=b) for b in n))
                for name, sizes in ASPP_WORKLOADS.items()
            ),
        )
    lines += _fits(files)
    lines += _runs(loader_rate(files))
    return "\n".join(lines).rstrip()


def _total(costs: Iterable[Cost]) -> Cost:
    return functools.reduce(operator.add, costs)


def _materialising(gpu: Gpu, case: RefineCase) -> str:
    # Product and concatenation exist together, and the convolutions' results until the concatenation is done.
    if 2 * case.materialised_bytes() > gpu.memory_bytes:
        return "out of memory"
    # A pad and a convolution for each dilation, then concatenation, product and sum.
    launches = case.num_iter * (2 * len(case.dilations) + 3) * LAUNCH_S
    seconds = max(materialising_bytes(case) / (LIBRARY_EFFICIENCY * gpu.memory_bytes_per_s), launches)
    ours = predicted_seconds(refine_cost(case, gpu.l2_bytes), gpu)
    return f"{_milliseconds(seconds)} ms, {number(seconds / ours, 2)}x"


def _fits(files: Sequence[tuple[str, Sequence[Result]]]) -> list[str]:
    lines = _section(
        "The model against what was measured",
        "Seconds = constant a call + operations x s + floor bytes x s, not negative, fitted to the relative error. The "
        "last column predicts each row from a fit without it.",
    )
    for stem, results in files:
        fits = [fit(name, rows) for name, rows in measured(results).items() if len(rows) >= 4]
        if not fits:
            continue
        lines += [f"{results[0].hardware}, `results/{stem}.csv`:", ""]
        lines += _table(
            ["operator", "rows", "us a call", "GFLOP/s", "GB/s", "median error", "worst error", "median, left out"],
            (
                [
                    item.operator,
                    str(len(item.predictions)),
                    number(1e6 * item.constants[0], 2),
                    *(number(1e-9 / constant, 2) if constant else "no term" for constant in item.constants[1:]),
                    *(f"{error:.0%}" for error in (item.median_error, item.worst_error, item.left_out_error)),
                ]
                for item in fits
            ),
        )
        lines += _table(
            ["operator", "row", "measured, ms", "model, ms"],
            (
                [item.operator, name, number(1e3 * seconds), number(1e3 * predicted)]
                for item in fits
                for name, seconds, predicted in item.predictions
            ),
        )
    return lines


def _runs(loaded: float) -> list[str]:
    runs = [
        (preset, cluster, predict_run(classes, cluster, loaded))
        for preset, classes in (("coco_stuff27", 27), ("coco80", 81))
        for cluster in CLUSTERS
    ]
    lines = _section(
        "The paper's COCO run, predicted",
        f"{COCO_IMAGES:,} images, {EPOCHS} epochs, global batch {BATCH}, ViT-S/8 at 160 px, networks in bfloat16, "
        f"{EPOCHS} evaluations of {COCO_VAL:,} images at 320 px, feature bank once. Hours by part; a step takes the "
        "largest of network + refinement, launches and data, plus the all-reduce. Assumed: "
        f"{LAUNCHES_A_STEP:,} launches a step, {loaded:.0f} samples a second and loader process "
        f"({CLUSTERS[0].loader_workers} for each GPU), {BANK_KEPT:.0%} of the bank's windows kept, all-reduce at "
        f"{', '.join(f'{c.allreduce_gb_per_s:g} GB/s ({c.count} x {c.gpu.name})' for c in CLUSTERS)}.",
    )
    return lines + _table(
        ["preset", "GPUs", *runs[0][2].hours, "total, hours", "dominated by"],
        (
            [
                preset,
                f"{cluster.count} x {cluster.gpu.name}",
                *(number(hours, 2) for hours in run.hours.values()),
                f"**{number(run.total, 2)}**",
                run.dominant,
            ]
            for preset, cluster, run in runs
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelling.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of CSV files")
    parser.add_argument("--notes", type=Path, default=NOTES, help="file with the markers")
    parser.add_argument("--write", action="store_true", help="put the page between the markers")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args(argv)
    text = page([(path.stem, read_csv(path)) for path in result_files(arguments.results)])
    if not (arguments.write or arguments.check):
        print(text)
        return 0
    return renew(
        arguments.notes, text, (BEGIN, END), "python -m benchmarks.modelling.cost_model --write", check=arguments.check
    )


if __name__ == "__main__":
    sys.exit(main())
