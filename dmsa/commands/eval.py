"""`dmsa eval`: score a checkpoint, or a folder of predicted masks of any method, with the paper's rows beside it."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmsa import distributed
from dmsa.config import DataConfig, DataName
from dmsa.data import build
from dmsa.data.base import SegmentationData
from dmsa.files import claim_outputs
from dmsa.scoring.evaluate import Predicted255, evaluate, evaluate_predictions
from dmsa.scoring.protocols import Protocol
from dmsa.scoring.table import REPORT_FILES, Report


@dataclass(frozen=True)
class EvalOptions:
    """Score a checkpoint, or a folder of predicted masks of any method, and print the paper's rows beside it."""

    predictions: str | None = None
    """Folder of predicted PNG masks (palette or grey, ids as pixels), named as the images."""
    checkpoint: str | None = None
    """Run folder or checkpoint file of a training run."""
    name: DataName | None = None
    """Data set; a checkpoint knows its own."""
    root: str | None = None
    """Folder of the data set; a checkpoint knows its own."""
    protocol: Literal["transfgu", "stego", "native"] = "transfgu"
    """transfgu: the paper's tables. stego: curated set, centre crop. native: the annotation's own size."""
    size: int | None = None
    """Side in pixels of the network's input: 320 if unset, or what the checkpoint was trained with."""
    images: int | None = None
    """Score only so many images, spread over the set; such a score is not comparable."""
    match: bool = True
    """Match predicted ids to classes (one Hungarian match); off: predictions are class ids already."""
    allow_missing: bool = False
    """Score a folder although some images have no prediction; the report says how many."""
    predicted_255: Predicted255 = "refuse"
    """255 in a predicted mask where the label is a class: an error, a pixel that is not scored, or a miss."""
    refine: Literal["off", "par"] | None = None
    """Score a checkpoint's predictions as they are, or refined by PAR; as its run has it if unset."""
    method: str | None = None
    """Name of this row in the tables."""
    format: Literal["text", "markdown", "json"] = "text"
    """What is printed."""
    out: str | None = None
    """Folder for eval.txt, eval.md, eval.json and confusion.png."""
    force: bool = False
    """Replace such files if they are there already."""
    batch: int = 16
    """Images per forward pass."""
    workers: int = 2
    """Processes that decode images."""


def main(argv: list[str]) -> int:
    """Run `dmsa eval` with `argv` and return the exit status.

    Raises:
        ValueError: options that contradict each other, or bad data.
        FileNotFoundError: files are missing.
    """
    import tyro

    options = tyro.cli(EvalOptions, args=argv, prog="dmsa eval")
    if (options.predictions is None) == (options.checkpoint is None):
        raise ValueError(
            "expected one of --predictions and --checkpoint, got " + ("both" if options.checkpoint else "none")
        )
    if options.out is not None:
        claim_outputs(options.out, REPORT_FILES, force=options.force)  # before the time that the evaluation takes
    with distributed.process_group():
        report = _run(options)
        if not distributed.is_main():
            return 0
        print({"text": report.text, "markdown": report.markdown, "json": report.json}[options.format]())
        if options.out is not None:
            written = report.write(options.out, options.force)
            print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    return 0


def _run(options: EvalOptions) -> Report:
    common: dict[str, Any] = {"batch": options.batch, "workers": options.workers, "progress": sys.stderr.isatty()}
    if options.checkpoint is not None:
        from dmsa.scoring.predictor import load_predictor
        from dmsa.scoring.refined import remarks

        predictor = load_predictor(options.checkpoint)
        if options.refine is not None:
            model = dataclasses.replace(predictor.config.model, refine=options.refine)
            predictor.config = dataclasses.replace(predictor.config, model=model)
        dataset, protocol = _wanted(options, predictor.config.data, predictor.config.train.seed)
        name = options.method or Path(options.checkpoint).name
        said = remarks(predictor.config)
        return evaluate(predictor.predict, dataset, protocol, method=name, remarks=said, **common)
    if options.refine is not None:
        raise ValueError(f"--refine={options.refine} is about a checkpoint; `dmsa refine` refines a folder of masks")
    if options.predictions is None or options.name is None:
        raise ValueError("--predictions needs --name, the data set to score against")
    dataset, protocol = _wanted(options, DataConfig(name=options.name), 0)
    return evaluate_predictions(
        options.predictions,
        dataset,
        protocol,
        match=options.match,
        allow_missing=options.allow_missing,
        predicted_255=options.predicted_255,
        method=options.method,
        **common,
    )


def _wanted(options: EvalOptions, config: DataConfig, seed: int) -> tuple[SegmentationData, Protocol]:
    """Return the validation set and the protocol: those of `config`, where the options say nothing else."""
    changes: dict[str, Any] = {"val_images": config.val_images if options.images is None else options.images}
    changes |= {name: value for name in ("name", "root", "size") if (value := getattr(options, name)) is not None}
    config = dataclasses.replace(config, **changes)
    return build(config, "val", seed), Protocol(options.protocol, config.size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
