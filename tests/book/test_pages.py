"""Sentences, tables and figures say what the numbers say."""

import matplotlib.figure
import pandas
import pytest
import torch

from sts.book import pages, plots


def correlation(r=0.6, low=0.2, high=0.9, p=0.01, **more):
    return {"measure": "bits", "variant": "paper", "score": "sts_act", "n": 14, "pearson": r,
            "pearson_interval": {"low": low, "high": high}, "p": p, "spearman": 0.5, "r_squared": r * r,
            "line": {"slope": 2.0, "intercept": 0.1}, "leave_one_out": {"low": 0.4, "high": 0.7}, **more}


@pytest.mark.parametrize(("values", "verdict"), [
    ({}, "held"),
    ({"p": 0.2}, "not shown"),
    ({"low": -0.1}, "not shown"),
    ({"r": -0.6, "low": -0.9, "high": -0.2}, "reversed"),
    ({"r": -0.6, "low": -0.9, "high": -0.2, "p": 0.3}, "not shown"),
])
def test_the_verdict_follows_its_rule(values, verdict):
    assert pages.correlation_verdict(correlation(**values)) == verdict


def test_an_undefined_correlation_gives_its_reason_and_no_number():
    table = pages.correlation_table([correlation(), {"measure": "accuracy", "variant": "paper", "score": "sts_icl",
                                                     "undefined": "y is constant"}])
    assert table.iloc[1]["verdict"] == "undefined: y is constant"
    assert table.iloc[1]["Pearson r"] == ""
    assert table.iloc[0]["Pearson r"] == "0.60" and table.iloc[0]["verdict"] == "held"


def test_holm_correction_counts_the_rows():
    table = pages.correlation_table([correlation(p=0.01), correlation(p=0.04), correlation(p=0.03)])
    # Holm by hand: 0.01 x 3; 0.03 x 2; then 0.04 x 1, raised to the value before it.
    assert list(table["p, Holm"]) == ["0.030", "0.060", "0.060"]


def test_a_p_value_is_never_printed_as_zero():
    assert pages.p_value(0.00001) == "<0.001"
    assert pages.p_value(0.0234) == "0.023"


def test_tables_escape_their_text():
    page = pages.show_table(pandas.DataFrame({"<b>": ["<script>alert(1)</script>"], "x": [0.123456]}))
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert "0.123<" in page


def test_ranks_of_the_variants_start_at_the_highest_score():
    scores = pandas.DataFrame([
        {"variant": variant, "domain": domain, "sts_act": act, "sts_icl": icl}
        for variant, sign in (("paper", 1), ("official_code", -1))
        for domain, act, icl in (("law", 3 * sign, 1), ("math", 2 * sign, 5))])
    table = pages.variant_table(scores).set_index("domain")
    assert table.loc["math", "rank (STS_ICL, paper)"] == 1
    assert table.loc["law", "rank (STS_act, paper)"] == 1
    assert table.loc["law", "rank (STS_act, official_code)"] == 2


def test_a_changed_setting_stands_in_the_banner(tmp_path):
    import sts

    assert "Changed from the profile: top_n = 9." in pages.banner(sts.open_run("smoke", results=tmp_path, top_n=9))
    assert "Changed" not in pages.banner(sts.open_run("smoke", results=tmp_path, top_n=None))
    assert "Changed" not in pages.banner(sts.open_run("smoke", results=tmp_path, top_n=16))  # the profile's own


def test_a_run_that_learned_nothing_is_called_so(tmp_path):
    import sts

    run = sts.open_run("smoke", results=tmp_path)
    log = {"train": 10, "held_out": 5, "steps": 3, "trained_parameters": 1000, "held_out_before": 2.0}
    assert "hardly learned" in pages.sft_sentence(run, log | {"held_out_after": 1.9})
    assert "hardly learned" not in pages.sft_sentence(run, log | {"held_out_after": 1.5})
    assert "(-25%)" in pages.sft_sentence(run, log | {"held_out_after": 1.5})
    assert "left out" not in pages.sft_sentence(run, log | {"held_out_after": 1.5, "left_out": []})
    assert "1 more was left out" in pages.sft_sentence(run, log | {"held_out_after": 1.5, "left_out": ["long"]})


SHIFTS = pandas.DataFrame([
    {"domain": domain, "measure": "bits", "n": 20, "before": 1.0, "after": 1.0 + shift, "shift": shift,
     "low": shift - 0.1, "high": shift + 0.1, "standard_error": 0.05}
    for domain, shift in (("law", -0.5), ("math", 0.02), ("physics", 0.3))])
SCORES = pandas.DataFrame([{"variant": variant, "domain": domain, "sts_act": act, "sts_icl": act / 2}
                           for variant in ("paper", "official_code")
                           for domain, act in (("law", 2.0), ("math", 0.5), ("physics", 1.5))])


def test_scatter_draws_absolute_shifts_against_scores_hollow_where_zero_is_inside():
    figure = plots.score_scatter(SCORES, SHIFTS, [correlation(), correlation(score="sts_icl")], "bits")
    points = {(round(line.get_xdata()[0], 3), round(line.get_ydata()[0], 3)): line.get_markerfacecolor()
              for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert set(points) == {(2.0, 0.5), (0.5, 0.02), (1.5, 0.3)}
    assert points[(0.5, 0.02)] == "white" and points[(2.0, 0.5)] != "white"
    fitted = [line for line in figure.axes[0].lines if line.get_color() == plots.ORANGE][0]
    assert list(fitted.get_ydata()) == pytest.approx([0.1 + 2 * 0.5, 0.1 + 2 * 2.0])
    assert "r = 0.60, p = 0.010, n = 14" in figure.axes[0].get_title()


def test_domain_shift_figure_keeps_signs():
    figure = plots.domain_shifts(SHIFTS, "bits")
    values = sorted(line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o")
    assert values == [-0.5, 0.02, 0.3]


def test_every_figure_fits_a_phone_and_is_closed():
    import matplotlib.pyplot as plt

    curve = [{"samples": i, "loss": 10 / i, "explained_variance": 1 - 1 / i} for i in range(1, 9)]
    log = {"curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "held_out_before": 2, "held_out_after": 1}
    figures = [plots.training_curve(curve), plots.sft_curve(log), plots.domain_scores(SCORES),
               plots.shift_concentration(torch.linspace(0.1, 1, 10), 3), plots.domain_shifts(SHIFTS, "bits")]
    for figure in figures:
        assert isinstance(figure, matplotlib.figure.Figure)
        assert figure.get_figwidth() <= 7.5
    assert plt.get_fignums() == []
