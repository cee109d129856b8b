"""The fused form: depthwise tiles that are projected from registers, never written to device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import plans
from dmsa_kernels.aspp.launch import project_plan
from dmsa_kernels.aspp.layout import empty_map, is_channels_last
from dmsa_kernels.aspp.triton.forward import (
    _add_taps,
    _dilation,
    _load_channels,
    _map_offsets,
    _shift,
    _tile_pixels,
    dilation_arguments,
    launch_dilations,
    launches_of,
    needs_wide_offsets,
    tap_major,
)
from dmsa_kernels.tuning import OfflineCase


@triton.jit
def dwconv_project_fwd_kernel(
    x_ptr,
    w_ptr,  # [R, k, k, C] float32
    bias_ptr,  # [R, C]
    projection_ptr,  # [R, C, O]
    offset_ptr,  # [B, O]
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
    out_channels,
    height,
    width,
    bands,
    stride_x_b,
    stride_x_c,
    stride_x_h,
    stride_x_w,
    stride_y_b,
    stride_y_c,
    stride_y_h,
    stride_y_w,
    R: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    FULL_C: tl.constexpr,  # channels are a multiple of BLOCK_C
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCKS_C: tl.constexpr,  # Triton 3.6's interpreter wants a plain number as the bound of a loop
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y_o(q) = offset_o + sum_r,c projection_r,c,o (bias_r,c + sum_ij w_r,c,ij x_c(q + d_r (i - k // 2, j - k // 2))).

    One program owns a tile of pixels and a block of output channels. Channels in the outer loop: the branches of one
    block of channels meet the same x, while it is in cache.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(out_channels, BLOCK_O)
    # Programs of all output blocks of a tile follow each other: they read the same x.
    i_o = pid % blocks
    tile = (pid // blocks) % bands
    i_b = pid // (blocks * bands)
    pixels = height * width
    first_row = (tile * BLOCK_P) // width
    last_row = tl.minimum(tile * BLOCK_P + BLOCK_P - 1, pixels - 1) // width
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < out_channels
    x_ptr += i_b.to(tl.int64) * stride_x_b
    y_ptr += i_b.to(tl.int64) * stride_y_b
    row, col, m_p = _tile_pixels(tile, width, pixels, BLOCK_P, False, False)
    acc = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    # One stage: more would buffer every branch's projection block in shared memory.
    for c in tl.range(0, BLOCKS_C * BLOCK_C, BLOCK_C, num_stages=1):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        o_x = _map_offsets(row, col, o_c, stride_x_h, stride_x_w, stride_x_c, WIDE)
        # A loop, not unrolled: the branches differ in numbers alone.
        for r in tl.range(0, R, num_stages=1):
            branch = _add_taps(
                tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32),
                x_ptr,
                w_ptr + r * K * K * channels,
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
                channels,
                1,
                K,
                False,
                True,
                FULL_C,
                WIDE,
            )
            if HAS_BIAS:
                branch += _load_channels(bias_ptr + r * channels + o_c, m_c, FULL_C)[None, :]
            p_projection = projection_ptr + _shift(r * channels + o_c, 0, out_channels, 0, WIDE)[:, None] + o_o[None, :]
            # [C, O]
            b_projection = tl.load(p_projection, mask=m_c[:, None] & m_o[None, :], other=0.0)
            # Rounded as the unfused form rounds what it writes. TF32 would round float32 to 11 bits.
            b_branch = branch.to(x_ptr.dtype.element_ty)
            if WIDEN:
                b_branch, b_projection = b_branch.to(tl.float32), b_projection.to(tl.float32)
            acc = tl.dot(b_branch, b_projection, acc, input_precision="ieee")
    if HAS_OFFSET:
        b_offset = tl.load(offset_ptr + i_b.to(tl.int64) * out_channels + o_o, mask=m_o, other=0.0)
        acc += b_offset.to(tl.float32)[None, :]
    o_y = _map_offsets(row, col, o_o, stride_y_h, stride_y_w, stride_y_c, WIDE)
    tl.store(y_ptr + o_y, acc.to(y_ptr.dtype.element_ty), mask=m_p[:, None] & m_o[None, :])


def fused_dwconv_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    offset: Tensor | None,
    dilations: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``[B, O, H, W]`` from ``x [B, C, H, W]``, in one launch for up to eight branches.

    The result is of ``dtype``, by default that of ``x``.
    """
    parts = launches_of(len(dilations))
    if len(parts) > 1:
        blocks = projection.unflatten(1, (len(dilations), -1))  # [O, R, C]
        total = torch.stack(
            [
                fused_dwconv_project(
                    x,
                    weight[part],
                    None if bias is None else bias[part],
                    blocks[:, part].flatten(1),
                    None if part.start else offset,
                    dilations[part],
                    torch.float32,
                )
                for part in parts
            ]
        ).sum(0)
        return empty_map(x, projection.shape[0], dtype).copy_(total)
    out = empty_map(x, projection.shape[0], dtype)
    if out.numel() == 0:
        return out
    tensors = (
        x,
        tap_major(weight, True),
        None if bias is None else bias.contiguous(),
        projection.t().contiguous(),
        None if offset is None else offset.contiguous(),
        out,
    )
    plans.run(_project_schedule, tensors, launch_dilations(dilations, max(x.shape[2:])))
    return out


def _project_schedule(
    trace: plans.Trace,
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    offset: Tensor | None,
    out: Tensor,
    launched_dilations: tuple[int, ...],
) -> None:
    branches, kernel_size, _, channels = filters.shape
    batch, out_channels, height, width = out.shape
    plan = project_plan(out_channels, x.dtype, is_channels_last(x))
    bands = triton.cdiv(height * width, plan.block_p)
    wide = needs_wide_offsets(x, 0, out, 0, 1, max(height, width))
    trace.launch(
        dwconv_project_fwd_kernel,
        batch * bands * triton.cdiv(out_channels, plan.block_o),
        num_warps=plan.num_warps,
        x_ptr=x,
        w_ptr=filters,
        bias_ptr=filters if bias is None else bias,
        projection_ptr=projection,
        offset_ptr=filters if offset is None else offset,
        y_ptr=out,
        **dilation_arguments(launched_dilations),
        channels=channels,
        out_channels=out_channels,
        height=height,
        width=width,
        bands=bands,
        stride_x_b=x.stride(0),
        stride_x_c=x.stride(1),
        stride_x_h=x.stride(2),
        stride_x_w=x.stride(3),
        stride_y_b=out.stride(0),
        stride_y_c=out.stride(1),
        stride_y_h=out.stride(2),
        stride_y_w=out.stride(3),
        R=branches,
        K=kernel_size,
        HAS_BIAS=bias is not None,
        HAS_OFFSET=offset is not None,
        FULL_C=channels % plan.block_c == 0,
        WIDE=wide or projection.numel() > torch.iinfo(torch.int32).max,
        # The interpreter would multiply the bit patterns of bfloat16; widened, the products are exact as on a GPU.
        WIDEN=trace.device.type == "cpu" and x.dtype == torch.bfloat16,
        BLOCKS_C=triton.cdiv(channels, plan.block_c),
        BLOCK_P=plan.block_p,
        BLOCK_C=plan.block_c,
        BLOCK_O=plan.block_o,
    )


def offline_cases() -> Iterator[OfflineCase]:
    """List the launches for compilation without a device: the training maps of the method."""
    channels, size, branches = 384, 20, 4
    for dtype, name in ((torch.float32, "*fp32"), (torch.bfloat16, "*bf16")):
        for layout in ("nchw", "channels_last"):
            for kernel_size in (3, 7) if layout == "channels_last" else (3,):
                plan = project_plan(channels, dtype, layout == "channels_last")
                constants: dict[str, object] = {
                    "R": branches,
                    "K": kernel_size,
                    "HAS_BIAS": True,
                    "HAS_OFFSET": True,
                    "FULL_C": True,
                    "WIDE": False,
                    "WIDEN": False,
                    "BLOCKS_C": triton.cdiv(channels, plan.block_c),
                    "BLOCK_P": plan.block_p,
                    "BLOCK_C": plan.block_c,
                    "BLOCK_O": plan.block_o,
                    "channels": channels,
                    "out_channels": channels,
                }
                for side in ("x", "y"):
                    if layout == "channels_last":
                        constants |= {f"stride_{side}_c": 1, f"stride_{side}_w": channels}
                        constants |= {f"stride_{side}_h": channels * size, f"stride_{side}_b": channels * size * size}
                    else:
                        constants |= {f"stride_{side}_w": 1}
                yield OfflineCase(
                    f"dwconv_project_fwd {name[1:]} {layout} k={kernel_size} {plan}",
                    dwconv_project_fwd_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "bias_ptr", "projection_ptr", "offset_ptr", "y_ptr"), name),
                        "w_ptr": "*fp32",
                    },
                    constants,
                    num_warps=plan.num_warps,
                    every_target=kernel_size == 3 and (layout == "channels_last") == (dtype == torch.bfloat16),
                )
