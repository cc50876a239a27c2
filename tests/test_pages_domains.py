"""Verdicts of the chapter on training domains follow their rules, and its figures show every cell."""

from types import SimpleNamespace

import pandas
import pytest

from sts import pages_domains, plots_domains, verdicts_domains


def row(**changed):
    return {"low": 0.1, "high": 0.8, "p_within": 0.01, "p_sets": 0.04, "p_opposite": 1.0, "interaction": 0.9} | changed


BELOW = {"low": -0.8, "high": -0.1, "p_sets": 1.0, "p_opposite": 0.04}


@pytest.mark.parametrize(("changed", "verdict"), [
    ({}, "held"), ({"interaction": -0.9}, "held"), ({"p_sets": 0.05}, "in step only"),
    ({"p_sets": 0.4}, "in step only"), ({"p_within": 0.05}, "not shown"), ({"low": 0.0}, "not shown"),
    ({"low": -0.2}, "not shown"),
    (BELOW, "reversed"), (BELOW | {"p_within": 0.2}, "not shown"), (BELOW | {"p_opposite": 0.08}, "not shown"),
    (BELOW | {"high": 0.0}, "not shown"),
    ({"low": None, "high": None}, "undefined"), ({"undefined": "one training set"}, "undefined")])
def test_what_holds_must_hold_when_whole_training_sets_are_shuffled(changed, verdict):
    assert verdicts_domains.specific_verdict(row(**changed)) == verdict


@pytest.mark.parametrize(("lead", "beyond", "verdict"), [
    ((3.0, 0.04), (2.0, 0.04), "held"), ((3.0, 0.05), (2.0, 0.04), "not shown"),
    ((-3.0, 0.01), (2.0, 0.04), "not shown"), ((3.0, 0.04), (2.0, 0.05), "not shown"),
    ((3.0, 0.04), (-1.0, 0.04), "not shown"), ((3.0, 0.04), (0.0, 0.01), "not shown")])
def test_a_list_is_the_training_sets_own_only_with_a_lead_beyond_that_by_firing_rate(lead, beyond, verdict):
    lead, beyond = ({"lead": lead_, "p": p} for lead_, p in (lead, beyond))
    assert verdicts_domains.own_list_verdict(lead, beyond) == verdict
    assert verdicts_domains.own_list_verdict({"undefined": "one"}, {"undefined": "one"}) == "undefined"


# --- sentences of a run whose results are given -------------------------------------------------------------------

SETS = ("code", "health", "maths", "law")


class Given:
    """As much of a run as sentences ask for: settings and stored results."""

    def __init__(self, sets, seeds=(0,), falls=None, **results):
        self.settings = SimpleNamespace(sft_data=sets[0], training_sets=list(sets[1:]), seed=seeds[0],
                                        training_seeds=list(seeds[1:]), domain_data="mmlu_pro", model="tiny")
        falls = falls or {}
        self.results = {"training_matrix": pandas.DataFrame([
            {"training_set": name, "seed": seed, "trained_domain": "several", "domain": f"domain {place}",
             "measure": measure, "low": low, "high": high, "loss_fall": falls.get((name, seed), 0.3), "overlap": 2,
             "overlap_n": 5, "overlap_p": 0.5}
            for measure in ("bits", "accuracy", "bits_answer", "p_right") for name in sets for seed in seeds
            for place, (low, high) in enumerate([(1, 2), (-2, -1), (-2, -1), (-1, 1), (0, 1)])])} | results

    def get(self, name):
        return self.results[name]


def specificity(**changed):
    """Rows of every measure and forecast, all of which pass all tests."""
    return [row(measure=measure, forecast=forecast, within=0.5, defined=14, training_sets=4, orders=24, hits=0.5)
            | changed for measure in ("bits", "bits_answer", "p_right", "accuracy")
            for forecast in ("sts_act", "sts_icl", "tfidf")]


def correlations(sets, seeds=(0,)):
    return [{"training_set": name, "seed": seed, "measure": "bits", "variant": "paper", "score": score, "pearson": 0.7,
             "p": 0.01, "pearson_interval": {"low": 0.3, "high": 0.9}}
            for name in sets for seed in seeds for score in ("sts_act", "sts_icl")]


def shared(sets, own, own_by_rate, seeds=(0,)):
    """Rows of `training_overlap`: lists share 10 with other sets' fine-tuning, and so much with their own set's."""
    rows = [{"seed": seed, "estimated": one, "trained": other, "foreseen": own if one == other else 10,
             "by_rate": own_by_rate if one == other else 10} for seed in seeds for one in sets for other in sets]
    lead = {kind: {"own": float(rows[0][kind]), "other": 10.0, "lead": rows[0][kind] - 10.0, "p": 1 / 24}
            for kind in ("foreseen", "by_rate")}
    return {"rows": rows, "n": 100, "lead": lead}


def given(sets=SETS, seeds=(0,), falls=None):
    return Given(sets, seeds, falls, training_specificity=specificity(), training_overlap=shared(sets, 60, 30, seeds),
                 training_correlations=correlations(sets, seeds))


def test_a_set_is_learned_only_if_it_was_with_every_seed():
    sentence = pages_domains.learned_sentence(given(seeds=(0, 1), falls={("health", 1): 0.02, ("law", 0): 0.1}))
    assert "`health` -30.0%, -2.0%, **not learned**" in sentence and "`law` -10.0%, -30.0%, **learned**" in sentence
    assert sentence.count("**learned**") == 3


def test_domains_that_rose_and_domains_that_fell_have_moved():
    # Of five, one lies above zero and two below; one interval has zero inside and one at its end.
    assert pages_domains.learned_sentence(given()).count("60% of the domains moved") == 4


def test_a_set_that_was_not_learned_is_not_judged_and_neither_is_its_comparison():
    run = given(falls={("health", 0): 0.05})
    sentence = pages_domains.correlation_sentence(run, "bits")
    own = {part.split("`")[1]: part for part in sentence.split("r over domains. ")[1].split(". ")[:4]}
    assert own["health"].count("not judged, as it was not learned") == 2 and ": held" not in own["health"]
    assert all(own[name].count(": held") == 2 and "judged" not in own[name] for name in SETS if name != "health")
    for sentence in (pages_domains.specific_sentence(run, "bits"), pages_domains.also_sentence(run, "p_right"),
                     pages_domains.own_list_sentence(run), pages_domains.rival_sentence(run, "bits")):
        assert "**not judged, as `health` was not learned**" in sentence and "held" not in sentence
    assert set(pages_domains.specificity_table(run)["verdict"]) == {
        "not judged, as `health` was not learned"}
    assert "**held**" in pages_domains.specific_sentence(given(), "bits")


def test_one_seed_that_taught_nothing_leaves_the_others_correlations_judged():
    run = given(seeds=(0, 1), falls={("health", 1): 0.05})
    assert "judged" not in pages_domains.correlation_sentence(run, "bits")  # of the run's own seed
    assert "as `health` (seed 1) was not learned**" in pages_domains.specific_sentence(run, "bits")


def test_the_page_says_how_many_tests_stand_side_by_side():
    assert "8 tests stand here; no p is corrected" in pages_domains.correlation_sentence(given(), "bits")


def test_the_summary_judges_bits_per_answer_and_the_letters_beside_the_finest_measure():
    summary = pages_domains.summary(given())
    assert "In bits per character: STS_act has a mean rank" in summary
    assert "The same in bits per answer: STS_act 0.50 (0.10 to 0.80), whole sets p" in summary
    assert "The same in p(right option)" in summary and "The same in accuracy" not in summary


@pytest.mark.parametrize(("by_rate", "verdict"), [(30, "held"), (60, "not shown"), (90, "not shown")])
def test_lists_that_foresee_no_more_than_activity_does_are_not_the_training_sets_own(by_rate, verdict):
    run = given()
    run.results["training_overlap"] = shared(SETS, 60, by_rate)
    sentence = pages_domains.own_list_sentence(run)
    assert f"share {by_rate}.0 and 10.0; the first lead exceeds theirs by {60 - by_rate:+.1f}" in sentence
    assert f"**{verdict}**" in sentence


# --- figures ------------------------------------------------------------------------------------------------------

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
