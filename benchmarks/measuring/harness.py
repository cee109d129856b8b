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
import csv
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
RESULTS = Path(__file__).parents[1] / "results"

# Bytes of the first-level cache that one multiprocessor (compute unit) reads a clock, from the vendors' manuals; the
# ceiling is this times their number times the boost clock.
L1_BYTES_PER_CLOCK = {"cuda": 128, "hip": 64}


@dataclass(frozen=True)
class Candidate:
    """One implementation of a row's operator."""

    name: str
    """Such as `ours`, `materialising`, `padded slices`, `torch.compile(padded slices)`."""
    run: Callable[..., Any]
    """Called with the row's inputs; returns a tensor or a tuple of tensors."""
    tune: Callable[..., Any] | None = None
    """Called with the row's inputs before everything else, on a GPU: measures launch configurations for them."""
    ours: bool = False
    """The first candidate with `ours` is what the speed-ups compare with."""
    peak_bytes: int = 0
    """Estimated memory it needs beyond the inputs; 0 if it is no larger than the output."""
    tolerance: float | None = None
    """Bound of the gate, if it differs from the row's."""
    compiled: bool = False
    """Runs through torch.compile: skipped where there is no compiler, started last."""
    why_not: str | None = None
    """Reason why it cannot run here; it is listed as skipped with it."""


@dataclass(frozen=True)
class Row:
    """One operator on one workload."""

    family: str
    """`refine`, `aspp`, `cam`, `step` or `data`."""
    workload: str
    """Name in the workload table."""
    variant: str
    """What is computed: `refine`, `affinity`, `forward`, `forward+backward`, ..."""
    dtype: str
    shape: str
    """Shape that is run, as text (such as `1,3,256,256`)."""
    inputs: Callable[[torch.device, int], tuple]
    """`inputs(device, seed)` draws one set of fresh inputs."""
    candidates: tuple[Candidate, ...]
    reference: Callable[..., Any] | None = None
    """Called with the same inputs, computes in higher precision; without one the gate only asks for finite values."""
    tolerance: float = 2e-5
    """Largest accepted error, relative to the largest reference value."""
    error: Callable[[Any, Any], float] | None = None
    """`error(result, expected)` if `relative_error` is not the right measure."""
    floor_bytes: int = 0
    """Bytes that must pass device memory: every input read once, every output written once."""
    cache_bytes: int = 0
    """Bytes that must be loaded from the first-level cache."""
    operations: int = 0
    """Floating-point operations."""
    items: float = 0
    """What is counted for a rate (images, pixels), if one is of interest."""
    scaled_from: str = ""
    """Full shape, if the row is scaled down (on a CPU)."""
    launch_bound: bool = False
    """Small enough that launches dominate: CUDA-graph replay is timed too."""
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}/{self.workload}/{self.variant}/{self.dtype}"

    def __str__(self) -> str:
        return self.name


@dataclass
class Result:
    """One line of the CSV: one candidate of one row on one device."""

    family: str
    workload: str
    variant: str
    dtype: str
    shape: str
    scaled_from: str
    candidate: str
    ours: bool
    status: str = "ok"
    """`ok`, `wrong`, `out of memory`, `skipped` or `error`."""
    note: str = ""
    error: float = math.nan
    tolerance: float = math.nan
    median_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    samples: int = 0
    graph_ms: float = math.nan
    """Median of one call inside a replayed CUDA graph."""
    first_call_s: float = math.nan
    """First call minus a steady one: compilation."""
    tune_s: float = math.nan
    """Time spent measuring launch configurations beforehand (with what that had to compile)."""
    speedup: float = math.nan
    """Median over the rounds of this candidate's time over ours."""
    peak_bytes: int = -1
    """Measured peak beyond the inputs (the output included); -1 if not measured."""
    peak_how: str = ""
    estimate_bytes: int = 0
    floor_bytes: int = 0
    cache_bytes: int = 0
    operations: int = 0
    items: float = 0
    gb_per_s: float = math.nan
    percent_copy: float = math.nan
    percent_cache: float = math.nan
    device: str = ""
    hardware: str = ""
    copy_gb_per_s: float = math.nan
    cache_gb_per_s: float = math.nan
    cache_how: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the same measurement in another file."""
        return (self.family, self.workload, self.variant, self.dtype, self.shape, self.candidate)


@dataclass(frozen=True)
class Machine:
    """The device that is measured, with its two ceilings."""

    device: torch.device
    hardware: str
    memory_bytes: int
    """Memory that may be used: the GPU's total, or what is free on the host."""
    copy_gb_per_s: float
    """Large copy, bytes read plus bytes written."""
    cache_gb_per_s: float
    cache_how: str
    llc_bytes: int
    """Size of the last-level cache; the inputs are rotated over several times this."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def describe(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.hardware}; {self.memory_bytes / 1e9:.0f} GB usable; copy {self.copy_gb_per_s:.0f} GB/s; "
            f"cache {self.cache_gb_per_s:.0f} GB/s ({self.cache_how}); {versions}"
        )


# --- the machine ------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` is the GPU if there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch finds no GPU; expected 'auto' or 'cpu' on this machine")
    return device


def commit() -> str:
    """Return the short git commit of this checkout, with `+` if tracked files differ from it."""
    try:
        root = Path(__file__).parent
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True, timeout=20)
        head = run(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no", "--", ":/*.py"]).stdout.strip()
        return head + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    """Return the processor's model and the cores this process may use, such as `AMD EPYC, 2 cores`."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def free_host_bytes() -> int:
    """Return the bytes of memory that are available, within the limit of the control group if there is one."""
    free = 4 * GIB
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _cpu_llc_bytes() -> int:
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


def versions() -> dict[str, str]:
    """Return the versions that decide speed: torch, Python, and Triton where it is installed."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


def _copy_gb_per_s(device: torch.device, nbytes: int) -> float:
    """Measure a large copy on `device`, bytes read plus bytes written; a ceiling, hence the fastest of 8."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / min(_time_once(lambda: target.copy_(source), device) for _ in range(8)) / 1e9


def _cpu_cache_gb_per_s() -> float:
    """Measure the second-level cache of a CPU: an elementwise operator on a vector that fits it, all threads."""
    # Half of a small L2 a thread, so that the operator's call overhead stays small beside the time.
    values = torch.ones(torch.get_num_threads() * (64 << 10), dtype=torch.float32)
    calls = 50

    def read() -> None:
        for _ in range(calls):
            torch.maximum(values, values, out=values)

    read()
    seconds = min(_time_once(read, torch.device("cpu")) for _ in range(7)) / calls
    return 3 * values.nbytes / seconds / 1e9


def _time_once(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, by device events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def machine(device: torch.device | None = None) -> Machine:
    """Return the machine with its measured ceilings (measured once a process)."""
    device = device or pick_device()
    if device.type != "cuda":
        return Machine(
            device=device,
            hardware=cpu_name(),
            memory_bytes=free_host_bytes(),
            copy_gb_per_s=_copy_gb_per_s(device, 128 << 20),
            cache_gb_per_s=_cpu_cache_gb_per_s(),
            cache_how="measured, resident in L2",
            llc_bytes=_cpu_llc_bytes(),
            versions=versions(),
        )
    properties = torch.cuda.get_device_properties(device)
    per_clock = L1_BYTES_PER_CLOCK["hip" if torch.version.hip else "cuda"]
    clock_khz = getattr(properties, "clock_rate", 0)
    cache, how = math.nan, "boost clock unknown"
    if clock_khz:
        cache = properties.multi_processor_count * per_clock * clock_khz * 1e3 / 1e9
        how = f"{properties.multi_processor_count} units x {per_clock} B x {clock_khz / 1e6:.2f} GHz"
    return Machine(
        device=device,
        hardware=properties.name,
        memory_bytes=properties.total_memory,
        copy_gb_per_s=_copy_gb_per_s(device, 1 << 30),
        cache_gb_per_s=cache,
        cache_how=how,
        llc_bytes=getattr(properties, "L2_cache_size", 64 << 20),
        versions=versions(),
    )


# --- the gate ---------------------------------------------------------------------------------------------------------


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a result (a tensor, or nested sequences and dicts of them), in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def relative_error(result: Any, expected: Any) -> float:
    """Return the largest difference of any tensor, relative to the largest expected value; integers count mismatches.

    NaN or infinity on either side, other shapes and missing tensors give infinity.
    """
    got, want = tensors(result), tensors(expected)
    if len(got) != len(want) or not got:
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel() == 0:
            continue
        if not b.is_floating_point():
            worst = max(worst, (a != b).double().mean().item())
            continue
        # In slices: the difference in double precision of a whole large map would need more memory than the operator.
        scale, difference = 0.0, 0.0
        for x, y in zip(a.reshape(-1).split(1 << 26), b.reshape(-1).split(1 << 26), strict=True):
            delta = (x.detach().to(torch.float64) - y.detach().to(torch.float64)).abs().max().item()
            if not math.isfinite(delta):
                return math.inf
            difference = max(difference, delta)
            scale = max(scale, y.abs().max().item())
        worst = max(worst, difference / max(scale, 1e-30))
    return worst


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that `torch.empty` returns with NaN inside the block: an element that is not written shows up."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _finite_error(result: Any) -> float:
    found = tensors(result)
    finite = found and all(bool(t.isfinite().all()) for t in found if t.is_floating_point())
    return 0.0 if finite else math.inf


# --- memory -----------------------------------------------------------------------------------------------------------

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


def human_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def release(device: torch.device) -> None:
    """Give unused memory back, so that one candidate's leftovers do not limit the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- timing -----------------------------------------------------------------------------------------------------------


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
            seconds = min(_time_once(self._calls, self.device) for _ in range(2))
            self.inner = max(1, min(200, math.ceil(SAMPLE_S / max(seconds, 1e-7))))

    def sample(self) -> None:
        """Time one sample, after a call that is not timed: the allocator is then as this candidate leaves it.

        Without it a call finds, or has to fetch from the system again, the memory that the candidate before it left.
        Left out where a call takes seconds, beside which that is nothing.
        """
        if self.estimate_s < SECONDS_LONG_S:
            self._call()
        self.samples.append(_time_once(self._calls, self.device) / self.inner)

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
    samples = [_time_once(graph.replay, torch.device("cuda")) for _ in range(repeats)]
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
        commit=_commit_once(),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


_commit_once = functools.cache(commit)


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
        result.error = _finite_error(out)
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


# --- output -----------------------------------------------------------------------------------------------------------

COLUMNS = [item.name for item in dataclasses.fields(Result)]


def write_csv(results: Iterable[Result], path: str | Path, *, append: bool = False) -> None:
    """Write (or append) results as CSV, numbers with five significant digits, an empty field for what is not known."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = not (append and path.exists() and path.stat().st_size)
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if header:
            writer.writeheader()
        for result in results:
            writer.writerow({key: _cell(value) for key, value in dataclasses.asdict(result).items()})


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return str(value)


def read_csv(path: str | Path) -> list[Result]:
    """Read what `write_csv` wrote.

    Raises:
        FileNotFoundError: there is no such file; the message lists the committed ones.
        ValueError: a file without the needed columns.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(item.name for item in result_files()) or "none"
        raise FileNotFoundError(f"no results at {path}; committed in {RESULTS.name}/: {known}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"family", "workload", "variant", "candidate", "median_ms"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"{path} is not a result file: columns {', '.join(sorted(missing))} are missing")
        return [_result(line) for line in reader]


def result_files(folder: Path = RESULTS) -> list[Path]:
    """Return the result files of a folder, by name; tables of scores (``*_shapes.csv``, ``shapes_*.csv``) are none."""
    return [path for path in sorted(folder.glob("*.csv")) if "shapes" not in path.stem.split("_")]


def _result(line: dict[str, str]) -> Result:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Result):
        text = line.get(item.name) or ""
        if item.type == "float":
            values[item.name] = float(text) if text else math.nan
        elif item.type == "int":
            values[item.name] = int(text) if text else -1
        elif item.type == "bool":
            values[item.name] = text == "1"
        else:
            values[item.name] = text
    return Result(**values)


def number(value: float, digits: int = 3) -> str:
    """Format a number with so many significant digits and no exponent; an empty text for NaN."""
    if math.isnan(value):
        return ""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def table(results: Sequence[Result]) -> str:
    """Return the results as text, one line a candidate; the reason instead of a number where there is none."""
    lines = []
    for result in results:
        name = f"{result.family}/{result.workload}/{result.variant}/{result.dtype} {result.shape}"
        if result.scaled_from:
            name += f" (scaled down from {result.scaled_from})"
        if not lines or name != lines[-1][0]:
            lines.append((name, name))
        if result.status != "ok":
            lines.append((name, f"  {result.candidate:34s} {result.status}: {result.note}"))
            continue
        spread = f"{number(result.median_ms)} ms [{number(result.p20_ms)}, {number(result.p80_ms)}]"
        parts = [f"  {result.candidate:34s} {spread:32s}"]
        if not math.isnan(result.graph_ms):
            parts.append(f"graph {number(result.graph_ms)} ms")
        if not result.ours and not math.isnan(result.speedup):
            parts.append(f"ours is {number(result.speedup)}x")
        if result.peak_bytes >= 0:
            parts.append(f"peak {human_bytes(result.peak_bytes)}")
        if not math.isnan(result.percent_copy):
            parts.append(f"{result.percent_copy:.0f} % of copy")
        if not math.isnan(result.percent_cache):
            parts.append(f"{result.percent_cache:.0f} % of cache")
        if result.first_call_s >= 0.5:
            parts.append(f"first call +{result.first_call_s:.1f} s")
        if result.tune_s > 0:
            parts.append(f"tuned in {result.tune_s:.1f} s")
        if result.note:
            parts.append(result.note)
        lines.append((name, ", ".join(parts)))
    return "\n".join(line for _, line in lines)
