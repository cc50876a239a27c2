"""Verdicts of the chapter on ablations follow their rules, and its figures show every value."""

import json
from types import SimpleNamespace

import pandas
import pytest

from sts.book import pages_sweeps, plots_sweeps, tables_sweeps, verdicts_sweeps


def less(low, high, p=0.01, axis="bands"):
    return {"mean": (low + high) / 2, "interval": {"low": low, "high": high}, "p": p, "axis": axis}


@pytest.mark.parametrize(("low", "high", "verdict", "claim"), [
    (0.1, 0.9, "better", "reversed"), (-0.9, -0.1, "worse", "held"), (-0.1, 0.9, "not told apart", "not shown"),
    (0.0, 0.9, "not told apart", "not shown"), (-0.9, 0.0, "not told apart", "not shown"),
    (0.0, 0.0, "the same", "not shown"), (-0.0002, 0.0009, "the same", "not shown"),
    (0.0002, 0.0008, "the same", "not shown"), (0.0002, 0.0012, "better", "reversed"),
    (-0.0012, -0.0002, "worse", "held")])
def test_a_value_differs_only_with_its_whole_interval(low, high, verdict, claim):
    assert verdicts_sweeps.value_verdict(less(low, high)) == verdict
    # The paper's claims say that the last value predicts worse than the first.
    assert verdicts_sweeps.ends_verdict(less(low, high)) == claim


@pytest.mark.parametrize(("low", "high", "verdict"), [(-0.9, -0.1, "held"), (0.1, 0.9, "reversed")])
def test_a_claim_takes_a_small_p_beside_the_interval(low, high, verdict):
    assert verdicts_sweeps.ends_verdict(less(low, high, p=0.049)) == verdict
    assert verdicts_sweeps.ends_verdict(less(low, high, p=0.05)) == "not shown"
    assert verdicts_sweeps.ends_verdict(less(low, high, p=0.9, axis="k")) == "not shown"


@pytest.mark.parametrize("axis", ["width", "k"])
def test_of_saes_a_claim_is_judged_for_those_alone_that_were_trained(axis):
    said = [verdicts_sweeps.ends_verdict(less(*ends, axis=axis)) for ends in ((-0.9, -0.1), (0.1, 0.9), (-0.1, 0.1))]
    assert said == ["held for these SAEs, one a value", "reversed for these SAEs, one a value", "not shown"]


def test_no_interval_is_no_verdict():
    assert verdicts_sweeps.value_verdict(None) == "undefined"
    assert verdicts_sweeps.ends_verdict({"mean": 0.1, "interval": None, "p": 0.01, "axis": "k"}) == "undefined"


def correlation(low, p):
    return {"pearson": 0.5, "pearson_interval": {"low": low, "high": 0.9}, "p": p}


def test_all_layers_predict_only_if_every_layer_does():
    good = correlation(0.1, 0.01)
    assert verdicts_sweeps.layers_verdict([good, good]) == "held for these SAEs, one a value"
    assert verdicts_sweeps.layers_verdict([good, correlation(-0.1, 0.01)]) == "not shown"
    assert verdicts_sweeps.layers_verdict([good, correlation(0.1, 0.2)]) == "not shown"
    assert verdicts_sweeps.layers_verdict([good, {"undefined": "constant"}]) == "undefined"


@pytest.mark.parametrize(("p", "verdict"), [(0.05, "more than chance"), (0.051, "no more than chance")])
def test_the_best_is_judged_by_shuffled_domains(p, verdict):
    assert verdicts_sweeps.best_verdict({"p": p}) == verdict


# --- sentences and tables -----------------------------------------------------------------------------------------

ROW = {"measure": "bits", "n": 14, "seeds": 1}


def value(axis, name, score="sts_act", *, measure="bits", own=False, low=0.5, p=0.001, less=None, p_holm=1.0):
    found = {**ROW, "measure": measure, "axis": axis, "value": name, "score": score, "own": own, "by_seed": [0.6],
             "pearson": 0.6, "pearson_interval": {"low": low, "high": 0.9}, "p": p}
    return found if own else found | {"less": {"mean": sum(less) / 2, "p": 0.5, "p_holm": p_holm, "interval": {
        "low": less[0], "high": less[1]}}}


@pytest.fixture
def opened(tmp_path):
    """A run that learned, with given rows of stage `sweep_correlations`."""
    (tmp_path / "training.json").write_text(json.dumps({"held_out": 9, "held_out_before": 1, "held_out_after": 0.5}))

    def run(**rows):
        found = {"values": [], "claims": [], "best": [], "saes": []} | rows
        stages = {"sweep_correlations": found, "sft": tmp_path, "sweep_saes": pandas.DataFrame()}
        stages["sweep_saes"] = found.pop("sweep_saes", stages["sweep_saes"])
        settings = SimpleNamespace(seed=0, sae="mine", sae_latents=64, sae_k=8, layer=3)
        return SimpleNamespace(get=stages.__getitem__, settings=settings, other_seeds=(), sae_folder=tmp_path / "sae")

    return run


@pytest.mark.parametrize("weak", [0, 1, 2])
def test_one_weak_layer_wherever_it_stands_is_enough_against_the_claim(opened, weak):
    """The table and the sentence; the weak layer is not named among those where the claim held."""
    lows = [0.2, 0.3, 0.4]
    lows[weak] = -0.1
    layers = ["7", "14", "22"]
    run = opened(values=[value("layer", name, own=name == "22", low=low, less=(-0.1, 0.1))
                         for name, low in zip(layers, lows, strict=True)]
                 + [value("layer", name, "sts_icl", own=name == "22", less=(-0.1, 0.1)) for name in layers])
    act, icl = tables_sweeps.claims_table(run).to_dict("records")
    held = [name for name in layers if name != layers[weak]]
    assert (act["verdict"], act["compared"]) == ("not shown", f"held at 2 of 3: {', '.join(held)}")
    assert (icl["verdict"], icl["compared"]) == ("held for these SAEs, one a value", "held at 3 of 3: 7, 14, 22")
    said = pages_sweeps.claims_sentence(run, "bits")
    assert "STS_act **not shown**, STS_ICL **held for these SAEs, one a value**." in said


@pytest.mark.parametrize(("k", "alike"), [(8, "; two SAEs of one shape, trained apart, differ by +0.23"), (16, "")])
def test_a_claim_on_saes_stands_beside_what_another_training_of_one_shape_changes(opened, tmp_path, k, alike):
    """The run's own SAE has k = 8 as the sweep's middle one has, or has not; r does not fall all the way."""
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "training.json").write_text(json.dumps({"settings": {"d_sae": 64, "k": k, "layer": 3}}))
    rs = {"4": 0.91, "8": 0.79, "32": 0.84}
    values = [value("k", name, score, own=name == "8", less=(-0.1, 0.1)) | {"pearson": r}
              for name, r in rs.items() for score in ("sts_act", "sts_icl")]
    claims = [{"measure": "bits", "score": score, "first": "4", "last": "32", **less(-0.17, -0.01, p, "k")}
              for score, p in (("sts_act", 0.06), ("sts_icl", 0.017))]
    saes = [{"measure": "bits", "score": score, "own": 0.6, "middle": 0.83, **less(mean, mean)}
            for score, mean in (("sts_act", -0.4), ("sts_icl", 0.23))]
    run = opened(values=values, claims=claims, saes=saes, sweep_saes=pandas.DataFrame({"axis": ["k"]}))
    assert pages_sweeps.claims_sentence(run, "bits") == (
        "*A less sparse SAE predicts worse* (Figure 4c, Table 12): STS_act **not shown**, STS_ICL **held for these "
        f"SAEs, one a value** (-0.09, p 0.017; r in turn 0.91, 0.79, 0.84{alike}).")
    table = tables_sweeps.claims_table(run)
    assert list(table[tables_sweeps.ALIKE]) == (["-0.40", "+0.23"] if alike else ["", ""])
    assert table.columns[-1] == "verdict"


def test_values_that_give_the_same_score_are_counted_apart_and_named(opened):
    run = opened(values=[
        value("demonstrations", "1", less=(0, 0)), value("demonstrations", "3", less=(0, 0)),
        value("demonstrations", "5", own=True), value("layer", "7", less=(-0.5, -0.1), p_holm=0.04),
        value("layer", "14", less=(-0.1, 0.1)), value("layer", "22", own=True),
        value("demonstrations", "1", "sts_icl", less=(0.1, 0.3))])
    said = pages_sweeps.difference_sentence(run, "bits")
    assert ("STS_act: 0 of 2 other values better, 1 worse, 1 not told apart (2 more values left out, the same by "
            "definition or in fact: *demonstrations, domain (m)* 1, 3); STS_ICL: 1 of 1 other values better") in said
    assert ("Of 3 comparisons of scores that differ, nominally about 0 would leave zero out by chance if none "
            "mattered; but bootstrap intervals at n = 14 need not cover at their level, and all") in said
    assert ("Settings that matter by the rule: *layer*, *demonstrations, domain (m)*; left after Holm's correction, at "
            "the 5% level: layer 7 (STS_act, -0.30).") in said


def test_each_missing_axis_is_named_with_its_own_setting(opened):
    run = opened(values=[value("width", "64", less=(-0.1, 0.1)), value("width", "128", own=True),
                         value("masks", "none", less=(-0.1, 0.1)), value("score_tokens", "9", own=True)])
    said = pages_sweeps.missing_sentence(run)
    named = {name for name in ("sweep_widths", "sweep_layers", "sweep_k", "sweep_masks", "sweep_tokens",
                               "sweep_shift_tokens", "sweep_demonstrations", "sweep_shift_demonstrations")
             if f"`{name}`" in said}
    # Tokens a domain has its own value alone, which is no sweep.
    assert named == {"sweep_layers", "sweep_k", "sweep_tokens", "sweep_shift_tokens", "sweep_demonstrations",
                     "sweep_shift_demonstrations"}


def best(axis, name, less_own):
    return {"measure": "bits", "score": "sts_icl", "axis": axis, "value": name, "pearson": 0.91, "scores": 3,
            "chance_mean": 0.3, "chance_high": 0.66, "single_high": 0.46, "p": 0.001, "less_own": less_own}


def test_the_best_is_set_beside_the_runs_own_and_a_swept_sae_beside_the_middle_one(opened):
    values = [value("k", "8", "sts_icl", less=(0.02, 0.12)), value("layer", "7", "sts_icl", less=(-0.2, 0.1))]
    said = pages_sweeps.best_sentence(opened(values=values, best=[best("k", "8", less(0.1, 0.52))]), "bits")
    assert "r = 0.91, +0.31 (0.10 to 0.52) beside the run's own and +0.07 (0.02 to 0.12) beside the sweep's" in said
    assert "**more than chance**" in said and "picked is too high" in said
    other = pages_sweeps.best_sentence(opened(values=[value("bands", "1-9", "sts_icl", own=True)],
                                              best=[best("bands", "1-9", None)]), "bits")
    assert "r = 0.91; with shuffled domains" in other
    table = tables_sweeps.best_table(opened(values=values, best=[best("k", "8", less(0.1, 0.52))]))
    assert table["less the run's own"].tolist() == ["+0.31 (0.10 to 0.52)"]


def test_the_two_saes_are_compared_beside_the_ablations(opened):
    """Two of the three other values change r by more than the SAE does; the size of the change counts, not its sign."""
    values = [value("k", "8", less=(0.1, 0.3)), value("layer", "7", less=(-0.7, -0.5)),
              value("top_n", "9", less=(0.4, 0.6)), value("top_n", "99", "sts_icl", less=(0.8, 0.9))]
    run = opened(values=values, saes=[{"measure": "bits", "score": "sts_act", "own": 0.6, "middle": 0.84,
                                       **less(0.02, 0.46), "p": 0.01}])
    said = pages_sweeps.sae_difference(run, "bits")
    assert ("STS_act: r = 0.60 with the run's own SAE, 0.84 with the sweep's middle one, a difference of +0.24 (0.02 "
            "to 0.46; p = 0.010), **better**; 2 of 3 ablations change r by more.") in said
    assert pages_sweeps.sae_difference(opened(values=values), "bits") == ""
    assert pages_sweeps.sae_sentence(run, "bits") == ""  # no sweep of SAEs


def test_a_measure_that_was_not_evaluated_is_said_so(opened):
    said = pages_sweeps.told_of(opened(values=[value("layer", "7", own=True)]), "bits_answer")
    assert said == "Bits per answer was not evaluated in this run; see the setting `eval_kinds`."


# --- figures ------------------------------------------------------------------------------------------------------

def line(score, value, own, r, low=None, high=None):
    return {"score": score, "value": value, "own": own, "r": r, "low": low, "high": high}


def test_every_value_stands_in_its_panel_with_the_own_one_filled():
    rows = [line("sts_act", "8", False, 0.4, 0.1, 0.7), line("sts_icl", "8", False, -0.2, -0.5, 0.3),
            line("sts_act", "32", True, 0.6, 0.3, 0.8), line("sts_icl", "32", True, 0.1)]
    none = [row | {"r": None, "low": None, "high": None} for row in rows]
    figure = plots_sweeps.sweeps({"k (Figure 4c)": rows, "layer": none, "masks": rows}, needed=0.53)
    first, second, third, fourth = figure.axes
    assert first.get_title() == "k (Figure 4c)" and not fourth.get_visible()
    assert [label.get_text() for label in first.get_xticklabels()] == ["8", "32"]
    points = [item for item in first.lines if len(item.get_xdata()) == 1]
    assert sorted(point.get_ydata()[0] for point in points) == [-0.2, 0.1, 0.4, 0.6]
    assert {point.get_ydata()[0]: point.get_markerfacecolor() == "white" for point in points} == {
        0.4: True, -0.2: True, 0.6: False, 0.1: False}
    assert all(round(point.get_xdata()[0]) == (1 if point.get_ydata()[0] in (0.6, 0.1) else 0) for point in points)
    bars = {tuple(item.get_ydata()) for item in first.lines if len(set(item.get_xdata())) == 1}
    assert {(0.1, 0.7), (-0.5, 0.3), (0.3, 0.8)} <= bars
    assert [text.get_text() for text in second.texts] == ["undefined"] and third.get_visible()
    assert figure.get_size_inches()[0] <= 7
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "r = 0.53" in labels[-1]


def test_differences_stand_under_their_setting_and_clear_ones_are_filled():
    def difference(group, value, score, mean, low, high, verdict):
        return {"group": group, "value": value, "score": score, "mean": mean, "low": low, "high": high,
                "verdict": verdict}

    rows = [difference("layer", "7", "sts_act", -0.3, -0.5, -0.1, "worse"),
            difference("layer", "7", "sts_icl", 0.0, -0.2, 0.2, "not told apart"),
            difference("layer", "26", "sts_act", None, None, None, "undefined"),
            difference("masks", "7", "sts_act", 0.2, 0.1, 0.3, "better")]
    figure = plots_sweeps.differences(rows)
    axis, = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["7", "26", "7"]
    places = list(axis.get_yticks())
    assert places == sorted(places) and places[2] - places[1] > places[1] - places[0]
    points = {item.get_xdata()[0]: item for item in axis.lines if len(item.get_xdata()) == 1}
    assert {mean: item.get_markerfacecolor() == "white" for mean, item in points.items()} == {
        -0.3: False, 0.0: True, 0.2: False}
    assert abs(points[0.2].get_ydata()[0] - places[2]) < 0.5
    headings = {text.get_text(): text.xy[1] for text in axis.texts}
    assert headings["layer"] < places[0] < places[1] < headings["masks"] < places[2]
    assert axis.get_ylim()[0] > axis.get_ylim()[1] and figure.get_size_inches()[0] <= 7
