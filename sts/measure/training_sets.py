"""Does a forecast tell which training set moves a domain? Statistics over training sets and evaluation domains.

Within one domain the questions are the same for every training set, so what is compared there is which set has the
higher forecast and which caused the larger change. What belongs to a training set does not cancel: one may move
everything, or all of the sciences, more. Domains are therefore no independent repetitions, and training sets are few:
only `shuffled_sets`, which moves whole sets, allows for both.

Shape suffixes: S seeds, T training sets, D evaluation domains, B permutations, O orders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import PermutationTest, all_orders, random_orders
from sts.measure.items import paired_mean_interval

#: Up to so many training sets every order of whole training sets is counted (40,320 of eight).
EXACT_UP_TO = 8


@dataclass(frozen=True)
class Specificity:
    """Whether a forecast tells which training set moves a domain. `p_within` is two-sided, the others one-sided.

    Attributes:
        by_domain, within: rank correlation over training sets in every domain, and the mean of the `defined` ones with
            its 95% interval over domains.
        p_within: training sets shuffled in each domain by itself, as if domains were independent repetitions.
        p_sets, p_opposite: whole sets shuffled, alike in all domains, for either side; never below 1 / orders.
        hits, interaction: see there; the latter comes without p, as domains are not exchangeable.
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


def _checked(forecast_STD: np.ndarray, change_STD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    forecast_STD, change_STD = np.asarray(forecast_STD, float), np.asarray(change_STD, float)
    if forecast_STD.shape != change_STD.shape or not np.isfinite([forecast_STD, change_STD]).all():
        raise StsError(f"Forecasts of shape {forecast_STD.shape} and changes of shape {change_STD.shape} were given; "
                       "of both seeds x training sets x domains, without NaN or infinite values, work.")
    if forecast_STD.shape[1] < 2 or forecast_STD.shape[2] < 3:
        raise StsError(f"{forecast_STD.shape[1]} training set(s) and {forecast_STD.shape[2]} domain(s) given; to "
                       "compare training sets, at least two of them and three domains are needed.")
    return forecast_STD, change_STD


def _rank_units(values_STD: np.ndarray) -> np.ndarray:
    """Ranks over training sets in every domain, centred and of length 1; NaN where all are tied."""
    ranks = scipy_stats.rankdata(values_STD, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return ranks / np.where(length > 0, length, np.nan)


def _products(forecast_STD: np.ndarray, change_STD: np.ndarray) -> np.ndarray:
    """D x T x T: what forecast a beside change b adds to a domain's rank correlation; the diagonals are as measured.
    Only domains in which it is defined in every seed; `StsError` if there is none."""
    found_DTT = np.einsum("sad,sbd->dab", *(_rank_units(own) for own in _checked(forecast_STD, change_STD)))
    found_DTT = found_DTT[np.isfinite(found_DTT).all((1, 2))] / len(forecast_STD)
    if not len(found_DTT):
        raise StsError("In no domain do both forecast and change differ between training sets, so there is nothing to "
                       "compare.")
    return found_DTT


def within_domains(forecast_STD: np.ndarray, change_STD: np.ndarray) -> np.ndarray:
    """Spearman's correlation over training sets in every domain, mean over seeds, D; NaN where it is not defined."""
    forecast_STD, change_STD = _checked(forecast_STD, change_STD)
    return (_rank_units(forecast_STD) * _rank_units(change_STD)).sum(1).mean(0)


def _test(observed: float, shuffled: Iterator[np.ndarray], exact: bool) -> PermutationTest:
    """Share of shuffled values that reach the observed one."""
    values_B = np.concatenate(list(shuffled))
    extreme, count = int((values_B >= observed - 1e-12).sum()), len(values_B)
    return PermutationTest(extreme / count if exact else (extreme + 1) / (count + 1), exact, count)


def shuffled_within_domains(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000,
                            seed: int = 0) -> PermutationTest:
    """Two-sided p of the mean within-domain rank correlation, training sets shuffled in each domain by itself, alike in
    all seeds. Exact where there are fewer combinations than `resamples`."""
    products_DTT = _products(forecast_STD, change_STD)
    domains, sets = products_DTT.shape[:2]
    orders_OT = np.concatenate(list(all_orders(sets))) if sets <= EXACT_UP_TO else None

    def blocks() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(seed)
        for start in range(0, resamples, 1000):
            size = min(1000, resamples - start)
            order_BDT = (generator.permuted(np.tile(np.arange(sets), (size, domains, 1)), axis=2)
                         if orders_OT is None else orders_OT[generator.integers(0, len(orders_OT), (size, domains))])
            yield np.abs(products_DTT[np.arange(domains)[:, None], order_BDT, np.arange(sets)].sum(-1).mean(-1))

    observed = abs(float(products_DTT.trace(axis1=1, axis2=2).mean()))
    if orders_OT is None or domains * math.log(len(orders_OT)) > math.log(resamples):
        return _test(observed, blocks(), False)
    sums_B = np.zeros(1)  # over all combinations, one domain after the other
    for product_TT in products_DTT:
        sums_B = (sums_B[:, None] + product_TT[orders_OT, np.arange(sets)].sum(-1)).ravel()
    return _test(observed, iter([np.abs(sums_B / domains)]), True)


def shuffled_sets(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000,
                  seed: int = 0) -> PermutationTest:
    """One-sided p of the same with whole training sets shuffled, alike in all domains; up to eight in every order."""
    return _shuffled_trace(_products(forecast_STD, change_STD).mean(0), resamples, seed)


def _shuffled_trace(products_TT: np.ndarray, resamples: int, seed: int) -> PermutationTest:
    sets, exact = len(products_TT), len(products_TT) <= EXACT_UP_TO
    orders = all_orders(sets) if exact else random_orders(sets, resamples, np.random.default_rng(seed))
    return _test(float(products_TT.trace()), (products_TT[order_BT, np.arange(sets)].sum(-1) for order_BT in orders),
                 exact)


def hits(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Share of domains whose highest forecast belongs to the training set that moved them most; chance is 1 / T.
    Of k that tie, each counts as 1 / k, in the forecast as in the change. NaN where nothing differs in any domain."""
    highest_STD, most_STD = (own == own.max(1, keepdims=True) for own in _checked(forecast_STD, change_STD))
    share_SD = (highest_STD & most_STD).sum(1) / (highest_STD.sum(1) * most_STD.sum(1))
    kept_SD = share_SD[(np.ptp(change_STD, axis=1) > 0) & (np.ptp(forecast_STD, axis=1) > 0)]
    return float(kept_SD.mean()) if kept_SD.size else math.nan


def interaction(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Correlation of the `interaction_ranks` of forecast and change over all cells, mean over seeds; NaN if undefined:
    is a domain foreseen to be hit by *this* set of all?"""
    x_STD, y_STD = (interaction_ranks(values) for values in _checked(forecast_STD, change_STD))
    length_S = np.sqrt((x_STD**2).sum((1, 2)) * (y_STD**2).sum((1, 2)))
    return float(((x_STD * y_STD).sum((1, 2)) / np.where(length_S > 0, length_S, np.nan)).mean())


def interaction_ranks(values_STD: np.ndarray) -> np.ndarray:
    """Ranks of domains within each training set, less their mean over training sets; they sum to zero both ways."""
    ranks_STD = scipy_stats.rankdata(values_STD, axis=2)
    return ranks_STD - ranks_STD.mean(1, keepdims=True)


def specificity(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000, bootstrap: int = 5000,
                seed: int = 0) -> Specificity:
    """All of the above, of absolute changes and forecasts that need only be comparable within a domain."""
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


def own_list_lead(shared_STT: np.ndarray, *, resamples: int = 20_000, seed: int = 0) -> dict[str, float]:
    """Do a training set's demonstrations name *its* latents rather than those that any training moves?

    Of the latents shared by the list estimated for set a (rows) and the list moved by training on set b (columns): own
    and other (means of the diagonal and of the rest), lead (own - other) and p (one-sided, over orders of the sets).
    """
    shared_TT = np.asarray(shared_STT, float).mean(0)
    sets = len(shared_TT)
    if sets < 2:
        raise StsError("One training set given; its own fine-tuning can only be told apart from another's with two.")
    own = float(shared_TT.trace() / sets)
    other = float((shared_TT.sum() - shared_TT.trace()) / (sets * (sets - 1)))
    return {"own": own, "other": other, "lead": own - other, "p": _shuffled_trace(shared_TT, resamples, seed).p}


def list_lead(rows: list[dict], *kinds: str, seed: int = 0) -> dict:
    """`own_list_lead` of one kind of list in rows of stage `training_overlap`, or of the first kind less the second,
    pair by pair; or `undefined`, with one training set."""
    sets = len({row["trained"] for row in rows})
    first, *less = (np.array([row[kind] for row in rows], float).reshape(-1, sets, sets) for kind in kinds)
    try:
        return own_list_lead(first - sum(less), seed=seed)
    except StsError as error:
        return {"undefined": str(error)}


def cube(cells: pandas.DataFrame, column: str) -> np.ndarray:
    """One column of stage `training_matrix`, of one measure, as seeds x training sets x domains (alphabetical)."""
    seeds, names = cells["seed"].unique(), cells["training_set"].unique()
    wide = cells.pivot(index=["seed", "training_set"], columns="domain", values=column)
    return np.stack([wide.loc[[(seed, name) for name in names]].to_numpy(float) for seed in seeds])
