"""Does a forecast tell which training set moves a domain? Statistics over training sets and evaluation domains.

Within a domain all training sets meet the same questions, so forecasts and changes are compared there. What belongs to
a training set does not cancel: one may move everything, or all of the sciences, more. Domains are therefore no
independent repetitions, and training sets are few: only `shuffled_sets`, which moves whole sets, allows for both.

Shape suffixes: S seeds, T training sets, D evaluation domains, C cells (sets x domains), B permutations, O orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import PermutationTest, cluster_interval, correlation_rows, orders, p_value, units
from sts.measure.items import paired_mean_interval


def loss_fall(log: Mapping[str, Any]) -> float:
    """The share that training took off the loss on held-out examples, by its log; NaN where none were held out."""
    before = log["held_out_before"]
    return 1 - log["held_out_after"] / before if before else math.nan


def products(forecast_STD: np.ndarray, change_STD: np.ndarray) -> np.ndarray:
    """D x T x T: what forecast a beside change b adds to a domain's rank correlation over training sets, mean over
    seeds; the traces are the correlations as measured. NaN where one is not defined in every seed."""
    ranks = (units(scipy_stats.rankdata(own_STD, axis=1).swapaxes(1, 2)) for own_STD in (forecast_STD, change_STD))
    return np.einsum("sda,sdb->dab", *ranks) / len(forecast_STD)


def shuffled_within_domains(products_DTT: np.ndarray, *, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p of the mean within-domain rank correlation, training sets shuffled at random in each domain by
    itself, alike in all seeds."""
    domains, sets = products_DTT.shape[:2]
    found_DO = products_DTT[:, orders(sets, resamples, seed)[0], np.arange(sets)].sum(-1)
    drawn_BD = np.random.default_rng(seed).integers(0, found_DO.shape[1], (resamples, domains))
    values_B = found_DO[np.arange(domains), drawn_BD].mean(-1)
    return float(p_value(np.abs(values_B), abs(products_DTT.trace(axis1=1, axis2=2).mean())))


def shuffled_sets(products_TT: np.ndarray, *, resamples: int = 20_000, seed: int = 0) -> PermutationTest:
    """One-sided p of the trace of mean `products`, whole training sets shuffled; never below 1 / orders."""
    orders_OT, exact = orders(len(products_TT), resamples, seed)
    found_O = products_TT[orders_OT, np.arange(len(products_TT))].sum(-1)
    return PermutationTest(float(p_value(found_O, products_TT.trace(), exact)), exact, len(orders_OT))


def hits(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Share of domains whose highest forecast belongs to the training set that moved them most; chance is 1 / T.
    Of k that tie, each counts as 1 / k, in the forecast as in the change. NaN where nothing differs in any domain."""
    highest_STD, most_STD = (own == own.max(1, keepdims=True) for own in (forecast_STD, change_STD))
    share_SD = (highest_STD & most_STD).sum(1) / (highest_STD.sum(1) * most_STD.sum(1))
    kept_SD = share_SD[(np.ptp(change_STD, axis=1) > 0) & (np.ptp(forecast_STD, axis=1) > 0)]
    return float(kept_SD.mean()) if kept_SD.size else math.nan


def interaction(forecast_STD: np.ndarray, change_STD: np.ndarray) -> float:
    """Is a domain foreseen to be hit by *this* set of all? Correlation of forecast and change over all cells, mean over
    seeds, as ranks of domains within each training set, less their mean over training sets; NaN if undefined. Without
    p, as domains are not exchangeable."""
    ranks = (scipy_stats.rankdata(values_STD, axis=2) for values_STD in (forecast_STD, change_STD))
    cells = ((own_STD - own_STD.mean(1, keepdims=True)).reshape(len(own_STD), -1) for own_STD in ranks)
    return float(correlation_rows(*cells).mean())


def specificity(forecast_STD: np.ndarray, change_STD: np.ndarray, *, resamples: int = 20_000, bootstrap: int = 5000,
                seed: int = 0) -> dict[str, Any]:
    """All of the above, of absolute changes and forecasts that need only be comparable within a domain.

    Keys: training_sets, domains, seeds; by_domain, and within, the mean of the `defined` ones, with low and high (95%
    over domains); p_within (two-sided), p_sets and p_opposite (one-sided, for either side), orders; hits, interaction;
    pooled: r over all cells, mean over seeds, with pooled_interval, whole domains drawn.
    `StsError` for fewer than two training sets or three domains, NaN, or where nothing differs.
    """
    seeds, sets, domains = forecast_STD.shape
    if sets < 2 or domains < 3:
        raise StsError(f"{sets} training set(s) and {domains} domain(s) given; to compare training sets, at least two "
                       "of them and three domains are needed.")
    if not np.isfinite([forecast_STD, change_STD]).all():
        raise StsError("Forecasts and changes hold NaN or infinite values; every training set needs all domains.")
    found_DTT, numbers = products(forecast_STD, change_STD), {"resamples": resamples, "seed": seed}
    by_domain_D = found_DTT.trace(axis1=1, axis2=2)
    defined_D = np.isfinite(by_domain_D)
    if not defined_D.any():
        raise StsError("In no domain do both forecast and change differ between training sets, so there is nothing to "
                       "compare.")
    mean = paired_mean_interval(by_domain_D[defined_D], resamples=bootstrap, seed=seed)
    whole, opposite = (shuffled_sets(sign * found_DTT[defined_D].mean(0), **numbers) for sign in (1, -1))
    x_SC, y_SC = (values_STD.reshape(seeds, -1) for values_STD in (forecast_STD, change_STD))
    pooled = {"pooled": float(correlation_rows(x_SC, y_SC).mean()), "pooled_interval": cluster_interval(
        x_SC, y_SC, np.tile(np.arange(domains), sets), bootstrap, seed)}
    return {"training_sets": sets, "domains": domains, "seeds": seeds, "defined": int(defined_D.sum()),
            "by_domain": by_domain_D.tolist(), "within": mean.mean, "low": mean.low, "high": mean.high,
            "p_within": shuffled_within_domains(found_DTT[defined_D], **numbers), "p_sets": whole.p,
            "p_opposite": opposite.p, "orders": whole.resamples, "hits": hits(forecast_STD, change_STD),
            "interaction": interaction(forecast_STD, change_STD), **pooled}


def list_lead(rows: list[dict], *kinds: str, seed: int = 0) -> dict[str, Any]:
    """Do a training set's demonstrations name *its* latents rather than those that any training moves?

    Of one kind of list in rows of stage `training_overlap`, or of the first kind less the second, pair by pair: own and
    other (latents shared with the list that training on the same set moves, and on others), lead (own - other) and p
    (one-sided, over orders of the sets); or `undefined`, with one training set.
    """
    if (sets := len({row["trained"] for row in rows})) < 2:
        return {"undefined": "one training set given; its own fine-tuning can be told apart only with two"}
    first, *less = (np.array([row[kind] for row in rows], float).reshape(-1, sets, sets) for kind in kinds)
    shared_TT = (first - sum(less)).mean(0)
    own = float(shared_TT.trace() / sets)
    other = float((shared_TT.sum() - shared_TT.trace()) / (sets * (sets - 1)))
    return {"own": own, "other": other, "lead": own - other, "p": shuffled_sets(shared_TT, seed=seed).p}


def cube(cells: pandas.DataFrame, column: str) -> np.ndarray:
    """One column of stage `training_matrix`, of one measure, as seeds x training sets x domains (alphabetical)."""
    seeds, names = cells["seed"].unique(), cells["training_set"].unique()
    wide = cells.pivot(index=["seed", "training_set"], columns="domain", values=column)
    return np.stack([wide.loc[[(seed, name) for name in names]].to_numpy(float) for seed in seeds])
