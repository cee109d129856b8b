"""Launch configurations: short lists, pruned by shape, measured only when asked.

Each kernel has at most eight configurations. ``configs(kernel, ...)[0]`` is the default: it runs in the interpreter, in
the tests, on a machine without a driver and whenever nothing was measured. Nothing is ever timed during an ordinary
call, so calls stay free of synchronisation and can be captured in a CUDA graph; :func:`tune` (called by ``warmup``)
times the candidates once and remembers the winner under a bucketed key that leaves the batch size out.

This module knows no Triton: a configuration is plain numbers, the launchers turn it into keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

__all__ = [
    "Config",
    "OfflineCase",
    "bucket",
    "configs",
    "plan_chunks",
    "plane_width",
    "prune",
    "remember",
    "select",
    "tune",
]

MAX_CONFIGS = 8
# Programs a propagation launch should have at least: three for each of the 132 multiprocessors of an H100 or H200.
MIN_PROGRAMS = 396


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: a tile of ``block_h x block_w`` pixels worked on by ``num_warps`` warps.

    Attributes:
        block_h: rows of the tile, a power of two.
        block_w: columns of the tile, a power of two; 32 keeps one warp on one row.
        num_warps: warps (32 threads, 64 on AMD) of one program.
    """

    block_h: int
    block_w: int
    num_warps: int

    @property
    def pixels(self) -> int:
        return self.block_h * self.block_w


# The first entry of each list is the default. One pixel a thread is the rule: a thread holds all P weights of its
# pixels in registers. Larger tiles reread fewer halo pixels from L2.
_CONFIGS: dict[str, tuple[Config, ...]] = {
    "propagate_fwd": (
        Config(8, 32, 8),
        Config(16, 32, 16),
        Config(16, 16, 8),
        Config(4, 32, 4),
        Config(4, 64, 8),
        Config(8, 64, 16),
        Config(16, 32, 8),
    ),
    "local_affinity_fwd": (
        Config(4, 32, 4),
        Config(8, 32, 8),
        Config(2, 64, 4),
        Config(8, 16, 4),
    ),
}

# Registers a thread needs beside its weights (addresses, accumulators, loads in flight) for planes of up to four
# channels and of eight, read off the offline compiler's reports (benchmarks/NOTES.md).
_REGISTERS_BESIDE_WEIGHTS = {1: 76, 2: 76, 4: 76, 8: 104}
_REGISTERS_OF_A_MULTIPROCESSOR = 65536
_REGISTERS_OF_A_THREAD = 255


def prune(candidates: Iterable[Config], *, neighbours: int, width: int = 4) -> list[Config]:
    """Drop the configurations whose weights cannot stay in registers; the default always stays.

    Args:
        candidates: configurations, the default first.
        neighbours: P, the weights a pixel has.
        width: channels a thread works on at a time.
    """
    default, *others = candidates
    kept = [default]
    for config in others:
        pixels = config.pixels / (32 * config.num_warps)
        available = min(_REGISTERS_OF_A_THREAD, _REGISTERS_OF_A_MULTIPROCESSOR // (32 * config.num_warps))
        if pixels <= 1 and config.num_warps <= default.num_warps:
            kept.append(config)  # needs what the default needs
        elif pixels * (neighbours + _REGISTERS_BESIDE_WEIGHTS[width]) <= available:
            kept.append(config)
    return kept


def configs(kernel: str, *, neighbours: int, width: int = 4) -> list[Config]:
    """Return the configurations worth trying for ``kernel``, the documented default first.

    Args:
        kernel: ``"propagate_fwd"`` or ``"local_affinity_fwd"``.
        neighbours: P, the number of neighbours (8 per dilation).
        width: channels a thread works on at a time.

    Raises:
        ValueError: no kernel of that name has configurations.
    """
    if kernel not in _CONFIGS:
        raise ValueError(f"{kernel=} has no configurations; kernels that have are {', '.join(sorted(_CONFIGS))}")
    return prune(_CONFIGS[kernel], neighbours=neighbours, width=width)


def bucket(value: int) -> int:
    """Round ``value`` up to a power of two, so that sizes close to each other share one measured configuration."""
    return 1 << max(0, int(value) - 1).bit_length()


_CHOSEN: dict[Hashable, Config] = {}


def select(kernel: str, key: Hashable) -> Config:
    """Return the configuration measured for ``(kernel, key)``, or the default when nothing was measured."""
    return _CHOSEN.get((kernel, key), _CONFIGS[kernel][0])


def remember(kernel: str, key: Hashable, config: Config) -> None:
    """Make :func:`select` return ``config`` for ``(kernel, key)`` from now on."""
    _CHOSEN[kernel, key] = config


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
        _CHOSEN.pop((kernel, key), None)
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


# Half of the smallest data-centre L2 in use (A100: 40 MB, H100 and H200: 50 to 60 MB) when the device does not tell.
_DEFAULT_L2_BYTES = 40 << 20
# Below this many multiply-adds a launch is shorter than the time the host needs to issue the next one.
_MIN_TAPS_OF_A_LAUNCH = 1 << 28


def plan_chunks(
    batch: int,
    groups: int,
    group_bytes: int,
    weights_bytes: int,
    taps: int,
    l2_bytes: int = _DEFAULT_L2_BYTES,
) -> tuple[int, int]:
    """Return ``(images, groups)`` worked through all T iterations before the next chunk starts.

    A chunk is as large as stays in the L2 cache with its weights and both ping-pong planes, but not so small that its
    launches become host-bound, and its two buffers hold at most one copy of the masks (one group at the least).

    Args:
        batch: B, images.
        groups: channel groups of an image.
        group_bytes: bytes of one group's plane of one image.
        weights_bytes: bytes of one image's weights.
        taps: multiply-adds of one group of one image in one iteration.
        l2_bytes: size of the device's L2 cache.
    """
    if batch == 0 or groups == 0:
        return 1, 1
    budget = 3 * l2_bytes // 4
    launchable = -(-_MIN_TAPS_OF_A_LAUNCH // max(1, taps))  # groups that fill a launch
    resident = max(0, budget - weights_bytes) // (2 * group_bytes)
    if resident == 0:  # the weights alone overflow the cache: read them as seldom as memory allows
        resident = groups
    chunk_groups = min(groups, max(resident, launchable))
    images = 1
    if chunk_groups == groups:
        images = max(budget // (weights_bytes + 2 * groups * group_bytes), -(-launchable // groups), 1)
    images = min(images, batch)
    planes = max(budget, batch * groups * group_bytes) // (2 * group_bytes)  # one extra copy of large masks, no more
    images = max(1, min(images, planes // chunk_groups))
    return images, max(1, min(chunk_groups, planes // images))


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
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    every_target: bool = True
