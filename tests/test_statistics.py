"""Intervals and tests against published or hand-worked values."""

import numpy as np
import pytest

from qmedtune.evaluation import statistics


def test_wilson_against_published_values():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20 and 1 of 29, score method without continuity correction."""
    assert statistics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert statistics.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert statistics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert statistics.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert statistics.wilson(20, 20)[1] == 1.0


def test_bootstrap_covers_and_repeats():
    values = [1.0] * 60 + [0.0] * 40
    low, high = statistics.bootstrap_mean(values, resamples=2000, seed=5)
    assert (low, high) == statistics.bootstrap_mean(values, resamples=2000, seed=5)
    # normal approximation: 0.6 +- 1.96 * sqrt(0.24 / 100)
    assert (low, high) == pytest.approx((0.504, 0.696), abs=0.015)


def test_bootstrap_takes_any_statistic():
    values = np.arange(11.0)
    low, high = statistics.bootstrap(lambda index: float(np.median(values[index])), 11, resamples=500)
    assert low < 5 < high


def test_items_of_one_note_are_drawn_together():
    """Two notes of 100 questions, one all right: the mean of two draws of a note is 0, .5 or 1, with 1/4, 1/2, 1/4."""
    values = np.array([1.0, 0.0] * 100)
    low, high = statistics.bootstrap(lambda i: float(values[i].mean()), 200, groups=["a", "b"] * 100)
    assert (low, high) == (0, 1)
    apart = statistics.bootstrap(lambda i: float(values[i].mean()), 200, groups=list(range(200)))
    assert apart == pytest.approx((0.43, 0.57), abs=0.01)
    uneven = statistics.bootstrap(lambda i: float(len(i)), 4, groups=["a", "b", "b", "b"])
    assert uneven == (2, 6)  # two notes are drawn, with all their questions
    _, interval = statistics.paired_bootstrap(
        lambda i: 0.0, lambda i: float(values[i].mean()), 200, groups=["a", "b"] * 100
    )
    assert interval == (0, 1)


def test_mcnemar_hand_worked():
    """8 gained, 2 lost: p = 2 * (C(10,0) + C(10,1) + C(10,2)) / 2**10 = 112 / 1024."""
    before = [False] * 8 + [True] * 2 + [True] * 5 + [False] * 5
    after = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5
    assert statistics.mcnemar(before, after) == statistics.Paired(8, 2, 112 / 1024)
    assert statistics.mcnemar([True, False], [True, False]) == statistics.Paired(0, 0, 1.0)
    assert statistics.mcnemar([True, False], [False, True]).p_value == 1.0


def test_mcnemar_of_thousands_stays_finite():
    paired = statistics.mcnemar([False] * 4000, [True] * 4000)
    assert 0 <= paired.p_value < 1e-300


def test_paired_bootstrap_is_narrower_than_the_scores():
    before = np.array([0.0, 1.0] * 50)
    after = before.copy()
    after[:10] = 1.0
    difference, (low, high) = statistics.paired_bootstrap(
        lambda i: float(before[i].mean()), lambda i: float(after[i].mean()), 100
    )
    assert difference == pytest.approx(0.05)
    assert 0 <= low < 0.05 < high < 0.12


def test_calibration_error_hand_worked():
    """Bin .9-1: two items, confidence .95, one right: |.5 - .95|; bin .5-.6: one item .55, right: .45. Mean of 3."""
    assert statistics.expected_calibration_error([0.95, 0.95, 0.55], [True, False, True]) == pytest.approx(0.45)
    assert statistics.expected_calibration_error([1.0, 1.0], [True, True]) == 0.0
