"""``dmsa ablate``: the rows of the paper's Table 4 on the embedded data set, as switches of one configuration.

Every row is trained with the same data, budget and seeds. The result is a markdown table (mean and standard deviation
over the seeds, and the epoch at which a run comes within a point of its best score: the paper claims far fewer
epochs with PAR), the scores of every epoch as CSV, and the curves as a picture. With ``--scores`` some of these runs,
beside the baselines that need no training, make the table of scores instead. A run that was stopped goes on; a
finished one is read, not repeated.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmsa.config import Config, load_preset, resolve_method

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
NEAR_BEST = 1.0
"""mIoU points below its best at which a run counts as arrived."""


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """Run the paper's ablation, or make the table of scores, on the embedded set."""

    preset: str = "shapes"
    """Preset by name, or YAML file."""
    out: str = "runs/ablation"
    """Folder of the runs, one a row and seed."""
    results: str = "benchmarks/results"
    """Folder of the tables, the CSV files and the picture."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every row is trained with each."""
    epochs: int | None = None
    """Epochs of a run; the preset's if unset."""
    train_images: int | None = None
    """Training images; the preset's number if unset."""
    val_images: int | None = None
    """Validation images; the preset's number if unset."""
    scores: bool = False
    """Instead of the ablation, make the table of scores: the baselines, TransFGU, DMSA and dmsa_plus."""


def switch(config: Config, aspp: bool, par: bool, seg: bool) -> Config:
    """`config` with the paper's three parts on (as the preset has them) or off."""
    return dataclasses.replace(
        config,
        model=config.model if aspp else dataclasses.replace(config.model, aspp="off"),
        labels=config.labels if par else dataclasses.replace(config.labels, par="off"),
        losses=config.losses if seg else dataclasses.replace(config.losses, seg=0.0),
    )


def row_config(base: Config, name: str) -> Config:
    """`base` as the row `name` has it."""
    config = switch(base, *ROWS[name])
    return resolve_method(dataclasses.replace(config, method="dmsa_plus")) if name == PLUS else config


def arrival(curve: Sequence[float], margin: float = NEAR_BEST) -> int:
    """First epoch, counted from 1, whose score is within ``margin`` of the best one."""
    if not len(curve):
        raise ValueError("an empty curve has no best epoch")
    return int(np.flatnonzero(np.asarray(curve) >= max(curve) - margin)[0]) + 1


def table(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Markdown lines.

    Args:
        curves: Row → one list a seed, of an evaluation's ``epoch``, ``miou``, ``accuracy`` (fractions).
    """
    lines = [
        "| row | ASPP | PAR | seg | mIoU, best epoch | accuracy, best epoch | mIoU, last epoch | best epoch "
        f"| within {NEAR_BEST:g} point of best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in curves.items():
        best = [max(run, key=lambda entry: entry["miou"]) for run in runs]
        cells = [
            _spread([100 * entry["miou"] for entry in best]),
            _spread([100 * entry["accuracy"] for entry in best]),
            _spread([100 * run[-1]["miou"] for run in runs]),
            _spread([entry["epoch"] + 1 for entry in best], 1),
            _spread([run[arrival([100 * entry["miou"] for entry in run]) - 1]["epoch"] + 1 for run in runs], 1),
        ]
        marks = ["yes" if on else "" for on in ROWS[name]]
        lines.append(f"| {name} | {' | '.join(marks)} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and, for several values, their standard deviation (of the sample)."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def draw(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
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
    axes.set_ylabel("mIoU on shapes val, %")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def baseline_rows(config: Config) -> list[dict[str, Any]]:
    """Rows (a) to (c) of a finished run: its pictures, its backbone, its centroids (from its cache)."""
    from dmsa import data
    from dmsa.labels.clustering import prepare_centroids
    from dmsa.models.encoder import build_encoder
    from dmsa.scoring.baselines import untrained_rows

    encoder = build_encoder(config.model.encoder, config.model.weights)
    train_data, val_data = (data.build(config.data, split, config.train.seed) for split in ("train", "val"))
    centroids = prepare_centroids(encoder, train_data, config, Path(config.out) / "cache")
    return untrained_rows(config, val_data, encoder, centroids.vectors)


def trained_rows(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], number: int) -> list[dict[str, Any]]:
    """Rows (d), (e) and `dmsa_plus` of the seed at place ``number``, at the last and at the best epoch."""
    rows = []
    for name, title in ((TRANSFGU, "TransFGU"), (DMSA, "DMSA"), (PLUS, "dmsa_plus")):
        run = curves[name][number]
        for when, entry in (("last", run[-1]), ("best", max(run, key=lambda entry: entry["miou"]))):
            scores = {key: 100 * entry[key] for key in ("miou", "accuracy")}
            rows.append({"method": f"{title}, {when} epoch", **scores, "boundary": None})
    return rows


def score_table(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Markdown lines of one list of rows a seed: mean and standard deviation of every figure."""
    lines = ["| method | mIoU | accuracy | boundary F, 2 px |", "|---|---|---|---|"]
    for same in zip(*rows, strict=True):
        cells = [
            "" if same[0][key] is None else _spread([row[key] for row in same], 1)
            for key in ("miou", "accuracy", "boundary")
        ]
        lines.append(f"| {same[0]['method']} | {' | '.join(cells)} |")
    return lines


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


def ablate(options: AblateConfig) -> list[str]:
    """Train the rows with all seeds; write ``ablation_shapes.{md,csv,png}``, or ``shapes_scores.{md,csv}``.

    Returns:
        The markdown.

    Raises:
        ValueError: No seeds, or a preset of another data set without the labels that scores need.
    """
    from dmsa.training.progress import git_commit
    from dmsa.training.trainer import train

    if not options.seeds:
        raise ValueError(f"{options.seeds=}: expected one seed at least")
    base = load_preset(options.preset)
    data = {name: value for name in ("train_images", "val_images") if (value := getattr(options, name)) is not None}
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, **data))
    training = dataclasses.replace(base.train, baselines=False, epochs=options.epochs or base.train.epochs)
    wanted_rows = (TRANSFGU, DMSA, PLUS) if options.scores else tuple(ROWS)
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in wanted_rows}
    scored: list[list[dict[str, Any]]] = []
    for number, seed in enumerate(options.seeds):
        for name in wanted_rows:
            on = [part for part, wanted in zip(("aspp", "par", "seg"), ROWS[name], strict=True) if wanted]
            folder = Path(options.out) / f"{PLUS if name == PLUS else '-'.join(on) or 'baseline'}-{seed}"
            config = dataclasses.replace(
                row_config(base, name), out=str(folder), train=dataclasses.replace(training, seed=seed)
            )
            scores = train(config)["scores"]
            if not scores:
                raise ValueError(f"preset={options.preset!r}: its validation images have no labels, nothing to compare")
            curves[name].append(scores)
            if options.scores and name == DMSA:
                untrained = baseline_rows(config)
        if options.scores:
            scored.append([*untrained, *trained_rows(curves, number)])
    results = Path(options.results)
    results.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(base, train=training)
    words = ["dmsa ablate", *(["--scores"] if options.scores else []), f"--preset {options.preset}"]
    words += [f"--seeds {' '.join(map(str, options.seeds))}"]
    words += [
        f"--{key.replace('_', '-')} {value}"
        for key in ("epochs", "train_images", "val_images")
        if (value := getattr(options, key))
    ]
    conditions = [
        f"    {' '.join(words)}",
        "",
        f"Commit {git_commit()}; {platform.machine()}, CPU. {config.train.epochs} epochs of "
        f"{config.data.train_images} images, batch {config.train.batch}; {config.data.val_images} validation images; "
        f"{len(options.seeds)} seed(s), each with pictures of its own, mean ± standard deviation. Scores in percent, "
        f"protocol transfgu at {config.data.size} px.",
        "",
    ]
    if options.scores:
        lines = [f"# Scores on {config.data.name}", "", *conditions, *score_table(scored), ""]
        (results / "shapes_scores.md").write_text("\n".join(lines), encoding="utf-8")
        keys = ("miou", "accuracy", "boundary")
        entries = [
            [row["method"], seed, *("" if row[key] is None else f"{row[key]:.3f}" for key in keys)]
            for seed, rows in zip(options.seeds, scored, strict=True)
            for row in rows
        ]
        _write_csv(results / "shapes_scores.csv", ["method", "seed", *keys], entries)
        return lines
    lines = [f"# Ablation on {config.data.name}", "", *conditions, *table(curves), ""]
    lines += ["![mIoU by epoch](ablation_shapes.png)", ""]
    (results / "ablation_shapes.md").write_text("\n".join(lines), encoding="utf-8")
    entries = [
        [name, seed, entry["epoch"] + 1, f"{entry['miou']:.6f}", f"{entry['accuracy']:.6f}"]
        for name, runs in curves.items()
        for seed, run in zip(options.seeds, runs, strict=True)
        for entry in run
    ]
    _write_csv(results / "ablation_shapes.csv", ["row", "seed", "epoch", "miou", "accuracy"], entries)
    draw(curves, results / "ablation_shapes.png")
    return lines


def main(argv: list[str]) -> int:
    """``dmsa ablate``: parse, run, print the table."""
    import tyro

    options = tyro.cli(AblateConfig, args=argv, prog="dmsa ablate", description=AblateConfig.__doc__)
    try:
        lines = ablate(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"dmsa ablate: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
