"""How predictors compare beside the absolute change of the domains: one engine for baselines, ablations and rivals.

Predictors and changes in, typed rows out; what is reported is the mean over seeds.

Shape suffixes: N domains, I items, S seeds, K controls or scores, R random draws, B resamples or orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from statsmodels.stats.multitest import multipletests

from sts.errors import StsError
from sts.measure import correlation
from sts.measure.correlation import correlation_rows, p_value, pearson, percentile_interval, spearman

SCORES = ("sts_act", "sts_icl")


class Comparison:
    """Predictors (name -> values, seeds x domains in alphabetical order) beside the absolute change of one measure.

    `differences`: domain -> after minus before of its questions, items x seeds; `reasons`: why one has no values.
    """

    def __init__(self, differences: Mapping[str, np.ndarray], predictors: Mapping[Any, np.ndarray], *, bootstrap: int,
                 permutations: int, seed: int, reasons: Mapping[Any, str] | None = None):
        self.seed, self.permutations, self.values = seed, permutations, predictors
        parts = [differences[domain] for domain in sorted(differences)]
        self.change_SN = np.abs(np.stack([own.mean(0) for own in parts], axis=1))
        self._about = {"n": self.change_SN.shape[1], "seeds": len(self.change_SN)}
        self.r: dict[Any, list[float]] = {}
        self.undefined: dict[Any, str] = {}
        for name, x_SN in predictors.items():
            try:
                self.r[name] = [pearson(*pair) for pair in zip(x_SN, self.change_SN, strict=True)]
            except StsError as error:
                self.undefined[name] = (reasons or {}).get(name) or str(error)
        self._resamples = correlation.hierarchical_resamples(parts, resamples=bootstrap, seed=seed)
        self._drawn = {name: self._resamples.correlations(predictors[name]) for name in self.r}

    def _tests(self, names: Sequence[Any], controls_SNK: np.ndarray | None = None) -> list[correlation.PermutationTest]:
        return correlation.permutation_tests(np.stack([self.values[name] for name in names]), self.change_SN,
                                             controls_SNK, resamples=self.permutations, seed=self.seed)

    def rows(self, against: Sequence[Any] = (), untested: Sequence[Any] = ()) -> dict[Any, dict[str, Any]]:
        """Every predictor's row: n, seeds, by_seed, pearson (their mean), pearson_interval, p; or why it is undefined.

        Beside others to set it `against` also spearman, exact, permutations and less, the differences of r of each
        other predictor and this one's. Those `untested` have no p and what rests on it."""
        rows: dict[Any, dict[str, Any]] = {
            name: self._about | ({} if name in self.r else {"undefined": self.undefined[name]}) for name in self.values}
        for (name, by_seed), test in zip(self.r.items(), self._tests(list(self.r)) if self.r else [], strict=True):
            row = rows[name]
            row |= {"by_seed": by_seed, "pearson": float(np.mean(by_seed)),
                    "pearson_interval": percentile_interval(self._drawn[name])}
            if name not in untested:
                row["p"] = test.p
            if against:
                row["spearman"] = float(np.mean([spearman(*pair) for pair in zip(
                    self.values[name], self.change_SN, strict=True)]))
            if against and name not in untested:
                row |= {"exact": test.exact, "permutations": test.resamples, "less": {
                    other: self.difference(other, name) for other in against if other in self.r and other != name}}
        return rows

    def difference(self, one: Any, other: Any) -> dict[str, Any]:
        """r of one less r of the other (mean), with its interval from the same resamples."""
        return {"mean": float(np.mean(self.r[one]) - np.mean(self.r[other])),
                "interval": percentile_interval(self._drawn[one] - self._drawn[other])}

    def swapped(self, pairs: Sequence[tuple[Any, Any]]) -> dict[tuple[Any, Any], dict[str, Any]]:
        """The differences of pairs, with p by swapping them within domains."""
        if not pairs:
            return {}
        first, second = (np.stack([self.values[name] for name in names]) for names in zip(*pairs, strict=True))
        tests = correlation.swap_tests(first, second, self.change_SN, seed=self.seed)
        return {pair: self.difference(*pair) | {"p": test.p} for pair, test in zip(pairs, tests, strict=True)}

    def partial(self, names: Sequence[str], controls: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of partial r given controls, which keep their measured values in resamples; p by Freedman and Lane."""
        controls_SNK = np.stack([self.values[name] for name in controls], axis=-1)
        if self._about["n"] < len(controls) + 3 or not np.isfinite(controls_SNK).all():
            return [self._about | {"undefined": "too few domains, or a control without values"}] * len(names)
        rows: list[dict[str, Any]] = []
        for name, test in zip(names, self._tests(names, controls_SNK), strict=True):
            r_S = correlation_rows(self.values[name], self.change_SN, controls_SNK)
            interval = percentile_interval(self._resamples.correlations(self.values[name], controls_SNK))
            rows.append(self._about | ({"by_seed": r_S.tolist(), "pearson": float(r_S.mean()), "p": test.p,
                                        "pearson_interval": interval} if np.isfinite(r_S).all()
                                       else {"undefined": "nothing left to correlate"}))
        return rows


def null(values_R: np.ndarray, observed: float | None) -> dict[str, Any]:
    """What chance gives beside an observed r: draws, observed; mean, low and high (central 95%) of r by chance, and p,
    the one-sided share of draws that reach the observed r, which counts as one; or why it is undefined."""
    kept_R = values_R[np.isfinite(values_R)]
    found = {"draws": len(kept_R), "observed": observed}
    if observed is None or not len(kept_R):
        return found | {"undefined": "no correlation is defined"}
    low, high = np.quantile(kept_R, [0.025, 0.975]).tolist()
    return found | {"mean": float(kept_R.mean()), "low": low, "high": high, "p": float(p_value(kept_R, observed))}


def best_of(scores_KSN: np.ndarray, change_SN: np.ndarray, *, orders: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """What picking the best of K scores gives by chance: the largest r when domains are shuffled alike for all scores
    and seeds, so that scores that are alike count as alike (the maximum statistic of Westfall and Young 1993).

    Keys: index and pearson of the best, scores (K); over the orders chance_mean (mean of the largest r), chance_high
    (what it exceeds in 5%), single_high (the same for one score fixed beforehand) and p; orders.
    """
    orders_BN, exact = correlation.orders(change_SN.shape[1], orders, seed)
    observed_K = correlation_rows(scores_KSN, change_SN).mean(-1)
    found_BK = correlation.shuffled(scores_KSN, change_SN, orders_BN)
    largest_B, best = found_BK.max(1), int(observed_K.argmax())
    return {"index": best, "pearson": float(observed_K[best]), "scores": len(observed_K),
            "chance_mean": float(largest_B.mean()), "chance_high": float(np.quantile(largest_B, 0.95)),
            "single_high": float(np.quantile(found_BK, 0.95, axis=0).mean()),
            "p": float(p_value(largest_B, observed_K[best], exact)), "orders": len(orders_BN)}


#: Every setting that is varied, in the order of the page.
AXES = ("bands", "top_n", "variant", "width", "layer", "k", "demonstrations", "shift_demonstrations", "score_tokens",
        "shift_tokens", "masks")
#: Those of which the paper says that the last value predicts worst.
ENDS = ("bands", "width", "k")


def sweeps_compared(measure: str, frames: Sequence[pandas.DataFrame], differences: Mapping[str, np.ndarray],
                    **numbers: Any) -> dict[str, list[dict]]:
    """The rows of stage `sweep_correlations` for one measure, from each seed's scores by axis, value and domain; `less`
    has p by swapping and, corrected for all of them, p_holm."""
    places = frames[0][["axis", "value", "own"]].drop_duplicates()
    owns = {(axis, value): bool(own) for axis, value, own in places.itertuples(index=False)}
    tables = [frame.set_index(["axis", "value", "domain"]).sort_index() for frame in frames]
    compared = Comparison(differences, {
        (score, *place): np.stack([table.loc[place].loc[sorted(differences), score].to_numpy(float)
                                   for table in tables]) for score in SCORES for place in owns}, **numbers)
    rows = compared.rows()
    found: dict[str, list[Any]] = {"values": [], "claims": [], "best": []}
    for score in SCORES:
        keys, about = [(score, *place) for place in owns], {"measure": measure, "score": score}
        known = [key for key in keys if key in compared.r]
        if not known:
            continue
        own_of = {key[1]: key for key in known if owns[key[1:]]}
        pairs = {key: own_of[key[1]] for key in known if not owns[key[1:]] and key[1] in own_of}
        ends = {axis: (of[-1], of[0]) for axis in ENDS
                if len(of := [key for key in keys if key[1] == axis]) > 1 and {of[0], of[-1]} <= compared.r.keys()}
        values_KSN = np.stack([compared.values[key] for key in known])
        # The run's own value stands in several sweeps, and is one try.
        tried = np.sort(np.unique(values_KSN, axis=0, return_index=True)[1])
        best = best_of(values_KSN[tried], compared.change_SN, seed=compared.seed,
                       orders=min(compared.permutations, 20_000))
        top = known[tried[best["index"]]]
        less = compared.swapped(list(dict.fromkeys([*pairs.items(), *ends.values()])))
        for pair in pairs.items():
            rows[pair[0]]["less"] = less[pair].copy()
        found["claims"] += [about | {"axis": axis, "first": pair[1][2], "last": pair[0][2], **less[pair]}
                            for axis, pair in ends.items()]
        found["best"].append(about | {"axis": top[1], "value": top[2], **best})
    if tested := [row["less"] for row in rows.values() if "less" in row]:
        adjusted = np.asarray(multipletests([less["p"] for less in tested], method="holm")[1])
        for less, p in zip(tested, adjusted, strict=True):
            less["p_holm"] = float(p)
    found["values"] = [{"measure": measure, "score": key[0], "axis": key[1], "value": key[2], "own": owns[key[1:]],
                        **row} for key, row in rows.items()]
    return found
