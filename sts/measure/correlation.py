"""Statistics for a handful of points: correlations over eight or fourteen domains.

With so few points no large-sample formula is trusted: p values come from permutations (all of them where that is
affordable), intervals from resampling the points. Thin over numpy and scipy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats as scipy_stats

from sts.errors import StsError

Statistic = Callable[[np.ndarray, np.ndarray], float]

#: A vector whose range is below this fraction of its size is constant up to rounding.
CONSTANT = 1e-13
#: Entries of one block of permutations or resamples; bounds memory to a few tens of MB.
BLOCK = 1_000_000


@dataclass(frozen=True)
class PermutationTest:
    """Two-sided p, whether every permutation was counted (`exact`), and how many were."""

    p: float
    exact: bool
    resamples: int


@dataclass(frozen=True)
class Interval:
    """A percentile interval; `redrawn` counts resamples thrown away because the statistic did not exist on them."""

    low: float
    high: float
    level: float
    resamples: int
    redrawn: int = 0


@dataclass(frozen=True)
class Line:
    """y = slope * x + intercept."""

    slope: float
    intercept: float


@dataclass(frozen=True)
class LeaveOneOut:
    """Lowest and highest Pearson correlation after leaving out one point, and the point left out each time."""

    low: float
    low_without: str
    high: float
    high_without: str


@dataclass(frozen=True)
class Correlation:
    """Everything the book says about one scatter plot.

    `p` is the permutation p of `pearson` (two-sided), `exact` whether all permutations were counted, `permutations`
    how many were. `leave_one_out` is None for three points, or if no point can be left out.
    """

    n: int
    pearson: float
    pearson_interval: Interval
    p: float
    exact: bool
    permutations: int
    spearman: float
    r_squared: float
    line: Line
    leave_one_out: LeaveOneOut | None

    def to_dict(self) -> dict:
        """Plain nested dict for JSON; NaN becomes None."""
        return _plain(asdict(self))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- checks -------------------------------------------------------------------------------------------------------

def _vector(name: str, values: Sequence[float]) -> np.ndarray:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StsError(f"{name} must be a list of numbers ({error}).") from error
    if vector.ndim != 1:
        raise StsError(f"{name} has shape {vector.shape}; a plain list of numbers, one a point, works.")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise StsError(f"{name} has {bad.size} value(s) that are NaN or infinite, the first at position {bad[0]}; "
                       "leave those points out of both vectors first.")
    return vector


def _points(x: Sequence[float], y: Sequence[float], *, minimum: int = 3, y_may_be_constant: bool = False):
    x_N, y_N = _vector("x", x), _vector("y", y)
    if x_N.size != y_N.size:
        raise StsError(f"x has {x_N.size} values and y has {y_N.size}; they must pair up one to one.")
    if x_N.size < minimum:
        raise StsError(f"{x_N.size} point(s) given; at least {minimum} are needed.")
    for name, vector in (("x", x_N), ("y", y_N)):
        if _constant(vector) and not (name == "y" and y_may_be_constant):
            raise StsError(f"{name} is constant ({vector[0]:g} at every point), so a correlation or line is not "
                           "defined; points with at least two different values work.")
    return x_N, y_N


def _constant(values: np.ndarray) -> np.ndarray:
    """Whether each vector (last axis) is constant up to rounding."""
    return np.ptp(values, axis=-1) <= CONSTANT * np.abs(values).max(axis=-1)


def _check_settings(resamples: int, level: float = 0.95) -> None:
    if int(resamples) != resamples or resamples < 1:
        raise StsError(f"resamples is {resamples!r}; a whole number of at least 1 works.")
    if not 0 < level < 1:
        raise StsError(f"level is {level!r}; a share between 0 and 1, such as 0.95, works.")


# --- correlations -------------------------------------------------------------------------------------------------

def _unit_rows(values_BN: np.ndarray) -> np.ndarray:
    """Rows centred and scaled to length 1; NaN where a row is constant."""
    spread_B1 = np.where(_constant(values_BN), np.nan, np.ptp(values_BN, axis=-1))[..., None]
    # Dividing by the range first keeps the squares below from over- or underflowing.
    centred_BN = (values_BN - values_BN.mean(axis=-1, keepdims=True)) / spread_B1
    return centred_BN / np.sqrt((centred_BN ** 2).sum(axis=-1, keepdims=True))


def pearson_rows(x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of `x_BN` with the same row of `y_BN` (one row broadcasts); NaN if constant."""
    return np.clip((_unit_rows(np.asarray(x_BN, float)) * _unit_rows(np.asarray(y_BN, float))).sum(axis=-1), -1.0, 1.0)


def _spearman_rows(x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    ranks_x_BN, ranks_y_BN = (scipy_stats.rankdata(values, axis=-1) for values in (x_BN, y_BN))
    # Values that differ only by rounding would get ranks of their own; keep "constant" the same for both statistics.
    degenerate_B = _constant(x_BN) | _constant(y_BN)
    return np.where(degenerate_B, np.nan, pearson_rows(ranks_x_BN, ranks_y_BN))


def _r_squared_rows(x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    return pearson_rows(x_BN, y_BN) ** 2


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of two vectors, -1 to 1.

    Raises:
        StsError: lengths differ, fewer than 3 points, NaN or infinite values, or a constant vector.
    """
    return float(pearson_rows(*_points(x, y)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank, -1 to 1. Raises as `pearson`."""
    return float(_spearman_rows(*_points(x, y)))


def r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of y's variance explained by its least-squares line in x, 0 to 1; with one predictor, Pearson squared.

    In-sample: a line through few points explains something even of noise. Raises as `pearson`.
    """
    return float(_r_squared_rows(*_points(x, y)))


#: Statistics with a form that works on many rows at once; any other callable is applied row by row.
_ROWS = {pearson: pearson_rows, spearman: _spearman_rows, r_squared: _r_squared_rows}


def _apply_rows(statistic: Statistic, x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    if statistic in _ROWS:
        return _ROWS[statistic](x_BN, y_BN)
    x_BN, y_BN = np.broadcast_arrays(x_BN, y_BN)
    values = []
    for x_N, y_N in zip(x_BN, y_BN, strict=True):
        try:
            values.append(float(statistic(x_N, y_N)))
        except StsError:  # not defined on this resample
            values.append(math.nan)
    return np.array(values)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least-squares line of y on x; slope in units of y per unit of x. A constant y is allowed.

    Raises:
        StsError: lengths differ, fewer than 3 points, NaN or infinite values, or a constant x.
    """
    x_N, y_N = _points(x, y, y_may_be_constant=True)
    centred_N = (x_N - x_N.mean()) / np.ptp(x_N)
    slope = float(centred_N @ (y_N - y_N.mean()) / (centred_N @ centred_N) / np.ptp(x_N))
    return Line(slope, float(y_N.mean() - slope * x_N.mean()))


def leave_one_out(x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Pearson's correlation of the other points, for each point left out in turn.

    NaN where leaving a point out makes x or y constant.

    Raises:
        StsError: fewer than 4 points, names that do not pair up with them or repeat, or as `pearson`.
    """
    x_N, y_N = _points(x, y, minimum=4)
    names = [str(name) for name in names]
    if len(names) != x_N.size or len(set(names)) != len(names):
        raise StsError(f"{len(set(names))} different names for {x_N.size} points; each point needs a name of its own.")
    return {name: float(pearson_rows(np.delete(x_N, index), np.delete(y_N, index)))
            for index, name in enumerate(names)}


# --- permutation and bootstrap ------------------------------------------------------------------------------------

def _all_orders(n: int) -> Iterator[np.ndarray]:
    orders = itertools.permutations(range(n))
    while block := list(itertools.islice(orders, BLOCK // n)):
        yield np.array(block, dtype=np.int8)


def _random_orders(n: int, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    for size in _block_sizes(n, count):
        yield generator.permuted(np.tile(np.arange(n), (size, 1)), axis=1)


def _block_sizes(n: int, count: int) -> Iterator[int]:
    size = max(1, BLOCK // n)
    while count > 0:
        yield min(size, count)
        count -= size


def permutation_p(x: Sequence[float], y: Sequence[float], statistic: Statistic = pearson, *, exact_up_to: int = 8,
                  resamples: int = 100_000, seed: int = 0) -> PermutationTest:
    """Two-sided permutation test: how often a shuffled y gives a statistic at least as far from zero.

    Args:
        x, y: paired values, one pair a point.
        statistic: `pearson`, `spearman`, `r_squared` (fast), or any function of two arrays (applied row by row).
        exact_up_to: up to this many points (at most 10) every order of y is counted, n! of them; p is then exact.
        resamples: random orders m for more points; p = (b + 1) / (m + 1) with b at least as extreme, never zero.
        seed: of the random orders.

    Raises:
        StsError: as `pearson`, or settings out of range.
    """
    x_N, y_N = _points(x, y)
    _check_settings(resamples)
    if exact_up_to > 10:
        raise StsError(f"exact_up_to is {exact_up_to}, which means up to {exact_up_to}! orders; at most 10 works.")
    exact = x_N.size <= exact_up_to
    observed = abs(float(_apply_rows(statistic, x_N[None], y_N[None])[0]))
    # Orders that give the same value up to rounding count as ties.
    threshold = observed - 1e-12 * max(1.0, observed)
    orders = _all_orders(x_N.size) if exact else _random_orders(x_N.size, resamples, np.random.default_rng(seed))
    extreme = count = 0
    for order_BN in orders:
        extreme += int((np.abs(_apply_rows(statistic, x_N[None], y_N[order_BN])) >= threshold).sum())
        count += len(order_BN)
    return PermutationTest(extreme / count if exact else (extreme + 1) / (count + 1), exact, count)


def bootstrap_interval(x: Sequence[float], y: Sequence[float], statistic: Statistic = pearson, *, level: float = 0.95,
                       resamples: int = 5_000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a statistic over points: pairs drawn with replacement.

    A resample on which the statistic does not exist (x or y constant) is drawn again and counted in `redrawn`. With
    eight points the interval is rough and tends to be too narrow; read it as a lower bound on the uncertainty.

    Raises:
        StsError: as `pearson`, settings out of range, or a statistic that exists on almost no resample.
    """
    x_N, y_N = _points(x, y)
    _check_settings(resamples, level)
    generator = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    missing, drawn = resamples, 0
    while missing:
        if drawn > 100 * resamples:
            raise StsError("The statistic is undefined on almost every resample of these points; more points with "
                           "different values work.")
        size = min(missing, max(1, BLOCK // x_N.size))
        picked_BN = generator.integers(0, x_N.size, (size, x_N.size))
        values_B = _apply_rows(statistic, x_N[picked_BN], y_N[picked_BN])
        kept.append(values_B[np.isfinite(values_B)])
        missing, drawn = missing - kept[-1].size, drawn + size
    low, high = np.quantile(np.concatenate(kept), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, resamples, drawn - resamples)


# --- bundles and planning -----------------------------------------------------------------------------------------

def correlate(x: Sequence[float], y: Sequence[float], names: Sequence[str] | None = None, *, seed: int = 0,
              level: float = 0.95, permutations: int = 100_000, resamples: int = 5_000) -> Correlation:
    """All of the above for one scatter plot.

    Args:
        x, y: paired values, one pair a point.
        names: one a point, for `leave_one_out`; "0", "1", ... if None.
        seed: of permutations and bootstrap.
        level: of the bootstrap interval.
        permutations: random orders for more than eight points; up to eight the test is exact.
        resamples: of the bootstrap.

    Raises:
        StsError: as `pearson` and `leave_one_out`.
    """
    x_N, y_N = _points(x, y)
    test = permutation_p(x_N, y_N, resamples=permutations, seed=seed)
    without = None
    if x_N.size >= 4:
        others = leave_one_out(x_N, y_N, names if names is not None else [str(index) for index in range(x_N.size)])
        others = {name: value for name, value in others.items() if math.isfinite(value)}
        if others:
            lowest, highest = min(others, key=others.get), max(others, key=others.get)
            without = LeaveOneOut(others[lowest], lowest, others[highest], highest)
    return Correlation(
        n=x_N.size, pearson=pearson(x_N, y_N),
        pearson_interval=bootstrap_interval(x_N, y_N, level=level, resamples=resamples, seed=seed),
        p=test.p, exact=test.exact, permutations=test.resamples, spearman=spearman(x_N, y_N),
        r_squared=r_squared(x_N, y_N), line=fit_line(x_N, y_N), leave_one_out=without)


def smallest_detectable_correlation(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true correlation that a two-sided test at `alpha` on `n` points finds with probability `power`.

    Fisher's z: atanh(r) is about normal with standard deviation 1 / sqrt(n - 3). An approximation for small n, and
    for points drawn at random rather than picked for being extreme.

    Raises:
        StsError: fewer than 4 points, or a share outside 0 to 1, or power below alpha.
    """
    if n < 4:
        raise StsError(f"{n} points given; Fisher's z needs at least 4.")
    if not 0 < alpha < power < 1:
        raise StsError(f"alpha is {alpha!r} and power is {power!r}; shares with 0 < alpha < power < 1 work.")
    z = scipy_stats.norm.ppf(1 - alpha / 2) + scipy_stats.norm.ppf(power)
    return float(np.tanh(z / math.sqrt(n - 3)))


def overlap_p(n_total: int, n_a: int, n_b: int, overlap: int) -> float:
    """Chance that random sets of `n_a` and `n_b` out of `n_total` share at least `overlap` members.

    Upper tail of the hypergeometric distribution (`scipy.stats.hypergeom`).

    Raises:
        StsError: counts that no two such sets can have.
    """
    if not (0 <= n_a <= n_total and 0 <= n_b <= n_total):
        raise StsError(f"Sets of {n_a} and {n_b} were asked out of {n_total}; sizes from 0 to {n_total} work.")
    least, most = max(0, n_a + n_b - n_total), min(n_a, n_b)
    if not least <= overlap <= most:
        raise StsError(f"Sets of {n_a} and {n_b} out of {n_total} cannot share {overlap}; {least} to {most} work.")
    return float(scipy_stats.hypergeom.sf(overlap - 1, n_total, n_a, n_b))
