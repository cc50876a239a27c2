"""Reinforcement learning rewards what it says, learns from it as GRPO does, can be resumed; at rate 0 it is idle."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import set_seed
from trl.trainer.grpo_trainer import GRPOTrainer

from sts.data.load import load_examples
from sts.data.prompts import make_prompt, question_text
from sts.data.sources import Example
from sts.engine import reinforcement
from sts.engine.finetune import load_tuned
from sts.engine.models import load_model
from sts.engine.reinforcement import is_right, reinforce, right_answer
from sts.errors import StsError

PROBLEMS = load_examples("chain_sum", limit=6)
SETTINGS = {"steps": 4, "lr": 1e-2, "kl": 0.02, "problems": 2, "group": 4, "micro_batch": 4, "tokens": 8,
            "lora_rank": 4, "lora_alpha": 8, "seed": 0}


def fresh(tiny_models):
    return load_model(str(tiny_models["llama"]), dtype="float32")


def run(tiny_models, folder, train=PROBLEMS, **changed):
    return reinforce(fresh(tiny_models), train, folder, **SETTINGS | changed)


@pytest.fixture(scope="module")
def trained(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    return folder, run(tiny_models, folder)


def logits(lm):
    with torch.no_grad():
        return [lm.model(torch.tensor([make_prompt(lm.tokenizer, one.question).ids])).logits for one in PROBLEMS]


def test_at_learning_rate_zero_the_policy_stays_as_it_is(tiny_models, tmp_path):
    log = run(tiny_models, tmp_path, lr=0.0)
    after = logits(load_tuned(fresh(tiny_models), tmp_path))
    assert all(torch.equal(*pair) for pair in zip(logits(fresh(tiny_models)), after, strict=True))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all((tensor == 0).all() for name, tensor in weights.items() if "lora_B" in name)
    assert [row["kl"] for row in log["curve"]] == [0.0] * 4


def test_at_another_rate_it_does_not(tiny_models, trained):
    folder, log = trained
    after = logits(load_tuned(fresh(tiny_models), folder))
    assert not any(torch.allclose(*pair) for pair in zip(logits(fresh(tiny_models)), after, strict=True))
    assert log["curve"][0]["kl"] == 0.0 < min(row["kl"] for row in log["curve"][1:])
    assert log["trained_parameters"] == 2 * 4 * sum(own + other for own, other in (
        (64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)))


def test_rewards_and_advantages_are_those_of_the_answers(tiny_models, monkeypatch, tmp_path):
    # A model that answers at random is hardly ever right: which answers count is decided here.
    monkeypatch.setattr(reinforcement, "is_right", lambda right, text: right == text or len(text) % 2 == 0)
    batch, log = (found := run(tiny_models, tmp_path, group=32, tokens=40))["batch"], found["curve"]
    assert len(batch["answers"]) == 64 and found["group"] == 32
    # One that does not end is not right, whatever it says.
    right = [end * (len(text) % 2 == 0) for text, end in zip(batch["answers"], batch["ended"], strict=True)]
    assert batch["correct"] == right and 0 < sum(right) < sum(batch["ended"]) < 64
    total = [one + 0.1 * end for one, end in zip(right, batch["ended"], strict=True)]
    assert log[-1]["reward"] == pytest.approx(np.mean(total)) and log[-1]["correct"] == np.mean(right)
    assert log[-1]["ended"] == pytest.approx(np.mean(batch["ended"]))
    for start in (0, 32):
        own = np.array(total[start:start + 32])
        expected = (own - own.mean()) / (own.std(ddof=1) + 1e-4)
        assert batch["advantages"][start:start + 32] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(("right", "text", "expected"), [
    ("12", "The answer is 12.", True), ("12", "It is 3 + 9 = 12.0", True), ("12", "12 or 13", False),
    ("12", "3 + 9", False), ("12", "none", False), ("12", "", False), ("-3", "2 - 5 = -3", True),
    ("-3", "The answer is 3", False), ("1,200", "$1200", True), ("1200", "It is 1,200 apples.", True),
    ("0.5", "0.50", True), ("\\frac{1}{2}", "It is \\boxed{0.5}", True), ("\\frac{1}{2}", "It is \\boxed{2}", False),
    ("x", "", False)])
def test_right_is_what_an_answer_ends_with_and_not_the_problem_once_more(right, text, expected):
    assert is_right(right, text) == expected


def generated(monkeypatch):
    """What is asked of the sampler, and what it gives, step by step."""
    asked, given, original = [], [], GRPOTrainer._generate_single_turn

    def watched(self, prompt_ids, *rest):
        found = original(self, prompt_ids, *rest)
        asked.append(prompt_ids)
        given.append(found[0])
        return found
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watched)
    return asked, given


def test_the_model_is_asked_the_tokens_that_are_read_everywhere(tiny_models, monkeypatch, tmp_path):
    lm = fresh(tiny_models)
    special = replace(PROBLEMS[0], question=f"{lm.tokenizer.eos_token} {PROBLEMS[0].question}")
    problems = [special, *PROBLEMS[1:3]]
    asked, given = generated(monkeypatch)
    log = run(tiny_models, tmp_path, problems, steps=3)
    wanted = [list(make_prompt(lm.tokenizer, question_text(one)).ids) for one in problems]
    groups = [own for step in asked for own in step[::4]]
    assert all(step[place] == step[place - place % 4] for step in asked for place in range(8))
    # Two passes over three problems, each in an order of its own.
    generator = random.Random(0)
    assert groups == [wanted[place] for _ in range(2) for place in generator.sample(range(3), 3)]
    ends = [ids[-1] == lm.tokenizer.eos_token_id for ids in given[-1]]
    assert log["batch"]["ended"] == [float(end) for end in ends] and all(len(ids) <= 8 for ids in given[-1])


def test_the_first_step_follows_the_gradient_of_a_plain_loop(tiny_models, monkeypatch, tmp_path):
    asked, given = generated(monkeypatch)
    log = run(tiny_models, tmp_path, steps=1, tokens=40)
    assert {*log["batch"]["advantages"]} > {0.0}
    lm = fresh(tiny_models)
    set_seed(0)
    model = get_peft_model(lm.model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    loss, tokens = 0.0, sum(map(len, given[0]))
    for prompt, answer, advantage in zip(asked[0], given[0], log["batch"]["advantages"], strict=True):
        log_p = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        loss = loss - advantage * log_p[places, answer].sum() / tokens
    loss.backward()
    weights, compared = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero before the step, which is Adam's first: the rate times the gradient's sign
            own = weights[name.replace(".default", "")]
            known = parameter.grad.abs() > 1e-5
            torch.testing.assert_close(own[known], -1e-2 * parameter.grad.sign()[known], rtol=2e-2, atol=0)
            compared += int(known.sum())
    assert compared > 1000


def test_a_model_learns_what_it_is_rewarded_for(tiny_models, tmp_path):
    curve = run(tiny_models, tmp_path, steps=30, problems=4, group=8, micro_batch=32)["curve"]
    first, last = ([row["reward"] for row in part] for part in (curve[:6], curve[-6:]))
    assert np.mean(last) > np.mean(first) + 0.02 and np.mean([row["length"] for row in curve[-6:]]) < 7.5


class Killed(Exception):
    pass


def test_a_killed_run_ends_as_if_it_had_not_been(tiny_models, tmp_path):
    def killed(fraction):
        if fraction > 0.7:
            raise Killed

    whole = run(tiny_models, tmp_path / "whole", steps=8)
    with pytest.raises(Killed):
        run(tiny_models, tmp_path / "killed", steps=8, report=killed)
    torch.manual_seed(99)
    resumed = run(tiny_models, tmp_path / "killed", steps=8)
    assert [row["step"] for row in resumed["curve"]] == list(range(1, 9))
    assert resumed["batch"]["answers"] == whole["batch"]["answers"]
    for name in ("reward", "kl", "length"):
        assert [row[name] for row in resumed["curve"]] == pytest.approx([row[name] for row in whole["curve"]], abs=1e-5)


@pytest.mark.parametrize(("changed", "problem", "message"), [
    ({"lora_rank": 0}, {}, "lora_rank at least 1"), ({"group": 1}, {}, "rl_group is at least 2"),
    ({}, {"answer": "Paris"}, "to x is right cannot be verified"),
    ({}, {"answer": ""}, "to x is right cannot be verified"),
    ({}, {"options": ("1", "2"), "answer_index": 0}, "to x is right cannot be verified"),
    ({"tokens": 100_000}, {}, "x leaves no room for 100000 tokens")])
def test_what_cannot_be_learned_from_is_an_error(tiny_models, tmp_path, changed, problem, message):
    example = replace(Example("x", "math", "1 + 1 =", (), -1, "2", ""), **problem)
    with pytest.raises(StsError, match=message):
        run(tiny_models, tmp_path, [example], **changed)


def test_processes_that_cannot_share_a_step_are_an_error(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(reinforcement, "count", lambda: 3)
    with pytest.raises(StsError, match="rl_problems x rl_group is 8, which 3 processes cannot share equally.*9"):
        run(tiny_models, tmp_path)


def test_a_right_answer_is_one_that_ends(tiny_models, monkeypatch):
    lm, asked = fresh(tiny_models), []
    monkeypatch.setattr(reinforcement, "is_right", lambda right, text: asked.append(text) or right == "all")
    torch.manual_seed(0)
    assert right_answer(lm, replace(PROBLEMS[0], answer="none"), 64, 8) == "" and 0 < len(asked) < 64
    torch.manual_seed(0)
    found = right_answer(lm, replace(PROBLEMS[0], answer="all"), 64, 8)
    assert found == asked[0].strip() and right_answer(lm, replace(PROBLEMS[0], answer="all"), 1, 1) in ("", *asked)
