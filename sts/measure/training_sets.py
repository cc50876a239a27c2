"""Does a forecast tell which training set moves a domain? Statistics over training sets and evaluation domains.

Within one domain the questions are the same for every training set, so what their number, length and hardness add to
*every* set's forecast or change cancels. What is compared there is which of the training sets has the higher forecast
and which caused the larger change. What does not cancel is what belongs to a training set: one may move everything more
than the others, or move domains with long answers, or all of the sciences, more. Domains are therefore no independent
repetitions, and training sets are few: only `shuffled_sets`, which moves whole sets, allows for both.

Shape suffixes: S seeds, T training sets, D evaluation domains, B permutations or resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import PermutationTest, _all_orders, _plain, _random_orders
from sts.measure.items import paired_mean_interval

#: Up to so many training sets every order of whole training sets is counted (40,320 of eight).
EXACT_UP_TO = 8


@dataclass(frozen=True)
class Specificity:
    """Whether a forecast tells which training set moves a domain. `p_within` is two-sided, the others one-sided.

    Attributes:
        training_sets, domains, seeds: how many; `defined` is the number of domains with a rank correlation.
        by_domain: Spearman's correlation over training sets in every domain, mean over seeds; None where it is not
            defined.
        within: mean of these, `low` and `high` its 95% interval over domains.
        p_within: training sets shuffled in each domain by itself. It takes the domains as independent repetitions.
        p_sets: whole training sets shuffled, the same way in all domains. It allows for a training set that moves
            every domain, or every domain of a kind, more, but has few orders: p is never below 1 / `orders`.
            One-sided (at least the measured correlation), as the opposite order would double that.
        p_opposite: the same for the other side, at most the measured correlation.
        hits: share of domains in which the training set with the highest forecast moved it most (mean over seeds).
        interaction: correlation of what is left of the ranks without the level of domains and of training sets: is a
            domain foreseen to be hit by *this* set of all? A description, see `interaction`.
    """

    training_sets: int
    domains: int
    seeds: int
    defined: int
    by_domain: list[float]
    within: float
    low: float
    high: float
    p_within: float
    p_sets: float
    p_opposite: float
    orders: int
    hits: float
    interaction: float

    def to_dict(self) -> dict:
        """Plain dict for JSON; NaN becomes None."""
        own = _plain(asdict(self))
        return own | {"by_domain": [_plain(value) for value in self.by_domain]}


def _checked(forecast_STD: np.ndarray, change_STD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    forecast_STD, change_STD = np.asarray(forecast_STD, float), np.asarray(change_STD, float)
    if forecast_STD.shape != change_STD.shape or forecast_STD.ndim != 3:
        raise StsError(f"Forecasts of shape {forecast_STD.shape} and changes of shape {change_STD.shape} were given; "
                       "both seeds x training sets x domains work.")
    if forecast_STD.shape[1] < 2 or forecast_STD.shape[2] < 3:
        raise StsError(f"{forecast_STD.shape[1]} training set(s) and {forecast_STD.shape[2]} domain(s) given; to "
                       "compare training sets, at least two of them and three domains are needed.")
    if not (np.isfinite(forecast_STD).all() and np.isfinite(change_STD).all()):
        raise StsError("Forecasts or changes hold NaN or infinite values; leave those domains out of all first.")
    return forecast_STD, change_STD


# --- within domains -----------------------------------------------------------------------------------------------

def _rank_units(values_STD: np.ndarray) -> np.ndarray:
    """Ranks over training sets in every domain, centred and of length 1; NaN where all are tied."""
    ranks = scipy_stats.rankdata(values_STD, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return ranks / np.where(length > 0, length, np.nan)


def _products(forecast_STD: np.ndarray, change_STD: np.ndarray) -> np.ndarray:
    """D x T x T: what forecast a beside change b adds to a domain's rank correlation; the diagonals are as measured.

    Only domains in which the correlation is defined in every seed.
    """
    found_DTT = np.einsum("sad,sbd->dab", _rank_units(forecast_STD), _rank_units(change_STD)) / len(forecast_STD)
    return found_DTT[np.isfinite(found_DTT).all((1, 2))]


def within_domains(forecast_STD: np.ndarray, change_STD: np.ndarray) -> np.ndarray:
    """Spearman's correlation over training sets in every domain, mean over seeds, D; NaN where it is not defined."""
    forecast_STD, change_STD = _checked(forecast_STD, change_STD)
    return (_rank_units(forecast_STD) * _rank_units(change_STD)).sum(1).mean(0)


def _test(observed: float, shuffled: Iterator[np.ndarray], *, exact: bool, sided: int = 2) -> PermutationTest:
    extreme = count = 0
    for values_B in shuffled:
        reached_B = values_B >= observed - 1e-12 if sided == 1 else np.abs(values_B) >= abs(observed) - 1e-12
        extreme += int(reached_B.sum())
        count += len(values_B)
    return PermutationTest(extreme / count if exact else (extreme + 1) / (count + 1), exact, count)


def _orders(n: int, resamples: int, seed: int) -> tuple[Iterator[np.ndarray], bool]:
    exact = n <= EXACT_UP_TO
    return (_all_orders(n) if exact else _random_orders(n, resamples, np.random.default_rng(seed))), exact


def shuffled_within_domains(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000,
                            seed: int = 0) -> PermutationTest:
    """Two-sided p of the mean within-domain rank correlation, training sets shuffled in each domain by itself.

    The restricted permutation test: a change never leaves its domain. All seeds are shuffled alike. Exact where there
    are fewer combinations than `resamples`.

    Raises:
        StsError: arrays that do not match, too few training sets or domains, or no correlation is defined.
    """
    products_DTT = _some(_products(*_checked(forecast_STD, change_STD)))
    domains, sets = products_DTT.shape[:2]
    orders_OT = np.concatenate(list(_all_orders(sets))) if sets <= EXACT_UP_TO else None

    def blocks() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(seed)
        for start in range(0, resamples, 1000):
            size = min(1000, resamples - start)
            order_BDT = (generator.permuted(np.tile(np.arange(sets), (size, domains, 1)), axis=2)
                         if orders_OT is None else orders_OT[generator.integers(0, len(orders_OT), (size, domains))])
            yield products_DTT[np.arange(domains)[:, None], order_BDT, np.arange(sets)].sum(-1).mean(-1)

    observed = float(products_DTT.trace(axis1=1, axis2=2).mean())
    if orders_OT is None or domains * math.log(len(orders_OT)) > math.log(resamples):
        return _test(observed, blocks(), exact=False)
    # Sums over all combinations, one domain after the other.
    sums_B = np.zeros(1)
    for product_TT in products_DTT:
        own_O = product_TT[orders_OT, np.arange(sets)].sum(-1)
        sums_B = (sums_B[:, None] + own_O).ravel()
    return _test(observed, iter([sums_B / domains]), exact=True)


def shuffled_sets(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000,
                  seed: int = 0) -> PermutationTest:
    """One-sided p of the same with whole training sets shuffled, alike in all domains; up to eight in every order."""
    products_TT = _some(_products(*_checked(forecast_STD, change_STD))).mean(0)
    orders, exact = _orders(len(products_TT), resamples, seed)
    columns = np.arange(len(products_TT))
    return _test(float(products_TT.trace()), (products_TT[order_BT, columns].sum(-1) for order_BT in orders),
                 exact=exact, sided=1)


def _some(products_DTT: np.ndarray) -> np.ndarray:
    if not len(products_DTT):
        raise StsError("In no domain do both forecast and change differ between training sets, so there is nothing to "
                       "compare.")
    return products_DTT


def hits(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Share of domains whose highest forecast belongs to the training set that moved them most; chance is 1 / T.

    Of k that moved a domain equally far, each counts as 1 / k. NaN where nothing differs in any domain.
    """
    forecast_STD, change_STD = _checked(forecast_STD, change_STD)
    most_STD = change_STD == change_STD.max(1, keepdims=True)
    share_STD = most_STD / most_STD.sum(1, keepdims=True)
    best_SD = np.take_along_axis(share_STD, forecast_STD.argmax(1)[:, None], axis=1)[:, 0]
    kept_SD = best_SD[(np.ptp(change_STD, axis=1) > 0) & (np.ptp(forecast_STD, axis=1) > 0)]
    return float(kept_SD.mean()) if kept_SD.size else math.nan


# --- without the level of the training sets -----------------------------------------------------------------------

def interaction_ranks(values_STD: np.ndarray) -> np.ndarray:
    """Ranks of domains within each training set, less their mean over training sets.

    Ranking takes out how strongly a training set moves all domains, on whatever scale; the mean over training sets
    takes out which domains move in any case. What is left sums to zero both ways.
    """
    ranks_STD = scipy_stats.rankdata(values_STD, axis=2)
    return ranks_STD - ranks_STD.mean(1, keepdims=True)


def interaction(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Correlation of the `interaction_ranks` of forecast and change over all cells, mean over seeds; NaN if undefined.

    It comes without p and interval. Both would have to take domains as exchangeable, which they are not: with four
    training sets whose forecast and change each have an effect on the sciences, unrelated to one another, a test that
    shuffles domains calls one interaction in five or more significant at 5%.
    """
    x_STD, y_STD = (interaction_ranks(values) for values in _checked(forecast_STD, change_STD))
    length_S = np.sqrt((x_STD**2).sum((1, 2)) * (y_STD**2).sum((1, 2)))
    return float(((x_STD * y_STD).sum((1, 2)) / np.where(length_S > 0, length_S, np.nan)).mean())


def specificity(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000, bootstrap: int = 5000,
                seed: int = 0) -> Specificity:
    """All of the above.

    Args:
        forecast_STD: forecasts, which only need to be comparable within a domain.
        change_STD: absolute changes, likewise.

    Raises:
        StsError: arrays that do not match, too few training sets or domains, or no correlation is defined.
    """
    by_domain_D = within_domains(forecast_STD, change_STD)
    sets, domains = np.shape(forecast_STD)[1:]
    p_within = shuffled_within_domains(forecast_STD, change_STD, resamples=resamples, seed=seed).p
    whole, opposite = (shuffled_sets(sign * np.asarray(forecast_STD, float), change_STD, resamples=resamples, seed=seed)
                       for sign in (1, -1))
    defined_D = by_domain_D[np.isfinite(by_domain_D)]
    mean = paired_mean_interval(defined_D, resamples=bootstrap, seed=seed)
    return Specificity(sets, domains, len(forecast_STD), len(defined_D), by_domain_D.tolist(), mean.mean, mean.low,
                       mean.high, p_within, whole.p, opposite.p, whole.resamples, hits(forecast_STD, change_STD),
                       interaction(forecast_STD, change_STD))


# --- lists of latents ---------------------------------------------------------------------------------------------

def own_list_lead(shared_STT: np.ndarray, *, resamples: int = 20_000, seed: int = 0) -> dict[str, float]:
    """Do a training set's demonstrations name *its* latents rather than those that any training moves?

    Args:
        shared_STT: latents shared by the list estimated for set a (rows) and the list moved by training on set b.

    Returns:
        own and other (mean shared with the own and with other sets' fine-tuning), lead (own - other) and p
        (one-sided, over orders of the training sets: of four there are 24, so p is at least 0.04).

    Raises:
        StsError: fewer than two training sets.
    """
    shared_TT = np.asarray(shared_STT, float).mean(0)
    sets = len(shared_TT)
    if sets < 2:
        raise StsError("One training set given; its own fine-tuning can only be told apart from another's with two.")
    own = float(shared_TT.trace() / sets)
    other = float((shared_TT.sum() - shared_TT.trace()) / (sets * (sets - 1)))
    orders, exact = _orders(sets, resamples, seed)
    p = _test(float(shared_TT.trace()), (shared_TT[order_BT, np.arange(sets)].sum(-1) for order_BT in orders),
              exact=exact, sided=1).p
    return {"own": own, "other": other, "lead": own - other, "p": p}
