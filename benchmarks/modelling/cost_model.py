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
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.measuring import cases
from benchmarks.measuring.results import RESULTS, Result, number, read_csv, result_files
from benchmarks.modelling import gpus
from benchmarks.modelling.gpus import Gpu
from dmsa_kernels import tuning

NOTES = Path(__file__).parents[1] / "NOTES.md"
BEGIN, END = "<!-- cost model:begin -->", "<!-- cost model:end -->"


# --- counts -----------------------------------------------------------------------------------------------------------


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
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(cost: Cost) -> tuple[int, ...]:
    return cost.floor_bytes, cost.device_bytes, cost.l2_bytes, cost.cache_bytes, cost.operations, cost.launches


def affinity_cost(batch: int, height: int, width: int, neighbours: int, guide: int = 3, itemsize: int = 4) -> Cost:
    """Affinity of a guide `[B, K, H, W]`: K planes read, P weights written; two passes over the neighbours."""
    pixels = batch * height * width
    read = pixels * guide * itemsize
    # A thread keeps its samples: P·K neighbour loads. About 11 operations a neighbour and channel, as in the workload
    # table.
    loads = pixels * neighbours * guide
    moved = read + 4 * pixels * neighbours
    return Cost(read, moved, moved, loads * itemsize, 11 * loads, 1)


def propagate_cost(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dilations: tuple[int, ...],
    num_iter: int,
    itemsize: int = 4,
    l2_bytes: int = 40 << 20,
) -> Cost:
    """T iterations over masks `[B, C, H, W]`, in the chunks and tiles that the kernels take.

    Where a chunk's weights and its two planes fit into three quarters of the L2 cache, masks are read and written once
    and weights once a chunk. Otherwise every iteration passes device memory.
    """
    neighbours = 8 * len(dilations)
    pixels = batch * height * width
    side = tuning.plane_width(channels, itemsize)
    groups = -(-channels // side)
    plane, weight = height * width * side * itemsize, height * width * neighbours * itemsize
    images, some = tuning.plan_chunks(batch, groups, plane, weight, height * width * neighbours * side, l2_bytes)
    chunks = -(-batch // images) * -(-groups // some)
    step = tuning.plan_step("propagate_fwd", None, dilations, side, images, some, height, width)
    masks, weights = pixels * channels * itemsize, pixels * neighbours * itemsize
    once = 2 * masks + weights * -(-groups // some)
    stays = images * (weight + 2 * some * plane) <= 0.75 * l2_bytes
    met = tuning.distinct_taps(dilations, step.config.block_h, step.config.block_w)
    from_l2 = pixels * groups * side * itemsize * (min(met, neighbours) + 1) + weights * -(-groups // step.groups_each)
    packing = 0 if side == 1 and itemsize == 4 else 2
    taps = pixels * channels * neighbours * num_iter
    return Cost(
        2 * masks,
        once if stays else once * num_iter,
        round(from_l2 * num_iter),
        taps * itemsize,
        2 * taps,
        chunks * (num_iter + packing),
    )


def refine_cost(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dilations: tuple[int, ...],
    num_iter: int,
    itemsize: int = 4,
    l2_bytes: int = 40 << 20,
) -> Cost:
    """Affinity and propagation; the weights between the two count as moved, not as floor."""
    return affinity_cost(batch, height, width, 8 * len(dilations)) + propagate_cost(
        batch, channels, height, width, dilations, num_iter, itemsize, l2_bytes
    )


def materialising_bytes(
    batch: int, channels: int, height: int, width: int, neighbours: int, num_iter: int, itemsize: int = 4
) -> int:
    """Bytes that the implementation people paste moves: six passes over B·C·P·H·W in every iteration.

    One-hot shift convolutions write it, the concatenation reads and writes it, the product with the weights reads and
    writes it, the sum reads it.
    """
    return 6 * num_iter * batch * channels * neighbours * height * width * itemsize


def dwconv_cost(
    batch: int, channels: int, height: int, width: int, branches: int, kernel: int = 3, itemsize: int = 4
) -> Cost:
    """Multi-dilation depthwise convolution, forward: x read once, R outputs written once."""
    elements = batch * channels * height * width
    moved = elements * (1 + branches) * itemsize
    taps = elements * branches * kernel * kernel
    return Cost(moved, moved, moved, taps * itemsize, 2 * taps, 1)


def dwconv_backward_cost(
    batch: int, channels: int, height: int, width: int, branches: int, kernel: int = 3, itemsize: int = 4
) -> Cost:
    """Its gradients: R gradients and x read once for the input's and once for the weights', one gradient written."""
    elements = batch * channels * height * width
    moved = elements * (2 * branches + 2) * itemsize
    taps = 2 * elements * branches * kernel * kernel
    return Cost(moved, moved, moved, taps * itemsize, 2 * taps, 3)


def vit_operations(tokens: int, width: int = 384, blocks: int = 12) -> int:
    """Forward pass of ViT blocks on one image: 12 D^2 multiply-adds a token in the layers, 2 N D in the attention."""
    return blocks * (24 * tokens * width * width + 4 * tokens * tokens * width)


# --- GPUs -------------------------------------------------------------------------------------------------------------


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


REFINE_WORKLOADS = {case.name: (*case.shape, case.dilations, case.num_iter) for case in cases.CASES}
"""Name to B, C, H, W, dilations, T."""
ASPP_WORKLOADS = {
    # name: B, C, H, W, R
    "vit 20x20": (32, 384, 20, 20, 4),
    "vit 40x40": (32, 384, 40, 40, 4),
    "vit 28x28": (43, 384, 28, 28, 4),
    "daformer": (2, 1024, 128, 128, 3),
    "deeplabv3+": (4, 2048, 64, 64, 3),
    "smp": (8, 2048, 32, 32, 3),
}


# --- the fit to what was measured -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Seconds = call + operations · s_op + bytes · s_byte of one operator on one machine, and how well it predicts."""

    operator: str
    rows: int
    constants: tuple[float, float, float]
    median_error: float
    """Median over the rows of |predicted / measured - 1|."""
    worst_error: float
    left_out_error: float
    """Median of the same with the row left out of the fit."""
    predictions: tuple[tuple[str, float, float], ...]
    """Row name, measured and predicted seconds."""


def non_negative_fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Minimise the relative squared error of `features @ x` against `seconds` over x >= 0.

    There are three features, so every subset of them is tried.
    """
    scaled = features / seconds[:, None]
    ones = np.ones(len(seconds))
    best, least = np.zeros(features.shape[1]), math.inf
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            # Columns differ by twenty orders of magnitude.
            columns = scaled[:, chosen]
            norms = np.linalg.norm(columns, axis=0)
            if not norms.all():
                continue
            part = np.linalg.lstsq(columns / norms, ones, rcond=None)[0] / norms
            if (part < 0).any():
                continue
            loss = float(((columns @ part - ones) ** 2).sum())
            if loss < least:
                best, least = np.zeros(features.shape[1]), loss
                best[list(chosen)] = part
    return best


def measured(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Group our measured rows with known counts by operator: family, variant and number format."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.ours and result.status == "ok" and result.operations > 0 and result.floor_bytes > 0:
            groups.setdefault(f"{result.family} {result.variant}, {result.candidate}", []).append(result)
    return groups


def fit(operator: str, results: Sequence[Result]) -> Fit:
    """Fit one operator's constants, and judge them on the rows themselves and on rows left out.

    Raises:
        ValueError: fewer than four rows.
    """
    if len(results) < 4:
        raise ValueError(f"{operator}: {len(results)} rows, expected at least 4 for three constants")
    features = np.array([[1.0, r.operations, r.floor_bytes] for r in results])
    seconds = np.array([r.median_ms / 1e3 for r in results])
    constants = non_negative_fit(features, seconds)
    predicted = features @ constants
    left_out = []
    for i in range(len(results)):
        rest = np.arange(len(results)) != i
        left_out.append(abs(features[i] @ non_negative_fit(features[rest], seconds[rest]) / seconds[i] - 1))
    error = np.abs(predicted / seconds - 1)
    return Fit(
        operator,
        len(results),
        tuple(constants.tolist()),
        float(np.median(error)),
        float(error.max()),
        float(np.median(left_out)),
        tuple(
            (f"{r.workload} {r.shape}", float(a), float(b)) for r, a, b in zip(results, seconds, predicted, strict=True)
        ),
    )


# --- the paper's run --------------------------------------------------------------------------------------------------


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

    classes: int
    cluster: Cluster
    bank: float
    network: float
    refinement: float
    launches: float
    all_reduce: float
    data: float
    evaluation: float

    @property
    def step(self) -> float:
        """Hours of the steps: the host launches while the device computes, the loader works beside both."""
        return max(self.network + self.refinement, self.launches, self.data) + self.all_reduce

    @property
    def total(self) -> float:
        return self.bank + self.step + self.evaluation

    @property
    def dominant(self) -> str:
        parts = {
            "network": self.network,
            "refinement": self.refinement,
            "launches": self.launches,
            "data loading": self.data,
            "feature bank": self.bank,
            "all-reduce": self.all_reduce,
        }
        # What is hidden behind a longer part costs nothing.
        if max(self.launches, self.data) <= self.network + self.refinement:
            parts["launches"] = parts["data loading"] = 0.0
        else:
            parts["network"] = parts["refinement"] = 0.0
            parts["launches" if self.launches < self.data else "data loading"] = 0.0
        return max(parts, key=parts.__getitem__)


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
    gpu, hour = cluster.gpu, 3600.0
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
    cost = refine_cost(share, classes, 80, 80, cases.SIX, 10, l2_bytes=gpu.l2_bytes)
    refinement = EPOCHS * steps * predicted_seconds(cost, gpu)
    ring = 2 * (cluster.count - 1) / cluster.count * 4 * TRAINABLE_PARAMETERS / (cluster.allreduce_gb_per_s * 1e9)
    crops = BANK_WINDOWS * BANK_KEPT
    bank = COCO_IMAGES * (vit_operations(BANK_TOKENS) + crops * vit_operations(VAL_TOKENS)) / (rate * cluster.count)
    evaluation = EPOCHS * COCO_VAL * vit_operations(VAL_TOKENS) * 1.2 / (rate * cluster.count)
    loaded = EPOCHS * COCO_IMAGES / (cluster.count * cluster.loader_workers * images_per_worker_s)
    return RunPrediction(
        classes=classes,
        cluster=cluster,
        bank=bank / hour,
        network=network / hour,
        refinement=refinement / hour,
        launches=EPOCHS * steps * LAUNCHES_A_STEP * LAUNCH_S / hour,
        all_reduce=EPOCHS * steps * ring / hour,
        data=loaded / hour,
        evaluation=evaluation / hour,
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*rows, *("| " + " | ".join(line) + " |" for line in lines), ""]


def _milliseconds(seconds: float) -> str:
    return number(1e3 * seconds, 2)


def _operator_lines(workloads: dict[str, tuple], cost: Callable[..., Cost]) -> Iterable[list[str]]:
    for name, sizes in workloads.items():
        costs = [cost(gpu, *sizes) for gpu in GPUS]
        shown = costs[GPUS.index(SHOWN)]
        yield [
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


def page(files: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """Return the text between the markers of NOTES.md."""
    lines = ["### Rates used", ""]
    lines += [
        "From public datasheets and architecture papers, except for L2, which is assumed (of MI300X: its Infinity "
        "Cache), and an H100's clock (sustained). Assumed: "
        f"kernels reach {KERNEL_EFFICIENCY:.0%} of the tighter ceiling (the "
        f"target), a launch takes {LAUNCH_S * 1e6:.0f} us, PyTorch's elementwise kernels reach "
        f"{LIBRARY_EFFICIENCY:.0%} of the bandwidth, the ViT's layers {MATRIX_EFFICIENCY:.0%} of the matrix rate.",
        "",
    ]
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
    names = [f"{gpu.name}, ms" for gpu in GPUS]
    counts = ["floor, MB", "L1 loads, GB", "L2, GB", "GFLOP", "launches"]
    lines += ["### Refinement: counts and predictions (float32; nothing here was measured)", ""]
    lines += _table(
        ["workload", "B,C,H,W,dilations,T", *counts, *names, "bound by (H200)"],
        _operator_lines(REFINE_WORKLOADS, lambda gpu, *sizes: refine_cost(*sizes, l2_bytes=gpu.l2_bytes)),
    )
    lines += [
        "The implementation that is pasted from repository to repository moves six passes over B·C·P·H·W elements in "
        "every iteration; predicted with the same rates, and how many times longer that is than the prediction above:",
        "",
    ]
    lines += _table(
        ["workload", *[gpu.name for gpu in GPUS]],
        ([name, *(_materialising(gpu, sizes) for gpu in GPUS)] for name, sizes in REFINE_WORKLOADS.items()),
    )
    lines += ["### Depthwise convolution: counts and predictions (float32, 3x3; nothing here was measured)", ""]
    lines += _table(
        ["workload, forward", "B,C,H,W,R", *counts, *names, "bound by (H200)"],
        _operator_lines(ASPP_WORKLOADS, lambda gpu, *sizes: dwconv_cost(*sizes)),
    )
    lines += _table(
        ["workload, forward + backward", "B,C,H,W,R", *counts, *names, "bound by (H200)"],
        _operator_lines(ASPP_WORKLOADS, lambda gpu, *sizes: dwconv_cost(*sizes) + dwconv_backward_cost(*sizes)),
    )
    lines += _fits(files)
    lines += _runs(loader_rate(files))
    return "\n".join(lines).rstrip()


def _materialising(gpu: Gpu, sizes: tuple) -> str:
    batch, channels, height, width, dilations, num_iter = sizes
    neighbours = 8 * len(dilations)
    # Product and concatenation exist together, and the convolutions' results until the concatenation is done.
    if 2 * 4 * batch * channels * neighbours * height * width > gpu.memory_bytes:
        return "out of memory"
    # A pad and a convolution for each dilation, then concatenation, product and sum.
    launches = num_iter * (2 * len(dilations) + 3) * LAUNCH_S
    seconds = materialising_bytes(batch, channels, height, width, neighbours, num_iter)
    seconds = max(seconds / (LIBRARY_EFFICIENCY * gpu.memory_bytes_per_s), launches)
    ours = predicted_seconds(refine_cost(*sizes, l2_bytes=gpu.l2_bytes), gpu)
    return f"{_milliseconds(seconds)} ms, {number(seconds / ours, 2)}x"


def _fits(files: Sequence[tuple[str, Sequence[Result]]]) -> list[str]:
    lines = ["### The model against what was measured", ""]
    lines += [
        "Seconds = constant a call + operations x s + floor bytes x s, not negative, fitted to the relative error. The "
        "last column predicts each row from a fit without it.",
        "",
    ]
    for stem, results in files:
        if not results:
            continue
        fits = [fit(name, rows) for name, rows in measured(results).items() if len(rows) >= 4]
        if not fits:
            continue
        lines += [f"{results[0].hardware}, `results/{stem}.csv`:", ""]
        lines += _table(
            ["operator", "rows", "us a call", "GFLOP/s", "GB/s", "median error", "worst error", "median, left out"],
            (
                [
                    item.operator,
                    str(item.rows),
                    number(1e6 * item.constants[0], 2),
                    number(1e-9 / item.constants[1], 2) if item.constants[1] else "no term",
                    number(1e-9 / item.constants[2], 2) if item.constants[2] else "no term",
                    f"{item.median_error:.0%}",
                    f"{item.worst_error:.0%}",
                    f"{item.left_out_error:.0%}",
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
    lines = ["### The paper's COCO run, predicted", ""]
    lines += [
        f"{COCO_IMAGES:,} images, {EPOCHS} epochs, global batch {BATCH}, ViT-S/8 at 160 px, networks in bfloat16, "
        f"{EPOCHS} evaluations of {COCO_VAL:,} images at 320 px, feature bank once. Hours by part; a step takes the "
        "largest of network + refinement, launches and data, plus the all-reduce. Assumed: "
        f"{LAUNCHES_A_STEP:,} launches a step, {loaded:.0f} samples a second and loader process "
        f"({CLUSTERS[0].loader_workers} for each GPU), {BANK_KEPT:.0%} of the bank's windows kept, all-reduce at "
        f"{', '.join(f'{c.allreduce_gb_per_s:g} GB/s ({c.count} x {c.gpu.name})' for c in CLUSTERS)}.",
        "",
    ]
    lines += _table(
        [
            "preset",
            "GPUs",
            "bank",
            "network",
            "refinement",
            "launches",
            "data",
            "all-reduce",
            "evaluation",
            "total, hours",
            "dominated by",
        ],
        (
            [preset, f"{cluster.count} x {cluster.gpu.name}"]
            + [number(value, 2) for value in (p.bank, p.network, p.refinement, p.launches, p.data, p.all_reduce)]
            + [number(p.evaluation, 2), f"**{number(p.total, 2)}**", p.dominant]
            for preset, classes in (("coco_stuff27", 27), ("coco80", 81))
            for cluster in CLUSTERS
            for p in (predict_run(classes, cluster, loaded),)
        ),
    )
    return lines


def replace_between(text: str, section: str) -> str:
    """Return `text` with what is between the markers replaced.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"NOTES.md must hold the lines {BEGIN} and {END}, in this order, where the page belongs")
    return text[: begin + len(BEGIN)] + "\n" + section + "\n" + text[end:]


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
    before = arguments.notes.read_text(encoding="utf-8")
    after = replace_between(before, text)
    if arguments.check:
        if before != after:
            print("NOTES.md is not what the results give: run python -m benchmarks.modelling.cost_model --write")
        return int(before != after)
    arguments.notes.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
