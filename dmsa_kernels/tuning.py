"""Launch configurations: short lists, pruned by shape, measured only when asked.

Each kernel has at most eight configurations. ``configs(kernel, ...)[0]`` is the default whenever nothing was measured,
except for the iterations of the propagation, whose tile follows from the map and the dilations (:func:`plan_step`).
Nothing is ever timed during an ordinary call, so calls stay free of synchronisation and can be captured in a CUDA
graph; :func:`tune` (called by ``warmup``) times the candidates once and remembers the winner under a bucketed key that
leaves the batch size out.

This module knows no Triton: a configuration is plain numbers, the launchers turn it into keyword arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "Config",
    "OfflineCase",
    "bucket",
    "configs",
    "plan_chunks",
    "plan_resident",
    "plan_step",
    "plane_width",
    "prune",
    "remember",
    "select",
    "tune",
]

MAX_CONFIGS = 8


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: a tile of ``block_h x block_w`` pixels worked on by ``num_warps`` warps.

    Attributes:
        block_h: rows of the tile, a power of two.
        block_w: columns of the tile, a power of two; 32 keeps one warp on one row.
        num_warps: warps of 32 threads of one program; half as many where a warp has 64.
    """

    block_h: int
    block_w: int
    num_warps: int

    @property
    def pixels(self) -> int:
        return self.block_h * self.block_w


# The first entry of each list is the default. One pixel a thread is the rule: a thread holds all P weights of its
# pixels in registers. Larger tiles reread fewer halo pixels from L2; of many large dilations, wide tiles meet fewest.
_CONFIGS: dict[str, tuple[Config, ...]] = {
    "propagate_fwd": (
        Config(8, 32, 8),
        Config(16, 32, 16),
        Config(32, 32, 32),
        Config(16, 64, 32),
        Config(8, 64, 16),
        Config(4, 64, 8),
        Config(2, 128, 8),
    ),
    "propagate_bwd": (Config(8, 32, 8),),
    "propagate_resident": (Config(8, 32, 8), Config(16, 32, 16)),
    "local_affinity_fwd": (
        Config(4, 32, 4),
        Config(2, 64, 4),
        Config(8, 16, 4),
    ),
}

# The most weights a thread can hold beside planes of up to four channels and of eight, by the warps of a program: with
# 16 it has 128 registers, with 32 it has 64. Read off the offline compiler (``python -m tests.offline``).
_MOST_HELD = {16: {4: 64, 8: 32}, 32: {4: 16, 8: 8}}
# The same where all iterations are one launch, whose loops take registers as well.
_MOST_HELD_RESIDENT = {16: {4: 48, 8: 32}}


def prune(
    candidates: Iterable[Config],
    *,
    neighbours: int,
    width: int = 4,
    most_held: Mapping[int, Mapping[int, int]] = _MOST_HELD,
) -> list[Config]:
    """Drop the configurations whose weights cannot stay in registers; the default always stays.

    Args:
        candidates: configurations, the default first.
        neighbours: P, the weights a pixel has.
        width: channels a thread works on at a time.
        most_held: the most weights, by the warps of a program and by the width, 4 or less and 8.
    """
    default, *others = candidates

    def fits(config: Config) -> bool:
        most = most_held.get(config.num_warps)
        return most is None or neighbours <= most[8 if width == 8 else 4]

    return [default, *(config for config in others if fits(config))]


def configs(kernel: str, *, neighbours: int, width: int = 4) -> list[Config]:
    """Return the configurations worth trying for ``kernel``, the documented default first.

    Args:
        kernel: ``"propagate_fwd"``, ``"propagate_bwd"``, ``"propagate_resident"`` or ``"local_affinity_fwd"``.
        neighbours: P, the number of neighbours (8 per dilation).
        width: channels a thread works on at a time.

    Raises:
        ValueError: no kernel of that name has configurations.
    """
    if kernel not in _CONFIGS:
        raise ValueError(f"{kernel=} has no configurations; kernels that have are {', '.join(sorted(_CONFIGS))}")
    most_held = _MOST_HELD_RESIDENT if kernel == "propagate_resident" else _MOST_HELD
    return prune(_CONFIGS[kernel], neighbours=neighbours, width=width, most_held=most_held)


def bucket(value: int) -> int:
    """Round ``value`` up to a power of two, so that sizes close to each other share one measured configuration."""
    return 1 << max(0, int(value) - 1).bit_length()


_CHOSEN: dict[Hashable, Config] = {}
_version = 0


def select(kernel: str, key: Hashable) -> Config:
    """Return the configuration measured for ``(kernel, key)``, or the default when nothing was measured."""
    return _CHOSEN.get((kernel, key), _CONFIGS[kernel][0])


def remember(kernel: str, key: Hashable, config: Config) -> None:
    """Make :func:`select` return ``config`` for ``(kernel, key)`` from now on."""
    global _version
    _CHOSEN[kernel, key] = config
    _version += 1


def _forget(kernel: str, key: Hashable) -> None:
    global _version
    _CHOSEN.pop((kernel, key), None)
    _version += 1


def version() -> int:
    """Return a number that changes whenever :func:`select` may answer differently."""
    return _version


def tune(kernel: str, key: Hashable, measure: Callable[[Config], float], *, neighbours: int, width: int = 4) -> Config:
    """Time every candidate once with ``measure`` (seconds, or any cost) and remember the cheapest.

    Args:
        kernel: the kernel's name.
        key: the bucketed shape the result is kept under.
        measure: runs the operator under one configuration and returns its cost. It may :func:`remember` the
            configuration to do so; when it raises, nothing stays remembered.
        neighbours: P.
        width: channels a thread works on at a time.
    """
    if (kernel, key) in _CHOSEN:
        return _CHOSEN[kernel, key]
    try:
        best = min(configs(kernel, neighbours=neighbours, width=width), key=measure)
    except BaseException:
        _forget(kernel, key)
        raise
    remember(kernel, key, best)
    return best


def plane_width(channels: int, itemsize: int) -> int:
    """Return how many channels are packed side by side, so that a tap is one load of up to 16 bytes.

    The largest power of two up to ``16 / itemsize`` that pads the channels by at most 15 %: 21 channels take 4 (24
    computed), 3 take 1 (none wasted).

    Args:
        channels: C.
        itemsize: bytes of one element of a plane, 4 or 2.
    """
    width = 16 // itemsize
    while width > 1 and -(-channels // width) * width > 1.15 * channels:
        width //= 2
    return width


# Of an H100 or H200; others have 68 (RTX 3080) to 304 (MI300X), and the plan below depends little on it.
_MULTIPROCESSORS = 132
# Bytes that a multiprocessor gets from its first-level cache while L2 delivers one (128 a clock against an assumed 24),
# and while device memory does.
_L1_BYTES_PER_L2_BYTE = 128 / 24
_L1_BYTES_PER_MEMORY_BYTE = 10
# The share of the other two's time that the slowest does not hide, assumed: of two tiles that it bounds alike, the one
# that asks less of them is taken.
_NOT_HIDDEN = 1 / 8
# Programs of a multiprocessor from which on it does not matter that some have one more.
_EVEN_PROGRAMS = 16


class Step(NamedTuple):
    """How one iteration is launched.

    Attributes:
        config: the tile.
        row_stride: from one row of the tile to its next. The rows of as many tiles, one below the other, are dealt to
            them in turn; at the map's end to those that are left, so that no stride leaves more of a tile empty.
        groups_each: channel groups that a program works through, one after another; it reads its weights once.
    """

    config: Config
    row_stride: int
    groups_each: int


@functools.lru_cache(maxsize=4096)
def distinct_taps(dilations: tuple[int, ...], block_h: int, block_w: int, row_stride: int = 1) -> float:
    """Return the different pixels that a tile's taps meet, a pixel of the tile: what L2 has to deliver of a plane.

    Args:
        dilations: D dilations.
        block_h: rows of the tile.
        block_w: columns of the tile, side by side.
        row_stride: from one row of the tile to its next.
    """
    rows: dict[int, set[tuple[int, int]]] = {}
    for dilation in dilations:
        for dy in (-dilation, 0, dilation):
            spans = {(dx, dx + block_w) for dx in (-dilation, 0, dilation) if dy or dx}
            for y in range(dy, dy + block_h * row_stride, row_stride):
                rows.setdefault(y, set()).update(spans)
    return sum(_length_of_union(spans) for spans in rows.values()) / (block_h * block_w)


def _mean_distinct_taps(dilations: tuple[int, ...], config: Config, row_stride: int, height: int) -> float:
    """Return the mean of :func:`distinct_taps` over the tiles of a column, of which the last may lie closer."""
    tiles = -(-height // config.block_h)
    last = tiles % row_stride
    met = (tiles - last) * distinct_taps(dilations, config.block_h, config.block_w, row_stride) if tiles > last else 0
    return (met + (last and last * distinct_taps(dilations, config.block_h, config.block_w, last))) / tiles


_MAX_ROW_STRIDE = 16


def _row_strides(dilations: tuple[int, ...]) -> list[int]:
    """Return the strides that divide a dilation, so that a tap's row can be a row of the tile."""
    return [s for s in range(1, _MAX_ROW_STRIDE + 1) if s == 1 or any(d % s == 0 for d in dilations)]


def _length_of_union(spans: Iterable[tuple[int, int]]) -> int:
    length, end = 0, -(1 << 62)
    for first, last in sorted(spans):
        length += max(0, last - max(first, end))
        end = max(end, last)
    return length


def _clocks(neighbours: int, groups: int, met: float, weights: float = 0.0, memory: float = 0.0) -> float:
    """Return the time that a pixel takes of a multiprocessor, by the rates of both caches and of device memory.

    Args:
        neighbours: P.
        groups: that are worked on.
        met: different pixels that a tile's taps meet, a pixel.
        weights: that are read, counted like a pixel of a group, whose channels are side by side.
        memory: what passes device memory, counted so, too.
    """
    from_l1 = groups * (neighbours + 1) + weights
    from_l2 = groups * (min(met, neighbours) + 1) + weights
    clocks = (from_l1, from_l2 * _L1_BYTES_PER_L2_BYTE, memory * _L1_BYTES_PER_MEMORY_BYTE)
    return max(clocks) + _NOT_HIDDEN * sum(clocks)


def _fewest_taps(dilations: tuple[int, ...], config: Config, height: int) -> tuple[float, int]:
    """Return how many different pixels a tile's taps meet, a pixel, at the row stride that meets fewest; and it."""
    return min((_mean_distinct_taps(dilations, config, s, height), s) for s in _row_strides(dilations))


def plan_step(
    kernel: str,
    key: Hashable,
    dilations: tuple[int, ...],
    width: int,
    count: int,
    groups: int,
    height: int,
    columns: int,
    most_warps: int = 32,
) -> Step:
    """Return how to launch an iteration on ``count`` images ``[groups, height, columns, width]``.

    Time is that of the multiprocessor with the most programs, at the rate of the first-level cache, of L2 or of device
    memory, whichever is slowest. Larger tiles meet fewer pixels twice but leave more of a small map's border empty;
    programs that share the groups even out the multiprocessors but read the weights again. The measured configuration
    is taken where there is one.

    Args:
        kernel: ``"propagate_fwd"`` or ``"propagate_bwd"``.
        key: the bucketed shape under which :func:`tune` keeps a configuration.
        dilations: D dilations.
        width: channels of a group.
        count: images.
        groups: channel groups of an image.
        height: rows.
        columns: columns.
        most_warps: of a program.
    """
    return _timed_step(kernel, key, dilations, width, count, groups, height, columns, most_warps, _MULTIPROCESSORS)[0]


def _timed_step(
    kernel: str,
    key: Hashable,
    dilations: tuple[int, ...],
    width: int,
    count: int,
    groups: int,
    height: int,
    columns: int,
    most_warps: int,
    multiprocessors: int,
) -> tuple[Step, float]:
    """Return :func:`plan_step`'s answer and its time."""
    neighbours = 8 * len(dilations)
    weights = neighbours / width
    stays = count * height * columns * (weights + 2 * groups) * 16 <= 0.75 * _DEFAULT_L2_BYTES
    measured = _CHOSEN.get((kernel, key))
    if measured and measured.num_warps <= most_warps:
        candidates = [measured]
    else:
        found = configs(kernel, neighbours=neighbours, width=width)
        candidates = [config for config in found if config.num_warps <= most_warps]
    best, least = None, float("inf")
    for config in candidates:
        tiles = count * -(-height // config.block_h) * -(-columns // config.block_w)
        met, row_stride = _fewest_taps(dilations, config, height)
        for splits in range(1, min(groups, 8) + 1):
            groups_each = -(-groups // splits)
            splits = -(-groups // groups_each)
            memory = 0 if stays else groups_each * 2 + weights / splits
            programs = tiles * splits / multiprocessors
            programs = math.ceil(programs) if programs < _EVEN_PROGRAMS else programs
            time = programs * config.pixels * _clocks(neighbours, groups_each, met, weights, memory)
            if time < least:
                best, least = Step(config, row_stride, groups_each), time
    assert best is not None
    return best, least


# Of the work of a launch for each iteration. The model (``python -m benchmarks.modelling``) finds maps of three classes
# and small ones below it, which gain, and those of 21 classes at 81 x 81 and more above it, which lose.
_MOST_RESIDENT_WORK = 0.75


class Resident(NamedTuple):
    """How all iterations are launched at once.

    Attributes:
        config: the tile.
        row_stride: as of :class:`Step`.
        groups_each: channel groups that a program works through in every iteration.
        teams: shares of an image's groups that are worked on at the same time, each by a program a tile.
    """

    config: Config
    row_stride: int
    groups_each: int
    teams: int


def plan_resident(
    programs: int,
    dilations: tuple[int, ...],
    width: int,
    count: int,
    groups: int,
    height: int,
    columns: int,
    num_iter: int,
    most_warps: int = 32,
) -> Resident | str:
    """Return how to launch all iterations on ``count`` images ``[groups, height, columns, width]``, or why not.

    A team waits for all its programs after every iteration, so a map's tiles must run at the same time, one on each
    multiprocessor. Weights are read once instead of in every iteration, but teams may leave multiprocessors idle, and
    to meet takes longer than the gap between two launches. So a part of the work must be saved, by the estimate of
    :func:`plan_step`.

    Args:
        programs: that are sure to run at the same time.
        dilations: D dilations.
        width: channels of a group.
        count: images.
        groups: channel groups of an image.
        height: rows.
        columns: columns.
        num_iter: iterations, at least 2.
        most_warps: of a program.
    """
    neighbours = 8 * len(dilations)
    weights = _clocks(neighbours, 0, 0.0, neighbours / width)
    best, least, fewest = None, float("inf"), 0
    found = configs("propagate_resident", neighbours=neighbours, width=width)
    for config in (config for config in found if config.num_warps <= most_warps):
        tiles = -(-height // config.block_h) * -(-columns // config.block_w)
        fewest = min(fewest or tiles, tiles)
        if tiles > programs:
            continue
        met, row_stride = _fewest_taps(dilations, config, height)
        for splits in range(1, min(groups, 8) + 1):
            groups_each = -(-groups // splits)
            jobs = count * -(-groups // groups_each)
            teams = min(jobs, programs // tiles)
            time = config.pixels * (num_iter * _clocks(neighbours, groups_each, met) + weights) * -(-jobs // teams)
            if time < least:
                best, least = Resident(config, row_stride, groups_each, teams), time
    if best is None:
        return f"a map has at least {fewest} tiles and {programs} programs run at the same time"
    shape = (width, count, groups, height, columns)
    launched = num_iter * _timed_step("propagate_fwd", None, dilations, *shape, 32, programs)[1]
    if least > _MOST_RESIDENT_WORK * launched:
        return f"it would be {least / launched:.2f} of the work of a launch for each iteration, by the estimate"
    return best


# Half of the smallest data-centre L2 in use (A100: 40 MB, H100 and H200: 50 to 60 MB) when the device does not tell.
_DEFAULT_L2_BYTES = 40 << 20
# Planes that the first and the last iteration pack and unpack themselves: larger ones leave L2 before they are read.
MIN_PLANAR_BYTES = _DEFAULT_L2_BYTES
# Taps of a launch that takes 36 us at an H100's first-level cache; the gap to the next one is about 1 us.
_MIN_TAPS_OF_A_LAUNCH = 1 << 28


def plan_chunks(
    batch: int,
    groups: int,
    group_bytes: int,
    weights_bytes: int,
    taps: int,
    buffers: int = 2,
    l2_bytes: int = _DEFAULT_L2_BYTES,
) -> tuple[int, int]:
    """Return ``(images, groups)`` worked through all T iterations before the next chunk starts; chunks are even.

    A chunk that stays in the L2 cache with its weights and both ping-pong planes saves device memory's time. Where such
    a chunk's launches would be short beside the gaps between them, chunks are as large as memory allows instead: the
    weights are then read as seldom as possible. The buffers hold one copy of large masks, to the next whole group.

    Args:
        batch: B, images.
        groups: channel groups of an image.
        group_bytes: bytes of one group's plane of one image.
        weights_bytes: bytes of one image's weights.
        taps: multiply-adds of one group of one image in one iteration.
        buffers: 2 that take turns, or 1 where the other one is the result's own memory.
        l2_bytes: size of the device's L2 cache.
    """
    if batch == 0 or groups == 0:
        return 1, 1
    budget = 3 * l2_bytes // 4
    planes = -(-max(budget, batch * groups * group_bytes) // (buffers * group_bytes))  # one extra copy of large masks
    images = budget // (weights_bytes + 2 * groups * group_bytes)
    if images and min(images, batch) * groups * taps < _MIN_TAPS_OF_A_LAUNCH:
        images = batch
    if images == 0:
        resident = max(0, budget - weights_bytes) // (2 * group_bytes)
        if resident * taps >= _MIN_TAPS_OF_A_LAUNCH:
            return 1, _even(groups, min(resident, planes))
        images = batch
    if planes < groups:
        return 1, _even(groups, planes)
    return _even(batch, min(images, planes // groups)), groups


def _even(total: int, most: int) -> int:
    """Return the size of the fewest parts of ``total`` that are about equal and not larger than ``most``."""
    parts = -(-total // max(1, most))
    return -(-total // parts)


@dataclass(frozen=True)
class OfflineCase:
    """A launch described without a device, so that it can be compiled for any of them.

    Each Triton module lists its kernels' launches in ``offline_cases()``.

    Attributes:
        name: what the report calls it, unique within the module.
        kernel: the jitted function.
        types: argument name to Triton type, ``"*fp32"``, ``"*u8"``, ``"fp32"``, ...; arguments in neither mapping are
            ``"i32"``.
        constants: compile-time values, and arguments specialised to 1 such as a unit stride.
        num_warps: warps of a program.
        every_target: compile for all GPUs; False for one more configuration of a case that is compiled for all.
        but_for: targets on which nothing is launched like this.
        options: what the compiler is told besides.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    every_target: bool = True
    but_for: tuple[str, ...] = ()
    options: tuple[tuple[str, object], ...] = ()
