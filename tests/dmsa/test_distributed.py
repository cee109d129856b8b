import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from dmsa import distributed
from tests.dmsa.crash import free_port
from tests.dmsa.runs import ENVIRONMENT, ROOT, assert_same_runs, attempts, lines, tiny_values


def names(*shares: tuple[int, int | None]) -> dict[str, tuple[int, dict]]:
    return {f"{processes}, micro_batch={micro}": (processes, {"micro_batch": micro}) for processes, micro in shares}


QUICK = names((1, None), (2, None))
SLOW = names((3, 2), (6, None), (1, 2), (2, 2), (3, None), (5, None)) | {  # of eight images
    f"bf16, {processes}": (processes, {"precision": "bf16", "epochs": 1}) for processes in (1, 3)
}


def run_all(folder: Path, wanted: dict[str, tuple[int, dict]]) -> Path:
    """Train the tiny run undisturbed, with different numbers of processes; return the folder of the run folders."""
    plan = [
        {"processes": processes, "out": str(folder / name), "train": options}
        for name, (processes, options) in wanted.items()
    ]
    for result in attempts(folder / "unused", plan):
        assert set(result["statuses"]) == {0}, result["log"][-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("runs"), QUICK)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("more"), SLOW)


@pytest.fixture(scope="module")
def alone(runs):
    """The run of one process."""
    return runs / "1, micro_batch=None"


@pytest.fixture(scope="module")
def two(runs):
    """The run of two processes."""
    return runs / "2, micro_batch=None"


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


def write_preset(folder: Path, **train) -> Path:
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump({**tiny_values(**train), "out": str(folder / "run")}))
    return path


def assert_close_runs(one: Path, other: Path, absolute: float = 1e-5) -> None:
    """Compare losses, gradients and label statistics step by step, and the scores."""
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        if a["kind"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], abs=absolute)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=10 * absolute)
            assert b["label_entropy"] == pytest.approx(a["label_entropy"], abs=absolute)
            assert b["active_classes"] == a["active_classes"]
        else:
            assert b["miou"] == pytest.approx(a["miou"], abs=absolute)
            assert b["accuracy"] == pytest.approx(a["accuracy"], abs=absolute)


@pytest.mark.parametrize("name", list(QUICK)[1:])
def test_any_number_of_processes_sees_the_same_losses_and_scores(runs, alone, name):
    assert_close_runs(alone, runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if "bf16" not in name])
def test_more_numbers_of_processes(more_runs, alone, name):
    """Eight images: three processes with micro-batches of two take two, two and one of them a step."""
    assert_close_runs(alone, more_runs / name)


@pytest.mark.slow
def test_shares_that_differ_in_bfloat16(more_runs):
    """A batch of another size takes other kernels, whose roundings in bfloat16 differ by up to 2**-8."""
    for a, b in zip(lines(more_runs / "bf16, 1"), lines(more_runs / "bf16, 3"), strict=True):
        if a["kind"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=2**-8)


@pytest.mark.parametrize("processes", [(2, 1, 3), pytest.param((3, 1, 2, 5), marks=pytest.mark.slow)], ids=str)
def test_a_checkpoint_goes_on_with_other_numbers_of_processes(alone, tmp_path, processes):
    """All but the last number are stopped in the middle of an epoch."""
    *stopped, last = processes
    plan = [{"rank": 0, "step": step, "processes": number} for number, step in zip(stopped, (1, 3, 5), strict=False)]
    *killed, end = attempts(tmp_path / "run", [*plan, {"processes": last}])
    assert all(-signal.SIGKILL in result["statuses"] for result in killed), end["log"][-3000:]
    assert end["statuses"] == [0] * last, end["log"][-3000:]
    assert end["log"].count("going on from") == len(stopped)
    assert_close_runs(alone, tmp_path / "run")


@pytest.mark.slow
def test_killed_and_resumed_with_two_processes(two, tmp_path):
    plan = [{"operation": n} for n in (3, 6, 8, 13, 9, 21, 12, 30)] + [{"rank": 1, "step": 3}, {"seconds": 0.3}]
    results = attempts(tmp_path / "run", [*plan, None], processes=2)
    assert sum(-signal.SIGKILL in result["statuses"] for result in results) >= 4
    assert results[-1]["statuses"] == [0, 0], results[-1]["log"][-3000:]
    assert_same_runs(two, tmp_path / "run")


@pytest.mark.slow
def test_one_dead_process_stops_the_other_within_seconds(tmp_path):
    (result,) = attempts(tmp_path / "run", [{"rank": 1, "step": 3}], processes=2)
    assert result["statuses"][1] == -signal.SIGKILL
    assert result["statuses"][0] == 1
    assert result["last_after_first"] < 10


@pytest.mark.slow
def test_more_processes_than_images(tmp_path):
    (result,) = attempts(tmp_path / "run", [None], processes=3, batch=2)
    assert result["statuses"] == [1, 1, 1]
    assert "3 processes cannot share train.batch=2" in result["log"]
    assert "could not join" not in result["log"]
    assert not (tmp_path / "run").exists()


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


@pytest.mark.slow
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
        wait_for_checkpoint(folder, agent)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        printed, _ = agent.communicate(timeout=300)
    finally:
        agent.kill()
    assert agent.returncode == 0, printed[-15000:]
    assert "going on from" in printed
    assert_same_runs(two, tmp_path / "run")
    assert "torchrun --nproc_per_node=2 train.py" in (tmp_path / "run" / "report.md").read_text()


def own_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("train.py: ")]


@pytest.mark.slow
def test_an_error_that_all_ranks_have_is_one_line_before_the_launchers(tmp_path):
    preset = write_preset(tmp_path, batch=1)
    command = torchrun("--nproc_per_node=2", f"--master_port={free_port()}", "train.py", "--preset", str(preset))
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert line.startswith("train.py: error: rank 0 of 2: 2 processes cannot share train.batch=1, ")
    assert "Traceback" not in done.stderr.partition(line)[0]


BREAK_ONE = """
import os, sys
sys.argv = ["train.py", *sys.argv[1:]]
import train
if os.environ["RANK"] == "1":
    {patch}
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        (
            "import dmsa.data; dmsa.data.build = lambda *_: open('/nowhere/at-all')",
            "train.py: error: rank 1 of 3: [Errno 2] No such file or directory: '/nowhere/at-all'",
        ),
        (
            "from dmsa.training.task import Task; Task.prepare = lambda *_: open('/nowhere/at-all')",
            "train.py: error: rank 1 of 3: [Errno 2] No such file or directory: '/nowhere/at-all'",
        ),
    ],
    ids=["while the run is built", "in a step"],
)
def test_an_error_of_one_rank_is_one_line_with_its_number(tmp_path, patch, expected):
    script = tmp_path / "script.py"
    script.write_text(BREAK_ONE.format(patch=patch))
    preset = write_preset(tmp_path)
    command = torchrun("--nproc_per_node=3", f"--master_port={free_port()}", str(script), "--preset", str(preset))
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    mine = own_lines(done.stderr)
    assert mine[0] == expected
    assert all("rank 1 was not heard of" in line for line in mine[1:])
    assert "Traceback" not in done.stderr.partition(expected)[0]
    assert "nowhere" in done.stderr.partition(expected)[2], "the launcher knows the reason, too"


@pytest.mark.slow
def test_a_run_that_loses_a_host_for_good_goes_on_with_what_is_left(alone, tmp_path):
    """`--nnodes=1:2 --max-restarts`: one of two launchers is killed with its worker; the other one ends the run."""
    preset = write_preset(tmp_path)
    port = free_port()
    command = torchrun(
        "--nnodes=1:2",
        "--nproc_per_node=2",
        "--max-restarts=3",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_conf=last_call_timeout=5,join_timeout=60",
        "train.py",
        "--preset",
        str(preset),
    )
    start = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, **start)
    time.sleep(1)  # the first one holds the rendezvous
    second = subprocess.Popen(command, **start)
    folder = tmp_path / "run" / "checkpoints"
    try:
        wait_for_checkpoint(folder, first)
        workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for process in (second.pid, *map(int, workers)):
            os.kill(process, signal.SIGKILL)
        printed, _ = first.communicate(timeout=300)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 0, printed[-15000:]
    assert "going on from" in printed
    assert_close_runs(alone, tmp_path / "run")


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob("step-*.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_rank_that_gives_no_sign_of_life_is_named(tmp_path):
    """One process is stopped (SIGSTOP), as seen from the others of a host whose link is cut."""
    preset = write_preset(tmp_path, epochs=1000, step_timeout=4.0, alone_timeout=4.0)
    launch = {**ENVIRONMENT, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "train.py", "--preset", str(preset)],
            cwd=ROOT, env={**launch, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        wait_for_checkpoint(tmp_path / "run" / "checkpoints", ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        printed = {rank: ranks[rank].communicate(timeout=120)[1] for rank in (0, 2)}
        took = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))[-1]
    (line,) = own_lines(printed[0])
    assert line == (
        f"train.py: error: rank 0 of 3: rank 1 was not heard of for 4 s; the same command goes on from {newest}"
    )
    assert "not heard of" in own_lines(printed[2])[0]
    assert (ranks[0].returncode, ranks[2].returncode) == (1, 1)
    assert took < 60


def can_cut_links() -> bool:
    if not shutil.which("ip"):
        return False
    name = f"dmsa-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces with a link between them; returns a function that cuts it or mends it."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = tuple(f"dmsa-{os.getpid()}-{name}" for name in ("one", "two"))
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "one", "netns", names[0], "type", "veth", "peer", "name", "two", "netns", names[1])
        for number, (name, link) in enumerate(zip(names, ("one", "two"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield lambda state: ip("-n", names[0], "link", "set", "one", state)
    finally:
        for name in names:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.skipif(not can_cut_links(), reason="needs the right to make network namespaces")
def test_the_link_between_two_hosts_is_cut(two, two_hosts, tmp_path):
    """Both say so within seconds; with the link back, the same command ends with the same bits as one process group."""
    preset = write_preset(tmp_path, step_timeout=5.0, alone_timeout=5.0)

    def start(number: int, name: str, log: Path) -> subprocess.Popen:
        command = torchrun(
            "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29411",
            f"--rdzv_conf=is_host={int(number == 1)}", f"--local-addr=10.77.0.{number}", "train.py",
            "--preset", str(preset),
        )  # fmt: skip
        return subprocess.Popen(
            ["ip", "netns", "exec", f"dmsa-{os.getpid()}-{name}", *command],
            cwd=ROOT, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": name}, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    hosts = [start(1, "one", logs[0]), start(2, "two", logs[1])]
    wait_for_checkpoint(tmp_path / "run" / "checkpoints", hosts[0])
    two_hosts("down")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all("not heard of" in log.read_text() for log in logs):
        time.sleep(0.2)
    (one,), (other,) = (own_lines(log.read_text()) for log in logs)
    assert re.search(r"rank 0 of 2: rank 1 was not heard of for 5 s; the same command goes on from \S+step-\d+.pt", one)
    assert "rank 1 of 2: the host of rank 0 (10.77.0.1:" in other
    for host in hosts:
        host.kill()
        host.wait()
    two_hosts("up")
    hosts = [start(1, "one", logs[0]), start(2, "two", logs[1])]
    assert [host.wait(timeout=300) for host in hosts] == [0, 0], logs[0].read_text()[-3000:]
    assert "going on from" in logs[0].read_text()
    assert_same_runs(two, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "figures"),
    [
        ("formula", {"loss", "loss_class", "loss_patch", "loss_attention"}),
        ("dino", {"loss"}),
        ("distil", {"loss", "patch_cosine", "class_cosine"}),
        ("hybrid", {"loss", "whole_cosine", "moved_cosine", "loss_attention"}),
    ],
)
def test_pretraining_shares_its_batches(recipe, figures, photos, strong, tmp_path):
    options = f"--recipe {recipe} --steps 4 --batch 14 --size 48 --report-pictures 0 --log-every 1".split()
    options += [] if recipe == "formula" else ["--images", str(photos)]
    options += ["--teacher", strong["teacher"]] if recipe == "distil" else []
    options += ["--teacher-weights", strong["teacher_weights"]] if recipe in ("distil", "hybrid") else []
    options += ["--encoder", f"hybrid:{strong['teacher']}", "--size", "64"] if recipe == "hybrid" else []

    def run(processes):
        launcher = torchrun(f"--nproc_per_node={processes}", f"--master_port={free_port()}", "-m", "dmsa.cli")
        command = [*launcher, "pretrain", *options, "--out", str(tmp_path / str(processes))]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)

    runs = []
    for processes in (1, 3):
        done = run(processes)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(lines(tmp_path / str(processes)))
    assert len(runs[0]) == 4
    for one, three in zip(*runs, strict=True):
        assert figures <= set(one)
        for name in figures:
            assert three[name] == pytest.approx(one[name], abs=1e-3), name
    if recipe == "formula":
        assert "dmsa pretrain: rank 0 of 4: 4 processes cannot share batches of 3 images (batch=14" in run(4).stderr


class SlowStore:
    """A store whose answers take their time, as on a busy host."""

    def __init__(self):
        self.beats = []

    def clone(self):
        return self

    def set(self, key, value):
        time.sleep(0.3)
        self.beats.append((key, value))


def test_no_thread_of_the_watch_outlives_it():
    """One that returns from the store's C++ code while Python ends would abort the process after its work."""
    store = SlowStore()
    watch = distributed._Watch(store, str)
    watch.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "watch"]
    assert store.beats == [("beat/0", "1")]


def test_one_process_needs_no_process_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    value = torch.ones(2)
    assert distributed.all_reduce_sum(value) is value
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.broadcast_state(None) is None
    assert distributed.on_main(lambda: 3) == 3
    assert list(distributed.shard(5)) == [0, 1, 2, 3, 4]
    assert distributed.together(lambda: 4, main_first=True) == 4


def test_collectives_between_processes(tmp_path):
    script = textwrap.dedent(
        """
        import json, sys, time, torch
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
            order = d.together(lambda: time.sleep(0.3 * (1 - d.rank())) or time.monotonic(), main_first=True)
            found["after"] = d.gather_objects(order)
            def fail_second():
                if d.rank() == 1:
                    raise OSError("second")
            try:
                d.together(fail_second)
            except (OSError, RuntimeError) as error:
                found["together"] = f"{type(error).__name__}: {error}"
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
    assert found[1]["error"] == "ElsewhereError: rank 0 failed: ValueError: mine"
    assert found[0]["after"][0] < found[0]["after"][1]
    assert found[0]["together"] == "ElsewhereError: rank 1 failed: OSError: second"
    assert found[1]["together"] == "OSError: second"
