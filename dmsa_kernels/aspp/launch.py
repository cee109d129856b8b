"""Launch plans of the depthwise kernels: plain numbers, chosen by layout, dtype and shape; knows no Triton.

No plan is timed during an ordinary call, so calls stay free of synchronisation. The defaults follow from the memory
hierarchy: a dilated filter meets a pixel again k * k times at distant places, so a program should own a region whose
input stays in its multiprocessor's first-level cache until the last tap has passed. Channels first, that region is one
plane; channels last, it is a cache line's worth of channels of one small map, or a band of rows of a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SECTOR_BYTES = 32  # device memory is read in sectors; a narrower channel block would read others' channels
LINE_BYTES = 128  # of the first-level cache; a narrower channel block would use a part of its banks and of its lines
MULTIPROCESSORS = 132  # of an H100 or H200
WARPS = 32 * MULTIPROCESSORS
BAND_PIXELS = 2048  # pixels of a large map that one program covers, when that gives enough programs
PLANE_BYTES = 10 << 10  # sixteen planes of this size stay in a multiprocessor's first-level cache


@dataclass(frozen=True)
class Plan:
    """One way to launch a kernel.

    Attributes:
        block_p: pixels of a tile, a power of two.
        block_c: channels of a tile, a power of two.
        tiles: tiles a program works through, one after another; any number.
        num_warps: warps of a program.
    """

    block_p: int
    block_c: int
    tiles: int
    num_warps: int


@dataclass(frozen=True)
class ProjectPlan:
    """One way to launch the fused kernel.

    Attributes:
        block_p: pixels of a tile, a power of two, at least 16.
        block_c: input channels that are projected at a time, a power of two, at least 16.
        block_o: output channels of a program, a power of two, at least 16: every block repeats the taps.
        num_warps: warps of a program.
    """

    block_p: int
    block_c: int
    block_o: int
    num_warps: int


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


def gather_plan(
    batch: int, channels: int, height: int, width: int, kernel_size: int, dtype: torch.dtype, channels_last: bool
) -> Plan:
    """Return the plan of the forward kernel and of the input gradient, for ``[batch, channels, height, width]``.

    Channels last, a thread holds 8 values: four channels of two pixels; half of that where filters are larger than
    3 x 3, or their loads in flight spill registers. Channels first, see :func:`_plane_tile`.
    """
    pixels = height * width
    if not channels_last:
        block_p, num_warps = _plane_tile(height, width, dtype, kernel_size)
        if pixels % 256 == 0:  # full tiles without gaps share one address a tap, best of 4 pixels a thread
            block_p = min(block_p, 256)
        block_c = 1
    else:
        num_warps = 4
        block_c = _channel_block(channels, 2 * SECTOR_BYTES, dtype)
        block_p = min(power_of_two(pixels), (1024 if kernel_size == 3 else 512) // block_c)
    per_tile_row = batch * -(-channels // block_c)  # programs, if each covered every tile
    tiles = -(-pixels // block_p)
    while tiles > 1:
        enough = WARPS // num_warps if tiles * block_p > BAND_PIXELS else 2 * MULTIPROCESSORS
        if per_tile_row * -(-pixels // (tiles * block_p)) >= enough:
            break
        tiles = -(-tiles // 2)
    return Plan(block_p, block_c, tiles, num_warps)


def _channel_block(channels: int, narrow_bytes: int, dtype: torch.dtype) -> int:
    """Return the channels of a tile, channels last: whole cache lines where they fill them, narrower blocks else."""
    line = LINE_BYTES // dtype.itemsize
    return line if channels % line == 0 else min(power_of_two(channels), narrow_bytes // dtype.itemsize)


def weight_plan(
    batch: int,
    channels: int,
    height: int,
    width: int,
    branches: int,
    kernel_size: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Plan:
    """Return the plan of the weight gradient: ``tiles`` tiles of any image make one partial sum.

    A program keeps one running sum a tap and value; fewer values a thread make room for more taps. Channels last in
    float32, two programs of eight warps share a multiprocessor's first-level cache instead of four of four; 16-bit
    types need half of it and have fewer instructions for smaller tiles.
    """
    pixels = height * width
    if not channels_last:
        block_p, num_warps = _plane_tile(height, width, dtype, kernel_size)
        block_c = 1
        programs = WARPS // num_warps
    else:
        num_warps = 4 if dtype.itemsize == 2 else 8
        block_c = _channel_block(channels, SECTOR_BYTES, dtype)
        block_p = min(power_of_two(pixels), 256 * num_warps // block_c)
        programs = WARPS // 4
    groups = branches * -(-channels // block_c) * (kernel_size if kernel_size > 3 else 1)
    total = batch * -(-pixels // block_p)
    splits = max(1, min(total, programs // groups))
    return Plan(block_p, block_c, -(-total // splits), num_warps)


def _plane_tile(height: int, width: int, dtype: torch.dtype, kernel_size: int) -> tuple[int, int]:
    """Return the pixels and warps of a tile of one channel's plane.

    The warps of a program share their plane's lines in the first-level cache; of small planes, a multiprocessor holds
    one a warp. Programs of one warp then leave the fewest lanes beyond the end of the plane, and 4 pixels a thread
    share the addresses of a filter row. Rows of a multiple of 128 pixels are cut into such tiles: whether a filter's
    row is inside is then asked once, not for every pixel. Other large planes' rows pay for 8 pixels a thread.
    """
    pixels = height * width
    if pixels * dtype.itemsize <= PLANE_BYTES:
        return min(max(32, power_of_two(pixels)), 128), 1
    if kernel_size == 3:
        return (128, 1) if width % 128 == 0 else (512, 2)
    return 256, 2


def project_plan(out_channels: int, dtype: torch.dtype, channels_last: bool) -> ProjectPlan:
    """Return the plan of the fused kernel.

    Output blocks as wide as the registers allow (64 accumulators a thread in 16-bit types, 32 in float32, whose product
    runs without matrix units and holds its operands in registers too): each repeats the taps. Channels last, a pixel's
    block of input channels is two sectors; channels first, every channel's address takes registers of its own.
    """
    widest = (256 if dtype.itemsize == 2 else 128) // (1 if channels_last else 2)
    block_o = min(max(16, power_of_two(out_channels)), widest)
    return ProjectPlan(64, 2 * SECTOR_BYTES // dtype.itemsize, block_o, 8)


def fused_projection_is_faster() -> bool:
    """Whether ``projection="auto"`` takes the fused form: nowhere, as long as no measurement speaks for it.

    On a CPU the fused operator is the unfused composition that recomputes the branches in its backward pass: forward
    and backward take 1.14 to 1.18 times as long (one thread, [4, 384, 20, 20] to 384 channels). On a GPU it saves
    writing and reading R * C planes and repeats the taps for every block of output channels; which weighs more has not
    been measured.
    """
    return False
