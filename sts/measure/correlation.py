"""Correlations over a handful of points, such as eight or fourteen domains, and what so few can show.

No large-sample formula is trusted with so few points: p comes from permutations, all of them where that is affordable.

Shape suffixes: N points (domains), K controls, P predictors, S seeds, B orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from sts.errors import StsError

#: A vector whose range is below this fraction of its size is constant up to rounding.
CONSTANT = 1e-13
#: Entries of one block of orders or resamples; bounds memory to a few tens of MB.
BLOCK = 1_000_000


@dataclass(frozen=True)
class PermutationTest:
    """A p value, whether every permutation was counted (`exact`), and how many were."""

    p: float
    exact: bool
    resamples: int


@dataclass(frozen=True)
class Line:
    """y = slope * x + intercept."""

    slope: float
    intercept: float


def plain(value: Any) -> Any:
    """What JSON can hold: rows as dicts without the fields left at their default, and None for what is not finite."""
    if is_dataclass(value):
        return {one.name: plain(own) for one in fields(value)
                if (own := getattr(value, one.name)) is not one.default or one.default is MISSING}
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def vector(name: str, values: ArrayLike) -> np.ndarray:
    """The values as a plain vector of finite numbers; `StsError` if they are none."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StsError(f"{name} must be a list of numbers ({error}).") from error
    if found.ndim != 1:
        raise StsError(f"{name} has shape {found.shape}; a plain list of numbers, one a point, works.")
    if (bad := np.flatnonzero(~np.isfinite(found))).size:
        raise StsError(f"{name} has {bad.size} value(s) that are NaN or infinite, the first at position {bad[0]}; "
                       "leave those points out of both vectors first.")
    return found


def points(x: ArrayLike, y: ArrayLike, minimum: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors that pair up, long enough and not constant; `StsError` otherwise."""
    x_N, y_N = vector("x", x), vector("y", y)
    if x_N.size != y_N.size:
        raise StsError(f"x has {x_N.size} values and y has {y_N.size}; they must pair up one to one.")
    if x_N.size < minimum:
        raise StsError(f"{x_N.size} point(s) given; at least {minimum} are needed.")
    for name, own in (("x", x_N), ("y", y_N)):
        if np.ptp(own) <= CONSTANT * np.abs(own).max():
            raise StsError(f"{name} is constant ({own[0]:g} at every point), so a correlation or line is not defined; "
                           "points with at least two different values work.")
    return x_N, y_N


def units(values_N: np.ndarray, controls_NK: np.ndarray | None = None) -> np.ndarray:
    """What a constant and the controls leave of values (last axis), at length 1; NaN where nothing is left."""
    values_N = np.asarray(values_N, float)
    spread = np.ptp(values_N, axis=-1, keepdims=True)
    spread = np.where(spread > CONSTANT * np.abs(values_N).max(-1, keepdims=True), spread, np.nan)
    # Dividing by the range first keeps the squares below from over- or underflowing.
    left = (values_N - values_N.mean(-1, keepdims=True)) / spread
    if controls_NK is None:
        return left / np.sqrt((left**2).sum(-1, keepdims=True))
    # Controls of unlike size would make the columns ill-conditioned.
    centred = controls_NK - controls_NK.mean(-2, keepdims=True)
    width = np.ptp(centred, axis=-2, keepdims=True)
    columns = np.concatenate([np.ones((*centred.shape[:-1], 1)), centred / np.where(width > 0, width, 1)], axis=-1)
    basis_NK = np.linalg.qr(columns)[0]
    left = left - (basis_NK @ (basis_NK.swapaxes(-1, -2) @ left[..., None]))[..., 0]
    length, size = (np.sqrt((own**2).sum(-1, keepdims=True)) for own in (left, values_N / spread))
    return left / np.where(length > 10 * CONSTANT * size, length, np.nan)


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


def fit_line(x: ArrayLike, y: ArrayLike) -> Line:
    """Least-squares line of y on x; slope in units of y per unit of x. Raises as `pearson`."""
    x_N, y_N = points(x, y)
    centred_N = (x_N - x_N.mean()) / np.ptp(x_N)
    slope = float(centred_N @ (y_N - y_N.mean()) / (centred_N @ centred_N) / np.ptp(x_N))
    return Line(slope, float(y_N.mean() - slope * x_N.mean()))


def leave_one_out(x: ArrayLike, y: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Pearson's correlation of the others for each point left out; NaN where they make x or y constant."""
    x_N, y_N = points(x, y, minimum=4)
    return {str(name): float(correlation_rows(np.delete(x_N, place), np.delete(y_N, place)))
            for place, name in zip(range(x_N.size), names, strict=True)}


def all_orders(n: int) -> Iterator[np.ndarray]:
    """Every order of n places, in blocks."""
    orders = itertools.permutations(range(n))
    while block := list(itertools.islice(orders, BLOCK // n)):
        yield np.array(block, dtype=np.int8)


def random_orders(n: int, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` random orders of n places, in blocks."""
    for size in block_sizes(n, count):
        yield generator.permuted(np.tile(np.arange(n), (size, 1)), axis=1)


def block_sizes(n: int, count: int) -> Iterator[int]:
    """Sizes of the blocks in which `count` rows of n entries are worked off."""
    size = max(1, BLOCK // n)
    yield from (min(size, count - done) for done in range(0, count, size))


def permutation_tests(x_PSN: np.ndarray, y_SN: np.ndarray, controls_SNK: np.ndarray | None = None, *,
                      exact_up_to: int = 8, resamples: int = 100_000, seed: int = 0) -> list[PermutationTest]:
    """Two-sided permutation p of the mean over seeds of each predictor's correlation with y; NaN where not defined.

    Domains are shuffled in the same order for all seeds, whose results are not independent: in all N! orders for up
    to `exact_up_to` domains, else in m random ones, where p = (b + 1) / (m + 1). With controls, the residuals of y are
    shuffled and the controls taken out again (Freedman and Lane 1983), so that p is never exact.
    """
    units_PSN, left_SN = units(x_PSN, controls_SNK), units(y_SN, controls_SNK)
    seeds, n = left_SN.shape
    flat_PM = units_PSN.reshape(len(units_PSN), -1) / seeds

    def sizes(orders_BN: np.ndarray) -> np.ndarray:
        shuffled_BSN = left_SN[:, orders_BN].swapaxes(0, 1)
        if controls_SNK is not None:
            shuffled_BSN = units(shuffled_BSN, controls_SNK)
        return np.abs(shuffled_BSN.reshape(len(orders_BN), -1) @ flat_PM.T)

    observed_P, exact = sizes(np.arange(n)[None])[0], n <= exact_up_to
    extreme_P, count = np.zeros(len(flat_PM)), 0
    for order_BN in all_orders(n) if exact else random_orders(n, resamples, np.random.default_rng(seed)):
        extreme_P += (sizes(order_BN) >= observed_P - 1e-12).sum(0)  # what is equal up to rounding is a tie
        count += len(order_BN)
    p_P = extreme_P / count if exact else (extreme_P + 1) / (count + 1)
    return [PermutationTest(float(p) if math.isfinite(observed) else math.nan, exact and controls_SNK is None, count)
            for p, observed in zip(p_P, observed_P, strict=True)]


def smallest_detectable_correlation(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true correlation that a two-sided test on n points finds with probability `power`, by Fisher's z."""
    if n < 4:
        raise StsError(f"{n} points given; Fisher's z needs at least 4.")
    z = scipy_stats.norm.ppf(1 - alpha / 2) + scipy_stats.norm.ppf(power)
    return float(np.tanh(z / math.sqrt(n - 3)))


def needed_correlation(n: int, alpha: float = 0.05) -> float:
    """The r that n points need for a two-sided p of `alpha`, by Student's t; n - K for one given K controls."""
    t = scipy_stats.t.ppf(1 - alpha / 2, n - 2)
    return float(t / math.sqrt(n - 2 + t**2))


def overlap_p(n_total: int, n_a: int, n_b: int, overlap: int) -> float:
    """Chance that random sets of `n_a` and `n_b` out of `n_total` share at least so many: hypergeometric upper tail."""
    least, most = max(0, n_a + n_b - n_total), min(n_a, n_b)
    if not (max(n_a, n_b) <= n_total and least <= overlap <= most):
        raise StsError(f"Sets of {n_a} and {n_b} out of {n_total} cannot share {overlap}.")
    return float(scipy_stats.hypergeom.sf(overlap - 1, n_total, n_a, n_b))
