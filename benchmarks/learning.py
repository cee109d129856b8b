"""Why a score moves inside a run: variants of one run, trained side by side on the same batches.

    python -m benchmarks.learning transfgu dmsa dmsa:train.lr=3e-4 dmsa:answers=shuffled --seed 1000 --epochs 2
    python -m benchmarks.learning transfgu dmsa --refined --preset photographs.yaml --every 26

A variant is a method and any options of the configuration, joined by colons. `answers` replaces the pseudo labels:
`truth` by the true ones, `shuffled` by labels that are wrong as often and in the same way (the batch's confusion), but
independently from pixel to pixel. Data, frozen features and seeds are those of `train.py`. Printed, at step 0 of the
labels that the maps alone give (with `--clusters` also of k-means on the patch features), then every `--every` steps
of what is scored of the students (with `--refined`, with and without the refinement of predictions), percent, on the
validation pictures:

- mIoU, accuracy and boundary F-score; the mean IoU of the objects alone; the share of the pixels called background; how
  many classes have an IoU of 5 or more;
- the accuracy within 4 pixels of a border and elsewhere, and the wrong pixels of either, of all pixels;
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

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
from dmsa.scoring.baselines import cluster_patches, patch_features
from dmsa.scoring.boundary import BoundaryScore, boundaries
from dmsa.scoring.metrics import IGNORE, Histogram, scores
from dmsa.scoring.refined import refined
from dmsa.scoring.table import columns
from dmsa.training.sampler import EpochBatches
from dmsa.training.setup import PRECISIONS, build_optimizer
from dmsa.training.task import Prepared, Task

ANSWERS = ("labels", "truth", "shuffled")
SHARED = ("data.", "labels.bank_", "model.encoder", "model.weights", "train.seed", "train.epochs", "train.batch")
"""What variants cannot differ in: they see the same batches, features and centroids."""
BORDER = 4
"""Pixels from a border that count as near it."""
FOUND = 0.05
"""IoU from which on a class counts as found."""


def parse_variant(text: str, base: Config) -> tuple[Config, str]:
    """Return the configuration of `METHOD[:option=value]...` and whose answers the student learns (`ANSWERS`).

    Raises:
        ValueError: an unknown method, option or value, or an option that all variants share.
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
        if key.startswith(SHARED):
            raise ValueError(f"{text!r}: {key} is shared by all variants; set it in a preset")
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
    """Return the most frequent class of every cell, 255 where none is known: int64 `[B, H, W]` to `[B, h, w]`."""
    known = label != IGNORE
    shares = (F.one_hot(label.where(known, 0), classes) * known[..., None]).permute(0, 3, 1, 2).float()
    shares = F.adaptive_avg_pool2d(shares, tuple(grid))
    return shares.argmax(1).where(shares.amax(1) > 0, IGNORE)


def shuffled(label: Tensor, truth: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return labels drawn pixel by pixel, with the frequencies that `label` has where `truth` is the same.

    Where `truth` is 255, `label` stays.
    """
    known = truth != IGNORE
    counts = torch.zeros(classes, classes)
    counts.index_put_((truth[known], label[known]), torch.ones(()), accumulate=True)
    counts[counts.sum(1) == 0] = 1  # classes that do not occur
    rows = counts[truth.where(known, 0).flatten()]
    return torch.multinomial(rows, 1, generator=generator).view_as(truth).where(known, label)


def copied(prediction: Tensor, label: Tensor, truth: Tensor) -> Tensor:
    """Count, of the object pixels whose label is another object, those predicted as the label says, and all: `[2]`."""
    wrong = (label != truth) & (label > 0) & (truth > 0) & (truth != IGNORE)
    return torch.stack([((prediction == label) & wrong).sum(), wrong.sum()])


class Student:
    """One variant: task, optimiser, and what it copies of the labels it is trained on."""

    def __init__(self, name: str, config: Config, answers: str, encoder: Encoder, centroids: Tensor, val: Validation):
        seed_everything(config.train.seed)
        self.name, self.config, self.answers = name, config, answers
        self.task = Task(config, val.classes, encoder, centroids)
        self.optimizer = build_optimizer(self.task.student, config)
        self.precision = PRECISIONS[config.train.precision]
        self.val_labels, self.label_figures, self.of_class = val.labels(self.task)
        self.copied = torch.zeros(2, dtype=torch.int64)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32)

    @torch.no_grad()
    def logits(self, attended, epoch: int) -> Tensor:
        network = self.task.scored
        training = network.training
        with self.autocast():
            logits = network.eval()(None, self.task.eval_rates(epoch, attended.grid), frozen=attended)["logits"].float()
        network.train(training)
        return logits

    def step(self, batch: dict[str, Tensor], epoch: int, number: int) -> None:
        """Do one optimiser step, as `dmsa.training.trainer` does."""
        with self.autocast():
            prepared = self.task.prepare(batch, epoch, number)
        label, classes = prepared.label, self.task.classes.num_classes
        truth = self.of_class[token_labels(batch["label"], label.shape[-2:], classes)]
        self.copied += copied(enlarged(self.logits(prepared.attended, epoch), label.shape[-2:]), label, truth)
        if self.answers != "labels":
            generator = torch.Generator().manual_seed(mix(self.config.train.seed, number))
            drawn = truth.where(truth != IGNORE, label)
            if self.answers == "shuffled":
                drawn = shuffled(label, truth, classes, generator)
            prepared = relabelled(prepared, drawn)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.task.losses(prepared, prepared.counts, epoch)
        losses["total"].backward()
        nn.utils.clip_grad_value_(self.task.student.parameters(), self.config.train.clip_value)
        self.optimizer.step()
        self.task.teacher.after_step()


def enlarged(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Return the class of every pixel, int64 `[B, H, W]`, of scores `[B, K, h, w]`."""
    return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=False).argmax(1)


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
    def labels(self, task: Task) -> tuple[list[Tensor], dict[str, float], Tensor]:
        """Return the labels that the maps alone give, their figures, and the id that stands for every class in them."""
        made, whole = [], []
        histogram = Histogram(self.classes.num_classes)
        for attended, samples, _ in self.parts:
            cam = CAMS[task.config.labels.cam](task.encoder, attended, task.centroids)
            found = pseudo_label(cam, None, samples["guide"], self.classes.things_only, task.config.labels)
            coarse = token_labels(samples["label"], found.label.shape[-2:], self.classes.num_classes)
            histogram.update(found.label, coarse)
            made.append(found.label)
            whole.append(enlarged(found.scores, samples["label"].shape[-2:]))
        of_class = torch.full((IGNORE + 1,), IGNORE)
        of_class[: self.classes.num_classes] = torch.from_numpy(scores(histogram.counts).assignment)
        return made, self.figures(whole), of_class

    def figures(self, predictions: Iterable[Tensor]) -> dict[str, float]:
        """Return what is printed of class maps int64 `[B, H, W]`, one a part of the pictures, percent."""
        k = self.classes.num_classes
        all_pixels, near_border, elsewhere, border = Histogram(k), Histogram(k), Histogram(k), BoundaryScore()
        for (_, samples, near), predicted in zip(self.parts, predictions, strict=True):
            truth = samples["label"]
            all_pixels.update(predicted, truth)
            near_border.update(predicted, truth.where(near, IGNORE))
            elsewhere.update(predicted, truth.where(~near, IGNORE))
            border.update(predicted, truth)
        found = scores(all_pixels.counts)
        confusion, total = found.confusion, found.confusion.sum()
        objects = confusion[1:, 1:]

        def right(histogram: Histogram) -> tuple[int, int]:
            counts = histogram.counts[:, found.assignment]
            return int(np.trace(counts)), max(int(counts.sum()), 1)

        (near_right, near_all), (else_right, else_all) = right(near_border), right(elsewhere)
        return {
            "miou": 100 * found.miou,
            "accuracy": 100 * found.accuracy,
            "boundary": border.value,
            "objects": 100 * float(np.nanmean(found.iou[1:])),
            "background": 100 * confusion[:, 0].sum() / total,
            "found": int((found.iou >= FOUND).sum()),
            "near borders": 100 * near_right / near_all,
            "elsewhere": 100 * else_right / else_all,
            "wrong near borders": 100 * (near_all - near_right) / total,
            "wrong elsewhere": 100 * (else_all - else_right) / total,
            "lost": 100 * confusion[1:, 0].sum() / total,
            "invented": 100 * confusion[0, 1:].sum() / total,
            "mixed up": 100 * (objects.sum() - np.trace(objects)) / total,
        }

    def measure(self, student: Student, epoch: int, *, both: bool) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield what is printed of a student, and with `both` the same with predictions refined, or not, instead."""
        k = self.classes.num_classes
        logits = [student.logits(attended, epoch) for attended, _, _ in self.parts]
        repeated = torch.zeros(2, dtype=torch.int64)
        for (_, samples, _), scores_, label in zip(self.parts, logits, student.val_labels, strict=True):
            coarse = student.of_class[token_labels(samples["label"], label.shape[-2:], k)]
            repeated += copied(enlarged(scores_, label.shape[-2:]), label, coarse)

        def share(counts: Tensor) -> float:
            return 100 * int(counts[0]) / max(int(counts[1]), 1)

        copies = {"copied val": share(repeated), "copied train": share(student.copied)}
        student.copied.zero_()
        own = student.config.model.refine
        other: Literal["off", "par"] = "par" if own == "off" else "off"
        for way in (own, other) if both else (own,):
            config = dataclasses.replace(student.config, model=dataclasses.replace(student.config.model, refine=way))
            maps = (
                enlarged(refined(scores_, samples["image"], config), samples["label"].shape[-2:])
                for (_, samples, _), scores_ in zip(self.parts, logits, strict=True)
            )
            how = "" if way == own else {"par": ", refined", "off": ", not refined"}[way]
            yield student.name + how, self.figures(maps) | copies


def learn(
    variants: Sequence[str], base: Config, *, every: int, cache: str | Path, both: bool = False, clusters: bool = False
) -> Iterator[tuple[str, int, int, dict[str, float]]]:
    """Train all variants side by side; yield name, epoch (from 1), step and figures, every `every` steps.

    First come the figures of their labels, as step 0 of epoch 0.

    Args:
        variants: see `parse_variant`.
        base: seed, epochs and data of all of them; a data set of things with labels on its training images.
        every: steps between measurements.
        cache: folder of feature bank and centroids.
        both: measure students with and without the refinement of predictions.
        clusters: yield first the figures of k-means on the validation pictures' patch features, as step 0 of epoch 0.
    """
    configs = {text: parse_variant(text, base) for text in variants}
    train_data, val_data = (data.build(base.data, split, base.train.seed) for split in ("train", "val"))
    seed_everything(base.train.seed)
    encoder = build_encoder(base.model.encoder, base.model.weights)
    centroids = prepare_centroids(encoder, train_data, base, cache).vectors
    val = Validation(val_data, encoder)
    if clusters:
        maps = cluster_patches(
            patch_features(val_data, encoder), val.classes.num_classes, base.data.size, base.train.seed
        )
        yield "k-means", 0, 0, val.figures(maps.split([len(samples["label"]) for _, samples, _ in val.parts]))
    share_features(encoder)
    students = [Student(text, *parsed, encoder, centroids, val) for text, parsed in configs.items()]
    for student in students:
        yield f"{student.name}, labels", 0, 0, student.label_figures
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
                    for name, found in val.measure(student, epoch, both=both):
                        yield name, epoch + 1, step, found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", nargs="+", help="METHOD[:option=value]...")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=16, help="steps between measurements")
    parser.add_argument("--preset", default="shapes", help="preset by name or YAML file; data whose images have labels")
    parser.add_argument("--clusters", action="store_true", help="also measure k-means on the patch features")
    parser.add_argument("--refined", action="store_true", help="measure refined and not refined predictions")
    parser.add_argument("--images", type=int, help="training pictures; the preset's number if unset")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32")
    parser.add_argument("--csv", type=Path, help="also append the rows to this file")
    options = parser.parse_args(argv)
    table: list[list[str]] = []
    try:
        base = load_preset(options.preset)
        changed = dataclasses.replace(
            base.train, seed=options.seed, epochs=options.epochs, precision=options.precision, baselines=False
        )
        pictures = dataclasses.replace(base.data, train_images=options.images or base.data.train_images)
        base = dataclasses.replace(base, train=changed, data=pictures)
        with tempfile.TemporaryDirectory() as cache:
            ways = {"both": options.refined, "clusters": options.clusters}
            for name, epoch, step, found in learn(options.variants, base, every=options.every, cache=cache, **ways):
                table = table or [["variant", "epoch", "step", *found, "copied val", "copied train"]]
                cells = (f"{found[key]:.1f}" if key in found else "-" for key in table[0][3:])
                table.append([name, str(epoch), str(step), *cells])
                print(" ".join(f"{key} {value}" for key, value in zip(table[0], table[-1], strict=True)), flush=True)
                if options.csv:
                    with options.csv.open("a", newline="", encoding="utf-8") as stream:
                        csv.writer(stream, lineterminator="\n").writerow([options.seed, *table[-1]])
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmarks.learning: {error}", file=sys.stderr)
        return 2
    print("\n".join(["", *columns(table)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
