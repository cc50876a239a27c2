"""Verdicts of the chapter on training domains follow their rules, and its figures show every cell."""

import math
from types import SimpleNamespace

import pandas
import pytest

from sts.book import pages_domains, plots_domains, tables_domains, verdicts_domains
from sts.measure import rivals_domains


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


#: Change of each training set in five domains; the same in every measure, unless a test changes it.
CHANGES = {"code": (1, 2, 3, 4, 6), "health": (-9, 8, 8, -7, 9), "maths": (2, 3, -3, 4, 5), "law": (3, 1, 2, 3, 1)}


class Given:
    """As much of a run as sentences ask for: settings and stored results."""

    def __init__(self, sets, seeds=(0,), falls=None, **results):
        self.settings = SimpleNamespace(sft_data=sets[0], training_sets=list(sets[1:]), seed=seeds[0],
                                        training_seeds=list(seeds[1:]), domain_data="mmlu_pro", model="tiny",
                                        permutations=100, bootstrap=50)
        falls = falls or {}
        self.results = {"training_matrix": pandas.DataFrame([
            {"training_set": name, "seed": seed, "trained_domain": "several", "domain": f"domain {place}",
             "measure": measure, "low": low, "high": high, "loss_fall": falls.get((name, seed), 0.3), "overlap": 2,
             "overlap_n": 5, "overlap_p": 0.5, "shift": CHANGES[name][place], "sts_act": CHANGES[name][-1 - place],
             "sts_icl": CHANGES[name][place], "tfidf": place}
            for measure in ("bits", "accuracy", "bits_answer", "p_right") for name in sets for seed in seeds
            for place, (low, high) in enumerate([(1, 2), (-2, -1), (-2, -1), (-1, 1), (0, 1)])]),
            # Bits per character rise with the place of the domain and bits per answer fall, as do the lengths.
            "evaluation_before": pandas.DataFrame([
                {"example_id": str(place), "domain": f"domain {place}", "kind": "solution", "option": -1,
                 "is_right": True, "loglikelihood": -characters * (1 + place) * math.log(2), "characters": characters}
                for place, characters in enumerate((100, 20, 10, 5, 2))])} | results

    def get(self, name):
        return self.results[name]


def specificity(**changed):
    """Rows of every measure and forecast, all of which pass all tests."""
    return [row(measure=measure, forecast=forecast, within=0.5, defined=14, training_sets=4, orders=24, hits=0.5)
            | changed for measure in ("bits", "bits_answer", "p_right", "accuracy")
            for forecast in ("sts_act", "sts_icl", "tfidf")]


def correlations(sets, seeds=(0,)):
    return [{"training_set": name, "seed": seed, "measure": measure, "variant": "paper", "score": score, "pearson": 0.7,
             "p": 0.01, "pearson_interval": {"low": 0.3, "high": 0.9}}
            for name in sets for seed in seeds for measure in ("bits", "bits_answer")
            for score in ("sts_act", "sts_icl")]


def set_correlation(run, name, measure, score, pearson, low, high):
    row = next(row for row in run.get("training_correlations")
               if (row["training_set"], row["measure"], row["score"]) == (name, measure, score))
    row |= {"pearson": pearson, "pearson_interval": {"low": low, "high": high}}


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
    own = {line.split("`")[1]: line for line in pages_domains.correlation_sentence(run).split("\n")[1:]}
    assert own["health"].count("not judged, as it was not learned") == 4 and ": held" not in own["health"]
    assert all(own[name].count(": held") == 4 and "judged" not in own[name] for name in SETS if name != "health")
    for sentence in (pages_domains.specific_sentence(run, "bits"), pages_domains.also_sentence(run, "p_right"),
                     pages_domains.own_list_sentence(run), pages_domains.rival_sentence(run, "bits")):
        assert "**not judged, as `health` was not learned**" in sentence and "held" not in sentence
    assert set(tables_domains.specificity_table(run)["verdict"]) == {
        "not judged, as `health` was not learned"}
    assert "**held**" in pages_domains.specific_sentence(given(), "bits")


def test_the_short_answer_follows_the_verdicts(monkeypatch):
    def found(run, name, seed, measure, score):
        return {"measure": measure, "set": name}

    monkeypatch.setattr(pages_domains, "correlation_row", found)
    held = {("law", "bits"), ("law", "bits_answer"), ("health", "bits")}
    monkeypatch.setattr(pages_domains, "told_measures", lambda run: ["bits", "bits_answer"])
    monkeypatch.setattr(pages_domains, "correlation_verdict",
                        lambda row: "held" if (row["set"], row["measure"]) in held else "not shown")
    said = pages_domains.short_sentence(given(falls={("maths", 0): 0.05}))
    assert "after `law` in each measure" in said and "after `health` in bits per character alone" in said
    assert "after `code` in none" in said and "On `maths` too little was learned" in said


def test_one_seed_that_taught_nothing_leaves_the_others_correlations_judged():
    run = given(seeds=(0, 1), falls={("health", 1): 0.05})
    assert "judged" not in pages_domains.correlation_sentence(run)  # of the run's own seed
    assert "as `health` (seed 1) was not learned**" in pages_domains.specific_sentence(run, "bits")


def test_the_page_says_how_many_tests_stand_side_by_side():
    said = pages_domains.correlation_sentence(given())
    assert "n = 5 domains, seed 0. 16 tests stand here; no p is corrected" in said


# --- both kinds of bits -------------------------------------------------------------------------------------------

def test_each_training_sets_correlations_are_told_in_both_kinds_of_bits():
    run = given()
    set_correlation(run, "health", "bits_answer", "sts_act", 0.2, -0.1, 0.5)
    own = pages_domains.correlation_sentence(run).split("\n")[2]
    assert own.startswith("  - `health`: in bits per character STS_act 0.70 (0.30 to 0.90), p = 0.010: held, STS_ICL")
    assert "; in bits per answer STS_act 0.20 (-0.10 to 0.50), p = 0.010: not shown, STS_ICL 0.70 (0.30" in own
    table = tables_domains.correlations_table(run).set_index(["training set", "change in"])
    assert len(table) == 2 * len(SETS) and (table["n"] == 5).all() and (table["seed"] == 0).all()
    assert table.loc[("health", "bits per answer"), "r of STS_act"] == "0.20 (-0.10 to 0.50), p = 0.010: not shown"
    assert table.loc[("health", "bits per character"), "r of STS_act"] == "0.70 (0.30 to 0.90), p = 0.010: held"


def test_a_verdict_that_depends_on_the_measure_is_named():
    run = given()
    assert pages_domains.measure_sentence(run) == (
        "Bits per character and bits per answer agree on the verdict for every training set that is judged.")
    set_correlation(run, "maths", "bits_answer", "sts_icl", 0.2, -0.1, 0.5)
    said = pages_domains.measure_sentence(run)
    assert ("disagree: for `maths` the verdict on STS_ICL depends on the measure: **held** in bits per character, "
            "**not shown** in bits per answer") in said
    assert said.count("depends") == 1 and "dividing" not in said
    assert said in pages_domains.summary(run)
    idle = given(falls={("maths", 0): 0.05})
    set_correlation(idle, "maths", "bits_answer", "sts_icl", 0.2, -0.1, 0.5)
    assert "depends" not in pages_domains.measure_sentence(idle)


def test_a_sign_is_laid_to_the_length_only_where_the_length_turns_its_own_sign():
    run = given()
    set_correlation(run, "code", "bits", "sts_act", -0.7, -0.9, -0.3)
    assert "so the sign" not in pages_domains.measure_sentence(run)  # the changes are the same in both measures
    cells = run.get("training_matrix")
    code = (cells["training_set"] == "code") & (cells["measure"] == "bits_answer")
    cells.loc[code, "shift"] = [50, 4, 3, 2, 1]  # the longer, the more
    said = pages_domains.measure_sentence(run)
    assert "**reversed** in bits per character, **held** in bits per answer (1 / length of the answers alone" in said
    assert "so the sign may well come from dividing by the length)" in said
    set_correlation(run, "code", "bits", "sts_act", 0.2, -0.1, 0.5)  # no sign any more
    assert "depends" in pages_domains.measure_sentence(run) and "so the sign" not in pages_domains.measure_sentence(run)


def test_one_measure_is_compared_with_no_other():
    run = given()
    run.results["training_matrix"] = run.get("training_matrix").query("measure != 'bits_answer'")
    assert pages_domains.measure_sentence(run) == "" == pages_domains.same_ranks_sentence(run)
    assert "8 tests stand here" in pages_domains.correlation_sentence(run)
    assert "bits per answer" not in pages_domains.hardness_sentence(run)


# --- rivals -------------------------------------------------------------------------------------------------------

def test_what_knows_nothing_of_the_training_set_stands_beside_the_score():
    """Bits before training are 1 to 5 a character, the changes of code and maths nearly so; law's are not."""
    run = given(falls={("health", 0): 0.01})
    set_correlation(run, "law", "bits", "sts_act", -0.9, -0.95, -0.3)
    set_correlation(run, "code", "bits", "sts_act", 0.995, 0.3, 0.999)
    said = pages_domains.hardness_sentence(run)
    before = [pandas.Series(range(1, 6)).corr(pandas.Series(CHANGES[name]).abs()) for name in ("code", "maths", "law")]
    assert ("for `code`, `maths` and `law`, in turn" in said
            and f"bits before training {', '.join(f'{value:.2f}' for value in before)}; 1 / length" in said)
    assert "In bits per character: STS_act 0.99, 0.70, -0.90; STS_ICL 0.70, 0.70, 0.70; " in said
    assert "lies above bits before training for 1 of 3 (no test); the changes of two sets correlate at" in said
    alike = pandas.Series(CHANGES["code"]).corr(pandas.Series(CHANGES["maths"]).abs())
    assert f"{alike:.2f} (`code`, `maths`)" in said and "health" not in said
    row = tables_domains.correlations_table(run).set_index(["training set", "change in"])
    assert row.loc[("code", "bits per character"), "r of bits before training"].startswith(f"{before[0]:.2f} (")
    # Bits per answer fall where those per character rise.
    assert row.loc[("code", "bits per answer"), "r of bits before training"].startswith("-0.")
    assert "not judged" in row.loc[("health", "bits per character"), "r of 1 / length of the answers"]
    nothing = given(falls={(name, 0): 0.0 for name in SETS})
    assert "Not judged, as no training set was learned" in pages_domains.hardness_sentence(nothing)


# --- what hangs on one training set -------------------------------------------------------------------------------

def test_the_pooled_number_is_told_without_each_training_set_and_with_the_smallest_p_possible():
    run = given()
    for row in run.get("training_specificity"):
        row["p_sets"] = 1 / 24 if row["forecast"] == "sts_act" else 0.125
    said = pages_domains.specific_sentence(run, "bits")
    act, icl = said.split("; STS_ICL")
    assert "whole sets shuffled p = 0.042, the smallest that 24 orders allow; without one" in act
    assert "p = 0.125; without one training set at a time" in icl and "smallest" not in icl
    for name, value in rivals_domains.without_each(run, "bits", "sts_act").items():
        assert f"{value:.2f} (`{name}`)" in act
        assert f"{value:.2f} (`{name}`)" in tables_domains.specificity_table(run)["without one set at a time"][0]
    assert said.endswith("`health` moves 5 of 5 domains most.")
    assert "lead +50.0, p = 0.042, the smallest that 24 orders allow)" in pages_domains.own_list_sentence(run)


def test_bits_per_answer_are_told_as_no_second_test():
    run = given()
    summary = pages_domains.summary(run)
    assert "In bits per character: STS_act has a mean rank" in summary
    assert "The same in bits per answer" not in summary and "The same in accuracy" not in summary
    assert "The same in p(right option)" in summary
    assert "Bits per answer are no second test" in summary and "rank alike in 5 of 5 domains" in summary
    cells = run.get("training_matrix")
    place = (cells["measure"] == "bits_answer") & (cells["domain"] == "domain 2") & (cells["training_set"] == "law")
    cells.loc[place, "shift"] = 99
    assert "rank alike in 4 of 5 domains" in pages_domains.same_ranks_sentence(run)


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
