"""Wrong ways for the programs of a team to meet, which the tests of `resident` must find."""

import triton
import triton.language as tl

from dmsa_kernels.refine.triton.resident import meet as meet_all


@triton.jit
def not_at_all(p_arrivals, expected, patience, LATENESS: tl.constexpr):
    """Go on."""
    tl.debug_barrier()


@triton.jit
def without_waiting(p_arrivals, expected, patience, LATENESS: tl.constexpr):
    """Count and go on."""
    tl.debug_barrier()
    tl.atomic_add(p_arrivals, 1, sem="release", scope="gpu")


@triton.jit
def for_all_but_one(p_arrivals, expected, patience, LATENESS: tl.constexpr):
    """Go on when the last one is missing."""
    meet_all(p_arrivals, expected - 1, patience, LATENESS)
