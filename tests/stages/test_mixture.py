"""Mixtures of training data on the smoke run, against their definitions; and what a page says of them."""

import json
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file

import sts
from sts.book import claims, evidence
from sts.book.claims import HELD, IN_PART, NOT_DONE, NOT_HELD, NOT_TESTABLE
from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine import finetune
from sts.engine.evaluate import evaluate
from sts.errors import StsError
from sts.measure.items import item_measures
from sts.run import resources
from sts.stages import mixture as stages


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("mixture"), mixture_steps=[0.5, 1.0])


@pytest.fixture(scope="module")
def plan(run):
    return run.get("mixture_plan")


# --- which domains, and how many examples -------------------------------------------------------------------------

def test_the_domains_are_those_of_highest_and_lowest_score_but_for_the_trained_one(run, plan):
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")["sts_icl"].drop("math")
    most, least = plan["domains"]
    assert (most["domain"], least["domain"]) == (scores.idxmax(), scores.idxmin())
    assert (most["sts_icl"], least["sts_icl"]) == (scores.max(), scores.min())
    # On smoke, whatever the scores: a domain that is trained on is left out even if its score is the highest.
    table = run.get("scores").assign(sts_icl=lambda own: np.where(own["domain"] == "math", 9.0, own["sts_icl"]))
    again = stages.mixture_plan(table, resources.train(run), resources.questions(run), [1.0], ["sts"], 220, 0)
    assert [row["domain"] for row in again["domains"]] == [most["domain"], least["domain"]]


def test_halves_are_disjoint_and_hold_every_question(run, plan):
    for row in plan["domains"]:
        ids = [example.example_id for example in resources.questions(run)[row["domain"]]]
        assert sorted(row["train"] + row["test"]) == sorted(ids) and not {*row["train"]} & {*row["test"]}
        assert len(row["test"]) - len(row["train"]) in (0, 1)


@pytest.mark.parametrize(("scores", "rooms", "kinds", "most"), [
    ((3.0, 1.0), (60, 60), ["sts"], 220), ((3.0, 1.0), (60, 60), ["sts", "even"], 220),
    ((1.5, 0.1), (9, 5), ["sts"], 220), ((3.0, 1.0), (60, 7), ["sts", "even"], 220),
    ((2.0, 2.0), (3, 3), ["sts", "even"], 220), ((5.0, 3.0), (99, 99), ["sts"], 40),
    ((1.0, 0.9), (2, 2), ["sts", "even"], 1)])
def test_shares_are_in_proportion_as_far_as_both_halves_reach(scores, rooms, kinds, most):
    names = ("a", "b")
    found = stages.divided(dict(zip(names, scores, strict=True)), dict(zip(names, rooms, strict=True)), kinds,
                           [1.0, 0.25], most)
    exact = [Fraction(score) / sum(map(Fraction, scores)) for score in scores]
    weights = {"sts": exact, "even": [Fraction(1, 2)] * 2}
    # The largest number that no half is too small for, counted up.
    whole = max(number for number in range(most + 1) if all(
        number * weight <= room for kind in kinds for weight, room in zip(weights[kind], rooms, strict=True)))
    assert [(row["kind"], row["step"]) for row in found] == [(kind, step) for kind in kinds for step in (0.25, 1.0)]
    for row in found:
        total = sum(row["examples"].values())
        assert total == round(row["step"] * whole)
        for name, weight, room in zip(names, weights[row["kind"]], rooms, strict=True):
            assert 0 <= row["examples"][name] <= room and abs(row["examples"][name] - total * weight) <= 0.5


def test_a_domain_too_small_to_be_halved_is_named(run):
    scores, questions = run.get("scores"), dict(resources.questions(run))
    name = run.get("mixture_plan")["domains"][1]["domain"]
    questions[name] = questions[name][:1]
    with pytest.raises(StsError, match=f"'{name}' has one question, which cannot be halved; raise domain_limit"):
        stages.mixture_plan(scores, resources.train(run), questions, [1.0], ["sts"], 220, 0)


@pytest.mark.parametrize(("changes", "said"), [
    ({"mixture_steps": []}, "mixture_steps is empty"),
    ({"domains": ["math", "law"]}, "needs two domains .* here are 1"),
    ({"sft_data": "mmlu_exemplars", "sft_examples": 200}, "needs two domains .* here are 0")])
def test_what_cannot_be_mixed_is_said(run, changes, said):
    other = sts.open_run("smoke", results=run.results, **{"mixture_steps": [1.0]} | changes)
    with pytest.raises(StsError, match=said):
        other.get("mixture_plan")


@pytest.mark.parametrize("steps", [[0.0], [1.5], ["half"]])
def test_a_step_that_is_no_share_is_refused(steps):
    with pytest.raises(StsError, match="mixture_steps"):
        sts.open_run("smoke", mixture_steps=steps)


# --- the model's own answers ----------------------------------------------------------------------------------------

def test_answers_are_what_the_untuned_model_says_to_the_prompt_that_is_trained_on(run, plan):
    lm, found = resources.lm(run), {row["example_id"]: row for row in run.get("mixture_answers")}
    by_id = {one.example_id: one for group in resources.questions(run).values() for one in group}
    wanted = [name for row in plan["domains"] for name in row["train"][:max(
        own["examples"][row["domain"]] for own in plan["mixtures"])]]
    assert list(found) == wanted
    for name, row in found.items():
        ids = torch.tensor([make_prompt(lm.tokenizer, question_text(by_id[name])).ids])
        with torch.no_grad():
            whole = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                                      pad_token_id=lm.tokenizer.pad_token_id)
        assert row["answer"] == lm.tokenizer.decode(whole[0, ids.shape[1]:], skip_special_tokens=True).strip()
        assert not row["whole"]  # a random model goes on to the end
    assert "are cut at mixture_tokens" in " ".join(run.provenance("mixture_answers")["work"]["notes"])


# --- training -------------------------------------------------------------------------------------------------------

def trained_on(run, monkeypatch, results):
    """What `fine_tune` is given by stage `mixture`, and the adapters that it makes: one a mixture."""
    given, adapters, fine_tune = [], [], finetune.fine_tune

    def watched(lm, train, held_out, settings, folder, **more):
        given.append(train)
        log = fine_tune(lm, train, held_out, settings, folder, **more)
        adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        return log

    monkeypatch.setattr(finetune, "fine_tune", watched)
    return given, adapters, results()


def test_a_mixture_is_the_training_set_and_own_answers_behind_the_same_prompts(run, plan, monkeypatch):
    given, _, rows = trained_on(run, monkeypatch, lambda: run.get("mixture"))
    by_id = {one.example_id: one for group in resources.questions(run).values() for one in group}
    answers = {row["example_id"]: row["answer"] for row in run.get("mixture_answers")}
    tokenizer, tested = resources.tokenizer(run), {name for row in plan["domains"] for name in row["test"]}
    assert len(given) == len(plan["mixtures"]) == 4
    for examples, row in zip(given, plan["mixtures"], strict=True):
        train = resources.train(run)
        assert examples[:len(train)] == train
        added = examples[len(train):]
        assert [one.domain for one in added] == [name for name, count in row["examples"].items() for _ in range(count)]
        for one in added:
            asked, (first, last) = make_prompt(tokenizer, question_text(by_id[one.example_id])).ids, solution_prompt(
                tokenizer, one).question
            ids = solution_prompt(tokenizer, one).ids
            assert ids[:first] == asked and tokenizer.decode(ids[first:last]) == answers[one.example_id]
            assert one.example_id not in tested
    assert set(rows["mixture"]) == {"untuned", "none", *(row["mixture"] for row in plan["mixtures"])}


def test_without_a_mixture_it_is_the_training_of_the_run(run, plan):
    rows = run.get("mixture").set_index("example_id")
    tests = [one for group in resources.questions(run).values() for one in group if one.example_id in {
        name for row in plan["domains"] for name in row["test"]}]
    for name, model in (("untuned", resources.lm(run)), ("none", resources.tuned(run))):
        own = rows[rows["mixture"] == name]
        found = item_measures(evaluate(model, tests, kinds=run.settings.eval_kinds))
        for measure in ("accuracy", "p_right", "bits"):
            assert own.loc[found.index, measure].to_dict() == pytest.approx(found[measure].to_dict(), rel=1e-3)
        held_out = item_measures(evaluate(model, resources.held_out(run), kinds=("solution",)))["bits"]
        held_out.index = "held out: " + held_out.index
        assert own[own["domain"] == "training set"]["bits"].to_dict() == pytest.approx(held_out.to_dict(), rel=1e-3)


def test_a_mixture_of_no_examples_is_bit_for_bit_the_training_of_the_run(run, plan, monkeypatch):
    first = plan["mixtures"][0]
    empty = {**plan, "mixtures": [{**first, "examples": dict.fromkeys(first["examples"], 0)}]}
    other = run.variant(mixture_steps=[0.25])
    get = type(run).get
    monkeypatch.setattr(type(run), "get", lambda self, name: empty if name == "mixture_plan" else get(self, name))
    monkeypatch.setattr(type(run), "stored", lambda self, name: True)
    _, (adapter,), rows = trained_on(run, monkeypatch, lambda: other.get("mixture"))
    plain = load_file(get(run, "sft") / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == plain.keys() and all(torch.equal(own, plain[name]) for name, own in adapter.items())
    first, second = (rows[rows["mixture"] == name]["bits"].to_numpy() for name in ("none", "sts 0.5"))
    assert (first == second).all()


def test_keys_follow_the_plan_and_the_training(run):
    keys = {name: run.key(name) for name in ("mixture_plan", "mixture_answers", "mixture")}

    def changed(**changes):
        return {name for name, key in keys.items() if run.variant(**changes).key(name) != key}

    assert changed(mixture_steps=[1.0]) == changed(seed=1) == set(keys)
    assert changed(mixture_tokens=9) == {"mixture_answers", "mixture"} and changed(sft_lr=0.5) == {"mixture"}
    assert changed(selective_latents=[2]) == set()


# --- what a page says -----------------------------------------------------------------------------------------------

class Stub:
    def __init__(self, bits, steps=(1.0,), seed=0):
        self.rows = pandas.DataFrame([
            {"mixture": mixture, "domain": domain, "example_id": f"{domain} {place}", "bits": one}
            for mixture, own in bits.items() for domain, values in own.items() for place, one in enumerate(values)])
        self.settings = type("Settings", (), {"mixture_steps": list(steps), "bootstrap": 2000, "seed": seed})

    def get(self, stage):
        return self.rows if stage == "mixture" else {"domains": [{"domain": "law"}, {"domain": "art"}]}


def judged(name, *runs):
    """Evidence and verdict on a claim from mixtures at several seeds."""
    seeds = [own.settings.seed for own in runs]
    frame = stages.mixture_effects(runs, seeds, 2000, 0)
    claim = claims.read_claims()[1][name]
    found = evidence.row(SimpleNamespace(get=lambda stage: frame, alone=lambda seed: None, settings=SimpleNamespace(
        seed=0, seeds=[0, 1, 2], mixture_seeds=seeds)), **claim.arguments)
    assert found.seeds == len(runs)
    return found, claim.judge(found)


def questions_of(law, art, held_out):
    return {"law": law, "art": art, "training set": held_out}


NOISE = np.array([0.0, 0.01, -0.01, 0.02])
BITS = {"untuned": questions_of(1 + NOISE, 1 + NOISE, 2 + NOISE), "none": questions_of(
    1.3 + NOISE, 1.2 + NOISE, 1.5 + 0.9 * NOISE)}


@pytest.mark.parametrize(("law", "art", "verdict"), [(1.1, 1.1, HELD), (1.1, 1.25, IN_PART), (1.4, 1.1, NOT_HELD)])
def test_both_domains_must_be_kept_up(law, art, verdict):
    bits = BITS | {"sts 1": questions_of(law + 0.5 * NOISE, art + 0.5 * NOISE, 1.5 + NOISE)}
    found, word = judged("mixture-keeps", Stub(bits))
    assert found.value == pytest.approx(1.3 - law + 0.5 * NOISE.mean()) and found.n == 4
    other, = found.against.values()
    assert other.value == pytest.approx(1.2 - art + 0.5 * NOISE.mean()) and word == verdict


def test_every_seed_must_agree():
    good, bad = (BITS | {"sts 1": questions_of(level + 0.5 * NOISE, level + 0.5 * NOISE, 1.5 + NOISE)}
                 for level in (1.1, 1.4))
    assert judged("mixture-keeps", Stub(good), Stub(good, seed=1))[1] == HELD
    for first, second in ((good, bad), (bad, good)):
        found, word = judged("mixture-keeps", Stub(first), Stub(second, seed=1))
        assert word == NOT_HELD and found.value == pytest.approx(1.3 - 1.4 + 0.5 * NOISE.mean())


def test_a_surer_seed_does_not_stand_in_for_a_less_sure_one():
    sure = BITS | {"sts 1": questions_of(1.2 + NOISE, 1.1 + NOISE, 1.5 + NOISE)}
    noisy = BITS | {"sts 1": questions_of(1.1 + 10 * NOISE, 1.1 + NOISE, 1.5 + NOISE)}  # a larger mean
    found, word = judged("mixture-keeps", Stub(sure), Stub(noisy, seed=1))
    assert word == NOT_HELD and found.low < 0 < 0.1 < found.value


def test_what_gains_nothing_has_no_share_to_keep():
    worse = BITS | {"none": questions_of(1.3 + NOISE, 1.2 + NOISE, 2.05 + NOISE),
                    "sts 1": questions_of(1.1 + NOISE, 1.1 + NOISE, 2.1 + NOISE)}
    good = BITS | {"sts 1": questions_of(1.1 + NOISE, 1.1 + NOISE, 1.5 + NOISE)}
    assert judged("mixture-gain", Stub(good))[1] == HELD
    assert judged("mixture-gain", Stub(good), Stub(worse, seed=1))[1] == NOT_TESTABLE


def test_what_training_does_not_harm_cannot_be_kept_up():
    harmless = BITS | {"untuned": questions_of(1 + NOISE, 1.3 + NOISE, 2 + NOISE),
                       "sts 1": questions_of(1.1 + NOISE, 1.1 + NOISE, 1.5 + NOISE)}
    harmful = harmless | {"untuned": BITS["untuned"]}
    assert judged("mixture-keeps", Stub(harmful))[1] == HELD
    for runs in ((Stub(harmless),), (Stub(harmful), Stub(harmless, seed=1))):
        found, word = judged("mixture-keeps", *runs)
        assert "not both domains were harmed" in found.unable and word == NOT_TESTABLE


def test_the_division_is_compared_with_an_even_one_of_the_same_step():
    bits = BITS | {f"{kind} {step}": questions_of(level + NOISE * 0.5, level + NOISE, 1.5 + NOISE)
                   for kind, step, level in (
                       ("sts", "1", 1.0), ("even", "1", 1.1), ("sts", "0.5", 3.0), ("even", "0.5", 0.0))}
    found, word = judged("mixture-proportion", Stub(bits, (0.5, 1.0)))
    assert found.value == pytest.approx(0.1) and word == HELD
    del bits["even 1"]
    with pytest.raises(StsError, match="Not in stage mixture_effects of this run: even"):
        judged("mixture-proportion", Stub(bits, (0.5, 1.0)))


def test_the_share_of_the_gain_is_a_ratio_of_means_with_a_bootstraps_width():
    generator = np.random.default_rng(0)
    plain, mixed = 0.5 + 0.1 * generator.standard_normal(200), 0.45 + 0.1 * generator.standard_normal(200)
    start = 2 + generator.standard_normal(200)
    one = np.zeros(1)
    found, word = judged("mixture-gain", Stub({name: questions_of(one, one, start - less) for name, less in (
        ("untuned", 0), ("none", plain), ("sts 1", mixed))}))
    assert found.value == pytest.approx(mixed.mean() / plain.mean()) and found.n == 200
    picked = generator.integers(0, 200, (4000, 200))
    low, high = np.quantile(mixed[picked].mean(1) / plain[picked].mean(1), [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert word == (HELD if found.low >= 0.8 else NOT_HELD) == HELD


def test_a_run_without_mixtures_is_not_judged(tmp_path):
    other = sts.open_run("smoke", results=tmp_path, mixture_steps=[])
    for name in ("mixture-keeps", "mixture-gain", "mixture-proportion"):
        found, word, why = evidence.weigh(other, replace(claims.read_claims()[1][name], learned="no"))
        assert found is None and word == NOT_DONE and "mixture_steps is empty" in why
    assert not list(tmp_path.glob("smoke/stages/*"))


def test_results_are_plain(run):
    json.dumps([run.get("mixture_plan"), run.get("mixture_answers")], allow_nan=False)
    assert set(run.get("mixture").columns) >= {"mixture", "domain", "example_id", "bits", "accuracy", "p_right"}
