"""Figures of a training, and pairs of the same seed."""

from __future__ import annotations

import math

import pytest

from dmsa.scoring.comparison import arrival, arrivals, arrived, difference, figures


def curve(*miou):
    return [{"epoch": epoch, "miou": value, "accuracy": 1 - value} for epoch, value in enumerate(miou)]


def test_figures_are_of_last_and_best_epoch_and_mean():
    found = figures(curve(0.2, 0.4, 0.3))
    assert found == pytest.approx(
        {
            "miou_last": 30,
            "miou_best": 40,
            "miou_mean": 30,
            "accuracy_last": 70,
            "accuracy_best": 60,
            "accuracy_mean": 70,
            "best_epoch": 2,
        }
    )
    with pytest.raises(ValueError, match="empty"):
        figures([])


def test_arrival_is_the_first_epoch_that_is_as_good():
    assert arrival(curve(0.2, 0.4, 0.3), 0.3) == 2
    assert arrival(curve(0.2, 0.4), 0.2) == 1
    assert math.isnan(arrival(curve(0.2, 0.4), 0.5))
    assert arrivals([curve(0.1, 0.3), curve(0.1, 0.3)], [curve(0.1), curve(0.5)]) == pytest.approx(
        [1, math.nan], nan_ok=True
    )
    assert arrived([1, 2, math.nan]) == "1.5 ± 0.7 (2 of 3)"
    assert arrived([math.nan]) == "- (0 of 1)"


def test_difference_is_of_pairs():
    # the spread between seeds, 10 and 30, is in both and cancels
    assert difference([11, 32], [10, 30]) == "+1.50 ± 0.71 (2 of 2)"
    assert difference([10, 30], [11, 30]) == "-0.50 ± 0.71 (0 of 2)"
    assert difference([10], [10]) == "+0.00 (0 of 1)"
