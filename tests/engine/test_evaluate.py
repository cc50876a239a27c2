"""Log-likelihoods against the model's own forward pass, one text at a time, and against lm-evaluation-harness."""

import dataclasses

import pytest
import torch

from sts.data.load import Example, load_examples
from sts.data.prompts import solution_text
from sts.engine.evaluate import KINDS, PASS_TOKENS, evaluate, loglikelihoods, pack
from sts.engine.models import load_model
from sts.engine.work import Work
from sts.errors import StsError

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
        "letter": sum(len(one.options) for one in examples), "solution": 50}
    by_id = {example.example_id: example for example in examples}
    for row in rows.itertuples():
        example = by_id[row.example_id]
        prompt = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join(
                [example.question, *(f"({'ABCDE'[i]}) {text}" for i, text in enumerate(example.options))])}],
            tokenize=False, add_generation_prompt=True)
        if row.kind == "letter":
            pair, characters = (prompt + "The answer is (", "ABCDE"[row.option]), 1
        else:
            pair, characters = (prompt, solution_text(example)), len(solution_text(example))
        assert row.loglikelihood == pytest.approx(log_probability(lm, *pair), abs=1e-3, rel=1e-5)
        assert row.characters == characters
        assert row.is_right == (row.kind == "solution" or row.option == example.answer_index)


def test_of_an_answer_without_worked_steps_the_opening_words_are_context(lm_of):
    """All such answers share them, and training moves them in every domain."""
    lm = lm_of("llama")
    example = dataclasses.replace(EXAMPLES[2], solution="")
    [row] = evaluate(lm, [example], kinds=["solution"]).itertuples()
    prompt = lm.tokenizer.apply_chat_template([{"role": "user", "content": f"{example.question}\n(A) 10\n(B) 11"}],
                                              tokenize=False, add_generation_prompt=True)
    assert row.loglikelihood == pytest.approx(log_probability(lm, prompt + "The answer is (", "B) 11."), abs=1e-3)
    assert row.characters == len("B) 11.")


def test_only_the_kinds_asked_for_are_scored(lm_of):
    lm = lm_of("llama")
    assert set(evaluate(lm, EXAMPLES, kinds=["letter"])["kind"]) == {"letter"}
    with pytest.raises(StsError, match="None of the 1 examples has anything to score"):
        evaluate(lm, EXAMPLES[-1:], kinds=["letter"])


def test_behind_shots_worked_solutions_are_left_out(lm_of):
    shots = {EXAMPLES[2].domain: EXAMPLES[2:3]}
    rows = evaluate(lm_of("llama"), EXAMPLES[2:3], kinds=["solution", "text"], shots=shots)
    assert rows[["kind", "option"]].to_numpy().tolist() == [["text", 0], ["text", 1]]
    with pytest.raises(StsError, match="eval_kinds names neither"):
        evaluate(lm_of("llama"), EXAMPLES[2:3], kinds=["solution"], shots=shots)


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tiny_models):
    lm = load_model(str(tiny_models["llama"]))
    lm.tokenizer.chat_template = None
    rows = evaluate(lm, EXAMPLES[2:3], kinds=KINDS).set_index(["kind", "option"])
    # Bits per character divide what a target takes by its own length: the blank is scored, so it is counted.
    assert rows.loc[("solution", -1), "characters"] == len(" " + solution_text(EXAMPLES[2]))
    prompt = f"Question: {EXAMPLES[2].question}\n(A) 10\n(B) 11\nAnswer:"
    for key, context, target in ((("letter", 0), " The answer is (", "A"),
                                 (("solution", -1), "", f" {solution_text(EXAMPLES[2])}")):
        wanted = log_probability(lm, prompt + context, target)
        assert rows.loc[key, "loglikelihood"] == pytest.approx(wanted, abs=1e-3)


def test_a_base_models_bos_stands_once_before_the_prompt(lm_of):
    lm = lm_of("gemma3")
    bos = lm.tokenizer.bos_token
    rows = evaluate(lm, EXAMPLES[2:3], kinds=KINDS).set_index(["kind", "option"])
    prompt = f"{bos}Question: {EXAMPLES[2].question}\n(A) 10\n(B) 11\nAnswer:"
    for key, context, target in ((("letter", 1), " The answer is (", "B"),
                                 (("solution", -1), "", f" {solution_text(EXAMPLES[2])}")):
        # Spelled out, the tokenizer reads it as the one special token.
        assert rows.loc[key, "loglikelihood"] == pytest.approx(log_probability(lm, prompt + context, target), abs=1e-3)


def test_work_and_progress_are_reported(lm_of):
    work, seen = Work(), []
    evaluate(lm_of("llama"), EXAMPLES, report=seen.append, work=work)
    assert seen[-1] == 1.0
    assert 0 < work.tokens <= work.padded_tokens and work.passes == work.padded_tokens


def test_an_item_longer_than_the_context_is_named(lm_of):
    long = Example("very-long", "law", "word " * 9000, ("yes", "no"), 0, "yes", "It is so.")
    with pytest.raises(StsError, match="very-long needs .* tokens; the model's context is 8192"):
        evaluate(lm_of("llama"), [long])


def test_a_bf16_model_is_summed_in_float32(tiny_models):
    lm = load_model(str(tiny_models["llama"]), dtype="bfloat16")
    values = evaluate(lm, EXAMPLES)["loglikelihood"]
    # A sum in bf16 has eight bits: every value beyond 128 nats would be a whole number.
    assert any(abs(value - round(value)) > 0.01 for value in values if value < -128)


def test_a_broken_model_is_named_not_averaged(tiny_models):
    lm = load_model(str(tiny_models["llama"]), dtype="float32")
    lm.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(StsError, match="item-.*log-likelihood is nan"):
        evaluate(lm, EXAMPLES)


# --- packed rows --------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(3)
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")


def ids(length: int) -> list[int]:
    return torch.randint(5, 290, (length,), generator=GENERATOR).tolist()


def token_requests() -> list[tuple[list[int], list[int]]]:
    """Ten options, single letters, a solution that begins as they do and one that does not, short ones; all mixed."""
    requests = []
    for length in (20, 60, 61, 64, 130):  # the Gemmas' window is 32
        context, cue = ids(length), ids(5)
        requests += [([*context, *cue], ids(count)) for count in (3, 1, 7, 12, 2, 5, 9, 4, 6, 8)]
        requests += [([*context, *cue], [letter]) for letter in (40, 41, 42, 43)]
        requests += [(context, ids(45)), (context, [*cue, 41, *ids(9)])]
    requests += [(ids(70), ids(10)), (ids(3), ids(2)), ([7], ids(30)), ([7], ids(31))]
    return [requests[index] for index in torch.randperm(len(requests), generator=GENERATOR).tolist()]


REQUESTS = token_requests()


def alone(model, context, target) -> float:
    """The target's log-likelihood by one plain forward pass."""
    with torch.no_grad():
        log_p = model(torch.tensor([[*context, *target]])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(context) - 1 + place, token].item() for place, token in enumerate(target))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_request_at_a_time(lm_of, family, batch):
    lm = lm_of(family)
    for (context, target), value in zip(REQUESTS, loglikelihoods(lm, REQUESTS, batch=batch), strict=True):
        assert value == pytest.approx(alone(lm.model, context, target), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_are_those_of_the_harness_own_class(lm_of, family):
    from lm_eval.models.huggingface import HFLM

    lm = lm_of(family)
    theirs = HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=4, max_length=8192)
    wanted = theirs._loglikelihood_tokens([(("c", "t"), *request) for request in REQUESTS], disable_tqdm=True)
    assert loglikelihoods(lm, REQUESTS) == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_ten_options_read_the_context_once(lm_of):
    context, options, work = ids(200), [ids(6) for _ in range(10)], Work()
    loglikelihoods(lm_of("llama"), [(context, one) for one in options], work=work)
    assert work.tokens == work.padded_tokens == 200 + 10 * 5  # the last token of each is predicted, not read
    assert work.layer_tokens == 2 * work.padded_tokens


def test_letters_and_a_solution_that_begins_as_they_do_are_one_row(lm_of):
    work, context = Work(), ids(90)
    loglikelihoods(lm_of("llama"), [(context, [letter]) for letter in range(40, 50)] + [(context[:80], [
        *context[80:], 44, *ids(20)])], work=work)
    assert work.tokens == work.padded_tokens == 90 + 20


def test_logits_are_computed_where_they_are_needed(lm_of, monkeypatch):
    lm, sizes = lm_of("llama"), []
    forward = lm.model.lm_head.forward
    monkeypatch.setattr(lm.model.lm_head, "forward", lambda states: sizes.append(states.shape[:2]) or forward(states))
    context = ids(300)
    loglikelihoods(lm, [(context, ids(3)), (context, ids(4))])
    assert [tuple(size) for size in sizes] == [(1, 3 + 4 - 1)]  # the first token of both is predicted at one place


def test_progress_ends_at_one(lm_of):
    seen = []
    loglikelihoods(lm_of("llama"), REQUESTS, batch=2, report=seen.append)
    assert seen == sorted(seen) and len(seen) > 3 and seen[-1] == 1.0


def test_rows_are_packed_where_that_saves_a_pass():
    base = tuple(range(100))
    sequences = [base, (*base, 7, 7), (*base, 8), (1, 2, 3), (1, 2, 3, 4), tuple(range(200, 230)),
                 (*range(200, 229), 5)]
    rows = pack(sequences)
    assert sorted(ids for row in rows for ids in row.sequences) == sorted(sequences)
    assert [(row.shared, len(row)) for row in rows if len(row.sequences) > 1] == [(100, 103)]
    assert PASS_TOKENS > 29
    # A long context with many continuations is cut into rows that memory has room for.
    many = pack([(*base, *[place] * 90) for place in range(200)])
    assert all(len(row) <= 2048 for row in many) and len(many) == 200 * 90 // (2048 - 100) + 1


def test_bfloat16_differs_by_its_own_noise_alone(tiny_models):
    lm, exact = (load_model(str(tiny_models["llama"]), dtype=dtype) for dtype in ("bfloat16", "float32"))
    noise = total = 0.0
    for (context, target), value in zip(REQUESTS, loglikelihoods(lm, REQUESTS), strict=True):
        wanted = alone(exact.model, context, target)
        noise += abs(alone(lm.model, context, target) - wanted)
        total += abs(value - wanted)
    assert 0 < total < 1.5 * noise


def test_a_model_whose_positions_change_with_the_length_runs_every_sequence_whole(lm_of):
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=320,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0})).eval()

    work, context = Work(), ids(80)
    requests = [(context, one) for one in (ids(4), ids(4), ids(9))]
    # Rescaled rotary positions are remembered from call to call, so every pass gets a fresh model.
    found = loglikelihoods(dataclasses.replace(lm_of("llama"), model=make()), requests, batch=4, work=work)
    assert work.tokens == work.padded_tokens == sum(80 + len(one) - 1 for _, one in requests)
    for (_, one), value in zip(requests, found, strict=True):
        assert value == pytest.approx(alone(make(), context, one), abs=1e-4)


@pytest.mark.parametrize("most", [500, 110])
def test_running_out_of_memory_goes_on_in_halves(lm_of, monkeypatch, most):
    """At most 500 positions: not several contexts at once; at most 110: not all options of one."""
    lm, work = lm_of("llama"), Work()
    requests = [(context, option) for context in [ids(90) for _ in range(4)]
                for option in [ids(14) for _ in range(9)]]
    wanted, forward = loglikelihoods(lm, requests, batch=4), lm.model.forward

    def small_only(input_ids, **inputs):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(lm.model, "forward", small_only)
    assert loglikelihoods(lm, requests, batch=4, work=work) == pytest.approx(wanted, abs=1e-4)
    assert len(work.notes) == 1 and "Memory ran out" in work.notes[0]
    most = 50
    with pytest.raises(StsError, match="sequence of 103 tokens does not fit in the memory of cpu"):
        loglikelihoods(lm, requests)


def test_other_errors_are_not_swallowed(lm_of, monkeypatch):
    lm = lm_of("llama")

    def broken(**inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        loglikelihoods(lm, REQUESTS[:2])


def test_a_tuned_model_is_scored_with_its_adapter(tiny_models, lm_of, tmp_path):
    from peft import LoraConfig, get_peft_model

    from sts.engine.finetune import load_tuned

    tuned = get_peft_model(load_model(str(tiny_models["llama"])).model,
                           LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    lm = load_tuned(load_model(str(tiny_models["llama"])), tmp_path)
    for (context, target), value in zip(REQUESTS[:12], loglikelihoods(lm, REQUESTS[:12]), strict=True):
        assert value == pytest.approx(alone(tuned, context, target), abs=1e-4)
        assert abs(value - alone(lm_of("llama").model, context, target)) > 1e-3
