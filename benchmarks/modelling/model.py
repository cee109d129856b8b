"""Predicted times: what each launch asks of every unit of a multiprocessor, of L2 and of device memory."""

from __future__ import annotations

import functools
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.modelling import machine_code
from benchmarks.modelling.gpus import DRIVER_LAUNCH_S, LAUNCH_GAP_S, MEETING_S, Gpu
from benchmarks.modelling.machine_code import Code, Count
from benchmarks.modelling.stub import Launch

UNITS = ("issue", "integer", "float", "L1", "L2", "memory")
_ITEMSIZE = {"*fp32": 4, "*fp16": 2, "*bf16": 2, "*i64": 8, "*u8": 1, "*i1": 1}


def clocks(count: Count) -> dict[str, float]:
    """Return the clocks in which one multiprocessor runs a warp's instructions, by unit.

    Four schedulers issue one instruction each; the multiply-add pipes take 128 lanes, integer multiply-adds half of
    them; the first-level cache moves 128 bytes.
    """
    integer = sum(count[kind] for kind in ("integer", "predicate", "move", "convert"))
    moved = sum(
        count[f"{kind}{bits}"] * max(1, bits // 32) for kind in ("load", "store") for bits in (8, 16, 32, 64, 128)
    )
    return {
        "issue": sum(count.values()) / 4,
        "integer": integer / 2,
        "float": (count["fp32"] + count["half"] + 2 * count["multiply"]) / 4,
        "L1": float(moved),
    }


@dataclass(frozen=True)
class Cost:
    """Seconds of one launch on a GPU, by unit, and what its kernel needs.

    Attributes:
        name: of the kernel.
        seconds: by unit; the largest is the bound.
        uneven: how much longer the multiprocessor with the most programs makes it.
        registers: of a thread.
        spills: accesses to local memory.
        taps_s: time of its taps alone at the first-level cache's rate; 0 where there are none.
        meetings_s: time in which its programs wait for each other; it comes on top.
    """

    name: str
    seconds: dict[str, float]
    uneven: float
    registers: int
    spills: int
    taps_s: float = 0.0
    meetings_s: float = 0.0

    @property
    def bound(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def total(self) -> float:
        return self.seconds[self.bound] * self.uneven + self.meetings_s


def _seconds(warp_clocks: dict[str, float], gpu: Gpu) -> dict[str, float]:
    return {unit: value / gpu.multiprocessors / gpu.clock_hz for unit, value in warp_clocks.items()}


def _uneven(programs: int, gpu: Gpu) -> float:
    """Return the programs of the multiprocessor that has most of them over the mean."""
    mean = programs / gpu.multiprocessors
    return math.ceil(mean) / mean if mean < 16 else 1.0


def _scaled(counts: Sequence[tuple[Count, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for count, times in counts:
        for unit, value in clocks(count).items():
            total[unit] = total.get(unit, 0.0) + value * times
    return total


class Model:
    """Costs of launches on one GPU; ``folder`` has the cache simulator."""

    def __init__(self, gpu: Gpu, folder: Path):
        self.gpu = gpu
        self.folder = folder

    def cost(self, launch: Launch, dilations: Sequence[int] = ()) -> Cost:
        """Return a launch's cost; ``dilations`` are those of a convolution, whose kernel hides them."""
        code = machine_code.read(launch.cubin)
        if launch.name == "propagate_fwd_kernel":
            return self._propagation(launch, code)
        if launch.name == "propagate_resident_kernel":
            return self._resident(launch, code)
        if launch.name == "dwconv_fwd_kernel" or launch.name == "dwconv_bwd_w_kernel":
            return self._convolution(launch, code, dilations)
        return self._plain(launch, code)

    def _plain(self, launch: Launch, code: Code) -> Cost:
        """A kernel whose programs run through it once (the affinity's: once a channel) and move all that they touch."""
        again = launch.arguments["CHANNELS"] - 1 if launch.name == "local_affinity_fwd_kernel" else 0
        a_warp = Count(code.total)
        for kind, number in (code.loop + code.skipped).items():
            a_warp[kind] += again * number
        moved = sum(
            a_warp[f"{kind}{bits}"] * bits // 8 * 32 for kind in ("load", "store") for bits in (8, 16, 32, 64, 128)
        )
        if launch.name == "local_affinity_fwd_kernel":  # its neighbours' samples come from the caches
            stored = sum(a_warp[f"store{bits}"] * bits // 8 * 32 for bits in (16, 32, 64, 128))
            moved = stored + 32 * 4 * launch.arguments["CHANNELS"]
        seconds = _seconds(_scaled([(a_warp, launch.grid * launch.num_warps)]), self.gpu)
        nbytes = moved * launch.grid * launch.num_warps
        seconds["L2"] = nbytes / self.gpu.l2_bytes_per_s
        seconds["memory"] = nbytes / self.gpu.copy_bytes_per_s
        return Cost(launch.name, seconds, _uneven(launch.grid, self.gpu), code.registers, code.spills)

    def _propagation(self, launch: Launch, code: Code) -> Cost:
        a, gpu = launch.arguments, self.gpu
        plane, weight = _ITEMSIZE[launch.types["planes_ptr"]], _ITEMSIZE[launch.types["weights_ptr"]]
        neighbours, pixel = 8 * len(a["DILATIONS"]), a["BLOCK_C"] * plane
        # planar: the taps of a group's channels one after another, those of the last group that there are
        lanes, met = (a["BLOCK_C"], plane) if a["PLANAR"] == "in" else (1, pixel)
        groups, splits, tiles = a["groups"], a["splits"], a["tiles"]
        images = launch.grid // (tiles * splits)
        pixels = images * a["height"] * a["width"]
        programs = launch.grid * launch.num_warps
        loops = images * tiles * groups * launch.num_warps
        repeated = a["channels"] / groups - 1 if lanes > 1 else 0
        counts = [(code.outside, programs), (code.loop + code.skipped, loops), (code.nested, loops * repeated)]
        seconds = _seconds(_scaled(counts), gpu)
        resident = gpu.resident_warps(code.registers, launch.num_warps) // launch.num_warps
        from_l2 = self._cache_misses(
            a["height"], a["width"], a["groups_each"] * lanes, met, weight, a["BLOCK_H"], a["BLOCK_W"], a["row_stride"],
            resident, min(images, 4), tuple(a["DILATIONS"]),
        )  # fmt: skip
        seconds["L2"] = pixels * (from_l2 * splits + groups * pixel) / gpu.l2_bytes_per_s
        other = a["channels"] * plane if a["PLANAR"] else groups * pixel
        moved = pixels * (neighbours * weight + groups * pixel + other)
        seconds["memory"] = 0.0 if moved <= 0.75 * gpu.l2_bytes else moved / gpu.copy_bytes_per_s
        taps = pixels * neighbours * groups * pixel / gpu.l1_bytes_per_s
        return Cost(launch.name, seconds, _uneven(launch.grid, gpu), code.registers, code.spills, taps)

    def _resident(self, launch: Launch, code: Code) -> Cost:
        """All iterations: weights are read once, and the programs meet after each but the last."""
        a, gpu = launch.arguments, self.gpu
        plane, weight = _ITEMSIZE[launch.types["planes_ptr"]], _ITEMSIZE[launch.types["weights_ptr"]]
        neighbours, pixel, times = 8 * len(a["DILATIONS"]), a["BLOCK_C"] * plane, a["times"]
        pixels = launch.grid // a["tiles"] * a["height"] * a["width"]
        groups = min(a["groups_each"], a["groups"])
        warps = launch.grid * launch.num_warps
        whole = code.loop + code.skipped
        counts = [(code.outside, warps), (whole - code.nested, warps * times), (code.nested, warps * times * groups)]
        seconds = _seconds(_scaled(counts), gpu)
        from_l2 = self._cache_misses(
            a["height"], a["width"], groups, pixel, weight, a["BLOCK_H"], a["BLOCK_W"], a["row_stride"],
            1, 1, tuple(a["DILATIONS"]),
        )  # fmt: skip
        weights = neighbours * weight
        seconds["L2"] = pixels * (times * (from_l2 - weights + groups * pixel) + weights) / gpu.l2_bytes_per_s
        seconds["memory"] = pixels * (weights + 2 * groups * pixel) / gpu.copy_bytes_per_s
        taps = pixels * neighbours * groups * pixel * times / gpu.l1_bytes_per_s
        meetings = MEETING_S * (times - 1)
        return Cost(
            launch.name, seconds, _uneven(launch.grid, gpu), code.registers, code.spills, taps, meetings_s=meetings
        )

    def _cache_misses(self, *arguments: object) -> float:
        *numbers, images, dilations = arguments
        gpu = self.gpu
        return _simulate(self.folder / "cache", (*numbers, gpu.multiprocessors, gpu.l1_bytes, images, *dilations))

    def _convolution(self, launch: Launch, code: Code, dilations: Sequence[int]) -> Cost:
        """Filter rows that miss the map for a whole tile are skipped; x and the outputs pass device memory once."""
        a, gpu = launch.arguments, self.gpu
        weights = launch.name == "dwconv_bwd_w_kernel"
        height, width, channels, branches = a["height"], a["width"], a["channels"], a["R"]
        block_p, block_c = a["BLOCK_P"], a["BLOCK_C"]
        tiles, blocks = -(-height * width // block_p), -(-channels // block_c)
        if weights:
            images = a["batch"]
            times = images * tiles * blocks * branches * (a["K"] // a["ROWS"])
        else:
            images = launch.grid // (blocks * a["bands"])
            times = images * tiles * blocks
        loop = Count(code.loop)
        share = _rows_inside(dilations, height, width, block_p)
        # a filter's middle row is never skipped; where the compiler kept its branch, it counts as one of the parts
        outer = (2 if weights else 2 * branches) / max(code.parts, 1)
        for kind, number in code.skipped.items():
            loop[kind] += number * (1 - min(1.0, outer) * (1 - share))
        if block_c > 1 and not weights:
            # the filters are the same for all pixels: one wavefront a load, not one for every 32 bits of a lane
            itemsize = _ITEMSIZE[launch.types["x_ptr"]]
            filters = branches * a["K"] ** 2 * max(1, 16 // itemsize // 4)
            whole = code.loop["load128"] + code.skipped["load128"]
            broadcast = min(loop["load128"], filters * loop["load128"] / max(1, whole))
            loop["load128"] -= broadcast
            loop["load32"] += broadcast
        counts = [(loop, times * launch.num_warps), (code.outside, launch.grid * launch.num_warps)]
        seconds = _seconds(_scaled(counts), gpu)
        itemsize = _ITEMSIZE[launch.types["x_ptr"]]
        elements = images * channels * height * width
        moved = elements * itemsize * (1 + branches)
        seconds["memory"] = moved / gpu.copy_bytes_per_s
        seconds["L2"] = elements * itemsize * (2 * branches if weights else 1 + branches) / gpu.l2_bytes_per_s
        return Cost(launch.name, seconds, _uneven(launch.grid, gpu), code.registers, code.spills)


@functools.cache
def _simulate(program: Path, arguments: tuple[object, ...]) -> float:
    run = subprocess.run([str(program), *map(str, arguments)], check=True, capture_output=True, text=True)
    return float(run.stdout)


def _rows_inside(dilations: Sequence[int], height: int, width: int, block_p: int) -> float:
    """Return the share of the outer filter rows that meet the map in their tile."""
    met, count = 0, 0
    for tile in range(-(-height * width // block_p)):
        first = tile * block_p // width
        last = min(tile * block_p + block_p, height * width) - 1
        for dilation in dilations:
            for dy in (-dilation, dilation):
                count += 1
                met += last // width + dy >= 0 and first + dy < height
    return met / count if count else 1.0


@dataclass(frozen=True)
class Prediction:
    """A call on one GPU, predicted.

    Attributes:
        launches: of the call.
        host_s: host time, the measured part over the stub and the assumed part of the driver.
        device_s: time of the device, gaps between launches included.
        bound: the unit, or ``host``, that takes longest.
        ceiling: the time of the taps at the first-level cache's rate (refinement), or of device memory (convolution).
        registers: most of a thread.
        spills: of all kernels.
    """

    launches: int
    host_s: float
    device_s: float
    bound: str
    ceiling: float
    registers: int
    spills: int

    @property
    def seconds(self) -> float:
        return max(self.host_s, self.device_s)

    @property
    def share(self) -> float:
        """Share of the ceiling that the device reaches while it is busy."""
        return self.ceiling / self.device_s


def predict(costs: Sequence[Cost], stub_host_s: float) -> Prediction:
    """Put a call's launches together."""
    by_unit: dict[str, float] = {}
    for cost in costs:
        by_unit[cost.bound] = by_unit.get(cost.bound, 0.0) + cost.total
    device = sum(cost.total for cost in costs) + LAUNCH_GAP_S * len(costs)
    host = stub_host_s + DRIVER_LAUNCH_S * len(costs)
    taps = sum(cost.taps_s for cost in costs)
    return Prediction(
        len(costs),
        host,
        device,
        "host" if host > device else max(by_unit, key=by_unit.__getitem__),
        taps or sum(cost.seconds["memory"] for cost in costs),
        max(cost.registers for cost in costs),
        sum({cost.name: cost.spills for cost in costs}.values()),
    )
