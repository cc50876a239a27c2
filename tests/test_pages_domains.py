"""Verdicts of the chapter on training domains follow their rules, and its figures show every cell."""

import pandas
import pytest

from sts import pages_domains, plots_domains


def row(**changed):
    return {"low": 0.1, "high": 0.8, "p_within": 0.01, "p_sets": 0.04, "interaction_low": 0.1,
            "p_interaction": 0.01} | changed


@pytest.mark.parametrize(("changed", "verdict"), [
    ({}, "held"), ({"p_sets": 0.4}, "held"), ({"p_interaction": 0.2}, "held"),
    ({"p_sets": 0.4, "p_interaction": 0.2}, "in step only"), ({"p_sets": 0.4, "interaction_low": -0.1}, "in step only"),
    ({"p_sets": 0.05, "interaction_low": None}, "in step only"),
    ({"p_within": 0.05}, "not shown"), ({"low": 0.0}, "not shown"), ({"low": -0.2}, "not shown"),
    ({"low": -0.8, "high": -0.1}, "reversed"), ({"low": -0.8, "high": -0.1, "p_within": 0.2}, "not shown"),
    ({"low": None, "high": None}, "undefined"), ({"undefined": "one training set"}, "undefined")])
def test_the_score_must_pass_a_stricter_test_than_the_one_within_domains(changed, verdict):
    assert pages_domains.specific_verdict(row(**changed)) == verdict


@pytest.mark.parametrize(("lead", "verdict"), [
    ({"lead": 3.0, "p": 0.04}, "held"), ({"lead": 3.0, "p": 0.05}, "not shown"),
    ({"lead": -3.0, "p": 0.01}, "not shown"), ({"undefined": "one"}, "undefined")])
def test_a_list_is_the_training_sets_own_only_with_a_lead_and_p(lead, verdict):
    assert pages_domains.own_list_verdict(lead) == verdict


CELLS = pandas.DataFrame([
    {"seed": seed, "training_set": name, "trained_domain": trained, "domain": domain, "measure": "bits",
     "sts_act": place + 10 * seed, "sts_icl": 2 * place, "shift": sign * (place + 1 + seed)}
    for seed in (0, 1) for place, (name, trained) in enumerate((("zeta", "math"), ("alpha", "several")))
    for domain, sign in (("law", -1), ("math", 1))])


def numbers(axis):
    return [float(text.get_text()) for text in axis.texts]


def test_the_matrix_shows_means_over_seeds_in_the_order_of_the_training_sets():
    figure = plots_domains.matrices(CELLS, "sts_act", "bits")
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_xticklabels()] == ["zeta", "alpha"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["law", "math"]
    assert numbers(left) == [5, 6, 5, 6]  # means of 0 and 10, 1 and 11
    assert numbers(right) == [1.5, 2.5, 1.5, 2.5]  # absolute changes, law's are negative
    frames = [patch.get_xy() for patch in left.patches]
    assert frames == [pytest.approx((0.03, 1.03))]  # mathematics, under zeta, and none for `several`
    assert figure.get_size_inches()[0] <= 7


def test_every_training_set_has_a_marker_and_all_its_points():
    figure = plots_domains.clouds(CELLS, "bits")
    for axis, column in zip(figure.axes, ("sts_act", "sts_icl"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines) == ["zeta", "alpha"] and len({line.get_marker() for line in axis.lines}) == 2
        expected = CELLS[CELLS["training_set"] == "alpha"].groupby("domain")[column].mean()
        assert lines["alpha"].get_xdata() == pytest.approx(expected.to_numpy())
        assert lines["alpha"].get_ydata() == pytest.approx([2.5, 2.5])


def test_shared_lists_are_shares_with_rows_that_estimate_and_columns_that_train():
    rows = [{"estimated": one, "trained": other, "foreseen": value, "by_rate": 0}
            for one, other, value in (("b", "b", 8), ("b", "a", 2), ("a", "b", 4), ("a", "a", 6))]
    figure = plots_domains.shared_lists(rows, 10)
    assert [text.get_text() for text in figure.axes[0].texts] == ["80%", "20%", "40%", "60%"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["0%"] * 4


def test_long_names_are_cut_for_the_axes():
    long = CELLS.assign(training_set=CELLS["training_set"] + "_of_a_very_long_name")
    labels = [label.get_text() for label in plots_domains.matrices(long, "sts_icl", "bits").axes[0].get_xticklabels()]
    assert all(len(label) <= plots_domains.LONGEST for label in labels)
