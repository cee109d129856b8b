"""What a run leaves for people: panels, the curve of its scores, and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from dmsa.config import Config, deviations
from dmsa.data.classes import Classes
from dmsa.data.listing import few
from dmsa.data.sources import SPLIT_IMAGES
from dmsa.scoring.table import markdown, paper_rows, percent, score_rows
from dmsa.training.task import Task
from dmsa.visualize import colourise, heatmap, panel, predicted_names, predicted_palette

CURVE = "scores.png"
"""Picture of the scores by epoch, beside report.md."""


def draw_panels(
    task: Task,
    dataset: Any,
    indices: Sequence[int],
    epoch: int,
    assignment: Sequence[int] | None,
) -> Image.Image:
    """Draw image | CAM | teacher | refined | prediction | ground truth for some images of `dataset`.

    Args:
        task: student, teacher and centroids.
        dataset: validation data.
        indices: which images.
        epoch: the weights' epoch.
        assignment: predicted id that stands for every class, so that a class has one colour in all columns.
    """
    from dmsa.data.transforms import denormalise

    classes = task.classes
    palette = predicted_palette(classes, assignment)
    # Classes as the ground truth has them, and as predicted ids have them: the same entries once these are matched.
    true_entries = list(zip(classes.classes, _colours(classes.palette), strict=True))
    entries = list(zip(predicted_names(classes, assignment), _colours(palette), strict=True))
    rows, seen = [], set()
    for index in indices:
        sample = dataset[index]
        batch = {key: sample[key][None].to(task.device) for key in ("image", "guide")}
        stages = task.explain(batch, epoch)
        image = (denormalise(sample["image"]) * 255).byte().permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        cam = stages["cam"][0].amax(0).float().cpu().numpy()
        blank = np.full((height, width, 3), 255, dtype=np.uint8)
        teacher = blank if stages["teacher"] is None else colourise(_labels(stages["teacher"]), palette)
        truth = sample["label"].numpy()
        seen |= {true_entries[label] for label in np.unique(truth) if label != 255}
        for stage in ("teacher", "refined", "prediction"):
            if stages[stage] is not None:
                seen |= {entries[label] for label in np.unique(_labels(stages[stage])) if label != 255}
        rows.append(
            [
                image,
                heatmap(cam),
                teacher,
                colourise(_labels(stages["refined"]), palette),
                colourise(_labels(stages["prediction"]), palette),
                colourise(truth, classes.palette),
            ]
        )
    return panel(rows, legend=[entry for entry in dict.fromkeys([*true_entries, *entries]) if entry in seen])


def _colours(palette: np.ndarray) -> list[tuple[int, int, int]]:
    return [(int(red), int(green), int(blue)) for red, green, blue in palette]


def _labels(batch: torch.Tensor) -> np.ndarray:
    return batch[0].cpu().numpy()


def report_text(
    config: Config,
    classes: Classes,
    *,
    scores: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    baselines: Sequence[Mapping[str, Any]],
    command: str,
    commit: str,
    panels: Sequence[str],
    finished: bool,
    images: int | None = None,
    damaged: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return report.md.

    Args:
        config: the run.
        classes: of the data.
        scores: one entry an evaluation, see `dmsa.training.trainer`.
        best: one of them.
        baselines: rows with `method`, `miou`, `accuracy` (percent), `protocol`, `source`.
        command: how the run was started.
        commit: of the source tree.
        panels: paths of pictures, relative to the run folder.
        finished: whether the last epoch is done.
        images: trained on; the official set's if None.
        damaged: where images were wanted that cannot be decoded, to their names.
    """
    title = {"dmsa": "DMSA", "transfgu": "TransFGU (pyramid, PAR and segmentation loss off)", "dmsa_plus": "DMSA plus"}
    done = scores[-1]["epoch"] + 1 if scores else 0
    lines = [
        f"# {title[config.method]} on {config.data.name}",
        "",
        f"    {command}",
        "",
        f"Commit {commit}. Encoder {config.model.encoder}. "
        + (
            f"All {config.train.epochs} epochs are done."
            if finished
            else f"Epoch {done} of {config.train.epochs} so far."
        ),
        "",
    ]
    deviating = deviations(config)
    official = SPLIT_IMAGES.get(config.data.name, {}).get("train")
    if config.data.train_images is None and None not in (images, official) and images != official:
        deviating.append(f"training images: {images} (paper: {official})")
    lines += ["## Scores", ""]
    if best is None:
        lines += ["No scores: the validation images have no labels, or no epoch is done yet.", ""]
    else:
        own = [_own_row(config, "this run, best epoch", best)]
        if scores[-1]["epoch"] != best["epoch"]:
            own.append(_own_row(config, "this run, last epoch", scores[-1]))
        notes = list(dict.fromkeys(note for entry in (best, scores[-1]) for note in entry.get("notes", ())))
        published = paper_rows(config.data.name)
        if deviating or notes:
            published = [{**row, "source": f"{row['source']}; not comparable"} for row in published]
        lines += markdown(score_rows([*own, *baselines, *published]))
        if not published:
            lines += ["", f"The paper has no row for {config.data.name}: its tables are on VOC 2012 and COCO."]
        lines += ["", f"mIoU and accuracy in percent. Protocol of this run's rows: {best['conditions']}.", ""]
        if published and deviating:
            lines += [
                f"The paper's rows are not comparable with this run's: {len(deviating)} deviations, listed below.",
                "",
            ]
        lines += [*(f"- {note}" for note in notes), ""] if notes else []
    left_out = {where: names for where, names in (damaged or {}).items() if names}
    if left_out:
        lines += ["## Images that cannot be decoded", ""]
        lines += [f"- {where}, {len(names)} left out: {few(names, 50)}" for where, names in left_out.items()]
        lines += [""]
    lines += ["## Deviations from the paper's setting", ""]
    lines += [f"- {line}" for line in deviating] or ["None."]
    lines += [""]
    if panels:
        lines += ["## Panels", ""]
        lines += [f"![{Path(name).stem}]({name})" for name in panels]
        lines += [""]
    if best is not None:
        lines += [f"## Classes (epoch {best['epoch'] + 1})", ""]
        iou = zip(classes.classes, best["iou"], best["assignment"], strict=True)
        lines += markdown([("class", "IoU", "predicted id"), *((name, percent(100 * v), k) for name, v, k in iou)])
        lines += ["", "## Epochs", ""]
        epochs = [(r["epoch"] + 1, r["step"], percent(100 * r["miou"]), percent(100 * r["accuracy"])) for r in scores]
        lines += [f"![scores by epoch]({CURVE})", "", *markdown([("epoch", "step", "mIoU", "accuracy"), *epochs]), ""]
    return "\n".join(lines)


def draw_scores(scores: Sequence[Mapping[str, Any]], stream: BinaryIO) -> None:
    """Write mIoU and accuracy by epoch as PNG, the best epoch marked.

    Args:
        scores: one entry an evaluation, at least one.
        stream: binary.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    epochs = [entry["epoch"] + 1 for entry in scores]
    for key, name in (("accuracy", "accuracy"), ("miou", "mIoU")):
        axes.plot(epochs, [100 * entry[key] for entry in scores], marker=".", label=name)
    best = max(scores, key=lambda entry: entry["miou"])
    axes.axvline(best["epoch"] + 1, color="grey", linewidth=0.8, linestyle=":", label="best mIoU")
    axes.set_xlabel("epoch")
    axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(stream, format="png", dpi=110)


def _own_row(config: Config, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "method": f"{config.method} ({name})",
        "miou": 100 * entry["miou"],
        "accuracy": 100 * entry["accuracy"],
        "protocol": entry["protocol"],
        "source": f"epoch {entry['epoch'] + 1}, {entry['images']} images",
    }
