"""How predictors compare beside the absolute change of the domains: one engine for baselines, ablations and rivals.

Predictors and changes in, typed rows out; what is reported is the mean over seeds.

Shape suffixes: N domains, I items, S seeds, K controls or scores, R random draws, B resamples or orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas

from sts.errors import StsError
from sts.measure import correlation, resampling
from sts.measure.correlation import correlation_rows, pearson, plain, spearman, units

SCORES = ("sts_act", "sts_icl")


@dataclass(frozen=True)
class Span:
    """A 95% interval and the number of resamples that it stands on."""

    low: float
    high: float
    resamples: int


@dataclass(frozen=True)
class Difference:
    """r of one predictor less r of another, from the same resamples; p by swapping them within domains."""

    mean: float
    interval: Span | None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Correlated:
    """r of a predictor with the absolute change, mean over seeds, or why there is none; None: not asked for.
    `less`: r of each other predictor less this one's, or of this one less the run's own."""

    n: int
    seeds: int
    by_seed: list[float] | None = None
    pearson: float | None = None
    pearson_interval: Span | None = None
    p: float | None = None
    spearman: float | None = None
    exact: bool | None = None
    permutations: int | None = None
    less: dict[str, Difference] | Difference | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class Null:
    """Central 95% of r by chance, and the one-sided share of draws that reach the observed r, which counts as one."""

    draws: int
    observed: float | None
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class BestOf:
    """The largest of `scores` correlations; over random orders the mean of the largest, what it exceeds in 5% of them,
    the same for one score fixed beforehand, and the share whose largest reaches it (it counts as one)."""

    index: int
    pearson: float
    scores: int
    chance_mean: float
    chance_high: float
    single_high: float
    p: float
    orders: int


class Comparison:
    """Predictors (name -> values, seeds x domains in alphabetical order) beside the absolute change of one measure.

    `differences`: domain -> after minus before of its questions, items x seeds; `reasons`: why one has no values.
    """

    def __init__(self, differences: Mapping[str, np.ndarray], predictors: Mapping[Any, np.ndarray], *, bootstrap: int,
                 permutations: int, seed: int, reasons: Mapping[Any, str] | None = None):
        self.domains, self.seed, self.permutations = sorted(differences), seed, permutations
        self._parts, self._bootstrap, self.values = [differences[own] for own in self.domains], bootstrap, predictors
        self.change_SN = np.abs(np.stack([own.mean(0) for own in self._parts], axis=1))
        self.r: dict[Any, list[float]] = {}
        self.undefined: dict[Any, str] = {}
        for name, x_SN in predictors.items():
            try:
                self.r[name] = [pearson(*pair) for pair in zip(x_SN, self.change_SN, strict=True)]
            except StsError as error:
                self.undefined[name] = (reasons or {}).get(name) or str(error)

    @cached_property
    def _resamples(self) -> resampling.Resamples:
        return resampling.hierarchical_resamples(self._parts, resamples=self._bootstrap, seed=self.seed)

    @cached_property
    def _drawn(self) -> dict[Any, np.ndarray]:
        return {name: self._resamples.correlations(self.values[name]) for name in self.r}

    def rows(self, against: Sequence[Any] = (), untested: Sequence[Any] = ()) -> dict[Any, Correlated]:
        """r of every predictor with interval and p; beside others to set it `against`, also all else."""
        rows = {name: Correlated(len(self.domains), len(self.change_SN), undefined=self.undefined.get(name))
                for name in self.values}
        tests = correlation.permutation_tests(np.stack([self.values[name] for name in self.r]), self.change_SN,
                                  resamples=self.permutations, seed=self.seed) if self.r else []
        for (name, by_seed), test in zip(self.r.items(), tests, strict=True):
            row = replace(rows[name], by_seed=by_seed, pearson=float(np.mean(by_seed)),
                          pearson_interval=_span(self._drawn[name]))
            if against:
                ranks = [spearman(*pair) for pair in zip(self.values[name], self.change_SN, strict=True)]
                row = replace(row, spearman=float(np.mean(ranks)))
            if name not in untested:
                row = replace(row, p=test.p)
                if against:
                    row = replace(row, exact=test.exact, permutations=test.resamples, less={
                        other: self.difference(other, name) for other in against if other in self.r and other != name})
            rows[name] = row
        return rows

    def difference(self, one: Any, other: Any) -> Difference:
        """r of one less r of the other."""
        return Difference(float(np.mean(self.r[one]) - np.mean(self.r[other])),
                          _span(self._drawn[one] - self._drawn[other]))

    def swapped(self, pairs: Sequence[tuple[Any, Any]]) -> dict[tuple[Any, Any], Difference]:
        """The differences of pairs, with p."""
        if not pairs:
            return {}
        first, second = (np.stack([self.values[name] for name in names]) for names in zip(*pairs, strict=True))
        tests = resampling.swap_tests(first, second, self.change_SN, seed=self.seed)
        return {pair: replace(self.difference(*pair), p=test.p) for pair, test in zip(pairs, tests, strict=True)}

    def partial(self, names: Sequence[str], controls: Sequence[str]) -> list[Correlated]:
        """Partial r given controls, which keep their measured values in resamples; p by Freedman and Lane."""
        rows = [Correlated(len(self.domains), len(self.change_SN))] * len(names)
        controls_SNK = np.stack([self.values[name] for name in controls], axis=-1)
        if len(self.domains) < len(controls) + 3 or not np.isfinite(controls_SNK).all():
            return [replace(row, undefined="too few domains, or a control without values") for row in rows]
        x_PSN = np.stack([self.values[name] for name in names])
        tests = correlation.permutation_tests(x_PSN, self.change_SN, controls_SNK, resamples=self.permutations,
                                              seed=self.seed)
        for place, (x_SN, test) in enumerate(zip(x_PSN, tests, strict=True)):
            r_S, span = correlation_rows(x_SN, self.change_SN, controls_SNK), None
            if np.isfinite(r_S).all():
                span = _span(self._resamples.correlations(x_SN, controls_SNK))
            found = {"by_seed": r_S.tolist(), "pearson": float(r_S.mean()), "p": test.p, "pearson_interval": span}
            rows[place] = replace(rows[place], **found if span else {"undefined": "nothing left to correlate"})
        return rows

    def best(self, names: Sequence[Any]) -> BestOf:
        """The best of several predictors, beside what the best of so many is by chance."""
        return best_of(np.stack([self.values[name] for name in names]), self.change_SN, seed=self.seed,
                       orders=min(self.permutations, 20_000))


def _span(values_B: np.ndarray) -> Span | None:
    found = resampling.percentile_interval(values_B)
    return found and Span(found.low, found.high, found.resamples)


def null(values_R: np.ndarray, observed: float | None) -> Null:
    """What chance gives beside an observed r."""
    kept_R = values_R[np.isfinite(values_R)]
    if observed is None or not len(kept_R):
        return Null(len(kept_R), observed, undefined="no correlation is defined")
    low, high = np.quantile(kept_R, [0.025, 0.975])
    p = (1 + (kept_R >= observed - 1e-12).sum()) / (1 + len(kept_R))
    return Null(len(kept_R), observed, float(kept_R.mean()), float(low), float(high), float(p))


def best_of(scores_KSN: np.ndarray, change_SN: np.ndarray, *, orders: int = 10_000, seed: int = 0) -> BestOf:
    """What picking the best of K scores gives by chance: the largest r when domains are shuffled alike for all scores
    and seeds, so that scores that are alike count as alike (the maximum statistic of Westfall and Young 1993)."""
    units_KSN, goal_SN = units(scores_KSN), units(change_SN)
    observed_K = (units_KSN * goal_SN).sum(-1).mean(-1)
    if not np.isfinite(observed_K).all():
        raise StsError("A score or the change is the same in every domain, so that no correlation is defined; leave "
                       "it out first.")
    seeds, n = goal_SN.shape
    flat_KM = units_KSN.reshape(len(units_KSN), -1) / seeds
    found_BK = np.concatenate([goal_SN[:, order_BN].swapaxes(0, 1).reshape(len(order_BN), -1) @ flat_KM.T
                               for order_BN in correlation.random_orders(n, orders, np.random.default_rng(seed))])
    largest_B, best = found_BK.max(1), int(observed_K.argmax())
    reached = int((largest_B >= observed_K[best] - 1e-12).sum())
    return BestOf(best, float(observed_K[best]), len(observed_K), float(largest_B.mean()),
                  float(np.quantile(largest_B, 0.95)), float(np.quantile(found_BK, 0.95, axis=0).mean()),
                  (reached + 1) / (orders + 1), orders)


#: Every setting that is varied -> its label, in the order of the page.
AXES = {"bands": "ranks of the latents", "top_n": "number of latents, N", "variant": "formulas", "width": "SAE width",
        "width_share": "SAE width, N in proportion", "layer": "layer", "k": "active latents a token, k",
        "norms": "decoder norms", "demonstrations": "demonstrations, domain (m)",
        "shift_demonstrations": "demonstrations, training set", "score_tokens": "tokens a domain",
        "shift_tokens": "tokens, training set", "masks": "tokens that count"}
#: Those whose values are SAEs of the sweep, and those of which the paper says that the last value predicts worst.
SAE_AXES, ENDS = ("width", "width_share", "layer", "k", "norms"), ("bands", "width", "k")


def sweeps_compared(measure: str, frames: Sequence[pandas.DataFrame], differences: Mapping[str, np.ndarray],
                    **numbers: Any) -> dict[str, list[dict]]:
    """The rows of stage `sweep_correlations` for one measure, from each seed's scores by axis, value and domain."""
    places = frames[0][["axis", "value", "own"]].drop_duplicates()
    owns = {(axis, value): bool(own) for axis, value, own in places.itertuples(index=False)}
    tables = [frame.set_index(["axis", "value", "domain"]).sort_index() for frame in frames]
    compared = Comparison(differences, {
        (score, *place): np.stack([table.loc[place].loc[sorted(differences), score].to_numpy(float)
                                   for table in tables]) for score in SCORES for place in owns}, **numbers)
    rows, found = compared.rows(), {"values": [], "claims": [], "best": [], "saes": []}
    for score in SCORES:
        about = {"measure": measure, "score": score}
        keys = [(score, *place) for place in owns]
        known = [key for key in keys if key in compared.r]
        own_of = {key[1]: key for key in keys if owns[key[1:]]}
        pairs = {key: own_of[key[1]] for key in known if not owns[key[1:]] and own_of[key[1]] in compared.r}
        ends = {axis: (of[-1], of[0]) for axis in ENDS
                if len(of := [key for key in keys if key[1] == axis]) > 1 and {of[0], of[-1]} <= compared.r.keys()}
        own, middle = (next((key for key in known if owns[key[1:]] and (key[1] in SAE_AXES) == sae), None)
                       for sae in (False, True))
        if known:
            tried = different({key: compared.values[key] for key in known})
            best = compared.best(tried)
            top = tried[best.index]
            # A score that is the run's own under another name is not compared with itself.
            picked = bool(own) and not np.array_equal(compared.values[top], compared.values[own])
            less = compared.swapped(list(dict.fromkeys([
                *pairs.items(), *ends.values(), *[(top, own)] * picked, *[(middle, own)] * bool(own and middle)])))
            rows |= {key: replace(rows[key], less=less[pair]) for key, pair in zip(pairs, pairs.items(), strict=True)}
            found["claims"] += [about | {"axis": axis, "first": pair[1][2], "last": pair[0][2], **plain(less[pair])}
                                for axis, pair in ends.items()]
            found["best"].append(about | {"axis": top[1], "value": top[2], **vars(best),
                                          "less_own": plain(less[top, own]) if picked else None})
            if own and middle:
                found["saes"].append(about | {"own": rows[own].pearson, "middle": rows[middle].pearson,
                                              **plain(less[middle, own])})
    rows = holm(rows)
    found["values"] = [{"measure": measure, "score": key[0], "axis": key[1], "value": key[2], "own": owns[key[1:]],
                        **plain(row)} for key, row in rows.items()]
    return found


def holm(rows: dict[Any, Correlated]) -> dict[Any, Correlated]:
    """The rows with p_holm: p of their differences, corrected by Holm's method for all of them together."""
    from statsmodels.stats.multitest import multipletests

    own = {key: row.less for key, row in rows.items() if isinstance(row.less, Difference)}
    adjusted = np.asarray(multipletests([less.p for less in own.values()], method="holm")[1] if own else [])
    return rows | {key: replace(rows[key], less=replace(less, p_holm=float(p)))
                   for (key, less), p in zip(own.items(), adjusted, strict=True)}


def different(scores: Mapping[Any, np.ndarray]) -> list[Any]:
    """Names of the scores without those that equal an earlier one: a run's own value stands in several sweeps."""
    seen = {np.ascontiguousarray(scores[name], float).tobytes(): name for name in reversed(scores)}
    return [name for name in scores if name in seen.values()]
