"""Every kernel compiles for GPUs that are not there, without a register spill on NVIDIA's (but for those listed)."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

from dmsa_kernels import tuning
from tests import offline

pytest.importorskip("triton", reason="the offline compiler is Triton")
WORKERS = 2
SPILLING = {
    ("propagate_fwd fast (1, 2, 4, 8, 12, 24) Config(block_h=8, block_w=32, num_warps=8)", "sm_120"),
    ("propagate_fwd fast (1, 2, 4, 8, 12, 24, 32, 64) Config(block_h=8, block_w=32, num_warps=8)", "sm_120"),
}
"""What still spills: eight channels of 16 bits beside many weights, on one architecture (benchmarks/NOTES.md)."""
SMALLEST = ("local_affinity_fwd fp32->fp32 (1,)", "dwconv_fwd concat fp32 nchw")


def compiled(cache: pathlib.Path, *shares: Sequence[str]) -> list[dict]:
    """Compile in processes of their own: under TRITON_INTERPRET this process has interpreted kernels."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.offline", *arguments],
            cwd=pathlib.Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in shares
    ]
    found = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        found += [json.loads(line) for line in out.splitlines()]
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """Every case for every target."""
    return compiled(tmp_path_factory.mktemp("triton"), *(["--share", f"{index}/{WORKERS}"] for index in range(WORKERS)))


def test_a_kernel_of_each_family_compiles(tmp_path):
    shares = (["--targets", "sm_90", "--match", name] for name in SMALLEST)
    found = compiled(tmp_path, *shares)
    assert len(found) >= len(SMALLEST)
    assert not any(report["stack"] or report["spills"] for report in found)


@pytest.mark.slow
def test_no_kernel_spills(reports):
    spilling = {
        (r["case"], r["target"]): f"{r['registers']} registers, {r['stack']} bytes of stack, {r['spills']} spills"
        for r in reports
        if r["target"].startswith("sm_") and (r["stack"] or r["spills"])
    }
    assert set(spilling) == SPILLING, spilling


@pytest.mark.slow
def test_every_target_is_compiled(reports):
    targets = collections.Counter(r["target"] for r in reports)
    assert set(targets) == set(offline.TARGETS)
    assert all(count >= 15 for count in targets.values()), targets


@pytest.mark.slow
def test_every_configuration_is_compiled(reports):
    compiled = [r["case"] for r in reports if r["target"] == "sm_90"]
    for kernel, candidates in tuning._CONFIGS.items():
        for config in candidates:
            assert any(kernel in case and str(config) in case for case in compiled), (kernel, config)


@pytest.mark.slow
def test_taps_are_loaded_sixteen_bytes_at_a_time(reports):
    for report in reports:
        if report["case"].startswith(("propagate_fwd exact (", "propagate_fwd fast (")) and "sm_" in report["target"]:
            taps = 8 * (report["case"].split("(")[1].split(")")[0].rstrip(",").count(",") + 1)
            assert report["loads"].get("128", 0) >= taps, report
