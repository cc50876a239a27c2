"""Statistics of paired test items: the mean of their differences with an interval, and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import _block_sizes, _check_settings, _vector

#: Fewest items for a bootstrap interval of a mean. Resampling a few items understates their spread, by (n - 1) / n in
#: the variance, and takes no account of that spread being an estimate: with five normal items, a nominal 95% interval
#: leaves the true mean out in 16% of samples.
BOOTSTRAP_FROM = 16


@dataclass(frozen=True)
class MeanInterval:
    """Mean of `n` values, its standard error (sample standard deviation over sqrt(n)) and an interval.

    `kind` is "bootstrap" (percentiles of `resamples` resamples), "t" (Student's) or "none" (one value; ends are NaN).
    """

    mean: float
    standard_error: float
    low: float
    high: float
    level: float
    n: int
    kind: str
    resamples: int = 0


def paired_mean_interval(differences: Sequence[float], *, level: float = 0.95, resamples: int = 5_000,
                         seed: int = 0) -> MeanInterval:
    """Mean of paired differences (after minus before, one a test item), in their units, with an interval over items.

    From 16 items (`BOOTSTRAP_FROM`) the interval is the percentile bootstrap; for 2 to 15 it is Student's t, mean
    +- t(n - 1) * standard error. That is exact for normal differences and too narrow for skewed ones (five exponential
    items: it leaves the true mean out in 12% of samples, the bootstrap in 23%). One item says nothing about spread:
    for n = 1 the standard error and both ends of the interval are NaN, and the sign counts as not resolved.

    Raises:
        StsError: no items, NaN or infinite values, or settings out of range.
    """
    differences_N = _vector("differences", differences)
    _check_settings(resamples, level)
    n = differences_N.size
    if n == 0:
        raise StsError("No differences given; at least one paired item is needed, two for an interval.")
    mean = float(differences_N.mean())
    if n == 1:
        return MeanInterval(mean, math.nan, math.nan, math.nan, level, 1, "none")
    standard_error = float(differences_N.std(ddof=1) / math.sqrt(n))
    if n < BOOTSTRAP_FROM:
        reach = float(scipy_stats.t.ppf((1 + level) / 2, n - 1)) * standard_error
        return MeanInterval(mean, standard_error, mean - reach, mean + reach, level, n, "t")
    generator = np.random.default_rng(seed)
    means = np.concatenate([differences_N[generator.integers(0, n, (size, n))].mean(axis=1)
                            for size in _block_sizes(n, resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return MeanInterval(mean, standard_error, float(low), float(high), level, n, "bootstrap", resamples)


def mcnemar_p(before: Sequence[bool], after: Sequence[bool]) -> float:
    """McNemar's exact test: whether items turn from wrong to right as often as from right to wrong.

    Two-sided binomial test on the items that changed (`scipy.stats.binomtest`); 1 if none did.

    Args:
        before, after: whether each item is right, one pair an item.

    Raises:
        StsError: lengths differ, or no items.
    """
    before_N, after_N = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before_N.shape != after_N.shape or before_N.ndim != 1 or not before_N.size:
        raise StsError(f"before has shape {before_N.shape} and after {after_N.shape}; two lists of equal length, one "
                       "value an item, work.")
    gained, lost = int((after_N & ~before_N).sum()), int((before_N & ~after_N).sum())
    return float(scipy_stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
