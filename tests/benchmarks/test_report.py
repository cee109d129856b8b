"""The report: tables say what the results say, regressions are named, the exit status can be relied on."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks.measuring.results import RESULTS, Result, result_files, write_csv
from benchmarks.reporting.__main__ import load, main
from benchmarks.reporting.compare import compare
from benchmarks.reporting.plot import draw, sweep_series
from benchmarks.reporting.tables import BEGIN, END, family_table, replace_between, tables


def make(candidate="ours", *, ours=True, **changes) -> Result:
    result = Result(
        family="refine",
        workload="afa_train",
        variant="refine",
        dtype="float32",
        shape="1,3,256,256",
        scaled_from="",
        candidate=candidate,
        ours=ours,
        median_ms=2.0,
        p20_ms=1.9,
        p80_ms=2.1,
        samples=9,
        speedup=1.0,
        peak_bytes=10 << 20,
        percent_copy=61.0,
        device="cpu",
        hardware="AMD EPYC, 2 cores",
        copy_gb_per_s=20.0,
        threads=2,
        torch="2.15.0",
        triton="3.9.0",
        commit="abc",
        date="2026-01-01",
    )
    return dataclasses.replace(result, **changes)


def materialising(**changes) -> Result:
    values = {"median_ms": 80.0, "speedup": 40.0, "peak_bytes": 38 << 20, **changes}
    return make("materialising", ours=False, **values)


def test_nothing_changed_is_no_regression():
    results = [make(), materialising()]
    assert compare(results, results) == []


def test_a_slower_row_is_named():
    (line,) = compare([make()], [make(median_ms=2.3, p20_ms=2.25)])
    assert "refine/afa_train/refine/float32 1,3,256,256 ours" in line
    assert "15 % slower (2.00 -> 2.30 ms)" in line


def test_a_slower_row_within_the_spread_says_so():
    (line,) = compare([make()], [make(median_ms=2.3, p20_ms=2.0)])
    assert "within the spread of the samples" in line


@pytest.mark.parametrize(("factor", "count"), [(0.5, 0), (1.0, 0), (1.09, 0), (1.11, 1)])
def test_the_threshold_is_ten_per_cent(factor, count):
    assert len(compare([make()], [make(median_ms=2.0 * factor)])) == count


def test_more_memory_is_a_regression():
    (line,) = compare([make()], [make(peak_bytes=20 << 20)])
    assert "100 % more memory" in line


def test_a_row_that_is_gone_or_wrong_is_a_regression():
    lines = compare([make(), make(workload="diffcut")], [make(status="wrong", note="error 1 over the bound")])
    assert any("diffcut" in line and "no longer measured" in line for line in lines)
    assert any("afa_train" in line and "wrong: error 1" in line for line in lines)


def test_baselines_are_not_judged():
    assert compare([make(), materialising()], [make(), materialising(median_ms=500.0)]) == []


def test_the_worst_comes_first():
    old = [make(), make(workload="diffcut")]
    new = [make(median_ms=2.5), make(workload="diffcut", median_ms=9.0)]
    assert ["diffcut" in line for line in compare(old, new)] == [True, False]


def test_compare_on_the_command_line(tmp_path, capsys):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv([make(), materialising()], old)
    write_csv([make(median_ms=3.0), materialising()], new)
    assert main(["compare", str(old), str(old)]) == 0
    assert "1 rows compared, 0 regressions" in capsys.readouterr().out
    assert main(["compare", str(old), str(new)]) == 1
    assert "regression: refine/afa_train/refine/float32 1,3,256,256 ours: 50 % slower" in capsys.readouterr().out
    assert main(["compare", str(old), str(new), "--threshold", "60"]) == 0


def test_compare_notes_another_machine(tmp_path, capsys):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv([make()], old)
    write_csv([make(hardware="another")], new)
    main(["compare", str(old), str(new)])
    assert "different machines" in capsys.readouterr().out


def test_the_table_shows_factor_time_and_memory():
    lines = family_table([make(), materialising()])
    assert lines[0] == (
        "| workload | shape | ours | % of copy | peak memory | materialising | peak of the worst baseline |"
    )
    assert lines[2] == "| afa_train | 1,3,256,256 | 2.00 ms | 61 | 10.5 MB | 40.0x (80.0 ms) | 39.8 MB |"


def test_out_of_memory_and_scaling_are_in_the_table():
    full = [
        make(scaled_from="1,1281,512,683"),
        materialising(
            status="out of memory",
            note="out of memory at 80 GB (needs about 28.7 GB)",
            median_ms=math.nan,
            estimate_bytes=int(28.7e9),
            peak_bytes=-1,
        ),
    ]
    text = "\n".join(family_table(full))
    assert "(full: 1,1281,512,683)" in text
    assert "| out of memory at 80 GB | 28.7 GB |" in text


def test_no_factor_without_a_passed_gate():
    text = "\n".join(
        family_table(
            [make(status="wrong", median_ms=math.nan, note="error"), materialising(speedup=math.nan)],
        )
    )
    assert "x (" not in text
    assert "| wrong |" in text


def test_a_missing_gpu_file_is_said():
    text = tables([("cpu", [make()])])
    assert "**GPU**: not measured yet" in text
    assert "not measured yet" not in tables([("gpu", [make(device="cuda", hardware="a GPU")])])


def test_the_sections_are_replaced_and_checked(tmp_path, capsys):
    results, pages = tmp_path / "results", [tmp_path / "README.md", tmp_path / "full.md"]
    minor = [make(workload="toco_train"), materialising(workload="toco_train")]
    write_csv([make(), materialising(), *minor], results / "cpu.csv")
    for page in pages:
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--results", str(results), "--readme", str(pages[0]), "--full", str(pages[1])]
    arguments += ["--plot", str(tmp_path / "p.png")]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert "40.0x (80.0 ms)" in text
        assert ("toco_train" in text) == (page.name == "full.md")
    assert main([*arguments, "--check"]) == 0
    write_csv([make(median_ms=3.0), materialising(), *minor], results / "cpu.csv")
    assert main([*arguments, "--check"]) == 1
    capsys.readouterr()


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="benchmarks:begin"):
        replace_between("no markers", "x")


def test_the_plot_is_drawn_from_the_sweeps(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        make(name, ours=name == "ours", workload=workload, shape=shape, median_ms=float(i + 1))
        for workload, shapes in (
            ("sweep_channels", ["1,4,64,64", "1,1,64,64"]),
            ("sweep_pixels", ["1,3,32,32", "1,3,64,64"]),
        )
        for i, shape in enumerate(shapes)
        for name in ("ours", "materialising")
    ]
    series = sweep_series(points, "sweep_channels")
    assert [size for size, _ in series["ours"]] == [1, 4]
    assert [size for size, _ in sweep_series(points, "sweep_pixels")["ours"]] == [1024, 4096]
    assert draw([("cpu", points)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not draw([("cpu", [make()])], tmp_path / "none.png")


def test_tables_of_scores_are_no_result_files(tmp_path):
    write_csv([make()], tmp_path / "card.csv")
    (tmp_path / "any_scores.csv").write_text("method,seed,miou,accuracy,boundary\n")
    (tmp_path / "empty.csv").write_text("")
    assert result_files(tmp_path) == [tmp_path / "card.csv"]


def test_the_committed_results_are_read(capsys):
    """Tables of scores lie in the same folder; neither the report nor the cost model may stumble over them."""
    from benchmarks.modelling import cost_model

    assert result_files(), "no results are committed"
    assert (RESULTS / "shapes_scores.csv").is_file()
    assert load(RESULTS)
    cost_model.main([])
    assert result_files()[0].stem in capsys.readouterr().out
