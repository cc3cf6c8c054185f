"""Intervals and tests against published or hand-worked values."""

import numpy as np
import pytest
import scipy
from statsmodels.stats import contingency_tables, multitest, proportion

from qmedtune.ablation import effects
from qmedtune.evaluation import statistics
from qmedtune.results import Paired


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
    test = "McNemar exact"
    assert statistics.mcnemar(before, after) == Paired(test=test, gained=8, lost=2, p_value=112 / 1024)
    unchanged = statistics.mcnemar([True, False], [True, False])
    assert unchanged == Paired(test=test, gained=0, lost=0, p_value=1.0)
    assert statistics.mcnemar([True, False], [False, True]).p_value == 1.0


@pytest.mark.parametrize("nets", [[2, -1, 3, 1], [1, 1, -2, 0, 3, -1, 2, 2], [0, 0], [4, -4, 4]])
def test_sign_flips_are_scipys_exact_permutation_test(nets):
    def total(x, y, axis):
        return np.sum(x - y, axis=axis)

    zeros = np.zeros(len(nets))
    theirs = scipy.stats.permutation_test(
        (np.array(nets, dtype=float), zeros), total, permutation_type="samples", n_resamples=np.inf
    )
    assert statistics.sign_flip(nets) == pytest.approx(theirs.pvalue, rel=1e-12)


def test_sign_flips_of_items_that_stand_alone_are_mcnemars_test():
    for gained, lost in ((8, 2), (0, 0), (30, 11), (700, 640)):
        nets = [1] * gained + [-1] * lost + [0] * 5
        theirs = statistics.mcnemar([False] * gained + [True] * lost, [True] * gained + [False] * lost).p_value
        assert statistics.sign_flip(nets) == pytest.approx(theirs, rel=1e-9)


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


def test_bins_of_a_reliability_diagram_hand_worked():
    """.5 opens the bin .5-.6; 1 belongs to the last; bins without answers are left out."""
    found = statistics.calibration_bins([0.5, 0.59, 1.0, 0.95, 0.05], [True, False, True, True, False])
    assert [(each.low, each.high, each.n) for each in found] == [(0.0, 0.1, 1), (0.5, 0.6, 2), (0.9, 1.0, 2)]
    assert [each.accuracy for each in found] == [0.0, 0.5, 1.0]
    assert [each.confidence for each in found] == pytest.approx([0.05, 0.545, 0.975])


def test_the_error_is_what_the_bins_say():
    dice = np.random.default_rng(4)
    confidences = dice.random(300)
    correct = dice.random(300) < confidences**2  # too sure
    bins = statistics.calibration_bins(list(confidences), list(correct))
    said = sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / 300
    assert statistics.expected_calibration_error(list(confidences), list(correct)) == pytest.approx(said)
    assert sum(each.n for each in bins) == 300 and said > 0.1


def test_bins_are_scikit_learns():
    from sklearn.calibration import calibration_curve

    dice = np.random.default_rng(8)
    confidences, correct = dice.random(400), dice.random(400) < 0.6
    right, sure = calibration_curve(correct, confidences, n_bins=10, strategy="uniform")
    bins = statistics.calibration_bins(list(confidences), list(correct))
    assert [each.accuracy for each in bins] == pytest.approx(list(right))
    assert [each.confidence for each in bins] == pytest.approx(list(sure))


# ---- beside scipy and statsmodels ------------------------------------------------------------------------------------


def test_tango_of_no_change_has_a_width_and_is_symmetric():
    """0 gained, 0 lost: the test keeps |d| while n d^2 <= z^2 |d| (1 - |d|), so the ends are z^2 / (n + z^2)."""
    low, high = statistics.tango(0, 0, 20)
    assert high == pytest.approx(3.8414588 / 23.8414588) and low == pytest.approx(-high)
    assert statistics.tango(5, 9, 60) == pytest.approx(tuple(-x for x in reversed(statistics.tango(9, 5, 60))))
    assert statistics.tango(20, 0, 20)[1] == 1.0 and statistics.tango(0, 20, 20)[0] == -1.0


def _profile_z(gained: int, lost: int, n: int, difference: float) -> float:
    """The same score statistic with the restricted maximum searched numerically in place of Tango's formula."""
    same = n - gained - lost

    def nll(q: float) -> float:
        terms = ((gained, q + difference), (lost, q), (same, 1 - 2 * q - difference))
        return -sum(count * np.log(max(p, 1e-300)) for count, p in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = scipy.optimize.minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / np.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 50), (3, 1, 44), (40, 25, 500), (1, 0, 20), (9, 9, 30)])
def test_tango_ends_are_where_a_numerical_score_test_meets_its_quantile(gained, lost, n):
    z = scipy.stats.norm.ppf(0.975)
    low, high = statistics.tango(gained, lost, n)
    assert low < (gained - lost) / n < high
    assert _profile_z(gained, lost, n, low) == pytest.approx(z, abs=2e-3)
    assert _profile_z(gained, lost, n, high) == pytest.approx(-z, abs=2e-3)


def test_tango_covers():
    """1,000 draws of 60 pairs, 15 % gained and 10 % lost: the interval holds .05 in 95 % (+- 2 standard errors)."""
    generator = np.random.default_rng(4)
    drawn = generator.multinomial(60, [0.15, 0.10, 0.75], size=1000)
    intervals = [statistics.tango(int(gained), int(lost), 60) for gained, lost, _ in drawn]
    held = [low <= 0.05 <= high for low, high in intervals]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("gained", "lost"), [(8, 2), (0, 0), (30, 30), (1, 12), (200, 150)])
def test_mcnemar_is_that_of_statsmodels_and_scipys_sign_test(gained, lost):
    before = [False] * gained + [True] * lost + [True] * 5
    after = [True] * gained + [False] * lost + [True] * 5
    ours = statistics.mcnemar(before, after)
    theirs = contingency_tables.mcnemar([[5, lost], [gained, 0]], exact=True)
    assert ours.p_value == pytest.approx(min(1.0, float(theirs.pvalue)), rel=1e-9)
    if gained + lost:
        assert ours.p_value == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue, rel=1e-9)


@pytest.mark.parametrize(("count", "n"), [(0, 7), (3, 20), (281, 500), (500, 500)])
def test_wilson_is_that_of_statsmodels(count, n):
    assert statistics.wilson(count, n) == pytest.approx(proportion.proportion_confint(count, n, method="wilson"))


def test_bootstrap_is_that_of_scipy_up_to_its_draws():
    values = np.random.default_rng(1).beta(2, 5, 80)
    ours = statistics.bootstrap_mean(values.tolist(), resamples=4000)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.006)


def test_auroc_is_mann_whitneys():
    generator = np.random.default_rng(2)
    scores, positive = generator.integers(0, 6, 90).astype(float), generator.random(90) < 0.3
    u = scipy.stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert statistics.auroc(scores, positive) == pytest.approx(u / positive.sum() / (~positive).sum())


def test_effects_are_those_of_scipy_and_statsmodels():
    for df in (1, 2, 7.5, 100):
        assert effects.t_quantile(df) == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=1e-3)
    p_values = [0.01, 0.04, 0.03, 0.2, 0.01]
    assert effects.holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())
    generator = np.random.default_rng(3)
    first, second = generator.random((1, 24)), generator.random((1, 24)) + 0.25
    theirs = scipy.stats.permutation_test(
        (first[0], second[0]), lambda a, b: np.mean(b) - np.mean(a), permutation_type="samples", n_resamples=9999
    )
    assert effects.paired_p(first, second) == pytest.approx(theirs.pvalue, abs=0.01)
