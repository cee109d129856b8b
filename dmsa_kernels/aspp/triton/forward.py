"""The forward kernel, its launcher, and the kernel with the pointwise projection behind the depthwise tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels.aspp.launch import gather_plan
from dmsa_kernels.aspp.layout import empty_map, is_channels_last
from dmsa_kernels.tuning import OfflineCase


@triton.jit
def _tile_offsets(tile, width, pixels, o_c, stride_h, stride_w, stride_c, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """Return row, column and mask of a tile's pixels [P], and their offsets in a map [P, C]."""
    o_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    row = o_p // width
    col = o_p - row * width
    if WIDE:
        offsets = (row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w)[:, None]
        offsets += (o_c.to(tl.int64) * stride_c)[None, :]
    else:
        offsets = (row * stride_h + col * stride_w)[:, None] + (o_c * stride_c)[None, :]
    return row, col, o_p < pixels, offsets


@triton.jit
def _shift(dy, dx, stride_h, stride_w, WIDE: tl.constexpr):
    """Return the elements between a pixel and the one ``dy`` rows and ``dx`` columns further."""
    if WIDE:
        # Not .to(): an argument specialised to 1 is a plain number.
        zero = tl.zeros((), tl.int64)
        return (zero + dy) * stride_h + (zero + dx) * stride_w
    else:
        return dy * stride_h + dx * stride_w


@triton.jit
def _add_filter_row(
    acc,  # [P, C] float32
    x_ptr,  # the source's image
    w_ptr,  # [k, C], channels adjacent
    offsets,  # [P, C]
    row,
    col,
    m_p,
    m_c,
    o_c,
    first_row,
    last_row,
    dy,
    dilation,
    height,
    width,
    channels,
    stride_h,
    stride_w,
    K: tl.constexpr,
    CENTRE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the taps of one filter row to ``acc``, unless it misses the map for the whole tile."""
    if (last_row + dy >= 0) & (first_row + dy < height):
        m_row = m_p & (row + dy >= 0) & (row + dy < height)
        for j in tl.static_range(K):
            if CENTRE or j != K // 2:
                dx = (j - K // 2) * dilation
                m_x = m_row & (col + dx >= 0) & (col + dx < width)
                p_x = x_ptr + _shift(dy, dx, stride_h, stride_w, WIDE) + offsets
                # [P, C]
                b_x = tl.load(p_x, mask=m_x[:, None] & m_c[None, :], other=0.0)
                # [C]
                b_w = tl.load(w_ptr + j * channels + o_c, mask=m_c, other=0.0)
                acc += b_x.to(tl.float32) * b_w.to(tl.float32)[None, :]
    return acc


@triton.jit
def _add_taps(
    acc,  # [P, C] float32
    x_ptr,  # the source's image
    w_ptr,  # [k, k, C], channels adjacent
    offsets,  # [P, C]
    row,
    col,
    m_p,
    m_c,
    o_c,
    first_row,
    last_row,
    dilation,
    height,
    width,
    channels,
    stride_h,
    stride_w,
    K: tl.constexpr,
    CENTRE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add one branch's taps to ``acc``."""
    if K == 3:
        for i in tl.static_range(K):
            acc = _add_filter_row(
                acc,
                x_ptr,
                w_ptr + i * K * channels,
                offsets,
                row,
                col,
                m_p,
                m_c,
                o_c,
                first_row,
                last_row,
                (i - K // 2) * dilation,
                dilation,
                height,
                width,
                channels,
                stride_h,
                stride_w,
                K,
                CENTRE or i != K // 2,
                WIDE,
            )
    else:
        # Unrolled, the offsets of so many taps would be computed ahead of the loop over tiles, and spill.
        for i in range(K):
            acc = _add_filter_row(
                acc,
                x_ptr,
                w_ptr + i * K * channels,
                offsets,
                row,
                col,
                m_p,
                m_c,
                o_c,
                first_row,
                last_row,
                (i - K // 2) * dilation,
                dilation,
                height,
                width,
                channels,
                stride_h,
                stride_w,
                K,
                True,
                WIDE,
            )
    return acc


@triton.jit(do_not_specialize=["stride_w_tile"])
def dwconv_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    dilations,  # of launch_dilations
    channels,
    height,
    width,
    bands,
    stride_w_tile,
    stride_x_b,
    stride_x_r,
    stride_x_c,
    stride_x_h,
    stride_x_w,
    stride_y_b,
    stride_y_r,
    stride_y_c,
    stride_y_h,
    stride_y_w,
    R: tl.constexpr,
    K: tl.constexpr,
    SUM: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS_FASTEST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """y_r(q) = bias_r + sum_ij w_r,ij x_r(q + d_r (i - k // 2, j - k // 2)), or the sum of the y_r.

    With one source for all branches (SHARED) the centre of a 3 x 3 filter is loaded once. The gradient of the input is
    the same kernel over the branches' gradients and flipped filters, summed up.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    if CHANNELS_FASTEST:
        i_c = pid % blocks
        band = (pid // blocks) % bands
    else:
        band = pid % bands
        i_c = (pid // bands) % blocks
    i_b = pid // (blocks * bands)
    pixels = height * width
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    x_ptr += i_b.to(tl.int64) * stride_x_b
    y_ptr += i_b.to(tl.int64) * stride_y_b
    for t in range(TILES):
        tile = band * TILES + t
        first = tile * BLOCK_P
        if first < pixels:
            first_row = first // width
            last_row = tl.minimum(first + BLOCK_P - 1, pixels - 1) // width
            row, col, m_p, o_x = _tile_offsets(
                tile, width, pixels, o_c, stride_x_h, stride_x_w, stride_x_c, BLOCK_P, WIDE
            )
            row, col, m_p, o_y = _tile_offsets(
                tile, width, pixels, o_c, stride_y_h, stride_y_w, stride_y_c, BLOCK_P, WIDE
            )
            mask = m_p[:, None] & m_c[None, :]
            total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
            if SHARED and K == 3:
                b_centre = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
            for r in tl.static_range(R):
                p_w = w_ptr + r * K * K * channels
                if K == 3 and CHANNELS_FASTEST:
                    # The compiler lifts loads that do not change out of the loop: the filters would fill, and
                    # spill, the registers. It cannot know that this stride is zero.
                    p_w += t * stride_w_tile * 16  # a multiple, for wide loads
                if SHARED and K == 3:
                    b_w = tl.load(p_w + (K * K // 2) * channels + o_c, mask=m_c, other=0.0)
                    acc = b_centre * b_w.to(tl.float32)[None, :]
                else:
                    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
                p_x = x_ptr + _shift(r, 0, stride_x_r, 0, WIDE)
                p_y = y_ptr + _shift(r, 0, stride_y_r, 0, WIDE)
                acc = _add_taps(
                    acc,
                    p_x,
                    p_w,
                    o_x,
                    row,
                    col,
                    m_p,
                    m_c,
                    o_c,
                    first_row,
                    last_row,
                    dilations[r] >> 1,
                    height,
                    width,
                    channels,
                    stride_x_h,
                    stride_x_w,
                    K,
                    not SHARED or K > 3,
                    WIDE,
                )
                if HAS_BIAS:
                    b_bias = tl.load(bias_ptr + r * channels + o_c, mask=m_c, other=0.0)
                    acc += b_bias.to(tl.float32)[None, :]
                if SUM:
                    total += acc
                else:
                    # The outputs are not read again here: let them leave the cache before the input does.
                    b_y = acc.to(y_ptr.dtype.element_ty)
                    tl.store(p_y + o_y, b_y, mask=mask, eviction_policy="evict_first")
            if SUM:
                b_y = total.to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + o_y, b_y, mask=mask, eviction_policy="evict_first")


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    branches, channels = weight.shape[:2]
    out = empty_map(x, channels * (1 if reduce == "sum" else branches))
    branch_stride = 0 if reduce == "sum" else channels * out.stride(1)
    launch_gather(x, 0, tap_major(weight), bias, dilations, out, branch_stride)
    return out


def tap_major(weight: Tensor) -> Tensor:
    """Return ``[R, k, k, C]``, contiguous: the channels of one tap are adjacent, so that a tile loads them at once."""
    return weight.permute(0, 2, 3, 1).contiguous()


def launch_dilations(dilations: Sequence[int], farthest: int) -> tuple[int, ...]:
    """Return the dilations as the kernels take them: twice themselves plus one.

    Triton compiles a kernel anew for arguments that are 1 or multiples of 16, entries of a tuple included, whatever
    ``do_not_specialize`` says. Odd numbers above 1 are neither, so that one kernel serves every dilation set.

    Args:
        dilations: R dilations.
        farthest: the larger side of the map: off-centre taps that far are outside, larger dilations change nothing.
    """
    return tuple(2 * min(dilation, farthest) + 1 for dilation in dilations)


def launch_gather(
    source: Tensor,
    source_branch_stride: int,
    filters: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    out: Tensor,
    out_branch_stride: int,
) -> None:
    """Launch the forward kernel.

    Args:
        source: the first branch's map ``[B, >= C, H, W]``, any strides.
        source_branch_stride: elements from one branch's source to the next, 0 when they share it.
        filters: ``[R, k, k, C]``, contiguous.
        bias: ``[R, C]`` or ``None``.
        dilations: R dilations.
        out: the first branch's output, the shape of the source.
        out_branch_stride: elements from one branch's output to the next, 0 to sum the branches up.
    """
    branches, kernel_size, _, channels = filters.shape
    batch, _, height, width = out.shape
    if out.numel() == 0:
        return
    channels_last = is_channels_last(out)
    plan = gather_plan(batch, channels, height * width, kernel_size, out.dtype, channels_last)
    blocks = triton.cdiv(channels, plan.block_c)
    bands = triton.cdiv(height * width, plan.block_p * plan.tiles)
    farthest = max(height, width)
    dwconv_fwd_kernel[(batch * blocks * bands,)](
        source,
        filters,
        None if bias is None else bias.contiguous(),
        out,
        launch_dilations(dilations, farthest),
        channels,
        height,
        width,
        bands,
        0,
        source.stride(0),
        source_branch_stride,
        source.stride(1),
        source.stride(2),
        source.stride(3),
        out.stride(0),
        out_branch_stride,
        out.stride(1),
        out.stride(2),
        out.stride(3),
        R=branches,
        K=kernel_size,
        SUM=out_branch_stride == 0,
        SHARED=source_branch_stride == 0,
        HAS_BIAS=bias is not None,
        CHANNELS_FASTEST=channels_last,
        WIDE=needs_wide_offsets(source, source_branch_stride, out, out_branch_stride, branches, farthest),
        BLOCK_P=plan.block_p,
        BLOCK_C=plan.block_c,
        TILES=plan.tiles,
        num_warps=plan.num_warps,
    )


def needs_wide_offsets(
    source: Tensor, source_branch_stride: int, out: Tensor, out_branch_stride: int, branches: int, farthest: int
) -> bool:
    """Whether offsets inside one image, taps outside the map included, may pass 2^31 elements."""
    return torch.iinfo(torch.int32).max < max(
        _reach(source, farthest) + (branches - 1) * source_branch_stride,
        _reach(out, 0) + (branches - 1) * out_branch_stride,
    )


def _reach(image: Tensor, margin: int) -> int:
    """Return the largest offset a tile of one image may compute, masked places included."""
    _, channels, height, width = image.shape
    padding = 4096  # pixels and channels of a tile that overhang the map
    rows = height + margin * 3 + padding // width
    columns = width + margin * 3
    return (channels + 128) * image.stride(1) + rows * image.stride(2) + columns * image.stride(3)


def offline_cases() -> Iterator[OfflineCase]:
    """List the launches for compilation without a device: the training maps of the method.

    Channels last, the strides are constants: a launch tells the compiler that they are multiples of 16 only by value.
    """
    full = {(torch.float32, "nchw"), (torch.bfloat16, "channels_last")}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("nchw", "channels_last"):
            yield _offline_case(dtype, layout, 3, False, every_target=(dtype, layout) in full)
            yield _offline_case(dtype, layout, 3, True, every_target=False)
    yield _offline_case(torch.float32, "channels_last", 7, False, every_target=False)


def _offline_case(
    dtype: torch.dtype, layout: str, kernel_size: int, joined: bool, *, every_target: bool
) -> OfflineCase:
    batch, channels, size = 32, 384, 20
    name = "*fp32" if dtype == torch.float32 else "*bf16"
    channels_last = layout == "channels_last"
    plan = gather_plan(batch, channels, size * size, kernel_size, dtype, channels_last)
    branches = 4
    constants: dict[str, object] = {
        "R": branches,
        "K": kernel_size,
        "SUM": joined,
        "SHARED": not joined,
        "HAS_BIAS": not joined,
        "CHANNELS_FASTEST": channels_last,
        "WIDE": False,
        "BLOCK_P": plan.block_p,
        "BLOCK_C": plan.block_c,
        "TILES": plan.tiles,
    }
    for side, width in (
        ("x", branches * channels if joined else channels),
        ("y", channels if joined else 4 * channels),
    ):
        if channels_last:
            constants |= {f"stride_{side}_c": 1, f"stride_{side}_w": width, f"stride_{side}_h": width * size}
            constants |= {f"stride_{side}_b": width * size * size, "channels": channels}
            constants |= {f"stride_{side}_r": channels if width > channels else 0}
        else:
            constants |= {f"stride_{side}_w": 1}
    return OfflineCase(
        f"dwconv_fwd {'sum' if joined else 'concat'} {name[1:]} {layout} k={kernel_size} {size}x{size} {plan}",
        dwconv_fwd_kernel,
        {"x_ptr": name, "w_ptr": name, "bias_ptr": name, "y_ptr": name, "dilations": ("i32",) * branches},
        constants,
        num_warps=plan.num_warps,
        every_target=every_target,
    )
