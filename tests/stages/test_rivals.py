"""Stages of the chapter on rivals, on the smoke run, each recomputed by other means."""

from dataclasses import replace

import pytest
import torch

import sts
from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine.generation import greedy_answer
from sts.run import resources


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("rivals"), rival_problems=6, rival_tokens=12)


def answer_tokens(run, example, **changes):
    """Residual stream after layer 0 on the tokens of an answer, by a plain pass."""
    prompt = solution_prompt(resources.tokenizer(run), replace(
        example, question=question_text(example), options=(), answer_index=-1, **changes))
    with torch.no_grad():
        hidden = resources.lm(run).model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0]
    return hidden[slice(*prompt.question)]


# --- what is read -------------------------------------------------------------------------------------------------

def test_the_untuned_models_own_answers_are_greedy(run):
    rows, train = run.get("greedy_answers"), resources.train(run)
    assert [row["example_id"] for row in rows] == [one.example_id for one in train[:6]]
    for row, example in zip(rows[:3], train, strict=False):
        ids = make_prompt(resources.tokenizer(run), question_text(example)).ids
        assert row["answer"] == greedy_answer(resources.lm(run), ids, 12).strip()
    assert run.provenance("greedy_answers")["work"]["tokens"] > 6 * 12


def test_states_of_training_and_own_answers_are_of_equally_many_tokens(run):
    found, train = run.get("training_answer_states"), resources.train(run)
    answers = run.get("greedy_answers")
    for row, place in enumerate(found["place_E"].tolist()):
        example = train[place]
        for side, own in (("training", answer_tokens(run, example)),
                          ("own", answer_tokens(run, example, solution=answers[place]["answer"]))):
            torch.testing.assert_close(found[f"{side}_raw_ED"][row], own[:12].mean(0), rtol=1e-4, atol=1e-5)
            latents = resources.reader(run).encode(own[:12]).mean(0)
            torch.testing.assert_close(found[f"{side}_sae_EL"][row], latents, rtol=1e-3, atol=1e-4)
    lasts = torch.stack([answer_tokens(run, train[place])[-1] for place in found["place_E"].tolist()])
    torch.testing.assert_close(found["training_last_ED"], lasts, rtol=1e-4, atol=1e-5)


def test_domains_are_read_on_their_right_answers(run):
    found, questions = run.get("domain_answer_states"), resources.questions(run)
    for domain in ("law", "math"):
        own = [answer_tokens(run, one) for one in questions[domain][:run.settings.rival_questions]]
        torch.testing.assert_close(found[f"{domain}/raw_ED"], torch.stack([one.mean(0) for one in own]), rtol=1e-4,
                                   atol=1e-5)
        torch.testing.assert_close(found[f"{domain}/last_D"], torch.stack([one[-1] for one in own]).mean(0), rtol=1e-4,
                                   atol=1e-5)
    assert run.key("domain_answer_states") == run.alone(seed=5).key("domain_answer_states")
