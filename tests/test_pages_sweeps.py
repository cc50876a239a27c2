"""Verdicts of the chapter on ablations follow their rules, and its figures show every value."""

import pytest

from sts import pages_sweeps, plots_sweeps


def less(low, high):
    return {"mean": (low + high) / 2, "interval": {"low": low, "high": high}, "p": 0.5}


@pytest.mark.parametrize(("low", "high", "verdict", "claim"), [
    (0.1, 0.9, "better", "reversed"), (-0.9, -0.1, "worse", "held"), (-0.1, 0.9, "not told apart", "not shown"),
    (0.0, 0.9, "not told apart", "not shown"), (-0.9, 0.0, "not told apart", "not shown")])
def test_a_value_differs_only_with_its_whole_interval(low, high, verdict, claim):
    assert pages_sweeps.value_verdict(less(low, high)) == verdict
    # The paper's claims say that the last value predicts worse than the first.
    assert pages_sweeps.ends_verdict(less(low, high)) == claim


def test_no_interval_is_no_verdict():
    assert pages_sweeps.value_verdict(None) == pages_sweeps.ends_verdict({"mean": 0.1, "interval": None}) == "undefined"


def correlation(low, p):
    return {"pearson": 0.5, "pearson_interval": {"low": low, "high": 0.9}, "p": p}


def test_all_layers_predict_only_if_every_layer_does():
    good = correlation(0.1, 0.01)
    assert pages_sweeps.layers_verdict([good, good]) == "held"
    assert pages_sweeps.layers_verdict([good, correlation(-0.1, 0.01)]) == "not shown"
    assert pages_sweeps.layers_verdict([good, correlation(0.1, 0.2)]) == "not shown"
    assert pages_sweeps.layers_verdict([good, {"undefined": "constant"}]) == "undefined"


@pytest.mark.parametrize(("p", "verdict"), [(0.05, "more than chance"), (0.051, "no more than chance")])
def test_the_best_is_judged_by_shuffled_domains(p, verdict):
    assert pages_sweeps.best_verdict({"p": p}) == verdict


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
