import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml

from dmsa import checkpoint, distributed
from tests.dmsa.crash import free_port
from tests.dmsa.runs import ROOT, assert_same_runs, attempts, lines, tiny_values

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    (result,) = attempts(out, [None], processes=2)
    assert result["statuses"] == [0, 0], result["log"][-3000:]
    return out


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def write_preset(folder: Path, **train) -> Path:
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump({**tiny_values(**train), "out": str(folder / "run")}))
    return path


def test_one_and_two_processes_see_the_same_losses(two, tmp_path):
    (alone,) = attempts(tmp_path / "run", [None])
    assert alone["statuses"] == [0]
    for one, both in zip(lines(tmp_path / "run"), lines(two), strict=True):
        assert one.keys() == both.keys()
        if one["kind"] == "train":
            assert both["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert both["label_entropy"] == pytest.approx(one["label_entropy"], abs=1e-9)
            assert both["active_classes"] == one["active_classes"]
        else:
            assert both["miou"] == pytest.approx(one["miou"], abs=1e-3)


def test_every_process_has_its_generators_in_the_checkpoint(two):
    state = checkpoint.load(checkpoint.Checkpoints(two / "checkpoints").newest())
    assert len(state["rng"]) == 2


def test_killed_and_resumed_with_two_processes(two, tmp_path):
    plan = [{"operation": n} for n in (3, 6, 8, 13, 9, 21, 12, 30)] + [{"rank": 1, "step": 3}, {"seconds": 0.3}]
    results = attempts(tmp_path / "run", [*plan, None], processes=2)
    assert sum(-signal.SIGKILL in result["statuses"] for result in results) >= 4
    assert results[-1]["statuses"] == [0, 0], results[-1]["log"][-3000:]
    assert_same_runs(two, tmp_path / "run")


def test_one_dead_process_stops_the_other_within_seconds(tmp_path):
    (result,) = attempts(tmp_path / "run", [{"rank": 1, "step": 3}], processes=2)
    assert result["statuses"][1] == -signal.SIGKILL
    assert result["statuses"][0] == 1
    assert result["last_after_first"] < 10


def test_world_size_that_does_not_divide_the_batch(tmp_path):
    (result,) = attempts(tmp_path / "run", [None], processes=3)
    assert result["statuses"] == [1, 1, 1]
    assert "train.batch=8 cannot be shared by 3 processes" in result["log"]
    assert not (tmp_path / "run").exists()


def test_missing_process_on_resume(tmp_path, two):
    import shutil

    shutil.copytree(two, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (result,) = attempts(tmp_path / "run", [None])
    assert result["statuses"] == [1]
    assert "was written by 2 processes, now there is 1" in result["log"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_missing_process_at_the_start():
    script = textwrap.dedent(
        """
        from dmsa.distributed import process_group
        try:
            with process_group(timeout_seconds=2):
                print("joined")
        except RuntimeError as error:
            print(error)
        """
    )
    environment = {
        **ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "rank 0 of 2 could not join the others at 127.0.0.1" in done.stdout
    assert "a process is missing" in done.stdout


def test_torchrun_restarts_after_a_killed_worker(tmp_path, two):
    """`--max-restarts=1`: a worker is killed from outside, the run ends as if nothing had happened."""
    preset = write_preset(tmp_path, epochs=3)
    command = torchrun(
        "--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}", "train.py", "--preset", str(preset)
    )
    agent = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder = tmp_path / "run" / "checkpoints"
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("step-*.pt")) and time.monotonic() < deadline and agent.poll() is None:
            time.sleep(0.01)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        printed, _ = agent.communicate(timeout=300)
    finally:
        agent.kill()
    assert agent.returncode == 0, printed[-15000:]
    assert "going on from" in printed
    assert_same_runs(two, tmp_path / "run")
    assert "torchrun --nproc_per_node=2 train.py" in (tmp_path / "run" / "report.md").read_text()


def test_torchrun_ends_with_the_error_of_a_rank(tmp_path):
    preset = write_preset(tmp_path, batch=9)
    command = torchrun("--nproc_per_node=2", f"--master_port={free_port()}", "train.py", "--preset", str(preset))
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "train.batch=9 cannot be shared by 2 processes" in done.stdout + done.stderr
    assert time.monotonic() - started < 100


def test_one_process_needs_no_process_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    value = torch.ones(2)
    assert distributed.all_reduce_sum(value) is value
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.broadcast_state(None) is None
    assert distributed.on_main(lambda: 3) == 3
    assert list(distributed.shard(5)) == [0, 1, 2, 3, 4]
    with distributed.main_first():
        distributed.barrier()


def test_collectives_between_processes(tmp_path):
    script = textwrap.dedent(
        """
        import json, sys, torch
        from dmsa import distributed as d
        with d.process_group() as device:
            found = {
                "sum": d.all_reduce_sum(torch.tensor([1.0 + d.rank()])).tolist(),
                "gathered": d.gather_objects(d.rank()),
                "broadcast": d.broadcast_object(f"from {d.rank()}"),
                "state": d.broadcast_state({"x": torch.tensor([d.rank() + 5.0])})["x"].tolist(),
                "shard": list(d.shard(5)),
                "main": d.on_main(lambda: d.rank() + 40),
            }
            def fail():
                raise ValueError("mine")
            try:
                d.on_main(fail)
            except (ValueError, RuntimeError) as error:
                found["error"] = f"{type(error).__name__}: {error}"
            with d.main_first():
                pass
            json.dump(found, open(f"{sys.argv[1]}/{d.rank()}.json", "w"))
        """
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    command = torchrun("--nproc_per_node=2", f"--master_port={free_port()}", str(path), str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        expected = {"sum": [3.0], "gathered": [0, 1], "broadcast": "from 0", "state": [5.0], "main": 40}
        assert {key: found[rank][key] for key in expected} == expected
    assert found[0]["shard"] + found[1]["shard"] == [0, 1, 2, 3, 4]
    assert found[0]["error"] == "ValueError: mine"
    assert found[1]["error"] == "RuntimeError: rank 0 failed: ValueError: mine"
