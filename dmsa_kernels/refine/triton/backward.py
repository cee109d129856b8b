"""The gradients of propagation and affinity, without atomics: every sum has one writer and a fixed order.

The transpose of an iteration is a gather as well: pixel ``s`` receives ``w_p(q) g(q)`` from the pixels ``q`` whose
clamped tap ``p`` is ``s``. Inside the map that is ``q = s - o_p``, one pixel a tap, and
``propagate_fwd_kernel(ADJOINT)`` computes it. Clamping adds, for the border pixels only, every ``q`` whose tap falls
outside beyond them; ``propagate_bwd_border_kernel`` sums these along the four edges first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import tuning
from dmsa_kernels.refine.triton import affinity, propagate
from dmsa_kernels.refine.triton.affinity import neighbourhood
from dmsa_kernels.refine.triton.common import LAUNCH, OFFLINE_DILATIONS, device_guard, needs_int64

# Pixels along an edge, and of a tile, that one program owns.
BLOCK_EDGE = 32
TILE = (4, 32)


@triton.jit(do_not_specialize=["groups", "length", "depth", "step_along", "step_across", "blocks", "stride_weights_n"])
def propagate_bwd_border_kernel(
    planes_ptr,  # [n, groups, H, W, BLOCK_C]: the incoming gradient
    weights_ptr,  # [n, P, H, W]
    out_ptr,  # [n, groups, 2, length, BLOCK_C] fp32: the first and the last line of pixels
    groups,
    length,  # pixels along the edge
    depth,  # pixels across it
    step_along,  # from a pixel to the next along the edge, in pixels
    step_across,
    blocks,
    stride_weights_n,
    DILATIONS: tl.constexpr,
    ROWS: tl.constexpr,  # the edges are the top and bottom rows, else the left and right columns
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum what clamping across an edge adds to its pixels; the rows include what clamping both ways adds to corners."""
    i_block = tl.program_id(0) % blocks
    i_side = (tl.program_id(0) // blocks) % 2
    i_group = (tl.program_id(0) // (2 * blocks)) % groups
    i_n = tl.program_id(0) // (2 * blocks * groups)
    if INT64:
        i_n = i_n.to(tl.int64)
        i_block = i_block.to(tl.int64)
        length = length.to(tl.int64)
        depth = depth.to(tl.int64)
        step_along = step_along.to(tl.int64)
        step_across = step_across.to(tl.int64)
    plane = length * depth
    o_along = i_block * BLOCK + tl.arange(0, BLOCK)
    o_lane = tl.arange(0, BLOCK_C)
    p_weights = weights_ptr + i_n * stride_weights_n
    o_plane = (i_n * groups + i_group) * plane
    acc = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)

    for i in tl.static_range(len(DILATIONS)):
        reach = tl.minimum(depth, DILATIONS[i])
        r = 0
        while r < reach:
            # line r from the edge: its tap across the edge is clamped to the edge
            o_line = tl.where(i_side == 0, r, depth - 1 - r) * step_across
            for s in tl.static_range(3):
                # neighbour (side, s - 1) of a row edge, (s - 1, side) of a column edge, in row-major order
                tap = tl.where(i_side == 0, s, 5 + s) if ROWS else tl.where(i_side == 0, (0, 3, 5)[s], (2, 4, 7)[s])
                o_q = o_along - (s - 1) * DILATIONS[i]
                m_q = (o_q >= 0) & (o_q < length)
                o_pixel = o_line + o_q * step_along
                # [BLOCK]
                w = tl.load(p_weights + (8 * i + tap) * plane + o_pixel, mask=m_q, other=0.0).to(tl.float32)
                # [BLOCK, BLOCK_C]
                p_g = planes_ptr + ((o_plane + o_pixel) * BLOCK_C)[:, None] + o_lane[None, :]
                g = tl.load(p_g, mask=m_q[:, None], other=0.0).to(tl.float32)
                acc = tl.fma(tl.broadcast_to(w[:, None], [BLOCK, BLOCK_C]), g, acc)
            r += 1

    if ROWS:
        for end in tl.static_range(2):
            corner = end * (length - 1)
            if (corner >= i_block * BLOCK) & (corner < (i_block + 1) * BLOCK):
                total = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)
                for i in tl.static_range(len(DILATIONS)):
                    tap = 8 * i + tl.where(i_side == 0, 2 * end, 5 + 2 * end)
                    r = 0
                    while r < tl.minimum(depth, DILATIONS[i]):
                        o_line = tl.where(i_side == 0, r, depth - 1 - r) * step_across
                        start = 0
                        while start < tl.minimum(length, DILATIONS[i]):
                            o_in = start + tl.arange(0, BLOCK)
                            m_q = o_in < tl.minimum(length, DILATIONS[i])
                            o_pixel = o_line + tl.where(end == 0, o_in, length - 1 - o_in) * step_along
                            # [BLOCK]
                            w = tl.load(p_weights + tap * plane + o_pixel, mask=m_q, other=0.0).to(tl.float32)
                            # [BLOCK, BLOCK_C]
                            p_g = planes_ptr + ((o_plane + o_pixel) * BLOCK_C)[:, None] + o_lane[None, :]
                            g = tl.load(p_g, mask=m_q[:, None], other=0.0).to(tl.float32)
                            total = tl.fma(tl.broadcast_to(w[:, None], [BLOCK, BLOCK_C]), g, total)
                            start += BLOCK
                        r += 1
                acc += tl.where((o_along == corner)[:, None], tl.sum(total, axis=0)[None, :], 0.0)

    p_out = out_ptr + (((i_n * groups + i_group) * 2 + i_side) * length + o_along)[:, None] * BLOCK_C + o_lane[None, :]
    tl.store(p_out, acc, mask=(o_along < length)[:, None])


@triton.jit(do_not_specialize=["images", "groups", "times", "height", "width", "tiles_w", "tiles"])
def propagate_bwd_weights_kernel(
    masks_ptr,  # [T, n, groups, H, W, BLOCK_C]: planes before each iteration
    grads_ptr,  # [T, n, groups, H, W, BLOCK_C]: gradient after each iteration
    out_ptr,  # [n, P, H, W] fp32
    images,
    groups,
    times,
    height,
    width,
    tiles_w,
    tiles,
    DILATIONS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
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
        images = images.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    dilation = 0
    for i in tl.static_range(D):
        dilation = tl.where(i_d == i, DILATIONS[i], dilation)
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
    t = 0
    while t < times:
        i_group = 0
        while i_group < groups:
            base = ((t * images + i_n) * groups + i_group) * plane
            # [PIXELS, BLOCK_C]
            g = tl.load(grads_ptr + ((base + y_0 + x_0) * BLOCK_C)[:, None] + o_lane[None, :])
            p_masks = masks_ptr + o_lane[None, :]
            a_0 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_m) * BLOCK_C)[:, None]), a_0)
            a_1 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_0) * BLOCK_C)[:, None]), a_1)
            a_2 = tl.fma(g, tl.load(p_masks + ((base + y_m + x_p) * BLOCK_C)[:, None]), a_2)
            a_3 = tl.fma(g, tl.load(p_masks + ((base + y_0 + x_m) * BLOCK_C)[:, None]), a_3)
            a_4 = tl.fma(g, tl.load(p_masks + ((base + y_0 + x_p) * BLOCK_C)[:, None]), a_4)
            a_5 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_m) * BLOCK_C)[:, None]), a_5)
            a_6 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_0) * BLOCK_C)[:, None]), a_6)
            a_7 = tl.fma(g, tl.load(p_masks + ((base + y_p + x_p) * BLOCK_C)[:, None]), a_7)
            i_group += 1
        t += 1
    sums = (a_0, a_1, a_2, a_3, a_4, a_5, a_6, a_7)
    p_out = out_ptr + (i_n * 8 * D + i_d * 8) * plane + o_y * width + o_x
    for j in tl.static_range(8):
        # [PIXELS]
        total = tl.sum(sums[j], axis=1)
        if ACCUMULATE:
            total += tl.load(p_out + j * plane, mask=m_pixel, other=0.0)
        tl.store(p_out + j * plane, total, mask=m_pixel)


@triton.jit
def tap_gradient(
    soft_ptr, grad_ptr, o_taps, m_taps, sample, centre, dot, inverse, inverse_channels, EXPONENT: tl.constexpr
):
    """Return the gradient ``[8, PIXELS]`` of eight samples with sigma held fixed, and their scaled differences."""
    # [8, PIXELS]
    soft = tl.load(soft_ptr + o_taps, mask=m_taps, other=0.0)
    grad = tl.load(grad_ptr + o_taps, mask=m_taps, other=0.0).to(tl.float32)
    u = (sample - centre[None, :]) * inverse[None, :]
    slope = 2.0 * u if EXPONENT == 2 else tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    return -soft * (grad - dot[None, :]) * inverse_channels * slope * inverse[None, :], u


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
    m_taps = m_pixel[None, :]
    plane = height * width
    # [8, PIXELS]: offsets of the first dilation's weights
    o_taps = (i_n * 8 * D + tl.arange(0, 8)[:, None]) * plane + (o_y * width + o_x)[None, :]

    dot = tl.zeros([PIXELS], dtype=tl.float32)
    for i in tl.static_range(D):
        # [8, PIXELS]
        soft = tl.load(soft_ptr + o_taps + i * 8 * plane, mask=m_taps, other=0.0)
        grad = tl.load(grad_ptr + o_taps + i * 8 * plane, mask=m_taps, other=0.0).to(tl.float32)
        dot += tl.sum(soft * grad, axis=0)

    p_image = image_ptr + i_n * stride_image_n
    samples, centre, mean, sigma = neighbourhood(
        p_image, o_y, o_x, height, width, stride_image_h, stride_image_w, DILATIONS, SIGMA
    )
    inverse = tl.div_rn(tl.full([PIXELS], 1.0, tl.float32), tl.fma(sigma, alpha, eps))
    d_scale = tl.zeros([PIXELS], dtype=tl.float32)  # gradient of alpha sigma + eps
    d_centre = tl.zeros([PIXELS], dtype=tl.float32)
    for i in tl.static_range(D):
        d_tap, u = tap_gradient(
            soft_ptr,
            grad_ptr,
            o_taps + i * 8 * plane,
            m_taps,
            samples[i],
            centre,
            dot,
            inverse,
            inverse_channels,
            EXPONENT,
        )
        d_scale -= tl.sum(d_tap * u, axis=0)
        d_centre -= tl.sum(d_tap, axis=0)
    if SIGMA != "none":
        d_sigma = d_scale * alpha
        flat = sigma == 0
        per_sample = tl.where(flat, 0.0, d_sigma / (tl.where(flat, 1.0, sigma) * (8 * D + CENTRES - 1)))
        # the centre's own sample is `centre`, 0 in the modes that count it
        d_centre += per_sample * (centre - mean) * CENTRES
    for i in tl.static_range(D):
        # computed again: kept, P more registers a thread would spill
        d_tap, _ = tap_gradient(
            soft_ptr,
            grad_ptr,
            o_taps + i * 8 * plane,
            m_taps,
            samples[i],
            centre,
            dot,
            inverse,
            inverse_channels,
            EXPONENT,
        )
        if SIGMA != "none":
            d_tap += per_sample[None, :] * (samples[i] - mean[None, :])
        tl.store(taps_ptr + o_taps + i * 8 * plane, d_tap, mask=m_taps)
    tl.store(centre_ptr + i_n * plane + o_y * width + o_x, d_centre, mask=m_pixel)


def affinity_warps(dilations: tuple[int, ...]) -> int:
    """Return the warps of an affinity gradient's tile: two threads share a pixel whose samples would spill from one."""
    return 8 if len(dilations) > 3 else 4


def borders(planes: Tensor, weights: Tensor, dilations: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return what clamping adds to border pixels: rows ``[n, groups, 2, W, width]`` and columns ``[..., H, width]``.

    Args:
        planes: the incoming gradient, ``[n, groups, H, W, width]`` fp32.
        weights: ``[n, P, H, W]`` contiguous.
    """
    count, groups, rows, columns, width = planes.shape
    sums = []
    for along, across, by_rows in ((columns, rows, True), (rows, columns, False)):
        out = torch.empty((count, groups, 2, along, width), dtype=torch.float32, device=planes.device)
        blocks = triton.cdiv(along, BLOCK_EDGE)
        propagate_bwd_border_kernel[(count * groups * 2 * blocks,)](
            planes_ptr=planes,
            weights_ptr=weights,
            out_ptr=out,
            groups=groups,
            length=along,
            depth=across,
            step_along=1 if by_rows else columns,
            step_across=columns if by_rows else 1,
            blocks=blocks,
            stride_weights_n=weights.stride(0),
            DILATIONS=dilations,
            ROWS=by_rows,
            INT64=needs_int64(planes, weights),
            BLOCK_C=width,
            BLOCK=BLOCK_EDGE,
            num_warps=1,
            **LAUNCH,
        )
        sums.append(out)
    return sums[0], sums[1]


def transpose(
    planes: Tensor, weights: Tensor, out: Tensor, dilations: tuple[int, ...], channels: int, valid: Tensor | None
) -> None:
    """Launch one transposed iteration from ``planes`` into ``out``, both ``[n, groups, H, W, width]`` fp32."""
    propagate.step(planes, weights, out, dilations, channels, valid, borders(planes, weights, dilations))


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
    take about as much memory as the weights.

    Returns:
        ``grad_weights [B, P, H, W]`` in the weights' dtype, ``grad_masks [B, C, H, W]`` in the masks' dtype and memory
        format; with an anchor also ``grad_anchor [B, 1, H, W]``, by the formulas of ``eager.propagate_backward``. An
        empty tensor for one that is not needed.
    """
    dilations = tuple(int(d) for d in dilations)
    grad_masks = torch.empty_like(masks) if need_masks else masks.new_empty(0)
    if num_iter == 0 or masks.numel() == 0:
        if need_masks:
            grad_masks.copy_(propagate.without_invalid(grad, valid_classes))
        grads = (torch.zeros_like(weights) if need_weights else weights.new_empty(0), grad_masks)
        if anchor is None:
            return grads
        return *grads, anchor.new_zeros(anchor.shape if need_anchor else 0)
    batch, channels, rows, columns = masks.shape
    neighbours = weights.shape[1]
    weights = weights.contiguous()
    valid_classes = propagate.flags(valid_classes)
    width = tuning.plane_width(channels, 4)
    need_anchor = need_anchor and anchor is not None
    asked_weights, need_weights = need_weights, need_weights or need_anchor
    hold = None if anchor is None else anchor.unsqueeze(-1)  # [B, 1, H, W, 1], as the planes
    grad_anchor = weights.new_zeros((batch, 1, rows, columns) if need_anchor else 0, dtype=torch.float32)
    sums = torch.empty(weights.shape if need_weights else 0, dtype=torch.float32, device=masks.device)
    planes_kept = 2 * num_iter if need_weights else 2
    chunk = width * max(1, neighbours // (planes_kept * width))
    tiles_w = triton.cdiv(columns, TILE[1])
    tiles = tiles_w * triton.cdiv(rows, TILE[0])
    with device_guard(masks):
        for c in range(0, channels, chunk):
            here = (slice(None), slice(c, c + chunk))
            part = masks[here]
            count = part.shape[1]
            valid = None if valid_classes is None else valid_classes[here]
            shape = (batch, triton.cdiv(count, width), rows, columns, width)
            kept = num_iter if need_weights else 1
            # planes_t before iteration t, grads_t after it; groups without a valid channel are never written
            make = torch.empty if valid is None else torch.zeros
            grads = make((kept, *shape), dtype=torch.float32, device=masks.device)
            propagate.copy(grad[here], grads[-1], valid, pack=True)
            if need_weights:
                planes = make((kept, *shape), dtype=torch.float32, device=masks.device)
                propagate.copy(part, planes[0], valid, pack=True)
                for t in range(num_iter - 1):
                    propagate.step(planes[t], weights, planes[t + 1], dilations, count, valid)
                    if anchor is not None:
                        propagate.keep_share(planes[t + 1], planes[0], anchor)
            current = grads[-1]
            total = None if hold is None else torch.zeros_like(current)
            for t in range(num_iter - 1, -1, -1):
                if hold is not None and total is not None:
                    total += current
                    current *= 1 - hold
                if t == 0 and not need_masks:
                    break
                written = grads[t - 1] if need_weights and t > 0 else torch.empty_like(current)
                transpose(current, weights, written, dilations, count, valid)
                current = written
            if need_masks:
                if hold is not None and total is not None:
                    current.addcmul_(total, hold)
                propagate.copy(grad_masks[here], current, valid, pack=False)
            if need_anchor and total is not None:
                products = total * planes[0]
                lanes = torch.arange(width * shape[1], device=masks.device).view(shape[1], 1, 1, width) < count
                grad_anchor += products.where(lanes, 0.0).sum((1, 4)).unsqueeze(1)
            if need_weights:
                propagate_bwd_weights_kernel[(batch * len(dilations) * tiles,)](
                    masks_ptr=planes,
                    grads_ptr=grads,
                    out_ptr=sums,
                    images=batch,
                    groups=shape[1],
                    times=num_iter,
                    height=rows,
                    width=columns,
                    tiles_w=tiles_w,
                    tiles=tiles,
                    DILATIONS=dilations,
                    ACCUMULATE=c > 0,
                    INT64=needs_int64(planes, sums),
                    BLOCK_C=width,
                    BLOCK_H=TILE[0],
                    BLOCK_W=TILE[1],
                    num_warps=4,
                    **LAUNCH,
                )
    wanted = (sums.to(weights.dtype) if asked_weights else weights.new_empty(0), grad_masks)
    if anchor is None:
        return wanted
    if need_anchor:
        grad_anchor -= (weights * sums).sum(1, keepdim=True) / (1 - anchor)
    return *wanted, grad_anchor


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

    The position term is constant, so ``position_weight`` has no part in the gradient.

    Returns:
        ``[B, K, H, W]`` in the image's dtype and memory format.
    """
    dilations = tuple(int(d) for d in dilations)
    grad_image = torch.empty_like(image)
    if image.numel() == 0:
        return grad_image
    batch, channels, rows, columns = image.shape
    grad_weights = grad_weights.contiguous()
    soft = affinity.local_affinity(
        image,
        dilations,
        exponent=exponent,
        alpha=alpha,
        sigma=sigma,
        eps=eps,
        position_weight=0.0,
        fast=False,
    )
    taps = torch.empty_like(soft)
    centre = torch.empty((batch, rows, columns), dtype=torch.float32, device=image.device)
    ones = torch.ones((batch, 1, rows, columns, 1), dtype=torch.float32, device=image.device)
    gathered = torch.empty_like(ones)
    tiles_w = triton.cdiv(columns, TILE[1])
    tiles = tiles_w * triton.cdiv(rows, TILE[0])
    with device_guard(image):
        for k in range(channels):
            plane = image[:, k]
            local_affinity_bwd_kernel[(batch * tiles,)](
                image_ptr=plane,
                soft_ptr=soft,
                grad_ptr=grad_weights,
                taps_ptr=taps,
                centre_ptr=centre,
                height=rows,
                width=columns,
                tiles_w=tiles_w,
                tiles=tiles,
                stride_image_n=plane.stride(0),
                stride_image_h=plane.stride(1),
                stride_image_w=plane.stride(2),
                alpha=float(alpha),
                eps=float(eps),
                inverse_channels=1.0 / channels,
                DILATIONS=dilations,
                EXPONENT=int(exponent),
                SIGMA=sigma,
                INT64=needs_int64(plane, soft, grad_weights),
                BLOCK_H=TILE[0],
                BLOCK_W=TILE[1],
                num_warps=affinity_warps(dilations),
                **LAUNCH,
            )
            transpose(ones, taps, gathered, dilations, 1, None)
            grad_image[:, k] = gathered[:, 0, :, :, 0] + centre
    return grad_image


def offline_cases() -> Iterator[tuning.OfflineCase]:
    """List the launches for compilation without a device."""
    for dilations in OFFLINE_DILATIONS:
        tile = {"DILATIONS": dilations, "INT64": False}
        longest = dilations == OFFLINE_DILATIONS[-1]
        yield tuning.OfflineCase(
            f"propagate_bwd_weights {dilations}",
            propagate_bwd_weights_kernel,
            {"masks_ptr": "*fp32", "grads_ptr": "*fp32", "out_ptr": "*fp32"},
            tile | {"ACCUMULATE": True, "BLOCK_C": 4, "BLOCK_H": TILE[0], "BLOCK_W": TILE[1]},
            every_target=longest,
        )
        for by_rows in (True, False):
            yield tuning.OfflineCase(
                f"propagate_bwd_border {dilations} {by_rows=}",
                propagate_bwd_border_kernel,
                {"planes_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*fp32"},
                tile | {"ROWS": by_rows, "BLOCK_C": 4, "BLOCK": BLOCK_EDGE},
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
                        "BLOCK_H": TILE[0],
                        "BLOCK_W": TILE[1],
                    },
                    num_warps=affinity_warps(dilations),
                    every_target=longest and image == "*fp32",
                )
