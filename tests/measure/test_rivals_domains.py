"""Rivals that know nothing of the training set, and results without one training set, against sums written out."""

import math
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from scipy.stats import pearsonr, spearmanr

from sts.measure import rivals_domains

SETS, DOMAINS = ("code", "maths", "law"), ("d", "a", "c", "b", "e")
GENERATOR = np.random.default_rng(3)
CELLS = pandas.DataFrame([
    {"training_set": name, "seed": seed, "measure": measure, "domain": domain, "sts_act": GENERATOR.normal(),
     "shift": GENERATOR.normal()}
    for seed in (0, 1) for name in SETS for measure in ("bits", "bits_answer") for domain in DOMAINS])


def solution(item, domain, bits, characters):
    return {"example_id": item, "domain": domain, "kind": "solution", "option": -1, "is_right": True,
            "loglikelihood": -bits * math.log(2), "characters": characters}


def evaluation(*, solutions=True):
    """Two answers a domain, of lengths and bits that all differ, and a letter that counts for nothing here."""
    rows = [solution(f"{domain}{item}", domain, 30 + 7 * place * (1 + item), 5 + (3 * place + item) % 11)
            for place, domain in enumerate(DOMAINS) for item in (0, 1)]
    letters = [row | {"kind": "letter", "option": 0, "loglikelihood": -9.0, "characters": 1} for row in rows]
    return pandas.DataFrame((rows if solutions else []) + letters)


class Given:
    settings = SimpleNamespace(permutations=2000, bootstrap=200)

    def __init__(self, cells=CELLS, rows=None):
        self.results = {"training_matrix": cells, "evaluation_before": evaluation() if rows is None else rows}

    def get(self, name):
        return self.results[name]


def cells_of(**wanted):
    return CELLS[np.logical_and.reduce([CELLS[name] == value for name, value in wanted.items()])]


# --- rivals -------------------------------------------------------------------------------------------------------

def test_rivals_are_means_over_the_solutions_of_a_domain():
    rows = pandas.DataFrame([solution("1", "law", 20, 10), solution("2", "law", 90, 30), solution("3", "art", 8, 4)])
    found = rivals_domains.rival_values(Given(rows=rows))
    assert found.loc["law"].to_dict() == pytest.approx(
        {"base_bits": (2 + 3) / 2, "base_bits_answer": 55, "answer_shortness": (1 / 10 + 1 / 30) / 2})
    assert found.loc["art"].to_dict() == pytest.approx(
        {"base_bits": 2, "base_bits_answer": 8, "answer_shortness": 0.25})


@pytest.mark.parametrize(("measure", "rival", "column"), [
    ("bits", "hardness", "base_bits"), ("bits_answer", "hardness", "base_bits_answer"),
    ("bits", "answer_shortness", "answer_shortness"), ("bits_answer", "answer_shortness", "answer_shortness")])
def test_a_rival_is_set_beside_one_sets_absolute_change_in_its_unit(measure, rival, column):
    values = rivals_domains.rival_values(Given())[column]
    for name in SETS:
        for seed in (0, 1):
            own = cells_of(training_set=name, seed=seed, measure=measure).set_index("domain")["shift"].abs()
            row = rivals_domains.rival_row(Given(), name, seed, measure, rival)
            assert row["pearson"] == pytest.approx(pearsonr(values[own.index], own)[0]) and row["n"] == 5
            assert row["pearson_interval"]["low"] <= row["pearson"] <= row["pearson_interval"]["high"]
            assert 0 < row["p"] <= 1


def test_without_solutions_a_rival_is_undefined():
    run = Given(rows=evaluation(solutions=False))
    assert all("undefined" in rivals_domains.rival_row(run, "maths", 0, "bits", rival)
               for rival in rivals_domains.RIVALS)


def test_likeness_is_the_correlation_of_absolute_changes():
    found = rivals_domains.likeness(Given(), ["code", "law"], 1, "bits_answer")
    one, other = (cells_of(training_set=name, seed=1, measure="bits_answer")["shift"].abs() for name in ("code", "law"))
    assert found == {("code", "law"): pytest.approx(pearsonr(one, other)[0])}
    flat = CELLS.assign(shift=CELLS["shift"].where(CELLS["training_set"] != "law", 1.0))
    assert list(rivals_domains.likeness(Given(flat), list(SETS), 0, "bits")) == [("code", "maths")]


# --- what hangs on one training set -------------------------------------------------------------------------------

def test_each_training_set_is_left_out_in_turn():
    found = rivals_domains.without_each(Given(), "bits", "sts_act")
    for left in SETS:
        own = CELLS[(CELLS["training_set"] != left) & (CELLS["measure"] == "bits")]
        by_hand = [spearmanr(part["sts_act"], part["shift"].abs())[0] for _, part in own.groupby(["domain", "seed"])]
        assert found[left] == pytest.approx(np.mean(by_hand))
    assert list(found) == list(SETS) and len(set(found.values())) > 1


def test_of_two_training_sets_none_can_be_left_out():
    assert rivals_domains.without_each(Given(CELLS[CELLS["training_set"] != "law"]), "bits", "sts_act") == {}


def test_who_moves_most_domains_farthest_goes_by_the_absolute_change():
    farthest = {"code": ("a", "b", "c"), "maths": ("d",), "law": ("e",)}
    signs = {"a": -1, "c": -1}
    cells = CELLS.assign(shift=[signs.get(row.domain, 1) * (9.0 if row.domain in farthest[row.training_set] else 1.0)
                                for row in CELLS.itertuples()])
    assert rivals_domains.moved_most(Given(cells), "bits") == ("code", 3, 5)


def test_training_sets_rank_alike_only_where_both_measures_order_them_so_in_every_seed():
    answer = CELLS.query("measure == 'bits'").assign(measure="bits_answer", shift=lambda cells: -50 * cells["shift"])
    cells = pandas.concat([CELLS.query("measure == 'bits'"), answer], ignore_index=True)
    assert rivals_domains.same_ranks(Given(cells), "bits", "bits_answer") == (5, 5)
    least = cells.query("measure == 'bits_answer' and domain == 'c' and seed == 1")["shift"].abs().idxmin()
    cells.loc[least, "shift"] = 1e6
    assert rivals_domains.same_ranks(Given(cells), "bits", "bits_answer") == (4, 5)
