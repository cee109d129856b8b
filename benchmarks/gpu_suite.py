"""The proof on a GPU: one script that checks every kernel and measures every row, with a time budget.

    python -m benchmarks.gpu_suite --out FOLDER                        # everything, at most 9 minutes
    python -m benchmarks.gpu_suite --out FOLDER --sections rows --only 'aspp/*'
    python -m benchmarks.gpu_suite --out FOLDER --device cpu --seconds 60   # a dry run of the same code

Needs torch, triton and numpy; timm for the section `train`. FOLDER gets `log.txt` and `<device>.csv`, which belongs
into benchmarks/results (then `python -m benchmarks.reporting`). The suite always ends with what it has: sections and
rows that the budget does not reach are listed as not run. Exit status 1 if any check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import math
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import resident
from benchmarks.measuring.gpu_checks import Suite, section_aspp, section_graph, section_memory, section_refine
from benchmarks.measuring.harness import measure
from benchmarks.measuring.machines import commit, machine, versions
from benchmarks.measuring.results import table, write_csv

ROW_MODULES = ("bench_refine", "bench_sweep", "bench_aspp", "bench_cam", "bench_step")
BUDGET_S = 540.0


def section_tune(suite: Suite) -> None:
    """Measure the launch configurations of the training workloads; log what was chosen and how long it took."""
    from benchmarks.measuring.cases import CASES
    from dmsa_kernels.refine.warmup import warmup

    for case in CASES:
        if not suite.on_gpu:
            case = case.scaled(1, min(3, case.classes), 16, 16)
        if case.pixels * case.classes > 1 << 28:  # shares its bucket's configuration with a smaller one, or takes long
            continue
        if suite.left < 20:
            suite.not_run.append(f"tune: {case.name}")
            continue
        image = suite.rand(case.batch, 3, case.height, case.width)
        masks = suite.rand(*case.shape)
        for precision in ("exact", "fast"):
            start = time.monotonic()
            chosen = warmup(image, masks, case.dilations, case.num_iter, spec=case.spec, precision=precision)
            text = ", ".join(f"{kernel} {config}" for kernel, config in chosen.items()) or "nothing to tune here"
            suite.log(f"{case.name}, {precision}: {text} ({time.monotonic() - start:.1f} s)")


def row_modules(suite: Suite) -> Iterator[tuple[str, Any]]:
    """Import the modules that list rows; one that cannot be imported here is named as not run."""
    for name in ROW_MODULES:
        try:
            yield name, importlib.import_module(f"benchmarks.measuring.{name}")
        except ImportError as error:
            suite.not_run.append(f"rows: {name}: {error}")


def section_rows(suite: Suite) -> None:
    """Every workload with all its baselines, written to the CSV row by row."""
    mach = machine(suite.device)
    suite.log(mach.describe())
    path = suite.out / f"{slug(mach.hardware)}.csv"
    append = False
    for name, module in row_modules(suite):
        for row in module.rows(suite.device, full=suite.on_gpu):
            if suite.arguments.only and not fnmatch.fnmatch(row.name, suite.arguments.only):
                continue
            if suite.left < 5:
                suite.not_run.append(f"rows: {row.name}")
                continue
            if suite.arguments.skip_compiled:
                kept = tuple(candidate for candidate in row.candidates if not candidate.compiled)
                row = dataclasses.replace(row, candidates=kept)
            try:
                results = measure(
                    row, mach, seconds=suite.arguments.row_seconds, deadline=time.monotonic() + max(1.0, suite.left - 5)
                )
            except Exception as error:
                traceback.print_exc()
                suite.fail(f"{row.name}: {type(error).__name__}: {error}")
                continue
            suite.log(table(results))
            write_csv(results, path, append=append)
            append = True
            for result in results:
                if result.ours and result.status in ("wrong", "error", "out of memory"):
                    suite.fail(f"{row.name}: {result.candidate}: {result.status}: {result.note}")
        suite.log(f"benchmarks.measuring.{name} done")


def slug(text: str) -> str:
    """Return a file name made from a device's name: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def section_sanitizer(suite: Suite) -> None:
    """Run a few cases of the checks under compute-sanitizer: memory errors, then races in shared memory."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not suite.on_gpu or tool is None:
        suite.not_run.append("sanitizer: " + ("compute-sanitizer is not installed" if suite.on_gpu else "needs a GPU"))
        return
    for kind in ("memcheck", "racecheck"):
        limit = min(90.0, suite.left - 10)
        if limit < 20:
            suite.not_run.append(f"sanitizer: {kind}")
            continue
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite"]
        command += ["--out", str(suite.out / f"sanitizer-{kind}"), "--sections", "refine,aspp", "--cases", "4"]
        command += ["--seed", str(suite.arguments.seed), "--seconds", str(limit)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
        except subprocess.TimeoutExpired:
            suite.not_run.append(f"sanitizer: {kind} took longer than {limit:.0f} s")
            continue
        text = done.stdout + done.stderr
        (suite.out / f"sanitizer-{kind}.txt").write_text(text, encoding="utf-8")
        summary = [line.strip() for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        if not summary:
            suite.not_run.append(f"sanitizer: {kind} gave no summary; see sanitizer-{kind}.txt")
            continue
        suite.log(f"{kind}: {summary[-1]}")
        suite.expect(done.returncode != 9, f"{kind}: {summary[-1]}")


def section_resident(suite: Suite) -> None:
    """One launch for all iterations of small maps: right, and faster? In a process of its own, which it may break."""
    if not suite.on_gpu:
        suite.not_run.append("resident: needs a GPU")
        return
    limit = min(120.0, suite.left - 10)
    command = [sys.executable, "-m", "benchmarks.measuring.resident", "--device", "cuda"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        suite.fail(f"the checks of one launch for all iterations did not end within {limit:.0f} s")
        return
    (suite.out / "resident.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("ok: ")]
    suite.log("\n".join(lines))
    if done.returncode == 2:
        suite.not_run.append(f"resident: {lines[-1]}")
        return
    suite.expect(done.returncode == 0, f"one launch for all iterations: exit status {done.returncode}; resident.txt")
    if done.returncode == 0:
        resident.WHY_NOT_MEASURED = None


def section_train(suite: Suite) -> None:
    """Short training with everything on: labels by PAR, the pyramid, four losses, optimiser; losses finite and falling.

    First with the kernels alone, then the method's own training loop where timm is installed.
    """
    from dmsa_kernels.aspp import DepthwiseASPP
    from dmsa_kernels.refine import refine

    torch.manual_seed(suite.draw.getrandbits(30))
    side, classes, width = (160, 21, 64) if suite.on_gpu else (32, 4, 8)
    stem = torch.nn.Conv2d(3, width, 8, stride=8)
    pyramid = DepthwiseASPP(width, width, [1, 6, 12, 18], pointwise_first=True, backend=suite.backend)
    model = torch.nn.Sequential(stem, pyramid, torch.nn.Conv2d(width, classes, 1)).to(suite.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, scores = suite.rand(4, 3, side, side), suite.rand(4, classes, side // 2, side // 2)
    dilations = [1, 2, 4, 8, 12, 24] if suite.on_gpu else [1, 4]
    losses = []
    for step in range(12 if suite.on_gpu else 4):
        labels, _ = refine(
            images, scores, dilations, 10 if suite.on_gpu else 2, resize="image", return_labels=True, backend="auto"
        )
        target = labels[:, ::4, ::4]
        rates = ([1, 1, 2, 3], [1, 6, 12, 18])[step % 2]
        with torch.autocast(suite.device.type, dtype=torch.bfloat16):
            logits = model[2](pyramid(model[0](images), rates))
        loss = torch.nn.functional.cross_entropy(logits.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    suite.log(f"kernels alone: loss {first:.3f} -> {last:.3f}")
    suite.expect(math.isfinite(last) and last < first, f"the loss went from {first} to {last}")
    for package in ("timm", "yaml", "sklearn"):
        if importlib.util.find_spec(package) is None:
            suite.not_run.append(f"train: the method's training loop needs {package}")
            return
    _train_method(suite)


def _train_method(suite: Suite) -> None:
    """Run `train.py` for two short epochs on the embedded data set, in a process of its own."""
    folder = suite.out / "run"
    options = [
        "--out",
        str(folder),
        "--train.epochs",
        "2",
        "--train.teacher_start",
        "1",
        "--train.teacher_interval",
        "1",
    ]
    options += ["--data.train_images", "64", "--data.val_images", "16", "--data.workers", "0", "--train.log_every", "1"]
    limit = max(20.0, min(150.0, suite.left - 5))
    root = Path(__file__).parents[1]
    if not (root / "train.py").exists():
        suite.not_run.append("train: train.py is not there")
        return
    try:
        done = subprocess.run(
            [sys.executable, "train.py", *options], capture_output=True, text=True, timeout=limit, cwd=root
        )
    except subprocess.TimeoutExpired:
        suite.not_run.append(f"train: train.py took longer than {limit:.0f} s")
        return
    (suite.out / "train.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    suite.expect(done.returncode == 0, f"train.py ended with {done.returncode}; see train.txt")
    suite.log("train.py: " + (done.stdout.strip().splitlines() or ["no output"])[-1])


SECTIONS: dict[str, Callable[[Suite], None]] = {
    "refine": section_refine,
    "aspp": section_aspp,
    "graph": section_graph,
    "memory": section_memory,
    "resident": section_resident,
    "sanitizer": section_sanitizer,
    "train": section_train,
    "tune": section_tune,
    "rows": section_rows,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for log.txt and the CSV; made if it is not there")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cuda or cpu")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "eager"), help="what the checks test")
    parser.add_argument("--sections", default="all", help=f"comma-separated, of {', '.join(SECTIONS)}; or all")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="time budget of the whole call")
    parser.add_argument("--row-seconds", type=float, default=1.0, help="time of the timed rounds of one row")
    parser.add_argument("--only", default="", help="rows whose name matches, such as 'refine/afa_train/*'")
    parser.add_argument("--skip-compiled", action="store_true", help="leave the torch.compile baselines out")
    parser.add_argument("--cases", type=int, default=48, help="random cases of each correctness section")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random cases (drawn and logged if absent)")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().getrandbits(30)
    chosen = list(SECTIONS) if arguments.sections == "all" else arguments.sections.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise ValueError(f"sections={unknown} are not known; expected some of {', '.join(SECTIONS)}")

    suite = Suite(arguments)
    with contextlib.closing(suite.lines):
        suite.log(f"{suite.device}, backend under test {suite.backend}, seed {arguments.seed}, commit {commit()}")
        suite.log(", ".join(f"{name} {version}" for name, version in versions().items()))
        for name in chosen:
            suite.section = name
            if suite.left < 5:
                suite.not_run.append(name)
                continue
            suite.log(f"--- {name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}")
            try:
                SECTIONS[name](suite)
            except Exception as error:
                traceback.print_exc()
                suite.fail(f"{type(error).__name__}: {error}")
        for line in suite.not_run:
            suite.log(f"not run: {line}")
        for line in suite.failures:
            suite.log(f"failed: {line}")
        suite.log(f"{len(suite.failures)} failures, {len(suite.not_run)} not run")
    return 1 if suite.failures else 0


if __name__ == "__main__":
    sys.exit(main())
