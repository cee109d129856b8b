"""`pytest benchmarks/ --benchmark-only`: what `rows(device, full)` of a `measuring/bench_*.py` lists are tests.

The test fails if ours fails its correctness gate; a baseline that fails, or runs out of memory, is a line in the table.
"""

from __future__ import annotations

import time
import types

import pytest
import torch

from benchmarks.measuring import harness
from benchmarks.measuring.machines import machine, pick_device
from benchmarks.measuring.results import Result, table, write_csv
from benchmarks.measuring.rows import Row


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dmsa benchmarks")
    group.addoption("--bench-device", default="auto", help="auto (the GPU if there is one), cpu or cuda")
    group.addoption("--bench-full", action="store_true", help="full sizes on a CPU too (by default they are scaled)")
    group.addoption("--bench-csv", default=None, help="write the results to this CSV file")
    group.addoption("--bench-append", action="store_true", help="append to that file instead of replacing it")
    group.addoption("--bench-row-seconds", type=float, default=2.0, help="time of the timed rounds of one row")
    group.addoption(
        "--bench-seconds", type=float, default=500.0, help="after so many seconds what is left is listed as skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.stash[DEADLINE] = time.monotonic() + config.getoption("--bench-seconds")


RESULTS: pytest.StashKey[list[Result]] = pytest.StashKey()
DEADLINE: pytest.StashKey[float] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    device = pick_device(metafunc.config.getoption("--bench-device"))
    full = device.type == "cuda" or metafunc.config.getoption("--bench-full")
    module: types.ModuleType = metafunc.module
    metafunc.parametrize("row", module.rows(device, full=full), ids=str)


@pytest.fixture
def measure(benchmark, request):
    """Return `measure(row)`: all candidates through the harness, ours through pytest-benchmark's table as well."""

    def run(row: Row) -> None:
        config = request.config
        mach = machine(pick_device(config.getoption("--bench-device")))
        results = harness.measure(
            row, mach, seconds=config.getoption("--bench-row-seconds"), deadline=config.stash[DEADLINE]
        )
        path = config.getoption("--bench-csv")
        if path:
            # Row by row, so that an interrupted run keeps what it has.
            append = bool(config.stash[RESULTS]) or config.getoption("--bench-append")
            write_csv(results, path, append=append)
        config.stash[RESULTS].extend(results)
        for result in results:
            benchmark.extra_info[result.candidate] = (
                f"{result.median_ms:.4g} ms" if result.status == "ok" else f"{result.status}: {result.note}"
            )
        ours = [(c, r) for c, r in zip(row.candidates, results, strict=True) if r.ours]
        failed = [f"{r.candidate}: {r.status}: {r.note}" for _, r in ours if r.status in ("wrong", "error")]
        if failed:
            pytest.fail(f"{row.name}: " + "; ".join(failed))
        candidate, result = ours[0]
        if result.status != "ok":
            pytest.skip(f"{row.name}: {result.status}: {result.note}")
        inputs = row.inputs(mach.device, 1)

        def once() -> None:
            candidate.run(*inputs)
            if mach.on_gpu:
                torch.cuda.synchronize(mach.device)

        benchmark.pedantic(once, rounds=3, warmup_rounds=1)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    device = pick_device(config.getoption("--bench-device"))
    terminalreporter.section("workloads")
    terminalreporter.write_line(machine(device).describe())
    if any(result.scaled_from for result in results):
        terminalreporter.write_line("Sizes are scaled down on this device, as each line says; --bench-full runs all.")
    terminalreporter.write_line(table(results))
    path = config.getoption("--bench-csv")
    if path:
        terminalreporter.write_line(f"written to {path}")
