"""Every kernel compiles for GPUs that are not there, without a register spill on NVIDIA's."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from dmsa_kernels import tuning
from tests import offline

pytest.importorskip("triton", reason="the offline compiler is Triton")
SMALLEST = ("local_affinity_fwd fp32->fp32 (1,)", "propagate_resident fast (1, 2, 4)", "dwconv_fwd concat fp32 nchw")


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


def test_a_kernel_of_each_family_compiles(tmp_path):
    shares = (["--targets", "sm_90", "--match", name] for name in SMALLEST)
    found = compiled(tmp_path, *shares)
    assert len(found) >= len(SMALLEST)
    assert not any(report["stack"] or report["spills"] for report in found)
    (waiting,) = [report for report in found if report["case"].startswith("propagate_resident")]
    assert_it_waits(waiting["ordering"])


def assert_it_waits(ordering: Sequence[str]) -> None:
    """Assert that programs meet as the memory model asks for, from a kernel's opcodes that order memory.

    Between block barriers: the stores of all threads out, then one count; questions that go to L2; after the last one
    the first-level cache is emptied, behind which the other threads go on. Nothing is read as if it were constant.
    """
    text = " ".join(ordering)
    block = r"BAR\.SYNC\S*"
    count = rf"{block} MEMBAR\.\S*GPU REDG?\.E\.ADD\.STRONG\.GPU"
    ask = rf"LDG\.E\.STRONG\.GPU {block} {block}"
    assert re.fullmatch(rf"{count} ({ask} )+LDG\.E\.STRONG\.GPU CCTL\.IVALL {block} {block} BPT\.TRAP", text), text


def test_what_orders_memory_is_looked_at():
    right = "BAR.SYNC.0 MEMBAR.ALL.GPU REDG.E.ADD.STRONG.GPU LDG.E.STRONG.GPU BAR.SYNC.0 BAR.SYNC.0"
    right += " LDG.E.STRONG.GPU CCTL.IVALL BAR.SYNC.0 BAR.SYNC.0 BPT.TRAP"
    assert_it_waits(right.split())
    for wrong in ("MEMBAR.ALL.GPU ", "CCTL.IVALL ", "BPT.TRAP", "BAR.SYNC.0 "):
        with pytest.raises(AssertionError):
            assert_it_waits(right.replace(wrong, "", 1).split())
    with pytest.raises(AssertionError):
        assert_it_waits(f"{right} LDG.E.CONSTANT".split())


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_case_of_a_target(target, tmp_path):
    """No spills; taps in loads of 16 bytes, samples one by one; every configuration that can be chosen on the first."""
    found = compiled(tmp_path, ["--targets", target])
    assert len(found) >= 15
    if target == offline.TARGETS[0]:
        for kernel, candidates in tuning._CONFIGS.items():
            for config in candidates:
                assert any(kernel in r["case"] and str(config) in r["case"] for r in found), (kernel, config)
    if not target.startswith("sm_"):
        return
    spilling = {
        (r["case"], target): f"{r['registers']} registers, {r['stack']} bytes of stack, {r['spills']} spills"
        for r in found
        if r["stack"] or r["spills"]
    }
    assert not spilling
    held = [r for r in found if r["case"].startswith(("propagate_fwd exact (", "propagate_fwd fast ("))]
    assert held
    for report in held:
        taps = 8 * (report["case"].split("(")[1].split(")")[0].rstrip(",").count(",") + 1)
        assert report["loads"].get("128", 0) >= taps, report
    waiting = [r for r in found if r["case"].startswith("propagate_resident")]
    assert waiting
    for report in waiting:
        assert_it_waits(report["ordering"])
    # the affinity kernels tell the compiler that samples are contiguous, for the order of the lanes alone
    gathering = [r for r in found if r["case"].startswith("local_affinity")]
    assert gathering
    for report in gathering:
        assert set(report["loads"]) <= {"16", "32"}, report
