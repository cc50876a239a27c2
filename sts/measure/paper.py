"""The paper's own numbers (`data/paper/`, whose README says where each file comes from), statistics recomputed from its
published points, and what choosing the eight most extreme of fourteen domains does to a correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from sts.errors import ROOT, StsError
from sts.measure.correlation import correlate, correlation_rows, needed_correlation, random_orders

FOLDER = ROOT / "data" / "paper"
#: The paper's models, in its order, and how they are written in text.
MODELS = {"llama3-8b-instruct": "Llama3-8B-Instruct", "qwen2.5-7b-instruct": "Qwen2.5-7B-Instruct",
          "gemma2-9b-it": "Gemma2-9B-Instruct"}
#: The two scores of a domain.
METRICS = {"act": "STS_act", "icl": "STS_ICL"}


def accuracy_shifts() -> pd.DataFrame:
    """Tables 2 to 4, change of MMLU-Pro accuracy by fine-tuning on LIMO, 14 domains for each of 3 models: source,
    model, train_data, domain, shift_pct (percentage points, after minus before), abs_shift_pct."""
    frame = pd.read_csv(FOLDER / "accuracy_shift_by_domain.csv")
    return frame.assign(abs_shift_pct=frame["shift_pct"].abs())


def figure3_points() -> pd.DataFrame:
    """Figure 3's points: model, metric ("act" or "icl"), domain, sts (digitised), abs_shift_pct (percentage points)."""
    return pd.read_csv(FOLDER / "figure3_points_digitised.csv")


def disagreements() -> pd.DataFrame:
    """Where the paper's text and its official code differ: topic, paper, code, why_it_matters."""
    return pd.read_csv(FOLDER / "disagreements.csv")


def recomputed_correlations(*, permutations: int = 100_000, resamples: int = 5_000, seed: int = 0) -> pd.DataFrame:
    """Figure 3's correlations from its digitised points, beside the published ones; one row a model and metric.

    Columns: model, metric, published_pearson, published_std (Table 6, act before icl); what `correlate` returns, dicts
    spread out (line_slope, leave_one_out_low, ...), the bootstrap interval as low and high; p_holm (Holm's correction
    for all panels); spread_ratio (of |shift|, extremes over all), all_domains (r on all fourteen: calculated).
    """
    numbers = pd.read_csv(FOLDER / "published_numbers.csv")
    numbers["metric"] = numbers["quantity"].str.extract(r"STS_(act|ICL)", expand=False).str.lower()
    published = numbers.sort_values("metric", kind="stable").loc[numbers["source"].str.contains(r"Table 6\b")]
    points, rows = figure3_points().set_index(["model", "metric"]).sort_index(), []
    shifts = accuracy_shifts().set_index("model")["abs_shift_pct"]
    for said in published.to_dict("records"):
        panel, ratio = points.loc[(said["model"], said["metric"])], spread_ratio(np.asarray(shifts[said["model"]]))
        found = correlate(panel["sts"], panel["abs_shift_pct"], list(panel["domain"]), seed=seed,
                          permutations=permutations, resamples=resamples)
        rows.append({"model": said["model"], "metric": said["metric"], "published_pearson": float(said["value"]),
                     "published_std": said["std"], **found, "spread_ratio": ratio,
                     "all_domains": with_selection(found["pearson"], 1 / ratio)})
    frame = pd.json_normalize(rows, sep="_").rename(
        columns={"pearson_interval_low": "low", "pearson_interval_high": "high"})
    return frame.assign(p_holm=multipletests(frame["p"], method="holm")[1])


def extremes(shifts: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """Of one model's rows (domain, abs_shift_pct), those of the `count` domains of largest and the `count` of smallest
    absolute shift, largest first; ties go by the domain's name. `StsError` for fewer than 2 x count domains."""
    if 2 * count > len(shifts):
        raise StsError(f"The {count} largest and {count} smallest of {len(shifts)} domains were asked for; "
                       f"1 to {len(shifts) // 2} work.")
    ordered = shifts.sort_values(["abs_shift_pct", "domain"], ascending=[False, True])
    return pd.concat([ordered.head(count), ordered.tail(count)])


def spread_ratio(values: ArrayLike, count: int = 4) -> float:
    """Standard deviation of the `count` largest and `count` smallest values, over that of all values."""
    ordered = np.sort(np.asarray(values, dtype=float))
    return float(np.r_[ordered[:count], ordered[-count:]].std(ddof=1) / ordered.std(ddof=1))


def with_selection(correlation: float, ratio: float) -> float:
    """The correlation after selecting on y so that y's spread grows by `ratio`; `1 / ratio` undoes the selection.
    Thorndike's formula assumes a linear relation with even noise: only the spread of y changes."""
    return correlation * ratio / math.sqrt(1 - correlation ** 2 + (correlation * ratio) ** 2)


def selection_effect(correlations: Sequence[float], *, domains: int = 14, count: int = 4, simulations: int = 10_000,
                     seed: int = 0) -> pd.DataFrame:
    """*Simulated*: Pearson on all domains, on as many random ones, and on the `count` largest and smallest y, where a
    score x and an absolute shift y are bivariate normal with a known true correlation, from -1 to 1.

    One row a true correlation: true, all_mean, random_mean, extremes_mean (mean Pearson), extremes_low and
    extremes_high (central 95% of the simulations), formula (`with_selection`), and all_found, random_found,
    extremes_found (share of simulations beyond the two-sided 5% threshold of the t test for that many points).
    """
    if count < 2 or 2 * count > domains:
        raise StsError(f"The {count} largest and smallest of {domains} domains were asked for; "
                       f"2 to {domains // 2} work.")
    kept = np.r_[0:count, domains - count:domains]
    generator, rows = np.random.default_rng(seed), []
    for true in correlations:
        noise_SD = generator.standard_normal((simulations, domains))
        y_SD = np.sort(generator.standard_normal((simulations, domains)), axis=1)
        x_SD = true * y_SD + math.sqrt(1 - true ** 2) * noise_SD
        order_SD = random_orders(domains, simulations, generator)[:, :kept.size]
        found = {"all": correlation_rows(x_SD, y_SD), "extremes": correlation_rows(x_SD[:, kept], y_SD[:, kept]),
                 "random": correlation_rows(*(np.take_along_axis(own, order_SD, 1) for own in (x_SD, y_SD)))}
        ratio = math.sqrt(y_SD[:, kept].var(axis=1, ddof=1).mean() / y_SD.var(axis=1, ddof=1).mean())
        low, high = np.quantile(found["extremes"], [0.025, 0.975])
        beyond = {name: np.abs(own) > needed_correlation(domains if name == "all" else kept.size)
                  for name, own in found.items()}
        rows.append({"true": float(true), "extremes_low": low, "extremes_high": high,
                     "formula": with_selection(true, ratio)}
                    | {f"{name}_mean": own.mean() for name, own in found.items()}
                    | {f"{name}_found": own.mean() for name, own in beyond.items()})
    return pd.DataFrame(rows)
