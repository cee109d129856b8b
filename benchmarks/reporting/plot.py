"""The picture of time and peak memory against size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.results import Result
from benchmarks.reporting.tables import SWEEPS


def sweep_series(results: Sequence[Result], workload: str) -> dict[str, list[tuple[int, Result]]]:
    """Return the points of one sweep: candidate to (size, result), in order of size.

    The size is C for `sweep_channels` and H·W for `sweep_pixels`, read from the shape `B,C,H,W`.
    """
    series: dict[str, list[tuple[int, Result]]] = {}
    for result in results:
        if result.workload == workload and result.status == "ok":
            _, channels, height, width = (int(item) for item in re.findall(r"\d+", result.shape)[:4])
            size = channels if workload == "sweep_channels" else height * width
            series.setdefault(result.candidate, []).append((size, result))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def draw(files: Sequence[tuple[str, Sequence[Result]]], path: Path) -> bool:
    """Draw time and peak memory against size, from the last file that holds the sweeps; tell whether there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [(stem, results) for stem, results in files if any(r.workload in SWEEPS for r in results)]
    if not chosen:
        return False
    # A GPU's file rather than a CPU's, if there are both.
    results = max(chosen, key=lambda item: item[1][0].device == "cuda")[1]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (workload, label) in enumerate(SWEEPS.items()):
        for name, points in sweep_series(results, workload).items():
            sizes = [size for size, _ in points]
            style = {"linewidth": 2.2, "zorder": 3} if points[0][1].ours else {"linewidth": 1.2}
            axes[0, column].plot(sizes, [r.median_ms for _, r in points], marker="o", markersize=4, label=name, **style)
            memory = [r.peak_bytes / 1e6 for _, r in points]
            axes[1, column].plot(sizes, memory, marker="o", markersize=4, label=name, **style)
        for axis, quantity in zip(axes[:, column], ("time, ms", "peak memory, MB"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=quantity)
            axis.grid(True, which="major", linewidth=0.4)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"PAR, 6 dilations, 10 iterations, float32 on {results[0].hardware}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
