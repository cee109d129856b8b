"""Compile every kernel offline with every Triton from 3.0 on, each in an environment of its own that is removed again.

Run it for the table::

    python -m tests.triton_versions --out docs/triton.md [--versions 3.4.0 3.8.0]

An environment holds Triton alone and takes everything else, PyTorch included, from the one that runs the command: the
compiler needs no more. Without ``--versions`` the package index is asked for the releases. For each kernel one case is
compiled for each target, the longest of the dilation lists that are compiled for all targets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("sm_80", "sm_90")


def releases() -> list[str]:
    """Return the versions from 3.0 on that the package index offers for this Python, the oldest first."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    text = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    listed = re.search(r"Available versions: (.*)", text)
    if listed is None:
        raise RuntimeError(f"no versions in the answer of {' '.join(asked)}: {text[:200]!r}")
    found = [version.strip() for version in listed[1].split(",")]
    return sorted((v for v in found if int(v.split(".")[0]) >= 3), key=lambda v: tuple(map(int, v.split("."))))


def compile_with(version: str) -> list[dict]:
    """Return the reports of ``tests.offline --each`` under that Triton."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir", "--target", str(site)]
        subprocess.run([*pip, f"triton=={version}"], check=True, capture_output=True)
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
        environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        command = [str(Path(folder) / "bin" / "python"), "-W", "ignore", "-m", "tests.offline", "--each"]
        done = subprocess.run(
            [*command, "--targets", *TARGETS], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    if not reports:
        raise RuntimeError(f"triton {version}: nothing was compiled\n{done.stderr[-2000:]}")
    return reports


def row(version: str, reports: list[dict]) -> str:
    """Return the table's line: compiled of all, for each target; spills; where the weights are; the first refusal."""
    cells = [version]
    for target in TARGETS:
        here = [report for report in reports if report["target"] == target]
        cells.append(f"{sum('error' not in report for report in here)} of {len(here)}")
    cells.append(str(sum(report.get("spills", 0) for report in reports)))
    held = any(report.get("holds_weights") for report in reports)
    cells.append("in registers" if held else "read again")
    refused = next((report["error"] for report in reports if "error" in report), "")
    cells.append(re.sub(r"[|`]", "'", refused)[:100])
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> None:
    """Compile and write; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", help="instead of all")
    parser.add_argument("--out", type=Path, help="file to write the table to, beside printing it")
    arguments = parser.parse_args(argv)
    lines = [
        "# Triton's versions",
        "",
        "Kernels compiled offline, one case each, and their loads from and stores to local memory.",
        "Propagation keeps a pixel's weights in registers; where the language has no tuples of tensors it reads them",
        "again for every group of channels.",
        f"Written by `python -m tests.triton_versions --out docs/triton.md` with Python {sys.version.split()[0]}.",
        "",
        "| Triton | " + " | ".join(TARGETS) + " | spills | weights | first refusal |",
        "|---|" + "---|" * (len(TARGETS) + 3),
    ]
    print("\n".join(lines), flush=True)
    for version in arguments.versions or releases():
        lines.append(row(version, compile_with(version)))
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
