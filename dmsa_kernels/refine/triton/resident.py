# ruff: noqa: RUF005 (Triton concatenates tuples, it does not unpack them)
"""All iterations of small maps in one launch, for those who set ``DMSA_RESIDENT=1``: it has not run on a GPU yet.

A program owns a tile of pixels for the whole call: it loads their weights once and keeps them in registers, and the
planes go back and forth between two buffers. After an iteration the programs that share planes wait for each other:
the *team* of one *job*, an image's share of the channel groups, with a program for each tile.

Waiting is sound only among programs that run at the same time. A launch has at most one for each multiprocessor, where
one always fits, and is cooperative: the driver runs all programs at once or refuses with an error. A program that
waits in vain all the same, because of a mistake in here, gives up and stops the kernel with an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmsa_kernels import compat, plans, tuning
from dmsa_kernels.backend import wants_resident
from dmsa_kernels.refine.triton.common import (
    LAUNCH,
    OFFLINE_DILATIONS,
    add_taps,
    beside_taps,
    clamped,
    needs_int64,
    step_offsets,
    taps_each,
    tile_rows,
)

# Weights a thread can hold in registers.
MAX_NEIGHBOURS = 64
# How often a program asks whether the others have arrived before it gives up. Asking takes a trip to L2, over half a
# microsecond: about ten seconds, and longer where others use the GPU or a tool watches every instruction.
PATIENCE = 1 << 24
# How often a program asks in vain when a test wants it to be late. A constant of the kernel, which has no code for 0.
LATENESS = 0
# Counters that a program clears.
BLOCK_JOBS = 256
# Of a multiprocessor, from compute capability 7 on.
_REGISTERS = 65536
_INT32_MAX = 2**31 - 1


@triton.jit(do_not_specialize=["jobs"])
def propagate_clear_kernel(
    arrivals_ptr,  # [jobs] int32
    jobs,
    BLOCK: tl.constexpr,
):
    """Set the counters to 0."""
    o_job = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(arrivals_ptr + o_job, 0, mask=o_job < jobs)


COMPILED = tl.constexpr(isinstance(propagate_clear_kernel, triton.JITFunction))
"""Whether kernels are compiled, not interpreted."""


@triton.jit
def count_arrivals(p_arrivals):
    """Read a counter where all multiprocessors see the same; that orders nothing else."""
    return tl.atomic_add(p_arrivals, 0, sem="relaxed", scope="gpu")


@triton.jit
def dawdle(p_arrivals, turn, LATENESS: tl.constexpr):
    """Be late if it is this program's turn: every fifth's, each time other ones."""
    if LATENESS > 0:
        is_late = ((tl.program_id(0) + 1) * 40503 + turn * 30011) // 16 % 5 == 0
        asked = tl.where(is_late, 0, LATENESS)
        while asked < LATENESS:
            asked += 1 + tl.minimum(count_arrivals(p_arrivals), 0)


@triton.jit
def meet(p_arrivals, expected, patience, LATENESS: tl.constexpr):
    """Wait until ``expected`` arrivals are counted, this program's among them; then all that they wrote can be read.

    The program's threads have stored when the first block barrier lets one of them count: an addition that *releases*
    what it has seen. It then asks without ordering, which leaves the first-level cache alone for whoever still works,
    and once, in the end, *acquires*: the planes' old lines are gone from that cache, and the second block barrier
    hands the order on to the other threads.
    """
    dawdle(p_arrivals, expected, LATENESS)
    tl.debug_barrier()
    tl.atomic_add(p_arrivals, 1, sem="release", scope="gpu")
    seen = count_arrivals(p_arrivals)
    asked = 1
    while (seen < expected) & (asked < patience):
        seen = count_arrivals(p_arrivals)
        asked += 1
    seen = tl.atomic_add(p_arrivals, 0, sem="acquire", scope="gpu")
    if seen < expected:
        if COMPILED:
            tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [seen], dtype=tl.int32, is_pure=False, pack=1)
        else:
            # the interpreter comes here at run time, the compiler never does
            tl.static_assert(False, "a program waited in vain for the others of its team")
    tl.debug_barrier()
    dawdle(p_arrivals, expected + 1, LATENESS)


@triton.jit(
    do_not_specialize=[
        "channels",
        "groups",
        "groups_each",
        "splits",
        "first_job",
        "times",
        "slots",
        "slot_pixels",
        "height",
        "width",
        "tiles_w",
        "tiles",
        "row_stride",
        "stride_weights_n",
        "patience",
    ]
)
def propagate_resident_kernel(
    planes_ptr,  # [n, groups, H, W, BLOCK_C]: the first planes
    ring_ptr,  # [slots, n, groups, H, W, BLOCK_C]: iteration t < T - 1 writes slice t % slots
    out_ptr,  # like planes_ptr, and their memory unless HAS_ANCHOR, if need be: what the last iteration writes
    weights_ptr,  # [n, P, H, W]
    valid_ptr,  # [n, C] uint8, 0 or 1
    anchor_ptr,  # [n, H, W] fp32, HAS_ANCHOR only: the share of the first planes that is kept
    arrivals_ptr,  # [jobs] int32, 0 before the launch
    channels,
    groups,
    groups_each,
    splits,
    first_job,
    times,
    slots,
    slot_pixels,  # from one slice of the ring to the next, in pixels of BLOCK_C channels
    height,
    width,
    tiles_w,
    tiles,
    row_stride,  # as of propagate_fwd_kernel
    stride_weights_n,
    stride_valid_n,
    stride_valid_c,
    patience,
    DILATIONS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    TAPS: tl.constexpr,  # as of propagate_fwd_kernel
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LATENESS: tl.constexpr,
):
    """``times`` iterations of ``propagate_fwd_kernel``; programs are (job, tile), jobs are (image, share of groups).

    Two slices of the ring suffice: who writes one has met everyone who read it.
    """
    PIXELS: tl.constexpr = BLOCK_H * BLOCK_W
    i_tile = tl.program_id(0) % tiles
    o_pixel = tl.arange(0, PIXELS)
    o_y = tile_rows(i_tile // tiles_w, tiles // tiles_w, row_stride, BLOCK_H, o_pixel // BLOCK_W)
    o_x = (i_tile % tiles_w) * BLOCK_W + o_pixel % BLOCK_W
    m_pixel = (o_y < height) & (o_x < width)
    o_lane = tl.arange(0, BLOCK_C)
    plane = height * width

    i_job = first_job + tl.program_id(0) // tiles
    i_n = i_job // splits
    first_group = (i_job % splits) * groups_each
    p_weights = weights_ptr + i_n * stride_weights_n
    r_y = beside_taps(o_y, TAPS)
    r_x = beside_taps(o_x, TAPS)
    held = ()
    for i in tl.static_range(8 * len(DILATIONS) // TAPS):
        o_p = i * TAPS + tl.arange(0, TAPS)[:, None] if TAPS == 8 else i
        p_step = p_weights + o_p * plane + (r_y * width + r_x)
        # [8, PIXELS] or [PIXELS]
        held = held + (tl.load(p_step, mask=beside_taps(m_pixel, TAPS), other=0.0).to(tl.float32),)
    if HAS_ANCHOR:
        # [PIXELS]
        anchor = tl.load(anchor_ptr + i_n * plane + o_y * width + o_x, mask=m_pixel, other=0.0)
    source = planes_ptr
    t = 0
    while t < times:
        target = ring_ptr + (t % slots) * slot_pixels * BLOCK_C
        if t + 1 == times:
            target = out_ptr
        i_group = first_group
        while i_group < tl.minimum(first_group + groups_each, groups):
            o_c = i_group * BLOCK_C + o_lane
            m_c = o_c < channels
            if HAS_VALID:
                # [BLOCK_C]
                m_c = m_c & (tl.load(valid_ptr + i_n * stride_valid_n + o_c * stride_valid_c, mask=m_c, other=0) != 0)
            some = tl.max(m_c.to(tl.int32), axis=0) if HAS_VALID else 1
            o_plane = (i_n * groups + i_group) * plane
            acc = tl.zeros([PIXELS, BLOCK_C], dtype=tl.float32)
            if some > 0:
                for i in tl.static_range(8 * len(DILATIONS) // TAPS):
                    # clamped, so inside the plane even for pixels outside the map: no mask needed
                    dy, dx = step_offsets(i, DILATIONS, TAPS)
                    q_y, q_x = clamped(r_y, r_x, dy, dx, height, width)
                    # the row in the pointer: the compiler would compute one offset a tap before the loops and keep all
                    p_rows = source + tl.expand_dims((o_plane + q_y * width) * BLOCK_C, -1) + o_lane
                    # [8, PIXELS, BLOCK_C] or [PIXELS, BLOCK_C]
                    taps = tl.load(p_rows + tl.expand_dims(q_x * BLOCK_C, -1))
                    acc = add_taps(acc, held[i], taps.to(tl.float32), TAPS)
            o_out = (o_plane + o_y * width + o_x) * BLOCK_C
            m_out = (o_y < height * some) & (o_x < width)
            if HAS_ANCHOR:
                # [PIXELS, BLOCK_C]
                first = tl.load(planes_ptr + o_out[:, None] + o_lane[None, :], mask=m_out[:, None], other=0.0)
                acc = (1 - anchor)[:, None] * acc + anchor[:, None] * first.to(tl.float32)
            if HAS_VALID:
                # a weight that is NaN must not turn the zeros of a channel that is not valid into NaN
                acc = tl.where(m_c[None, :], acc, 0.0)
            # [PIXELS, BLOCK_C]; groups without a valid channel are never read, so they are not written either
            p_out = target + o_out[:, None] + o_lane[None, :]
            tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_out[:, None])
            i_group += 1
        source = target
        t += 1
        if t < times:
            meet(arrivals_ptr + i_job, t * tiles, patience, LATENESS)


def choose(
    device: torch.device,
    shape: Sequence[int],
    weights: Tensor,
    dilations: tuple[int, ...],
    num_iter: int,
    has_valid: bool = False,
) -> tuning.Resident | str:
    """Return how to launch all iterations together, or why not.

    Args:
        device: where they will run.
        shape: of the planes, ``[n, groups, H, W, width]``.
        weights: ``[n, P, H, W]``.
        dilations: D dilations.
        num_iter: T.
        has_valid: whether there are flags.
    """
    count, groups, height, columns, width = shape
    programs = compat.cooperative_programs(device)
    if programs == 0:
        return "programs cannot wait for each other: that takes an NVIDIA GPU and Triton 3.4"
    if num_iter < 2:
        return "there are no two iterations"
    if 8 * len(dilations) > MAX_NEIGHBOURS:
        return f"the weights of {8 * len(dilations)} neighbours do not fit into a thread's registers"
    if math.prod(shape) * num_iter > _INT32_MAX or needs_int64(weights):
        return "offsets leave 32 bits"
    # read off the compiler: flags beside so many weights spill with 16 warps on compute capability 10
    crowded = has_valid and len(dilations) > 4 and (compat.compute_capability(device) or (0,))[0] == 10
    most_warps = 8 if crowded else 32
    return tuning.plan_resident(programs, dilations, width, count, groups, height, columns, num_iter, most_warps)


def options(config: tuning.Config) -> dict[str, object]:
    """Return what a launch is told besides its warps: it is cooperative, and a program has a multiprocessor to itself.

    The compiler would else spare registers, and spill some, so that more programs fit.
    """
    return {"launch_cooperative_grid": True, "maxnreg": min(255, _REGISTERS // (32 * config.num_warps))}


def launch(
    trace: plans.Trace,
    whole: tuning.Resident,
    planes: Tensor,
    ring: Tensor,
    out: Tensor,
    weights: Tensor,
    dilations: tuple[int, ...],
    num_iter: int,
    channels: int,
    valid: Tensor | None,
    anchor: Tensor | None = None,
) -> None:
    """Launch ``num_iter`` iterations from ``planes`` into ``out``, both ``[n, groups, H, W, width]``.

    Args:
        trace: of the schedule.
        whole: of :func:`choose`.
        planes: the first planes.
        ring: ``[slots, n, groups, H, W, width]``; iteration t, counted from 0, writes slice t modulo slots, but for the
            last. At least two slots, or one where there are two iterations.
        out: what the last iteration writes; without an anchor this may be the first planes.
        weights: ``[n, P, H, W]``.
        dilations: D dilations.
        num_iter: T, at least 2.
        channels: C.
        valid: ``[n, C]`` uint8, or None.
        anchor: the share ``[n, 1, H, W]`` of the first planes that is kept, or None.
    """
    count, groups, rows, columns, width = planes.shape
    config = whole.config
    splits = triton.cdiv(groups, whole.groups_each)
    tiles_w = triton.cdiv(columns, config.block_w)
    tiles = tiles_w * triton.cdiv(rows, config.block_h)
    jobs = count * splits
    arrivals = trace.empty((jobs,), torch.int32)
    trace.launch(
        propagate_clear_kernel,
        triton.cdiv(jobs, BLOCK_JOBS),
        num_warps=4,
        arrivals_ptr=arrivals,
        jobs=jobs,
        BLOCK=BLOCK_JOBS,
    )
    for first_job in range(0, jobs, whole.teams):
        trace.launch(
            propagate_resident_kernel,
            min(whole.teams, jobs - first_job) * tiles,
            num_warps=config.num_warps,
            options=LAUNCH | options(config),
            planes_ptr=planes,
            ring_ptr=ring,
            out_ptr=out,
            weights_ptr=weights,
            valid_ptr=weights if valid is None else valid,
            anchor_ptr=weights if anchor is None else anchor,
            arrivals_ptr=arrivals,
            channels=channels,
            groups=groups,
            groups_each=whole.groups_each,
            splits=splits,
            first_job=first_job,
            times=num_iter,
            slots=ring.shape[0],
            slot_pixels=ring.stride(0) // width,
            height=rows,
            width=columns,
            tiles_w=tiles_w,
            tiles=tiles,
            row_stride=whole.row_stride,
            stride_weights_n=weights.stride(0),
            stride_valid_n=0 if valid is None else valid.stride(0),
            stride_valid_c=0 if valid is None else valid.stride(1),
            patience=PATIENCE,
            DILATIONS=dilations,
            HAS_VALID=valid is not None,
            HAS_ANCHOR=anchor is not None,
            TAPS=taps_each(),
            BLOCK_C=width,
            BLOCK_H=config.block_h,
            BLOCK_W=config.block_w,
            LATENESS=LATENESS,
        )


def run(schedule: Callable[..., None], tensors: Sequence[Tensor | None], *options: Hashable) -> None:
    """Run a schedule whose last option says whether it may launch all iterations together.

    Raises:
        RuntimeError: the driver refuses a cooperative launch; the message names the switch.
    """
    on = wants_resident()
    try:
        plans.run(schedule, tensors, *options, on)
    except RuntimeError as error:
        if on and "cooperative" in str(error):
            raise RuntimeError(
                f"the driver refuses to run a small map's programs all at once ({error}), for instance because this"
                " process has a share of the GPU alone; without DMSA_RESIDENT=1 every iteration is a launch"
            ) from error
        raise


def offline_cases() -> Iterator[tuning.OfflineCase]:
    """List the launches for compilation without a device: the longest lists of dilations for each tile."""

    def case(label: str, dilations: tuple[int, ...], config: tuning.Config, width: int, **constants: object):
        planes, weights = ("*fp16", "*fp16") if width == 8 or "narrow" in label else ("*fp32", "*fp32")
        return tuning.OfflineCase(
            f"propagate_resident {label} {dilations} {config}",
            propagate_resident_kernel,
            {
                "planes_ptr": planes,
                "ring_ptr": planes,
                "out_ptr": planes,
                "weights_ptr": weights,
                "valid_ptr": "*u8",
                "anchor_ptr": "*fp32",
                "arrivals_ptr": "*i32",
            },
            {
                "DILATIONS": dilations,
                "HAS_VALID": False,
                "HAS_ANCHOR": False,
                "TAPS": taps_each(),
                "BLOCK_C": width,
                "BLOCK_H": config.block_h,
                "BLOCK_W": config.block_w,
                "LATENESS": 0,
            }
            | constants,
            num_warps=config.num_warps,
            but_for=("gfx942", *(("sm_120",) if width == 8 and len(dilations) > 4 else ())),
            options=tuple(options(config).items()),
        )

    yield tuning.OfflineCase("propagate_clear", propagate_clear_kernel, {"arrivals_ptr": "*i32"}, {"BLOCK": BLOCK_JOBS})
    if not compat.triton_has_tuples():
        return
    longest: dict[tuple[tuning.Config, int], tuple[int, ...]] = {}
    for dilations in OFFLINE_DILATIONS:
        for width in (1, 4, 8):
            for config in tuning.configs("propagate_resident", neighbours=8 * len(dilations), width=width):
                longest[config, width] = dilations
    for (config, width), dilations in longest.items():
        yield case({1: "one channel", 4: "exact", 8: "fast"}[width], dilations, config, width)
        if width == 4:
            yield case("exact, valid, anchored", dilations, config, width, HAS_VALID=True, HAS_ANCHOR=True)
            yield case("narrow", dilations, config, width)
