"""Verdicts follow their rules, and the evidence on a claim is what its stages hold."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

import sts
from sts.book import claims, evidence
from sts.book.claims import HELD, IN_PART, NOT_DONE, NOT_HELD, NOT_TESTABLE, RULES, Claim, Evidence
from sts.errors import StsError


def found(value=0.5, low=None, high=None, p=None, against=(), **more):
    return Evidence(value, low, high, p, against={str(place): one for place, one in enumerate(against)}, **more)


def lead(low, high=0.9):
    return Evidence((low + high) / 2, low, high)


UNKNOWN = Evidence(0.3)


# --- rules: words and code stand side by side ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.26, 0.5, HELD), (0.25, 0.3, HELD), (0.2, 0.3, NOT_HELD), (0.1, 0.24, NOT_HELD), (None, None, HELD)],
)
def test_few_latents_carry_the_change(low, high, verdict):
    assert claims.at_least(found(0.25, low, high), 0.25) == verdict
    assert claims.at_least(found(0.2), 0.25) == NOT_HELD


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.5, 0.6, HELD), (0.3, 0.4, NOT_HELD), (0.1, 0.2, NOT_HELD)])
def test_more_concentrated_than_the_activity(low, high, verdict):
    assert claims.apart(found(0.5, low, high, against=[Evidence(0.35)])) == verdict


@pytest.mark.parametrize(
    ("sae", "raw", "random", "verdict"),
    [
        ((0.4, 0.5), (0.2, 0.3), (0.1, 0.3), HELD),
        ((0.4, 0.5), (0.2, 0.3), (0.3, 0.4), IN_PART),
        ((0.1, 0.15), (0.2, 0.3), (0.0, 0.01), NOT_HELD),
        ((0.25, 0.5), (0.2, 0.3), (0.0, 0.1), NOT_HELD),
    ],
)
def test_raw_dimensions_share_it_more_evenly(sae, raw, random, verdict):
    assert claims.apart(found(0.5, *sae, against=[lead(*raw), lead(*random)])) == verdict


@pytest.mark.parametrize(
    ("p", "lows", "verdict"),
    [
        (0.01, (0.1, 0.1, 0.1), HELD),
        (0.01, (-0.1, 0.1, 0.1), IN_PART),
        (0.01, (0.1, 0.0, 0.1), IN_PART),
        (0.01, (0.1, 0.1, -0.2), IN_PART),
        (0.01, (0.1, 0.1, None), IN_PART),
        (0.05, (-0.1, 0.1, 0.1), NOT_HELD),
        (None, (-0.1, -0.1, -0.1), NOT_HELD),
    ],
)
def test_demonstrations_foresee_the_shift(p, lows, verdict):
    leads = [UNKNOWN if low is None else lead(low) for low in lows]  # a single set has no interval
    assert claims.all_above(found(p=p, against=leads)) == verdict


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((0.1, 0.2), (0.1, 0.2), HELD),
        ((0.1, 0.2), (-0.1, 0.2), IN_PART),
        ((-0.1, 0.1), (0.1, 0.2), NOT_HELD),
        ((-0.3, -0.1), (0.1, 0.2), NOT_HELD),
        ((None, None), (0.1, 0.2), NOT_HELD),
        ((0.0, 0.2), (0.1, 0.2), NOT_HELD),
    ],
)
def test_a_difference_counts_with_its_whole_interval_and_each_further_one(first, second, verdict):
    assert claims.difference(found(0.15, *first, against=[lead(*second)])) == verdict
    alone = HELD if verdict == IN_PART else verdict
    assert claims.difference(found(0.15, *first)) == alone
    assert claims.difference(found(0.15, *first, p=0.05)) == NOT_HELD  # where there is a p, it must be below 0.05


@pytest.mark.parametrize(
    ("low", "p", "verdict"),
    [(0.1, 0.01, HELD), (0.1, 0.05, NOT_HELD), (-0.1, 0.01, NOT_HELD), (0.0, 0.01, NOT_HELD), (-0.9, 0.001, NOT_HELD)],
)
def test_a_correlation_needs_interval_and_p(low, p, verdict):
    assert claims.positive(found(0.5, low, 0.95, p)) == verdict


@pytest.mark.parametrize("weak", range(3))
def test_one_weak_layer_wherever_it_stands_is_enough_against_the_claim(weak):
    layers = [Evidence(0.6, -0.1 if place == weak else 0.1, 0.9, 0.01) for place in range(3)]
    assert claims.positive(found(0.6, layers[0].low, 0.9, 0.01, against=layers[1:])) == NOT_HELD
    assert claims.positive(found(0.6, 0.1, 0.9, 0.01, against=[lead(0.1)])) == HELD


@pytest.mark.parametrize(
    ("rate", "energy", "verdict"), [(0.05, 0.01, HELD), (0.06, 0.01, NOT_HELD), (0.01, 0.3, NOT_HELD)]
)
def test_the_choice_of_latents_must_beat_both_kinds_of_matched_sets(rate, energy, verdict):
    sets = [Evidence(0.2, p=rate), Evidence(0.2, p=energy)]
    assert claims.rarer_than(found(0.5, against=sets)) == verdict
    assert claims.rarer_than(found(-0.3, against=sets)) == NOT_HELD


def test_a_probe_is_judged_by_shuffled_targets():
    assert claims.no_more_than_chance(found(0.1, p=0.3, against=[Evidence(0.1, p=0.06)])) == HELD
    assert claims.no_more_than_chance(found(0.8, p=0.05, against=[Evidence(0.1, p=0.3)])) == NOT_HELD
    assert claims.no_more_than_chance(found(0.1, p=0.3, against=[Evidence(0.8, p=0.01)])) == NOT_HELD


@pytest.mark.parametrize(
    ("low", "high", "p", "sets", "verdict"),
    [
        (0.1, 0.8, 0.01, 0.04, HELD),
        (0.1, 0.8, 0.01, 0.05, NOT_HELD),
        (0.1, 0.8, 0.01, 0.4, NOT_HELD),
        (0.1, 0.8, 0.05, 0.04, NOT_HELD),
        (0.0, 0.8, 0.01, 0.04, NOT_HELD),
        (-0.2, 0.8, 0.01, 0.04, NOT_HELD),
        (-0.8, -0.1, 0.01, 1.0, NOT_HELD),
        (None, None, 0.01, 0.04, NOT_HELD),
    ],
)
def test_what_holds_must_hold_when_whole_training_sets_are_shuffled(low, high, p, sets, verdict):
    assert claims.specific(found(0.5, low, high, p, against=[Evidence(0.5, p=sets)])) == verdict


@pytest.mark.parametrize(
    ("lead", "beyond", "verdict"),
    [
        ((3.0, 0.04), (2.0, 0.04), HELD),
        ((3.0, 0.05), (2.0, 0.04), NOT_HELD),
        ((-3.0, 0.01), (2.0, 0.04), NOT_HELD),
        ((3.0, 0.04), (2.0, 0.05), NOT_HELD),
        ((3.0, 0.04), (-1.0, 0.04), NOT_HELD),
        ((3.0, 0.04), (0.0, 0.01), NOT_HELD),
    ],
)
def test_a_list_is_the_training_sets_own_only_with_a_lead_beyond_that_by_firing_rate(lead, beyond, verdict):
    assert claims.own_list(found(lead[0], p=lead[1], against=[Evidence(beyond[0], p=beyond[1])])) == verdict


def test_what_cannot_be_tested_is_never_held():
    claim = Claim("x", "chapter", "says", "row", "positive")
    good = found(0.5, 0.1, 0.9, 0.01)
    assert claim.judge(good) == HELD and claim.judge(good, "at chance") == NOT_TESTABLE
    assert (
        claim.judge(found(None)) == NOT_TESTABLE and claim.judge(found(0.5, 0.1, 0.9, 0.01, unable="x")) == NOT_TESTABLE
    )


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ([], NOT_DONE),
        ([NOT_DONE], NOT_DONE),
        ([NOT_TESTABLE], NOT_TESTABLE),
        ([NOT_DONE, NOT_TESTABLE], NOT_DONE),
        ([HELD, NOT_TESTABLE], IN_PART),
        ([HELD, NOT_DONE], IN_PART),
        ([HELD, NOT_HELD], IN_PART),
        ([IN_PART], IN_PART),
        ([NOT_HELD, NOT_DONE], NOT_HELD),
        ([HELD, HELD], HELD),
    ],
)
def test_a_result_of_several_claims_is_held_only_if_all_are(words, verdict):
    assert claims.together(words) == verdict


# --- the records --------------------------------------------------------------------------------------------------


def test_the_records_name_what_there_is():
    results, known = claims.read_claims()
    assert len(results) == 17 + 4 and sum(one.get("beyond", False) for one in results.values()) == 4
    for claim in known.values():
        assert callable(getattr(evidence, claim.evidence)) and claim.rule in RULES
        assert (claim.rule == "at_least") == (claim.bound is not None)
        assert claim.learned in ("own", "every", "sets", "no")
        assert claim.label
    for rule in RULES.values():
        words = " ".join(rule.__doc__.split())
        assert words.startswith("Held if ") and "otherwise not held" in words


def test_numbers_are_never_minus_zero_and_carry_their_interval():
    claim = Claim("x", "c", "s", "row", "positive", form=".1f")
    assert claim.number(Evidence(-0.04, -0.1, 0.0)) == "0.0 (-0.1 to 0.0)"
    assert claim.number(Evidence(None)) == "" and claim.number(Evidence(2.0)) == "2.0"


# --- evidence -----------------------------------------------------------------------------------------------------


class Run:
    """As much of a run as evidence asks for; `falls`: how far the held-out loss fell, by seed."""

    def __init__(self, tmp_path, falls=(0.2,), **results):
        self.folder, self.falls, self.results, self.asked = tmp_path, falls, results, []
        self.notes = {}
        self.settings = SimpleNamespace(name="stub", seed=0, seeds=[*range(len(falls))], top_n=2, bootstrap=200)

    def alone(self, seed):
        return Run(self.folder, self.falls[seed : seed + 1], **self.results)

    def provenance(self, stage):
        return self.notes.get(stage, {})

    def stored(self, stage):
        return stage == "sft" or stage in self.results

    def get(self, stage):
        self.asked.append(stage)
        if stage == "change_quality":
            return self.results.get(stage, [])
        if stage != "sft":
            return self.results[stage]
        folder = self.folder / f"sft-{self.falls[0]}"
        folder.mkdir(exist_ok=True)
        (folder / "training.json").write_text(
            json.dumps({"held_out_before": 2.0, "held_out_after": 2.0 * (1 - self.falls[0])})
        )
        return folder


def correlation_row(**more):
    return {
        "measure": "bits",
        "variant": "paper",
        "score": "sts_act",
        "n": 14,
        "pearson": 0.6,
        "p": 0.01,
        "pearson_interval": {"low": 0.2, "high": 0.8},
    } | more


SCORE = Claim(
    "x",
    "c",
    "s",
    "row",
    "positive",
    arguments={"stage": "correlations", "where": {"measure": "bits", "variant": "paper", "score": "sts_act"}},
)


def test_a_row_is_found_by_its_fields(tmp_path):
    run = Run(tmp_path, correlations=[correlation_row(score="sts_icl", pearson=-1.0), correlation_row()])
    got, word, _ = evidence.weigh(run, SCORE)
    assert (got.value, got.low, got.high, got.p, got.n, word) == (0.6, 0.2, 0.8, 0.01, 14, HELD)
    gone, word, why = evidence.weigh(Run(tmp_path, correlations=[]), SCORE)
    assert gone is None and word == NOT_DONE and "correlations" in why
    got, word, why = evidence.weigh(Run(tmp_path, correlations=[correlation_row(undefined="too few")]), SCORE)
    assert word == NOT_TESTABLE and why == "too few"


def test_a_run_that_learned_nothing_is_not_judged(tmp_path):
    rows = [correlation_row()]
    assert evidence.weigh(Run(tmp_path, (0.1001,), correlations=rows), SCORE)[1] == HELD
    assert evidence.weigh(Run(tmp_path, (0.099,), correlations=rows), SCORE)[1:] == (NOT_TESTABLE, evidence.UNLEARNED)
    every = Claim("x", "c", "s", "row", "positive", learned="every", arguments=SCORE.arguments)
    mixed = Run(tmp_path, (0.2, 0.05), correlations=rows)
    assert evidence.weigh(mixed, SCORE)[1] == HELD and evidence.weigh(mixed, every)[1] == NOT_TESTABLE
    assert evidence.weigh(Run(tmp_path, (0.2, 0.3), correlations=rows), every)[1] == HELD
    never = Claim("x", "c", "s", "row", "positive", learned="no", arguments=SCORE.arguments)
    assert evidence.weigh(Run(tmp_path, (-0.1,), correlations=rows), never)[1] == HELD


def test_training_sets_that_were_not_learned_are_not_judged_nor_what_compares_them(tmp_path):
    matrix = pandas.DataFrame(
        {"training_set": ["code", "code", "law"], "seed": [0, 1, 0], "loss_fall": [0.3, 0.2, 0.05]}
    )
    rows = [correlation_row(training_set=name) for name in ("code", "law")]
    run = Run(tmp_path, training_matrix=matrix, training_correlations=rows)

    def word(**where):
        claim = Claim(
            "x",
            "c",
            "s",
            "row",
            "positive",
            learned="sets",
            arguments={"stage": "training_correlations", "where": where},
        )
        return evidence.weigh(run, claim)[1]

    assert (word(training_set="code"), word(training_set="law"), word(measure="bits")) == (
        HELD,
        NOT_TESTABLE,
        NOT_TESTABLE,
    )


def test_differences_can_be_turned_round_and_rivals_stand_beside(tmp_path):
    ends = {
        "values": [],
        "claims": [{"axis": "k", "mean": -0.2, "interval": {"low": -0.3, "high": 0.1}, "p": 0.04, "n": 14}],
    }
    rivals = [
        {
            "predictor": name,
            "n": 14,
            "less": {"sts_act": {"mean": mean, "interval": {"low": mean - 0.1, "high": mean + 0.1}}},
        }
        for name, mean in (("raw", 0.5), ("text", 0.3))
    ]
    run = Run(tmp_path, sweep=ends, rivals=rivals)
    got = evidence.row(run, "sweep", {"axis": "k"}, under="claims", value="mean", interval="interval", sign=-1)
    assert (got.value, got.low, got.high, got.p) == (0.2, -0.1, 0.3, 0.04)
    got = evidence.row(
        run,
        "rivals",
        {"predictor": "raw"},
        value="less.sts_act.mean",
        interval="less.sts_act.interval",
        against={"text": {"where": {"predictor": "text"}}},
    )
    assert (got.value, got.against["text"].value, got.against["text"].low) == (0.5, 0.3, pytest.approx(0.2))


@pytest.mark.parametrize(("low", "unable"), [(0.1, ""), (-0.1, evidence.UNFORECAST)])
def test_a_fall_is_untestable_where_nothing_forecasts_to_begin_with(tmp_path, low, unable):
    ends = {"values": [{"axis": "k", "pearson": 0.4, "pearson_interval": {"low": low, "high": 0.6}, "p": 0.01}],
            "claims": [{"axis": "k", "mean": 0.2, "interval": {"low": 0.1, "high": 0.3}, "n": 14}]}
    got = evidence.row(Run(tmp_path, sweep=ends), "sweep", {"axis": "k"}, under="claims", value="mean",
                       interval="interval", among="values")
    assert got.unable == unable


def test_the_weakest_of_several_rows_is_judged(tmp_path):
    run = Run(
        tmp_path, rows=[correlation_row(value=value, pearson=r) for value, r in (("7", 0.5), ("14", -0.2), ("22", 0.9))]
    )
    got = evidence.row(run, "rows", {"measure": "bits"}, each="layer {value}")
    assert got.value == -0.2 and {name: one.value for name, one in got.against.items()} == {
        "layer 7": 0.5,
        "layer 22": 0.9,
    }
    with pytest.raises(StsError):
        evidence.row(run, "rows", {"value": "7"}, each="layer {value}")


@pytest.mark.parametrize(("right", "chance"), [(0, True), (10, True), (14, True), (30, False), (40, False)])
def test_accuracy_is_judged_only_above_chance(tmp_path, right, chance):
    rows = pandas.DataFrame(
        [
            {
                "example_id": str(item),
                "domain": "law",
                "kind": "letter",
                "option": option,
                "characters": 1,
                "is_right": option == 0,
                "loglikelihood": float(option == (0 if item < right else 1)),
            }
            for item in range(40)
            for option in range(4)
        ]
    )  # guessing gets 10 of 40, give or take 5
    run = Run(tmp_path, evaluation_before=rows, correlations=[correlation_row(measure="accuracy")])
    got = evidence.row(run, "correlations", {"measure": "accuracy"})
    assert got.unable == (evidence.CHANCE if chance else "")


def test_matched_sets_are_a_control_only_if_they_match_and_differ(tmp_path):
    def fair(**changed):
        rows = [
            {
                "measure": "bits",
                "predictor": "sts_act",
                "null": kind,
                "observed": 0.5,
                "mean": 0.1,
                "p": 0.01,
                "draws": 9,
                "matched": 0.95,
                "chosen": 1.0,
                "shared": 0.5,
            }
            | (changed if kind == "energy" else {})
            for kind in ("rate", "energy")
        ]
        run = Run(tmp_path, (0.2, 0.2), baseline_nulls=rows)
        got, word, _ = evidence.weigh(run, claims.read_claims()[1]["choice-matters"])
        assert (got.value, got.n, [one.value for one in got.against.values()]) == (0.5, 9, [0.1, 0.1])
        return word

    assert fair() == fair(matched=1.09) == HELD and fair(p=0.06) == NOT_HELD
    assert fair(matched=0.6) == fair(shared=0.51) == NOT_TESTABLE


def test_zeroing_is_held_against_the_sets_that_could_be_made(tmp_path):
    costs = {"most_shifted": 0.5, "random": 0.1, "most_active": 0.6, "matched": 0.2, "like_rate": 0.3}

    def rows(*kinds):
        return pandas.DataFrame(
            [
                {
                    "kind": kind,
                    "latents": latents,
                    "draw": draw,
                    "example_id": str(item),
                    "bits": costs[kind] + 0.01 * item + 0.002 * draw * item,
                }
                for kind in kinds
                for latents in (2, 50)
                for draw in range(1 if kind in ("most_shifted", "most_active") else 3)
                for item in range(6)
            ]
        )

    got = evidence.zeroing(Run(tmp_path, ablation=rows(*costs)))
    assert (
        got.value == pytest.approx(0.4, abs=0.02)
        and got.n == 6
        and list(got.against) == ["others of as much energy", "others that fire as often"]
    )
    assert claims.difference(got) == HELD
    got = evidence.zeroing(Run(tmp_path, ablation=rows("most_shifted", "random", "most_active")))
    assert list(got.against) == ["the most active latents"] and claims.difference(got) == IN_PART


def tensors(generator):
    """Changes of 40 latents (and of two other codes) by fine-tuning, in four folds, and behind five sets."""
    change_FL = torch.rand(4, 40, generator=generator) ** 6
    moved, drawn = {}, {}
    for code in ("sae", "raw", "random"):
        moved |= {
            f"{code}/fold_squared_difference_FL": change_FL,
            f"{code}/squared_difference_L": change_FL.sum(0),
            f"{code}/base_square_sum_L": change_FL.sum(0),
        }
        drawn |= {
            f"{code}/squared_difference_RL": change_FL.sum(0) + torch.zeros(5, 1),
            f"{code}/base_fired_L": -change_FL.sum(0),
            f"{code}/base_square_sum_L": -change_FL.sum(0),
        }
    return moved, drawn


def test_shares_and_lists_by_hand(tmp_path):
    moved, drawn = tensors(torch.Generator().manual_seed(0))
    other = {"sae/squared_difference_RL": -drawn["sae/squared_difference_RL"]}
    run = Run(
        tmp_path,
        sft_shift=moved,
        shift_by_draw=drawn,
        shift_by_other_domain=other,
        shift={"squared_difference_L": moved["sae/squared_difference_L"]},
        shift_by_demonstrations={
            "sae/1": other["sae/squared_difference_RL"],
            "raw/8": None,
            "sae/4": drawn["sae/squared_difference_RL"],
        },
    )
    change_FL = moved["sae/fold_squared_difference_FL"].double().numpy()
    held_out = sum(own[np.argsort(-(change_FL.sum(0) - own))[:2]].sum() for own in change_FL) / change_FL.sum()
    got = evidence.shares(run, against=["activity", "raw"])
    assert got.value == pytest.approx(held_out) and got.low < got.value < got.high and got.n == 4
    top = np.sort(change_FL.sum(0))[::-1]
    assert got.against["activity"].value == pytest.approx(top[:2].sum() / top.sum())
    assert got.against["raw dimensions"].value == pytest.approx(held_out)
    # The estimated list is the actual one; every other list is its opposite.
    got = evidence.foreseen(run)
    assert got.value == 1.0 and got.p == pytest.approx(1 / math.comb(40, 2))
    assert [one.value for one in got.against.values()] == [1.0, 1.0, 1.0]
    assert evidence.better_than_raw(run).value == 0.0 and evidence.more_demonstrations(run).value == 1.0


def test_the_papers_own_numbers_are_judged_as_published(tmp_path):
    known = claims.read_claims()[1]
    got, word, _ = evidence.weigh(Run(tmp_path), known["paper-fig3"])
    assert got.value == pytest.approx(0.60, abs=0.005) and len(got.against) == 5 and word == NOT_HELD


def test_nothing_is_computed_for_the_scorecard(tmp_path):
    run = sts.open_run("smoke", results=tmp_path).only_stored()
    for claim in claims.read_claims()[1].values():
        if claim.chapter != "the_papers_numbers" and claim.id != "cheaper-on-paper" and not claim.run:
            assert evidence.weigh(run, claim)[1] == NOT_DONE
    assert not [*tmp_path.rglob("*.provenance.json")]
