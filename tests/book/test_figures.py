"""The five figures draw the numbers they are given, fit a phone, and say by shape what they say by colour."""

import runpy

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest

from sts.book import figures
from sts.errors import ROOT

ROWS = [
    {"domain": "law", "value": 0.2, "r": {"low": 0.1, "high": 0.3}, "measure": "bits", "score": "act"},
    {"domain": "math", "value": -0.1, "r": {"low": -0.3, "high": 0.1}, "measure": "bits", "score": "act"},
    {"domain": "law", "value": 0.4, "r": None, "measure": "accuracy", "score": "act"},
    {"domain": "math", "value": None, "r": None, "measure": "accuracy", "score": "icl"},
]


def points(axis):
    return [(tuple(map(float, line.get_xydata()[0])), line) for line in axis.lines if len(line.get_xydata()) == 1]


def hollow(line):
    return line.get_markerfacecolor() == "white"


def test_more_hues_than_colours_take_them_again():
    rows = [{"label": "law", "value": float(place), "hue": str(place)} for place in range(9)]
    for drawn in (figures.intervals(rows, hue="hue"), figures.bars(rows, hue="hue")):
        assert len(drawn.legends[0].texts) == 9


def test_intervals_stand_at_their_labels_and_are_hollow_where_zero_is_inside():
    figure = figures.intervals(
        ROWS,
        y="domain",
        x="value",
        low="r.low",
        high="r.high",
        panel="measure",
        names={"bits": "bits per character"},
        xlabel="change",
    )
    bits, accuracy = figure.axes
    assert [text.get_text() for text in bits.get_yticklabels()] == ["law", "math"] and bits.get_ylim()[
        0
    ] > bits.get_ylim()[1]
    drawn = points(bits)
    assert [place for place, _ in drawn] == [(0.2, 0.0), (-0.1, 1.0)]
    assert [hollow(line) for _, line in drawn] == [False, True]
    bars = {tuple(map(float, line.get_xdata())) for line in bits.lines if len(line.get_xdata()) == 2}
    assert {(0.1, 0.3), (-0.3, 0.1), (0, 0)} == bars
    [(place, line)] = points(accuracy)  # None is left out; without an interval a point is hollow
    assert place == (0.4, 0.0) and hollow(line)
    assert (bits.get_title(), bits.get_xlabel(), accuracy.get_title()) == ("bits per character", "change", "accuracy")


def test_values_of_a_hue_stand_beside_each_other_with_markers_of_their_own():
    figure = figures.intervals(
        ROWS[:2] + [ROWS[0] | {"score": "icl", "value": 0.5}], y="domain", x="value", hue="score"
    )
    drawn = points(figure.axes[0])
    assert len({line.get_marker() for _, line in drawn}) == 2
    assert abs(drawn[0][0][1] - drawn[2][0][1]) > 0.2
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["act", "icl"]


def test_a_scatter_marks_every_domain_alike_and_fits_a_line():
    rows = pandas.DataFrame(
        {
            "domain": ["law", "math", "physics"] * 2,
            "score": [1.0, 2, 3, 1, 2, 3],
            "change": [2.0, 4, 6, 1, 1, 1],
            "filled": [True, False, True] * 2,
            "which": ["a"] * 3 + ["b"] * 3,
        }
    )
    first, second = figures.scatter(rows, panel="which", filled="filled").axes
    styles = {(line.get_color(), line.get_marker()) for axis in (first, second) for _, line in points(axis)}
    assert len(styles) == 1
    assert [hollow(line) for _, line in points(first)] == [False, True, False]
    assert [text.get_text() for text in first.texts] == ["law", "math", "physics"]
    [line] = [line for line in first.lines if line.get_linestyle() == "--"]
    ends = line.get_xydata()[[0, -1]]
    assert ends.tolist() == [[1, pytest.approx(2)], [3, pytest.approx(6)]]
    plain = figures.scatter(rows, fit=False).axes[0]
    assert not [line for line in plain.lines if line.get_linestyle() == "--"]
    assert not any(hollow(line) for _, line in points(plain))


def test_curves_draw_their_band_and_can_be_told_apart():
    x, y = np.arange(1, 4), np.array([0.1, 0.5, 1.0])
    [axis] = figures.curves({"held out": (x, y, y - 0.1, y + 0.1), "all": (x, y)}, logx=True, marks={"N = 2": 2}).axes
    lines = {one.get_label(): one for one in axis.lines}
    assert list(lines["held out"].get_ydata()) == list(y) and len(axis.collections) == 1
    assert axis.get_xscale() == "log" and list(lines["N = 2"].get_xdata()) == [2, 2]
    assert len({one.get_linestyle() for one in axis.lines}) == len({one.get_color() for one in axis.lines}) == 3


def test_heat_writes_every_number_and_bars_their_lengths():
    frame = pandas.DataFrame([[0.1, -0.5], [0.25, 1.0]], index=["code", "law"], columns=["math", "physics"])
    axis = figures.heat(frame, centre=0).axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.10", "-0.50", "0.25", "1.00"]
    rows = [
        {"label": "forecast", "value": 3.0, "unit": "s"},
        {"label": "training", "value": 30.0, "unit": "s"},
        {"label": "training", "value": 20.0, "unit": "passes"},
    ]
    axis = figures.bars(rows, hue="unit", form=".0f").axes[0]
    assert [patch.get_width() for patch in axis.patches] == [3, 30, 20]
    assert [text.get_text() for text in axis.texts] == ["3", "30", "20"]
    assert (
        axis.patches[1].get_y() < axis.patches[2].get_y() and axis.patches[1].get_hatch() != axis.patches[2].get_hatch()
    )


def test_every_figure_fits_a_phone_and_is_closed():
    x = np.arange(3)
    made = [
        figures.intervals(ROWS, y="domain", x="value", panel="measure"),
        figures.scatter([{"domain": "law", "score": 1, "change": 2}]),
        figures.curves({"a": (x, x)}),
        figures.bars(ROWS, y="domain"),
        figures.heat(pandas.DataFrame([[1.0]])),
        figures.intervals([]),
    ]
    for figure in made:
        assert figure.get_figwidth() <= 7
        texts = [
            text
            for axis in figure.axes
            for text in (*axis.get_xticklabels(), *axis.get_yticklabels(), axis.xaxis.label, axis.title, *axis.texts)
        ]
        assert all(text.get_fontsize() >= 10 for text in texts)
    assert plt.get_fignums() == []


def test_the_drawing_of_the_idea_is_the_one_that_its_code_draws():
    drawn = runpy.run_path(str(ROOT / "book" / "idea.py"))["diagram"]()
    assert (ROOT / "book" / "_static" / "idea.svg").read_text(encoding="utf-8") == drawn and len(drawn) < 100_000
