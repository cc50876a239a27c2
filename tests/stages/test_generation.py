"""Answers in words: who is asked what, by which model, and what is made of the scores."""

from functools import partial

import pandas
import pytest
from scipy import stats

import sts
from sts.data.groups import benchmark_questions
from sts.data.load import by_domain, load_examples
from sts.engine.finetune import FineTuning, fine_tune
from sts.engine.models import load_model
from sts.errors import StsError
from sts.stages import training

DOMAINS = {name: own[:4] for name, own in by_domain(load_examples("mmlu_exemplars")).items() if name in ("law", "math")}
HELD_OUT = load_examples("gsm_symbolic", limit=2)
HOW = {"demonstrations": 1, "eval_max_tokens": 6, "eval_batch": 2}


def test_questions_stand_behind_others_of_their_domain_or_behind_those_set_aside():
    (name, asked, worked), = benchmark_questions(["mmlu_pro"], [], DOMAINS, {}, 2, 1, 0).values()
    assert name == "mmlu_pro" and [one.domain for one in asked] == ["law", "math"]
    assert sorted(one.domain for one in worked) == ["law", "law", "math", "math"] and not {*asked} & {*worked}
    (_, asked, worked), = benchmark_questions(["mmlu_pro"], [], DOMAINS, {"law": DOMAINS["law"][:3]}, 2, 0, 0).values()
    assert [one for one in asked if one.domain == "law"] == DOMAINS["law"]  # set aside, so all of them are asked
    assert [one for one in worked if one.domain == "law"] == DOMAINS["law"][:2]
    assert benchmark_questions(["sft_held_out"], HELD_OUT, DOMAINS, {}, 2, 1, 0) == {
        "sft_held_out": ("gsm8k", HELD_OUT, [])}


def test_both_models_answer_the_same_questions(tiny_models, tmp_path):
    load = partial(load_model, str(tiny_models["llama"]), dtype="float32")
    asked = benchmark_questions(["mmlu_pro", "sft_held_out"], HELD_OUT, DOMAINS, {}, 1, 1, 0)
    fine_tune(load(), HELD_OUT, HELD_OUT, FineTuning(2, 0.05, 2, 2, 256, 4, 8, 0), tmp_path)
    before = training.generation_before(load, asked, **HOW)
    after = training.generation_after(load, tmp_path, asked, **HOW)
    assert before["benchmark"].tolist() == ["mmlu_pro"] * 2 + ["sft_held_out"] * 2
    assert before["example_id"].tolist() == after["example_id"].tolist() == [
        one.example_id for _, questions, _ in asked.values() for one in questions]
    assert (before["sha256"] != after["sha256"]).any()  # the tuned model is what answers after


def test_the_change_is_that_of_right_answers():
    def answers(right):
        return pandas.DataFrame({"example_id": [f"q{place}" for place in range(len(right))], "domain": "law",
                                 "correct": right, "benchmark": "mmlu_pro"})

    before, after = answers([True] * 3 + [False] * 17), answers([False] + [True] * 12 + [False] * 7)
    row, = training.generation_shift(before, after, 500, 0).to_dict("records")
    assert (row["benchmark"], row["measure"], row["n"]) == ("mmlu_pro", "accuracy_generated", 20)
    assert (row["before"], row["after"], row["shift"]) == pytest.approx((15, 60, 45))
    assert row["mcnemar_p"] == pytest.approx(stats.binomtest(10, 11).pvalue)  # ten turned right, one wrong


def test_nothing_to_answer_is_said_before_a_model_is_loaded():
    with pytest.raises(StsError, match="eval_generate is empty"):
        training.generation_before(None, {}, **HOW)


def test_keys_follow_what_is_asked(tmp_path):
    def keys(**changed):
        run = sts.open_run("smoke", results=tmp_path, **{"eval_generate": ["mmlu_pro"]} | changed)
        return {name: run.key(name) for name in ("generation_before", "generation_after", "generation_shift")}

    def moved(**changed):
        return {name for name, key in keys(**changed).items() if key != own[name]}

    own = keys()
    assert moved(eval_limit=1) == moved(eval_generate=["sft_held_out"]) == moved(domains=["law"]) == set(own)
    assert moved(sft_lr=0.5) == {"generation_after", "generation_shift"}
    assert moved(bootstrap=300) == {"generation_shift"} and moved(top_n=3) == set()
