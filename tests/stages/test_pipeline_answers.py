"""Which part of the answers changed: on the smoke run's questions without their worked solutions."""

import dataclasses
import re

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import linregress, pearsonr

import sts
from sts.book import pages_forecast
from sts.data import load as data
from sts.data.prompts import OPENING, question_text, render, solution_text
from sts.engine.evaluate import openings
from sts.engine.finetune import load_tuned
from sts.measure.resampling import partial_correlation
from sts.run import resources as inputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The smoke run on answers that are one sentence, as those of MMLU-Pro's test questions are."""
    with pytest.MonkeyPatch.context() as patch:
        whole = inputs.load_examples
        patch.setattr(inputs, "load_examples", lambda *args, **kwargs: [
            dataclasses.replace(example, solution="") for example in whole(*args, **kwargs)])
        opened = sts.open_run("smoke", results=tmp_path_factory.mktemp("answers"), opening_questions=2)
        opened.get("answer_parts")
        yield opened


def bits_of(lm, context, target):
    """Bits of `target` after `context`, from one pass over both."""
    start, ids = (lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + target))
    with torch.no_grad():
        log_p = torch.log_softmax(lm.model(torch.tensor([ids])).logits[0].float(), -1)
    return -sum(log_p[place - 1, ids[place]].item() for place in range(len(start), len(ids))) / np.log(2)


def test_the_parts_of_an_answer_add_up_to_the_whole(run):
    rows = {row["part"]: row for row in run.get("answer_parts")}
    assert list(rows) == ["opening", "letter", "text", "whole"]
    for field in ("before", "change"):
        assert sum(rows[part][field] for part in ("opening", "letter", "text")) == pytest.approx(rows["whole"][field])
    assert rows["whole"]["questions"] == 2 and rows["whole"]["seeds"] == 2 and rows["whole"]["n"] == 14


def test_each_part_is_its_log_likelihood_after_what_comes_before_it(run):
    tuned = load_tuned(run.load_model(), run.get("sft"))
    expected = {"opening": [], "letter": [], "text": []}
    for group in run.domain_examples().values():
        for example in group[:2]:
            context, solution = render(run.lm.tokenizer, question_text(example)), solution_text(example)
            cut = len(OPENING)
            for part, (start, end) in {"opening": (0, cut), "letter": (cut, cut + 1), "text": (cut + 1, None)}.items():
                expected[part].append([bits_of(lm, context + solution[:start], solution[start:end])
                                       for lm in (run.lm, tuned)])
    alone = {row["part"]: row for row in sts.open_run(
        "smoke", results=run.results, opening_questions=2, seeds=[]).get("answer_parts")}
    for part, values in expected.items():
        before, after = np.mean(values, axis=0)
        assert alone[part]["before"] == pytest.approx(before, rel=1e-3)
        assert alone[part]["change"] == pytest.approx(after - before, abs=5e-3)


def test_parts_are_correlated_as_absolute_changes_of_domains(run):
    row = next(row for row in run.get("answer_parts") if row["part"] == "opening")
    found = []
    for own in (run, run.with_seed(1)):
        before, after = (own.get(f"openings_{when}").set_index("example_id") for when in ("before", "after"))
        change = (after["loglikelihood"] - before["loglikelihood"]).groupby(before["domain"]).mean().abs()
        scores = own.get("scores").query("variant == 'paper'").set_index("domain").loc[change.index]
        found.append(pearsonr(scores["sts_icl"], change)[0])
    assert row["scores"]["sts_icl"]["pearson"] == pytest.approx(np.mean(found))
    interval = row["scores"]["sts_icl"]["pearson_interval"]
    assert interval["low"] < np.mean(found) < interval["high"]


def test_rivals_and_what_is_left_are_correlations_of_the_same_changes(run):
    row, rivals, left = run.get("answer_parts")[0], {"base_bits": [], "answer_shortness": []}, []
    for own in (run, run.with_seed(1)):
        before, after = (own.get(f"openings_{when}").set_index("example_id") for when in ("before", "after"))
        change = (after["loglikelihood"] - before["loglikelihood"]).groupby(before["domain"]).mean().abs()
        known = own.get("baseline_values").set_index("domain").loc[change.index]
        for name, found in rivals.items():
            found.append(pearsonr(known[name], change)[0])
        left.append(partial_correlation(known["sts_act"], change, [
            known[name] for name in ("base_bits", "question_tokens", "answer_shortness")]))
    for name, found in rivals.items():
        assert row["rivals"][name]["pearson"] == pytest.approx(np.mean(found))
        assert 0 < row["rivals"][name]["p"] <= 1 and row["rivals"][name]["pearson_interval"]["low"] < np.mean(found)
    assert row["left"]["sts_act"]["by_seed"] == pytest.approx(left)


def test_shares_say_which_part_makes_the_domains_differ(run):
    rows, changes = run.get("answer_parts"), {}
    for own in (run, run.with_seed(1)):
        before, after = (own.get(f"openings_{when}").set_index("example_id") for when in ("before", "after"))
        whole = [own.get(f"evaluation_{when}").query("is_right and kind == 'solution'").set_index("example_id")[
            "loglikelihood"].loc[before.index] for when in ("before", "after")]
        opening = after["loglikelihood"] - before["loglikelihood"]
        for part, change in (("opening", opening), ("whole", whole[1] - whole[0])):
            changes[part] = changes.get(part, 0) + change.groupby(before["domain"]).mean()
    slope = linregress(changes["whole"], changes["opening"]).slope  # covariance over variance
    assert rows[0]["share"] == pytest.approx(slope)
    assert rows[3]["share"] == pytest.approx(1) == sum(row["share"] for row in rows[:3])
    said = pages_forecast.parts_sentence(run)
    assert f"these parts make: the opening words {slope:.0%}," in said
    assert ("mostly a matter of how likely" in said) == (slope > 0.5)


def test_wrong_letters_stand_beside_the_right_one(run):
    wrong, changes = run.get("answer_parts")[1]["wrong"], []
    for own in (run, run.with_seed(1)):
        bits = []
        for when in ("before", "after"):
            rows = own.get(f"evaluation_{when}")
            asked = rows["example_id"].isin(own.get("openings_before")["example_id"])
            kept = rows[asked & (rows["kind"] == "letter") & ~rows["is_right"]]
            bits.append(-kept.groupby(["domain", "example_id"])["loglikelihood"].mean() / np.log(2))
        changes.append((bits[1] - bits[0]).groupby("domain").mean())
    mean = sum(changes) / 2
    assert wrong == {"change": pytest.approx(mean.mean()), "rose": (mean > 0).sum()}
    said = pages_forecast.parts_sentence(run)
    assert f"wrong letters changed by {mean.mean():+.2f} bits and became more likely in {(mean < 0).sum()}." in said


def test_the_page_says_which_part_changed_and_what_follows(run, monkeypatch):
    said = pages_forecast.parts_sentence(run)
    rows = run.get("answer_parts")
    assert f"changed by {rows[3]['change']:+.2f} (mean over 14 domains and 2 seeds)" in said
    assert said in pages_forecast.forecast_summary(run)
    table = pages_forecast.parts_table(run).set_index("part of the answer")
    assert list(table["mean change"]) == [f"{row['change']:+.2f}" for row in rows]
    assert table.loc["the right letter, given the opening", "domains in which it rose"] == f"{rows[1]['rose']} of 14"
    r = rows[0]["scores"]["sts_icl"]["pearson"]
    assert table.loc["the opening words", "r of STS_ICL with the absolute change"].startswith(f"{r:.2f} (")
    assert f"more likely in {14 - rows[1]['rose']} of 14 domains" in said
    for opening, told in ((0.9, True), (0.2, False), (-0.9, True)):
        faked = [dict(row) for row in rows]
        faked[0]["change"], faked[3]["change"] = opening, 1.0
        monkeypatch.setattr(type(run), "get", lambda self, name, faked=faked: faked)
        assert bool(re.search("says little of what it knows", pages_forecast.parts_sentence(run))) == told


def test_items_with_a_worked_solution_have_no_opening_words(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_examples", data.load_examples)
    worked = sts.open_run("smoke", results=tmp_path, seeds=[])
    assert worked.get("answer_parts") == [] and pages_forecast.parts_table(worked).empty
    assert pages_forecast.parts_sentence(worked) == ""
    examples = [example for group in worked.domain_examples().values() for example in group]
    empty = openings(worked.lm, examples)
    assert empty.empty and isinstance(empty, pandas.DataFrame) and "loglikelihood" in empty
    few = sts.open_run("smoke", results=tmp_path, seeds=[], opening_questions=0)
    assert few.get("answer_parts") == []
