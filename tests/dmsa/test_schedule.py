"""Rates, snapshots and the alpha counter."""

from __future__ import annotations

import pytest

from dmsa.models.schedule import dilations_for_epoch, grid_aware, is_snapshot_epoch, negative_weight


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("epoch", range(25))
def test_rates_follow_the_table(epoch, base):
    k = (epoch + base) % 10
    if k in (1, 3, 5, 7):
        expected = (1, 1, 2, 3)
    elif k in (2, 4, 6):
        expected = (1, 1, 3, 5)
    elif k in (8, 9):
        expected = (1, 3, 6, 9)
    else:
        expected = (1, 6, 12, 18)
    assert dilations_for_epoch(epoch, base) == expected


def test_rates_refuse_nonsense():
    for epoch in (-1, 1.0, True):
        with pytest.raises(ValueError, match="epoch"):
            dilations_for_epoch(epoch)
    with pytest.raises(ValueError, match="base"):
        dilations_for_epoch(0, base=2)


def test_grid_aware_rates_keep_the_share_of_taps_inside():
    def inside(rates, side):
        axis = 1 - min(rates[-1] / side, 1)
        return (axis + axis**2) / 2

    rates = (1, 6, 12, 18)
    assert grid_aware(rates, (40, 40)) == rates
    assert grid_aware(rates, (20, 20)) == (1, 3, 6, 9)
    assert inside(rates, 20) == pytest.approx(0.055)
    assert inside(grid_aware(rates, (20, 20)), 20) == pytest.approx(inside(rates, 40), abs=1e-9)
    assert grid_aware(rates, (1, 30)) == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="grid"):
        grid_aware(rates, (0, 4))


def test_negative_weight():
    assert negative_weight(None) == 0
    expected = [0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.1]
    assert [negative_weight(epochs) for epochs in range(9)] == pytest.approx(expected)


def test_snapshots_of_the_presets():
    voc = [e for e in range(90) if is_snapshot_epoch(e, 5, (5, 5, 5, 5, 4, 4, 4, 4, 4, 3))]
    assert voc == [5, 10, 15, 20, 25, 30, 35, *range(40, 90, 4)]
    coco = [e for e in range(40) if is_snapshot_epoch(e, 3, (3, 3, 3, 2))]
    assert coco == [*range(3, 31, 3), *range(32, 40, 2)]
    assert [e for e in range(8) if is_snapshot_epoch(e, 1, 2)] == [1, 3, 5, 7]
    with pytest.raises(ValueError, match="interval"):
        is_snapshot_epoch(3, 1, 0)
