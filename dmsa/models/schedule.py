"""What changes with the epoch: dilation rates, teacher snapshots, the weight of the negative labels."""

from __future__ import annotations

from collections.abc import Sequence

from dmsa.config import Config

RATE_TABLE = (
    (1, 6, 12, 18),
    (1, 1, 2, 3),
    (1, 1, 3, 5),
    (1, 1, 2, 3),
    (1, 1, 3, 5),
    (1, 1, 2, 3),
    (1, 1, 3, 5),
    (1, 1, 2, 3),
    (1, 3, 6, 9),
    (1, 3, 6, 9),
)
"""The paper's Table 1, `R_List`: rates by epoch modulo 10. The first rate belongs to a 1x1 branch and is inert."""

REFERENCE_GRID = 40
"""Side of the token grid the rates are meant for: 320 px at patch size 8, the grid of evaluation."""


def dilations_for_epoch(epoch: int, base: int = 0) -> tuple[int, int, int, int]:
    """Return the pyramid's four dilation rates in an epoch.

    With k = (epoch + base) mod 10: k in {1, 3, 5, 7} gives (1, 1, 2, 3), {2, 4, 6} gives (1, 1, 3, 5), {8, 9} gives
    (1, 3, 6, 9) and 0 gives (1, 6, 12, 18). Source: Table 1 of the paper (arXiv 2303.00199).

    Args:
        epoch: zero-based number of the epoch since the start of the run, at least 0.
        base: number that the table gives to the first epoch, 0 or 1.

    Raises:
        ValueError: `epoch` is negative or not an integer, or `base` is neither 0 nor 1.
    """
    _check_epoch(epoch)
    if base not in (0, 1):
        raise ValueError(f"{base=} is neither 0 nor 1")
    return RATE_TABLE[(epoch + base) % len(RATE_TABLE)]


def grid_aware(rates: Sequence[int], grid: tuple[int, int], reference: int = REFERENCE_GRID) -> tuple[int, ...]:
    """Scale dilation rates with the token grid, so that training crops and evaluation see the same relative distances.

    Rate 18 has 43 % of its off-centre taps inside a 40x40 grid and 5.5 % inside a 20x20 one; scaled to 9 it has 43 %
    there too. A deviation from the paper.

    Args:
        rates: dilation rates for a `reference` grid.
        grid: (h, w) of the token grid.
        reference: side of the grid that `rates` are meant for.

    Returns:
        the rates times min(h, w) / reference, rounded half up, at least 1.
    """
    if min(grid) < 1 or reference < 1:
        raise ValueError(f"{grid=} and {reference=} must be positive")
    return tuple(max(1, int(rate * min(grid) / reference + 0.5)) for rate in rates)


def negative_weight(epochs_since_snapshot: int | None) -> float:
    """Return alpha, the weight of the negative labels: .03, .04, ... .10 by epochs since the teacher's snapshot.

    Args:
        epochs_since_snapshot: 0 in the epoch of the snapshot; `None` before the first one, which gives 0.
    """
    if epochs_since_snapshot is None:
        return 0.0
    _check_epoch(epochs_since_snapshot, "epochs_since_snapshot")
    return min(3 + epochs_since_snapshot, 10) / 100


def is_snapshot_epoch(epoch: int, start: int, interval: int | Sequence[int]) -> bool:
    """Tell whether the teacher is renewed at the beginning of an epoch: at `start`, then every `interval` epochs.

    Args:
        epoch: zero-based.
        start: epoch of the first snapshot.
        interval: epochs between snapshots; a sequence is indexed by (epoch of the previous snapshot) // 10, its last
            entry holding from there on.

    Raises:
        ValueError: a negative epoch, or an interval below 1.
    """
    _check_epoch(epoch)
    _check_epoch(start, "start")
    intervals = (interval,) if isinstance(interval, int) else tuple(interval)
    if not intervals or min(intervals) < 1:
        raise ValueError(f"{interval=} must be at least 1")
    snapshot = start
    while snapshot < epoch:
        snapshot += intervals[min(snapshot // 10, len(intervals) - 1)]
    return snapshot == epoch


def _check_epoch(epoch: int, name: str = "epoch") -> None:
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"{name}={epoch!r} is not an integer of at least 0")


def evaluation_rates(config: Config, epoch: int, grid: tuple[int, int]) -> tuple[int, ...]:
    """Return the rates for evaluating weights that were last trained in `epoch`, on a token grid (h, w)."""
    if config.rates.eval_rates == "fixed":
        rates: tuple[int, ...] = config.rates.fixed_rates
    else:
        rates = dilations_for_epoch(epoch, config.rates.epoch_base)
    return grid_aware(rates, grid) if config.rates.grid_aware else rates
