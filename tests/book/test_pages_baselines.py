"""Verdicts of the chapter on baselines follow their rules, and its figure shows every line."""

import pytest

from sts.book import pages_baselines, plots_baselines


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 0.9, "better"), (-0.9, -0.1, "worse"),
                                                      (-0.1, 0.9, "not told apart"), (0.0, 0.9, "not told apart")])
def test_the_score_is_better_only_with_its_whole_interval(low, high, verdict):
    assert pages_baselines.comparison_verdict({"mean": 0.3, "interval": {"low": low, "high": high}}) == verdict


def test_no_interval_is_no_verdict():
    assert pages_baselines.comparison_verdict({"mean": 0.3, "interval": None}) == "undefined"


@pytest.mark.parametrize(("rate", "energy", "verdict"), [(0.05, 0.01, "held"), (0.06, 0.01, "not shown"),
                                                         (0.01, 0.3, "not shown")])
def test_the_choice_of_latents_must_beat_both_kinds_of_matched_sets(rate, energy, verdict):
    known = {"observed": 0.5, "matched": 0.95, "chosen": 1.0, "shared": 0.5}
    rows = [{"null": "uniform", "p": 0.9}, {"null": "rate", "p": rate, **known},
            {"null": "energy", "p": energy, **known}]
    assert pages_baselines.choice_verdict(rows) == verdict
    below = [row | ({"observed": -0.3} if row["null"] == "rate" else {}) for row in rows]
    assert pages_baselines.choice_verdict(below) == "not shown"
    for kind in (1, 2):  # sets that are not alike are no control
        apart = [row | ({"matched": 0.6} if place == kind else {}) for place, row in enumerate(rows)]
        reason = ", as sets of one kind do not match" if verdict == "held" else ""  # else the sets themselves decide
        assert pages_baselines.choice_verdict(apart) == f"not shown{reason}"
        alike = [row | ({"shared": 0.51} if place == kind else {}) for place, row in enumerate(rows)]
        reason = ", as the sets of one kind are nearly the same" if verdict == "held" else ""
        assert pages_baselines.choice_verdict(alike) == f"not shown{reason}"
    rows[1] = {"null": "rate", "undefined": "no correlation is defined"}
    assert pages_baselines.choice_verdict(rows) == "undefined"


def test_rivals_are_forecasts_and_those_that_tell_the_other_way_are_named(monkeypatch):
    def row(r, low, high):
        return {"n": 14, "pearson": r, "pearson_interval": {"low": low, "high": high}, "p": 0.01,
                "less": {score: {"mean": 0.6 - r, "interval": {"low": 0.5 - r, "high": 0.7 - r}}
                         for score in ("sts_act", "sts_icl")}}

    found = {"sts_act": row(0.6, 0.5, 0.7), "sts_icl": row(0.6, 0.5, 0.7), "tfidf": row(0.2, -0.1, 0.5),
             "raw_act": row(-0.8, -0.9, -0.6), "base_bits": row(0.65, 0.5, 0.8), "actual_act": row(0.99, 0.9, 1.0)}
    monkeypatch.setattr(pages_baselines, "correlations_of", lambda run, measure: found)
    monkeypatch.setattr(pages_baselines, "_judged", lambda run, verdict: verdict)
    said = pages_baselines.comparison_sentence(None, "bits")
    assert "Against the 3 other forecasts" in said and "in 2 times 3 comparisons that are not corrected" in said
    assert "STS_act is better than 2 of 3, worse than 0, and not told apart from 1" in said
    assert "Among those beaten, *STS_act, raw dimensions* (-0.80) goes along with the change the other way" in said
    assert "has *bits per character before*, r = 0.65" in said  # and not what only the tuned model knows


def test_a_probe_is_judged_by_shuffled_targets():
    assert pages_baselines.probe_verdict({"p": 0.05}) == "held"
    assert pages_baselines.probe_verdict({"p": 0.051}) == "not shown"


@pytest.mark.parametrize(("low", "p", "verdict"), [(0.1, 0.01, "held"), (0.1, 0.2, "not shown"),
                                                   (-0.1, 0.01, "not shown")])
def test_the_partial_correlation_needs_interval_and_p(low, p, verdict):
    row = {"pearson": 0.5, "pearson_interval": {"low": low, "high": 0.9}, "p": p}
    assert pages_baselines.confound_verdict(row) == verdict


def test_a_clearly_negative_partial_correlation_is_not_held_and_none_is_undefined():
    row = {"pearson": -0.6, "pearson_interval": {"low": -0.9, "high": -0.2}, "p": 0.01}
    assert pages_baselines.confound_verdict(row) == "not shown"
    assert pages_baselines.confound_verdict({"undefined": "too few domains"}) == "undefined"


def line(label, group, kind, r, low=None, high=None):
    return {"label": label, "group": group, "kind": kind, "r": r, "low": low, "high": high}


def test_the_forest_plot_shows_every_line_where_it_belongs():
    rows = [line("STS_act", "the score", "forecast", 0.4, 0.1, 0.7),
            line("TF-IDF", "texts", "forecast", -0.2, -0.5, 0.3),
            line("random", "texts", "random", 0.1, -0.3, 0.5), line("probe", "probes", "probe", -0.5, -1.0, 0.4)]
    other = [row | {"r": None, "low": None, "high": None} for row in rows]
    figure = plots_baselines.forest({"bits": rows, "accuracy": other}, needed=0.53)
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["STS_act", "TF-IDF", "random", "probe"]
    heights = list(first.get_yticks())
    assert heights == sorted(heights) and heights[1] - heights[0] > heights[2] - heights[1]  # a gap between groups
    drawn = [tuple(item.get_xydata()[0]) for item in first.lines if len(item.get_xydata()) == 1]
    assert drawn == [(row["r"], height) for row, height in zip(rows, heights, strict=True)]
    bars = {tuple(item.get_xdata()) for item in first.lines if len(item.get_xydata()) == 2}
    assert {(row["low"], row["high"]) for row in rows} <= bars
    assert [text.get_text() for text in second.texts] == ["undefined"] * 4
    assert figure.get_size_inches()[0] <= 7 and first.get_ylim()[0] > first.get_ylim()[1]  # first line on top
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 4 and "r = 0.53" in labels[-1] and not any("tuned" in label for label in labels)
