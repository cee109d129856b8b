"""One way to measure: every benchmark of this repository builds `Row`s and hands them to `measure`.

A row is one operator on one workload with all its candidates (ours and the baselines), run in one process. `measure`

1. runs every candidate once on fresh inputs and compares it with a higher-precision reference (the gate): the result
   of a candidate that fails is `wrong`, and no speed-up is given for it, nor for any candidate if ours fails;
2. keeps tuning, and what the first call took beyond a steady one (compilation), apart from the timing;
3. times the candidates interleaved, round by round, each after a call of its own that is not timed (unless calls take
   seconds), over several sets of inputs so that they are read from memory and not from the last-level cache; reports
   the median and the 20th and 80th percentile;
4. measures peak memory, and divides the bytes that the operator must move by the time, as a share of the copy
   bandwidth and of the cache ceiling measured (or stated) for this device.

A candidate that runs out of memory is a result ("out of memory at 80 GB"), not a crash; one whose estimate exceeds the
memory that is free is not started on a CPU, and the row says how many bytes it would have needed.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measuring.gate import finite_error, poisoned, relative_error, tensors
from benchmarks.measuring.machines import Machine, commit, free_host_bytes, machine, seconds_of
from benchmarks.measuring.memory import is_out_of_memory, peak_memory, release
from benchmarks.measuring.results import Result, human_bytes
from benchmarks.measuring.rows import Candidate, Row


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the percentile of `samples`, linear between neighbours (as numpy's default)."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


SLOW_S = 0.5
SECONDS_LONG_S = 2.0
# A sample of one short call would always be the second of its turn: some allocators return memory at every second call.
SAMPLE_S = 2e-2


class _Timer:
    """Times one candidate: `sample()` is the mean seconds of `inner` calls, walking through the input sets."""

    def __init__(self, candidate: Candidate, sets: list[tuple], device: torch.device, estimate_s: float):
        self.run, self.sets, self.device = candidate.run, sets, device
        self.estimate_s = estimate_s
        self.inner = 1
        self.next = 0
        self.samples: list[float] = []

    def warm_up(self) -> None:
        """Run once more and choose the calls of a sample so that clock, launch queue and allocator do not matter.

        Left out for slow calls: two have been made, and a third costs more than it brings.
        """
        if self.estimate_s < SLOW_S:
            seconds = min(seconds_of(self._calls, self.device) for _ in range(2))
            self.inner = max(1, min(200, math.ceil(SAMPLE_S / max(seconds, 1e-7))))

    def sample(self) -> None:
        """Time one sample, after a call that is not timed: the allocator is then as this candidate leaves it.

        Without it a call finds, or has to fetch from the system again, the memory that the candidate before it left.
        Left out where a call takes seconds, beside which that is nothing.
        """
        if self.estimate_s < SECONDS_LONG_S:
            self._call()
        self.samples.append(seconds_of(self._calls, self.device) / self.inner)

    def _calls(self) -> None:
        for _ in range(self.inner):
            self._call()

    def _call(self) -> None:
        self.run(*self.sets[self.next % len(self.sets)])
        self.next += 1


def graph_seconds(run: Callable[..., Any], sets: Sequence[tuple], repeats: int = 20) -> float:
    """Return the median seconds of one call inside a CUDA graph that holds one call for every set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(*inputs) for inputs in sets]
    graph.replay()
    torch.cuda.synchronize()
    samples = [seconds_of(graph.replay, torch.device("cuda")) for _ in range(repeats)]
    del kept, graph
    return statistics.median(samples) / len(sets)


def measure(
    row: Row,
    mach: Machine | None = None,
    *,
    seconds: float = 4.0,
    min_rounds: int = 3,
    max_rounds: int = 30,
    memory_bytes: int | None = None,
    deadline: float | None = None,
) -> list[Result]:
    """Measure every candidate of `row`; see the module's text for what is done.

    Args:
        row: what to run.
        mach: the machine; the default device if not given.
        seconds: time for the timed rounds of the whole row; at least `min_rounds` are made whatever they take.
        min_rounds, max_rounds: bounds on the number of samples of a candidate.
        memory_bytes: memory that a candidate may take; by default four fifths of what is free on a CPU, and no limit
            on a GPU (running out of memory is the result there).
        deadline: `time.monotonic()` after which no further candidate is started; it is listed as skipped.
    """
    mach = mach or machine()
    device = mach.device
    results = [_blank(row, candidate, mach) for candidate in row.candidates]
    if memory_bytes is None:
        memory_bytes = 0 if mach.on_gpu else int(0.8 * free_host_bytes())
    budget = f"{human_bytes(memory_bytes)} may be used here"

    try:
        first = row.inputs(device, 0)
        expected = None
        if row.reference is not None:
            expected = row.reference(*first)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        for result in results:
            result.status, result.note = "out of memory", "the inputs or the reference do not fit"
        release(device)
        return results

    timers: dict[int, _Timer] = {}
    input_bytes = sum(tensor.nbytes for tensor in tensors(list(first)))
    sets = [first]
    order = sorted(range(len(results)), key=lambda i: (row.candidates[i].compiled, i))
    for i in order:
        candidate, result = row.candidates[i], results[i]
        if candidate.why_not:
            result.status, result.note = "skipped", candidate.why_not
            continue
        if deadline is not None and time.monotonic() > deadline:
            result.status, result.note = "skipped", "the time budget was used up"
            continue
        if memory_bytes and candidate.peak_bytes > memory_bytes:
            result.status = "skipped"
            result.note = f"needs about {human_bytes(candidate.peak_bytes)}; {budget}"
            continue
        try:
            result.first_call_s = _gate(row, candidate, result, first, expected, device)
            if result.status != "ok":
                continue
            start = time.perf_counter()
            result.peak_bytes, result.peak_how = peak_memory(lambda c=candidate: c.run(*first), device)
            timers[i] = _Timer(candidate, sets, device, time.perf_counter() - start)
        except Exception as error:
            _failed(result, error, mach)
        release(device)
    expected = None
    release(device)

    if timers:
        # Enough sets that one round trip through them passes four times the last-level cache; inputs that hold no
        # tensor have nothing to rotate.
        headroom = (free_host_bytes() if not mach.on_gpu else torch.cuda.mem_get_info(device)[0]) // 4
        copies = 1
        if input_bytes:
            copies = max(1, min(math.ceil(4 * mach.llc_bytes / input_bytes), 32, headroom // input_bytes))
        sets.extend(row.inputs(device, seed) for seed in range(1, copies))
        _rounds(row, results, timers, mach, seconds, min_rounds, max_rounds)
    _finish(row, results, mach)
    return results


def _blank(row: Row, candidate: Candidate, mach: Machine) -> Result:
    return Result(
        family=row.family,
        workload=row.workload,
        variant=row.variant,
        dtype=row.dtype,
        shape=row.shape,
        scaled_from=row.scaled_from,
        candidate=candidate.name,
        ours=candidate.ours,
        note=row.note,
        tolerance=candidate.tolerance if candidate.tolerance is not None else row.tolerance,
        estimate_bytes=candidate.peak_bytes,
        floor_bytes=row.floor_bytes,
        cache_bytes=row.cache_bytes,
        operations=row.operations,
        items=row.items,
        device=mach.device.type,
        hardware=mach.hardware,
        copy_gb_per_s=mach.copy_gb_per_s,
        cache_gb_per_s=mach.cache_gb_per_s,
        cache_how=mach.cache_how,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=mach.versions.get("triton", ""),
        python=mach.versions.get("python", ""),
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _gate(row: Row, candidate: Candidate, result: Result, inputs: tuple, expected: Any, device: torch.device) -> float:
    """Run once and judge the result; return the seconds of that first call."""
    if candidate.tune is not None and device.type == "cuda":
        start = time.perf_counter()
        candidate.tune(*inputs)
        _synchronize(device)
        result.tune_s = time.perf_counter() - start
    guard = contextlib.nullcontext() if candidate.compiled else poisoned()
    start = time.perf_counter()
    with guard:
        out = candidate.run(*inputs)
        _synchronize(device)
    first_call = time.perf_counter() - start
    if expected is None:
        result.error = finite_error(out)
    else:
        result.error = (row.error or relative_error)(out, expected)
    del out
    if not result.error <= result.tolerance:
        result.status = "wrong"
        result.note = f"error {result.error:.2g} is over the bound {result.tolerance:.2g}"
        return math.nan
    return first_call


def _rounds(
    row: Row,
    results: list[Result],
    timers: dict[int, _Timer],
    mach: Machine,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
) -> None:
    """Take the samples, candidate after candidate in every round, so that a disturbance meets all of them."""
    end = time.perf_counter() + seconds
    rounds = 0
    while timers and rounds < max_rounds and (rounds < min_rounds or time.perf_counter() < end):
        for i in list(timers):
            try:
                if rounds == 0:
                    timers[i].warm_up()
                timers[i].sample()
            except Exception as error:
                _failed(results[i], error, mach)
                del timers[i]
                release(mach.device)
        rounds += 1
    primary = next((timers[i].samples for i, result in enumerate(results) if i in timers and result.ours), None)
    for i, timer in timers.items():
        result, samples = results[i], timer.samples
        result.median_ms = 1e3 * percentile(samples, 50)
        result.p20_ms, result.p80_ms = 1e3 * percentile(samples, 20), 1e3 * percentile(samples, 80)
        result.samples = len(samples)
        result.first_call_s = max(0.0, result.first_call_s - percentile(samples, 50))
        if primary:
            result.speedup = percentile([a / b for a, b in zip(samples, primary, strict=True)], 50)
        if row.launch_bound and mach.on_gpu:
            try:
                result.graph_ms = 1e3 * graph_seconds(timer.run, timer.sets[:8])
            except Exception as error:
                result.note = _join(result.note, f"no CUDA graph: {_first_line(error)}")
                torch.cuda.synchronize()
            release(mach.device)


def _finish(row: Row, results: list[Result], mach: Machine) -> None:
    gate = next((result for result in results if result.ours), None)
    for result in results:
        if gate is None or gate.status != "ok":
            result.speedup = math.nan
        seconds = result.median_ms / 1e3
        if result.status == "ok" and seconds > 0:
            if row.floor_bytes:
                result.gb_per_s = row.floor_bytes / seconds / 1e9
                result.percent_copy = 100 * result.gb_per_s / mach.copy_gb_per_s
            if row.cache_bytes:
                result.percent_cache = 100 * row.cache_bytes / seconds / 1e9 / mach.cache_gb_per_s


def _failed(result: Result, error: Exception, mach: Machine) -> None:
    if is_out_of_memory(error):
        result.status = "out of memory"
        result.note = f"out of memory at {mach.memory_bytes / 1e9:.0f} GB"
        if result.estimate_bytes:
            result.note += f" (needs about {human_bytes(result.estimate_bytes)})"
    else:
        result.status = "error"
        result.note = _first_line(error)
        if result.ours:
            traceback.print_exception(error)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:200]


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
