import dataclasses
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dmsa import checkpoint
from dmsa.config import Config, load_preset
from dmsa.data.classes import Classes
from dmsa.models.encoder import build_encoder
from dmsa.scoring.predictor import load_predictor
from dmsa.training import progress
from dmsa.training.losses import total_loss
from dmsa.training.nonfinite import NonFiniteLossError
from dmsa.training.run import NotScoredError, RunFolder, launch_command
from dmsa.training.session import train
from dmsa.training.task import Task
from dmsa.training.trainer import Trainer
from dmsa.training.window import Window
from tests.dmsa.runs import ROOT, assert_same_runs, attempts, lines, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what `train` returned."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(tiny_config(out), ["train.py", "--out", "run"])


def test_run_folder_holds_everything(finished):
    out, result = finished
    assert Config.from_yaml(out / "config.yaml") == tiny_config(out)
    assert (out / "commit.txt").read_text().strip()
    assert sorted(path.name for path in (out / "panels").iterdir()) == [f"epoch-000{n}.png" for n in (1, 2, 3)]
    assert list((out / "tensorboard").glob("events.*"))
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best.pt", "step-00000005.pt", "step-00000006.pt"]
    assert result["steps"] == 6
    assert len(result["scores"]) == 3
    assert result["best"]["miou"] == max(entry["miou"] for entry in result["scores"])


def test_metrics_name_every_loss_and_show_collapse(finished):
    written = lines(finished[0])
    assert [(line["kind"], line["step"]) for line in written] == [
        ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5), ("train", 6),
        ("eval", 6),
    ]  # fmt: skip
    for line in written:
        if line["kind"] == "train":
            assert set(line["loss"]) == {"seg", "ce", "un", "cls", "total"}
            assert all(np.isfinite(list(line["loss"].values())))
            assert 0 <= line["label_entropy"] <= np.log(7)
            assert 1 <= line["active_classes"] <= 7
        else:
            assert 0 <= line["miou"] <= line["accuracy"] <= 1


def test_checkpoint_is_complete(finished):
    path = finished[0] / "checkpoints" / "step-00000006.pt"
    state = torch.load(path, weights_only=True)
    assert {
        "config", "student", "teacher", "initial", "optimizer", "scaler", "epoch", "step", "alpha_counter",
        "rates", "centroids", "assignment", "best",
    } <= set(state)  # fmt: skip
    assert (state["epoch"], state["position"], state["step"]) == (3, 0, 6)
    assert state["trained_epoch"] == 2
    assert state["alpha_counter"] == 1
    assert state["rates"] == [1, 1, 3, 5]
    assert state["centroids"]["vectors"].shape == (6, 128)
    assert state["initial"].keys() == state["student"].keys() == state["teacher"]["model"].keys()


def test_report_shows_scores_deviations_and_command(finished):
    report = (finished[0] / "report.md").read_text()
    best = finished[1]["best"]
    assert "python train.py --out run" in report
    assert f"| {100 * best['miou']:.2f} | {100 * best['accuracy']:.2f} | transfgu |" in report
    assert "one Hungarian match over the set" in report
    assert "model.encoder: shapes_vit_tiny (paper: vit_small_patch8_224.dino)" in report
    assert "![epoch-0003](panels/epoch-0003.png)" in report
    assert "All 3 epochs are done" in report
    assert "![scores by epoch](scores.png)" in report
    assert Image.open(finished[0] / "scores.png").size[0] > 300


def test_report_prints_the_papers_rows():
    from dmsa.training.report import report_text

    config = load_preset("coco_stuff27")
    classes = Classes("coco_stuff27", ("a", "b"), np.zeros((2, 3), np.uint8), False, 1, 1)
    entry = {
        "epoch": 5, "step": 10, "miou": 0.1, "accuracy": 0.5, "things": 0.1, "stuff": 0.1, "iou": [0.2, float("nan")],
        "assignment": [1, 0], "images": 7, "protocol": "transfgu", "conditions": "c",
    }  # fmt: skip
    rows = [{"method": "k-means", "miou": 1.0, "accuracy": None, "protocol": "transfgu", "source": "here"}]
    text = report_text(
        config, classes, scores=[entry], best=entry, baselines=rows, command="x", commit="y", panels=[], finished=False
    )
    assert "| DMSA | 17.82 | 46.43 | transfgu |" in text
    assert "not comparable" not in text
    assert "| TransFGU | 16.19 | 44.52 |" in text
    assert "| dmsa (this run, best epoch) | 10.00 | 50.00 | transfgu | epoch 6, 7 images |" in text
    assert "| k-means | 1.00 | - | transfgu | here |" in text
    assert "None." in text
    assert "| b | - | 0 |" in text
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=32))
    text = report_text(
        config, classes, scores=[entry], best=entry, baselines=[], command="x", commit="y", panels=[], finished=False,
        images=223,
    )  # fmt: skip
    assert re.search(r"\| DMSA \| 17.82 \| 46.43 \| transfgu \| .*; not comparable \|", text)
    assert "The paper's rows are not comparable with this run's: 2 deviations" in text
    assert "- train.batch: 32 (paper: 256)" in text
    assert "- training images: 223 (paper: 118287)" in text


def test_a_finished_run_stays_finished(finished, capsys):
    out, result = finished
    before = (out / "metrics.jsonl").read_bytes()
    again = train(tiny_config(out), ["train.py"])
    assert again["scores"] == result["scores"]
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "has all 3 epochs" in capsys.readouterr().out


def test_more_epochs_go_on_as_if_never_stopped(finished, tmp_path):
    train(tiny_config(tmp_path / "run", epochs=2), ["train.py"])
    train(tiny_config(tmp_path / "run", epochs=3), ["train.py"])
    assert_same_runs(finished[0], tmp_path / "run")


def test_a_checkpoint_of_the_layout_before_is_read_and_goes_on(finished, tmp_path):
    """Layout 3 held generators and knew no epoch without a score; options that came later are at their defaults."""
    store = checkpoint.Checkpoints(finished[0] / "checkpoints")
    state = {**checkpoint.load(store.newest()), "version": 3, "rng": [{"torch": torch.get_rng_state()}]}
    del state["unscored"]
    del state["config"]["labels"]["par_resolution"], state["config"]["model"]["refine"]
    shutil.copytree(finished[0], tmp_path / "run")
    torch.save(state, tmp_path / "run" / "checkpoints" / store.newest().name)
    assert load_predictor(tmp_path / "run" / "checkpoints" / store.newest().name).step == 6
    result = train(tiny_config(tmp_path / "run", epochs=4), ["train.py"])
    assert result["steps"] == 8
    assert result["scores"][:3] == finished[1]["scores"]


@pytest.mark.parametrize("more", [0, pytest.param(16, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation_and_resumed(finished, tmp_path, more):
    """SIGKILL just before file operations of every kind: the bank, metrics, checkpoints half written, best, panels."""
    draw = random.Random(0)
    plan = [{"operation": n} for n in (4, 7, 9, *(draw.randrange(2, 45) for _ in range(more)))]
    plan += [{"seconds": draw.uniform(0.05, 0.8)} for _ in range(more // 4)]
    results = attempts(tmp_path / "run", [*plan, None])
    assert sum(result["statuses"] == [-9] for result in results) >= max(3, more // 2)
    assert results[-1]["statuses"] == [0]
    assert_same_runs(finished[0], tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*.tmp*"))


def test_accumulated_gradients_are_those_of_the_whole_batch(finished, tmp_path):
    train(tiny_config(tmp_path / "run", micro_batch=3), ["train.py"])
    for whole, parts in zip(lines(finished[0]), lines(tmp_path / "run"), strict=True):
        if whole["kind"] == "train":
            assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
            assert parts["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)


def test_command_line_runs_and_its_config_runs_again(finished, tmp_path):
    values = yaml.safe_load((finished[0] / "config.yaml").read_text())
    values["out"] = str(tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "train.py", "--preset", str(tmp_path / "mine.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr
    assert "report.md" in done.stdout
    assert f"python train.py --preset {tmp_path}/mine.yaml" in (tmp_path / "run" / "report.md").read_text()
    again = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(again) == values


def test_command_line_error_is_one_line():
    done = subprocess.run(
        [sys.executable, "train.py", "--preset", "vok"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: preset='vok' is neither a preset nor a YAML file")


def test_launch_command_names_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_command(["train.py", "--out", "a b"]) == "python train.py --out 'a b'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert launch_command(["train.py"]) == (
        "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --nproc_per_node=6 train.py"
    )


# What goes wrong


def test_changed_config_lists_the_keys_and_changes_nothing(finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="another configuration") as caught:
        train(tiny_config(out, lr=0.5, weight_decay=0.0), ["train.py"])
    assert "train.lr: 0.001 in the checkpoint, 0.5 now" in str(caught.value)
    assert "train.weight_decay" in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_truncated_checkpoint_is_reported_and_the_previous_one_works(tmp_path, finished):
    out = tmp_path / "run"
    train(tiny_config(out), ["train.py"])
    newest = out / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000006\.pt \(1000 bytes\) cannot be read.*step-00000005\.pt"):
        train(tiny_config(out), ["train.py"])
    newest.unlink()
    train(tiny_config(out), ["train.py"])
    assert_same_runs(finished[0], out)


def test_full_disk_while_training_keeps_the_previous_checkpoint(tmp_path, finished, monkeypatch):
    out = tmp_path / "run"
    save, calls = torch.save, []

    def full(state, stream):
        calls.append(1)
        if len(calls) == 5:  # after the first step, twice after the second, after the third, after the fourth
            stream.write(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, stream)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step-00000004\.pt: the disk is full.*step-00000003\.pt is intact"):
        train(tiny_config(out), ["train.py"])
    monkeypatch.undo()
    train(tiny_config(out), ["train.py"])
    assert_same_runs(finished[0], out)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("data", {"crop": 44}, "data.crop=44 is not a multiple of the patch size 8 of shapes_vit_tiny.*40 and 48"),
        ("data", {"size": 50}, "data.size=50 is not a multiple.*48 and 56"),
        ("model", {"decoder_heads": 5}, "model.decoder_heads=5 does not divide the width 128.*choose one of 1, 2, 4"),
        ("model", {"encoder": "vit_smal_patch8_224.dino"}, "did you mean vit_small_patch8_224.dino"),
    ],
)
def test_sizes_are_checked_before_the_feature_bank_and_before_anything_is_written(tmp_path, section, change, words):
    config = tiny_config(tmp_path / "run")
    part = dataclasses.replace(getattr(config, section), **change)
    with pytest.raises(ValueError, match=words):
        train(dataclasses.replace(config, **{section: part}), ["train.py"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "voc"], "data set 'voc' needs the folder of VOC 2012.*--data.root FOLDER"),
        (["--out", "{tmp}/file/run"], "cannot create .*choose another --out"),
        (["--out", "{tmp}/busy"], "another process is training in this folder"),
        (["--train.batch", "9999"], "train.batch=9999 is more than the 1024 training samples"),
    ],
)
def test_a_run_that_cannot_start_says_so_in_one_line(tmp_path, capsys, options, words):
    import train as script

    (tmp_path / "file").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from dmsa.training.run import RunFolder; f = RunFolder(sys.argv[1]);"
         "print(flush=True); sys.stdin.read()", str(tmp_path / "busy")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    status = script.main([word.format(tmp=tmp_path) for word in options])
    holder.communicate()
    printed = capsys.readouterr().err.strip()
    assert status == 2
    assert re.search(f"^train.py: error: .*{words}", printed)
    assert "Traceback" not in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("victim", ["metrics.jsonl", "tensorboard"])
def test_full_disk_while_logging_names_the_file(tmp_path, finished, monkeypatch, victim):
    out = tmp_path / "run"
    train(tiny_config(out, epochs=1), ["train.py"])
    log = progress.MetricsLog.write

    def full(self, kind, step, values):
        if step == 4:
            stream = open("/dev/full", "ab")  # noqa: SIM115 (the log closes it)
            if victim == "metrics.jsonl":
                self._stream = stream
            else:
                self._board.add_scalar = lambda *_: stream.write(b"x" * 100000)
        log(self, kind, step, values)

    monkeypatch.setattr(progress.MetricsLog, "write", full)
    with pytest.raises(OSError, match=rf"could not write \S*{victim}: the disk is full.*The checkpoints are intact"):
        train(tiny_config(out), ["train.py"])
    monkeypatch.undo()
    train(tiny_config(out), ["train.py"])
    assert_same_runs(finished[0], out)


def test_full_disk_while_building_the_bank_names_the_file(tmp_path, monkeypatch):
    def savez(stream, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match=r"could not write \S*part-000000.npz: the disk is full") as caught:
        train(tiny_config(tmp_path / "run"), ["train.py"])
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "run" / "cache").rglob("*.npz"))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out=.*choose another --out"):
        train(tiny_config(tmp_path / "file" / "run"), ["train.py"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"out=.*Permission denied.*choose another --out"):
        train(tiny_config(tmp_path / "run"), ["train.py"])


def test_two_runs_in_one_folder_are_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    script = textwrap.dedent(
        """
        import sys
        from dmsa.training.run import RunFolder
        try:
            RunFolder(sys.argv[1])
        except OSError as error:
            print(error)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "another process is training in this folder" in refused.stdout
    folder.close()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


def test_other_encoder_weights_are_refused(tmp_path):
    out = tmp_path / "run"
    train(tiny_config(out, epochs=1), ["train.py"])
    path = out / "checkpoints" / "step-00000002.pt"
    state = checkpoint.load(path)
    torch.save({**state, "encoder": "0" * 64}, path)
    with pytest.raises(ValueError, match="was trained on other encoder weights"):
        train(tiny_config(out), ["train.py"])


@pytest.mark.parametrize("name", ["ce", "gradient"])
def test_non_finite_value_stops_the_run_and_saves_the_batch(tmp_path, monkeypatch, name):
    losses = Task.losses

    def broken(self, prepared, counts, epoch):
        found = losses(self, prepared, counts, epoch)
        if epoch == 1:
            if name == "ce":
                found["ce"] = found["ce"] * float("nan")
            else:
                found["total"].register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(Task, "losses", broken)
    out = tmp_path / "run"
    with pytest.raises(
        NonFiniteLossError, match=rf"^{name} became (nan|inf) in step 2 \(epoch 2\) on rank 0"
    ) as caught:
        train(tiny_config(out, log_every=2), ["train.py"])
    assert "step-00000002.pt is intact" in str(caught.value)
    saved = torch.load(out / "nonfinite" / "step-00000002-rank0.pt", weights_only=True)
    assert saved["image"].shape == (8, 3, 48, 48)
    assert not np.isfinite(saved["losses"][name])
    assert saved["epoch"] == 1
    trainer = Trainer(tiny_config(tmp_path / "other", log_every=2), torch.device("cpu"), [])
    trainer.sampler.set_epoch(1)
    trainer.train_data.set_epoch(1)
    expected = next(iter(trainer._batches()))
    trainer.close()
    assert torch.equal(saved["index"], expected["index"])
    assert torch.equal(saved["image"], expected["image"])
    assert checkpoint.load(out / "checkpoints" / "step-00000002.pt")["step"] == 2


def test_non_finite_loss_is_named_although_the_disk_is_full(tmp_path, monkeypatch):
    losses = Task.losses

    def broken(self, prepared, counts, epoch):
        return {name: value * float("nan") for name, value in losses(self, prepared, counts, epoch).items()}

    def full(state, stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Task, "losses", broken)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NonFiniteLossError, match=r"became nan in step 0 .*could not be kept .*the disk is full"):
        train(tiny_config(tmp_path / "run"), ["train.py"])


def test_processes_without_their_launcher_stop(tmp_path, finished, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    parents = iter([7, 7, 7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    with pytest.raises(RuntimeError, match=r"torchrun \(process 7\) is gone.*goes on from .*step-00000003.pt"):
        train(tiny_config(tmp_path / "run"), ["train.py"])
    monkeypatch.undo()
    train(tiny_config(tmp_path / "run"), ["train.py"])
    assert_same_runs(finished[0], tmp_path / "run")


def test_interrupted_from_the_keyboard_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    import train as script

    def interrupted(self):
        raise KeyboardInterrupt

    (tmp_path / "preset.yaml").write_text(tiny_config(tmp_path / "run").to_yaml())
    monkeypatch.setattr(Trainer, "run", interrupted)
    assert script.main(["--preset", str(tmp_path / "preset.yaml")]) == 130
    assert "train.py: stopped; the same command begins again" in capsys.readouterr().err


def test_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch=17 is more than the 16 training samples"):
        train(tiny_config(tmp_path / "run", batch=17), ["train.py"])
    assert not (tmp_path / "run").exists()


# The step


@pytest.fixture
def trainer(tmp_path):
    built = Trainer(tiny_config(tmp_path / "run"), torch.device("cpu"), ["train.py"])
    yield built
    built.close()


class CountReads(TorchDispatchMode):
    """Counts how often a value is read back from a tensor, which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*arguments, **(options or {}))


def test_a_step_reads_nothing_back(trainer, monkeypatch):
    trainer.task.start_epoch(0)
    trainer.task.start_epoch(1)
    assert trainer.task.teacher.active
    batch = next(iter(trainer._batches()))
    # On the CPU Adam reads its own step counter, which lives there on every device.
    monkeypatch.setattr(trainer.scaler, "step", lambda optimizer: None)
    with CountReads() as reads:
        trainer.window.add(0, *trainer._step(batch))
    assert reads.count == 0
    with CountReads() as reads:
        bool(torch.ones(()))
    assert reads.count == 1


def test_losses_are_those_of_the_paper_for_a_whole_batch(trainer):
    task = trainer.task
    for epoch in (0, 1):
        task.start_epoch(epoch)
        batch = next(iter(trainer._batches()))
        prepared = task.prepare(batch, epoch, 5)
        got = task.losses(prepared, prepared.counts, epoch)
        rates = task.rates(epoch, prepared.attended.grid)
        expected = total_loss(
            task.student(None, rates, frozen=prepared.attended),
            prepared.label,
            prepared.foreground,
            trainer.config.losses,
            things_only=True,
            n_things=6,
            negative=prepared.negative,
            alpha=0.03 if epoch == 1 else 0.0,
        )
        assert (prepared.negative is None) == (epoch == 0)
        for name, value in expected.items():
            assert got[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_negative_labels_share_one_permutation_over_the_parts(trainer):
    task = trainer.task
    task.start_epoch(1)
    batch = next(iter(trainer._batches()))
    whole = task.prepare(batch, 1, 7).negative
    halves = [{key: batch[key][part] for key in ("image", "guide")} for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat([task.prepare(half, 1, 7).negative for half in halves]), whole)
    assert not torch.equal(task.prepare(batch, 1, 8).negative, whole)


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(tmp_path):
    base = tiny_config(tmp_path / "run")
    config = dataclasses.replace(base, labels=dataclasses.replace(base.labels, label_grid="tokens"))
    trainer = Trainer(config, torch.device("cpu"), ["train.py"])
    task = trainer.task
    batch = next(iter(trainer._batches()))
    prepared = task.prepare(batch, 0, 0)
    first = None
    for _ in range(80):
        losses = task.losses(prepared, prepared.counts, 0)
        first = first or losses["ce"].item()
        trainer.optimizer.zero_grad()
        losses["total"].backward()
        trainer.optimizer.step()
    assert losses["ce"].item() < 0.25 * first
    prediction = task.student(None, task.rates(0, (6, 6)), frozen=prepared.attended)["logits"].argmax(1)
    assert (prediction == prepared.label).double().mean() > 0.9
    trainer.close()


def test_pyramid_and_decoder_are_trained_and_the_encoder_is_not(finished):
    state = checkpoint.load(finished[0] / "checkpoints" / "best.pt")
    changed = {name for name in state["initial"] if not torch.equal(state["initial"][name], state["student"][name])}
    assert any(name.startswith("pyramid.aspp") for name in changed)
    assert any(name.startswith("decoder") for name in changed)
    assert not any(name.startswith("encoder") for name in state["student"])


def test_weight_decay_spares_biases_and_norms(trainer):
    decayed, spared = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 5e-4
    assert spared["weight_decay"] == 0.0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    names = {id(p): name for name, p in trainer.task.student.named_parameters()}
    assert {"pyramid.gamma", "decoder.norm.weight", "decoder.norm.bias"} <= {names[id(p)] for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(trainer.task.student.trainable_parameters())


def test_teacher_takes_over_at_its_epochs(tmp_path):
    trainer = Trainer(tiny_config(tmp_path / "run"), torch.device("cpu"), ["train.py"])
    task = trainer.task
    with torch.no_grad():
        task.student.pyramid.gamma.fill_(3.0)
    assert [task.start_epoch(epoch) for epoch in range(4)] == [False, True, False, True]
    assert task.student.pyramid.gamma == 0
    trainer.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_full(finished, tmp_path, precision):
    train(tiny_config(tmp_path / "run", precision=precision, epochs=1), ["train.py"])
    half, full = lines(tmp_path / "run"), lines(finished[0])
    for name, value in full[0]["loss"].items():
        assert half[0]["loss"][name] == pytest.approx(value, rel=0.1), name
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert all(value.dtype == torch.float32 for value in state["student"].values())
    assert ("scale" in state["scaler"]) == (precision == "fp16")


def test_refinement_stays_in_full_precision(tmp_path, monkeypatch):
    import dmsa_kernels

    trainer = Trainer(tiny_config(tmp_path / "run", precision="bf16"), torch.device("cpu"), ["train.py"])
    seen = []
    refine = dmsa_kernels.refine.refine

    def watch(image, masks, *arguments, **options):
        seen.append((image.dtype, masks.dtype))
        return refine(image, masks, *arguments, **options)

    monkeypatch.setattr(dmsa_kernels.refine, "refine", watch)
    trainer._step(next(iter(trainer._batches())))
    trainer.close()
    assert seen == [(torch.float32, torch.float32)]


def test_deterministic_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # set by the run, taken back with the test
    try:
        train(tiny_config(tmp_path / "run", deterministic=True, epochs=1), ["train.py"])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_run(tmp_path, monkeypatch):
    """What is compiled runs (without generating code, which takes a minute); its weights keep their names."""
    with torch.compiler.set_stance("force_eager"):
        train(tiny_config(tmp_path / "run", compile=True, epochs=1), ["train.py"])
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert not any("_orig_mod" in name for name in state["student"])


def test_baseline_method_switches_things_off(tmp_path):
    from dmsa.config import resolve_method

    config = resolve_method(dataclasses.replace(tiny_config(tmp_path / "run", epochs=1), method="transfgu"))
    train(config, ["train.py"])
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert not any(name.startswith("pyramid") for name in state["student"])
    assert "# TransFGU" in (tmp_path / "run" / "report.md").read_text()
    logged = lines(tmp_path / "run")[0]["loss"]
    weighted = logged["ce"] + 0.3 * logged["un"] + logged["cls"]
    assert logged["total"] == pytest.approx(weighted, rel=1e-6)


def test_window_adds_up_and_finds_the_first_broken_step():
    window = Window(3, torch.device("cpu"))
    window.add(4, torch.arange(6.0).double(), torch.tensor([1, 0, 2]))
    window.add(5, 3 * torch.arange(6.0).double(), torch.tensor([0, 0, 1]))
    means, labels, due, broken = window.read(True)
    assert means == {"seg": 0.0, "ce": 2.0, "un": 4.0, "cls": 6.0, "total": 8.0, "gradient": 10.0}
    assert labels.tolist() == [1, 0, 3]
    assert (due, broken) == (True, False)
    for step, value in ((6, 1.0), (7, float("nan")), (8, float("inf"))):
        window.add(step, torch.full((6,), value, dtype=torch.float64), torch.zeros(3))
    assert window.read(False)[2:] == (False, True)
    assert window.first_broken()["step"] == 7


def test_photographs_without_labels_train_without_scores(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        pixels = (rng.random((40, 56, 3)) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    base = tiny_config(tmp_path / "run", epochs=1)
    data = dataclasses.replace(
        base.data, name="folder", root=str(tmp_path / "photos"), classes=4, train_images=None, val_images=2
    )
    result = train(dataclasses.replace(base, data=data), ["train.py"])
    assert result["best"] is None
    assert "No scores" in (tmp_path / "run" / "report.md").read_text()
    printed = capsys.readouterr()
    assert "epoch 1/1: no score, the validation images have no labels" in printed.out
    assert re.search(r"total=\d+\.\d+, entropy=\d\.\d\d, active=\d/4", printed.err)
    assert (tmp_path / "run" / "panels" / "epoch-0001.png").is_file()
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()


def photographs(folder, masks, damaged=()):
    """Write twelve noise images with or without masks, some of them cut off in the middle."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(12):
            path = folder / "images" / split / f"{number:02d}.jpg"
            Image.fromarray((rng.random((40, 56, 3)) * 255).astype(np.uint8)).save(path)
            if masks:
                mask = np.full((40, 56), number % 4, dtype=np.uint8)
                Image.fromarray(mask).save(folder / "masks" / split / f"{number:02d}.png")
            if (split, number) in damaged:
                path.write_bytes(path.read_bytes()[:300])


def folder_config(out, root, **train_options):
    base = tiny_config(out, **train_options)
    data = dataclasses.replace(base.data, name="folder", root=str(root), classes=4, train_images=None, val_images=None)
    return dataclasses.replace(base, data=data, labels=dataclasses.replace(base.labels, bank_images=None))


@pytest.mark.filterwarnings("ignore:skipped", "ignore:feature bank")
def test_damaged_images_are_named_in_report_log_and_metrics(tmp_path, capsys):
    photographs(tmp_path / "data", masks=True, damaged={("train", 3), ("train", 7), ("val", 5)})
    train(folder_config(tmp_path / "run", tmp_path / "data", epochs=2, batch=12), ["train.py"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- training, 2 left out: 03, 07" in report
    assert re.search(r"- feature bank, 2 left out: cannot decode \S*03.jpg: .*, cannot decode \S*07.jpg: ", report)
    assert re.search(r"- 1 images could not be decoded and are not in the score: 05 \(cannot decode .*05.jpg", report)
    assert "epoch 1: 2 of 12 training images cannot be decoded, others take their places: 03, 07" in (
        printed := capsys.readouterr().out
    )
    assert "epoch 2: 2 of 12" not in printed
    assert "05 (cannot decode" in printed
    found = [line for line in lines(tmp_path / "run") if line["kind"] == "skipped"]
    assert found == [{"kind": "skipped", "step": 1, "epoch": 0, "images": 2, "new": ["03", "07"]}]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped", "ignore:feature bank")
def test_damaged_images_are_not_forgotten_by_a_run_that_goes_on(tmp_path, monkeypatch):
    photographs(tmp_path / "data", masks=True, damaged={("train", 3), ("train", 7)})
    one, two = (folder_config(tmp_path / name, tmp_path / "data", epochs=2, batch=4) for name in ("one", "two"))
    train(one, ["train.py"])
    steps, step = iter(range(2)), Trainer._step

    def stopped(self, batch):
        next(steps)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", stopped)  # StopIteration in the middle of the first epoch
    with pytest.raises(StopIteration):
        train(two, ["train.py"])
    monkeypatch.undo()
    train(two, ["train.py"])
    assert_same_runs(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "report.md").read_text() == (tmp_path / "one" / "report.md").read_text()


def test_a_bad_training_label_stops_no_run(tmp_path):
    photographs(tmp_path / "data", masks=True)
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nc\nd\n")
    Image.new("RGB", (56, 40)).save(tmp_path / "data" / "masks" / "train" / "03.png")
    train(folder_config(tmp_path / "run", tmp_path / "data", epochs=1, batch=12), ["train.py"])
    assert "All 1 epochs are done" in (tmp_path / "run" / "report.md").read_text()


def test_a_bad_validation_label_costs_no_epoch(tmp_path):
    """Stopped by it twice, then mended: the run ends as one that never met it."""
    photographs(tmp_path / "data", masks=True)
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nc\nd\n")
    one, two = (folder_config(tmp_path / name, tmp_path / "data", epochs=2, batch=12) for name in ("one", "two"))
    train(one, ["train.py"])
    mask = tmp_path / "data" / "masks" / "val" / "05.png"
    good = mask.read_bytes()
    Image.new("RGB", (56, 40)).save(mask)
    kept = tmp_path / "two" / "checkpoints" / "step-00000001.pt"
    for _ in range(2):
        with pytest.raises(
            NotScoredError, match=rf"epoch 1 is trained but cannot be scored: .*05\.png.* kept in {kept}"
        ):
            train(two, ["train.py"])
        assert checkpoint.load(kept)["unscored"]
        assert [line["kind"] for line in lines(tmp_path / "two")] == ["train"]
    mask.write_bytes(good)
    train(two, ["train.py"])
    assert_same_runs(tmp_path / "one", tmp_path / "two")


def test_encoder_may_be_any_vit_with_random_weights():
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", "random")
    assert encoder.embed_dim == 192
