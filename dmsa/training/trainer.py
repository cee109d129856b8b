"""The training loop: one process or many, interrupted or not, the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dmsa import checkpoint, data, distributed
from dmsa.checkpoint import Checkpoints
from dmsa.config import Config, to_dict
from dmsa.data.classes import Classes
from dmsa.data.listing import few
from dmsa.files import write_atomically
from dmsa.labels.cache import image_count
from dmsa.labels.clustering import prepare_centroids
from dmsa.models.encoder import build_encoder, fingerprint
from dmsa.random import mix, seed_everything
from dmsa.scoring.evaluate import evaluate
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.refined import refined, remarks
from dmsa.training.nonfinite import stop_nonfinite
from dmsa.training.progress import MetricsLog, Progress, git_commit, say
from dmsa.training.report import CURVE, draw_panels, draw_scores, report_text
from dmsa.training.run import NotScoredError, RunFolder, commits, launch_command
from dmsa.training.sampler import EpochBatches
from dmsa.training.setup import PRECISIONS, build_optimizer, check_sizes, set_up_torch
from dmsa.training.task import LOSSES, Task, label_counts, split_batch
from dmsa.training.window import WATCHED, Window
from dmsa.visualize import png_bytes

ACTIVE_SHARE = 0.001
"""A class counts as active if it has at least this share of the labels."""


@dataclasses.dataclass
class State:
    """Where a run is."""

    epoch: int = 0
    """Epoch to go on with."""
    position: int = 0
    """Steps already done in it."""
    step: int = 0
    """Steps done in all."""
    trained_epoch: int = 0
    """Epoch the weights were last trained in; its rates are the ones to evaluate with."""
    unscored: bool = False
    """Whether that epoch is done but not evaluated yet."""
    scores: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One entry an evaluation."""
    best: dict[str, Any] | None = None
    """The entry with the highest mIoU."""
    assignment: list[int] | None = None
    """Predicted id that stands for every class, from the last evaluation."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Training images that could not be decoded, as far as they are logged."""


class Trainer:
    """A run: what it consists of is built here, `run` drives it."""

    def __init__(self, config: Config, device: torch.device, argv: list[str]) -> None:
        self.config, self.device, self.argv = config, device, argv
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.folder: RunFolder | None = None
        self.state = State()
        set_up_torch(config)

        distributed.together(self._build_data)
        self.store = Checkpoints(Path(config.out) / "checkpoints", config.train.keep_checkpoints)
        found = self._find_checkpoint()
        seed_everything(config.train.seed)
        distributed.together(self._build_encoder, main_first=True)
        distributed.on_main(lambda: self._open_folder(found))
        self.centroids = self._centroids(found)
        # The bank may come from a cache: what is drawn from here on must not depend on that.
        seed_everything(config.train.seed)
        keep_bytes = distributed.together(lambda: self._build_task(found))
        if self.world_size > 1:
            # The pyramid's 1x1 weights have another layout of the same memory than the reducer's buffer.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.task.forward = nn.parallel.DistributedDataParallel(self.task.student)
        self.log = MetricsLog(config.out, keep_bytes=keep_bytes, step=self.state.step)
        self.window = Window(self.classes.num_classes, device)
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._last_save = time.monotonic()

    # Building the parts

    def _build_data(self) -> None:
        config = self.config
        self.train_data = data.build(config.data, "train", config.train.seed)
        self.train_data.with_labels = False  # training is unsupervised: a broken label must not stop it
        self.val_data = data.build(config.data, "val", config.train.seed)
        for note in dict.fromkeys([*self.train_data.left_out, *self.val_data.left_out]):
            say(note)
        self.classes = Classes.of(self.train_data)
        self.sampler = EpochBatches(
            len(self.train_data),
            config.train.batch,
            seed=config.train.seed,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _build_encoder(self) -> None:
        self.encoder = build_encoder(self.config.model.encoder, self.config.model.weights).to(self.device)
        check_sizes(self.config, self.encoder)
        self.encoder_hash = fingerprint(self.encoder)

    def _build_task(self, found: Mapping[str, Any] | None) -> int:
        """Build what is trained, in the state of a checkpoint if one was found; return the length of metrics.jsonl."""
        config, kind = self.config, self.device.type
        self.task = Task(config, self.classes, self.encoder, self.centroids["vectors"])
        self.optimizer = build_optimizer(self.task.student, config)
        precision = PRECISIONS[config.train.precision]
        self.autocast = functools.partial(torch.autocast, kind, dtype=precision, enabled=precision != torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=precision == torch.float16)
        keep_bytes = 0 if found is None else self._restore(found)
        if config.train.compile:
            self.encoder.compile_frozen()
            self.task.student.decoder.compile()
        return keep_bytes

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """Return the newest checkpoint, read and checked by rank 0, in every process; None if there is none."""
        found = None

        def read() -> None:
            nonlocal found
            path = self.store.newest()
            if path is not None:
                found = checkpoint.load(path)
                checkpoint.check_config(found, self.config, path)

        distributed.on_main(read)
        return distributed.broadcast_state(found)

    def _open_folder(self, found: Mapping[str, Any] | None) -> None:
        self.folder = RunFolder(self.config.out)
        self.folder.write_config(self.config)
        if found is None or found["epoch"] < self.config.train.epochs:
            self.folder.add_commit(git_commit(), begins=found is None)

    def _centroids(self, found: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the centroids `vectors` and their provenance, from the checkpoint or made from the training images."""
        if found is not None:
            return found["centroids"]
        cache = Path(self.config.out) / "cache"
        say(f"class centroids: made from the training images before the first epoch, kept in {cache}")
        made = prepare_centroids(self.encoder, self.train_data, self.config, cache)
        return {
            "vectors": made.vectors,
            "n_things": made.n_things,
            "n_stuff": made.n_stuff,
            "provenance": json.dumps(made.provenance, sort_keys=True),
        }

    def _restore(self, found: Mapping[str, Any]) -> int:
        """Put everything into the state of a checkpoint; return the length of metrics.jsonl then."""
        if found["encoder"] != self.encoder_hash:
            raise ValueError(
                f"{self.store.newest()} was trained on other encoder weights than those that "
                f"model.encoder={self.config.model.encoder}, model.weights={self.config.model.weights} give now "
                f"(SHA-256 {found['encoder'][:12]} then, {self.encoder_hash[:12]} now)"
            )
        if found["dataset"]["classes"] != list(self.classes.classes):
            raise ValueError(
                f"{self.store.newest()} was trained on {len(found['dataset']['classes'])} classes "
                f"({', '.join(found['dataset']['classes'][:5])}, ...), data.root={self.config.data.root} has "
                f"{self.classes.num_classes} ({', '.join(self.classes.classes[:5])}, ...)"
            )
        self.task.student.load_trainable_state(found["student"])
        self.task.teacher.load_state_dict({**found["teacher"], "initial": found["initial"]})
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        self.state = State(**{field.name: found[field.name] for field in dataclasses.fields(State)})
        if found["skipped_images"]:
            self.train_data.remember_skipped(found["skipped_images"])
        newest = self.store.newest()
        if distributed.is_main() and newest and self.state.best and self.state.best["step"] == self.state.step:
            # The process may have died between writing this checkpoint and marking it as the best.
            self.store.mark_best(newest)
        say(f"going on from {newest}: epoch {self.state.epoch + 1}, step {self.state.step}")
        return found["metrics_bytes"]

    # Driving

    def run(self) -> dict[str, Any]:
        """Train to the last epoch, evaluating and reporting; return what `dmsa.training.session.train` returns."""
        config, state = self.config, self.state
        if state.epoch >= config.train.epochs:
            say(f"{config.out} has all {config.train.epochs} epochs; --train.epochs or another --out trains more")
        total = config.train.epochs * self.sampler.steps * config.train.batch
        self.progress = Progress(total, state.step * config.train.batch)
        try:
            while state.unscored or state.epoch < config.train.epochs:
                if not state.unscored:
                    self._train_epoch()
                    self._end_epoch()
                self._score_epoch()
        finally:
            self.progress.close()
        return {"scores": state.scores, "best": state.best, "folder": Path(config.out), "steps": state.step}

    def _train_epoch(self) -> None:
        state, config = self.state, self.config
        if self.task.start_epoch(state.epoch) and state.position == 0:
            say(f"epoch {state.epoch + 1}: the teacher takes over the student, which starts again")
        self.progress.epoch(state.epoch, config.train.epochs)
        self.train_data.set_epoch(state.epoch)
        self.sampler.set_epoch(state.epoch, state.position)
        self.task.student.train()
        state.trained_epoch = state.epoch
        for batch in self._batches():
            self.window.add(state.step, *self._step(batch))
            state.step += 1
            state.position += 1
            self.progress.advance(config.train.batch)
            last = state.position == self.sampler.steps
            if last or state.step % config.train.log_every == 0:
                save = self._log_window()
                if save and not last:
                    self._save()
            distributed.expect(config.train.step_timeout)

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield this process's part of every batch of the rest of the epoch, on its device."""
        loader = DataLoader(
            self.train_data,
            batch_sampler=self.sampler,
            num_workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
            # A loader draws a seed for its workers; taken from here it leaves the run's generators alone.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield {
                key: value.to(self.device, non_blocking=True) if key in ("image", "guide") else value
                for key, value in batch.items()
                if key != "label"
            }

    def _step(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Do one optimiser step; return this process's share of what is watched and its label counts, on the device."""
        epoch, step = self.state.epoch, self.state.step
        seed_everything(mix(self.config.train.seed, step))
        with self.autocast():
            parts = [self.task.prepare(part, epoch, step) for part in split_batch(batch, self.config.train.micro_batch)]
        counts = distributed.all_reduce_sum(torch.stack([part.counts for part in parts]).sum(0))
        self.optimizer.zero_grad(set_to_none=True)
        watched = torch.zeros(len(WATCHED), dtype=torch.float64, device=self.device)
        for number, part in enumerate(parts):
            with self._synchronised(number == len(parts) - 1):
                with self.autocast():
                    losses = self.task.losses(part, counts, epoch)
                # The wrapper averages over processes, the shares are to be added up.
                self.scaler.scale(losses["total"] * self.world_size).backward()
            watched[:-1] += torch.stack([losses[name].detach() for name in WATCHED[:-1]]).double()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.task.student.parameters() if p.grad is not None]
        # Loss scaling lets gradients overflow now and then and skips such a step by itself.
        if not self.scaler.is_enabled():
            watched[-1] = nn.utils.get_total_norm(gradients).double() / self.world_size
        nn.utils.clip_grad_value_(self.task.student.parameters(), self.config.train.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.task.teacher.after_step()
        return watched, label_counts(parts, self.classes.num_classes)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Average the gradients over processes in the last part's backward pass only."""
        wrapped = self.task.forward
        if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return contextlib.nullcontext()

    def _log_window(self) -> bool:
        """Read the window back, check and log it; return whether a checkpoint is due. The only wait for the device."""
        minutes = (time.monotonic() - self._last_save) / 60
        due = distributed.is_main() and minutes >= self.config.train.checkpoint_minutes
        means, labels, due, broken = self.window.read(due)
        if broken:
            stop_nonfinite(
                self.window.first_broken(),
                self._remake,
                Path(self.config.out) / "nonfinite",
                epoch=self.state.epoch,
                newest=self.store.newest(),
            )
        if self._launcher not in (None, os.getppid()):
            # A launcher killed with SIGKILL stops nobody, and its processes would hold the run folder.
            raise RuntimeError(
                f"torchrun (process {self._launcher}) is gone, and so this process stops; the same command goes on "
                f"from {self.store.newest() or 'the beginning'}"
            )
        share = labels / max(labels.sum(), 1)
        entropy = max(0.0, float(-(share[share > 0] * np.log(share[share > 0])).sum()))
        active = int((share >= ACTIVE_SHARE).sum())
        self.log.write(
            "train",
            self.state.step,
            {
                "epoch": self.state.epoch,
                "loss": {name: means[name] for name in (*LOSSES, "total")},
                "gradient_norm": means["gradient"],
                "label_entropy": entropy,
                "active_classes": active,
            },
        )
        self.log.speed(self.state.step, self.progress.rate())
        self.progress.losses(
            {name: means[name] for name in (*LOSSES, "total")}, entropy, f"{active}/{self.classes.num_classes}"
        )
        return due

    def _remake(self, step: int) -> dict[str, Any]:
        """Return this process's part of an earlier batch: samples depend on seed, epoch and index alone."""
        self.sampler.set_epoch(self.state.epoch, self.state.position - (self.state.step - step))
        return default_collate([self.train_data[index] for index in next(iter(self.sampler))])

    def _end_epoch(self) -> None:
        state, config = self.state, self.config
        epoch = state.epoch
        distributed.expect(config.train.alone_timeout)
        state.epoch, state.position = epoch + 1, 0
        self._log_skipped(epoch)
        # The checkpoint comes first: an evaluation that fails, or is interrupted, costs no training.
        state.unscored = (epoch + 1) % config.train.eval_every == 0 or epoch + 1 == config.train.epochs
        self._save()

    def _score_epoch(self) -> None:
        """Evaluate the epoch that ended last if that is due, and keep the scores; the report is written in any case."""
        if self.state.unscored:
            try:
                improved = self._evaluate(self.state.trained_epoch)
            except ValueError as error:
                raise NotScoredError(
                    f"epoch {self.state.epoch} is trained but cannot be scored: {error}. It is kept in "
                    f"{self.store.path(self.state.step)}; mend the data and start the same command again"
                ) from error
            self.state.unscored = False
            self._save(best=improved)
        self.report()

    def _skipped(self) -> list[str]:
        """Return the training images that no process could decode, in every process."""
        own = self.train_data.skipped() if hasattr(self.train_data, "skipped") else []
        return sorted(set().union(*distributed.gather_objects(own)))

    def _log_skipped(self, epoch: int) -> None:
        """Log which training images turned out to be damaged in this epoch, if any did."""
        found = self._skipped()
        new = sorted(set(found) - set(self.state.skipped))
        if new:
            self.state.skipped = found
            self.log.write("skipped", self.state.step, {"epoch": epoch, "images": len(found), "new": new})
            say(
                f"epoch {epoch + 1}: {len(found)} of {image_count(self.train_data)} training images cannot be decoded, "
                f"others take their places: {few(new)}"
            )

    def _evaluate(self, epoch: int) -> bool:
        """Score the student, or its average, and draw panels; return whether it is the best so far."""
        config, state = self.config, self.state
        improved = False
        network = self.task.scored.eval()
        if getattr(self.val_data, "labels_from", "the data set") is not None:

            def predict(images: Tensor) -> Tensor:
                images = images.to(self.device, non_blocking=True)
                rates = self.task.eval_rates(epoch, self.encoder.grid(images))
                with self.autocast():
                    logits = network(images, rates)["logits"]
                return refined(logits, images, config)

            protocol = Protocol("transfgu", config.data.size)
            how: dict[str, Any] = {
                "batch": self._eval_batch(),
                "workers": config.data.workers,
                "remarks": remarks(config),
            }
            report = evaluate(predict, self.val_data, protocol, **how)
            entry = {"epoch": epoch, "step": state.step, **report.entry()}
            state.scores.append(entry)
            state.assignment = entry["assignment"]
            improved = state.best is None or entry["miou"] > state.best["miou"]
            if improved:
                state.best = entry
            shown = ("epoch", "miou", "accuracy", "things", "stuff", "images")
            named = dict(zip(self.classes.classes, entry["iou"], strict=True))
            self.log.write("eval", state.step, {**{key: entry[key] for key in shown}, "iou": named})
            say(
                f"epoch {epoch + 1}/{config.train.epochs}: mIoU {100 * entry['miou']:.2f}, "
                f"accuracy {100 * entry['accuracy']:.2f} ({'; '.join([report.conditions, *entry['notes']])})"
            )
        else:
            say(f"epoch {epoch + 1}/{config.train.epochs}: no score, the validation images have no labels")
        if self.folder is not None and config.train.panels:
            count = min(config.train.panels, len(self.val_data))
            indices = [i * len(self.val_data) // count for i in range(count)]
            picture = draw_panels(self.task, self.val_data, indices, epoch, state.assignment)
            path = self.folder.panels / f"epoch-{epoch + 1:04d}.png"
            write_atomically(path, lambda stream: stream.write(png_bytes(picture)))
            self.log.picture(state.step, np.asarray(picture))
        return improved

    def _eval_batch(self) -> int:
        """Images of a forward pass in evaluation: as many pixels as one in training, 16 at most."""
        share = self.config.train.micro_batch or max(1, self.config.train.batch // self.world_size)
        return max(1, min(16, share * self.config.data.crop**2 // self.config.data.size**2))

    def report(self, baselines: Sequence[Mapping[str, Any]] = ()) -> Path | None:
        """Write report.md, with the rows of `baselines` beside the run's own; return its path on rank 0."""
        if self.folder is None:
            return None
        panels = sorted(path.name for path in self.folder.panels.glob("epoch-*.png"))
        text = report_text(
            self.config,
            self.classes,
            scores=self.state.scores,
            best=self.state.best,
            baselines=baselines,
            command=launch_command(self.argv),
            commit=", ".join(commits(self.config.out)),
            panels=[f"panels/{name}" for name in panels[-1:]],
            finished=self.state.epoch >= self.config.train.epochs,
            images=self.train_data.images,
            damaged={
                "training": self.state.skipped,
                "feature bank": json.loads(self.centroids["provenance"]).get("skipped", []),
            },
        )
        if self.state.scores:
            write_atomically(self.folder.path / CURVE, lambda stream: draw_scores(self.state.scores, stream))
        return self.folder.write_text("report.md", text)

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint; every process takes part."""
        distributed.expect(self.config.train.alone_timeout)
        skipped = self._skipped()

        def write() -> None:
            path = self.store.save(self._snapshot(skipped))
            if best:
                self.store.mark_best(path)

        distributed.on_main(write)
        self._last_save = time.monotonic()

    def _snapshot(self, skipped: list[str]) -> dict[str, Any]:
        teacher = self.task.teacher.state_dict()
        initial = teacher.pop("initial")
        return {
            "version": checkpoint.VERSION,
            "config": to_dict(self.config),
            "dataset": self.classes.state_dict(),
            "encoder": self.encoder_hash,
            "student": self.task.student.trainable_state(),
            "teacher": teacher,
            "initial": initial,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **dataclasses.asdict(self.state),
            "skipped_images": skipped,
            "alpha_counter": self.task.teacher.epochs_since_snapshot,
            "rates": list(self.task.rates(self.state.trained_epoch, (1, 1))),
            "centroids": self.centroids,
            "metrics_bytes": self.log.position(),
        }

    def close(self) -> None:
        """Close files."""
        self.log.close()
        if self.folder is not None:
            self.folder.close()
