"""The paper's own numbers, and what can be recomputed from them.

Read from `data/paper/` (its README says where each file comes from). Nothing in this module touches a model: it
loads published values, recomputes statistics from the published points, and works out what choosing the eight most
extreme of fourteen domains does to a correlation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from sts.errors import ROOT, StsError, one_of
from sts.measure import correlation as stats
from sts.measure.resampling import correlate

FOLDER = ROOT / "data" / "paper"
#: The paper's models, in its order, and how they are written in text.
MODELS = {"llama3-8b-instruct": "Llama3-8B-Instruct", "qwen2.5-7b-instruct": "Qwen2.5-7B-Instruct",
          "gemma2-9b-it": "Gemma2-9B-Instruct"}
#: The two scores of a domain.
METRICS = {"act": "STS_act", "icl": "STS_ICL"}


# --- the published numbers ----------------------------------------------------------------------------------------

def published_numbers() -> pd.DataFrame:
    """Every number the paper prints that the book refers to, one a row.

    Columns: source ("Table 1", ...), quantity, model, value (float; NaN where the paper prints only a description,
    which is then in `note`), std (over the paper's repetitions; NaN where not printed), note ("" for none).
    """
    frame = pd.read_csv(FOLDER / "published_numbers.csv")
    value, note = pd.to_numeric(frame["value"], errors="coerce"), frame["note"].fillna("").astype(str)
    note = note.where(value.notna(), (frame["value"].astype(str) + "; " + note).str.rstrip("; "))
    return frame.assign(value=value, note=note)


def accuracy_shifts() -> pd.DataFrame:
    """Tables 2 to 4: change of MMLU-Pro accuracy by fine-tuning on LIMO, 14 domains for each of 3 models.

    Columns: source, model, train_data, domain, shift_pct (percentage points, after minus before), abs_shift_pct.
    """
    frame = pd.read_csv(FOLDER / "accuracy_shift_by_domain.csv")
    return frame.assign(abs_shift_pct=frame["shift_pct"].abs())


def figure3_points() -> pd.DataFrame:
    """Figure 3's points: model, metric ("act" or "icl"), domain, sts (digitised), abs_shift_pct (percentage points)."""
    return pd.read_csv(FOLDER / "figure3_points_digitised.csv")


def published_table(number: int) -> pd.DataFrame:
    """One of the paper's Tables 1 and 5 to 13, tidy: quantity, model, value, std, note.

    Raises:
        StsError: another number; Tables 2 to 4 are `accuracy_shifts()`.
    """
    numbers = published_numbers()
    rows = numbers[numbers["source"].str.split(", ").map(lambda sources: f"Table {number}" in sources)]
    if rows.empty:
        raise StsError(f"Table {number!r} is not known. Valid: 1 and 5 to 13; Tables 2 to 4 are accuracy_shifts().")
    return rows.drop(columns="source").reset_index(drop=True)


def published_correlations() -> pd.DataFrame:
    """Tables 6 and 9 side by side: model, metric, pearson, pearson_std, r_squared, r_squared_std."""
    rows = []
    for table, name in ((6, "pearson"), (9, "r_squared")):
        frame = published_table(table)
        # "STS_act" or "STS_ICL" is the one word of the quantity that tells the metric.
        metric = frame["quantity"].str.extract(r"STS_(act|ICL)", expand=False).str.lower()
        rows.append(frame.assign(metric=metric).rename(columns={"value": name, "std": f"{name}_std"})
                    [["model", "metric", name, f"{name}_std"]])
    return rows[0].merge(rows[1], on=["model", "metric"], how="outer", validate="one_to_one", sort=False)


def disagreements() -> pd.DataFrame:
    """Where the paper's text and its official code differ: topic, paper, code, why_it_matters."""
    return pd.read_csv(FOLDER / "disagreements.csv")


# --- recomputed from the points -----------------------------------------------------------------------------------

def recomputed_correlations(points: pd.DataFrame | None = None, *, permutations: int = 100_000,
                            resamples: int = 5_000, seed: int = 0) -> pd.DataFrame:
    """Figure 3's correlations from its digitised points, beside the published ones; one row a model and metric.

    Args:
        points: as `figure3_points()`, which is the default; at most eight points a panel are tested exactly.
        permutations, resamples, seed: of the permutation test (more than eight points) and the bootstrap.

    Returns:
        Columns: model, metric, published_pearson, published_std, pearson, low, high (95% bootstrap), p (two-sided
        permutation), p_holm (corrected for the number of panels by Holm's method), exact, spearman,
        published_r_squared, r_squared, slope and intercept (percentage points a unit of STS), n, leave_one_out_low,
        low_without, leave_one_out_high, high_without.
    """
    points = figure3_points() if points is None else points
    published = published_correlations().set_index(["model", "metric"])
    rows = []
    for (model, metric), panel in points.groupby(["model", "metric"], sort=False):
        result = correlate(panel["sts"], panel["abs_shift_pct"], list(panel["domain"]), seed=seed,
                           permutations=permutations, resamples=resamples)
        said, without = published.loc[(model, metric)], result.leave_one_out
        rows.append({
            "model": model, "metric": metric, "published_pearson": said["pearson"],
            "published_std": said["pearson_std"], "pearson": result.pearson, "low": result.pearson_interval.low,
            "high": result.pearson_interval.high, "p": result.p, "exact": result.exact, "spearman": result.spearman,
            "published_r_squared": said["r_squared"], "r_squared": result.r_squared, "slope": result.line.slope,
            "intercept": result.line.intercept, "n": result.n, "leave_one_out_low": without.low,
            "low_without": without.low_without, "leave_one_out_high": without.high,
            "high_without": without.high_without})
    frame = pd.DataFrame(rows)
    frame.insert(frame.columns.get_loc("p") + 1, "p_holm", multipletests(frame["p"], method="holm")[1])
    return frame


def shifts_of(model: str, shifts: pd.DataFrame | None = None) -> pd.DataFrame:
    """One model's rows of `accuracy_shifts()`, largest absolute shift first.

    Raises:
        StsError: a model that is not in the table.
    """
    shifts = accuracy_shifts() if shifts is None else shifts
    if model not in set(shifts["model"]):
        raise one_of("Model", model, shifts["model"].unique())
    return _by_size(shifts[shifts["model"] == model])


def _by_size(shifts: pd.DataFrame) -> pd.DataFrame:
    return shifts.sort_values(["abs_shift_pct", "domain"], ascending=[False, True]).reset_index(drop=True)


def extremes(shifts: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """The `count` domains of largest and the `count` of smallest absolute shift.

    Args:
        shifts: one model's rows with columns domain and abs_shift_pct. Ties go by the domain's name.

    Returns:
        Those rows, largest first, with a column `end`: "largest" or "smallest".

    Raises:
        StsError: more than one row a domain, or fewer than 2 x count of them.
    """
    if shifts["domain"].duplicated().any():
        raise StsError("A domain occurs twice; extremes() takes one model's rows, as shifts_of(model) gives.")
    if count < 1 or 2 * count > len(shifts):
        raise StsError(f"The {count} largest and {count} smallest of {len(shifts)} domains were asked for; "
                       f"1 to {len(shifts) // 2} work.")
    ordered = _by_size(shifts)
    return pd.concat([ordered.head(count).assign(end="largest"), ordered.tail(count).assign(end="smallest")],
                     ignore_index=True)


def figure3_selection(count: int = 4) -> pd.DataFrame:
    """Whether Figure 3 shows the extremes of Tables 2 to 4; model, matches, only_in_figure, only_in_tables."""
    points, rows = figure3_points(), []
    for model in points["model"].unique():
        shown = set(points.loc[points["model"] == model, "domain"])
        expected = set(extremes(shifts_of(model), count)["domain"])
        rows.append({"model": model, "matches": shown == expected,
                     "only_in_figure": ", ".join(sorted(shown - expected)),
                     "only_in_tables": ", ".join(sorted(expected - shown))})
    return pd.DataFrame(rows)


# --- what choosing the extremes does ------------------------------------------------------------------------------

def spread_ratio(values: Sequence[float], count: int = 4) -> float:
    """Standard deviation of the `count` largest and `count` smallest values, over that of all values."""
    ordered = np.sort(np.asarray(values, dtype=float))
    return float(np.r_[ordered[:count], ordered[-count:]].std(ddof=1) / ordered.std(ddof=1))


def with_selection(correlation: float, ratio: float) -> float:
    """The correlation after selecting on y so that y's spread grows by `ratio`.

    Thorndike's formula for selection on one variable, which assumes a linear relation with even noise: the slope and
    the noise stay, only the spread of y changes. `with_selection(r, 1 / ratio)` undoes the selection.
    """
    return correlation * ratio / math.sqrt(1 - correlation ** 2 + (correlation * ratio) ** 2)


def correlations_without_selection(results: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """What each correlation on eight extremes would be on all fourteen domains (calculated, not measured).

    Args:
        results: as `recomputed_correlations()`.

    Returns:
        model, metric, pearson (eight extremes), spread_ratio (of |shift|, extremes over all), all_domains (Thorndike's
        formula undone).
    """
    ratios = {model: spread_ratio(shifts_of(model)["abs_shift_pct"], count) for model in results["model"].unique()}
    frame = results[["model", "metric", "pearson"]].assign(spread_ratio=results["model"].map(ratios))
    frame["all_domains"] = [with_selection(row.pearson, 1 / row.spread_ratio) for row in frame.itertuples()]
    return frame


def selection_effect(correlations: Sequence[float], *, shifts: Sequence[float] | None = None, domains: int = 14,
                     count: int = 4, simulations: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """*Simulated*: Pearson on all domains, on as many random ones, and on the extremes of y.

    Each simulation draws a score x and an absolute shift y for every domain with a known true correlation, then keeps
    the `count` largest and `count` smallest y, as Figure 3 does.

    Args:
        correlations: true correlations to try, each between -1 and 1.
        shifts: absolute shifts to use as y in every simulation (the paper's own, say); None draws y from a normal
            distribution, so that (x, y) is bivariate normal.
        domains: number of domains when `shifts` is None.
        count: how many are kept at either end.
        simulations, seed: of the random draws.

    Returns:
        One row a true correlation: true, all_mean, random_mean, extremes_mean (mean Pearson), extremes_low and
        extremes_high (central 95% of the simulations), formula (`with_selection`), and all_found, random_found,
        extremes_found (share of simulations beyond the two-sided 5% threshold of the t test for that many points).

    Raises:
        StsError: a correlation outside -1 to 1, or too few domains for `count`.
    """
    y_D = None if shifts is None else np.sort(np.asarray(shifts, dtype=float))
    domains = domains if y_D is None else y_D.size
    if count < 2 or 2 * count > domains:
        raise StsError(f"The {count} largest and smallest of {domains} domains were asked for; "
                       f"2 to {domains // 2} work.")
    kept = np.r_[0:count, domains - count:domains]
    generator, rows = np.random.default_rng(seed), []
    for true in correlations:
        if not -1 <= true <= 1:
            raise StsError(f"A true correlation of {true} was asked for; values from -1 to 1 work.")
        noise_SD = generator.standard_normal((simulations, domains))
        if y_D is None:
            y_SD = np.sort(generator.standard_normal((simulations, domains)), axis=1)
        else:
            y_SD = np.tile((y_D - y_D.mean()) / y_D.std(ddof=1), (simulations, 1))
        x_SD = true * y_SD + math.sqrt(1 - true ** 2) * noise_SD
        order_SD = generator.permuted(np.tile(np.arange(domains), (simulations, 1)), axis=1)[:, :kept.size]
        everything = stats.correlation_rows(x_SD, y_SD)
        at_random = stats.correlation_rows(np.take_along_axis(x_SD, order_SD, 1), np.take_along_axis(y_SD, order_SD, 1))
        selected = stats.correlation_rows(x_SD[:, kept], y_SD[:, kept])
        ratio = math.sqrt(y_SD[:, kept].var(axis=1, ddof=1).mean() / y_SD.var(axis=1, ddof=1).mean())
        low, high = np.quantile(selected, [0.025, 0.975])
        rows.append({
            "true": float(true), "all_mean": everything.mean(), "random_mean": at_random.mean(),
            "extremes_mean": selected.mean(), "extremes_low": low, "extremes_high": high,
            "formula": with_selection(true, ratio), "all_found": _found(everything, domains),
            "random_found": _found(at_random, kept.size), "extremes_found": _found(selected, kept.size)})
    return pd.DataFrame(rows)


def _found(correlations: np.ndarray, n: int) -> float:
    t = scipy_stats.t.ppf(0.975, n - 2)
    return float((np.abs(correlations) > t / math.sqrt(n - 2 + t ** 2)).mean())
