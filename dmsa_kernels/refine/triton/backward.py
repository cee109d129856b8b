"""The gradients of propagation and affinity, without atomics: every sum has one writer and a fixed order.

The transpose of an iteration is a gather as well: pixel ``s`` receives ``w_p(q) g(q)`` from the pixels ``q`` whose
clamped tap ``p`` is ``s``. Inside the map that is ``q = s - o_p``, one pixel a tap, and
``propagate_fwd_kernel(ADJOINT)`` computes it. Clamping adds, for the border pixels only, every ``q`` whose tap falls
outside beyond them; ``propagate_bwd_border_kernel`` sums these along the four edges first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import plans, tuning
from dmsa_kernels.refine.triton import affinity, propagate, resident
from dmsa_kernels.refine.triton.affinity import inverse_scale, neighbourhood, weights_offsets
from dmsa_kernels.refine.triton.common import LAUNCH, NOTHING, OFFLINE_DILATIONS, in_float32, needs_int64

# Pixels along an edge, and of a tile, that one program owns.
BLOCK_EDGE = 32
TILE = (4, 32)


@triton.jit
def pick(DILATIONS: tl.constexpr, i):
    """Return dilation ``i``, which the compiler does not know."""
    dilation = 0
    for j in tl.static_range(len(DILATIONS)):
        dilation = tl.where(i == j, list(DILATIONS)[j], dilation)
    return dilation


@triton.jit(
    do_not_specialize=["groups", "height", "width", "blocks_row", "blocks_column", "row_programs", "stride_weights_n"]
)
def propagate_bwd_border_kernel(
    planes_ptr,  # [n, groups, H, W, BLOCK_C]: the incoming gradient
    weights_ptr,  # [n, P, H, W]
    rows_ptr,  # [n, groups, 2, W, BLOCK_C] fp32: the top and the bottom row of pixels
    columns_ptr,  # [n, groups, 2, H, BLOCK_C] fp32: the left and the right column
    groups,
    height,
    width,
    blocks_row,  # of a row
    blocks_column,
    row_programs,  # the first programs sum the rows, the others the columns
    stride_weights_n,
    DILATIONS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what clamping across an edge adds to its pixels; the rows include what clamping both ways adds to corners."""
    by_rows = tl.program_id(0) < row_programs
    program = tl.where(by_rows, tl.program_id(0), tl.program_id(0) - row_programs)
    blocks = tl.where(by_rows, blocks_row, blocks_column)
    i_block = program % blocks
    i_side = (program // blocks) % 2
    i_group = (program // (2 * blocks)) % groups
    i_n = program // (2 * blocks * groups)
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    # pixels along and across the edge, and from a pixel to the next along and across it
    length = tl.where(by_rows, width, height)
    depth = tl.where(by_rows, height, width)
    step_along = tl.where(by_rows, 1, width)
    step_across = tl.where(by_rows, width, 1)
    plane = height * width
    o_along = i_block * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, BLOCK_C)
    p_weights = weights_ptr + i_n * stride_weights_n
    o_plane = (i_n * groups + i_group) * plane
    acc = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)

    # the loops over dilations are not unrolled: an edge is little work, and the compiler's grows faster than the code
    i = 0
    while i < len(DILATIONS):
        dilation = pick(DILATIONS, i)
        reach = tl.minimum(depth, dilation)
        r = 0
        while r < reach:
            # line r from the edge: its tap across the edge is clamped to the edge
            o_line = tl.where(i_side == 0, r, depth - 1 - r) * step_across
            for s in tl.static_range(3):
                # neighbour (side, s - 1) of a row edge, (s - 1, side) of a column edge, in row-major order
                row_tap = tl.where(i_side == 0, s, 5 + s)
                column_tap = tl.where(i_side == 0, (0, 3, 5)[s], (2, 4, 7)[s])
                tap = tl.where(by_rows, row_tap, column_tap)
                o_q = o_along - (s - 1) * dilation
                m_q = (o_q >= 0) & (o_q < length)
                o_pixel = o_line + o_q * step_along
                # [BLOCK]
                w = tl.load(p_weights + (8 * i + tap) * plane + o_pixel, mask=m_q, other=0.0).to(tl.float32)
                # [BLOCK, BLOCK_C]
                p_g = planes_ptr + ((o_plane + o_pixel) * BLOCK_C)[:, None] + o_lane[None, :]
                g = tl.load(p_g, mask=m_q[:, None], other=0.0).to(tl.float32)
                acc = tl.fma(tl.broadcast_to(w[:, None], [BLOCK, BLOCK_C]), g, acc)
            r += 1
        i += 1

    if by_rows:
        # both ends of the row, one after the other
        end = 0
        while end < 2:
            corner = end * (length - 1)
            if (corner >= i_block * BLOCK) & (corner < (i_block + 1) * BLOCK):
                total = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)
                i = 0
                while i < len(DILATIONS):
                    dilation = pick(DILATIONS, i)
                    tap = 8 * i + tl.where(i_side == 0, 2 * end, 5 + 2 * end)
                    r = 0
                    while r < tl.minimum(depth, dilation):
                        o_line = tl.where(i_side == 0, r, depth - 1 - r) * step_across
                        start = 0
                        while start < tl.minimum(length, dilation):
                            o_in = start + tl.arange(0, BLOCK)
                            m_q = o_in < tl.minimum(length, dilation)
                            o_pixel = o_line + tl.where(end == 0, o_in, length - 1 - o_in) * step_along
                            # [BLOCK]
                            w = tl.load(p_weights + tap * plane + o_pixel, mask=m_q, other=0.0).to(tl.float32)
                            # [BLOCK, BLOCK_C]
                            p_g = planes_ptr + ((o_plane + o_pixel) * BLOCK_C)[:, None] + o_lane[None, :]
                            g = tl.load(p_g, mask=m_q[:, None], other=0.0).to(tl.float32)
                            total = tl.fma(tl.broadcast_to(w[:, None], [BLOCK, BLOCK_C]), g, total)
                            start += BLOCK
                        r += 1
                    i += 1
                acc += tl.where((o_along == corner)[:, None], tl.sum(total, axis=0)[None, :], 0.0)
            end += 1

    o_out = (((i_n * groups + i_group) * 2 + i_side) * length + o_along)[:, None] * BLOCK_C + o_lane[None, :]
    m_out = (o_along < length)[:, None]
    if by_rows:
        tl.store(rows_ptr + o_out, acc, mask=m_out)
    else:
        tl.store(columns_ptr + o_out, acc, mask=m_out)


@triton.jit(
    do_not_specialize=[
        "channels",
        "groups",
        "times",
        "height",
        "width",
        "tiles_w",
        "tiles",
        "stride_time",
        "accumulate",
    ]
)
def propagate_bwd_weights_kernel(
    masks_ptr,  # [T, n, groups, H, W, BLOCK_C]: planes before each iteration
    grads_ptr,  # [T, n, groups, H, W, BLOCK_C]: gradient after each iteration
    out_ptr,  # [n, P, H, W] fp32
    valid_ptr,  # [n, C] uint8, 0 or 1
    channels,
    groups,
    times,
    height,
    width,
    tiles_w,
    tiles,
    stride_time,
    accumulate,  # 1 to add to what is there, or 0
    stride_valid_n,
    stride_valid_c,
    DILATIONS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``out_p(q) (+)= sum_t sum_c grads_t(q, c) masks_t(clamp(q + o_p), c)``; a program takes one dilation's taps."""
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    D: tl.constexpr = len(DILATIONS)
    i_tile = tl.program_id(0) % tiles
    i_d = (tl.program_id(0) // tiles) % D
    i_n = tl.program_id(0) // (tiles * D)
    if INT64:
        i_n = i_n.to(tl.int64)
        stride_time = stride_time.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    dilation = pick(DILATIONS, i_d)
    o_pixel = tl.arange(0, PIXELS)
    o_y = (i_tile // tiles_w) * BLOCK_H + o_pixel // BLOCK_W
    o_x = (i_tile % tiles_w) * BLOCK_W + o_pixel % BLOCK_W
    m_pixel = (o_y < height) & (o_x < width)
    plane = height * width
    o_lane = tl.arange(0, BLOCK_C)
    # clamped, so inside the plane even for pixels outside the map
    y_0 = tl.minimum(o_y, height - 1) * width
    x_0 = tl.minimum(o_x, width - 1)
    y_m = tl.minimum(tl.maximum(o_y - dilation, 0), height - 1) * width
    x_m = tl.minimum(tl.maximum(o_x - dilation, 0), width - 1)
    y_p = tl.minimum(o_y + dilation, height - 1) * width
    x_p = tl.minimum(o_x + dilation, width - 1)
    zero = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
    a_0, a_1, a_2, a_3, a_4, a_5, a_6, a_7 = zero, zero, zero, zero, zero, zero, zero, zero
    i_group = 0
    while i_group < groups:
        some = 1
        if HAS_VALID:
            # groups without a valid channel are never written
            o_c = i_group * BLOCK_C + o_lane
            p_valid = valid_ptr + i_n * stride_valid_n + o_c * stride_valid_c
            some = tl.max(tl.load(p_valid, mask=o_c < channels, other=0).to(tl.int32), axis=0)
        t = 0
        while t < times * some:
            base = (i_n * groups + i_group) * plane
            # [PIXELS, BLOCK_C]
            p_grads = grads_ptr + t * stride_time + o_lane[None, :]
            p_masks = masks_ptr + t * stride_time + o_lane[None, :]
            g = tl.load(p_grads + ((base + y_0 + x_0) * BLOCK_C)[:, None])
            a_0 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_m) * BLOCK_C)[:, None]), a_0)
            a_1 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_0) * BLOCK_C)[:, None]), a_1)
            a_2 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_p) * BLOCK_C)[:, None]), a_2)
            a_3 = tl.fma(g, tl.load(p_masks + ((base + y_0 + x_m) * BLOCK_C)[:, None]), a_3)
            a_4 = tl.fma(g, tl.load(p_masks + ((base + y_0 + x_p) * BLOCK_C)[:, None]), a_4)
            a_5 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_m) * BLOCK_C)[:, None]), a_5)
            a_6 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_0) * BLOCK_C)[:, None]), a_6)
            a_7 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_p) * BLOCK_C)[:, None]), a_7)
            t += 1
        i_group += 1
    p_out = out_ptr + (i_n * 8 * D + i_d * 8) * plane + o_y * width + o_x
    store_sum(p_out, a_0, m_pixel, accumulate)
    store_sum(p_out + plane, a_1, m_pixel, accumulate)
    store_sum(p_out + 2 * plane, a_2, m_pixel, accumulate)
    store_sum(p_out + 3 * plane, a_3, m_pixel, accumulate)
    store_sum(p_out + 4 * plane, a_4, m_pixel, accumulate)
    store_sum(p_out + 5 * plane, a_5, m_pixel, accumulate)
    store_sum(p_out + 6 * plane, a_6, m_pixel, accumulate)
    store_sum(p_out + 7 * plane, a_7, m_pixel, accumulate)


@triton.jit
def store_sum(p_out, acc, m_pixel, accumulate):
    """Store one tap's sum over the lanes ``[PIXELS, BLOCK_C]``, or add it to what is there."""
    # [PIXELS]
    total = tl.sum(acc, axis=1)
    total += tl.load(p_out, mask=m_pixel & (accumulate != 0), other=0.0)
    tl.store(p_out, total, mask=m_pixel)


@triton.jit(do_not_specialize=["groups", "plane", "blocks"])
def propagate_bwd_anchor_kernel(
    grads_ptr,  # [n, groups, H, W, BLOCK_C] fp32: the gradient after an iteration, overwritten
    total_ptr,  # like grads_ptr: the sum of these gradients
    anchor_ptr,  # [n, H, W] fp32
    groups,
    plane,
    blocks,
    STEP: tl.constexpr,  # "first": the total begins; "next": it goes on; "last": it joins the first masks' gradient
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``total += g``, ``g <- (1 - anchor) g``; in the end ``g += anchor total``."""
    i_block = tl.program_id(0) % blocks
    i_group = (tl.program_id(0) // blocks) % groups
    i_n = tl.program_id(0) // (blocks * groups)
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        plane = plane.to(tl.int64)
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < plane
    o_planes = (((i_n * groups + i_group) * plane + o_pixel) * BLOCK_C)[:, None] + tl.arange(0, BLOCK_C)[None, :]
    # [BLOCK]
    anchor = tl.load(anchor_ptr + i_n * plane + o_pixel, mask=m_pixel, other=0.0)
    # [BLOCK, BLOCK_C]
    g = tl.load(grads_ptr + o_planes, mask=m_pixel[:, None], other=0.0)
    if STEP == "last":
        total = tl.load(total_ptr + o_planes, mask=m_pixel[:, None], other=0.0)
        g += anchor[:, None] * total
    else:
        total = g
        if STEP == "next":
            total += tl.load(total_ptr + o_planes, mask=m_pixel[:, None], other=0.0)
        tl.store(total_ptr + o_planes, total, mask=m_pixel[:, None])
        g *= (1 - anchor)[:, None]
    tl.store(grads_ptr + o_planes, g, mask=m_pixel[:, None])


@triton.jit(do_not_specialize=["channels", "groups", "plane", "blocks"])
def propagate_bwd_anchor_sum_kernel(
    total_ptr,  # [n, groups, H, W, BLOCK_C] fp32
    first_ptr,  # like total_ptr: the first masks
    out_ptr,  # [n, H, W] fp32
    valid_ptr,  # [n, C] uint8, 0 or 1
    channels,
    groups,
    plane,
    blocks,
    stride_valid_n,
    stride_valid_c,
    HAS_VALID: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out(q) (+)= sum_c total(q, c) first(q, c)``: what the anchor's gradient owes to the first masks."""
    i_block = tl.program_id(0) % blocks
    i_n = tl.program_id(0) // blocks
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        plane = plane.to(tl.int64)
    o_pixel = i_block * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, BLOCK_C)
    m_pixel = o_pixel < plane
    acc = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)
    i_group = 0
    while i_group < groups:
        o_c = i_group * BLOCK_C + o_lane
        m_c = o_c < channels
        if HAS_VALID:
            # [BLOCK_C]
            m_c = m_c & (tl.load(valid_ptr + i_n * stride_valid_n + o_c * stride_valid_c, mask=m_c, other=0) != 0)
        o_planes = (((i_n * groups + i_group) * plane + o_pixel) * BLOCK_C)[:, None] + o_lane[None, :]
        m_planes = m_pixel[:, None] & m_c[None, :]
        # [BLOCK, BLOCK_C]
        total = tl.load(total_ptr + o_planes, mask=m_planes, other=0.0)
        acc = tl.fma(total, tl.load(first_ptr + o_planes, mask=m_planes, other=0.0), acc)
        i_group += 1
    p_out = out_ptr + i_n * plane + o_pixel
    summed = tl.sum(acc, axis=1)
    if ACCUMULATE:
        summed += tl.load(p_out, mask=m_pixel, other=0.0)
    tl.store(p_out, summed, mask=m_pixel)


@triton.jit(do_not_specialize=["height", "width", "tiles_w", "tiles", "stride_image_n", "stride_image_h"])
def local_affinity_bwd_kernel(
    image_ptr,  # [B, H, W], any strides: one channel
    soft_ptr,  # [B, P, H, W] fp32: the softmax, without the position term
    grad_ptr,  # [B, P, H, W]: gradient of the weights
    taps_ptr,  # [B, P, H, W] fp32: what this channel's gradient sends to each tap
    centre_ptr,  # [B, H, W] fp32: what it sends to the pixel itself
    height,
    width,
    tiles_w,
    tiles,
    stride_image_n,
    stride_image_h,
    stride_image_w,
    alpha,
    eps,
    inverse_channels,
    DILATIONS: tl.constexpr,
    EXPONENT: tl.constexpr,  # 1 or 2
    SIGMA: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradient of one image channel, before it is gathered from the taps.

    With ``u_p = |x_p - x| / (alpha sigma + eps)`` and ``a_p = -mean_k u_p^e``, through the softmax
    ``da_p = s_p (g_p - sum_j s_j g_j)``; ``d|x|`` at 0 and ``d sigma`` at ``sigma = 0`` are 0.
    """
    D: tl.constexpr = len(DILATIONS)
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    CENTRES: tl.constexpr = D if SIGMA == "centred" else (1 if SIGMA == "centre_once" else 0)
    i_n = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    if INT64:
        i_n = i_n.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    o_pixel = tl.arange(0, PIXELS)
    o_y = (i_tile // tiles_w) * BLOCK_H + o_pixel // BLOCK_W
    o_x = (i_tile % tiles_w) * BLOCK_W + o_pixel % BLOCK_W
    m_pixel = (o_y < height) & (o_x < width)
    plane = height * width
    # [BLOCK_P, PIXELS]
    o_taps, m_taps = weights_offsets(i_n * 8 * D * plane, o_y, o_x, height, width, DILATIONS, BLOCK_P)
    soft = tl.load(soft_ptr + o_taps, mask=m_taps, other=0.0)
    grad = tl.load(grad_ptr + o_taps, mask=m_taps, other=0.0).to(tl.float32)
    dot = tl.sum(tl.where(m_taps, soft * grad, NOTHING), axis=0)

    p_image = image_ptr + i_n * stride_image_n
    samples, centre, origin, mean, sigma = neighbourhood(
        p_image, o_y, o_x, height, width, stride_image_h, stride_image_w, DILATIONS, SIGMA, BLOCK_P
    )
    inverse = inverse_scale(sigma, alpha, eps)
    u = (samples - centre[None, :]) * inverse[None, :]
    slope = 2.0 * u if EXPONENT == 2 else tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    # the samples' gradients with sigma held fixed
    d_taps = -soft * (grad - dot[None, :]) * inverse_channels * slope * inverse[None, :]
    d_scale = -tl.sum(tl.where(m_taps, d_taps * u, NOTHING), axis=0)  # gradient of alpha sigma + eps
    d_centre = -tl.sum(tl.where(m_taps, d_taps, NOTHING), axis=0)
    if SIGMA != "none":
        d_sigma = d_scale * alpha
        flat = sigma == 0
        per_sample = tl.where(flat, 0.0, d_sigma / (tl.where(flat, 1.0, sigma) * (8 * D + CENTRES - 1)))
        d_centre += per_sample * (centre - origin - mean) * CENTRES
        d_taps += per_sample[None, :] * (samples - origin[None, :] - mean[None, :])
    tl.store(taps_ptr + o_taps, d_taps, mask=m_taps)
    tl.store(centre_ptr + i_n * plane + o_y * width + o_x, d_centre, mask=m_pixel)


def affinity_warps(dilations: tuple[int, ...]) -> int:
    """Return the warps of an affinity gradient's tile: two threads share a pixel whose samples would spill from one."""
    return 8 if len(dilations) > 3 else 4


def transpose(
    trace: plans.Trace,
    planes: Tensor,
    weights: Tensor,
    out: Tensor,
    dilations: tuple[int, ...],
    channels: int,
    valid: Tensor | None,
    borders: tuple[Tensor, Tensor],
) -> None:
    """Launch one transposed iteration from ``planes`` into ``out``, both ``[n, groups, H, W, width]`` fp32.

    Args:
        borders: buffers of :func:`border_buffers`.
    """
    count, groups, rows, columns, width = planes.shape
    blocks_row, blocks_column = triton.cdiv(columns, BLOCK_EDGE), triton.cdiv(rows, BLOCK_EDGE)
    row_programs = count * groups * 2 * blocks_row
    trace.launch(
        propagate_bwd_border_kernel,
        row_programs + count * groups * 2 * blocks_column,
        num_warps=1,
        options=LAUNCH,
        planes_ptr=planes,
        weights_ptr=weights,
        rows_ptr=borders[0],
        columns_ptr=borders[1],
        groups=groups,
        height=rows,
        width=columns,
        blocks_row=blocks_row,
        blocks_column=blocks_column,
        row_programs=row_programs,
        stride_weights_n=weights.stride(0),
        DILATIONS=dilations,
        INT64=needs_int64(planes, weights),
        BLOCK_C=width,
        BLOCK=BLOCK_EDGE,
    )
    propagate.step(trace, planes, weights, out, dilations, channels, valid, borders)


def border_buffers(trace: plans.Trace, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return buffers for what clamping adds: rows ``[n, groups, 2, W, width]``, columns ``[n, groups, 2, H, width]``.

    Args:
        planes: the incoming gradient, ``[n, groups, H, W, width]`` fp32.
    """
    count, groups, rows, columns, width = planes.shape
    return (
        trace.empty((count, groups, 2, columns, width), torch.float32),
        trace.empty((count, groups, 2, rows, width), torch.float32),
    )


def stack(trace: plans.Trace, times: int, numel: int) -> Tensor:
    """Return a buffer ``[times, >= numel]`` fp32 whose every slice begins on 16 bytes, so that all load alike."""
    return trace.empty((times, triton.cdiv(numel, 4) * 4), torch.float32)


def slices(stacked: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first elements of every slice as ``[times, *shape]``."""
    return stacked[:, : math.prod(shape)].unflatten(1, shape)


def propagate_backward(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    valid_classes: Tensor | None,
    *,
    need_weights: bool,
    need_masks: bool,
    anchor: Tensor | None = None,
    need_anchor: bool = False,
) -> tuple[Tensor, ...]:
    """Launch the gradients of T iterations; arguments as in ``propagate.propagate``, and ``grad`` like the masks.

    The masks of all iterations are computed again, a few channels at a time: their planes and their gradients' planes
    take at most twice as much memory as the weights, or one channel group's.

    Returns:
        ``grad_weights [B, P, H, W]`` in the weights' dtype, ``grad_masks [B, C, H, W]`` in the masks' dtype and memory
        format; with an anchor also ``grad_anchor [B, 1, H, W]``, by the formulas of ``eager.propagate_backward``. An
        empty tensor for one that is not needed.
    """
    need_anchor = need_anchor and anchor is not None
    grad_masks = torch.empty_like(masks) if need_masks else masks.new_empty(0)
    if num_iter == 0 or masks.numel() == 0:
        if need_masks:
            grad_masks.copy_(propagate.without_invalid(grad, valid_classes))
        grads = (torch.zeros_like(weights) if need_weights else weights.new_empty(0), grad_masks)
        return grads if anchor is None else (*grads, anchor.new_zeros(anchor.shape if need_anchor else 0))
    batch, _, rows, columns = masks.shape
    weights = weights.contiguous()
    share = propagate.dense(anchor)
    need_sums = need_weights or need_anchor
    sums = torch.empty(weights.shape if need_sums else 0, dtype=torch.float32, device=masks.device)
    grad_anchor = masks.new_empty((batch, 1, rows, columns) if need_anchor else 0, dtype=torch.float32)
    results = [result if result.numel() else None for result in (sums, grad_masks, grad_anchor)]
    tensors = (weights, masks, grad, *results, propagate.flags(valid_classes), share)
    resident.run(_propagate_schedule, tensors, tuple(int(d) for d in dilations), num_iter)
    if need_anchor and share is not None:
        grad_anchor -= (weights * sums).sum(1, keepdim=True) / (1 - share)
    grads = (sums.to(weights.dtype) if need_weights else weights.new_empty(0), grad_masks)
    return grads if anchor is None else (*grads, grad_anchor.to(anchor.dtype))


def _propagate_schedule(
    trace: plans.Trace,
    weights: Tensor,
    masks: Tensor,
    grad: Tensor,
    sums: Tensor | None,
    grad_masks: Tensor | None,
    grad_anchor: Tensor | None,
    valid_classes: Tensor | None,
    anchor: Tensor | None,
    dilations: tuple[int, ...],
    num_iter: int,
    together: bool,
) -> None:
    batch, channels, rows, columns = masks.shape
    neighbours = weights.shape[1]
    width = tuning.plane_width(channels, 4)
    kept = num_iter if sums is not None else 1
    groups = triton.cdiv(channels, width)
    most = max(1, 2 * neighbours // (2 * kept * width))
    chunk = width * triton.cdiv(groups, triton.cdiv(groups, most))
    tiles_w = triton.cdiv(columns, TILE[1])
    tiles = tiles_w * triton.cdiv(rows, TILE[0])
    # planes_t before iteration t, grads_t after it, and the masks' gradient; all chunks use the same memory
    numel = batch * chunk * rows * columns
    all_planes = None if sums is None else stack(trace, kept, numel)
    all_grads = stack(trace, kept + (grad_masks is not None), numel)
    all_totals = None if anchor is None else stack(trace, 1, numel)
    borders = None
    for c in range(0, channels, chunk):
        here = (slice(None), slice(c, c + chunk))
        part = masks[here]
        count = part.shape[1]
        valid = None if valid_classes is None else valid_classes[here]
        shape = (batch, triton.cdiv(count, width), rows, columns, width)
        grads = slices(all_grads, shape)
        borders = border_buffers(trace, grads[0]) if borders is None else borders  # the first chunk is the largest
        propagate.copy(trace, grad[here], grads[kept - 1], valid, pack=True)
        if all_planes is not None:
            planes = slices(all_planes, shape)
            propagate.copy(trace, part, planes[0], valid, pack=True)
            again = (weights, dilations, num_iter - 1)
            whole = resident.choose(trace.device, shape, *again, valid is not None) if together else None
            if isinstance(whole, tuning.Resident):
                resident.launch(trace, whole, planes[0], planes[1:-1], planes[-1], *again, count, valid, anchor)
            else:
                for t in range(num_iter - 1):
                    held = None if anchor is None else (planes[0], anchor)
                    propagate.step(trace, planes[t], weights, planes[t + 1], dilations, count, valid, anchor=held)
        current = kept - 1
        total = None if all_totals is None else slices(all_totals, shape)[0]
        for t in range(num_iter - 1, -1, -1):
            if anchor is not None:
                keep_share(trace, grads[current], total, anchor, "first" if t == num_iter - 1 else "next")
            if t == 0 and grad_masks is None:
                break
            before = t - 1 if t > 0 else kept
            written = before if kept > 1 else 1 - current
            transpose(trace, grads[current], weights, grads[written], dilations, count, valid, borders)
            current = written
        if grad_masks is not None:
            if anchor is not None:
                keep_share(trace, grads[current], total, anchor, "last")
            propagate.copy(trace, grad_masks[here], grads[current], valid, pack=False)
        if sums is not None:
            trace.launch(
                propagate_bwd_weights_kernel,
                batch * len(dilations) * tiles,
                num_warps=4,
                options=LAUNCH,
                masks_ptr=planes,
                grads_ptr=grads,
                out_ptr=sums,
                valid_ptr=weights if valid is None else valid,
                channels=count,
                groups=shape[1],
                times=num_iter,
                height=rows,
                width=columns,
                tiles_w=tiles_w,
                tiles=tiles,
                stride_time=grads.stride(0),
                accumulate=int(c > 0),
                stride_valid_n=0 if valid is None else valid.stride(0),
                stride_valid_c=0 if valid is None else valid.stride(1),
                DILATIONS=dilations,
                HAS_VALID=valid is not None,
                INT64=needs_int64(grads, sums),
                BLOCK_C=width,
                BLOCK_H=TILE[0],
                BLOCK_W=TILE[1],
            )
        if grad_anchor is not None:
            blocks = triton.cdiv(rows * columns, propagate.BLOCK_PIXELS)
            trace.launch(
                propagate_bwd_anchor_sum_kernel,
                batch * blocks,
                num_warps=4,
                options=LAUNCH,
                total_ptr=total,
                first_ptr=planes[0],
                out_ptr=grad_anchor,
                valid_ptr=weights if valid is None else valid,
                channels=count,
                groups=shape[1],
                plane=rows * columns,
                blocks=blocks,
                stride_valid_n=0 if valid is None else valid.stride(0),
                stride_valid_c=0 if valid is None else valid.stride(1),
                HAS_VALID=valid is not None,
                ACCUMULATE=c > 0,
                INT64=needs_int64(total),
                BLOCK_C=width,
                BLOCK=propagate.BLOCK_PIXELS,
            )


def keep_share(trace: plans.Trace, grads: Tensor, total: Tensor, anchor: Tensor, step: str) -> None:
    """Launch what an anchor ``[n, 1, H, W]`` does to the gradient planes after an iteration; see the kernel."""
    count, groups, rows, columns, width = grads.shape
    blocks = triton.cdiv(rows * columns, propagate.BLOCK_PIXELS)
    trace.launch(
        propagate_bwd_anchor_kernel,
        count * groups * blocks,
        num_warps=4,
        options=LAUNCH,
        grads_ptr=grads,
        total_ptr=total,
        anchor_ptr=anchor,
        groups=groups,
        plane=rows * columns,
        blocks=blocks,
        STEP=step,
        INT64=needs_int64(grads),
        BLOCK_C=width,
        BLOCK=propagate.BLOCK_PIXELS,
    )


def local_affinity_backward(
    grad_weights: Tensor,
    image: Tensor,
    dilations: Sequence[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
) -> Tensor:
    """Launch the gradient of the affinity, channel by channel; arguments as in ``affinity.local_affinity``.

    The position term is constant and has no part in the gradient; its weight only finds the forward pass' kernel.

    Returns:
        ``[B, K, H, W]`` in the image's dtype and memory format.
    """
    dilations = tuple(int(d) for d in dilations)
    grad_image = torch.empty_like(image)
    if image.numel() == 0:
        return grad_image
    spec = (int(exponent), in_float32(alpha), sigma, in_float32(eps), float(position_weight))
    batch, channels, rows, columns = image.shape
    soft = image.new_empty((batch, 8 * len(dilations), rows, columns), dtype=torch.float32)
    sums = torch.empty((2, channels, batch, rows, columns), dtype=torch.float32, device=image.device)
    ones = torch.ones((batch, 1, rows, columns, 1), dtype=torch.float32, device=image.device)
    plans.run(_affinity_schedule, (image, grad_weights.contiguous(), soft, sums, ones), dilations, *spec)
    return grad_image.copy_(sums[0].add_(sums[1]).transpose(0, 1))


def _affinity_schedule(
    trace: plans.Trace,
    image: Tensor,
    grad_weights: Tensor,
    soft: Tensor,
    sums: Tensor,  # [2, K, B, H, W]: what each pixel's own neighbourhood sends it, and what the others' send it
    ones: Tensor,
    dilations: tuple[int, ...],
    exponent: int,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
) -> None:
    batch, channels, rows, columns = image.shape
    affinity.schedule(trace, image, soft, dilations, exponent, alpha, sigma, eps, position_weight, False)
    taps = trace.empty(soft.shape, torch.float32)
    borders = border_buffers(trace, ones)
    tiles_w = triton.cdiv(columns, TILE[1])
    tiles = tiles_w * triton.cdiv(rows, TILE[0])
    for k in range(channels):
        plane = image[:, k]
        trace.launch(
            local_affinity_bwd_kernel,
            batch * tiles,
            num_warps=affinity_warps(dilations),
            options=LAUNCH,
            image_ptr=plane,
            soft_ptr=soft,
            grad_ptr=grad_weights,
            taps_ptr=taps,
            centre_ptr=sums[0, k],
            height=rows,
            width=columns,
            tiles_w=tiles_w,
            tiles=tiles,
            stride_image_n=plane.stride(0),
            stride_image_h=plane.stride(1),
            stride_image_w=plane.stride(2),
            alpha=alpha,
            eps=eps,
            inverse_channels=1.0 / channels,
            DILATIONS=dilations,
            EXPONENT=exponent,
            SIGMA=sigma,
            INT64=needs_int64(plane, soft, grad_weights, sums),
            BLOCK_P=triton.next_power_of_2(soft.shape[1]),
            BLOCK_H=TILE[0],
            BLOCK_W=TILE[1],
        )
        gathered = sums[1, k][:, None, :, :, None]
        transpose(trace, ones, taps, gathered, dilations, 1, None, borders)


def offline_cases() -> Iterator[tuning.OfflineCase]:
    """List the launches for compilation without a device."""
    for dilations in OFFLINE_DILATIONS:
        tile = {"DILATIONS": dilations, "INT64": False}
        longest = dilations == OFFLINE_DILATIONS[-1]
        yield tuning.OfflineCase(
            f"propagate_bwd_weights {dilations}",
            propagate_bwd_weights_kernel,
            {"masks_ptr": "*fp32", "grads_ptr": "*fp32", "out_ptr": "*fp32", "valid_ptr": "*u8"},
            tile | {"HAS_VALID": True, "BLOCK_C": 4, "BLOCK_H": TILE[0], "BLOCK_W": TILE[1]},
            every_target=longest,
        )
        yield tuning.OfflineCase(
            f"propagate_bwd_border {dilations}",
            propagate_bwd_border_kernel,
            {"planes_ptr": "*fp32", "weights_ptr": "*fp32", "rows_ptr": "*fp32", "columns_ptr": "*fp32"},
            tile | {"BLOCK_C": 4, "BLOCK": BLOCK_EDGE},
            num_warps=1,
            every_target=longest,
        )
        for image in ("*fp32", "*fp16", "*bf16"):
            if image == "*fp32" or longest:
                yield tuning.OfflineCase(
                    f"local_affinity_bwd {image[1:]} {dilations}",
                    local_affinity_bwd_kernel,
                    {
                        "image_ptr": image,
                        "soft_ptr": "*fp32",
                        "grad_ptr": "*fp32",
                        "taps_ptr": "*fp32",
                        "centre_ptr": "*fp32",
                        "alpha": "fp32",
                        "eps": "fp32",
                        "inverse_channels": "fp32",
                    },
                    tile
                    | {
                        "stride_image_w": 1,
                        "EXPONENT": 2,
                        "SIGMA": "neighbours",
                        "BLOCK_P": triton.next_power_of_2(8 * len(dilations)),
                        "BLOCK_H": TILE[0],
                        "BLOCK_W": TILE[1],
                    },
                    num_warps=affinity_warps(dilations),
                    every_target=longest and image == "*fp32",
                )
