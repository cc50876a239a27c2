"""Intervals by resampling, tests that swap scores, and what a design of a few points can find.

A seed repeats the experiment, so what is reported is the mean of the seeds' own correlations. Its interval comes from a
hierarchical bootstrap: seeds, domains and, within each domain drawn, questions are drawn with replacement.

Shape suffixes: N domains, I items, S seeds, P predictors, K controls, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sts.errors import StsError
from sts.measure import correlation
from sts.measure.correlation import BLOCK, PermutationTest, correlation_rows, points, random_orders, units


@dataclass(frozen=True)
class Interval:
    """A percentile interval; `redrawn` counts resamples without a value, which do not count."""

    low: float
    high: float
    level: float
    resamples: int
    redrawn: int


def percentile_interval(values_B: np.ndarray, level: float = 0.95) -> Interval | None:
    """The central `level` of the values that exist; None if hardly any does."""
    kept = values_B[np.isfinite(values_B)]
    if len(kept) < max(10, len(values_B) // 100):
        return None
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, len(kept), len(values_B) - len(kept))


def bootstrap_interval(x: ArrayLike, y: ArrayLike, *, level: float = 0.95, resamples: int = 5000,
                       seed: int = 0) -> Interval:
    """Percentile interval of Pearson's correlation, points drawn with replacement; resamples without one are redrawn.
    With eight points it tends to be too narrow. Raises as `pearson`."""
    x_N, y_N = points(x, y)
    generator, kept, missing, drawn = np.random.default_rng(seed), [], resamples, 0
    while missing:
        if drawn > 100 * resamples:
            raise StsError("The correlation is undefined on almost every resample of these points; more points with "
                           "different values work.")
        size = min(missing, max(1, BLOCK // x_N.size))
        picked_BN = generator.integers(0, x_N.size, (size, x_N.size))
        values_B = correlation_rows(x_N[picked_BN], y_N[picked_BN])
        kept.append(values_B[np.isfinite(values_B)])
        missing, drawn = missing - kept[-1].size, drawn + size
    low, high = np.quantile(np.concatenate(kept), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, resamples, drawn - resamples)


@dataclass(frozen=True)
class LeaveOneOut:
    """Lowest and highest Pearson correlation after leaving out one point, and the point left out each time."""

    low: float
    low_without: str
    high: float
    high_without: str


@dataclass(frozen=True)
class Correlation:
    """Everything the book says about one scatter plot; `leave_one_out` is None where no point can be left out."""

    n: int
    pearson: float
    pearson_interval: Interval
    p: float
    exact: bool
    permutations: int
    spearman: float
    r_squared: float
    line: correlation.Line
    leave_one_out: LeaveOneOut | None


def correlate(x: ArrayLike, y: ArrayLike, names: Sequence[str], *, seed: int = 0,
              permutations: int = 100_000, resamples: int = 5000) -> Correlation:
    """One predictor and one seed: r with a bootstrap over points and a permutation p. Raises as `pearson`."""
    x_N, y_N = points(x, y)
    test, = correlation.permutation_tests(x_N[None, None], y_N[None], resamples=permutations, seed=seed)
    others = correlation.leave_one_out(x_N, y_N, names) if x_N.size > 3 else {}
    others = {name: value for name, value in others.items() if math.isfinite(value)}
    low, high = (pick(others, key=others.__getitem__, default="") for pick in (min, max))
    r = correlation.pearson(x_N, y_N)
    return Correlation(x_N.size, r, bootstrap_interval(x_N, y_N, resamples=resamples, seed=seed), test.p, test.exact,
                       test.resamples, correlation.spearman(x_N, y_N), r**2, correlation.fit_line(x_N, y_N),
                       LeaveOneOut(others[low], low, others[high], high) if others else None)


@dataclass(frozen=True)
class Resamples:
    """Resampled experiments: the domain at each place, the share of each seed, and the absolute mean change there."""

    domains_BN: np.ndarray
    weights_BS: np.ndarray
    change_BSN: np.ndarray

    def correlations(self, x_SN: np.ndarray, controls_SNK: np.ndarray | None = None) -> np.ndarray:
        """Mean over the seeds drawn of the (partial) correlation in every resample, B; NaN where none is defined."""
        x_BSN, controls = (None if own is None else np.asarray(own, float)[:, self.domains_BN].swapaxes(0, 1)
                           for own in (x_SN, controls_SNK))
        assert x_BSN is not None
        rows_BS = correlation_rows(x_BSN, self.change_BSN, controls)
        # A seed that was not drawn must not spoil the mean.
        values_B = np.where(self.weights_BS > 0, self.weights_BS * rows_BS, 0).sum(1)
        different_B = 1 + (np.diff(np.sort(self.domains_BN, axis=1), axis=1) > 0).sum(1)
        return np.where(different_B >= 3 + (0 if controls is None else controls.shape[-1]), values_B, np.nan)


def hierarchical_resamples(differences_NIS: Sequence[np.ndarray], *, resamples: int = 5000, seed: int = 0) -> Resamples:
    """Draw seeds, domains and, for each domain drawn, its questions (the same for all seeds); all with replacement.

    Drawing questions adds their noise a second time to changes that hold it already, so intervals lean to the wide
    side and towards zero. For each domain `differences_NIS` has after minus before of its questions, items x seeds.
    """
    sizes = [own.shape for own in differences_NIS]
    if (len(sizes) < 3 or not all(items and seeds for items, seeds in sizes) or len({one[1] for one in sizes}) > 1
            or not all(np.isfinite(own).all() for own in differences_NIS)):
        raise StsError(f"Differences of {len(sizes)} domains with (items, seeds) {sizes} were given; at least three "
                       "domains, each with finite values of items and all with the same seeds, work.")
    generator, n, seeds = np.random.default_rng(seed), len(sizes), sizes[0][1]
    domains_BN = generator.integers(0, n, (resamples, n))
    drawn_BS = generator.integers(0, seeds, (resamples, seeds))
    change_BNS = np.empty((resamples, n, seeds))
    for domain, own_IS in enumerate(differences_NIS):
        places = np.argwhere(domains_BN == domain)
        for part in np.array_split(places, max(1, math.ceil(len(places) * own_IS.size / (4 * BLOCK)))):
            picked = generator.integers(0, len(own_IS), (len(part), len(own_IS)))
            change_BNS[part[:, 0], part[:, 1]] = np.abs(own_IS[picked].mean(1))
    weights_BS = np.stack([(drawn_BS == own).mean(1) for own in range(seeds)], axis=1)
    return Resamples(domains_BN, weights_BS, change_BNS.swapaxes(1, 2))


def swap_tests(first_PSN: np.ndarray, second_PSN: np.ndarray, change_SN: np.ndarray, *, exact_up_to: int = 14,
               resamples: int = 16_384, seed: int = 0) -> list[PermutationTest]:
    """Two-sided p of the difference of two scores' correlations with the same changes, mean over seeds; one a pair.

    If two standardised scores are interchangeable, swapping them within a domain, the same in all seeds, changes
    nothing but chance. Up to `exact_up_to` domains all 2^N swappings are counted. NaN where one is constant.
    """
    n = change_SN.shape[-1]
    exact = n <= exact_up_to
    swaps_BN = ((np.arange(2**n)[:, None] >> np.arange(n) & 1) if exact
                else np.random.default_rng(seed).integers(0, 2, (resamples, n))).astype(float)
    found_BP, observed_P = np.zeros((len(swaps_BN), len(first_PSN))), np.zeros(len(first_PSN))
    for one_PN, two_PN, goal_N in zip(units(first_PSN).swapaxes(0, 1), units(second_PSN).swapaxes(0, 1),
                                      units(change_SN), strict=True):
        observed_P += one_PN @ goal_N - two_PN @ goal_N
        # Sum, square sum and product with the goal after a swapping are linear in which domains are swapped.
        gain_BP, square_BP, product_BP = (swaps_BN @ (new - old).T for new, old in (
            (two_PN, one_PN), (two_PN**2, one_PN**2), (two_PN * goal_N, one_PN * goal_N)))
        for sign, own_PN in ((1, one_PN), (-1, two_PN)):
            # The units sum to zero and have length one before anything is swapped.
            spread_BP = np.maximum(1 + sign * square_BP - (sign * gain_BP) ** 2 / n, 0)
            with np.errstate(invalid="ignore", divide="ignore"):
                found_BP += sign * (own_PN @ goal_N + sign * product_BP) / np.sqrt(spread_BP)
    # Where a swapped score is constant the difference does not exist; counted as extreme, to be on the safe side.
    counts_P, total = (~(np.abs(found_BP) < np.abs(observed_P) - 1e-12)).sum(0), len(swaps_BN)
    p_P = counts_P / total if exact else (counts_P + 1) / (total + 1)
    return [PermutationTest(float(p) if np.isfinite(observed) else math.nan, exact, total)
            for p, observed in zip(p_P, observed_P, strict=True)]


def simulated_power(n: int, r: float, *, alpha: float = 0.05, trials: int = 2000, permutations: int = 999,
                    seed: int = 0) -> float:
    """Share of simulated normal experiments of n points in which a permutation test finds a true correlation."""
    generator = np.random.default_rng(seed)
    x_BN = generator.standard_normal((trials, n))
    y_BN = r * x_BN + math.sqrt(1 - r**2) * generator.standard_normal((trials, n))
    orders_MN = np.concatenate(list(random_orders(n, permutations, generator)))
    found = 0
    for x_N, y_N in zip(x_BN - x_BN.mean(1, keepdims=True), y_BN - y_BN.mean(1, keepdims=True), strict=True):
        found += (1 + (np.abs(y_N[orders_MN] @ x_N) >= abs(y_N @ x_N) - 1e-12).sum()) / (permutations + 1) <= alpha
    return found / trials


@dataclass(frozen=True)
class Power:
    """What n points could have found: the r significant at `alpha` (t test), the true r found with `power` (Fisher's
    z), and the shares of simulated experiments with that r, and with none, in which a permutation test finds it."""

    n: int
    alpha: float
    power: float
    needed: float
    detectable: float
    simulated: float
    false_alarms: float


def power_of_design(n: int, *, alpha: float = 0.05, power: float = 0.8) -> Power:
    """What a test over n points can find; `StsError` for fewer than 4."""
    detectable = correlation.smallest_detectable_correlation(n, alpha, power)
    return Power(n, alpha, power, correlation.needed_correlation(n, alpha), detectable,
                 *(simulated_power(n, r, alpha=alpha) for r in (detectable, 0.0)))


