"""The GPU suite's CPU path: it finds wrong kernels, stays in its budget and always leaves its files."""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import types

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.measuring import bench_refine, cases, gpu_checks, resident
from benchmarks.measuring.results import read_csv
from benchmarks.measuring.rows import Candidate, Row
from dmsa_kernels import backend
from dmsa_kernels.refine import AffinitySpec, eager, local_affinity, propagate


def run(tmp_path, *arguments: str) -> tuple[int, str]:
    # Eager, whatever the environment says: interpreted kernels take minutes here and have tests of their own.
    status = gpu_suite.main(
        ["--device", "cpu", "--backend", "eager", "--out", str(tmp_path), "--seed", "3", *arguments]
    )
    return status, (tmp_path / "log.txt").read_text()


def test_the_checks_pass_on_the_cpu(tmp_path):
    status, log = run(tmp_path, "--sections", "refine,aspp", "--cases", "6")
    assert status == 0, log
    assert log.count("6 cases; largest error over its budget") == 2
    assert "0 failures" in log


def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    right = eager.propagate

    def wrong(weights, masks, *arguments):
        out = right(weights, masks, *arguments)
        out[..., -1, -1] *= 1.001  # one border pixel
        return out

    monkeypatch.setattr(eager, "propagate", wrong)
    status, log = run(tmp_path, "--sections", "refine", "--cases", "6")
    assert status == 1
    assert "failed: refine: case" in log
    assert "border: error" in log


def test_memory_is_bounded_and_the_bound_can_fail(tmp_path, monkeypatch):
    status, log = run(tmp_path, "--sections", "memory")
    assert status == 0, log
    assert "openvoc_ade847, labels: peak" in log
    monkeypatch.setattr(gpu_checks, "peak_memory", lambda call, device: (10**12, "made up"))
    status, log = run(tmp_path, "--sections", "memory")
    assert status == 1
    assert "failed: memory: remote_sensing" in log


def test_sections_that_need_a_gpu_are_listed_as_not_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, log = run(tmp_path, "--sections", "graph,sanitizer,resident")
    assert status == 0
    assert "not run: graph: CUDA graphs need a GPU" in log
    assert "not run: sanitizer: needs a GPU" in log
    assert "not run: resident: needs a GPU" in log


@pytest.mark.parametrize("status", [0, 1, 2, None])
def test_one_launch_for_all_iterations_is_checked_apart_and_then_measured(tmp_path, monkeypatch, status):
    """Its row is measured where the checks, in a process of their own, have passed."""
    said = ["ok: this", "FAILED: that", "keep DMSA_RESIDENT off"]

    def start(command, *, timeout, **_):
        assert command[1:3] == ["-m", "benchmarks.measuring.resident"]
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=status, stdout="\n".join(said), stderr="")

    monkeypatch.setattr(resident, "WHY_NOT_MEASURED", "not checked")
    monkeypatch.setattr(gpu_suite.subprocess, "run", start)
    arguments = argparse.Namespace(device="cpu", out=str(tmp_path), seconds=60.0, seed=0)
    suite = gpu_checks.Suite(arguments)
    suite.on_gpu, suite.section = True, "resident"
    gpu_suite.section_resident(suite)
    suite.lines.close()
    assert bool(suite.failures) == (status in (1, None))
    assert bool(suite.not_run) == (status == 2)
    (candidate,) = [
        candidate
        for candidate in bench_refine.refine_row(cases.CASES[0], "", full=True).candidates
        if candidate.name == "ours, one launch where it fits"
    ]
    assert candidate.why_not == (None if status == 0 else "not checked")
    log = (tmp_path / "log.txt").read_text()
    assert "ok: this" not in log
    assert ("keep DMSA_RESIDENT off" in log) == (status is not None)


def test_the_verdict_on_one_launch_for_all_iterations():
    rows = [("afa_train", 80.0, 50.0), ("toco_train", 70.0, 70.5)]
    assert resident.verdict([], rows[:1]).startswith("turn DMSA_RESIDENT on")
    assert "toco_train is not faster" in resident.verdict([], rows)
    assert "no map" in resident.verdict([], [])
    assert "1 checks failed" in resident.verdict(["bits"], rows[:1])


def test_the_checks_of_one_launch_find_other_bits(monkeypatch, capsys):
    """A dry run: both ways are the eager path, one of which is made wrong."""
    assert resident.main(["--device", "cpu"]) == 0
    right = eager.propagate

    def wrong(weights, masks, *arguments):
        out = right(weights, masks, *arguments)
        if backend.wants_resident():
            out[..., -1, -1] *= 1.001
        return out

    monkeypatch.setattr(eager, "propagate", wrong)
    assert resident.main(["--device", "cpu"]) == 1
    assert "FAILED: (1, 3, 17, 17)" in capsys.readouterr().out


def test_a_budget_that_is_used_up_ends_with_what_there_is(tmp_path):
    status, log = run(tmp_path, "--sections", "refine,aspp", "--seconds", "1")
    assert status == 0
    assert "not run: refine" in log
    assert "not run: aspp" in log


def test_a_crash_in_a_section_does_not_stop_the_next(tmp_path, monkeypatch):
    def crash(suite):
        """Crash."""
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_suite.SECTIONS, "graph", crash)
    status, log = run(tmp_path, "--sections", "graph,aspp", "--cases", "3")
    assert status == 1
    assert "failed: graph: RuntimeError: no such kernel" in log
    assert "3 cases" in log


def test_an_unknown_section_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"sections=\['kernels'\]"):
        run(tmp_path, "--sections", "kernels")


def test_rows_go_to_the_csv_and_a_wrong_row_fails(tmp_path, monkeypatch):
    def inputs(device, seed):
        return (torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)),)

    right = Row(
        family="refine",
        workload="toy",
        variant="refine",
        dtype="float32",
        shape="8,8",
        inputs=inputs,
        candidates=(
            Candidate("ours", lambda x: 2 * x, ours=True),
            Candidate("compiled", lambda x: 1 / 0, compiled=True),
        ),
        reference=lambda x: 2 * x.double(),
    )
    wrong = dataclasses.replace(right, workload="other", candidates=(Candidate("ours", lambda x: 3 * x, ours=True),))
    module = types.SimpleNamespace(rows=lambda device, *, full: [right, wrong])
    monkeypatch.setattr(gpu_suite, "row_modules", lambda suite: iter([("toys", module)]))
    status, log = run(tmp_path, "--sections", "rows", "--skip-compiled", "--row-seconds", "0.05")
    assert status == 1
    assert "failed: rows: refine/other/refine/float32: ours: wrong" in log
    (path,) = tmp_path.glob("*.csv")
    results = {(r.workload, r.candidate): r for r in read_csv(path)}
    assert set(results) == {("toy", "ours"), ("other", "ours")}
    assert results["toy", "ours"].status == "ok"
    status, log = run(tmp_path, "--sections", "rows", "--skip-compiled", "--only", "refine/toy/*")
    assert status == 0
    assert "other" not in log


def test_the_plain_form_is_the_reference(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image, masks = (torch.rand(1, 3, 9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in ("neighbours", "centred", "centre_once", "none"):
        spec = AffinitySpec(exponent=1.0, sigma=sigma, eps=1e-8)
        weights, out = gpu_checks.plain_refine(image, masks, [1, 8], 2, spec)
        affinity = local_affinity(image, [1, 8], spec=spec, backend="reference")
        torch.testing.assert_close(weights, affinity.weights, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out, propagate(affinity, masks, 2, backend="reference"), rtol=1e-10, atol=1e-12)


def test_errors_are_told_apart_by_region():
    expected = torch.ones(1, 1, 6, 6)
    result = expected.clone()
    result[..., 0, 0] = 1.5
    border = gpu_checks.border_mask(6, 6, 2)
    assert int((~border).sum()) == 4
    assert gpu_checks.errors(result, expected, border) == {"interior": 0.0, "border": 0.5}
    result[..., 3, 3] = float("nan")
    assert gpu_checks.errors(result, expected, border)["interior"] == math.inf
    assert gpu_checks.errors(torch.ones(3), torch.ones(3), border) == {"all": 0.0}


def test_slug():
    assert gpu_suite.slug("NVIDIA GeForce RTX 3090") == "nvidia-geforce-rtx-3090"
