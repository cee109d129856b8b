"""The cost model: counts by hand, a fit that recovers known constants, predictions that behave."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.measuring.cases import SIX, RefineCase
from benchmarks.measuring.results import Result, write_csv
from benchmarks.modelling import cost_model, fit
from benchmarks.modelling.cost_model import CLUSTERS, GPUS, Cost


def test_counts_of_a_small_refinement_by_hand():
    # One pixel more than nothing: 1 image, 2 channels, 3x5 pixels, 8 neighbours, 4 iterations, float32.
    case = RefineCase("small", 1, 2, 3, 5, (4,), 4)
    cost = cost_model.propagate_cost(case)
    assert cost.floor_bytes == 4 * (2 * 2 * 15)
    assert cost.device_bytes == 4 * (2 * 2 * 15 + 8 * 15)
    assert cost.cache_bytes == 4 * (2 * 15 * 8 * 4)
    assert cost.operations == 2 * (2 * 15 * 8 * 4)
    assert cost.launches == 6  # two channels are packed and unpacked
    affinity = cost_model.affinity_cost(case)
    assert affinity.device_bytes == 4 * (3 * 15 + 8 * 15)
    total = cost_model.refine_cost(case)
    assert total == cost + affinity
    assert total.floor_bytes == case.floor_bytes()
    assert total.operations == case.operations
    assert total.cache_bytes == case.cache_bytes() + affinity.cache_bytes


def test_counts_of_the_convolution_by_hand():
    cost = cost_model.dwconv_cost(2, 3, 4, 5, 4)
    assert cost.floor_bytes == 4 * (2 * 3 * 20) * 5
    assert cost.operations == 2 * (2 * 3 * 20) * 4 * 9
    gradients = cost_model.dwconv_cost(2, 3, 4, 5, 4, backward=True)
    assert gradients.floor_bytes == 4 * (2 * 3 * 20) * (2 * 4 + 2)
    assert (gradients.operations, gradients.launches) == (2 * cost.operations, 3)


def test_vit_operations_are_the_published_ones():
    # DeiT-S / DINO ViT-S/16 at 224 px: 4.6 G multiply-adds with the patch embedding (0.06 G).
    assert cost_model.vit_operations(197) / 2 == pytest.approx(4.5e9, rel=0.03)


def test_what_does_not_fit_the_cache_passes_memory_every_iteration():
    small = cost_model.propagate_cost(RefineCase("small", 1, 8, 128, 128, SIX, 10), l2_bytes=40 << 20)
    large = cost_model.propagate_cost(RefineCase("large", 1, 8, 2048, 2048, SIX, 10), l2_bytes=40 << 20)
    assert small.device_bytes == 4 * (2 * 8 + 48) * 128**2
    # one chunk, whose second buffer is the result's own memory, so that the weights are read once
    assert large.device_bytes == 10 * 4 * (2 * 8 + 48) * 2048**2


def test_a_prediction_grows_with_every_count_and_names_the_largest_term():
    gpu = GPUS[3]
    idle = Cost(0, 0, 0, 0, 0, 1)
    assert cost_model.predicted_seconds(idle, gpu) == pytest.approx(cost_model.LAUNCH_S)
    for name, cost in {
        "memory": Cost(0, 10**10, 0, 0, 0, 1),
        "L2": Cost(0, 0, 10**11, 0, 0, 1),
        "L1": Cost(0, 0, 0, 10**11, 0, 1),
        "arithmetic": Cost(0, 0, 0, 0, 10**13, 1),
        "launches": Cost(0, 0, 0, 0, 0, 50),
    }.items():
        assert cost_model.bound_by(cost, gpu) == name
        assert cost_model.predicted_seconds(cost, gpu) > cost_model.predicted_seconds(idle, gpu)


def rows(constants, noise=0.0, count=12):
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        operations, nbytes = (int(10 ** rng.uniform(5, 10)) for _ in range(2))
        seconds = constants[0] + constants[1] * operations + constants[2] * nbytes
        found.append(
            Result(
                family="refine",
                workload=f"w{i}",
                variant="refine",
                dtype="float32",
                shape="1,1,1,1",
                scaled_from="",
                candidate="ours",
                ours=True,
                median_ms=1e3 * seconds * (1 + noise * rng.standard_normal()),
                operations=operations,
                floor_bytes=nbytes,
                hardware="a CPU",
            )
        )
    return found


def test_the_fit_recovers_its_constants():
    true = (2e-5, 3e-10, 1e-9)
    found = fit.fit("refine", rows(true))
    assert found.constants == pytest.approx(true, rel=1e-6)
    assert found.worst_error < 1e-6
    assert found.left_out_error < 1e-6


def test_the_fit_reports_its_error():
    found = fit.fit("refine", rows((2e-5, 3e-10, 1e-9), noise=0.2))
    assert 0.02 < found.median_error < 0.4
    assert found.median_error <= found.worst_error
    assert found.left_out_error > found.median_error / 2


def test_constants_are_not_negative():
    features = np.array([[1.0, 10.0, 5.0], [1.0, 20.0, 1.0], [1.0, 30.0, 9.0], [1.0, 40.0, 2.0]])
    assert (fit.non_negative_fit(features, np.array([9.0, 19.0, 27.0, 40.0])) >= 0).all()


def test_three_rows_are_too_few():
    with pytest.raises(ValueError, match="3 rows"):
        fit.fit("refine", rows((1e-5, 1e-10, 1e-9), count=3))


def test_baselines_and_failures_are_not_fitted():
    good, bad, baseline = rows((1e-5, 1e-10, 1e-9), count=3)
    bad.status, baseline.ours = "wrong", False
    assert list(fit.measured([good, bad, baseline]).values()) == [[good]]


def test_the_run_of_the_paper():
    six, many, _ = (cost_model.predict_run(27, cluster) for cluster in CLUSTERS)
    assert many.total < six.total
    for prediction in (six, many):
        hours = prediction.hours
        assert all(math.isfinite(part) and part > 0 for part in hours.values())
        assert prediction.step >= max(hours["network"], hours["launches"], hours["data"])
        assert prediction.total >= prediction.step
        assert prediction.dominant
    assert cost_model.predict_run(81, CLUSTERS[0]).hours["refinement"] > six.hours["refinement"]


def test_the_page_is_written_and_checked(tmp_path, capsys):
    notes, results = tmp_path / "NOTES.md", tmp_path / "results"
    write_csv(rows((2e-5, 3e-10, 1e-9)), results / "cpu.csv")
    notes.write_text(f"# Notes\n{cost_model.BEGIN}\n{cost_model.END}\nrest\n")
    arguments = ["--notes", str(notes), "--results", str(results)]
    assert cost_model.main([*arguments, "--check"]) == 1
    assert cost_model.main([*arguments, "--write"]) == 0
    assert cost_model.main([*arguments, "--check"]) == 0
    text = notes.read_text()
    assert "nothing here was measured" in text
    assert "| refine refine, ours | 12 |" in text
    assert text.endswith("rest\n")
    capsys.readouterr()
    assert cost_model.main(arguments[2:]) == 0
    assert "predicted" in capsys.readouterr().out


def test_the_loader_rate_is_the_measured_one():
    (row,) = rows((0.15, 0.0, 0.0), count=1)
    row.family, row.workload, row.variant, row.items, row.median_ms = "data", "loading", "train", 12, 150.0
    assert cost_model.loader_rate([("cpu", [row])]) == pytest.approx(80)
    assert cost_model.loader_rate([]) == cost_model.IMAGES_PER_WORKER_S


def test_missing_markers_are_an_error(tmp_path):
    notes = tmp_path / "NOTES.md"
    notes.write_text("nothing")
    with pytest.raises(ValueError, match="cost model:begin"):
        cost_model.main(["--notes", str(notes), "--write"])
