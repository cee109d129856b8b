"""The device that is measured: what it is, and its two ceilings."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
# Bytes of the first-level cache that one multiprocessor (compute unit) reads a clock, from the vendors' manuals; the
# ceiling is this times their number times the boost clock.
L1_BYTES_PER_CLOCK = {"cuda": 128, "hip": 64}


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


@functools.cache
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
    return 2 * nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8)) / 1e9


def _cpu_cache_gb_per_s() -> float:
    """Measure the second-level cache of a CPU: an elementwise operator on a vector that fits it, all threads."""
    # Half of a small L2 a thread, so that the operator's call overhead stays small beside the time.
    values = torch.ones(torch.get_num_threads() * (64 << 10), dtype=torch.float32)
    calls = 50

    def read() -> None:
        for _ in range(calls):
            torch.maximum(values, values, out=values)

    read()
    seconds = min(seconds_of(read, torch.device("cpu")) for _ in range(7)) / calls
    return 3 * values.nbytes / seconds / 1e9


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
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
