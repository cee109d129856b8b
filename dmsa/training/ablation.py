"""The rows of the paper's Table 4 on the embedded data set, or another small one, as switches of one configuration.

Every row is trained with the same data, budget and seeds. The result is a table of the rows (mean and standard
deviation over the seeds) with the epoch at which each reaches the baseline's best score (the paper claims far fewer
with PAR), a table of their differences from the baseline of the same seed, the scores of every epoch as CSV, and the
curves as a picture. A run that was stopped goes on; a finished one is read, not repeated, so that seeds can be added.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmsa import checkpoint, data, distributed
from dmsa.config import Config, load_preset, resolve_method
from dmsa.labels.clustering import prepare_centroids
from dmsa.models.encoder import build_encoder
from dmsa.scoring.baselines import untrained_rows
from dmsa.scoring.boundary import TOLERANCE
from dmsa.scoring.comparison import Curve, arrivals, arrived, difference, figures
from dmsa.scoring.evaluate import evaluate
from dmsa.scoring.predictor import Predictor
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.table import markdown, spread
from dmsa.training.run import commits
from dmsa.training.session import train

ROWS: dict[str, tuple[bool, bool, bool]] = {
    "baseline (TransFGU)": (False, False, False),
    "+ ASPP": (True, False, False),
    "+ PAR": (False, True, False),
    "+ seg": (False, False, True),
    "+ ASPP + PAR": (True, True, False),
    "DMSA (+ ASPP + PAR + seg)": (True, True, True),
    "dmsa_plus": (True, True, True),
}
"""Row → whether pyramid, refinement and segmentation loss are on."""
TRANSFGU, DMSA, PLUS = "baseline (TransFGU)", "DMSA (+ ASPP + PAR + seg)", "dmsa_plus"
TITLES = {TRANSFGU: "TransFGU", DMSA: "DMSA", PLUS: "dmsa_plus"}
"""Row → its name in the table of scores."""
COMPARED = {
    "miou_last": "mIoU, last epoch",
    "miou_best": "mIoU, best epoch",
    "miou_mean": "mIoU, mean over epochs",
    "accuracy_last": "accuracy, last epoch",
    "accuracy_best": "accuracy, best epoch",
    "accuracy_mean": "accuracy, mean over epochs",
}
"""Figure of a run → its column."""
Curves = dict[str, list[Curve]]
"""Row → one curve a seed."""


def switch(config: Config, aspp: bool, par: bool, seg: bool) -> Config:
    """`config` with the paper's three parts on (as the preset has them) or off.

    Without PAR there is nothing finer than the tokens to compare at, as in TransFGU's public code.
    """
    return dataclasses.replace(
        config,
        model=config.model if aspp else dataclasses.replace(config.model, aspp="off"),
        labels=config.labels if par else dataclasses.replace(config.labels, par="off", label_grid="tokens"),
        losses=config.losses if seg else dataclasses.replace(config.losses, seg=0.0),
    )


def row_config(base: Config, name: str) -> Config:
    """`base` as the row `name` has it."""
    config = switch(base, *ROWS[name])
    return resolve_method(dataclasses.replace(config, method="dmsa_plus")) if name == PLUS else config


def ablation_table(curves: Curves) -> list[str]:
    """Return markdown lines: mean and deviation of every row's figures, and when it reaches the baseline's best."""
    rows = [["row", "ASPP", "PAR", "seg", *COMPARED.values(), "best epoch", "epochs to the baseline's best"]]
    for name, runs in curves.items():
        found = [figures(run) for run in runs]
        cells = [spread([run[key] for run in found]) for key in COMPARED]
        cells += [spread([run["best_epoch"] for run in found], 1), arrived(arrivals(runs, curves[TRANSFGU]))]
        rows.append([name, *("yes" if on else "" for on in ROWS[name]), *cells])
    return markdown(rows)


def paired_table(curves: Curves) -> list[str]:
    """Return markdown lines: every row's figures minus those of the baseline with the same seed."""
    reference = [figures(run) for run in curves[TRANSFGU]]
    rows = [["minus the baseline of the same seed", *COMPARED.values()]]
    for name, runs in curves.items():
        if name != TRANSFGU:
            found = [figures(run) for run in runs]
            pairs = [([run[key] for run in found], [run[key] for run in reference]) for key in COMPARED]
            rows.append([name, *(difference(*pair) for pair in pairs)])
    return markdown(rows)


def draw(curves: Curves, dataset: str, path: Path) -> None:
    """mIoU by epoch, the mean of the seeds a line and their range a band, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, runs in curves.items():
        epochs = [entry["epoch"] + 1 for entry in runs[0]]
        values = np.array([[100 * entry["miou"] for entry in run] for run in runs])
        (line,) = axes.plot(epochs, values.mean(0), label=name)
        axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"mIoU on {dataset} val, %")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def baseline_rows(config: Config) -> list[dict[str, Any]]:
    """Rows (a) to (c) of a finished run: its pictures, its backbone, its centroids (from its cache)."""
    encoder = build_encoder(config.model.encoder, config.model.weights)
    train_data, val_data = (data.build(config.data, split, config.train.seed) for split in ("train", "val"))
    centroids = prepare_centroids(encoder, train_data, config, Path(config.out) / "cache")
    return distributed.on_main(lambda: untrained_rows(config, val_data, encoder, centroids.vectors))


def trained_rows(curves: Curves, number: int) -> list[dict[str, Any]]:
    """Rows (d), (e) and `dmsa_plus` of the seed at place ``number``, at the last and the best epoch and averaged."""
    rows = []
    for name, title in TITLES.items():
        found = figures(curves[name][number])
        for key, when in (("last", "last epoch"), ("best", "best epoch"), ("mean", "mean over epochs")):
            scores = {"miou": found[f"miou_{key}"], "accuracy": found[f"accuracy_{key}"], "boundary": None}
            rows.append({"method": f"{title}, {when}", **scores})
    return rows


def other_way_row(config: Config, title: str) -> dict[str, Any]:
    """Score the end of a finished run the other way: with refined predictions if its own are not, and vice versa."""
    path = checkpoint.find(config.out, prefer_best=False)
    predictor = Predictor(checkpoint.load(path), path)
    refine: Literal["off", "par"] = "par" if config.model.refine == "off" else "off"
    predictor.config = dataclasses.replace(config, model=dataclasses.replace(config.model, refine=refine))
    val_data = data.build(config.data, "val", config.train.seed)
    found = evaluate(predictor.predict, val_data, Protocol("transfgu", config.data.size)).scores
    how = "refined by PAR" if refine == "par" else "not refined"
    scores = {"miou": 100 * found.miou, "accuracy": 100 * found.accuracy, "boundary": None}
    return {"method": f"{title}, last epoch, predictions {how}", **scores}


def score_table(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Markdown lines of one list of rows a seed: mean and standard deviation of every figure (percent)."""
    table = [["method", "mIoU", "accuracy", f"boundary F, {TOLERANCE} px"]]
    for same in zip(*rows, strict=True):
        cells = [
            "" if same[0][key] is None else spread([row[key] for row in same], 1)
            for key in ("miou", "accuracy", "boundary")
        ]
        table.append([same[0]["method"], *cells])
    return markdown(table)


def scores_of(config: Config) -> tuple[Curve, list[str]]:
    """Return a run's evaluations and the commits it was trained at: read from its folder if it is finished.

    Raises:
        ValueError: the folder holds a run of another configuration; the options that differ are listed.
    """
    folder = Path(config.out)

    def read() -> Curve | None:
        newest = checkpoint.Checkpoints(folder / "checkpoints").newest()
        if newest is None:
            return None
        state = checkpoint.load(newest)
        if state["epoch"] < config.train.epochs:
            return None
        checkpoint.check_config(state, config, newest)
        return state["scores"]

    scores = distributed.on_main(read)
    if scores is None:
        scores = train(config)["scores"]
    made_at = distributed.on_main(lambda: commits(folder))
    return [entry for entry in scores if entry["epoch"] < config.train.epochs], made_at


def seed_entries(curves: Curves, seeds: Sequence[int]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the CSV with the figures of every run, from which both tables are made."""
    entries = []
    for name, runs in curves.items():
        for seed, run, epoch in zip(seeds, runs, arrivals(runs, curves[TRANSFGU]), strict=True):
            found = figures(run)
            reached = "" if math.isnan(epoch) else int(epoch)
            entries.append([name, seed, *(f"{found[key]:.4f}" for key in COMPARED), found["best_epoch"], reached])
    return ["row", "seed", *COMPARED, "best_epoch", "epochs_to_baselines_best"], entries


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def _images(config: Config, split: str) -> int:
    """Return how many images an epoch, or the evaluation, has."""
    return len(data.build(config.data, split, config.train.seed))


def ablate(
    preset: str,
    *,
    seeds: Sequence[int],
    out: str | Path,
    results: str | Path,
    epochs: int | None = None,
    train_images: int | None = None,
    val_images: int | None = None,
    scores: bool = False,
    command: str = "",
) -> list[str]:
    """Train the rows with all seeds and write their tables.

    These are ``ablation_NAME.{md,csv,png}`` and ``ablation_NAME_seeds.csv``, or ``NAME_scores.{md,csv}``, NAME being
    that of the data set.

    Args:
        preset: by name, or a YAML file; a data set whose validation images have labels.
        seeds: every row is trained with each.
        out: folder of the runs, one a row and seed.
        results: folder of what is written.
        epochs, train_images, val_images: the preset's if None.
        scores: make the table of scores instead of the ablation.
        command: how this was started, for the head of the tables.

    Returns:
        The markdown.

    Raises:
        ValueError: No seeds, or a data set without the labels that scores need.
    """
    if not seeds:
        raise ValueError(f"{seeds=}: expected one seed at least")
    base = load_preset(preset)
    counts: dict[str, Any] = {"train_images": train_images, "val_images": val_images}
    counts = {name: value for name, value in counts.items() if value is not None}
    training = dataclasses.replace(base.train, baselines=False, epochs=epochs or base.train.epochs)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, **counts), train=training)
    curves: Curves = {name: [] for name in ((TRANSFGU, DMSA, PLUS) if scores else ROWS)}
    scored = []
    trained_at: list[str] = []
    for number, seed in enumerate(seeds):
        otherwise = []
        for name, runs in curves.items():
            on = [part for part, wanted in zip(("aspp", "par", "seg"), ROWS[name], strict=True) if wanted]
            folder = Path(out) / f"{PLUS if name == PLUS else '-'.join(on) or 'baseline'}-{seed}"
            config = row_config(base, name)
            config = dataclasses.replace(config, out=str(folder), train=dataclasses.replace(config.train, seed=seed))
            curve, made_at = scores_of(config)
            if not curve:
                raise ValueError(f"{preset=}: its validation images have no labels, nothing to compare")
            runs.append(curve)
            trained_at += [commit for commit in made_at if commit not in trained_at]
            if scores:
                otherwise.append(other_way_row(config, TITLES[name]))
            if scores and name == DMSA:
                untrained = baseline_rows(config)
        if scores:
            scored.append([*untrained, *trained_rows(curves, number), *otherwise])
    conditions = [
        f"    {command}",
        "",
        f"Commit {', '.join(trained_at)}; {platform.machine()}, CPU. {training.epochs} epochs of "
        f"{_images(base, 'train')} images, batch {training.batch}; {_images(base, 'val')} validation images; "
        f"{len(seeds)} seed(s){', each with pictures of its own' * (base.data.name == 'shapes')}, mean ± standard "
        f"deviation. Scores in percent, protocol transfgu at {base.data.size} px.",
        "",
    ]

    def write() -> list[str]:
        folder = Path(results)
        folder.mkdir(parents=True, exist_ok=True)
        if scores:
            lines = [f"# Scores on {base.data.name}", "", *conditions, *score_table(scored), ""]
            lines += [*paired_table(curves), ""]
            (folder / f"{base.data.name}_scores.md").write_text("\n".join(lines), encoding="utf-8")
            keys = ("miou", "accuracy", "boundary")
            entries = [
                [row["method"], seed, *("" if row[key] is None else f"{row[key]:.3f}" for key in keys)]
                for seed, rows in zip(seeds, scored, strict=True)
                for row in rows
            ]
            _write_csv(folder / f"{base.data.name}_scores.csv", ["method", "seed", *keys], entries)
            return lines
        lines = [f"# Ablation on {base.data.name}", "", *conditions, *ablation_table(curves), ""]
        lines += [*paired_table(curves), "", f"![mIoU by epoch](ablation_{base.data.name}.png)", ""]
        (folder / f"ablation_{base.data.name}.md").write_text("\n".join(lines), encoding="utf-8")
        entries = [
            [name, seed, entry["epoch"] + 1, f"{entry['miou']:.6f}", f"{entry['accuracy']:.6f}"]
            for name, runs in curves.items()
            for seed, run in zip(seeds, runs, strict=True)
            for entry in run
        ]
        _write_csv(folder / f"ablation_{base.data.name}.csv", ["row", "seed", "epoch", "miou", "accuracy"], entries)
        _write_csv(folder / f"ablation_{base.data.name}_seeds.csv", *seed_entries(curves, seeds))
        draw(curves, base.data.name, folder / f"ablation_{base.data.name}.png")
        return lines

    return distributed.on_main(write)
