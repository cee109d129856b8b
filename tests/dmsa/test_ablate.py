"""`dmsa ablate`: the switches, the table, and a run through all rows with a stand-in for the trainer."""

from __future__ import annotations

import csv
import dataclasses

import pytest

from dmsa.commands.ablate import main
from dmsa.config import load_preset, resolve_method, to_dict
from dmsa.training.ablation import (
    DMSA,
    PLUS,
    ROWS,
    TRANSFGU,
    ablate,
    ablation_table,
    other_way_row,
    paired_table,
    row_config,
    score_table,
    scores_of,
    switch,
)
from tests.dmsa.runs import tiny_config


def test_switches_are_the_methods():
    base = load_preset("shapes")
    assert switch(base, True, True, True) == base
    baseline = resolve_method(dataclasses.replace(base, method="transfgu"))
    assert to_dict(switch(base, False, False, False)) == {**to_dict(baseline), "method": "dmsa"}
    plus = resolve_method(dataclasses.replace(base, method="dmsa_plus"))
    assert row_config(base, PLUS) == plus != row_config(base, "DMSA (+ ASPP + PAR + seg)") == base
    assert len({str(row_config(base, name)) for name in ROWS}) == len(ROWS)


def curve(*miou, accuracy=0.5):
    return [{"epoch": epoch, "miou": value, "accuracy": accuracy} for epoch, value in enumerate(miou)]


def test_tables_by_hand():
    curves = {TRANSFGU: [curve(0.3, 0.1), curve(0.2, 0.4)], "+ PAR": [curve(0.1, 0.3, accuracy=0.7), curve(0.2, 0.1)]}
    *_, baseline, line = ablation_table(curves)
    assert line == (
        "| + PAR |  | yes |  | 20.00 ± 14.14 | 25.00 ± 7.07 | 17.50 ± 3.54 "
        "| 60.00 ± 14.14 | 60.00 ± 14.14 | 60.00 ± 14.14 | 1.5 ± 0.7 | 2.0 (1 of 2) |"
    )
    assert baseline.endswith("| 1.5 ± 0.7 | 1.5 ± 0.7 (2 of 2) |")
    head, _, *lines = paired_table(curves)
    assert "same seed" in head
    assert lines == [
        "| + PAR | -5.00 ± 35.36 (1 of 2) | -10.00 ± 14.14 (0 of 2) | -7.50 ± 10.61 (0 of 2) "
        "| +10.00 ± 14.14 (1 of 2) | +10.00 ± 14.14 (1 of 2) | +10.00 ± 14.14 (1 of 2) |"
    ]


def test_a_finished_run_is_read_and_a_longer_one_cut(monkeypatch, tmp_path):
    config = tiny_config(tmp_path / "run", epochs=2)
    monkeypatch.setattr("dmsa.training.trainer.git_commit", lambda: "first")
    made, commits = scores_of(config)
    assert [entry["epoch"] for entry in made] == [0, 1]
    assert commits == ["first"]
    monkeypatch.setattr("dmsa.training.trainer.git_commit", lambda: "second")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
    assert scores_of(longer)[0][:2] == made
    assert scores_of(longer)[1] == ["first", "second"]
    monkeypatch.setattr("dmsa.training.ablation.train", lambda config: pytest.fail("trained again"))
    assert scores_of(config) == (made, ["first", "second"])
    other = dataclasses.replace(config, losses=dataclasses.replace(config.losses, seg=0.5))
    with pytest.raises(ValueError, match=r"losses\.seg"):
        scores_of(other)


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
    monkeypatch.setattr(
        "dmsa.training.ablation.other_way_row",
        lambda config, title: {
            "method": f"{title}, {config.model.refine}",
            "miou": 1.0,
            "accuracy": 2.0,
            "boundary": None,
        },
    )
    words = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--seeds", "0", "4"]
    words += ["--epochs", "3"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(seen) == 2 * len(ROWS)
    assert len({config.out for config in seen}) == len(seen)
    assert {config.train.seed for config in seen} == {0, 4}
    assert all(config.train.epochs == 3 and not config.train.baselines for config in seen)
    assert {config.train.teacher_start for config in seen if config.method == "dmsa_plus"} == {1}
    assert "    dmsa ablate --preset shapes --seeds 0 4 --epochs 3" in lines
    with (tmp_path / "results/ablation_shapes.csv").open() as stream:
        entries = list(csv.DictReader(stream))
    assert len(entries) == 2 * 3 * len(ROWS)
    best = {row: max(float(e["miou"]) for e in entries if e["row"] == row) for row in ROWS}
    assert {row for row in best if best[row] == max(best.values())} == {"DMSA (+ ASPP + PAR + seg)", PLUS}
    assert (tmp_path / "results/ablation_shapes.png").stat().st_size > 1000
    table = (tmp_path / "results/ablation_shapes.md").read_text()
    assert "| +30.00 ± 0.00 (2 of 2) |" in table
    with (tmp_path / "results/ablation_shapes_seeds.csv").open() as stream:
        figures = {(entry["row"], entry["seed"]): entry for entry in csv.DictReader(stream)}
    assert len(figures) == 2 * len(ROWS)
    assert figures[DMSA, "4"]["miou_mean"] == "40.0000"
    assert figures[DMSA, "4"]["epochs_to_baselines_best"] == "1"
    assert figures[TRANSFGU, "4"]["epochs_to_baselines_best"] == "3"
    assert main([*words, "--scores"]) == 0
    assert len(seen) == 2 * len(ROWS) + 2 * 3
    assert {config.out for config in seen[-6:]} < {config.out for config in seen[:-6]}
    written = (tmp_path / "results/shapes_scores.md").read_text()
    assert "| clusters | 12.0 ± 2.8 | 40.0 ± 0.0 | 9.0 ± 0.0 |" in written
    assert "| TransFGU, best epoch | 20.0 ± 0.0 | 50.0 ± 0.0 |  |" in written
    assert "| DMSA, last epoch | 50.0 ± 0.0 | 50.0 ± 0.0 |  |" in written
    assert "| DMSA, mean over epochs | 40.0 ± 0.0 | 50.0 ± 0.0 |  |" in written
    assert f"| {DMSA} | +30.00 ± 0.00 (2 of 2) |" in written
    with (tmp_path / "results/shapes_scores.csv").open() as stream:
        scores = list(csv.DictReader(stream))
    assert len(scores) == 2 * 13
    assert "| dmsa_plus, par | 1.0 ± 0.0 | 2.0 ± 0.0 |  |" in written
    assert [row["miou"] for row in scores if row["method"] == "clusters"] == ["10.000", "14.000"]


def test_a_run_is_scored_the_other_way(tmp_path):
    config = tiny_config(tmp_path / "run", epochs=1)
    (entry,), _ = scores_of(config)
    assert other_way_row(config, "DMSA")["method"] == "DMSA, last epoch, predictions refined by PAR"
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, refine="par"))
    row = other_way_row(plain, "x")
    assert row["method"] == "x, last epoch, predictions not refined"
    assert row["miou"] == pytest.approx(100 * entry["miou"], abs=1e-6)


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
