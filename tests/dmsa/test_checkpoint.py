import errno
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from dmsa import checkpoint, files
from dmsa.config import Config, to_dict
from dmsa.random import mix
from dmsa.training.progress import MetricsLog
from dmsa.training.sampler import EpochBatches


def state(step=1, **changes):
    return {
        "version": checkpoint.VERSION,
        "config": to_dict(Config()),
        "dataset": {"name": "shapes"},
        "student": {"weight": torch.arange(4.0)},
        "optimizer": {},
        "epoch": 0,
        "step": step,
        **changes,
    }


def test_loads_with_weights_only(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    path = store.save(state())
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["student"]["weight"], torch.arange(4.0))


def test_keeps_the_last_and_the_best(tmp_path):
    store = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        path = store.save(state(step))
        if step == 2:
            store.mark_best(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best.pt", "step-00000003.pt", "step-00000004.pt"]
    assert checkpoint.load(store.best)["step"] == 2
    assert store.newest().name == "step-00000004.pt"
    store.mark_best(store.newest())
    assert checkpoint.load(store.best)["step"] == 4


def test_find_takes_a_file_a_run_folder_or_its_checkpoints(tmp_path):
    store = checkpoint.Checkpoints(tmp_path / "checkpoints")
    path = store.save(state(5))
    assert checkpoint.find(path) == path
    assert checkpoint.find(tmp_path) == path
    store.mark_best(path)
    assert checkpoint.find(tmp_path) == store.best
    assert checkpoint.find(tmp_path, prefer_best=False) == path
    with pytest.raises(FileNotFoundError, match=r"run folder of train\.py"):
        checkpoint.find(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped_tail"])
def test_damaged_file_is_named_and_the_previous_one_offered(tmp_path, damage):
    store = checkpoint.Checkpoints(tmp_path)
    store.save(state(1))
    path = store.save(state(2))
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "garbage": os.urandom(500),
            "flipped_tail": content[:-30] + bytes(30),
        }[damage]
    )
    with pytest.raises(ValueError, match="cannot be read") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "step-00000001.pt" in str(caught.value)
    assert checkpoint.load(tmp_path / "step-00000001.pt")["step"] == 1


def test_file_of_something_else(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of train\.py: it lacks config, student"):
        checkpoint.load(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="not a file"):
        checkpoint.load(tmp_path / "missing.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(state(student=Bomb()), tmp_path / "step-00000001.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "exploded").exists()


def test_changed_config_lists_the_keys():
    import dataclasses

    config = Config()
    now = dataclasses.replace(
        config,
        out="elsewhere",
        train=dataclasses.replace(config.train, lr=0.5, epochs=7),
        model=dataclasses.replace(config.model, aspp="neck"),
    )
    with pytest.raises(ValueError, match="another configuration") as caught:
        checkpoint.check_config(state(), now, "x.pt")
    message = str(caught.value)
    assert "train.lr: 0.0001 in the checkpoint, 0.5 now" in message
    assert "model.aspp: mhsa in the checkpoint, neck now" in message
    assert "epochs" not in message
    assert "out:" not in message
    checkpoint.check_config(state(), dataclasses.replace(config, out="elsewhere"), "x.pt")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A real failed write: the kernel refuses to let the file grow."""
    store = checkpoint.Checkpoints(tmp_path)
    store.save(state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"step-00000002\.pt.*step-00000001\.pt is intact") as caught:
            store.save(state(2, student={"weight": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert [item.name for item in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoint.load(store.newest())["step"] == 1


def test_no_space_left_says_so(tmp_path):
    def write(stream):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(OSError, match="the disk is full"):
        files.write_atomically(tmp_path / "file", write)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_other_errors_pass_through_and_clean_up(tmp_path):
    def write(stream):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        files.write_atomically(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not create"):
        checkpoint.Checkpoints(tmp_path / "file" / "checkpoints").save(state())


def test_killed_while_writing(tmp_path):
    """SIGKILL in the middle of writes: whatever is there afterwards is complete."""
    script = textwrap.dedent(
        """
        import sys, torch
        from dmsa.checkpoint import Checkpoints
        from tests.dmsa.test_checkpoint import state
        store = Checkpoints(sys.argv[1])
        step = 0
        while True:
            step += 1
            store.save(state(step, student={"weight": torch.full((300_000,), float(step))}))
            print(step, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "1\n"
        time.sleep(random.Random(0).uniform(0.05, 0.2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    store = checkpoint.Checkpoints(tmp_path)
    store.clean()
    assert {item.name[:5] for item in tmp_path.iterdir()} == {"step-"}
    for path in tmp_path.iterdir():
        loaded = checkpoint.load(path)
        assert torch.equal(loaded["student"]["weight"], torch.full((300_000,), float(loaded["step"])))


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 6])
def test_every_epoch_is_another_permutation_and_processes_share_it(processes):
    alone = EpochBatches(23, 6, seed=3)
    shares = [EpochBatches(23, 6, seed=3, rank=rank, world_size=processes) for rank in range(processes)]
    orders = []
    for epoch in (0, 1):
        for sampler in (alone, *shares):
            sampler.set_epoch(epoch)
        whole = list(alone)
        assert len(whole) == len(alone) == 3
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert [index for part in parts for index in part] == batch
            sizes = {len(part) for part in parts}
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1
        assert len({index for batch in whole for index in batch}) == 18
        orders.append(whole)
    assert orders[0] != orders[1]


def test_an_epoch_is_entered_in_its_middle():
    sampler = EpochBatches(20, 4, seed=1)
    sampler.set_epoch(5)
    whole = list(sampler)
    sampler.set_epoch(5, start=2)
    assert list(sampler) == whole[2:]
    assert len(sampler) == 3


def test_batches_that_cannot_be_shared():
    with pytest.raises(ValueError, match=r"3 processes cannot share train.batch=2.*start at most 2"):
        EpochBatches(100, 2, world_size=3)
    with pytest.raises(ValueError, match=r"train.batch=32 is more than the 10 training samples"):
        EpochBatches(10, 32)


def test_mixed_seeds_do_not_collide():
    assert len({mix(seed, number) for seed in range(60) for number in range(60)}) == 3600


def test_metrics_written_after_the_checkpoint_are_cut_off(tmp_path):
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": {"ce": 0.5}})
    position = log.position()
    log.write("train", 2, {"loss": {"ce": float("nan")}})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert path.read_text().splitlines()[1] == '{"kind": "train", "step": 2, "loss": {"ce": null}}'
    log = MetricsLog(tmp_path, keep_bytes=position, step=2)
    log.write("train", 2, {"loss": {"ce": 0.25}})
    log.close()
    assert path.read_text().splitlines() == [
        '{"kind": "train", "step": 1, "loss": {"ce": 0.5}}',
        '{"kind": "train", "step": 2, "loss": {"ce": 0.25}}',
    ]
    path.write_text("")
    with pytest.raises(ValueError, match="lines are missing"):
        MetricsLog(tmp_path, keep_bytes=position)


def test_a_configuration_that_contains_itself_is_refused():
    looped = state()
    looped["config"]["data"]["name"] = looped["config"]
    with pytest.raises(ValueError, match=r"x\.pt is damaged: its configuration contains itself"):
        checkpoint.check_config(looped, Config(), "x.pt")
