"""The shared-context model class against transformers' logits one request at a time and the harness's own class."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from sts.engine import harness
from sts.engine import prefix as shared_prefix
from sts.engine.harness import PASS_TOKENS, SharedContextLM, batches_of_rows, group_by_context, open_harness
from sts.engine.models import load_model
from sts.engine.residuals import PADDING
from sts.engine.work import Work
from sts.errors import StsError

GENERATOR = torch.Generator().manual_seed(3)
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")


def ids(length: int) -> list[int]:
    return torch.randint(5, 290, (length,), generator=GENERATOR).tolist()


def token_requests() -> list[tuple]:
    """Ten-option questions, single letters, a solution, contexts that begin with others, all mixed."""
    requests = []
    for length in (20, 60, 61, 64, 130):  # the Gemmas' window is 32
        context = ids(length)
        cue = [*context, *ids(5)]
        requests += [(("c", "o"), cue, ids(count)) for count in (3, 1, 7, 12, 2, 5, 9, 4, 6, 8)]
        requests += [(("c", "l"), cue, [letter]) for letter in (40, 41, 42, 43)]
        requests.append((("c", "s"), context, ids(45)))
    requests += [(None, ids(70), ids(10)), (None, ids(3), ids(2)), (None, [7], ids(30)), (None, [7], ids(31))]
    return [requests[index] for index in torch.randperm(len(requests), generator=GENERATOR).tolist()]


REQUESTS = token_requests()


def alone(model, context, continuation) -> tuple[float, bool]:
    """The continuation's log-likelihood by one plain forward pass, and whether greedy decoding gives it."""
    with torch.no_grad():
        log_p = model(torch.tensor([[*context, *continuation]])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return (sum(log_p[place, token].item() for place, token in zip(places, continuation, strict=True)),
            all(log_p[place].argmax() == token for place, token in zip(places, continuation, strict=True)))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_request_at_a_time(lm_of, family, batch):
    lm = lm_of(family)
    found = open_harness(lm, batch=batch)._loglikelihood_tokens(REQUESTS)
    assert len(found) >= 50
    for (_, context, continuation), (value, greedy) in zip(REQUESTS, found, strict=True):
        wanted, is_greedy = alone(lm.model, context, continuation)
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == is_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_harness_own_class(lm_of, family):
    lm = lm_of(family)
    ours, theirs = (kind(lm.model, tokenizer=lm.tokenizer, batch_size=4, max_length=8192)
                    for kind in (SharedContextLM, HFLM))
    wanted = theirs._loglikelihood_tokens(REQUESTS, disable_tqdm=True)
    assert [value for value, _ in ours._loglikelihood_tokens(REQUESTS)] == pytest.approx(
        [value for value, _ in wanted], abs=1e-4)
    # As texts: contexts that do not end with a blank, which the harness would move, and an empty one.
    texts = [("", "A farmer has 12 sheep.")] + [
        (f"Question {number}: how many sheep has the farmer, and why? Answer:", option)
        for number in range(5) for option in (" He has 12.", " He has 5 more than 12.", " None", " 1")]
    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    assert [value for value, _ in ours.loglikelihood(instances)] == pytest.approx(
        [value for value, _ in theirs.loglikelihood(instances, disable_tqdm=True)], abs=1e-4)


def test_greedy_answers_are_recognised(lm_of):
    lm = lm_of("llama")
    context = ids(40)
    with torch.no_grad():
        answer = lm.model.generate(torch.tensor([context]), attention_mask=torch.ones(1, 40, dtype=torch.long),
                                   max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 40:].tolist()
    other = [*answer[:5], (answer[5] + 1) % 290]
    found = open_harness(lm, batch=1)._loglikelihood_tokens([(None, context, answer), (None, context, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_a_window_of_the_context_is_scored_where_it_is_too_long(lm_of):
    lm = lm_of("llama")
    context, continuations = ids(100), [ids(4), ids(6)]
    found = SharedContextLM(lm.model, tokenizer=lm.tokenizer, batch_size=1, max_length=64)._loglikelihood_tokens(
        [(None, context, one) for one in continuations])
    for one, (value, _) in zip(continuations, found, strict=True):
        assert value == pytest.approx(alone(lm.model, context[-(65 - len(one)):], one)[0], abs=1e-4)


@pytest.mark.parametrize("continuation", [[], list(range(5, 75))], ids=["empty", "too long"])
def test_continuations_that_cannot_be_scored_are_refused(lm_of, continuation):
    lm = lm_of("llama")
    model = SharedContextLM(lm.model, tokenizer=lm.tokenizer, batch_size=1, max_length=64)
    with pytest.raises(StsError, match=f"continuation of {len(continuation)} tokens cannot be scored; 1 to 64"):
        model._loglikelihood_tokens([(None, [5, 6], continuation)])


def test_it_is_a_model_of_the_harness():
    assert get_model("sts-shared-context") is SharedContextLM


def test_rolling_loglikelihood_is_the_harness_own(lm_of):
    lm = lm_of("llama")
    texts = ["Prices rise when demand grows faster than supply. " * 5, "Water boils."]
    instances = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    ours, theirs = (kind(lm.model, tokenizer=lm.tokenizer, batch_size=2, max_length=32)
                    for kind in (SharedContextLM, HFLM))
    assert ours.loglikelihood_rolling(instances) == pytest.approx(
        theirs.loglikelihood_rolling(instances, disable_tqdm=True), abs=1e-3)


# --- what is run --------------------------------------------------------------------------------------------------

def test_ten_options_read_the_context_once(lm_of):
    context, options, work = ids(200), [ids(6) for _ in range(10)], Work()
    open_harness(lm_of("llama"), batch=4, work=work)._loglikelihood_tokens([(None, context, one) for one in options])
    # The context with the first option's tokens but the last; then its last token with each of the others.
    assert work.tokens == 200 + 5 + 9 * (1 + 5)
    assert work.layer_tokens == 2 * work.padded_tokens


def test_single_tokens_cost_one_pass_and_no_token_beyond_the_context(lm_of):
    work, context = Work(), ids(90)
    open_harness(lm_of("llama"), batch=4, work=work)._loglikelihood_tokens(
        [(None, context, [letter]) for letter in range(40, 50)])
    assert work.tokens == work.padded_tokens == 90


def test_logits_are_computed_where_they_are_needed(lm_of, monkeypatch):
    lm, sizes = lm_of("llama"), []
    forward = lm.model.lm_head.forward
    monkeypatch.setattr(lm.model.lm_head, "forward", lambda states: sizes.append(states.shape[:2]) or forward(states))
    context = ids(300)
    open_harness(lm, batch=4)._loglikelihood_tokens([(None, context, ids(3)), (None, context, ids(4))])
    assert [tuple(size) for size in sizes] == [(1, 3), (1, 4)]


def test_progress_ends_at_one(lm_of):
    seen = []
    open_harness(lm_of("llama"), batch=2, report=seen.append)._loglikelihood_tokens(REQUESTS)
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == 1.0


def test_groups_join_what_begins_with_them_unless_little_is_saved():
    base, cue = tuple(range(100)), tuple(range(103))
    sequences = {(*base, 7, 7): 100, cue: 103, (*cue, 8): 103, (1, 2, 3): 3, (1, 2, 3, 4): 3}
    groups = group_by_context(sequences)
    assert sorted((group.shared, len(group.sequences)) for group in groups) == [(0, 1), (0, 1), (99, 3)]
    assert [group.shared for group in group_by_context(sequences, reusable=False)] == [0] * 5
    # A context of one token begins everything, and is no root of anything long.
    with_bos = group_by_context({(0, 5): 1, **{(0, *range(50), end): 51 for end in range(3)}})
    assert sorted((group.shared, len(group.sequences)) for group in with_bos) == [(0, 1), (50, 3)]


def test_batches_hold_every_row_once_and_little_padding():
    lengths = torch.randint(1, 300, (200,), generator=GENERATOR).tolist()
    seen = []
    for batch in batches_of_rows(lengths, 8):
        seen += batch
        positions = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) <= 8
        assert positions - sum(lengths[index] for index in batch) <= max(PADDING * positions, PASS_TOKENS)
    assert sorted(seen) == list(range(200))
    assert all(len({lengths[index] for index in batch}) == 1 for batch in batches_of_rows(lengths, 8, padded=False))


# --- other paths --------------------------------------------------------------------------------------------------

def test_bfloat16_differs_by_its_own_noise_alone(tiny_models, monkeypatch):
    """The two-product attention of a CPU in bf16, also where this machine's CPU would not choose it."""
    monkeypatch.setattr(shared_prefix, "bf16_is_fast", lambda device: True)
    lm, exact = (load_model(str(tiny_models["llama"]), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert not shared_prefix.joins_prefix(lm.model)
    shared = [value for value, _ in open_harness(lm, batch=4)._loglikelihood_tokens(REQUESTS)]
    noise = total = 0.0
    for (_, context, continuation), value in zip(REQUESTS, shared, strict=True):
        wanted = alone(exact.model, context, continuation)[0]
        noise += abs(alone(lm.model, context, continuation)[0] - wanted)
        total += abs(value - wanted)
    assert 0 < total < 1.5 * noise


@pytest.mark.parametrize(("rope", "reason"), [("dynamic", "rotary positions")])
def test_a_cache_that_cannot_be_reused_is_a_line_and_the_same_numbers(lm_of, rope, reason):
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
            rope_parameters={"rope_type": rope, "factor": 4.0, "rope_theta": 10_000.0})).eval()

    work, context = Work(), ids(80)
    requests = [(None, context, one) for one in (ids(4), ids(4), ids(9))]
    # Rescaled rotary positions are remembered from call to call, so every pass gets a fresh model.
    model = SharedContextLM(make(), tokenizer=lm_of("llama").tokenizer, batch_size=4, max_length=512, work=work)
    found = model._loglikelihood_tokens(requests)
    assert [reason in note and "run again for every option" in note for note in work.notes] == [True]
    assert work.tokens == work.padded_tokens == sum(80 + len(one) - 1 for _, _, one in requests)
    for (_, _, one), (value, _) in zip(requests, found, strict=True):
        assert value == pytest.approx(alone(make(), context, one)[0], abs=1e-4)


@pytest.mark.parametrize("most", [300, 110])
def test_running_out_of_memory_goes_on_in_halves(lm_of, monkeypatch, most):
    """At most 300 positions: not several contexts at once; at most 110: not all options of one."""
    lm, work = lm_of("llama"), Work()
    requests = [(None, context, option) for context in [ids(90) for _ in range(4)]
                for option in [ids(14) for _ in range(9)]]
    wanted = open_harness(lm, batch=4)._loglikelihood_tokens(requests)
    model, forward = open_harness(lm, batch=4, work=work), lm.model.forward

    def small_only(input_ids, **inputs):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(lm.model, "forward", small_only)
    found = model._loglikelihood_tokens(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert len(work.notes) == 1 and "Memory ran out" in work.notes[0]
    most = 50
    with pytest.raises(StsError, match="sequence of 103 tokens does not fit in the memory of cpu"):
        model._loglikelihood_tokens(requests)


def test_other_errors_are_not_swallowed(lm_of, monkeypatch):
    lm = lm_of("llama")

    def broken(**inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(lm.model, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        open_harness(lm, batch=1)._loglikelihood_tokens(REQUESTS[:2])


def test_a_tuned_model_is_scored_with_its_adapter(tiny_models, lm_of, tmp_path):
    from peft import LoraConfig, get_peft_model

    from sts.engine.finetune import load_tuned

    tuned = get_peft_model(load_model(str(tiny_models["llama"])).model,
                           LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    lm = load_tuned(load_model(str(tiny_models["llama"])), tmp_path)
    found = harness.open_harness(lm, batch=4)._loglikelihood_tokens(REQUESTS[:12])
    for (_, context, continuation), (value, _) in zip(REQUESTS[:12], found, strict=True):
        assert value == pytest.approx(alone(tuned, context, continuation)[0], abs=1e-4)
        assert abs(value - alone(lm_of("llama").model, context, continuation)[0]) > 1e-3
