"""Statistics of several predictors over the same few domains, questions and seeds.

A seed repeats the experiment, so the correlation reported is the mean of the seeds' own. Its interval comes from a
hierarchical bootstrap: seeds, domains and, within each domain drawn, questions are drawn with replacement. Its p comes
from shuffling domains, in the same way for every seed. Partial correlations take the same course with controls.

Shape suffixes: N domains, I items, S seeds, P predictors, K controls, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import (
    CONSTANT,
    Interval,
    PermutationTest,
    _all_orders,
    _random_orders,
    smallest_detectable_correlation,
)

#: Values that are drawn at a time.
BLOCK = 4_000_000


# --- correlations, plain and partial ------------------------------------------------------------------------------

def _basis(controls_NK: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Orthonormal columns that span a constant and the controls; leading dimensions go along."""
    if controls_NK is None:
        return np.full((shape[-1], 1), shape[-1] ** -0.5)  # broadcasts; the QR of ones, which takes far longer
    ones = np.ones((*shape, 1))
    # Controls of unlike size would make the columns ill-conditioned.
    return np.linalg.qr(np.concatenate([ones, _scaled(controls_NK)], axis=-1))[0]


def _scaled(controls_NK: np.ndarray) -> np.ndarray:
    centred = controls_NK - controls_NK.mean(axis=-2, keepdims=True)
    spread = np.ptp(centred, axis=-2, keepdims=True)
    return centred / np.where(spread > 0, spread, 1)


def _residual_units(values_N: np.ndarray, basis_NK: np.ndarray) -> np.ndarray:
    """What of values (last axis) the basis does not span, scaled to length 1; NaN where nothing is left."""
    left = values_N - (basis_NK @ (basis_NK.swapaxes(-1, -2) @ values_N[..., None]))[..., 0]
    length = np.sqrt((left**2).sum(-1, keepdims=True))
    size = np.sqrt((values_N**2).sum(-1, keepdims=True))
    return left / np.where(length > 10 * CONSTANT * size, length, np.nan)


def correlation_rows(x_N: np.ndarray, y_N: np.ndarray, controls_NK: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation along the last axis, or the partial one given controls; NaN where it is not defined.

    The partial correlation is that of the residuals of x and y after least squares on the controls and a constant.

    Args:
        x_N, y_N: of any same leading dimensions, which may broadcast.
        controls_NK: of the same leading dimensions, one column a control.
    """
    x_N, y_N = np.asarray(x_N, float), np.asarray(y_N, float)
    basis_NK = _basis(controls_NK, np.broadcast_shapes(x_N.shape, y_N.shape) if controls_NK is None
                      else np.asarray(controls_NK).shape[:-1])
    products = _residual_units(x_N, basis_NK) * _residual_units(y_N, basis_NK)
    return np.clip(products.sum(-1), -1, 1)


def partial_correlation(x: Sequence[float], y: Sequence[float], controls: Sequence[Sequence[float]]) -> float:
    """Partial correlation of two vectors given controls, -1 to 1.

    Args:
        controls: one vector a control, each as long as x.

    Raises:
        StsError: lengths differ, fewer points than controls + 3, values that are not finite, or x or y is a linear
            function of the controls.
    """
    x_N, y_N = np.asarray(x, float), np.asarray(y, float)
    controls_NK = np.asarray(controls, float).reshape(len(controls), -1).T
    if not x_N.shape == y_N.shape == controls_NK.shape[:1]:
        raise StsError(f"x has {x_N.size} values, y {y_N.size}, the controls {len(controls_NK)}; they must pair up.")
    if len(x_N) < controls_NK.shape[1] + 3:
        raise StsError(f"{len(x_N)} points and {controls_NK.shape[1]} controls; at least "
                       f"{controls_NK.shape[1] + 3} points are needed.")
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all() and np.isfinite(controls_NK).all()):
        raise StsError("x, y or a control holds NaN or infinite values; leave those points out first.")
    value = float(correlation_rows(x_N, y_N, controls_NK))
    if math.isnan(value):
        raise StsError("x or y is constant or a linear function of the controls, so nothing is left to correlate.")
    return value


# --- permutation --------------------------------------------------------------------------------------------------

def permutation_p_over_seeds(x_PSN: np.ndarray, y_SN: np.ndarray, controls_SNK: np.ndarray | None = None, *,
                             exact_up_to: int = 8, resamples: int = 100_000, seed: int = 0) -> list[PermutationTest]:
    """Two-sided permutation p of the mean over seeds of each predictor's correlation with y.

    Domains are shuffled in the same order for all seeds, whose results are not independent. With controls, the
    residuals of y are shuffled and the controls taken out again (Freedman and Lane 1983); then p is approximate even
    where every order is counted.

    Args:
        x_PSN, y_SN: predictors and what they predict, for each seed and domain.
        controls_SNK: controls of each seed and domain.
        exact_up_to, resamples: as in `stats.permutation_p`.

    Returns:
        One test a predictor; p is NaN where the correlation is not defined.
    """
    x_PSN, y_SN = np.asarray(x_PSN, float), np.asarray(y_SN, float)
    seeds, n = y_SN.shape
    basis_SNK = _basis(controls_SNK, y_SN.shape)
    units_PSN, left_SN = _residual_units(x_PSN, basis_SNK), _residual_units(y_SN, basis_SNK)
    flat_PM = units_PSN.reshape(len(x_PSN), -1) / seeds

    def means(orders_BN: np.ndarray) -> np.ndarray:
        shuffled_BSN = left_SN[:, orders_BN].swapaxes(0, 1)
        if controls_SNK is not None:
            shuffled_BSN = _residual_units(shuffled_BSN, basis_SNK)
        return np.abs(shuffled_BSN.reshape(len(orders_BN), -1) @ flat_PM.T)

    observed_P = means(np.arange(n)[None])[0]
    exact = n <= exact_up_to
    extreme_P, count = np.zeros(len(x_PSN)), 0
    for order_BN in _all_orders(n) if exact else _random_orders(n, resamples, np.random.default_rng(seed)):
        extreme_P += (means(order_BN) >= observed_P - 1e-12).sum(0)
        count += len(order_BN)
    p_P = extreme_P / count if exact else (extreme_P + 1) / (count + 1)
    return [PermutationTest(float(p) if math.isfinite(observed) else math.nan, exact and controls_SNK is None, count)
            for p, observed in zip(p_P, observed_P, strict=True)]


# --- hierarchical bootstrap ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Resamples:
    """Resampled experiments: which domains, how often each seed, and the absolute change measured in each.

    Attributes:
        domains_BN: index of the domain at each place.
        weights_BS: share of each seed.
        change_BSN: absolute mean change of the questions drawn for each place.
    """

    domains_BN: np.ndarray
    weights_BS: np.ndarray
    change_BSN: np.ndarray

    def correlations(self, x_SN: np.ndarray, controls_SNK: np.ndarray | None = None) -> np.ndarray:
        """Mean over the seeds drawn of the correlation (partial, with controls) in every resample, B.

        NaN where too few different domains were drawn for a correlation to mean anything, or it is not defined.
        """
        x_BSN = np.asarray(x_SN, float)[:, self.domains_BN].swapaxes(0, 1)
        controls = None if controls_SNK is None else np.asarray(
            controls_SNK, float)[:, self.domains_BN].swapaxes(0, 1)
        rows_BS = correlation_rows(x_BSN, self.change_BSN, controls)
        # A seed that was not drawn must not spoil the mean.
        values_B = np.where(self.weights_BS > 0, self.weights_BS * rows_BS, 0).sum(1)
        different_B = 1 + (np.diff(np.sort(self.domains_BN, axis=1), axis=1) > 0).sum(1)
        fewest = 3 if controls_SNK is None else 3 + controls.shape[-1]
        return np.where(different_B >= fewest, values_B, np.nan)


def hierarchical_resamples(differences_NIS: Sequence[np.ndarray], *, resamples: int = 5000, seed: int = 0) -> Resamples:
    """Draw seeds, domains and, for each domain drawn, its questions; all with replacement.

    The same questions are asked in every seed, so a question drawn is drawn for all of them. Drawing questions adds
    their noise a second time to changes that hold it already, so intervals lean to the wide side and towards zero.

    Args:
        differences_NIS: for each domain, after minus before of its questions, items x seeds.

    Raises:
        StsError: fewer than 3 domains, a domain without items, or NaN.
    """
    sizes = [own.shape for own in differences_NIS]
    if len(sizes) < 3 or not all(items and seeds for items, seeds in sizes) or len({one[1] for one in sizes}) > 1:
        raise StsError(f"Differences of {len(sizes)} domains with (items, seeds) {sizes} were given; at least three "
                       "domains, each with items and all with the same seeds, work.")
    if not all(np.isfinite(own).all() for own in differences_NIS):
        raise StsError("Differences hold NaN or infinite values; leave those items out of all seeds first.")
    generator, n, seeds = np.random.default_rng(seed), len(sizes), sizes[0][1]
    domains_BN = generator.integers(0, n, (resamples, n))
    drawn_BS = generator.integers(0, seeds, (resamples, seeds))
    weights_BS = np.stack([(drawn_BS == own).mean(1) for own in range(seeds)], axis=1)
    change_BNS = np.empty((resamples, n, seeds))
    for domain, own_IS in enumerate(differences_NIS):
        places = np.argwhere(domains_BN == domain)
        for part in np.array_split(places, max(1, math.ceil(len(places) * own_IS.size / BLOCK))):
            picked = generator.integers(0, len(own_IS), (len(part), len(own_IS)))
            change_BNS[part[:, 0], part[:, 1]] = np.abs(own_IS[picked].mean(1))
    return Resamples(domains_BN, weights_BS, change_BNS.swapaxes(1, 2))


def percentile_interval(values_B: np.ndarray, level: float = 0.95) -> Interval | None:
    """The central `level` of the values that exist; None if hardly any does."""
    kept = values_B[np.isfinite(values_B)]
    if len(kept) < max(10, len(values_B) // 100):
        return None
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, len(kept), len(values_B) - len(kept))


# --- power --------------------------------------------------------------------------------------------------------

def simulated_power(n: int, correlation: float, *, alpha: float = 0.05, trials: int = 2000, permutations: int = 999,
                    seed: int = 0) -> float:
    """Share of simulated experiments in which a two-sided permutation test finds a true correlation.

    Args:
        n: points, drawn from a bivariate normal distribution.
        correlation: the true one.
        permutations: random orders of the test; the same ones for all trials.

    Raises:
        StsError: fewer than 4 points, a correlation outside -1 to 1, or alpha outside 0 to 1.
    """
    if n < 4 or not -1 <= correlation <= 1 or not 0 < alpha < 1:
        raise StsError(f"{n} points with true correlation {correlation!r} and alpha {alpha!r} were asked; at least 4 "
                       "points, -1 to 1 and 0 to 1 work.")
    generator = np.random.default_rng(seed)
    x_BN = generator.standard_normal((trials, n))
    y_BN = correlation * x_BN + math.sqrt(1 - correlation**2) * generator.standard_normal((trials, n))
    orders_MN = np.concatenate(list(_random_orders(n, permutations, generator)))
    found = 0
    for x_N, y_N in zip(x_BN, y_BN, strict=True):
        x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
        found += (1 + (np.abs(y_N[orders_MN] @ x_N) >= abs(y_N @ x_N) - 1e-12).sum()) / (permutations + 1) <= alpha
    return found / trials


def reliability(changes: Sequence[float], standard_errors: Sequence[float]) -> float:
    """Share of the variance of measured changes over domains that is not noise of the questions, 0 to 1.

    1 - mean squared standard error / variance. No forecast can be expected to correlate with the measured changes
    beyond the square root of it.

    Raises:
        StsError: fewer than 3 changes, or they do not differ.
    """
    changes_N, errors_N = np.asarray(changes, float), np.asarray(standard_errors, float)
    if changes_N.shape != errors_N.shape or len(changes_N) < 3:
        raise StsError(f"{changes_N.size} changes and {errors_N.size} standard errors given; as many of both, at least "
                       "three, work.")
    variance = changes_N.var(ddof=1)
    if not variance > 0:
        raise StsError("The changes do not differ, so there is no variance to divide.")
    return float(np.clip(1 - np.nanmean(errors_N**2) / variance, 0, 1))


@dataclass(frozen=True)
class Power:
    """What a design with `n` points could have found.

    Attributes:
        needed: smallest r that is significant at `alpha` (t test).
        detectable: true correlation found with probability `power`, by Fisher's z.
        simulated: share of simulated experiments with that true correlation in which a permutation test finds it.
        false_alarms: the same with no correlation.
    """

    n: int
    alpha: float
    power: float
    needed: float
    detectable: float
    simulated: float
    false_alarms: float


def needed_correlation(n: int, alpha: float = 0.05) -> float:
    """The r that `n` points need for a two-sided p of `alpha`, by Student's t; n - K for one given K controls."""
    t = scipy_stats.t.ppf(1 - alpha / 2, n - 2)
    return float(t / math.sqrt(n - 2 + t**2))


def power_of_design(n: int, *, alpha: float = 0.05, power: float = 0.8, trials: int = 2000, seed: int = 0) -> Power:
    """What a test over `n` points can find: Fisher's z, checked by simulation.

    Raises:
        StsError: as `stats.smallest_detectable_correlation`.
    """
    detectable = smallest_detectable_correlation(n, alpha, power)
    return Power(n, alpha, power, needed_correlation(n, alpha), detectable,
                 simulated_power(n, detectable, alpha=alpha, trials=trials, seed=seed),
                 simulated_power(n, 0.0, alpha=alpha, trials=trials, seed=seed))
