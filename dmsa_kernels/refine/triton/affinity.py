"""The affinity kernel: a guide image in, P weights a pixel out.

One thread owns one pixel and keeps the P samples of one image channel and the P scores in registers, so every sample is
loaded once a channel: ``K * P`` loads a pixel instead of ``3 * K * P`` for a mean, a variance and a score pass.

The neighbours are the rows of a block, whose number must be a power of two: ``BLOCK_P``. The compiler knows which rows
are none and leaves out what is computed of them alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import plans, tuning
from dmsa_kernels.refine.spec import position_vector
from dmsa_kernels.refine.triton.common import LAUNCH, NOTHING, OFFLINE_DILATIONS, in_float32, needs_int64, tap_offsets

# Image channels one launch takes; more are summed over several launches.
MAX_CHANNELS = 4


@triton.jit
def all_tap_offsets(DILATIONS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the rows and columns ``[BLOCK_P, 1]`` of the neighbours, 3x3 windows without their centres, and a mask."""
    o_p = tl.arange(0, BLOCK_P)[:, None]
    dilation = tl.zeros([BLOCK_P, 1], dtype=tl.int32)
    for i in tl.static_range(len(DILATIONS)):
        dilation = tl.where(o_p // 8 == i, list(DILATIONS)[i], dilation)
    t_y, t_x = tap_offsets(o_p % 8, dilation)
    return t_y, t_x, o_p < 8 * len(DILATIONS)


@triton.jit
def neighbourhood(
    p_image,
    o_y,
    o_x,
    height,
    width,
    stride_h,
    stride_w,
    DILATIONS: tl.constexpr,
    SIGMA: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return the samples ``[BLOCK_P, PIXELS]`` around each pixel, the pixel, one sample, the mean and the deviation.

    The mean is relative to that one sample, so that a constant neighbourhood has a deviation of exactly 0; the
    deviation is two-pass. Coordinates are clamped, so no load leaves the map.
    """
    D: tl.constexpr = len(DILATIONS)
    # how often the centre counts
    CENTRES: tl.constexpr = D if SIGMA == "centred" else (1 if SIGMA == "centre_once" else 0)
    t_y, t_x, m_tap = all_tap_offsets(DILATIONS, BLOCK_P)
    c_y = tl.minimum(o_y, height - 1)
    c_x = tl.minimum(o_x, width - 1)
    # [PIXELS]
    centre = tl.load(p_image + c_y * stride_h + c_x * stride_w).to(tl.float32)
    origin = centre
    if SIGMA == "neighbours":
        first: tl.constexpr = list(DILATIONS)[0]  # noqa: RUF015 (the language has no iterators)
        c_y = tl.minimum(tl.maximum(o_y - first, 0), height - 1)
        c_x = tl.minimum(tl.maximum(o_x - first, 0), width - 1)
        # [PIXELS]
        origin = tl.load(p_image + c_y * stride_h + c_x * stride_w).to(tl.float32)
    q_y = tl.minimum(tl.maximum(o_y[None, :] + t_y, 0), height - 1)
    q_x = tl.minimum(tl.maximum(o_x[None, :] + t_x, 0), width - 1)
    # the hint orders the lanes along the pixels, not along the neighbours; no load gets wider, for nothing is known of
    # the alignment
    o_samples = tl.max_contiguous(q_y * stride_h + q_x * stride_w, [1, 2])
    # [BLOCK_P, PIXELS]
    samples = tl.load(p_image + o_samples, mask=m_tap, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(m_tap, samples - origin[None, :], NOTHING), axis=0) * (1.0 / (8 * D + CENTRES))
    sigma = tl.full(origin.shape, 1.0, tl.float32)
    if SIGMA != "none":
        difference = samples - origin[None, :] - mean[None, :]
        variance = tl.sum(tl.where(m_tap, difference * difference, NOTHING), axis=0) + mean * mean * CENTRES
        sigma = tl.sqrt_rn(variance * (1.0 / (8 * D + CENTRES - 1)))
    return samples, centre, origin, mean, sigma


@triton.jit
def inverse_scale(sigma, alpha, eps):
    """Return ``1 / (alpha sigma + eps)``, at most 1e15, whose square leaves room in float32; 0 where sigma is 0.

    A channel without contrast has the same score for all neighbours: left out, it drowns no other in rounding.
    """
    inverse = tl.div_rn(tl.full(sigma.shape, 1.0, tl.float32), tl.fma(sigma, alpha, eps))
    # a minimum would make a number of the NaN that a pixel of the neighbourhood brings
    inverse = tl.where(inverse > 1e15, 1e15, inverse)
    return tl.where(sigma == 0, 0.0, inverse)


@triton.jit(
    do_not_specialize=["height", "width", "tiles_w", "tiles", "stride_image_n", "stride_image_h", "with_position"]
)
def local_affinity_fwd_kernel(
    image_ptr,  # [B, CHANNELS, H, W], any strides
    partial_ptr,  # [B, P, H, W] fp32: scores of the channels of earlier launches
    weights_ptr,  # [B, P, H, W]
    height,
    width,
    tiles_w,
    tiles,
    stride_image_n,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    alpha,
    eps,
    inverse_channels,
    with_position,  # 1, or 0 for the softmax alone, by the same code
    DILATIONS: tl.constexpr,
    POSITION: tl.constexpr,  # P floats in tap order, or () without a position term
    EXPONENT: tl.constexpr,  # 1 or 2
    SIGMA: tl.constexpr,
    CHANNELS: tl.constexpr,
    READ_PARTIAL: tl.constexpr,
    WRITE_PARTIAL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``w_p = softmax_p(-mean_k (|I_k(q + o_p) - I_k(q)| / (alpha sigma_k + eps))^EXPONENT) + POSITION_p``."""
    D: tl.constexpr = len(DILATIONS)
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    i_n = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    if INT64:
        i_n = i_n.to(tl.int64)
        height = height.to(tl.int64)
        width = width.to(tl.int64)
    o_pixel = tl.arange(0, PIXELS)
    o_y = (i_tile // tiles_w) * BLOCK_H + o_pixel // BLOCK_W
    o_x = (i_tile % tiles_w) * BLOCK_W + o_pixel % BLOCK_W
    plane = height * width

    scores = tl.zeros([BLOCK_P, PIXELS], dtype=tl.float32)
    if READ_PARTIAL:
        # [BLOCK_P, PIXELS]
        o_weights, m_weights = weights_offsets(i_n * 8 * D * plane, o_y, o_x, height, width, DILATIONS, BLOCK_P)
        scores = tl.load(partial_ptr + o_weights, mask=m_weights, other=0.0)

    p_image = image_ptr + i_n * stride_image_n
    for _ in range(CHANNELS):  # not unrolled: the samples of all channels, loaded at once, would spill
        samples, centre, _origin, _mean, sigma = neighbourhood(
            p_image, o_y, o_x, height, width, stride_image_h, stride_image_w, DILATIONS, SIGMA, BLOCK_P
        )
        term = tl.abs(samples - centre[None, :]) * inverse_scale(sigma, alpha, eps)[None, :]
        if EXPONENT == 2:
            term = term * term
        scores -= term * inverse_channels
        # one channel at a time: a multiple of the stride could leave 32 bits
        p_image += stride_image_c

    # computed behind the channels, or their registers would be taken all along
    o_weights, m_weights = weights_offsets(i_n * 8 * D * plane, o_y, o_x, height, width, DILATIONS, BLOCK_P)
    if WRITE_PARTIAL:
        tl.store(partial_ptr + o_weights, scores, mask=m_weights)
    else:
        t_y, t_x, m_tap = all_tap_offsets(DILATIONS, BLOCK_P)
        top = tl.max(tl.where(m_tap, scores, float("-inf")), axis=0)
        w = tl.exp(scores - top[None, :])
        total = tl.sum(tl.where(m_tap, w, NOTHING), axis=0)
        w = w * tl.div_rn(tl.full([PIXELS], 1.0, tl.float32), total)[None, :]
        if len(POSITION) > 0:
            position = tl.zeros([BLOCK_P, 1], dtype=tl.float32)
            for i in tl.static_range(D):
                here = tl.arange(0, BLOCK_P)[:, None] // 8 == i
                window = tl.where(t_y * t_x != 0, list(POSITION)[8 * i], list(POSITION)[8 * i + 1])
                position = tl.where(here, window, position)
            w += position * with_position.to(tl.float32)
        tl.store(weights_ptr + o_weights, w.to(weights_ptr.dtype.element_ty), mask=m_weights)


@triton.jit
def weights_offsets(o_image, o_y, o_x, height, width, DILATIONS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the offsets ``[BLOCK_P, PIXELS]`` of the pixels' weights in ``[B, P, H, W]``, and which of them exist."""
    o_p = tl.arange(0, BLOCK_P)[:, None]
    m_pixel = ((o_y < height) & (o_x < width))[None, :]
    return o_p * (height * width) + (o_image + o_y * width + o_x)[None, :], m_pixel & (o_p < 8 * len(DILATIONS))


def local_affinity(
    image: Tensor,
    dilations: Sequence[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    fast: bool,
) -> Tensor:
    """Launch the affinity kernel; arguments as in ``dmsa_kernels.refine.functional.local_affinity``, validated.

    Args:
        image: ``[B, K, H, W]``, float32, float16 or bfloat16, any strides.
        dilations: D dilations, each at least 1.
        fast: store the weights in float16.

    Returns:
        ``[B, P, H, W]`` contiguous, float32 (float16 if ``fast``).
    """
    dilations = tuple(int(d) for d in dilations)
    batch, _, height, width = image.shape
    dtype = torch.float16 if fast else torch.float32
    weights = image.new_empty((batch, 8 * len(dilations), height, width), dtype=dtype)
    if weights.numel():
        spec = (int(exponent), in_float32(alpha), sigma, in_float32(eps), float(position_weight))
        plans.run(schedule, (image, weights), dilations, *spec)
    return weights


def schedule(
    trace: plans.Trace,
    image: Tensor,
    weights: Tensor,
    dilations: tuple[int, ...],
    exponent: int,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    with_position: bool = True,
) -> None:
    """Write down the launches of :func:`local_affinity`, or of its softmax alone."""
    batch, channels, height, width = image.shape
    position = position_constants(dilations, alpha, eps, position_weight)
    starts = range(0, channels, MAX_CHANNELS)
    # float32 scores are summed in place when the weights can hold them
    in_place = weights.dtype == torch.float32 or len(starts) == 1
    partial = weights if in_place else trace.empty(weights.shape, torch.float32)
    config = tuning.select("local_affinity_fwd", tuning_key(weights.shape[1], height * width))
    tiles_w = triton.cdiv(width, config.block_w)
    tiles = tiles_w * triton.cdiv(height, config.block_h)
    for start in starts:
        part = image[:, start : start + MAX_CHANNELS]
        trace.launch(
            local_affinity_fwd_kernel,
            batch * tiles,
            num_warps=num_warps(config, weights.shape[1]),
            options=LAUNCH,
            image_ptr=part,
            partial_ptr=partial,
            weights_ptr=weights,
            height=height,
            width=width,
            tiles_w=tiles_w,
            tiles=tiles,
            stride_image_n=part.stride(0),
            stride_image_c=part.stride(1),
            stride_image_h=part.stride(2),
            stride_image_w=part.stride(3),
            alpha=alpha,
            eps=eps,
            inverse_channels=1.0 / channels,
            with_position=int(with_position),
            DILATIONS=dilations,
            POSITION=position,
            EXPONENT=exponent,
            SIGMA=sigma,
            CHANNELS=part.shape[1],
            READ_PARTIAL=start > 0,
            WRITE_PARTIAL=start != starts[-1],
            INT64=needs_int64(part, weights),
            BLOCK_P=triton.next_power_of_2(weights.shape[1]),
            BLOCK_H=config.block_h,
            BLOCK_W=config.block_w,
        )


def position_constants(dilations: tuple[int, ...], alpha: float, eps: float, weight: float) -> tuple[float, ...]:
    """Return the position term's P constants, or none; those too small for float32 are 0."""
    tiny = torch.finfo(torch.float32).tiny
    return tuple(p if p >= tiny else 0.0 for p in position_vector(dilations, alpha, eps, weight)) if weight else ()


def num_warps(config: tuning.Config, neighbours: int) -> int:
    """Return the warps of a tile: two threads share a pixel whose samples and scores would spill from one."""
    return config.num_warps * (2 if neighbours > 48 else 1)


def tuning_key(neighbours: int, pixels: int) -> tuple[int, int]:
    """Return the bucketed shape under which a measured configuration is kept."""
    return neighbours, tuning.bucket(pixels)


def offline_cases() -> Iterator[tuning.OfflineCase]:
    """List the launches for compilation without a device."""

    def case(
        dilations: tuple[int, ...], config: tuning.Config, image: str, weights: str, channels: int = 3
    ) -> tuning.OfflineCase:
        return tuning.OfflineCase(
            f"local_affinity_fwd {image[1:]}->{weights[1:]} {dilations} {channels=} {config}",
            local_affinity_fwd_kernel,
            {
                "image_ptr": image,
                "partial_ptr": "*fp32",
                "weights_ptr": weights,
                "alpha": "fp32",
                "eps": "fp32",
                "inverse_channels": "fp32",
            },
            {
                "stride_image_w": 1,
                "DILATIONS": dilations,
                "POSITION": position_constants(dilations, 0.3, 3e-9, 0.01),
                "EXPONENT": 2,
                "SIGMA": "neighbours",
                "CHANNELS": channels,
                "READ_PARTIAL": False,
                "WRITE_PARTIAL": False,
                "INT64": False,
                "BLOCK_P": triton.next_power_of_2(8 * len(dilations)),
                "BLOCK_H": config.block_h,
                "BLOCK_W": config.block_w,
            },
            num_warps=num_warps(config, 8 * len(dilations)),
            every_target=config == default and image == "*fp32",
        )

    for dilations in OFFLINE_DILATIONS:
        default, *others = tuning.configs("local_affinity_fwd", neighbours=8 * len(dilations))
        for image, weights in (("*fp32", "*fp32"), ("*fp16", "*fp32"), ("*bf16", "*fp32")):
            yield case(dilations, default, image, weights)
        yield case(dilations, default, "*fp32", "*fp32", MAX_CHANNELS)
    yield case(dilations, default, "*bf16", "*fp16")
    for config in others:
        yield case(dilations, config, "*fp32", "*fp32")
