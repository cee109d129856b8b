"""The gradients: the input's as one summed gather, the weights' and biases' as float32 partial sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import plans
from dmsa_kernels.aspp.launch import Plan, weight_plan
from dmsa_kernels.aspp.layout import empty_map, in_layout_of, is_channels_last
from dmsa_kernels.aspp.triton.forward import (
    _dilation,
    _inside,
    _load,
    _shift,
    _tile_of_map,
    _tile_pixels,
    dilation_arguments,
    from_branch,
    is_flat,
    is_rowwise,
    launch_dilations,
    launch_gather,
    launches_of,
    needs_wide_offsets,
    tap_major,
)
from dmsa_kernels.tuning import OfflineCase


@triton.jit
def _added(n: tl.constexpr, product, s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7, s_8):
    """Return the running sums with ``product`` added to the n-th; Triton's tuples of tensors are younger than 3.0."""
    return (
        s_0 + product if n == 0 else s_0,
        s_1 + product if n == 1 else s_1,
        s_2 + product if n == 2 else s_2,
        s_3 + product if n == 3 else s_3,
        s_4 + product if n == 4 else s_4,
        s_5 + product if n == 5 else s_5,
        s_6 + product if n == 6 else s_6,
        s_7 + product if n == 7 else s_7,
        s_8 + product if n == 8 else s_8,
    )


@triton.jit(do_not_specialize=["batch", "tiles_each"])
def dwconv_bwd_w_kernel(
    grad_ptr,
    x_ptr,
    grad_w_ptr,  # [S, R, k, k, C] float32
    grad_bias_ptr,  # [S, R, C] float32
    d_0,  # of launch_dilations
    d_1,
    d_2,
    d_3,
    d_4,
    d_5,
    d_6,
    d_7,
    batch,
    channels,
    height,
    width,
    tiles_each,  # of a program
    stride_grad_b,
    stride_grad_r,
    stride_grad_c,
    stride_grad_h,
    stride_grad_w,
    stride_x_b,
    stride_x_c,
    stride_x_h,
    stride_x_w,
    R: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    FULL_C: tl.constexpr,  # channels are a multiple of BLOCK_C
    FLAT: tl.constexpr,  # of is_flat
    ROWWISE: tl.constexpr,  # of is_rowwise
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_w_r,ij = sum_b,q grad_r(q) x(q + d_r (i - k // 2, j - k // 2)) over one split's tiles; grad_bias likewise.

    One program owns ROWS rows of one branch's filters for a block of channels, and one running sum a tap in registers.
    """
    pid = tl.program_id(0)
    groups: tl.constexpr = K // ROWS
    blocks = tl.cdiv(channels, BLOCK_C)
    # Programs of all branches and filter rows follow each other: they read the same x while it is in cache.
    i_group = pid % groups
    i_r = (pid // groups) % R
    i_c = (pid // (groups * R)) % blocks
    split = pid // (groups * R * blocks)
    dilation = _dilation(i_r, R, d_0, d_1, d_2, d_3, d_4, d_5, d_6, d_7)
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK_P)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    grad_ptr += i_r.to(tl.int64) * stride_grad_r
    bias_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    # Up to 9 sums, whose names a loop over the taps cannot form; the compiler drops those that stay 0.
    s_0 = bias_sum
    s_1 = bias_sum
    s_2 = bias_sum
    s_3 = bias_sum
    s_4 = bias_sum
    s_5 = bias_sum
    s_6 = bias_sum
    s_7 = bias_sum
    s_8 = bias_sum
    i_b = (split * tiles_each) // tiles
    tile = split * tiles_each - i_b * tiles
    t = 0
    while t < tiles_each:
        if i_b < batch:
            row, col, m_p = _tile_pixels(tile, width, pixels, BLOCK_P, FLAT, ROWWISE)
            first_row = row if ROWWISE else (tile * BLOCK_P) // width
            last_row = row if ROWWISE else tl.minimum(tile * BLOCK_P + BLOCK_P - 1, pixels - 1) // width
            p_x = x_ptr + i_b.to(tl.int64) * stride_x_b
            p_x, o_x = _tile_of_map(
                p_x, tile, row, col, i_c, stride_x_h, stride_x_w, stride_x_c, BLOCK_P, BLOCK_C, FLAT, WIDE
            )
            p_g = grad_ptr + i_b.to(tl.int64) * stride_grad_b
            p_g, o_g = _tile_of_map(
                p_g, tile, row, col, i_c, stride_grad_h, stride_grad_w, stride_grad_c, BLOCK_P, BLOCK_C, FLAT, WIDE
            )
            # [P, C]: 0 for pixels beyond the map, which take the last pixel's x
            b_g = _load(p_g + o_g, m_p, m_c, not FLAT, FULL_C).to(tl.float32)
            if NEED_BIAS:
                bias_sum += b_g
            if NEED_WEIGHT:
                for i in tl.static_range(ROWS):
                    dy = (i_group * ROWS + i - K // 2) * dilation
                    if ROWS == 1:  # which side of the centre is not known at compile time
                        some = (last_row + dy >= 0) & (first_row + dy < height)
                        m_row = (row + dy >= 0) & (row + dy < height)
                    else:
                        some = i == 1 or _inside(last_row if i == 0 else first_row, height, dy, i - 1)
                        m_row = _inside(row, height, dy, i - 1)
                    if some:
                        for j in tl.static_range(K):
                            dx = (j - K // 2) * dilation
                            m_x = m_row
                            if j != K // 2:
                                m_x = _inside(col, width, dx, j - K // 2)
                                if not ROWWISE and (ROWS == 1 or i != 1):
                                    m_x = m_x & m_row
                            p_shifted = p_x + _shift(dy, dx, stride_x_h, stride_x_w, WIDE) + o_x
                            # [P, C]
                            b_x = _load(
                                p_shifted, m_x, m_c, j != K // 2 or (not ROWWISE and (ROWS == 1 or i != 1)), FULL_C
                            )
                            s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7, s_8 = _added(
                                i * K + j, b_g * b_x.to(tl.float32), s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7, s_8
                            )
        tile += 1
        i_b += (tile == tiles).to(tl.int32)
        tile = tl.where(tile == tiles, 0, tile)
        t += 1
    if NEED_WEIGHT:
        p_w = grad_w_ptr + ((split * R + i_r).to(tl.int64) * K * K + i_group * ROWS * K) * channels
        for n in tl.static_range(ROWS * K):
            taps = (s_0, s_1, s_2, s_3, s_4, s_5, s_6, s_7, s_8)[n]
            tl.store(p_w + n * channels + o_c, tl.sum(taps, axis=0), mask=m_c)
    if NEED_BIAS and i_group == 0:
        p_bias = grad_bias_ptr + (split * R + i_r).to(tl.int64) * channels
        # Few values may cancel; in double precision only the running sums round.
        tl.store(p_bias + o_c, tl.sum(bias_sum.to(tl.float64), axis=0).to(tl.float32), mask=m_c)


def multi_dilation_dwconv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    reduce: str,
    *,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x ``[B, C, H, W]``, weight ``[R, C, k, k]`` and bias ``[R, C]``, ``[0]`` if unneeded."""
    channels = weight.shape[1]
    grad = in_layout_of(grad, x)
    branch_stride = 0 if reduce == "sum" else channels * grad.stride(1)
    grad_x, grad_weight, grad_bias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_x:
        grad_x = empty_map(x, channels)
        launch_gather(
            grad[:, :channels],
            branch_stride,
            tap_major(weight.flip(2, 3), is_channels_last(grad_x)),
            None,
            dilations,
            grad_x,
            0,
        )
    if need_weight or need_bias:
        parts = [
            _parameter_gradients(
                from_branch(part.start, grad, branch_stride, channels),
                branch_stride,
                x,
                weight[part],
                dilations[part],
                need_weight=need_weight,
                need_bias=need_bias,
            )
            for part in launches_of(len(weight))
        ]
        grad_weight, grad_bias = map(torch.cat, zip(*parts)) if len(parts) > 1 else parts[0]
    return grad_x, grad_weight, grad_bias


def _parameter_gradients(
    grad: Tensor,
    branch_stride: int,
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    *,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    branches, channels, kernel_size, _ = weight.shape
    batch, _, height, width = x.shape
    if batch == 0:
        return (
            weight.new_zeros(weight.shape if need_weight else 0),
            weight.new_zeros((branches, channels) if need_bias else 0),
        )
    plan = weight_plan(batch, channels, height, width, branches, kernel_size, x.dtype, is_channels_last(x))
    splits = triton.cdiv(batch * triton.cdiv(height * width, plan.block_p), plan.tiles)
    partial_w = x.new_empty(
        (splits, branches, kernel_size, kernel_size, channels) if need_weight else 0, dtype=torch.float32
    )
    partial_bias = x.new_empty((splits, branches, channels) if need_bias else 0, dtype=torch.float32)
    launched = launch_dilations(dilations, max(height, width))
    tensors = (grad, x, partial_w if need_weight else None, partial_bias if need_bias else None)
    plans.run(_weight_schedule, tensors, plan, branch_stride, launched, kernel_size)
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if need_weight:
        grad_weight = partial_w.sum(0, dtype=torch.float64).permute(0, 3, 1, 2).to(weight.dtype).contiguous()
    if need_bias:
        grad_bias = partial_bias.sum(0, dtype=torch.float64).to(weight.dtype)
    return grad_weight, grad_bias


def _weight_schedule(
    trace: plans.Trace,
    grad: Tensor,
    x: Tensor,
    partial_w: Tensor | None,
    partial_bias: Tensor | None,
    plan: Plan,
    branch_stride: int,
    launched_dilations: tuple[int, ...],
    kernel_size: int,
) -> None:
    batch, channels, height, width = x.shape
    branches = len(launched_dilations)
    rows = _rows_of_a_program(kernel_size, partial_w is not None)
    splits = triton.cdiv(batch * triton.cdiv(height * width, plan.block_p), plan.tiles)
    blocks = triton.cdiv(channels, plan.block_c)
    trace.launch(
        dwconv_bwd_w_kernel,
        splits * blocks * branches * (kernel_size // rows),
        num_warps=plan.num_warps,
        grad_ptr=grad,
        x_ptr=x,
        grad_w_ptr=grad if partial_w is None else partial_w,
        grad_bias_ptr=grad if partial_bias is None else partial_bias,
        **dilation_arguments(launched_dilations),
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        tiles_each=plan.tiles,
        stride_grad_b=grad.stride(0),
        stride_grad_r=branch_stride,
        stride_grad_c=grad.stride(1),
        stride_grad_h=grad.stride(2),
        stride_grad_w=grad.stride(3),
        stride_x_b=x.stride(0),
        stride_x_c=x.stride(1),
        stride_x_h=x.stride(2),
        stride_x_w=x.stride(3),
        R=branches,
        K=kernel_size,
        ROWS=rows,
        NEED_WEIGHT=partial_w is not None,
        NEED_BIAS=partial_bias is not None,
        FULL_C=channels % plan.block_c == 0,
        FLAT=is_flat(plan, x, grad),
        ROWWISE=is_rowwise(plan, x, grad),
        WIDE=needs_wide_offsets(x, 0, grad, branch_stride, branches, max(height, width)),
        BLOCK_P=plan.block_p,
        BLOCK_C=plan.block_c,
    )


def _rows_of_a_program(kernel_size: int, need_weight: bool) -> int:
    """Return the filter rows whose sums one program holds: all of a small filter, else one, to fit its registers."""
    return kernel_size if kernel_size == 3 or not need_weight else 1


def offline_cases() -> Iterator[OfflineCase]:
    """List the launches for compilation without a device: the training maps of the method."""
    batch, channels, branches = 32, 384, 4
    types = (torch.float32, "*fp32"), (torch.bfloat16, "*bf16")
    shapes = (False, 3, 20), (False, 7, 20), (True, 3, 20), (True, 7, 20), (False, 3, 64), (False, 3, 128)
    for (dtype, name), (channels_last, kernel_size, size) in itertools.product(types, shapes):
        plan = weight_plan(batch, channels, size, size, branches, kernel_size, dtype, channels_last)
        constants: dict[str, object] = {
            "R": branches,
            "K": kernel_size,
            "ROWS": _rows_of_a_program(kernel_size, True),
            "NEED_WEIGHT": True,
            "NEED_BIAS": True,
            "FULL_C": True,
            "FLAT": not channels_last and size * size % plan.block_p == 0,
            "ROWWISE": not channels_last and size % plan.block_p == 0,
            "WIDE": False,
            "BLOCK_P": plan.block_p,
            "BLOCK_C": plan.block_c,
        }
        for side, width in (("x", channels), ("grad", branches * channels)):
            if channels_last:
                constants |= {f"stride_{side}_c": 1, f"stride_{side}_w": width, "channels": channels}
                constants |= {f"stride_{side}_h": width * size, f"stride_{side}_b": width * size * size}
            else:
                constants |= {f"stride_{side}_w": 1}
        yield OfflineCase(
            f"dwconv_bwd_w {name[1:]} {'channels_last' if channels_last else 'nchw'} k={kernel_size} {size}x{size}"
            f" {plan}",
            dwconv_bwd_w_kernel,
            {
                "grad_ptr": name,
                "x_ptr": name,
                "grad_w_ptr": "*fp32",
                "grad_bias_ptr": "*fp32",
            },
            constants,
            num_warps=plan.num_warps,
            every_target=kernel_size == 3 and channels_last == (dtype == torch.bfloat16),
        )
