"""The workload rows: complete, buildable without memory, honest about scaling; the small ones run here."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

from benchmarks.measuring import bench_refine, cases, harness
from benchmarks.measuring.harness import measure
from benchmarks.measuring.machines import Machine, machine
from benchmarks.measuring.rows import Row
from benchmarks.reporting.tables import SWEEPS

CPU = torch.device("cpu")
MODULES = [path.stem for path in sorted(Path(harness.__file__).parent.glob("bench_*.py"))]


def rows(name: str, full: bool) -> list[Row]:
    return importlib.import_module(f"benchmarks.measuring.{name}").rows(CPU, full=full)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("full", [False, True])
def test_rows_are_named_once_and_have_ours_first(name, full):
    found = rows(name, full)
    assert found
    names = [(row.name, row.shape) for row in found]
    assert len(set(names)) == len(names)
    for row in found:
        assert row.candidates[0].ours or any(candidate.ours for candidate in row.candidates)
        assert len({candidate.name for candidate in row.candidates}) == len(row.candidates)
        if full:
            # What autograd keeps for the baselines limits the batch on a GPU too.
            assert not row.scaled_from or row.variant == "forward+backward"


def test_every_workload_of_the_refinement_is_there_with_its_baselines():
    found = {
        row.workload: row
        for row in bench_refine.rows(CPU, full=True)
        if row.variant == "refine" and row.dtype == "float32"
    }
    assert {case.name for case in cases.CASES} <= set(found)
    for case in cases.CASES:
        names = {candidate.name for candidate in found[case.name].candidates}
        assert {"ours", "materialising", "padded slices", "torch.compile(padded slices)"} <= names
        assert ("materialising, 30 classes at a time" in names) == (case.classes > 30)
        assert found[case.name].floor_bytes == case.floor_bytes()


def test_scaled_rows_say_from_what():
    for row in bench_refine.rows(CPU, full=False):
        full = next(case for case in (*cases.CASES, cases.CPU_TARGET) if case.name == row.workload)
        assert bool(row.scaled_from) == (row.shape != ",".join(map(str, full.shape)))


def test_the_sweeps_are_the_reports():
    assert {row.workload for row in rows("bench_sweep", False)} == set(SWEEPS)


SMALL = cases.RefineCase("small", 1, 31, 12, 9, (1, 8), 3, "pamr")


@pytest.fixture(scope="module")
def mach() -> Machine:
    return Machine(CPU, "test machine", 8 << 30, 10.0, 100.0, "made up", llc_bytes=1 << 16)


@pytest.mark.parametrize(
    "row",
    [
        bench_refine.refine_row(SMALL, "", False),
        bench_refine.refine_row(SMALL, "", False, torch.bfloat16),
        bench_refine._labels_row(SMALL, ""),
        bench_refine._gradient_row(SMALL, ""),
        bench_refine._shared_affinity_row(SMALL),
    ],
    ids=str,
)
def test_all_candidates_of_a_refinement_row_agree(row, mach):
    for result in measure(row, mach, seconds=0.01):
        if result.candidate == "torch.compile(padded slices)":
            assert result.status == "skipped"
            continue
        assert result.status == "ok", result
        assert result.error <= result.tolerance
        assert result.speedup > 0


def test_a_large_map_is_checked_in_its_corner(mach, monkeypatch):
    monkeypatch.setattr(bench_refine, "LARGE", 0)
    monkeypatch.setattr(bench_refine, "CORNER", 8)
    case = cases.RefineCase("large", 1, 2, 40, 30, (1, 2), 3)
    row = bench_refine.refine_row(case, "", False)
    image, masks = row.inputs(CPU, 0)
    assert row.reference(image, masks).shape == (1, 2, 8, 8)
    assert {r.status for r in measure(row, mach, seconds=0.01)} == {"ok", "skipped"}


def test_counts_of_a_row():
    result = measure(bench_refine.refine_row(SMALL, "", False), machine(CPU), seconds=0.01)[0]
    assert result.floor_bytes == 4 * 12 * 9 * (3 + 2 * 31)
    assert result.cache_bytes == 4 * 12 * 9 * 31 * 16 * 3
    assert not math.isnan(result.percent_copy)
    assert not math.isnan(result.percent_cache)
