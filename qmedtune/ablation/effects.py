"""How sure an ablation is: intervals over seeds and items, and paired tests between arms.

Every seed trains a model anew and all models answer the same items, so both are sources of chance and they are
crossed. Treating 3 seeds x 120 items as 360 independent answers would make intervals about half as wide as they are.
Plain numpy. Deliberately absent: mixed models; tests on scores that are no means over items.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log, sqrt

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
SIGNIFICANCE = 0.05


def t_quantile(df: float) -> float:
    """The 97.5 % point of Student's t, by integrating its density (to 1e-3 for df >= 1)."""
    x = np.concatenate([np.linspace(0, 20, 20_001), np.geomspace(20.01, 1e4, 20_000)])
    scale = exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(df * np.pi)
    density = scale * (1 + x * x / df) ** (-(df + 1) / 2)
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return float(np.interp(0.975, below, x))


def standard_error(scores: np.ndarray) -> tuple[float, float]:
    """Of the mean of scores [seeds, items]: (error, degrees of freedom).

    Seeds and items are both drawn, so their variances add: var(item means)/items + var(seed means)/seeds, a bound
    from above (it counts their interaction twice). Degrees of freedom: Satterthwaite (1946). One seed: items alone.
    """
    seeds, items = scores.shape
    by_item, by_seed = _variance_of_mean(scores.mean(axis=0)), _variance_of_mean(scores.mean(axis=1))
    total = by_item + by_seed
    parts = by_item**2 / max(1, items - 1) + by_seed**2 / max(1, seeds - 1)
    if not parts:  # all scores are equal
        return sqrt(total), float(max(1, items - 1))
    return sqrt(total), total**2 / parts


def _variance_of_mean(values: np.ndarray) -> float:
    """Of independent values; 0 where one alone tells nothing of it."""
    if len(values) < 2:
        return 0.0
    return values.var(ddof=1) / len(values)


def mean_interval(scores: np.ndarray) -> Interval:
    """95 % interval of the mean of scores in [0, 1], [seeds, items].

    Wilson's, with the number of independent answers that the standard error amounts to (Korn and Graubard 1998) and
    Student's t in place of 1.96. Where all answers agree there is no error to estimate: seeds then count for nothing.
    """
    p = float(scores.mean())
    error, df = standard_error(scores)
    answers = scores.shape[1]
    if error:
        answers = p * (1 - p) / error**2
    return _wilson(p, min(answers, scores.size), t_quantile(df))


def _wilson(p: float, n: float, z: float) -> Interval:
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def seeds_interval(values: Sequence[float], ratio: bool = False) -> Interval | None:
    """95 % t interval over seeds alone, of what is no mean over items; on the log scale for `ratio` (perplexity).

    None for one seed.
    """
    if len(values) < 2:
        return None
    if ratio:
        low, high = _t_interval(np.log(values))
        return exp(low), exp(high)
    return _t_interval(np.asarray(values, dtype=np.float64))


def _t_interval(values: np.ndarray) -> Interval:
    half = t_quantile(len(values) - 1) * values.std(ddof=1) / sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def centre(values: Sequence[float], ratio: bool = False) -> float:
    """The mean that `seeds_interval` is around: geometric for `ratio`."""
    if ratio:
        return exp(sum(map(log, values)) / len(values))
    return float(np.mean(values))


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of no difference between two arms on the same seeds and items, scores [seeds, items].

    Sign-flip test over items (Fisher 1935): an item's difference is averaged over its seeds and flips as one, so that
    seeds are pooled and never counted as more items. Exact in the limit; 10,000 flips, the observed one among them.
    """
    difference = (second - first).mean(axis=0)
    changed = difference[np.abs(difference) > 1e-12]
    if not len(changed):
        return 1.0
    flips = np.random.default_rng(0).choice((-1.0, 1.0), size=(RESAMPLES - 1, len(changed)))
    reached = np.abs(flips @ changed) >= abs(changed.sum()) - 1e-9
    return float((1 + reached.sum()) / RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the chance of any false difference among all of them stays below 5 %."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted.tolist()
