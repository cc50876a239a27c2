"""The paper's own numbers (`data/paper/`, whose README says where each file comes from), and statistics recomputed from
its published points: those of eight extreme domains, chosen from fourteen."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from sts.errors import ROOT, StsError
from sts.measure.correlation import correlate

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
