"""Correlations over a handful of points, such as eight or fourteen domains, and what so few can show.

No large-sample formula is trusted with so few points: p comes from permutations, all of them where that is affordable.
A seed repeats the experiment, so what is reported is the mean of the seeds' own correlations. Its interval comes from a
hierarchical bootstrap: seeds, domains and, within each domain drawn, questions are drawn with replacement.

Shape suffixes: N points (domains), I items, S seeds, K controls, P predictors, B orders or resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from sts.errors import StsError

#: A vector whose range is below this fraction of its size is constant up to rounding.
CONSTANT = 1e-13
#: All orders of up to so many points are counted, and all swappings.
EXACT_UP_TO, SWAPS_UP_TO = 8, 14
#: What a design is judged by: the two-sided level, and the share of experiments that should find a correlation.
ALPHA, POWER = 0.05, 0.8


class PermutationTest(NamedTuple):
    """A p value, whether every permutation was counted (`exact`), and how many were."""

    p: float
    exact: bool
    resamples: int


def plain(value: Any) -> Any:
    """What JSON can hold: None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, list):
        return [plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def points(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors of at least three numbers that pair up and are not constant; `StsError` otherwise."""
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    if x_N.ndim != 1 or x_N.shape != y_N.shape or x_N.size < 3:
        raise StsError(f"x has shape {x_N.shape} and y {y_N.shape}; two lists of as many numbers, at least 3, work.")
    for name, own_N in (("x", x_N), ("y", y_N)):
        if not np.isfinite(own_N).all():
            raise StsError(f"{name} has values that are NaN or infinite; leave those points out of both first.")
        if np.ptp(own_N) <= CONSTANT * np.abs(own_N).max():
            raise StsError(f"{name} is constant ({own_N[0]:g} at every point), so a correlation is not defined; points "
                           "with at least two different values work.")
    return x_N, y_N


def units(values_N: np.ndarray, controls_NK: np.ndarray | None = None) -> np.ndarray:
    """What a constant and the controls leave of values (last axis), at length 1; NaN where nothing is left."""
    values_N = np.asarray(values_N, float)
    spread = np.ptp(values_N, axis=-1, keepdims=True)
    # Dividing by the range first keeps the squares below from over- or underflowing.
    spread = np.where(spread > 0, spread, np.nan)
    left = (values_N - values_N.mean(-1, keepdims=True)) / spread
    if controls_NK is not None:
        # Of a control that is constant here (a category without a domain in this resample) nothing is taken out.
        known_NK = np.nan_to_num(units(controls_NK.swapaxes(-1, -2))).swapaxes(-1, -2)
        basis_NK, size_K, _ = np.linalg.svd(known_NK, full_matrices=False)
        basis_NK = basis_NK * (size_K > 1e-9)[..., None, :]
        left = left - (basis_NK @ (basis_NK.swapaxes(-1, -2) @ left[..., None]))[..., 0]
    length, size = (np.sqrt((own**2).sum(-1, keepdims=True)) for own in (left, values_N / spread))
    return left / np.where(length > CONSTANT * size, length, np.nan)


def correlation_rows(x_N: np.ndarray, y_N: np.ndarray, controls_NK: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation along the last axis, -1 to 1; given controls, that of what least squares on them and a
    constant leaves. NaN where not defined; leading dimensions broadcast."""
    return np.clip((units(x_N, controls_NK) * units(y_N, controls_NK)).sum(-1), -1, 1)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation; `StsError` for unequal lengths, fewer than 3 points, NaN or a constant vector."""
    return float(correlation_rows(*points(x, y)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank. Raises as `pearson`."""
    return float(correlation_rows(*(scipy_stats.rankdata(own) for own in points(x, y))))


def correlate(x: ArrayLike, y: ArrayLike, names: Sequence[str], *, seed: int = 0, permutations: int = 100_000,
              resamples: int = 5000) -> dict[str, Any]:
    """All that the book says about one scatter plot: r with a bootstrap over points and a permutation p.

    Keys: n, pearson, pearson_interval, p, exact, permutations, spearman, r_squared, line (slope, intercept) and
    leave_one_out (see there). Raises as `pearson`.
    """
    x_N, y_N = points(x, y)
    test, = permutation_tests(x_N[None, None], y_N[None], resamples=permutations, seed=seed)
    (slope, intercept), r = np.polyfit(x_N, y_N, 1).tolist(), pearson(x_N, y_N)
    return {"n": x_N.size, "pearson": r, "pearson_interval": bootstrap_interval(x_N, y_N, resamples, seed),
            "p": test.p, "exact": test.exact, "permutations": test.resamples, "spearman": spearman(x_N, y_N),
            "r_squared": r**2, "line": {"slope": slope, "intercept": intercept},
            "leave_one_out": leave_one_out(x_N, y_N, names)}


def leave_one_out(x_N: np.ndarray, y_N: np.ndarray, names: Sequence[str]) -> dict[str, Any] | None:
    """Lowest and highest r without one point, and the point left out (low_without, high_without); None if undefined."""
    r_N = np.array([correlation_rows(x_N[kept_N], y_N[kept_N]) for kept_N in ~np.eye(x_N.size, dtype=bool)])
    if x_N.size < 4 or not np.isfinite(r_N).any():
        return None
    low, high = int(np.nanargmin(r_N)), int(np.nanargmax(r_N))
    return {"low": float(r_N[low]), "low_without": str(names[low]), "high": float(r_N[high]),
            "high_without": str(names[high])}


def random_orders(n: int, count: int, seed: int | np.random.Generator) -> np.ndarray:
    """`count` random orders of n places, B x N."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


def orders(n: int, count: int, seed: int) -> tuple[np.ndarray, bool]:
    """Every order of up to `EXACT_UP_TO` places, and True; of more places `count` random ones, and False."""
    if n <= EXACT_UP_TO:
        return np.array(list(itertools.permutations(range(n)))), True
    return random_orders(n, count, seed), False


def p_value(values_B: np.ndarray, observed: Any, exact: bool = False) -> np.ndarray:
    """Share of values that reach the observed one, which counts as one more unless it is among them (`exact`)."""
    reached = (values_B >= observed - 1e-12).sum(0)  # what is equal up to rounding is a tie
    p = reached / len(values_B) if exact else (reached + 1) / (len(values_B) + 1)
    return np.where(np.isfinite(observed), p, np.nan)


def shuffled(x_PSN: np.ndarray, y_SN: np.ndarray, orders_BN: np.ndarray,
             controls_SNK: np.ndarray | None = None) -> np.ndarray:
    """Mean over seeds of each predictor's correlation with y in other orders, the same in all seeds; B x P."""
    shuffled_BSN = units(y_SN, controls_SNK)[:, orders_BN].swapaxes(0, 1)
    if controls_SNK is not None:
        shuffled_BSN = units(shuffled_BSN, controls_SNK)
    flat_PM = units(x_PSN, controls_SNK).reshape(len(x_PSN), -1) / len(y_SN)
    return shuffled_BSN.reshape(len(orders_BN), -1) @ flat_PM.T


def permutation_tests(x_PSN: np.ndarray, y_SN: np.ndarray, controls_SNK: np.ndarray | None = None, *,
                      resamples: int = 100_000, seed: int = 0) -> list[PermutationTest]:
    """Two-sided permutation p of the mean over seeds of each predictor's correlation with y; NaN where not defined.

    Domains are shuffled in the same order for all seeds, whose results are not independent. With controls, the
    residuals of y are shuffled and the controls taken out again (Freedman and Lane 1983), so that p is never exact.
    """
    orders_BN, exact = orders(y_SN.shape[1], resamples, seed)
    observed_P, values_BP = (np.abs(shuffled(x_PSN, y_SN, own_BN, controls_SNK))
                             for own_BN in (np.arange(y_SN.shape[1])[None], orders_BN))
    return [PermutationTest(float(p), exact and controls_SNK is None, len(orders_BN))
            for p in p_value(values_BP, observed_P[0], exact)]


def swap_tests(first_PSN: np.ndarray, second_PSN: np.ndarray, change_SN: np.ndarray, *, resamples: int = 16_384,
               seed: int = 0) -> list[PermutationTest]:
    """Two-sided p of the difference of two scores' correlations with the same changes, mean over seeds; one a pair.

    If two standardised scores are interchangeable, swapping them within a domain, the same in all seeds, changes
    nothing but chance. Up to `SWAPS_UP_TO` domains all 2^N swappings are counted. NaN where one is constant.
    """
    n = change_SN.shape[-1]
    exact = n <= SWAPS_UP_TO
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
    p_P = p_value(np.nan_to_num(np.abs(found_BP), nan=np.inf), np.abs(observed_P), exact)
    return [PermutationTest(float(p), exact, len(swaps_BN)) for p in p_P]


def percentile_interval(values_B: np.ndarray) -> dict[str, Any] | None:
    """The central 95% of the values that exist: low, high, resamples (how many do); None if hardly any does."""
    kept = values_B[np.isfinite(values_B)]
    if len(kept) < max(10, len(values_B) // 100):
        return None
    low, high = np.quantile(kept, [0.025, 0.975]).tolist()
    return {"low": low, "high": high, "resamples": len(kept)}


def bootstrap_interval(x_N: np.ndarray, y_N: np.ndarray, resamples: int, seed: int = 0) -> dict[str, Any] | None:
    """Interval of Pearson's correlation, points drawn with replacement. With eight points it tends to be too narrow."""
    # Twice as many are drawn, as some may hold one value alone.
    drawn_BN = np.random.default_rng(seed).integers(0, x_N.size, (2 * resamples, x_N.size))
    values_B = correlation_rows(x_N[drawn_BN], y_N[drawn_BN])
    return percentile_interval(values_B[np.isfinite(values_B)][:resamples])


def cluster_interval(x_SN: np.ndarray, y_SN: np.ndarray, clusters_N: ArrayLike, resamples: int = 5000,
                     seed: int = 0) -> dict[str, Any] | None:
    """Interval of the mean over seeds of Pearson's correlation, whole clusters of points drawn with replacement: what
    points of one cluster have in common (subjects of one category) is then drawn once, not as often as it has points.
    """
    members_CN = np.asarray(clusters_N) == np.unique(clusters_N)[:, None]
    n = len(members_CN)
    weights_BN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples) @ members_CN
    weights_BN = weights_BN / weights_BN.sum(1, keepdims=True)

    def covariances(one_SN: np.ndarray, other_SN: np.ndarray) -> np.ndarray:
        return weights_BN @ (one_SN * other_SN).T - (weights_BN @ one_SN.T) * (weights_BN @ other_SN.T)

    x_SN, y_SN = units(x_SN), units(y_SN)
    spread_BS = np.sqrt(np.maximum(covariances(x_SN, x_SN) * covariances(y_SN, y_SN), 0))
    # Of a resample of one value alone, rounding is left.
    return percentile_interval((covariances(x_SN, y_SN) / np.where(spread_BS > CONSTANT, spread_BS, np.nan)).mean(1))


class Resamples(NamedTuple):
    """Resampled experiments: the domain at each place, the share of each seed, and the absolute mean change there."""

    domains_BN: np.ndarray
    weights_BS: np.ndarray
    change_BSN: np.ndarray

    def correlations(self, x_SN: np.ndarray, controls_SNK: np.ndarray | None = None) -> np.ndarray:
        """Mean over the seeds drawn of the (partial) correlation in every resample, B; NaN where none is defined."""
        controls = None if controls_SNK is None else controls_SNK[:, self.domains_BN].swapaxes(0, 1)
        rows_BS = correlation_rows(x_SN[:, self.domains_BN].swapaxes(0, 1), self.change_BSN, controls)
        # A seed that was not drawn must not spoil the mean.
        values_B = np.where(self.weights_BS > 0, self.weights_BS * rows_BS, 0).sum(1)
        different_B = 1 + (np.diff(np.sort(self.domains_BN, axis=1), axis=1) > 0).sum(1)
        return np.where(different_B >= 3 + (0 if controls is None else controls.shape[-1]), values_B, np.nan)


def hierarchical_resamples(differences_NIS: Sequence[np.ndarray], *, resamples: int = 5000, seed: int = 0) -> Resamples:
    """Draw seeds, domains and, for each domain drawn, its questions (the same for all seeds); all with replacement.

    Drawing questions adds their noise a second time to changes that hold it already, so intervals lean to the wide
    side and towards zero. For each domain `differences_NIS` has after minus before of its questions, items x seeds.
    """
    generator, n, seeds = np.random.default_rng(seed), len(differences_NIS), differences_NIS[0].shape[1]
    domains_BN = generator.integers(0, n, (resamples, n))
    drawn_BS = generator.integers(0, seeds, (resamples, seeds))
    change_BNS = np.empty((resamples, n, seeds))
    for domain, own_IS in enumerate(differences_NIS):
        here_BN = domains_BN == domain
        picked = generator.integers(0, len(own_IS), (here_BN.sum(), len(own_IS)))
        change_BNS[here_BN] = np.abs(own_IS[picked].mean(1))
    weights_BS = np.stack([(drawn_BS == own).mean(1) for own in range(seeds)], axis=1)
    return Resamples(domains_BN, weights_BS, change_BNS.swapaxes(1, 2))


def smallest_detectable_correlation(n: int) -> float:
    """The true correlation that a two-sided test on n points finds with probability `POWER`, by Fisher's z."""
    if n < 4:
        raise StsError(f"{n} points given; Fisher's z needs at least 4.")
    z = scipy_stats.norm.ppf(1 - ALPHA / 2) + scipy_stats.norm.ppf(POWER)
    return float(np.tanh(z / math.sqrt(n - 3)))


def needed_correlation(n: int) -> float:
    """The r that n points need for a two-sided p of `ALPHA`, by Student's t."""
    t = scipy_stats.t.ppf(1 - ALPHA / 2, n - 2)
    return float(t / math.sqrt(n - 2 + t**2))


def simulated_power(n: int, r: float, *, trials: int = 2000, permutations: int = 999) -> float:
    """Share of simulated normal experiments of n points in which a permutation test finds a true correlation."""
    generator = np.random.default_rng(0)
    x_BN = generator.standard_normal((trials, n))
    y_BN = r * x_BN + math.sqrt(1 - r**2) * generator.standard_normal((trials, n))
    orders_MN = random_orders(n, permutations, generator)
    return float(np.mean([p_value(np.abs(y_N[orders_MN] @ x_N), abs(y_N @ x_N)) <= ALPHA for x_N, y_N in zip(
        x_BN - x_BN.mean(1, keepdims=True), y_BN - y_BN.mean(1, keepdims=True), strict=True)]))


def power_of_design(n: int) -> dict[str, float]:
    """What a test over n points can find: n, alpha, power; needed and detectable (see above); simulated and
    false_alarms (`simulated_power` of the latter, and of none). `StsError` for fewer than 4."""
    detectable = smallest_detectable_correlation(n)
    return {"n": n, "alpha": ALPHA, "power": POWER, "needed": needed_correlation(n), "detectable": detectable,
            "simulated": simulated_power(n, detectable), "false_alarms": simulated_power(n, 0.0)}
