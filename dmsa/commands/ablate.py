"""`dmsa ablate`: the paper's ablation on the embedded data set, or the table of scores."""

from __future__ import annotations

import dataclasses
import os

from dmsa import distributed
from dmsa.training.ablation import ablate


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """Run the paper's ablation, or make the table of scores, on the embedded set or that of another preset."""

    preset: str = "shapes"
    """Preset by name, or YAML file."""
    out: str = "runs/ablation"
    """Folder of the runs, one a row and seed."""
    results: str = "benchmarks/results"
    """Folder of the tables, the CSV files and the picture."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; every row is trained with each."""
    epochs: int | None = None
    """Epochs of a run; the preset's if unset."""
    train_images: int | None = None
    """Training images; the preset's number if unset."""
    val_images: int | None = None
    """Validation images; the preset's number if unset."""
    scores: bool = False
    """Instead of the ablation, make the table of scores: the baselines, TransFGU, DMSA and dmsa_plus."""


def main(argv: list[str]) -> int:
    """Run `dmsa ablate` with `argv`, print the table and return the exit status."""
    import tyro

    options = tyro.cli(AblateConfig, args=argv, prog="dmsa ablate", description=AblateConfig.__doc__)
    try:
        with distributed.process_group():
            lines = ablate(**dataclasses.asdict(options), command=command(options))
    except (ValueError, FileNotFoundError) as error:
        distributed.complain(error, "dmsa ablate")
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(lines))
    return 0


def command(options: AblateConfig) -> str:
    """Return the command line that makes the same tables again, wherever its files lie."""
    words = ["dmsa ablate", *(["--scores"] if options.scores else []), f"--preset {options.preset}"]
    words += [f"--seeds {' '.join(map(str, options.seeds))}"]
    limits = {name: getattr(options, name) for name in ("epochs", "train_images", "val_images")}
    return " ".join([*words, *(f"--{name.replace('_', '-')} {value}" for name, value in limits.items() if value)])
