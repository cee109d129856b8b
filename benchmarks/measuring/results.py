"""What came out: one line a candidate, as CSV and as text."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Result:
    """One line of the CSV: one candidate of one row on one device."""

    family: str
    workload: str
    variant: str
    dtype: str
    shape: str
    scaled_from: str
    candidate: str
    ours: bool
    status: str = "ok"
    """`ok`, `wrong`, `out of memory`, `skipped` or `error`."""
    note: str = ""
    error: float = math.nan
    tolerance: float = math.nan
    median_ms: float = math.nan
    p20_ms: float = math.nan
    p80_ms: float = math.nan
    samples: int = 0
    graph_ms: float = math.nan
    """Median of one call inside a replayed CUDA graph."""
    first_call_s: float = math.nan
    """First call minus a steady one: compilation."""
    tune_s: float = math.nan
    """Time spent measuring launch configurations beforehand (with what that had to compile)."""
    speedup: float = math.nan
    """Median over the rounds of this candidate's time over ours."""
    peak_bytes: int = -1
    """Measured peak beyond the inputs (the output included); -1 if not measured."""
    peak_how: str = ""
    estimate_bytes: int = 0
    floor_bytes: int = 0
    cache_bytes: int = 0
    operations: int = 0
    items: float = 0
    gb_per_s: float = math.nan
    percent_copy: float = math.nan
    percent_cache: float = math.nan
    device: str = ""
    hardware: str = ""
    copy_gb_per_s: float = math.nan
    cache_gb_per_s: float = math.nan
    cache_how: str = ""
    threads: int = 0
    torch: str = ""
    triton: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the same measurement in another file."""
        return (self.family, self.workload, self.variant, self.dtype, self.shape, self.candidate)


COLUMNS = [item.name for item in dataclasses.fields(Result)]


def write_csv(results: Iterable[Result], path: str | Path, *, append: bool = False) -> None:
    """Write (or append) results as CSV, numbers with five significant digits, an empty field for what is not known."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = not (append and path.exists() and path.stat().st_size)
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if header:
            writer.writeheader()
        for result in results:
            writer.writerow({key: _cell(value) for key, value in dataclasses.asdict(result).items()})


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return str(value)


def read_csv(path: str | Path) -> list[Result]:
    """Read what `write_csv` wrote.

    Raises:
        FileNotFoundError: there is no such file; the message lists the committed ones.
        ValueError: a file without the needed columns.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(item.name for item in result_files()) or "none"
        raise FileNotFoundError(f"no results at {path}; committed in {RESULTS.name}/: {known}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"family", "workload", "variant", "candidate", "median_ms"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"{path} is not a result file: columns {', '.join(sorted(missing))} are missing")
        return [_result(line) for line in reader]


def result_files(folder: Path = RESULTS) -> list[Path]:
    """Return the result files of a folder, by name; other tables that lie there (scores of training) have no family."""
    return [path for path in sorted(folder.glob("*.csv")) if "family" in _columns(path)]


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _result(line: dict[str, str]) -> Result:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Result):
        text = line.get(item.name) or ""
        if item.type == "float":
            values[item.name] = float(text) if text else math.nan
        elif item.type == "int":
            values[item.name] = int(text) if text else -1
        elif item.type == "bool":
            values[item.name] = text == "1"
        else:
            values[item.name] = text
    return Result(**values)


def number(value: float, digits: int = 3) -> str:
    """Format a number with so many significant digits and no exponent; an empty text for NaN."""
    if math.isnan(value):
        return ""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def table(results: Sequence[Result]) -> str:
    """Return the results as text, one line a candidate; the reason instead of a number where there is none."""
    lines = []
    for result in results:
        name = f"{result.family}/{result.workload}/{result.variant}/{result.dtype} {result.shape}"
        if result.scaled_from:
            name += f" (scaled down from {result.scaled_from})"
        if not lines or name != lines[-1][0]:
            lines.append((name, name))
        if result.status != "ok":
            lines.append((name, f"  {result.candidate:34s} {result.status}: {result.note}"))
            continue
        spread = f"{number(result.median_ms)} ms [{number(result.p20_ms)}, {number(result.p80_ms)}]"
        parts = [f"  {result.candidate:34s} {spread:32s}"]
        if not math.isnan(result.graph_ms):
            parts.append(f"graph {number(result.graph_ms)} ms")
        if not result.ours and not math.isnan(result.speedup):
            parts.append(f"ours is {number(result.speedup)}x")
        if result.peak_bytes >= 0:
            parts.append(f"peak {human_bytes(result.peak_bytes)}")
        if not math.isnan(result.percent_copy):
            parts.append(f"{result.percent_copy:.0f} % of copy")
        if not math.isnan(result.percent_cache):
            parts.append(f"{result.percent_cache:.0f} % of cache")
        if result.first_call_s >= 0.5:
            parts.append(f"first call +{result.first_call_s:.1f} s")
        if result.tune_s > 0:
            parts.append(f"tuned in {result.tune_s:.1f} s")
        if result.note:
            parts.append(result.note)
        lines.append((name, ", ".join(parts)))
    return "\n".join(line for _, line in lines)


def human_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
