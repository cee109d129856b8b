"""`dmsa ablate`: the switches, the table, and a run through all rows with a stand-in for the trainer."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from dmsa.commands.ablate import main
from dmsa.config import load_preset, resolve_method, to_dict
from dmsa.training.ablation import PLUS, ROWS, ablate, ablation_table, arrival, row_config, score_table, switch


def test_switches_are_the_methods():
    base = load_preset("shapes")
    assert switch(base, True, True, True) == base
    baseline = resolve_method(dataclasses.replace(base, method="transfgu"))
    assert to_dict(switch(base, False, False, False)) == {**to_dict(baseline), "method": "dmsa"}
    plus = resolve_method(dataclasses.replace(base, method="dmsa_plus"))
    assert row_config(base, PLUS) == plus != row_config(base, "DMSA (+ ASPP + PAR + seg)") == base
    assert len({str(row_config(base, name)) for name in ROWS}) == len(ROWS)


def test_arrival_by_hand():
    assert arrival([10, 20, 29.5, 30, 25]) == 3
    assert arrival([5]) == 1
    assert arrival([30, 10, 29.5]) == 1
    with pytest.raises(ValueError, match="empty"):
        arrival([])


def test_table_by_hand():
    runs = [
        [{"epoch": 0, "miou": 0.10, "accuracy": 0.5}, {"epoch": 1, "miou": 0.30, "accuracy": 0.7}],
        [{"epoch": 0, "miou": 0.20, "accuracy": 0.9}, {"epoch": 1, "miou": 0.10, "accuracy": 0.7}],
    ]
    *_, line = ablation_table({"+ PAR": runs})
    assert line == "| + PAR |  | yes |  | 25.00 ± 7.07 | 80.00 ± 14.14 | 20.00 ± 14.14 | 1.5 ± 0.7 | 1.5 ± 0.7 |"


def test_every_row_and_seed_is_trained_and_written(monkeypatch, tmp_path, capsys):
    seen = []

    def stand_in(config):
        seen.append(config)
        better = 0.1 * ((config.model.aspp != "off") + (config.labels.par == "on") + (config.losses.seg > 0))
        return {"scores": [{"epoch": e, "miou": 0.1 * e + better, "accuracy": 0.5} for e in range(3)]}

    monkeypatch.setattr("dmsa.training.ablation.train", stand_in)
    monkeypatch.setattr(
        "dmsa.training.ablation.baseline_rows",
        lambda config: [{"method": "clusters", "miou": 10.0 + config.train.seed, "accuracy": 40.0, "boundary": 9.0}],
    )
    words = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--seeds", "0", "4"]
    words += ["--epochs", "3"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(seen) == 2 * len(ROWS)
    assert len({config.out for config in seen}) == len(seen)
    assert {config.train.seed for config in seen} == {0, 4}
    assert all(config.train.epochs == 3 and not config.train.baselines for config in seen)
    assert "    dmsa ablate --preset shapes --seeds 0 4 --epochs 3" in lines
    with (tmp_path / "results/ablation_shapes.csv").open() as stream:
        entries = list(csv.DictReader(stream))
    assert len(entries) == 2 * 3 * len(ROWS)
    best = {row: max(float(e["miou"]) for e in entries if e["row"] == row) for row in ROWS}
    assert {row for row in best if best[row] == max(best.values())} == {"DMSA (+ ASPP + PAR + seg)", PLUS}
    assert (tmp_path / "results/ablation_shapes.png").stat().st_size > 1000
    assert "50.00 ± 0.00" in (tmp_path / "results/ablation_shapes.md").read_text()
    assert main([*words, "--scores"]) == 0
    assert len(seen) == 2 * len(ROWS) + 2 * 3
    assert {config.out for config in seen[-6:]} < {config.out for config in seen[:-6]}
    written = (tmp_path / "results/shapes_scores.md").read_text()
    assert "| clusters | 12.0 ± 2.8 | 40.0 ± 0.0 | 9.0 ± 0.0 |" in written
    assert "| TransFGU, best epoch | 20.0 ± 0.0 | 50.0 ± 0.0 |  |" in written
    assert "| DMSA, last epoch | 50.0 ± 0.0 | 50.0 ± 0.0 |  |" in written
    with (tmp_path / "results/shapes_scores.csv").open() as stream:
        scores = list(csv.DictReader(stream))
    assert len(scores) == 2 * 7
    assert [row["miou"] for row in scores if row["method"] == "clusters"] == ["10.000", "14.000"]


def test_score_table_by_hand():
    one = [{"method": "a", "miou": 10.0, "accuracy": 50.0, "boundary": None}]
    two = [{"method": "a", "miou": 20.0, "accuracy": 50.0, "boundary": None}]
    assert score_table([one, two])[-1] == "| a | 15.0 ± 7.1 | 50.0 ± 0.0 |  |"
    assert score_table([one])[-1] == "| a | 10.0 | 50.0 |  |"


def test_no_seed_is_an_error(capsys):
    with pytest.raises(ValueError, match="seed"):
        ablate("shapes", seeds=(), out="runs", results="results")
    assert main(["--preset", "no_such_preset"]) == 1
    assert "no_such_preset" in capsys.readouterr().err
