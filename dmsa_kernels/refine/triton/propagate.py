# ruff: noqa: RUF005 (Triton concatenates tuples, it does not unpack them)
"""The propagation kernels: masks and weights in, masks after T weighted averages out.

Between iterations the masks live in packed planes ``[n, groups, H, W, BLOCK_C]``: ``BLOCK_C`` channels side by side, so
that a tap of a pixel is one aligned load of up to 16 bytes and its address is computed once for all of them. A thread
owns a pixel, keeps the pixel's P weights in registers and walks over the channel groups. A program's pixels are a tile
whose rows may lie apart, so that taps of large dilations meet other taps in the first-level cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import compat, plans, tuning
from dmsa_kernels.refine.triton import resident
from dmsa_kernels.refine.triton.common import (
    LAUNCH,
    NOTHING,
    OFFLINE_DILATIONS,
    add_taps,
    beside_taps,
    clamped,
    needs_int64,
    reverse,
    step_offsets,
    taps_each,
    tile_rows,
)

# Weights a thread can hold in registers; longer dilation lists read them again for every channel group, and so do all
# before Triton 3.4.
MAX_HELD_NEIGHBOURS = 64
# Pixels of a program that only copies or compares.
BLOCK_PIXELS = 256


@triton.jit(do_not_specialize=["channels", "groups", "height", "width", "blocks", "stride_masks_n", "stride_masks_h"])
def propagate_copy_kernel(
    masks_ptr,  # [n, C, H, W], any strides
    planes_ptr,  # [n, groups, H, W, BLOCK_C]
    valid_ptr,  # [n, C] uint8, 0 or 1
    channels,
    groups,
    height,
    width,
    blocks,
    stride_masks_n,
    stride_masks_c,
    stride_masks_h,
    stride_masks_w,
    stride_valid_n,
    stride_valid_c,
    PACK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy masks into packed planes (``PACK``) or back; channels that are not valid become 0 and are not read."""
    i_block = tl.program_id(0) % blocks
    i_group = (tl.program_id(0) // blocks) % groups
    i_n = tl.program_id(0) // (blocks * groups)
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        i_group = i_group.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, BLOCK_C)
    o_c = i_group * BLOCK_C + o_lane
    m_pixel = (o_pixel < height * width)[:, None]
    m_c = o_c < channels
    m_read = m_c
    if HAS_VALID:
        # [BLOCK_C]
        m_read = m_c & (tl.load(valid_ptr + i_n * stride_valid_n + o_c * stride_valid_c, mask=m_c, other=0) != 0)
    o_masks = (o_pixel // width) * stride_masks_h + (o_pixel % width) * stride_masks_w
    p_masks = masks_ptr + i_n * stride_masks_n + o_masks[:, None] + o_c[None, :] * stride_masks_c
    o_planes = ((i_n * groups + i_group) * height * width + o_pixel) * BLOCK_C
    p_planes = planes_ptr + o_planes[:, None] + o_lane[None, :]
    # [BLOCK, BLOCK_C]
    if PACK:
        b_masks = tl.load(p_masks, mask=m_pixel & m_read[None, :], other=0.0)
        tl.store(p_planes, b_masks.to(planes_ptr.dtype.element_ty), mask=m_pixel)
    else:
        b_masks = tl.load(p_planes, mask=m_pixel & m_read[None, :], other=0.0)
        tl.store(p_masks, b_masks.to(masks_ptr.dtype.element_ty), mask=m_pixel & m_c[None, :])


@triton.jit(
    do_not_specialize=[
        "channels",
        "groups",
        "groups_each",
        "splits",
        "height",
        "width",
        "tiles_w",
        "tiles",
        "row_stride",
        "stride_masks_n",
        "stride_masks_c",
        "stride_masks_h",
        "stride_weights_n",
    ]
)
def propagate_fwd_kernel(
    planes_ptr,  # [n, groups, H, W, BLOCK_C]; PLANAR "in": masks [n, C, H, W] fp32, rows contiguous
    weights_ptr,  # [n, P, H, W]
    out_ptr,  # [n, groups, H, W, BLOCK_C]; PLANAR "out": masks [n, C, H, W] fp32, rows contiguous
    valid_ptr,  # [n, C] uint8, 0 or 1
    rows_ptr,  # [n, groups, 2, W, BLOCK_C] fp32, ADJOINT only: what clamping adds to the top and bottom rows
    columns_ptr,  # [n, groups, 2, H, BLOCK_C] fp32, ADJOINT only: the same for the left and right columns
    first_ptr,  # like planes_ptr, HAS_ANCHOR only: the first masks
    anchor_ptr,  # [n, H, W] fp32, HAS_ANCHOR only: the share of them that is kept
    channels,
    groups,
    groups_each,
    splits,
    height,
    width,
    tiles_w,
    tiles,
    row_stride,  # tiles, one below the other, to which rows are dealt in turn
    stride_masks_n,
    stride_masks_c,
    stride_masks_h,
    stride_weights_n,
    stride_valid_n,
    stride_valid_c,
    DILATIONS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HOLD_WEIGHTS: tl.constexpr,
    TAPS: tl.constexpr,  # read at a time: 8, or 1, and 1 unless weights are held
    ADJOINT: tl.constexpr,
    PLANAR: tl.constexpr,  # "in" the first iteration reads masks as they are, "out" the last writes them so, or ""
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One iteration ``out(q) = sum_p w_p(q) planes(clamp(q + o_p))``, or its transpose.

    With an anchor, ``out(q) <- (1 - anchor(q)) out(q) + anchor(q) first(q)``.
    The transpose gathers, too: ``out(s) = sum_p w_p(s - o_p) planes(s - o_p)`` over the taps inside the map, plus the
    border sums that ``propagate_bwd_border_kernel`` prepared. Programs are (image, tile, share of the groups). Rows of
    a tile are ``row_stride`` apart, so that taps of large dilations meet the rows of others.
    """
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    # whether a thread has no registers to keep its taps' places from group to group
    AGAIN: tl.constexpr = (ADJOINT or not HOLD_WEIGHTS) or (len(DILATIONS) > 6 and PIXELS > 256)
    # programs that share a tile's weights run side by side
    i_split = tl.program_id(0) % splits
    i_tile = (tl.program_id(0) // splits) % tiles
    i_n = tl.program_id(0) // (tiles * splits)
    if INT64:
        i_n = i_n.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    o_pixel = tl.arange(0, PIXELS)
    o_y = tile_rows(i_tile // tiles_w, tiles // tiles_w, row_stride, BLOCK_H, o_pixel // BLOCK_W)
    o_x = (i_tile % tiles_w) * BLOCK_W + o_pixel % BLOCK_W
    m_pixel = (o_y < height) & (o_x < width)
    o_lane = tl.arange(0, BLOCK_C)
    plane = height * width
    p_weights = weights_ptr + i_n * stride_weights_n

    r_y = beside_taps(o_y, TAPS)
    r_x = beside_taps(o_x, TAPS)
    r_pixel = beside_taps(m_pixel, TAPS)
    held = ()
    if HOLD_WEIGHTS:
        for i in tl.static_range(8 * len(DILATIONS) // TAPS):
            o_p = i * TAPS + tl.arange(0, TAPS)[:, None] if TAPS == 8 else i
            dy, dx = step_offsets(i, DILATIONS, TAPS)
            # [8, PIXELS] or [PIXELS]
            weights = load_weights(p_weights + o_p * plane, r_y, r_x, dy, dx, r_pixel, height, width, ADJOINT)
            held = held + (weights,)

    # a while loop: the interpreter of Triton 3.6 cannot take an argument as a range's bound under NumPy 2.4
    i_group = i_split * groups_each
    while i_group < tl.minimum((i_split + 1) * groups_each, groups):
        o_c = i_group * BLOCK_C + o_lane
        m_c = o_c < channels
        if HAS_VALID:
            # [BLOCK_C]
            m_c = m_c & (tl.load(valid_ptr + i_n * stride_valid_n + o_c * stride_valid_c, mask=m_c, other=0) != 0)
        o_plane = (i_n * groups + i_group) * plane
        acc = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
        some = tl.max(m_c.to(tl.int32), axis=0) if HAS_VALID else 1
        # places that depend on the group are computed for every group: the compiler does not know that its number is
        # never negative
        again_y = r_y + (i_group < 0).to(tl.int32) if AGAIN else r_y
        if PLANAR == "in":
            # reads nothing, but gives the sums the layout of planes: their lanes need no way through shared memory
            p_none = out_ptr + ((o_plane + o_y * width + o_x) * BLOCK_C)[:, None] + o_lane[None, :]
            acc = tl.load(p_none, mask=(o_y < tl.where(i_group < 0, height, 0))[:, None], other=0.0)
            lane = 0
            while lane < BLOCK_C:
                i_c = i_group * BLOCK_C + lane
                if INT64:
                    i_c = i_c.to(tl.int64)
                if i_c < channels:
                    p_masks = planes_ptr + i_n * stride_masks_n + i_c * stride_masks_c
                    # [PIXELS]
                    total = tl.zeros([PIXELS], dtype=tl.float32)
                    for i in tl.static_range(8 * len(DILATIONS) // TAPS):
                        dy, dx = step_offsets(i, DILATIONS, TAPS)
                        q_y, q_x = clamped(r_y, r_x, dy, dx, height, width)
                        total = add_taps(total, held[i], tl.load(p_masks + q_y * stride_masks_h + q_x), TAPS)
                    acc = tl.where((o_lane == lane)[None, :], total[:, None], acc)
                lane += 1
        elif some > 0:
            for i in tl.static_range(8 * len(DILATIONS) // TAPS):
                dy, dx = step_offsets(i, DILATIONS, TAPS)
                if ADJOINT:
                    # masked: a tap outside the map has weight 0, and a NaN in its place would turn that into NaN
                    q_y, q_x, m_taps = reverse(again_y, r_x, dy, dx, height, width)
                else:
                    # clamped, so inside the plane even for pixels outside the map: no mask needed
                    q_y, q_x = clamped(again_y, r_x, dy, dx, height, width)
                o_taps = (((i_n * groups + i_group) * height + q_y) * width + q_x) * BLOCK_C
                p_taps = planes_ptr + tl.expand_dims(o_taps, -1) + o_lane
                # [8, PIXELS, BLOCK_C] or [PIXELS, BLOCK_C]
                taps = tl.load(p_taps, mask=tl.expand_dims(m_taps, -1), other=0.0) if ADJOINT else tl.load(p_taps)
                if HOLD_WEIGHTS:
                    weights = held[i]
                else:
                    # one tap at a time; the transpose reads its weight where the tap is, with the same places
                    p_tap = p_weights + i * plane
                    w_y = again_y if ADJOINT else r_y
                    weights = load_weights(p_tap, w_y, r_x, dy, dx, r_pixel, height, width, ADJOINT)
                acc = add_taps(acc, weights, taps.to(tl.float32), TAPS)
            if ADJOINT:
                o_border = (i_n * groups + i_group) * 2
                for side in tl.static_range(2):
                    m_row = m_pixel & (o_y == side * (height - 1))
                    p_row = rows_ptr + (((o_border + side) * width + o_x) * BLOCK_C)[:, None] + o_lane[None, :]
                    acc += tl.load(p_row, mask=m_row[:, None], other=0.0)
                    m_column = m_pixel & (o_x == side * (width - 1))
                    p_column = columns_ptr + (((o_border + side) * height + o_y) * BLOCK_C)[:, None] + o_lane[None, :]
                    acc += tl.load(p_column, mask=m_column[:, None], other=0.0)
        o_out = (o_plane + o_y * width + o_x) * BLOCK_C
        m_out = (o_y < height * some) & (o_x < width)
        if HAS_ANCHOR:
            # [PIXELS]
            anchor = tl.load(anchor_ptr + i_n * plane + o_y * width + o_x, mask=m_out, other=0.0)
            # [PIXELS, BLOCK_C]
            first = tl.load(first_ptr + o_out[:, None] + o_lane[None, :], mask=m_out[:, None], other=0.0)
            acc = (1 - anchor)[:, None] * acc + anchor[:, None] * first.to(tl.float32)
        if HAS_VALID:
            # a weight that is NaN must not turn the zeros of a channel that is not valid into NaN
            acc = tl.where(m_c[None, :], acc, 0.0)
        if PLANAR == "out":
            p_masks = out_ptr + i_n * stride_masks_n + o_y * stride_masks_h + o_x
            for lane in tl.static_range(BLOCK_C):
                i_c = i_group * BLOCK_C + lane
                m_masks = (o_y < tl.where(i_c < channels, height, 0)) & (o_x < width)
                if INT64:
                    i_c = i_c.to(tl.int64)
                # [PIXELS]: the sum is of one number, what is added to it is left out by the compiler
                b_masks = tl.sum(tl.where((o_lane == lane)[None, :], acc, NOTHING), axis=1)
                tl.store(p_masks + i_c * stride_masks_c, b_masks, mask=m_masks)
        else:
            # [PIXELS, BLOCK_C]; groups without a valid channel are never read, so they are not written either
            p_out = out_ptr + o_out[:, None] + o_lane[None, :]
            tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out[:, None])
        i_group += 1


@triton.jit
def load_weights(p_weights, o_y, o_x, dy, dx, m_pixel, height, width, ADJOINT: tl.constexpr):
    """Load taps' weights: those of the pixels, or for the transpose those of the pixels whose taps they are."""
    if ADJOINT:
        o_y, o_x, m_inside = reverse(o_y, o_x, dy, dx, height, width)
        m_pixel = m_pixel & m_inside
    return tl.load(p_weights + (o_y * width + o_x), mask=m_pixel, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["channels", "groups", "plane", "blocks", "first_channel"])
def propagate_labels_kernel(
    planes_ptr,  # [n, groups, H, W, BLOCK_C]: channels first_channel .. first_channel + channels
    valid_ptr,  # [n, channels] uint8, 0 or 1
    labels_ptr,  # [n, H, W] int64
    values_ptr,  # [n, H, W] fp32
    channels,
    groups,
    plane,
    blocks,
    first_channel,
    stride_valid_n,
    stride_valid_c,
    HAS_VALID: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Running maximum over the channels of a chunk: the first of equal values wins, a NaN wins over all numbers.

    Values are rounded to the masks' dtype before they are compared, so that the labels are those of the rounded masks.
    """
    i_n = tl.program_id(0) // blocks
    i_block = tl.program_id(0) % blocks
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        plane = plane.to(tl.int64)
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < plane
    p_values = values_ptr + i_n * plane + o_pixel
    p_labels = labels_ptr + i_n * plane + o_pixel
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK], dtype=tl.int64)
    if first_channel > 0:
        # [BLOCK]
        best = tl.load(p_values, mask=m_pixel, other=0.0).to(tl.float32)
        label = tl.load(p_labels, mask=m_pixel, other=0)
    i_c = 0
    while i_c < channels:
        m_value = m_pixel
        if HAS_VALID:
            # a class that is not valid never wins
            flag = tl.load(valid_ptr + i_n * stride_valid_n + i_c * stride_valid_c).to(tl.int32)
            m_value = o_pixel < plane * flag
        o_value = ((i_n * groups + i_c // BLOCK_C) * plane + o_pixel) * BLOCK_C + i_c % BLOCK_C
        # [BLOCK]
        value = tl.load(planes_ptr + o_value, mask=m_value, other=float("-inf"))
        value = value.to(values_ptr.dtype.element_ty).to(tl.float32)
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        label = tl.where(better, first_channel + i_c, label)
        i_c += 1
    tl.store(p_values, best.to(values_ptr.dtype.element_ty), mask=m_pixel)
    tl.store(p_labels, label, mask=m_pixel)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Return the size of the device's L2 cache in bytes."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def chunks(
    weights: Tensor, channels: int, width: int, itemsize: int, device: torch.device, buffers: int
) -> tuple[int, int]:
    """Return how many images and channels are worked through all iterations together; see ``tuning.plan_chunks``."""
    batch, neighbours, height, columns = weights.shape
    pixels = height * columns
    plan = functools.partial(
        tuning.plan_chunks,
        batch,
        triton.cdiv(channels, width),
        pixels * width * itemsize,
        pixels * neighbours * weights.element_size(),
        pixels * neighbours * width,
        buffers,
    )
    images, groups = plan(l2_bytes(device)) if device.type == "cuda" else plan()
    return images, min(groups * width, channels)


def tuning_key(neighbours: int, pixels: int, width: int) -> tuple[int, int, int]:
    """Return the bucketed shape under which a measured configuration is kept; the batch size is not part of it."""
    return neighbours, tuning.bucket(pixels), width


def holds_weights(neighbours: int) -> bool:
    """Return whether a pixel's weights are kept in registers: they must fit, and the language must have tuples."""
    return neighbours <= MAX_HELD_NEIGHBOURS and compat.triton_has_tuples()


def plane_width(channels: int, dtype: torch.dtype, neighbours: int, has_valid: bool, device: torch.device) -> int:
    """Return the channels of a group.

    Flags of eight take the last registers that many weights leave, and the compiler's code for compute capability 12
    takes them without flags; that for AMD beside 64 weights.
    """
    width = tuning.plane_width(channels, dtype.itemsize)
    most = 48 if torch.version.hip is not None else 64
    if has_valid or _is_capability_12(device):
        most = 32
    return 4 if width == 8 and neighbours > most else width


def most_warps(neighbours: int, width: int, planar: str, device: torch.device) -> int:
    """Return the most warps of a program in which a thread has the registers that an iteration takes.

    Read off the offline compiler (``python -m benchmarks.modelling.spills``). With 16 warps spill: what a single
    channel takes beside many weights, two channels beside more than 48, eight beside more than 16 but on compute
    capability 8.0, 9.0 and 10.0, and weights that are read again.
    """
    single = neighbours > 48 and (width == 2 or planar != "")
    roomy = compat.compute_capability(device) in (None, (8, 0), (9, 0), (10, 0))
    eight = neighbours > 16 and width == 8 and not roomy
    return 8 if single or eight or not holds_weights(neighbours) else 32


def _is_capability_12(device: torch.device) -> bool:
    return (compat.compute_capability(device) or (0,))[0] == 12


def is_plane(masks: Tensor, valid: Tensor | None, width: int, dtype: torch.dtype) -> bool:
    """Return whether masks ``[n, C, H, W]`` already are planes of one channel each."""
    return width == 1 and valid is None and masks.dtype == dtype and masks.is_contiguous()


def reads_planar(masks: Tensor, shape: tuple[int, ...], weights: Tensor) -> bool:
    """Return whether the first and the last iteration take masks ``[n, C, H, W]`` as they are, and none are packed.

    Packing launches would pass device memory for planes larger than a cache. For smaller ones two more variants of the
    kernel are not worth their compilation; and 16-bit planes would be converted once for every tap. AMD's compiler
    spills the last of these iterations.
    """
    large = torch.version.hip is None and 4 * math.prod(shape) >= tuning.MIN_PLANAR_BYTES
    plain = masks.dtype == plane_dtype(weights) == torch.float32 and masks.stride(3) == 1
    return large and plain and shape[4] > 1 and holds_weights(weights.shape[1])


def copy(trace: plans.Trace, masks: Tensor, planes: Tensor, valid: Tensor | None, *, pack: bool) -> None:
    """Launch the copy from ``masks [n, C, H, W]`` into ``planes [n, groups, H, W, width]``, or back if not ``pack``."""
    count, groups, rows, columns, width = planes.shape
    blocks = triton.cdiv(rows * columns, BLOCK_PIXELS)
    trace.launch(
        propagate_copy_kernel,
        count * groups * blocks,
        num_warps=4,
        options=LAUNCH,
        masks_ptr=masks,
        planes_ptr=planes,
        valid_ptr=planes if valid is None else valid,
        channels=masks.shape[1],
        groups=groups,
        height=rows,
        width=columns,
        blocks=blocks,
        stride_masks_n=masks.stride(0),
        stride_masks_c=masks.stride(1),
        stride_masks_h=masks.stride(2),
        stride_masks_w=masks.stride(3),
        stride_valid_n=0 if valid is None else valid.stride(0),
        stride_valid_c=0 if valid is None else valid.stride(1),
        PACK=pack,
        HAS_VALID=valid is not None,
        INT64=needs_int64(masks, planes),
        BLOCK_C=width,
        BLOCK=BLOCK_PIXELS,
    )


class Planes:
    """Buffers of packed planes that take turns, and one that keeps the first planes; every chunk uses them again."""

    def __init__(self, trace: plans.Trace, dtype: torch.dtype):
        self._trace = trace
        self.dtype = dtype
        self._buffers: dict[int, Tensor] = {}

    def take(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Return buffer ``index`` as ``shape``; the first call's shape is the largest."""
        numel = math.prod(shape)
        if index not in self._buffers:
            self._buffers[index] = self._trace.empty((numel,), self.dtype)
        return self._buffers[index][:numel].view(shape)


def iterate(
    trace: plans.Trace,
    masks: Tensor,
    weights: Tensor,
    dilations: tuple[int, ...],
    num_iter: int,
    valid: Tensor | None,
    width: int,
    buffers: Planes,
    anchor: Tensor | None = None,
    out: Tensor | None = None,
    spare: Tensor | None = None,
    together: bool = False,
) -> Tensor:
    """Launch ``num_iter`` iterations on ``masks [n, C, H, W]`` and return the last planes.

    The masks may be the first planes themselves, or be packed, or be packed by the first iteration itself where that
    saves time. They are never written; nor are first planes that an anchor ``[n, 1, H, W]`` keeps.

    Args:
        out: where the result goes, like the masks; None if the planes themselves are wanted.
        spare: planes that may be written as long as ``out`` is not, in whose memory they may lie.
        together: small maps may take one launch for all iterations.
    """
    count, channels, rows, columns = masks.shape
    shape = (count, triton.cdiv(channels, width), rows, columns, width)
    launch = functools.partial(step, trace, dilations=dilations, channels=channels, valid=valid)
    asked = (weights, dilations, num_iter, valid is not None)
    whole = resident.choose(trace.device, shape, *asked) if together else ""
    one_by_one = isinstance(whole, str)
    planar = one_by_one and valid is None and anchor is None and num_iter > 1 and reads_planar(masks, shape, weights)
    planar_out = planar and out is not None and out.stride(3) == 1
    direct = out is not None and is_plane(out, valid, width, buffers.dtype)
    steps = num_iter - planar_out  # those that write planes

    def written(t: int) -> Tensor:
        """Return what step ``t`` of ``steps`` writes; 0 is the packing."""
        if t == 0 and anchor is not None:
            return buffers.take(2, shape)
        if direct:
            return out.unsqueeze(-1) if (steps - t) % 2 == 0 else buffers.take(0, shape)
        return buffers.take(0, shape) if (steps - t) % 2 == 0 else buffers.take(1, shape) if spare is None else spare

    if is_plane(masks, valid, width, buffers.dtype):
        planes = masks.unsqueeze(-1)
    elif planar:
        planes = written(1)
        launch(masks, weights, planes, planar="in")
    else:
        planes = written(0)
        copy(trace, masks, planes, valid, pack=True)
    held = None if anchor is None else (planes, anchor)
    if not one_by_one:
        ring = buffers.take(3, (min(2, num_iter - 1), *shape))
        result = written(num_iter)
        resident.launch(trace, whole, planes, ring, result, weights, dilations, num_iter, channels, valid, anchor)
        planes = result
    for t in range(1 + planar, steps + 1 if one_by_one else 0):
        launch(planes, weights, written(t), anchor=held)
        planes = written(t)
    if planar_out:
        launch(planes, weights, out, planar="out")
    elif out is not None and not direct:
        copy(trace, out, planes, valid, pack=False)
    return planes


def step(
    trace: plans.Trace,
    planes: Tensor,
    weights: Tensor,
    out: Tensor,
    dilations: tuple[int, ...],
    channels: int,
    valid: Tensor | None,
    borders: tuple[Tensor, Tensor] | None = None,
    anchor: tuple[Tensor, Tensor] | None = None,
    planar: str = "",
) -> None:
    """Launch one iteration from ``planes`` into ``out``, both ``[n, groups, H, W, width]``.

    Args:
        borders: the border sums of the transpose (rows, columns); None for the iteration itself.
        anchor: the first planes and the share ``[n, 1, H, W]`` that is kept of them, or None.
        planar: "in" or "out" if those are masks ``[n, C, H, W]``.
    """
    count, groups, rows, columns, width = out.shape if planar == "in" else planes.shape
    masks = planes if planar == "in" else out  # read only if planar
    neighbours = weights.shape[1]
    kernel = "propagate_fwd" if borders is None else "propagate_bwd"
    key = tuning_key(neighbours, rows * columns, width)
    most = most_warps(neighbours, width, planar, trace.device)
    config, row_stride, groups_each = tuning.plan_step(
        kernel, key, dilations, width, count, groups, rows, columns, most_warps=most
    )
    tiles_w = triton.cdiv(columns, config.block_w)
    tiles = tiles_w * triton.cdiv(rows, config.block_h)
    splits = triton.cdiv(groups, groups_each)
    trace.launch(
        propagate_fwd_kernel,
        count * splits * tiles,
        num_warps=config.num_warps,
        options=LAUNCH,
        planes_ptr=planes,
        weights_ptr=weights,
        out_ptr=out,
        valid_ptr=weights if valid is None else valid,
        rows_ptr=weights if borders is None else borders[0],
        columns_ptr=weights if borders is None else borders[1],
        first_ptr=planes if anchor is None else anchor[0],
        anchor_ptr=weights if anchor is None else anchor[1],
        channels=channels,
        groups=groups,
        groups_each=groups_each,
        splits=splits,
        height=rows,
        width=columns,
        tiles_w=tiles_w,
        tiles=tiles,
        row_stride=row_stride,
        stride_masks_n=masks.stride(0),
        stride_masks_c=masks.stride(1),
        stride_masks_h=masks.stride(2),
        stride_weights_n=weights.stride(0),
        stride_valid_n=0 if valid is None else valid.stride(0),
        stride_valid_c=0 if valid is None else valid.stride(1),
        DILATIONS=dilations,
        HAS_VALID=valid is not None,
        HAS_ANCHOR=anchor is not None,
        HOLD_WEIGHTS=holds_weights(neighbours),
        TAPS=taps_each() if holds_weights(neighbours) else 1,
        ADJOINT=borders is not None,
        PLANAR=planar,
        INT64=needs_int64(planes, weights, out),
        BLOCK_C=width,
        BLOCK_H=config.block_h,
        BLOCK_W=config.block_w,
    )


def flags(valid: Tensor | None) -> Tensor | None:
    """Return boolean flags as bytes, which the kernels load."""
    return None if valid is None else valid.view(torch.uint8)


def dense(anchor: Tensor | None) -> Tensor | None:
    """Return an anchor ``[B, 1, H, W]``, which may be an expanded number, as the kernels read it."""
    return None if anchor is None else anchor.to(torch.float32).contiguous()


def plane_dtype(weights: Tensor) -> torch.dtype:
    """Return the planes' dtype: float16 for float16 weights (``precision="fast"``), else float32."""
    return torch.float16 if weights.dtype == torch.float16 else torch.float32


def without_invalid(masks: Tensor, valid: Tensor | None) -> Tensor:
    """Return a copy of ``masks`` with the planes that are not valid set to zero: what zero iterations give."""
    out = torch.empty_like(masks).copy_(masks)
    return out if valid is None else out.masked_fill_(~valid[:, :, None, None], 0)


def propagate(
    weights: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> Tensor:
    """Launch T propagation iterations; arguments as in ``dmsa_kernels.refine.functional.propagate``, validated.

    Args:
        weights: ``[B, P, H, W]`` float32, or float16 for 16-bit planes.
        masks: ``[B, C, H, W]``, float32, float16 or bfloat16, any strides.
        dilations: the dilations the weights were made with.
        num_iter: T, at least 0.
        valid_classes: ``[B, C]`` bool; the other planes are neither read nor averaged and come back zero.
        anchor: ``[B, 1, H, W]`` float32, the share of the first masks that every iteration keeps, or None.

    Returns:
        ``[B, C, H, W]`` in the masks' dtype and memory format.
    """
    if num_iter == 0 or masks.numel() == 0:
        return without_invalid(masks, valid_classes)
    out, storage = room_for_planes(masks, weights, valid_classes)
    tensors = (weights.contiguous(), masks, storage, flags(valid_classes), dense(anchor))
    resident.run(_schedule, tensors, tuple(int(d) for d in dilations), num_iter, tuple(out.stride()))
    return out


def room_for_planes(masks: Tensor, weights: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a result like ``masks [B, C, H, W]`` and the memory it begins.

    That of a contiguous result in the planes' dtype has room for all planes and their alignment, so that it can be one
    of the two buffers.
    """
    batch, channels, rows, columns = masks.shape
    dtype = plane_dtype(weights)
    out = torch.empty_like(masks, device="meta")
    if not out.is_contiguous() or masks.dtype != dtype:
        out = torch.empty_like(masks)
        return out, out
    width = plane_width(channels, dtype, weights.shape[1], valid is not None, masks.device)
    padded = batch * triton.cdiv(channels, width) * width * rows * columns + 16 // dtype.itemsize
    storage = torch.empty(padded, dtype=dtype, device=masks.device)
    return storage.as_strided(out.shape, out.stride()), storage


def _schedule(
    trace: plans.Trace,
    weights: Tensor,
    masks: Tensor,
    storage: Tensor,
    valid_classes: Tensor | None,
    anchor: Tensor | None,
    dilations: tuple[int, ...],
    num_iter: int,
    strides: tuple[int, ...],
    together: bool,
) -> None:
    dtype = plane_dtype(weights)
    batch, channels, rows, columns = masks.shape
    out = storage.as_strided(masks.shape, strides)
    width = plane_width(channels, dtype, weights.shape[1], valid_classes is not None, trace.device)
    has_room = storage.dim() == 1
    images, chunk = chunks(weights, channels, width, dtype.itemsize, trace.device, 1 if has_room else 2)
    buffers = Planes(trace, dtype)
    for n in range(0, batch, images):
        for c in range(0, channels, chunk):
            here = (slice(n, n + images), slice(c, c + chunk))
            part = masks[here]
            valid = None if valid_classes is None else valid_classes[here]
            share = None if anchor is None else anchor[here[0]]
            spare = None
            if has_room and (images == 1 or chunk >= channels):
                # from where the chunk's result will lie, aligned; what lies behind it is not computed yet
                shape = (part.shape[0], triton.cdiv(part.shape[1], width), rows, columns, width)
                first = triton.cdiv(out[here].storage_offset() * dtype.itemsize, 16) * 16 // dtype.itemsize
                spare = storage[first : first + math.prod(shape)].view(shape)
            weight = weights[here[0]]
            iterate(trace, part, weight, dilations, num_iter, valid, width, buffers, share, out[here], spare, together)


def propagate_labels(
    weights: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch T iterations chunk by chunk and keep only the largest channel of every pixel; arguments as `propagate`.

    Returns:
        ``labels [B, H, W]`` int64, the lowest valid channel among equals, and ``values [B, H, W]`` float32;
        label 0 and minus infinity where an image has no valid channel.
    """
    batch, _, rows, columns = masks.shape
    labels = torch.empty((batch, rows, columns), dtype=torch.int64, device=masks.device)
    values = torch.empty((batch, rows, columns), dtype=torch.float32, device=masks.device)
    if labels.numel():
        tensors = (weights.contiguous(), masks, labels, values, flags(valid_classes), dense(anchor))
        resident.run(_labels_schedule, tensors, tuple(int(d) for d in dilations), num_iter)
    return labels, values


def _labels_schedule(
    trace: plans.Trace,
    weights: Tensor,
    masks: Tensor,
    labels: Tensor,
    values: Tensor,
    valid_classes: Tensor | None,
    anchor: Tensor | None,
    dilations: tuple[int, ...],
    num_iter: int,
    together: bool,
) -> None:
    batch, channels, rows, columns = masks.shape
    # zero iterations compare the masks as they are, in a dtype that holds them exactly
    dtype = plane_dtype(weights) if num_iter else torch.float32
    width = plane_width(channels, dtype, weights.shape[1], valid_classes is not None, trace.device)
    images, chunk = chunks(weights, channels, width, dtype.itemsize, trace.device, 2)
    blocks = triton.cdiv(rows * columns, BLOCK_PIXELS)
    buffers = Planes(trace, dtype)
    for n in range(0, batch, images):
        for c in range(0, channels, chunk):
            here = (slice(n, n + images), slice(c, c + chunk))
            part = masks[here]
            valid = None if valid_classes is None else valid_classes[here]
            share = None if anchor is None else anchor[here[0]]
            weight = weights[here[0]]
            planes = iterate(trace, part, weight, dilations, num_iter, valid, width, buffers, share, together=together)
            trace.launch(
                propagate_labels_kernel,
                part.shape[0] * blocks,
                num_warps=4,
                options=LAUNCH,
                planes_ptr=planes,
                valid_ptr=planes if valid is None else valid,
                labels_ptr=labels[here[0]],
                values_ptr=values[here[0]],
                channels=part.shape[1],
                groups=planes.shape[1],
                plane=rows * columns,
                blocks=blocks,
                first_channel=c,
                stride_valid_n=0 if valid is None else valid.stride(0),
                stride_valid_c=0 if valid is None else valid.stride(1),
                HAS_VALID=valid is not None,
                INT64=needs_int64(planes, labels),
                BLOCK_C=width,
                BLOCK=BLOCK_PIXELS,
            )


def _without_eight(width: int, dilations: tuple[int, ...]) -> tuple[str, ...]:
    """Return the targets on which :func:`plane_width` takes no eight channels beside so many weights."""
    if width < 8 or len(dilations) < 5:
        return ()
    return ("sm_120",) if len(dilations) < 7 else ("sm_120", "gfx942")


def offline_cases() -> Iterator[tuning.OfflineCase]:
    """List the launches for compilation without a device."""

    def case(
        label: str,
        dilations: tuple[int, ...],
        config: tuning.Config,
        width: int,
        kernel: str = "propagate_fwd",
        every_target: bool = False,
        **constants: object,
    ):
        planes, weights = ("*fp16", "*fp16") if width == 8 or "narrow" in label else ("*fp32", "*fp32")
        return tuning.OfflineCase(
            f"{kernel} {label} {dilations} {config}",
            propagate_fwd_kernel,
            {
                "planes_ptr": planes,
                "weights_ptr": weights,
                "out_ptr": planes,
                "valid_ptr": "*u8",
                "rows_ptr": "*fp32",
                "columns_ptr": "*fp32",
                "first_ptr": planes,
                "anchor_ptr": "*fp32",
            },
            {
                "DILATIONS": dilations,
                "HAS_VALID": False,
                "HAS_ANCHOR": False,
                "HOLD_WEIGHTS": holds_weights(8 * len(dilations)),
                "TAPS": taps_each() if holds_weights(8 * len(dilations)) else 1,
                "ADJOINT": False,
                "PLANAR": "",
                "INT64": False,
                "BLOCK_C": width,
                "BLOCK_H": config.block_h,
                "BLOCK_W": config.block_w,
            }
            | constants,
            num_warps=config.num_warps,
            every_target=every_target or not constants or kernel != "propagate_fwd",
            but_for=("gfx942",) if "PLANAR" in constants else _without_eight(width, dilations),
        )

    longest: dict[tuple[tuning.Config, int, bool], tuple[int, ...]] = {}
    for dilations in OFFLINE_DILATIONS:
        for width, label in ((4, "exact"), (8, "fast")):
            default, *others = tuning.configs("propagate_fwd", neighbours=8 * len(dilations), width=width)
            yield case(label, dilations, default, width)
            longest |= {(config, width, len(dilations) > 6): dilations for config in others}
        if len(dilations) > 4:
            yield case("fast, narrow", dilations, default, 4)
        yield case("exact, one channel", dilations, default, 1)
    for (config, width, _), dilations in longest.items():  # the list that leaves a configuration least room
        yield case("tile", dilations, config, width, INT64=False)
    first: dict[bool, tuning.Config] = {}
    for (config, width, many), dilations in longest.items():
        if width == 4 and config.num_warps == (8 if many else 16):
            first.setdefault(many, config)
            for side in ("in", "out"):
                everywhere = config == first[many]
                yield case(f"planar {side}", dilations, config, width, every_target=everywhere, PLANAR=side)
    for dilations in OFFLINE_DILATIONS[-2:]:
        yield case("exact, valid", dilations, default, 4, HAS_VALID=True)
        yield case("exact, transposed", dilations, default, 4, "propagate_bwd", ADJOINT=True)
        yield case("exact, anchored", dilations, default, 4, HAS_ANCHOR=True)
    yield case("exact, valid, transposed", dilations, default, 4, "propagate_bwd", ADJOINT=True, HAS_VALID=True)
    for masks, planes, width in (("*fp32", "*fp32", 4), ("*fp16", "*fp32", 4), ("*bf16", "*fp16", 8)):
        flags = {"HAS_VALID": True, "INT64": False, "BLOCK_C": width, "BLOCK": BLOCK_PIXELS}
        for packing in (True, False):
            yield tuning.OfflineCase(
                f"propagate_copy {masks[1:]} {planes[1:]} {packing=}",
                propagate_copy_kernel,
                {"masks_ptr": masks, "planes_ptr": planes, "valid_ptr": "*u8"},
                {"stride_masks_w": 1, "PACK": packing} | flags,
                every_target=masks == "*fp32",
            )
        yield tuning.OfflineCase(
            f"propagate_labels {planes[1:]}->{masks[1:]}",
            propagate_labels_kernel,
            {"planes_ptr": planes, "valid_ptr": "*u8", "labels_ptr": "*i64", "values_ptr": masks},
            flags,
            every_target=masks == "*fp32",
        )
