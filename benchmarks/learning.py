"""Why a score moves inside a run: variants of one run on `shapes`, trained side by side on the same batches.

    python -m benchmarks.learning transfgu dmsa dmsa:train.lr=3e-4 dmsa:answers=shuffled --seed 1000 --epochs 2

A variant is a method and any options of the configuration, joined by colons. `answers` replaces the pseudo labels:
`truth` by the true ones, `shuffled` by labels that are wrong as often and in the same way (the batch's confusion), but
independently from pixel to pixel. Data, frozen features and seeds are those of `train.py`; printed, every `--every`
steps, percent:

- mIoU and accuracy on the validation pictures, and the accuracy within 4 pixels of a border and elsewhere;
- pixels by kind of error: an object taken for background, background for an object, one object for another;
- `copied`: of the object pixels that a label gives to another object, those on which the student says the same, on the
  validation pictures (whose labels train nothing) and on the training pictures of the last steps, before each is
  trained on. What grows on both is learnt from the labels' rule, what grows on the second alone is learnt by heart.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.data import default_collate

from dmsa import data
from dmsa.config import Config, from_dict, load_preset, resolve_method, validate
from dmsa.data.classes import Classes
from dmsa.labels.cam import CAMS
from dmsa.labels.clustering import prepare_centroids
from dmsa.labels.fuse import pseudo_label
from dmsa.models.encoder import Encoder, build_encoder
from dmsa.random import mix, seed_everything
from dmsa.scoring.boundary import boundaries
from dmsa.scoring.metrics import IGNORE, Histogram, scores
from dmsa.scoring.table import columns
from dmsa.training.sampler import EpochBatches
from dmsa.training.setup import PRECISIONS, build_optimizer
from dmsa.training.task import Prepared, Task

ANSWERS = ("labels", "truth", "shuffled")
BORDER = 4
"""Pixels from a border that count as near it."""


def parse_variant(text: str, base: Config) -> tuple[Config, str]:
    """Return the configuration of `METHOD[:option=value]...` and whose answers the student learns (`ANSWERS`).

    Raises:
        ValueError: an unknown method, option or value.
    """
    method, *options = text.split(":")
    config = resolve_method(from_dict({"method": method}, source=text, base=base))
    answers = "labels"
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {option!r} is not option=value")
        if key == "answers":
            if value not in ANSWERS:
                raise ValueError(f"{text!r}: answers={value} is not one of {', '.join(ANSWERS)}")
            answers = value
            continue
        nested: object = yaml.safe_load(value)
        for name in reversed(key.split(".")):
            nested = {name: nested}
        config = from_dict(nested, source=text, base=config)
    validate(config)
    return config, answers


def share_features(encoder: Encoder) -> None:
    """Let `encoder.features` remember its last images, so that variants that see the same batch share its work."""
    compute, last = encoder.features, [None, None]

    def features(images: Tensor, *, output: bool = True):
        if last[0] is not images:
            last[:] = [images, compute(images)]
        return last[1]

    encoder.features = features


def token_labels(label: Tensor, grid: Sequence[int], classes: int) -> Tensor:
    """Return the most frequent class of every cell: int64 `[B, H, W]` to `[B, h, w]`."""
    shares = F.one_hot(label, classes).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(shares, tuple(grid)).argmax(1)


def shuffled(label: Tensor, truth: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return labels drawn pixel by pixel, with the frequencies that `label` has where `truth` is the same."""
    counts = torch.zeros(classes, classes)
    counts.index_put_((truth.flatten(), label.flatten()), torch.ones(()), accumulate=True)
    counts[counts.sum(1) == 0] = 1  # classes that do not occur
    return torch.multinomial(counts[truth.flatten()], 1, generator=generator).view_as(truth)


def copied(prediction: Tensor, label: Tensor, truth: Tensor) -> Tensor:
    """Count, of the object pixels whose label is another object, those predicted as the label says, and all: `[2]`."""
    wrong = (label != truth) & (label > 0) & (truth > 0)
    return torch.stack([((prediction == label) & wrong).sum(), wrong.sum()])


class Student:
    """One variant: task, optimiser, and what it copies of the labels it is trained on."""

    def __init__(self, name: str, config: Config, answers: str, encoder: Encoder, centroids: Tensor, val: Validation):
        seed_everything(config.train.seed)
        self.name, self.config, self.answers = name, config, answers
        self.task = Task(config, val.classes, encoder, centroids)
        self.optimizer = build_optimizer(self.task.student, config)
        self.precision = PRECISIONS[config.train.precision]
        self.val_labels, self.of_class = val.labels(self.task)
        self.copied = torch.zeros(2, dtype=torch.int64)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32)

    def predict(self, attended, epoch: int, size: Sequence[int]) -> Tensor:
        with torch.no_grad(), self.autocast():
            rates = self.task.eval_rates(epoch, attended.grid)
            logits = self.task.student(None, rates, frozen=attended)["logits"].float()
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False).argmax(1)

    def step(self, batch: dict[str, Tensor], epoch: int, number: int) -> None:
        """Do one optimiser step, as `dmsa.training.trainer` does."""
        with self.autocast():
            prepared = self.task.prepare(batch, epoch, number)
        label = prepared.label
        truth = self.of_class[token_labels(batch["label"], label.shape[-2:], len(self.of_class))]
        self.task.student.eval()
        self.copied += copied(self.predict(prepared.attended, epoch, label.shape[-2:]), label, truth)
        self.task.student.train()
        if self.answers != "labels":
            generator = torch.Generator().manual_seed(mix(self.config.train.seed, number))
            drawn = truth if self.answers == "truth" else shuffled(label, truth, len(self.of_class), generator)
            prepared = relabelled(prepared, drawn)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.task.losses(prepared, prepared.counts, epoch)
        losses["total"].backward()
        nn.utils.clip_grad_value_(self.task.student.parameters(), self.config.train.clip_value)
        self.optimizer.step()
        self.task.teacher.after_step()


def relabelled(prepared: Prepared, label: Tensor) -> Prepared:
    """Return `prepared` with other labels (of a data set of things), and the counts that belong to them."""
    counts = prepared.counts.clone()
    counts[1], counts[2] = (label == 0).sum(), (label != 0).sum()
    return dataclasses.replace(prepared, label=label, counts=counts)


class Validation:
    """The validation pictures: features, labels, where borders are."""

    def __init__(self, dataset: data.SegmentationData, encoder: Encoder, batch: int = 16) -> None:
        self.classes = Classes.of(dataset)
        self.parts = []
        for start in range(0, len(dataset), batch):
            samples = default_collate([dataset[i] for i in range(start, min(start + batch, len(dataset)))])
            near = F.max_pool2d(boundaries(samples["label"])[:, None].float(), 2 * BORDER + 1, 1, BORDER)[:, 0] > 0
            self.parts.append((encoder.features(samples["image"]), samples, near))

    @torch.no_grad()
    def labels(self, task: Task) -> tuple[list[Tensor], Tensor]:
        """Return the labels that the maps alone give, and the id that stands for every class in them."""
        made, histogram = [], Histogram(self.classes.num_classes)
        for attended, samples, _ in self.parts:
            cam = CAMS[task.config.labels.cam](task.encoder, attended, task.centroids)
            label = pseudo_label(cam, None, samples["guide"], self.classes.things_only, task.config.labels).label
            histogram.update(label, token_labels(samples["label"], label.shape[-2:], self.classes.num_classes))
            made.append(label)
        return made, torch.from_numpy(scores(histogram.counts).assignment)

    def measure(self, student: Student, epoch: int) -> dict[str, float]:
        """Return what is printed of a student, percent."""
        student.task.student.eval()
        k = self.classes.num_classes
        all_pixels, near_border, elsewhere = Histogram(k), Histogram(k), Histogram(k)
        repeated = torch.zeros(2, dtype=torch.int64)
        for (attended, samples, near), label in zip(self.parts, student.val_labels, strict=True):
            truth = samples["label"]
            predicted = student.predict(attended, epoch, truth.shape[-2:])
            all_pixels.update(predicted, truth)
            near_border.update(predicted, truth.where(near, IGNORE))
            elsewhere.update(predicted, truth.where(~near, IGNORE))
            coarse = student.of_class[token_labels(truth, label.shape[-2:], k)]
            repeated += copied(student.predict(attended, epoch, label.shape[-2:]), label, coarse)
        found = scores(all_pixels.counts)
        confusion, total = found.confusion, found.confusion.sum()
        objects = confusion[1:, 1:]

        def accuracy(histogram: Histogram) -> float:
            counts = histogram.counts[:, found.assignment]
            return 100 * float(np.trace(counts)) / max(counts.sum(), 1)

        def share(counts: Tensor) -> float:
            return 100 * int(counts[0]) / max(int(counts[1]), 1)

        measured = {
            "miou": 100 * found.miou,
            "accuracy": 100 * found.accuracy,
            "near borders": accuracy(near_border),
            "elsewhere": accuracy(elsewhere),
            "lost": 100 * confusion[1:, 0].sum() / total,
            "invented": 100 * confusion[0, 1:].sum() / total,
            "mixed up": 100 * (objects.sum() - np.trace(objects)) / total,
            "copied val": share(repeated),
            "copied train": share(student.copied),
        }
        student.copied.zero_()
        return measured


def learn(
    variants: Sequence[str], base: Config, *, every: int, cache: str | Path
) -> Iterator[tuple[str, int, int, dict[str, float]]]:
    """Train all variants side by side; yield name, epoch (from 1), step and figures, every `every` steps.

    Args:
        variants: see `parse_variant`.
        base: seed, epochs and data of all of them; a data set of things with labels on its training images.
        every: steps between measurements.
        cache: folder of feature bank and centroids.
    """
    configs = {text: parse_variant(text, base) for text in variants}
    train_data, val_data = (data.build(base.data, split, base.train.seed) for split in ("train", "val"))
    seed_everything(base.train.seed)
    encoder = build_encoder(base.model.encoder, base.model.weights)
    centroids = prepare_centroids(encoder, train_data, base, cache).vectors
    val = Validation(val_data, encoder)
    share_features(encoder)
    students = [Student(text, *parsed, encoder, centroids, val) for text, parsed in configs.items()]
    sampler = EpochBatches(len(train_data), base.train.batch, seed=base.train.seed)
    step = 0
    for epoch in range(base.train.epochs):
        for student in students:
            student.task.start_epoch(epoch)
        train_data.set_epoch(epoch)
        sampler.set_epoch(epoch)
        for indices in sampler:
            batch = default_collate([train_data[index] for index in indices])
            for student in students:
                student.step(batch, epoch, step)
            step += 1
            if step % every == 0:
                for student in students:
                    yield student.name, epoch + 1, step, val.measure(student, epoch)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", nargs="+", help="METHOD[:option=value]...")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=16, help="steps between measurements")
    parser.add_argument("--images", type=int, help="training pictures; the preset's number if unset")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--csv", type=Path, help="also append the rows to this file")
    options = parser.parse_args(argv)
    base = load_preset("shapes")
    changed = dataclasses.replace(
        base.train, seed=options.seed, epochs=options.epochs, precision=options.precision, baselines=False
    )
    pictures = dataclasses.replace(base.data, train_images=options.images or base.data.train_images)
    base = dataclasses.replace(base, train=changed, data=pictures)
    table: list[list[str]] = []
    try:
        with tempfile.TemporaryDirectory() as cache:
            for name, epoch, step, found in learn(options.variants, base, every=options.every, cache=cache):
                table = table or [["variant", "epoch", "step", *found]]
                table.append([name, str(epoch), str(step), *(f"{value:.1f}" for value in found.values())])
                print(" ".join(f"{key} {value}" for key, value in zip(table[0], table[-1], strict=True)), flush=True)
                if options.csv:
                    with options.csv.open("a", newline="", encoding="utf-8") as stream:
                        csv.writer(stream, lineterminator="\n").writerow([options.seed, *table[-1]])
    except ValueError as error:
        print(f"benchmarks.learning: {error}", file=sys.stderr)
        return 2
    print("\n".join(["", *columns(table)]) if table else "no measurement: fewer steps than --every")
    return 0


if __name__ == "__main__":
    sys.exit(main())
