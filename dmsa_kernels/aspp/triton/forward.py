"""The forward kernel, its launcher, and the kernel with the pointwise projection behind the depthwise tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import plans
from dmsa_kernels.aspp.launch import Plan, gather_plan
from dmsa_kernels.aspp.layout import empty_map, is_channels_last
from dmsa_kernels.tuning import OfflineCase

MOST_BRANCHES = 8  # of a launch: Triton before 3.3 takes no tuple of arguments, so every dilation has one of its own


@triton.jit
def _tile_pixels(tile, width, pixels, BLOCK_P: tl.constexpr, FULL: tl.constexpr, ROWWISE: tl.constexpr):
    """Return row and column of a tile's pixels [P], and which of them exist.

    Pixels beyond the map take the last one's coordinates, so that their loads need no mask of their own; a FULL tile
    has none. The pixels of a ROWWISE tile are of one row, which is a number.
    """
    o_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o_inside = o_p if FULL else tl.minimum(o_p, pixels - 1)
    row = (tile * BLOCK_P) // width if ROWWISE else o_inside // width
    return row, o_inside - row * width, o_p < pixels


@triton.jit
def _map_offsets(row, col, o_c, stride_h, stride_w, stride_c, WIDE: tl.constexpr):
    """Return the offsets of pixels [P] and channels [C] in a map [P, C]."""
    if WIDE:
        return (row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w)[:, None] + (o_c.to(tl.int64) * stride_c)[
            None, :
        ]
    else:
        return (row * stride_h + col * stride_w)[:, None] + (o_c * stride_c)[None, :]


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
def _tile_of_map(
    map_ptr,
    tile,
    row,
    col,
    i_c,
    stride_h,
    stride_w,
    stride_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return a pointer and the offsets [P, C] from it of a tile's pixels and channels.

    FLAT: the pixels follow each other without a gap. The offsets are then known at compile time but for the thread's
    number, so that a tap's loads differ in their immediate operands and share one address.
    """
    o_block = tl.arange(0, BLOCK_C)
    if FLAT:
        # Adjacent lanes take adjacent pixels: four a lane, as the compiler would choose, are four wavefronts a tap.
        o_p = tl.max_contiguous(tl.arange(0, BLOCK_P), 1)
        start = _shift(tile * BLOCK_P, i_c * BLOCK_C, stride_w, stride_c, WIDE)
        return map_ptr + start, (o_p * stride_w)[:, None] + (o_block * stride_c)[None, :]
    else:
        # Four channels a lane: eight 16-bit ones, as the compiler would choose, are 32 bytes of float32 filters, which
        # adjacent lanes load in two halves.
        o_block = tl.max_contiguous(o_block, 4 if BLOCK_C > 4 else BLOCK_C)
        return map_ptr, _map_offsets(row, col, i_c * BLOCK_C + o_block, stride_h, stride_w, stride_c, WIDE)


@triton.jit
def _load(p, m_p, m_c, HAS_P: tl.constexpr, FULL_C: tl.constexpr):
    """Load ``p [P, C]``, 0 where the pixel's (if ``HAS_P``) or the channel's mask (unless ``FULL_C``) says no.

    A mask costs a predicate and a cleared register a value, as many instructions as the multiply-add and its load.
    """
    if HAS_P and FULL_C:
        return tl.load(p, mask=m_p[:, None], other=0.0)
    elif HAS_P:
        return tl.load(p, mask=m_p[:, None] & m_c[None, :], other=0.0)
    elif FULL_C:
        return tl.load(p)
    else:
        return tl.load(p, mask=m_c[None, :], other=0.0)


@triton.jit
def _load_channels(p, m_c, FULL_C: tl.constexpr):
    """Load ``p [C]`` as float32, 0 beyond the last channel."""
    if FULL_C:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _dilation(r, R: tl.constexpr, d_0, d_1, d_2, d_3, d_4, d_5, d_6, d_7):
    """Return the dilation of branch ``r``, of R, from the arguments that :func:`launch_dilations` makes."""
    dilation = d_0
    for n in tl.static_range(1, R):
        dilation = tl.where(r == n, (d_0, d_1, d_2, d_3, d_4, d_5, d_6, d_7)[n], dilation)
    return dilation >> 1


@triton.jit
def _inside(position, size, offset, SIDE: tl.constexpr):
    """Return whether ``position + offset`` is in ``[0, size)``; SIDE is the offset's sign: one end is enough."""
    return position >= -offset if SIDE < 0 else position < size - offset


@triton.jit
def _add_filter_row(
    acc,  # [P, C] float32
    x_ptr,  # the source's image
    w_ptr,  # [k, C] float32
    offsets,  # [P, C]
    m_row,  # [P]: whether the row is inside the map
    col,
    m_c,
    o_c,
    dy,
    dilation,
    width,
    stride_h,
    stride_w,
    stride_tap,
    stride_channel,
    K: tl.constexpr,
    HAS_ROW: tl.constexpr,  # the row may be outside
    CENTRE: tl.constexpr,  # the middle tap is not left out
    FULL_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the taps of one filter row to ``acc``."""
    for j in tl.static_range(K):
        if CENTRE or j != K // 2:
            dx = (j - K // 2) * dilation
            m_x = m_row
            if j != K // 2:
                m_x = _inside(col, width, dx, j - K // 2)
                if HAS_ROW:
                    m_x = m_x & m_row
            p_x = x_ptr + _shift(dy, dx, stride_h, stride_w, WIDE) + offsets
            # [P, C]
            b_x = _load(p_x, m_x, m_c, HAS_ROW or j != K // 2, FULL_C)
            # [C]
            b_w = _load_channels(w_ptr + j * stride_tap + o_c * stride_channel, m_c, FULL_C)
            acc += b_x.to(tl.float32) * b_w[None, :]
    return acc


@triton.jit
def _add_taps(
    acc,  # [P, C] float32
    x_ptr,  # the source's image
    w_ptr,  # [k, k, C] float32
    offsets,  # [P, C]
    row,
    col,
    m_c,
    o_c,
    first_row,
    last_row,
    dilation,
    height,
    width,
    stride_h,
    stride_w,
    stride_tap,
    stride_channel,
    K: tl.constexpr,
    ROWWISE: tl.constexpr,
    CENTRE: tl.constexpr,
    FULL_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add one branch's taps to ``acc``; a filter row that misses the map for the whole tile is skipped."""
    if K == 3:
        for i in tl.static_range(K):
            dy = (i - 1) * dilation
            if i == 1 or _inside(last_row if i == 0 else first_row, height, dy, i - 1):
                acc = _add_filter_row(
                    acc,
                    x_ptr,
                    w_ptr + i * K * stride_tap,
                    offsets,
                    _inside(row, height, dy, i - 1),
                    col,
                    m_c,
                    o_c,
                    dy,
                    dilation,
                    width,
                    stride_h,
                    stride_w,
                    stride_tap,
                    stride_channel,
                    K,
                    i != 1 and not ROWWISE,
                    CENTRE or i != 1,
                    FULL_C,
                    WIDE,
                )
    else:
        # Unrolled, the offsets of so many taps would be computed ahead of the loop over tiles, and spill.
        for i in range(K):
            dy = (i - K // 2) * dilation
            if (last_row + dy >= 0) & (first_row + dy < height):
                acc = _add_filter_row(
                    acc,
                    x_ptr,
                    w_ptr + i * K * stride_tap,
                    offsets,
                    (row + dy >= 0) & (row + dy < height),
                    col,
                    m_c,
                    o_c,
                    dy,
                    dilation,
                    width,
                    stride_h,
                    stride_w,
                    stride_tap,
                    stride_channel,
                    K,
                    not ROWWISE,
                    True,
                    FULL_C,
                    WIDE,
                )
    return acc


@triton.jit(do_not_specialize=["bands", "tiles", "stride_w_tile"])
def dwconv_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    d_0,  # of launch_dilations
    d_1,
    d_2,
    d_3,
    d_4,
    d_5,
    d_6,
    d_7,
    channels,
    height,
    width,
    bands,
    tiles,  # of a program
    stride_w_tap,
    stride_w_c,
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
    FULL_C: tl.constexpr,  # channels are a multiple of BLOCK_C
    FLAT: tl.constexpr,  # of is_flat
    ROWWISE: tl.constexpr,  # of is_rowwise
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
    t = 0
    while t < tiles:
        tile = band * tiles + t
        first = tile * BLOCK_P
        if first < pixels:
            row, col, m_p = _tile_pixels(tile, width, pixels, BLOCK_P, FLAT, ROWWISE)
            first_row = row if ROWWISE else first // width
            last_row = row if ROWWISE else tl.minimum(first + BLOCK_P - 1, pixels - 1) // width
            p_x_tile, o_x = _tile_of_map(
                x_ptr, tile, row, col, i_c, stride_x_h, stride_x_w, stride_x_c, BLOCK_P, BLOCK_C, FLAT, WIDE
            )
            p_y_tile, o_y = _tile_of_map(
                y_ptr, tile, row, col, i_c, stride_y_h, stride_y_w, stride_y_c, BLOCK_P, BLOCK_C, FLAT, WIDE
            )
            mask = m_p[:, None] if FULL_C else m_p[:, None] & m_c[None, :]
            total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
            if SHARED and K == 3:
                b_centre = _load(p_x_tile + o_x, m_p, m_c, False, FULL_C).to(tl.float32)
            for r in tl.static_range(R):
                p_w = w_ptr + r * K * K * channels
                if K == 3 and CHANNELS_FASTEST:
                    # The compiler lifts loads that do not change out of the loop: the filters would fill, and
                    # spill, the registers. It cannot know that this stride is zero.
                    p_w += t * stride_w_tile * 16  # a multiple, for wide loads
                if SHARED and K == 3:
                    acc = (
                        b_centre
                        * _load_channels(p_w + (K * K // 2) * stride_w_tap + o_c * stride_w_c, m_c, FULL_C)[None, :]
                    )
                else:
                    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
                p_x = p_x_tile + _shift(r, 0, stride_x_r, 0, WIDE)
                p_y = p_y_tile + _shift(r, 0, stride_y_r, 0, WIDE)
                acc = _add_taps(
                    acc,
                    p_x,
                    p_w,
                    o_x,
                    row,
                    col,
                    m_c,
                    o_c,
                    first_row,
                    last_row,
                    _dilation(r, R, d_0, d_1, d_2, d_3, d_4, d_5, d_6, d_7),
                    height,
                    width,
                    stride_x_h,
                    stride_x_w,
                    stride_w_tap,
                    stride_w_c,
                    K,
                    ROWWISE,
                    not SHARED or K > 3,
                    FULL_C,
                    WIDE,
                )
                if HAS_BIAS:
                    acc += _load_channels(bias_ptr + r * channels + o_c, m_c, FULL_C)[None, :]
                if SUM:
                    total += acc
                else:
                    # The outputs are not read again here: let them leave the cache before the input does.
                    b_y = acc.to(y_ptr.dtype.element_ty)
                    tl.store(p_y + o_y, b_y, mask=mask, eviction_policy="evict_first")
            if SUM:
                b_y = total.to(y_ptr.dtype.element_ty)
                tl.store(p_y_tile + o_y, b_y, mask=mask, eviction_policy="evict_first")
        t += 1


def multi_dilation_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilations: Sequence[int], reduce: str
) -> Tensor:
    """Compute ``[B, R * C, H, W]`` (``reduce="concat"``) or ``[B, C, H, W]`` (``"sum"``) from ``x [B, C, H, W]``."""
    branches, channels = weight.shape[:2]
    out = empty_map(x, channels * (1 if reduce == "sum" else branches))
    branch_stride = 0 if reduce == "sum" else channels * out.stride(1)
    launch_gather(x, 0, tap_major(weight, is_channels_last(out)), bias, dilations, out, branch_stride)
    return out


def tap_major(weight: Tensor, channels_last: bool) -> Tensor:
    """Return filters ``[R, C, k, k]`` as ``[R, k, k, C]`` in float32, so that a tile converts nothing.

    Channels last, the channels of one tap are adjacent, so that a tile loads them at once; else the taps of a channel.
    """
    branches, channels, kernel_size, _ = weight.shape
    if not channels_last:
        return weight.to(torch.float32).contiguous().permute(0, 2, 3, 1)
    out = weight.new_empty((branches, kernel_size, kernel_size, channels), dtype=torch.float32)
    return out.copy_(weight.permute(0, 2, 3, 1))


def launch_dilations(dilations: Sequence[int], farthest: int) -> tuple[int, ...]:
    """Return the dilations as the kernels take them: twice themselves plus one.

    Triton compiles a kernel anew for arguments that are 1 or multiples of 16, entries of a tuple included, whatever
    ``do_not_specialize`` says. Odd numbers above 1 are neither, so that one kernel serves every dilation set.

    Args:
        dilations: R dilations.
        farthest: the larger side of the map: off-centre taps that far are outside, larger dilations change nothing.
    """
    return tuple(2 * min(dilation, farthest) + 1 for dilation in dilations)


def dilation_arguments(launched: Sequence[int]) -> dict[str, int]:
    """Return the kernels' arguments ``d_0`` to ``d_7`` for the result of :func:`launch_dilations`; the last repeats."""
    return {f"d_{r}": launched[min(r, len(launched) - 1)] for r in range(MOST_BRANCHES)}


def launches_of(branches: int) -> list[slice]:
    """Return the branches of each launch, at most :data:`MOST_BRANCHES`."""
    return [slice(first, min(first + MOST_BRANCHES, branches)) for first in range(0, branches, MOST_BRANCHES)]


def from_branch(index: int, joined: Tensor, branch_stride: int, channels: int) -> Tensor:
    """Return branch ``index`` ``[B, channels, H, W]`` of maps that lie ``branch_stride`` elements apart."""
    batch, _, height, width = joined.shape
    offset = joined.storage_offset() + index * branch_stride
    return joined.as_strided((batch, channels, height, width), joined.stride(), offset)


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
        filters: of :func:`tap_major`, ``[R, k, k, C]``.
        bias: ``[R, C]`` or ``None``.
        dilations: R dilations.
        out: the first branch's output, the shape of the source.
        out_branch_stride: elements from one branch's output to the next, 0 to sum the branches up.
    """
    if len(dilations) > MOST_BRANCHES:
        _launch_in_parts(source, source_branch_stride, filters, bias, dilations, out, out_branch_stride)
    elif out.numel():
        tensors = (source, filters, None if bias is None else bias.contiguous(), out)
        launched = launch_dilations(dilations, max(out.shape[2:]))
        plans.run(_gather_schedule, tensors, source_branch_stride, launched, out_branch_stride)


def _launch_in_parts(
    source: Tensor,
    source_branch_stride: int,
    filters: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    out: Tensor,
    out_branch_stride: int,
) -> None:
    """Do what :func:`launch_gather` does for more branches than a launch takes; their sum is rounded once."""
    channels = filters.shape[3]
    total = torch.zeros_like(out, dtype=torch.float32) if out_branch_stride == 0 else None
    for part in launches_of(len(dilations)):
        target = from_branch(part.start, out, out_branch_stride, channels) if total is None else torch.empty_like(total)
        launch_gather(
            from_branch(part.start, source, source_branch_stride, channels),
            source_branch_stride,
            filters[part],
            None if bias is None else bias[part],
            dilations[part],
            target,
            out_branch_stride,
        )
        if total is not None:
            total += target
    if total is not None:
        out.copy_(total)


def _gather_schedule(
    trace: plans.Trace,
    source: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out: Tensor,
    source_branch_stride: int,
    launched_dilations: tuple[int, ...],
    out_branch_stride: int,
) -> None:
    branches, kernel_size, _, channels = filters.shape
    batch, _, height, width = out.shape
    channels_last = is_channels_last(out)
    plan = gather_plan(batch, channels, height, width, kernel_size, out.dtype, channels_last)
    blocks = triton.cdiv(channels, plan.block_c)
    bands = triton.cdiv(height * width, plan.block_p * plan.tiles)
    wide = needs_wide_offsets(source, source_branch_stride, out, out_branch_stride, branches, max(height, width))
    trace.launch(
        dwconv_fwd_kernel,
        batch * blocks * bands,
        num_warps=plan.num_warps,
        x_ptr=source,
        w_ptr=filters,
        bias_ptr=filters if bias is None else bias,
        y_ptr=out,
        **dilation_arguments(launched_dilations),
        channels=channels,
        height=height,
        width=width,
        bands=bands,
        tiles=plan.tiles,
        stride_w_tap=filters.stride(2),
        stride_w_c=filters.stride(3),
        stride_w_tile=0,
        stride_x_b=source.stride(0),
        stride_x_r=source_branch_stride,
        stride_x_c=source.stride(1),
        stride_x_h=source.stride(2),
        stride_x_w=source.stride(3),
        stride_y_b=out.stride(0),
        stride_y_r=out_branch_stride,
        stride_y_c=out.stride(1),
        stride_y_h=out.stride(2),
        stride_y_w=out.stride(3),
        R=branches,
        K=kernel_size,
        SUM=out_branch_stride == 0,
        SHARED=source_branch_stride == 0,
        HAS_BIAS=bias is not None,
        CHANNELS_FASTEST=channels_last,
        FULL_C=channels % plan.block_c == 0,
        FLAT=is_flat(plan, source, out),
        ROWWISE=is_rowwise(plan, source, out),
        WIDE=wide,
        BLOCK_P=plan.block_p,
        BLOCK_C=plan.block_c,
    )


def is_flat(plan: Plan, *maps: Tensor) -> bool:
    """Whether the pixels of channels-first maps follow each other without a gap and fill their tiles."""
    return all(
        m.stride(3) == 1 and m.stride(2) == m.shape[3] and m.shape[2] * m.shape[3] % plan.block_p == 0 for m in maps
    )


def is_rowwise(plan: Plan, *maps: Tensor) -> bool:
    """Whether each tile of such maps lies in one row, so that no pixel has to be asked whether its row is inside."""
    return is_flat(plan, *maps) and maps[0].shape[3] % plan.block_p == 0


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
    for size in (64, 128):
        yield _offline_case(torch.float32, "nchw", 3, False, every_target=True, size=size)


def _offline_case(
    dtype: torch.dtype, layout: str, kernel_size: int, joined: bool, *, every_target: bool, size: int = 20
) -> OfflineCase:
    batch, channels = 32, 384
    name = "*fp32" if dtype == torch.float32 else "*bf16"
    channels_last = layout == "channels_last"
    plan = gather_plan(batch, channels, size, size, kernel_size, dtype, channels_last)
    branches = 4
    constants: dict[str, object] = {
        "R": branches,
        "K": kernel_size,
        "SUM": joined,
        "SHARED": not joined,
        "HAS_BIAS": not joined,
        "CHANNELS_FASTEST": channels_last,
        "FULL_C": True,
        "FLAT": not channels_last and size * size % plan.block_p == 0,
        "ROWWISE": not channels_last and size % plan.block_p == 0,
        "WIDE": False,
        "BLOCK_P": plan.block_p,
        "BLOCK_C": plan.block_c,
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
        {"x_ptr": name, "w_ptr": "*fp32", "bias_ptr": name, "y_ptr": name},
        constants,
        num_warps=plan.num_warps,
        every_target=every_target,
    )
