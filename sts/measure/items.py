"""What is measured of every question and domain: from log-likelihoods to measures, changes and their intervals.

Shape suffixes: N items, D sets drawn, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import correlation_rows

#: What the domain shift is measured in: percentage points, and bits per character of the right answer.
MEASURES = ("accuracy", "p_right", "bits", "accuracy_generated")
#: Fewest items for a bootstrap interval of a mean. Resampling a few understates their spread: with five normal items, a
#: nominal 95% interval leaves the true mean out in 16% of samples.
BOOTSTRAP_FROM = 16


class MeanInterval(NamedTuple):
    """Mean of `n` values, its standard error and a 95% interval.

    `kind` is "bootstrap" (percentiles of resamples), "t" (Student's) or "none" (one value; error and ends are NaN).
    """

    mean: float
    standard_error: float
    low: float
    high: float
    n: int
    kind: str


def paired_mean_interval(differences: ArrayLike, *, resamples: int = 5000, seed: int = 0) -> MeanInterval:
    """Mean of paired differences, one a test item, in their units: the percentile bootstrap from `BOOTSTRAP_FROM` items
    on, Student's t for fewer. One item says nothing about spread: then error and ends are NaN."""
    differences_N = np.asarray(differences, float)
    n, mean = len(differences_N), float(differences_N.mean())
    if n == 1:
        return MeanInterval(mean, math.nan, math.nan, math.nan, 1, "none")
    error = float(differences_N.std(ddof=1) / math.sqrt(n))
    if n < BOOTSTRAP_FROM:
        reach = float(scipy_stats.t.ppf(0.975, n - 1)) * error
        return MeanInterval(mean, error, mean - reach, mean + reach, n, "t")
    picked_BN = np.random.default_rng(seed).integers(0, n, (resamples, n))
    low, high = np.quantile(differences_N[picked_BN].mean(axis=1), [0.025, 0.975])
    return MeanInterval(mean, error, float(low), float(high), n, "bootstrap")


def crossed_mean_interval(values_DP: ArrayLike, *, against_one: bool = False) -> MeanInterval:
    """Mean of a complete table of sets by problems, with Student's interval over both, as both are drawn at random.

    The half-width is the root of the summed squares of Student's half-widths over row means and over column means
    (Banerjee 1960). With `against_one` the values are differences of a single set from each of these, whose own scatter
    counts as well: the variance of sets is taken 1 + 1 / D times, as in a prediction interval.
    """
    table_DP = np.asarray(values_DP, dtype=float)
    mean, (rows, columns) = float(table_DP.mean()), table_DP.shape
    if columns == 1:
        return MeanInterval(mean, math.nan, math.nan, math.nan, 1, "none")
    parts = [(table_DP.mean(axis=axis).var(ddof=1) * weight, number)
             for axis, number, weight in ((0, columns, 1 / columns), (1, rows, 1 / rows + against_one)) if number > 1]
    reach = math.sqrt(sum(variance * scipy_stats.t.ppf(0.975, number - 1)**2 for variance, number in parts))
    error = math.sqrt(sum(variance for variance, _ in parts))
    return MeanInterval(mean, error, mean - reach, mean + reach, columns, "t")


def of_weakest_seed(rows: pandas.DataFrame, *keys: str) -> Any:
    """Whether a row's interval begins lowest among the seeds' rows that agree in `keys`: if that lies above zero, every
    seed's does."""
    begins = rows["low"].fillna(rows["mean"])
    return begins == begins.groupby([rows[key] for key in keys]).transform("min")


def mcnemar_p(before_N: np.ndarray, after_N: np.ndarray) -> float:
    """McNemar's exact test, two-sided: do items turn from wrong to right as often as from right to wrong? 1 if none."""
    gained, lost = int((after_N & ~before_N).sum()), int((before_N & ~after_N).sum())
    return float(scipy_stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def item_measures(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Every measure of every item (index example_id, column domain), from rows of `engine.evaluate.evaluate`.

    accuracy: the right option's letter, or text where no letters are scored, is the likeliest, the first of those that
    tie; p_right: its share of the options' probability; both 0 to 100. bits: of the worked solution, or where none is
    scored of the right option's text, per character. NaN where not evaluated.
    """
    items = rows.groupby("example_id", sort=False)["domain"].first().to_frame()
    items[list(MEASURES)] = np.nan
    letters, texts, solutions = (rows[rows["kind"] == kind] for kind in ("letter", "text", "solution"))
    letters = letters if len(letters) else texts
    if len(letters):
        by_item = letters.groupby("example_id")["loglikelihood"]
        weight = pandas.Series(np.exp(letters["loglikelihood"] - by_item.transform("max")))
        p = weight / weight.groupby(letters["example_id"]).transform("sum")
        right = np.asarray(letters["is_right"], bool)
        items["p_right"] = pandas.Series(100 * np.asarray(p)[right], index=np.asarray(letters["example_id"])[right])
        items["accuracy"] = 100.0 * rows.loc[by_item.idxmax()].set_index("example_id")["is_right"].astype(float)
    solutions = (solutions if len(solutions) else texts.loc[texts["is_right"]]).set_index("example_id")
    items["bits"] = -solutions["loglikelihood"] / math.log(2) / solutions["characters"]
    return items


def above_chance(rows: pandas.DataFrame) -> dict[str, float]:
    """Of rows of one kind of option: n questions, mean accuracy, its standard error, p_right and what guessing gives,
    in per cent; z: accuracy above guessing, in standard errors."""
    items, options = item_measures(rows), rows.groupby("example_id").size()
    right = paired_mean_interval(items["accuracy"])
    chance = float(np.mean(100 / options.to_numpy()))
    # All right, or all wrong: what guessing itself would scatter by.
    error = right.standard_error or math.sqrt(chance * (100 - chance) / right.n) or math.inf
    return {"n": right.n, "accuracy": right.mean, "standard_error": right.standard_error,
            "p_right": float(np.mean(items["p_right"])), "chance": chance,
            "z": (right.mean - chance) / error}


def item_shifts(first: pandas.DataFrame, second: pandas.DataFrame, *, resamples: int = 5000,
                seed: int = 0) -> pandas.DataFrame:
    """Change of every measure in every domain, paired by item (`item_measures` before and after), with an interval.

    One row a domain and measure; `interval` is `MeanInterval.kind`, mcnemar_p is of accuracies alone.
    """
    rows = []
    for domain, items in first.groupby("domain"):
        for measure in (name for name in MEASURES if name in items):  # generated answers have their own alone
            old = items[measure].dropna()
            new = second.loc[old.index, measure]
            if old.empty:
                continue
            change = paired_mean_interval((new - old).to_numpy(), resamples=resamples, seed=seed)
            rows.append({"domain": domain, "measure": measure, "n": len(old), "before": old.mean(),
                         "after": new.mean(), "shift": change.mean, "low": change.low, "high": change.high,
                         "interval": change.kind, "standard_error": change.standard_error,
                         "mcnemar_p": mcnemar_p((old > 0).to_numpy(), (new > 0).to_numpy())
                         if measure.startswith("accuracy") else math.nan})
    return pandas.DataFrame(rows)


def item_differences(evaluations: Mapping[int, tuple[pandas.DataFrame, pandas.DataFrame]]
                     ) -> dict[str, dict[str, np.ndarray]]:
    """measure -> domain -> after minus before of its questions in every seed, items x seeds; from seed -> evaluated."""
    changes, domains = {}, {}
    for seed, own in evaluations.items():
        before, after = (item_measures(rows) for rows in own)
        changes[seed] = after.loc[before.index, list(MEASURES)] - before[list(MEASURES)]
        domains |= before["domain"].to_dict()
    frames = {measure: pandas.DataFrame({seed: change[measure] for seed, change in changes.items()}).dropna()
              for measure in MEASURES}
    return {measure: {str(domain): rows.to_numpy() for domain, rows in frame.groupby(frame.index.map(domains))}
            for measure, frame in frames.items() if len(frame)}


def change_quality(differences: Mapping[str, np.ndarray], *, splits: int = 500, seed: int = 0) -> dict[str, float]:
    """How well the absolute changes of domains are known, mean over seeds; domain -> after minus before of its
    questions, items x seeds.

    Returns:
        change: mean absolute change; noise: what questions that rise and fall by chance alone would give; beyond: share
        of domains above 1.96 standard errors; reliability: Spearman and Brown's, of the correlation over domains of
        two random halves of every domain's questions, mean over `splits`. `StsError` for a domain of fewer than 2.
    """
    if few := [domain for domain, own in differences.items() if len(own) < 2]:
        raise StsError(f"Domain {few[0]!r} has one question, too few for two halves; raise eval_limit.")
    generator, r = np.random.default_rng(seed), []
    for _ in range(splits):
        halves_2NS = np.abs([[half.mean(0) for half in np.array_split(generator.permutation(own), 2)]
                             for own in differences.values()]).swapaxes(0, 1)
        r.append(correlation_rows(*halves_2NS.swapaxes(1, 2)).mean())
    halves = float(np.mean(r))
    change_NS = np.abs([own.mean(0) for own in differences.values()])
    error_NS = np.array([own.std(0, ddof=1) / math.sqrt(len(own)) for own in differences.values()])
    return {"change": float(change_NS.mean()), "noise": float(error_NS.mean() * math.sqrt(2 / math.pi)),
            "beyond": float((change_NS > 1.96 * error_NS).mean()), "reliability": 2 * halves / (1 + halves)}
