"""The paper's numbers: complete, consistent with each other, and what recomputing them gives."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure import paper

# MMLU-Pro's own list of categories.
DOMAINS = ("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
           "law", "math", "other", "philosophy", "physics", "psychology")


@pytest.fixture(scope="module")
def results():
    return paper.recomputed_correlations(resamples=300)


# --- the files ---

def test_every_model_has_the_fourteen_domains_of_mmlu_pro():
    shifts = paper.accuracy_shifts()
    assert set(shifts["model"]) == set(paper.MODELS)
    for model in paper.MODELS:
        assert tuple(sorted(shifts.loc[shifts["model"] == model, "domain"])) == DOMAINS


def test_figure_3_has_eight_points_a_panel_whose_shifts_are_those_of_the_tables():
    points = paper.figure3_points()
    assert (points.groupby(["model", "metric"]).size() == 8).all() and len(points) == 48
    both = points.merge(paper.accuracy_shifts(), on=["model", "domain"], suffixes=("_figure", "_table"))
    assert len(both) == 48
    assert both["abs_shift_pct_figure"].to_numpy() == pytest.approx(both["abs_shift_pct_table"].to_numpy())


def test_published_values_are_numbers_or_say_why_not():
    numbers = pd.read_csv(paper.FOLDER / "published_numbers.csv")
    described = numbers[pd.to_numeric(numbers["value"], errors="coerce").isna()]
    assert list(described["source"]) == ["Figure 1b"]
    assert described["value"].str.startswith("falls rapidly").all()


# --- recomputed ---

def test_the_points_give_the_published_correlations(results):
    assert len(results) == 6 and results["exact"].all()
    assert (results["pearson"] - results["published_pearson"]).abs().max() < 0.02


def test_recomputed_statistics_are_scipys(results):
    points = paper.figure3_points()
    for row in results.itertuples():
        panel = points[(points["model"] == row.model) & (points["metric"] == row.metric)]
        line = scipy_stats.linregress(panel["sts"], panel["abs_shift_pct"])
        found = (row.pearson, row.line_slope, row.line_intercept)
        assert found == pytest.approx((line.rvalue, line.slope, line.intercept))
        assert row.spearman == pytest.approx(scipy_stats.spearmanr(panel["sts"], panel["abs_shift_pct"]).statistic)


def test_holm_corrected_p_by_hand(results):
    ordered = results.sort_values("p")
    steps = ordered["p"].to_numpy() * np.arange(6, 0, -1)
    assert ordered["p_holm"].to_numpy() == pytest.approx(np.minimum(np.maximum.accumulate(steps), 1))


def test_without_engineering_gemmas_correlation_is_gone(results):
    gemma = results[results["model"] == "gemma2-9b-it"]
    assert set(gemma["leave_one_out_low_without"]) == {"engineering"}
    assert (gemma["leave_one_out_low"] < 0.1).all() and (gemma["leave_one_out_low"] < gemma["pearson"] - 0.5).all()


# --- extremes ---

def shifts_of(model):
    shifts = paper.accuracy_shifts()
    return shifts[shifts["model"] == model]


def test_figure_3_shows_exactly_the_extremes():
    for model, shown in paper.figure3_points().groupby("model")["domain"].unique().items():
        assert set(shown) == set(paper.extremes(shifts_of(model))["domain"])
        assert set(shown) != set(paper.extremes(shifts_of(model), 3)["domain"])


def test_extremes_by_hand():
    shifts = pd.DataFrame({"domain": list("abcde"), "abs_shift_pct": [1.0, 5.0, 0.0, 3.0, 0.5]})
    chosen = paper.extremes(shifts, 2)
    assert list(chosen["domain"]) == ["b", "d", "e", "c"]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: paper.extremes(shifts_of("gemma2-9b-it"), 8), "1 to 7 work"),
])
def test_impossible_requests_say_what_would_work(call, message):
    with pytest.raises(StsError, match=message):
        call()


# --- selection ---

def test_thorndikes_formula_foresees_what_choosing_the_extremes_does():
    generator, true = np.random.default_rng(9), 0.5
    y = np.sort(generator.standard_normal((8000, 14)), axis=1)
    x = true * y + math.sqrt(1 - true**2) * generator.standard_normal((8000, 14))
    ends = np.r_[0:4, 10:14]
    ratio = math.sqrt(y[:, ends].var(axis=1, ddof=1).mean() / y.var(axis=1, ddof=1).mean())
    found = np.mean([scipy_stats.pearsonr(a, b).statistic for a, b in zip(x[:, ends], y[:, ends], strict=True)])
    assert found > true + 0.05 and found == pytest.approx(paper.with_selection(true, ratio), abs=0.03)


def test_undoing_the_selection_lowers_every_correlation_and_can_be_redone(results):
    assert (results["all_domains"] < results["pearson"]).all() and (results["spread_ratio"] > 1).all()
    for row in results.itertuples():
        assert paper.with_selection(row.all_domains, row.spread_ratio) == pytest.approx(row.pearson)


def test_selection_by_hand():
    # Twice the spread: slope 0.6 and noise variance 0.64 stay, so r = 1.2 / sqrt(0.64 + 1.44).
    assert paper.with_selection(0.6, 2.0) == pytest.approx(1.2 / math.sqrt(2.08))
    assert paper.with_selection(0.6, 1.0) == pytest.approx(0.6)
    assert paper.spread_ratio([1, 2, 3, 4], 2) == pytest.approx(1.0)


def test_disagreements_are_complete():
    frame = pd.read_csv(paper.FOLDER / "disagreements.csv")
    assert len(frame) == 7 and (frame.map(len) > 0).all().all()

