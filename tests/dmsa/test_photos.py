"""Real photographs end to end, with the options of docs/training.md for a small set and a small backbone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "photos"


def documented_options() -> list[str]:
    """The options that docs/training.md calls SMALL."""
    (text,) = re.findall(r'^SMALL="(.*?)"$', (ROOT / "docs/training.md").read_text(), re.M | re.S)
    return shlex.split(text.replace("\\\n", " "))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    if not (PHOTOS / "coco").is_dir():
        pytest.skip(f"{PHOTOS} is not there: no photographs to train on")
    folder = tmp_path_factory.mktemp("roots")
    for name, script in (("voc", "link_voc.sh"), ("coco_stuff27", "link_coco_stuff.sh")):
        subprocess.run(["bash", str(PHOTOS / script), str(folder / name)], check=True)
    return {"voc": folder / "voc", "coco_stuff27": folder / "coco_stuff27", "coco80": PHOTOS / "coco"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "processes", "classes"), [("voc", 1, 21), ("coco80", 2, 81), ("coco_stuff27", 1, 27)]
)
def test_small_recipe_trains_and_scores(preset, processes, classes, roots, tmp_path):
    out = tmp_path / "run"
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [*documented_options(), "--data.train-images", "64", "--data.val-images", "16", "--train.epochs", "2"]
    words += [
        "--data.workers",
        "0",
        "--labels.bank-images",
        "16",
        "--preset",
        preset,
        "--data.root",
        str(roots[preset]),
    ]
    done = subprocess.run(
        [*launch, "train.py", *words, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "feature bank" in done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "eval"]
    assert [line["epoch"] for line in scored] == [0, 1]
    assert all(len(line["iou"]) == classes and line["images"] == 16 for line in scored)
    assert all(0 < line["miou"] < 1 and 0 < line["accuracy"] < 1 for line in scored)
    report = (out / "report.md").read_text()
    assert "not comparable" in report
    assert "shapes_vit_tiny" in report
