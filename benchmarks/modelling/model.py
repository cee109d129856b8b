"""Predicted times: what each launch asks of every unit of a multiprocessor, of L2 and of device memory."""

from __future__ import annotations

import collections
import functools
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.modelling import lanes, machine_code
from benchmarks.modelling.gpus import DRIVER_LAUNCH_S, LAUNCH_GAP_S, MEETING_S, Gpu
from benchmarks.modelling.machine_code import Code, Count
from benchmarks.modelling.stub import Launch

UNITS = ("issue", "integer", "float", "L1", "L2", "memory")
_ITEMSIZE = {"*fp32": 4, "*fp16": 2, "*bf16": 2, "*i64": 8, "*u8": 1, "*i1": 1}


ACCESSES = tuple(f"{kind}{bits}" for kind in ("load", "store") for bits in (8, 16, 32, 64, 128, 256))
_SAMPLED_ROWS = 32  # rows of a map, of four bytes or more a pixel, begin at no more different places of a line


def clocks(count: Count, wavefronts: Mapping[str, float]) -> dict[str, float]:
    """Return the clocks in which one multiprocessor runs a warp's instructions, by unit.

    Four schedulers issue one instruction each; the multiply-add pipes take 128 lanes, integer multiply-adds half of
    them; the first-level cache takes ``wavefronts`` for an access, by its class, or what its bytes take at least.
    """
    integer = sum(count[kind] for kind in ("integer", "predicate", "move", "convert"))
    moved = sum(count[kind] * wavefronts.get(kind, max(1, bits_of(kind) // 32)) for kind in ACCESSES)
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


def _scaled(counts: Sequence[tuple[Count, Mapping[str, float], float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for count, wavefronts, times in counts:
        for unit, value in clocks(count, wavefronts).items():
            total[unit] = total.get(unit, 0.0) + value * times
    return total


def bits_of(kind: str) -> int:
    """Return the bits of a lane of an access of this class."""
    return int(kind.lstrip("loadstre"))


def tap_shifts(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return rows and columns from a pixel to each of its taps."""
    return [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def _places(launch: Launch, access: lanes.Access, dilations: Sequence[int]) -> tuple[list[int], int, list[int]]:
    """Return where the lanes of an access fall: bytes from its first address, between a thread's values, and the first
    addresses of typical ones, as far as they matter inside a line. No lane is beyond the map or clamped.
    """
    a, value = launch.arguments, access.bits // 8
    places = access.first_values()
    name = access.pointer.removesuffix("_ptr")
    tile = a["BLOCK_H"] * a["BLOCK_W"] if launch.name.startswith("propagate") and "BLOCK_W" in a else 0
    if tile in access.shape:
        at = access.shape.index(tile)  # taps may come before the pixels, channels behind them
        pixel = value * (a["BLOCK_C"] if len(access.shape) > at + 1 else 1)
        row = a["width"] * pixel
        taps = access.kind == "load" and name not in ("weights", "out", "first", "anchor")
        shifts = tap_shifts(a["DILATIONS"]) if taps else [(0, 0)]
        firsts = [n * row + dx * pixel for n in range(_SAMPLED_ROWS) for _, dx in shifts]
        rows = [(p[at] // a["BLOCK_W"] * a["row_stride"], p[at] % a["BLOCK_W"], sum(p[at + 1 :])) for p in places]
        return [y * row + x * pixel + channel * value for y, x, channel in rows], value, firsts
    if launch.name == "propagate_copy_kernel" and len(access.shape) == 2:
        strides = (a["stride_masks_w"], a["stride_masks_c"]) if name == "masks" else (a["BLOCK_C"], 1)
        shifts, row, block = [(0, 0)], a["BLOCK"] * strides[0], 0
    elif launch.name.startswith("dwconv") and f"stride_{name}_w" in a and len(access.shape) == 2:
        strides = (a[f"stride_{name}_w"], a[f"stride_{name}_c"])
        row, block = a[f"stride_{name}_h"], a["BLOCK_C"] * a[f"stride_{name}_c"]
        shifts = [(0, 0), *tap_shifts(dilations)] if access.kind == "load" and name == "x" else [(0, 0)]
    else:
        strides = tuple(1 if n == len(access.shape) - 1 else 0 for n in range(len(access.shape)))
        shifts = tap_shifts(a["DILATIONS"]) if "DILATIONS" in a and access.kind == "load" else [(0, 0)]
        row, block = a["BLOCK_C"] if name == "w" else a.get("width", 0), 0
    offsets = [sum(p * stride for p, stride in zip(place, strides, strict=True)) * value for place in places]
    between = strides[access.fastest] * value if access.fastest is not None else 0
    firsts = [
        ((n + dy) * row + dx * strides[0 if block else -1] + n * block) * value
        for n in range(_SAMPLED_ROWS)
        for dy, dx in shifts
    ]
    return offsets, between, firsts


def wavefronts_of(
    launch: Launch, code: Code, dilations: Sequence[int] = (), reads: str = "banks"
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the clocks of L1 for an access by class: in the kernel's loop, and outside.

    The compiler's layouts say how a warp's lanes lie on a block. It is taken to be moved by the widest instructions
    that the adjacent values of a thread allow, as long as the kernel has so many of them; by narrower ones otherwise.
    """
    sums: dict[tuple[str, bool], list[float]] = {}
    left = collections.Counter(code.total)
    for access in lanes.accesses(launch.layouts):
        offsets, between, firsts = _places(launch, access, dilations)
        most = access.bits * (access.adjacent if between == access.bits // 8 else 1)
        values = math.prod(access.shape) * access.bits / lanes.LANES / launch.num_warps  # bits of a thread
        fitting = [bits for bits in (256, 128, 64, 32, 16, 8) if bits <= most and code.total[f"{access.kind}{bits}"]]
        if not fitting:
            continue
        enough = [bits for bits in fitting if left[f"{access.kind}{bits}"] >= max(1, values // bits)]
        bits = (enough or fitting)[0]
        times = max(1.0, values / bits)
        left[f"{access.kind}{bits}"] -= times
        steps = range(0, max(bits, access.bits * access.adjacent), bits)  # a thread's instructions, one after another
        step = bits // 8 if between == access.bits // 8 else between
        starts = [first + n * step for first in firsts for n in range(len(steps))]
        clocks = lanes.mean_wavefronts(offsets, bits // 8, starts, reads)
        item = sums.setdefault((f"{access.kind}{bits}", access.in_loop), [0.0, 0.0])
        item[0] += times * clocks
        item[1] += times
    means = {key: clocks / times for key, (clocks, times) in sums.items()}
    loop, outside = ({kind: value for (kind, inside), value in means.items() if inside == wanted} for wanted in (1, 0))
    return outside | loop, loop | outside


class Model:
    """Costs of launches on one GPU.

    Args:
        gpu: its rates.
        folder: has the cache simulator.
        reads: what L1 reads in a clock, one of ``lanes.READS``.
    """

    def __init__(self, gpu: Gpu, folder: Path, reads: str = "banks"):
        self.gpu = gpu
        self.folder = folder
        self.reads = reads

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
        wavefronts, _ = wavefronts_of(launch, code, (), self.reads)
        seconds = _seconds(_scaled([(a_warp, wavefronts, launch.grid * launch.num_warps)]), self.gpu)
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
        loop, outside = wavefronts_of(launch, code, (), self.reads)
        counts = [
            (code.outside, outside, programs),
            (code.loop + code.skipped, loop, loops),
            (code.nested, loop, loops * repeated),
        ]
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
        loop, outside = wavefronts_of(launch, code, (), self.reads)
        counts = [
            (code.outside, outside, warps),
            (whole - code.nested, loop, warps * times),
            (code.nested, loop, warps * times * groups),
        ]
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
        inside, outside = wavefronts_of(launch, code, dilations, self.reads)
        counts = [(loop, inside, times * launch.num_warps), (code.outside, outside, launch.grid * launch.num_warps)]
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
