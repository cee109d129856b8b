"""The measuring harness: the gate blocks, memory running out is a result, percentiles and files are right."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.measuring.gate import poisoned, relative_error
from benchmarks.measuring.harness import measure, percentile
from benchmarks.measuring.machines import Machine, pick_device
from benchmarks.measuring.memory import peak_memory
from benchmarks.measuring.results import COLUMNS, Result, number, read_csv, table, write_csv
from benchmarks.measuring.rows import Candidate, Row

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def mach() -> Machine:
    return Machine(
        device=CPU,
        hardware="test machine",
        memory_bytes=8 << 30,
        copy_gb_per_s=10.0,
        cache_gb_per_s=100.0,
        cache_how="made up",
        llc_bytes=1 << 20,
        versions={"torch": torch.__version__},
    )


def make_row(*candidates: Candidate, **changes) -> Row:
    def inputs(device, seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(64, 1024, generator=generator).to(device),)

    row = Row(
        family="toy",
        workload="double",
        variant="forward",
        dtype="float32",
        shape="64,1024",
        inputs=inputs,
        candidates=candidates,
        reference=lambda x: 2 * x.double(),
        floor_bytes=2 * 64 * 1024 * 4,
        cache_bytes=64 * 1024 * 4,
    )
    return dataclasses.replace(row, **changes)


OURS = Candidate("ours", lambda x: 2 * x, ours=True)
PLAIN = Candidate("plain", lambda x: x + x)


def run(mach, *candidates, seconds=0.02, **changes):
    measured = measure(make_row(*candidates, **changes), mach, seconds=seconds, max_rounds=4)
    return {result.candidate: result for result in measured}


def test_a_right_candidate_is_timed_and_compared(mach):
    results = run(mach, OURS, PLAIN)
    ours, plain = results["ours"], results["plain"]
    assert ours.status == plain.status == "ok"
    assert 0 < ours.p20_ms <= ours.median_ms <= ours.p80_ms
    assert ours.speedup == pytest.approx(1.0)
    assert plain.speedup > 0
    assert ours.gb_per_s == pytest.approx(2 * 64 * 1024 * 4 / ours.median_ms / 1e6)
    assert ours.percent_copy == pytest.approx(ours.gb_per_s / 10.0 * 100)
    assert ours.percent_cache == pytest.approx(ours.gb_per_s / 2 / 100.0 * 100)


def test_a_wrong_result_of_ours_blocks_every_speed_up(mach):
    results = run(mach, Candidate("ours", lambda x: 2 * x + 1e-3, ours=True), PLAIN)
    assert results["ours"].status == "wrong"
    assert math.isnan(results["ours"].median_ms)
    assert all(math.isnan(result.speedup) for result in results.values())
    text = table(list(results.values()))
    assert "wrong: error" in text
    assert "ours is" not in text


def test_a_wrong_baseline_is_not_timed(mach):
    results = run(mach, OURS, Candidate("baseline", lambda x: x))
    assert results["baseline"].status == "wrong"
    assert math.isnan(results["baseline"].speedup)
    assert math.isnan(results["baseline"].median_ms)
    assert results["ours"].status == "ok"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_single_bad_element_fails_the_gate(mach, bad):
    def almost(x):
        out = 2 * x
        out[-1, -1] = bad
        return out

    assert run(mach, Candidate("ours", almost, ours=True))["ours"].status == "wrong"
    assert run(mach, Candidate("ours", almost, ours=True), reference=None)["ours"].status == "wrong"


def test_an_element_that_is_never_written_fails_the_gate(mach):
    def unwritten(x):
        # A previous, right result lies in the memory that empty returns: only the poison shows the gap.
        out = torch.empty_like(x)
        out[:-1] = 2 * x[:-1]
        return out

    assert run(mach, Candidate("ours", unwritten, ours=True))["ours"].status == "wrong"


def test_poison_is_taken_back():
    with poisoned():
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "raise_it",
    [
        lambda x: torch.empty(1 << 52),
        lambda x: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB")),
        lambda x: (_ for _ in ()).throw(MemoryError()),
    ],
    ids=["cpu allocator", "gpu allocator", "python"],
)
def test_running_out_of_memory_is_a_result(mach, raise_it):
    results = run(mach, OURS, Candidate("baseline", raise_it, peak_bytes=1 << 30))
    assert results["baseline"].status == "out of memory"
    assert results["baseline"].note == "out of memory at 9 GB (needs about 1.07 GB)"
    assert results["ours"].status == "ok"


def test_an_estimate_beyond_the_memory_is_not_started(mach):
    def never(x):
        raise AssertionError("started")

    results = run(mach, OURS, Candidate("baseline", never, peak_bytes=10**15))
    assert results["baseline"].status == "skipped"
    assert "needs about" in results["baseline"].note
    assert results["baseline"].estimate_bytes == 10**15


def test_a_crash_is_named_and_the_others_go_on(mach, capsys):
    def crash(x):
        raise ValueError("no kernel for this shape\nsecond line")

    results = run(mach, OURS, Candidate("baseline", crash), Candidate("absent", crash, why_not="not installed"))
    assert (results["baseline"].status, results["baseline"].note) == ("error", "ValueError: no kernel for this shape")
    assert (results["absent"].status, results["absent"].note) == ("skipped", "not installed")
    assert results["ours"].status == "ok"


def test_a_deadline_that_has_passed_starts_nothing(mach):
    row = make_row(OURS, PLAIN)
    results = measure(row, mach, deadline=time.monotonic() - 1)
    assert [result.status for result in results] == ["skipped", "skipped"]
    assert "time budget" in results[0].note


def test_the_first_call_is_apart(mach):
    waited = []

    def compiles(x):
        if not waited:
            waited.append(time.sleep(0.2))
        return 2 * x

    result = run(mach, Candidate("ours", compiles, ours=True))["ours"]
    assert result.first_call_s >= 0.15
    assert result.p80_ms < 100


def test_inputs_are_rotated_past_the_cache(mach):
    seen = set()

    def look(x):
        seen.add(x.data_ptr())
        return 2 * x

    measure(make_row(Candidate("ours", look, ours=True)), mach, seconds=30, max_rounds=20)
    # 256 KiB a set, four times a cache of 1 MiB.
    assert len(seen) == 16


def test_gradients_pass_the_gate_as_tuples(mach):
    def inputs(device, seed):
        return (torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)),)

    def forward_backward(x):
        x = x.detach().requires_grad_()
        out = x * x
        return out.detach(), *torch.autograd.grad(out.sum(), x)

    row = {"inputs": inputs, "reference": lambda x: forward_backward(x.double())}
    assert run(mach, Candidate("ours", forward_backward, ours=True), **row)["ours"].status == "ok"
    short = Candidate("ours", lambda x: (x * x,), ours=True)
    assert run(mach, short, **row)["ours"].status == "wrong"


@pytest.mark.parametrize("count", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
def test_percentiles_are_numpys(count, percent):
    samples = np.random.default_rng(count).random(count)
    assert percentile(list(samples), percent) == pytest.approx(np.percentile(samples, percent))


def test_percentile_of_nothing_is_nan():
    assert math.isnan(percentile([], 50))


def test_relative_error():
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a.double()) == 0
    assert relative_error(a + 0.02, a.double()) == pytest.approx(0.005, rel=1e-4)
    assert relative_error((a, torch.tensor([1, 2])), (a, torch.tensor([1, 3]))) == 0.5
    assert relative_error(a, a[:1]) == math.inf
    assert relative_error((a,), (a, a)) == math.inf
    assert relative_error(None, None) == math.inf


def test_peak_memory_counts_temporaries_and_what_is_returned():
    def two_alive():
        a = torch.ones(MIB)
        b = a + 1
        del a
        return b * 2

    peak, how = peak_memory(two_alive, CPU)
    assert peak == pytest.approx(8 * MIB, rel=0.01)
    assert how == "torch's CPU allocator"


def test_peak_memory_sees_inside_a_registered_operator():
    @torch.library.custom_op("bench_tests::spend", mutates_args=())
    def spend(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x, x]).sum(0, keepdim=True)

    x = torch.ones(MIB)
    assert peak_memory(lambda: spend(x), CPU)[0] >= 12 * MIB


def test_csv_keeps_everything(tmp_path, mach):
    results = list(run(mach, OURS, PLAIN, Candidate("baseline", lambda x: x, peak_bytes=5)).values())
    path = tmp_path / "new" / "a.csv"
    write_csv(results, path)
    write_csv(results, path, append=True)
    back = read_csv(path)
    assert len(back) == 2 * len(results)
    for written, read in zip(results, back, strict=False):
        assert written.key == read.key
        assert (written.ours, written.status, written.note) == (read.ours, read.status, read.note)
        assert (written.hardware, written.torch, written.commit) == (read.hardware, read.torch, read.commit)
        assert read.median_ms == pytest.approx(written.median_ms, rel=1e-4, nan_ok=True)
    assert all(result.hardware and result.torch and result.commit and result.date for result in back)


def test_csv_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no results at .*absent\.csv"):
        read_csv(tmp_path / "absent.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns candidate, family"):
        read_csv(other)


def test_pick_device():
    assert pick_device("cpu") == CPU
    if torch.cuda.is_available():
        assert pick_device().type == "cuda"
    else:
        assert pick_device() == CPU
        with pytest.raises(ValueError, match="torch finds no GPU"):
            pick_device("cuda")


@pytest.mark.parametrize(("value", "text"), [(0.012345, "0.0123"), (1234.5, "1234"), (1.5, "1.50"), (math.nan, "")])
def test_number(value, text):
    assert number(value) == text


def test_every_column_is_a_field_of_a_result():
    assert [item.name for item in dataclasses.fields(Result)] == COLUMNS


def test_the_harness_imports_neither_triton_nor_the_method():
    code = (
        "import sys, benchmarks.measuring.harness; print([m for m in ('triton', 'dmsa', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_sample_follows_a_call_of_the_same_candidate(mach):
    called = []

    def make(name):
        def call(x):
            called.append(name)
            time.sleep(21e-3)  # so that a sample is one call
            return 2 * x

        return Candidate(name, call, ours=name == "ours")

    measure(make_row(make("ours"), make("theirs")), mach, seconds=0.0, min_rounds=3, max_rounds=3)
    turns = [list(group) for _, group in itertools.groupby(called)]
    assert [len(turn) for turn in turns[-4:]] == [2, 2, 2, 2]
