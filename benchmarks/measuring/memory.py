"""The memory that a call takes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch

OUT_OF_MEMORY = tuple({torch.cuda.OutOfMemoryError, getattr(torch, "OutOfMemoryError", MemoryError), MemoryError})


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out (torch's CPU allocator raises a plain RuntimeError)."""
    text = str(error)
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """Return the peak of memory allocated while `call` runs, beyond what was allocated before, and how it was measured.

    On a GPU the caching allocator's own count. On a CPU every allocation and release that torch's allocator reports to
    the profiler, operators' internals included (scratch that oneDNN takes by itself is not seen).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = call()
        torch.cuda.synchronize(device)
        del out
        return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = call()
        del out
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, "torch's CPU allocator"


def release(device: torch.device) -> None:
    """Give unused memory back, so that one candidate's leftovers do not limit the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
