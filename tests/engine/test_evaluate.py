"""Log-likelihoods and domain shifts against independent computations."""

import math

import numpy
import pandas
import pytest
import torch

from sts.data.load import Example, load_examples
from sts.data.prompts import solution_text
from sts.engine.evaluate import KINDS, domain_shifts, evaluate, item_measures, tied_share
from sts.engine.work import Work
from sts.errors import StsError
from sts.measure.items import mcnemar_p

EXAMPLES = [
    Example(f"item-{i}", domain, f"Which number is the largest in case {i}?", options, answer, options[answer],
            "We compare them one by one.")
    for i, (domain, options, answer) in enumerate([
        ("math", ("two", "nine", "four"), 1), ("law", ("a court", "a field", "a tree", "a song"), 0),
        ("math", ("10", "11"), 1), ("law", ("yes", "no", "perhaps"), 2)])
]
EXAMPLES.append(Example("open", "math", "What is 5 plus 6?", (), -1, "11", "5 + 6 = 11\n#### 11"))


def log_probability(lm, context: str, target: str) -> float:
    """Sum of log-probabilities of the target's tokens, by the model's own forward pass, one text at a time."""
    whole = lm.tokenizer(context + target, add_special_tokens=False)["input_ids"]
    start = len(lm.tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_p = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_p[position - 1, whole[position]].item() for position in range(start, len(whole)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loglikelihoods_agree_with_the_models_own_forward_pass(lm_of, family, batch):
    lm = lm_of(family)
    rows = evaluate(lm, EXAMPLES, batch=batch)
    assert len(rows) == (3 + 4 + 2 + 3) + 5
    for example in EXAMPLES:
        prompt = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join(
                [example.question, *(f"({'ABCD'[i]}) {text}" for i, text in enumerate(example.options))])}],
            tokenize=False, add_generation_prompt=True)
        own = rows[rows["example_id"] == example.example_id]
        for row in own.itertuples():
            if row.kind == "letter":
                expected = log_probability(lm, prompt + "The answer is (", "ABCD"[row.option])
                assert row.is_right == (row.option == example.answer_index)
            else:
                letter = "ABCD"[example.answer_index]
                target = (f"We compare them one by one. The answer is ({letter}) {example.answer}."
                          if example.options else example.solution)
                expected = log_probability(lm, prompt, target)
                assert row.characters == len(target)
            assert row.loglikelihood == pytest.approx(expected, abs=2e-3)


def test_fifty_items_agree_with_one_forward_pass_for_each_target(lm_of):
    lm = lm_of("qwen2")
    examples = load_examples("mmlu_exemplars", limit=50, seed=3)
    rows = evaluate(lm, examples, kinds=KINDS)
    assert rows["example_id"].nunique() == 50
    assert rows.groupby("kind").size().to_dict() == {
        "letter": sum(len(one.options) for one in examples), "option": sum(len(one.options) for one in examples),
        "solution": 50}
    by_id = {example.example_id: example for example in examples}
    for row in rows.itertuples():
        example = by_id[row.example_id]
        prompt = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join(
                [example.question, *(f"({'ABCDE'[i]}) {text}" for i, text in enumerate(example.options))])}],
            tokenize=False, add_generation_prompt=True)
        if row.kind == "letter":
            pair, characters = (prompt + "The answer is (", "ABCDE"[row.option]), 1
        elif row.kind == "option":
            pair = (prompt + "The answer is", " " + example.options[row.option])
            characters = len(example.options[row.option])
        else:
            pair, characters = (prompt, solution_text(example)), len(solution_text(example))
        assert row.loglikelihood == pytest.approx(log_probability(lm, *pair), abs=1e-3, rel=1e-5)
        assert row.characters == characters
        assert row.is_right == (row.kind == "solution" or row.option == example.answer_index)


def test_only_the_kinds_asked_for_are_scored(lm_of):
    lm = lm_of("llama")
    assert set(evaluate(lm, EXAMPLES, kinds=["option"])["kind"]) == {"option"}
    items = item_measures(evaluate(lm, EXAMPLES, kinds=["option"]))
    assert items[["accuracy", "p_right", "bits", "accuracy_generated"]].isna().all(axis=None)
    assert items["accuracy_norm"].notna().sum() == 4  # the open question has no options
    with pytest.raises(StsError, match="Kind of evaluation 'letters' is not known. Valid: letter, option, solution"):
        evaluate(lm, EXAMPLES, kinds=["letters"])
    with pytest.raises(StsError, match="None of the 1 examples has anything to score by option"):
        evaluate(lm, EXAMPLES[-1:], kinds=["option"])


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tiny_models):
    from sts.engine.models import load_model

    lm = load_model(str(tiny_models["llama"]))
    lm.tokenizer.chat_template = None
    rows = evaluate(lm, EXAMPLES[2:3], kinds=KINDS).set_index(["kind", "option"])
    # Bits per character divide what a target takes by its own length: the blank is scored, so it is counted.
    assert rows.loc[("solution", -1), "characters"] == len(" " + solution_text(EXAMPLES[2]))
    assert rows.loc[("option", 1), "characters"] == len("11")  # as the harness's acc_norm, without the blank
    prompt = f"Question: {EXAMPLES[2].question}\n(A) 10\n(B) 11\nAnswer:"
    for key, context, target in ((("letter", 0), " The answer is (", "A"), (("option", 1), " The answer is", " 11"),
                                 (("solution", -1), "", f" {solution_text(EXAMPLES[2])}")):
        wanted = log_probability(lm, prompt + context, target)
        assert rows.loc[key, "loglikelihood"] == pytest.approx(wanted, abs=1e-3)


def test_a_base_models_bos_stands_once_before_the_prompt(lm_of):
    lm = lm_of("gemma3")
    bos = lm.tokenizer.bos_token
    rows = evaluate(lm, EXAMPLES[2:3], kinds=KINDS).set_index(["kind", "option"])
    prompt = f"{bos}Question: {EXAMPLES[2].question}\n(A) 10\n(B) 11\nAnswer:"
    for key, context, target in ((("letter", 1), " The answer is (", "B"), (("option", 0), " The answer is", " 10"),
                                 (("solution", -1), "", f" {solution_text(EXAMPLES[2])}")):
        # Spelled out, the tokenizer reads it as the one special token.
        assert rows.loc[key, "loglikelihood"] == pytest.approx(log_probability(lm, prompt + context, target), abs=1e-3)


def test_work_and_progress_are_reported(lm_of):
    work, seen = Work(), []
    evaluate(lm_of("llama"), EXAMPLES, report=seen.append, work=work)
    assert seen[-1] == 1.0
    assert 0 < work.tokens <= work.padded_tokens and work.passes == work.padded_tokens


def frame(values):
    """(example, domain, kind, option, loglikelihood, characters, is_right) rows as evaluate returns them."""
    return pandas.DataFrame(values, columns=["example_id", "domain", "kind", "option", "loglikelihood", "characters",
                                             "is_right"])


def test_measures_by_hand():
    rows = frame([
        ("a", "law", "letter", 0, math.log(0.2), 2, False), ("a", "law", "letter", 1, math.log(0.3), 2, True),
        ("a", "law", "solution", -1, -20 * math.log(2), 10, True),
        ("b", "law", "letter", 0, math.log(0.1), 2, True), ("b", "law", "letter", 1, math.log(0.4), 2, False),
        ("b", "law", "solution", -1, -3 * math.log(2), 6, True)])
    items = item_measures(rows)
    assert items["p_right"].to_dict() == pytest.approx({"a": 60.0, "b": 20.0})
    assert items["accuracy"].to_dict() == {"a": 100.0, "b": 0.0}
    assert items["bits"].to_dict() == pytest.approx({"a": 2.0, "b": 0.5})
    assert items["bits_answer"].to_dict() == pytest.approx({"a": 20.0, "b": 3.0})


def test_ties_for_the_likeliest_letter_are_counted():
    rows = frame([("a", "law", "letter", 0, -1.0, 1, True), ("a", "law", "letter", 1, -1.0, 1, False),
                  ("b", "law", "letter", 0, -1.0, 1, True), ("b", "law", "letter", 1, -2.0, 1, False),
                  ("c", "law", "letter", 0, -1.0, 1, True), ("c", "law", "letter", 1, -2.0, 1, False),
                  ("c", "law", "letter", 2, -2.0, 1, False),
                  ("c", "law", "solution", -1, -1.0, 10, True)])
    assert tied_share(rows) == pytest.approx(1 / 3)  # the two letters of c that tie are not the likeliest
    assert numpy.isnan(tied_share(rows.query("kind == 'solution'")))


def test_normalised_accuracy_divides_by_characters():
    rows = frame([
        # The second option is likelier, the first one is likelier per character.
        ("a", "law", "option", 0, -8.0, 10, True), ("a", "law", "option", 1, -2.0, 2, False),
        ("b", "law", "option", 0, -8.0, 8, True), ("b", "law", "option", 1, -1.5, 2, False)])
    assert item_measures(rows)["accuracy_norm"].to_dict() == {"a": 100.0, "b": 0.0}


def letters(item, right, domain="law"):
    """Two options' letters, of which the right one is the likelier or not."""
    return [(item, domain, "letter", 0, -1.0 if right else -3.0, 1, True),
            (item, domain, "letter", 1, -2.0, 1, False)]


def test_mcnemar_counts_the_items_that_turn():
    before = [row for i in range(20) for row in letters(f"i{i}", i >= 9)]  # nine wrong
    after = [row for i in range(20) for row in letters(f"i{i}", i != 19 and i != 0)]  # eight turn right, one wrong
    shifts = domain_shifts(frame(before), frame(after)).set_index("measure")
    # Nine items turned, eight of them one way: two-sided binomial, 2 * (1 + 9) / 2**9.
    assert shifts.loc["accuracy", "mcnemar_p"] == pytest.approx(2 * (1 + 9) / 512)
    assert shifts.loc["accuracy", "shift"] == pytest.approx(100 * (8 - 1) / 20)
    assert numpy.isnan(shifts.loc["p_right", "mcnemar_p"])
    same = domain_shifts(frame(before), frame(before)).set_index("measure")
    assert same.loc["accuracy", "mcnemar_p"] == 1.0


def test_mcnemar_agrees_with_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar

    generator = numpy.random.default_rng(1)
    for _ in range(20):
        before, after = generator.random((2, 30)) < generator.random((2, 1))
        table = [[(before & after).sum(), (before & ~after).sum()], [(~before & after).sum(), (~before & ~after).sum()]]
        assert mcnemar_p(before, after) == pytest.approx(mcnemar(table, exact=True).pvalue)
    with pytest.raises(StsError, match="equal length"):
        mcnemar_p([True], [True, False])


def test_domain_shift_is_the_paired_mean_change_with_its_sign():
    generator = numpy.random.default_rng(0)
    before, after = [], []
    for index in range(40):
        domain = "law" if index % 2 else "math"
        bits = generator.normal(30, 5)
        change = -4 if domain == "math" else 0
        before.append((f"i{index}", domain, "solution", -1, -bits * math.log(2), 10, True))
        after.append((f"i{index}", domain, "solution", -1,
                      -(bits + change + generator.normal(0, 1)) * math.log(2), 10, True))
    shifts = domain_shifts(frame(before), frame(list(reversed(after)))).set_index("domain")
    assert list(shifts["measure"].unique()) == ["bits", "bits_answer"]  # nothing has options, so no accuracy
    shifts = shifts[shifts["measure"] == "bits"]
    assert shifts.loc["math", "shift"] == pytest.approx(-0.4, abs=0.06)
    assert shifts.loc["math", "high"] < 0 < shifts.loc["law", "high"]
    assert shifts.loc["law", "low"] < 0
    assert (shifts["n"] == 20).all()
    assert shifts.loc["math", "shift"] == pytest.approx(shifts.loc["math", "after"] - shifts.loc["math", "before"])


def test_different_items_before_and_after_are_an_error():
    one = frame([("a", "law", "solution", -1, -1.0, 5, True)])
    other = frame([("b", "law", "solution", -1, -1.0, 5, True)])
    with pytest.raises(StsError, match="same examples"):
        domain_shifts(one, other)


def test_an_item_longer_than_the_context_is_named(lm_of):
    long = Example("very-long", "law", "word " * 9000, ("yes", "no"), 0, "yes", "It is so.")
    with pytest.raises(StsError, match="very-long needs .* tokens; the model's context is 8192"):
        evaluate(lm_of("llama"), [long])


def test_a_bf16_model_is_summed_in_float32(tiny_models):
    from sts.engine.models import load_model

    lm = load_model(str(tiny_models["llama"]), dtype="bfloat16")
    values = evaluate(lm, EXAMPLES)["loglikelihood"]
    # A sum in bf16 has eight bits: every value beyond 128 nats would be a whole number.
    assert any(abs(value - round(value)) > 0.01 for value in values if value < -128)


def test_a_broken_model_is_named_not_averaged(tiny_models):
    from sts.engine.models import load_model

    lm = load_model(str(tiny_models["llama"]), dtype="float32")
    lm.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(StsError, match="item-.*log-likelihood is nan"):
        evaluate(lm, EXAMPLES)
