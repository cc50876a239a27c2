"""The engine: early exit, shared prefixes, batches, and memory that runs out, against transformers' own passes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sts.data.load import load_examples
from sts.data.prompts import make_prompt, question_text
from sts.engine.models import LanguageModel, load_model, resid_post
from sts.engine.packaged import save_random_model
from sts.engine.residuals import PADDING, Extractor, batches, common_prefix, why_not_reusable
from sts.engine.work import Work
from sts.errors import StsError

GENERATOR = torch.Generator().manual_seed(0)
PREFIX = torch.randint(5, 290, (80,), generator=GENERATOR).tolist()  # longer than the Gemmas' window of 32
PROMPTS = [[*PREFIX, *torch.randint(5, 290, (length,), generator=GENERATOR).tolist()] for length in (3, 17, 9, 40, 16)]
SPANS = [(len(PREFIX), len(ids)) for ids in PROMPTS]
SIDES = list(zip(PROMPTS, SPANS, strict=True))


def hidden_states(lm, layer, ids):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_tokens_are_the_models_hidden_states(lm_of, family):
    lm = lm_of(family)
    spans = [(2, 3), (5, 90), (0, 1), (119, 120), (7, 60)]
    found_TD = Extractor(lm, 0, 10_000).tokens(list(zip(PROMPTS, spans, strict=True)))
    wanted_TD = torch.cat([hidden_states(lm, 0, ids)[slice(*span)] for ids, span in zip(PROMPTS, spans, strict=True)])
    torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_a_shared_prefix_changes_nothing_but_the_work(lm_of, family):
    lm = lm_of(family)
    extractor = Extractor(lm, 0, 10_000)
    prefix = extractor.share(PREFIX)
    assert prefix.cached == len(PREFIX)
    wanted_TD = torch.cat([hidden_states(lm, 0, ids)[slice(*span)] for ids, span in zip(PROMPTS, SPANS, strict=True)])
    for _ in range(2):  # the cache serves every batch, so using it must not change it
        torch.testing.assert_close(extractor.tokens(SIDES, prefix), wanted_TD, rtol=1e-4, atol=1e-5)
    assert extractor.work.tokens == len(PREFIX) + 2 * sum(last - first for first, last in SPANS)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Family -> a random model of five layers, so that several layers run behind a prefix and one is never run."""
    folder, kinds = tmp_path_factory.mktemp("deep"), ["sliding_attention", "full_attention"]
    sliding = {name: {"layer_types": [*kinds, *kinds, kinds[0]]} for name in ("gemma2", "gemma3")}
    return {family: load_model(str(save_random_model(family, folder / family, num_hidden_layers=5,
                                                     **sliding.get(family, {}))), dtype="float32")
            for family in ("llama", "qwen2", "gemma2", "gemma3")}


def test_several_layers_come_out_of_one_pass_side_by_side(deep):
    for lm in deep.values():
        extractor = Extractor(lm, (3, 0), 10_000)
        found_TD = extractor.tokens(SIDES, extractor.share(PREFIX))
        wanted_TD = torch.cat([torch.cat([hidden_states(lm, layer, ids)[slice(*span)] for layer in (3, 0)], dim=-1)
                               for ids, span in zip(PROMPTS, SPANS, strict=True)])
        torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-5)
        assert extractor.work.passes == pytest.approx(extractor.work.padded_tokens * 4 / 5)  # once, to the deepest
        with pytest.raises(StsError):
            Extractor(lm, (9, 0), 10_000)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_every_layer_sees_its_own_part_of_the_prefix(deep, family, layer):
    extractor = Extractor(deep[family], layer, 10_000)
    found_TD = extractor.tokens(SIDES, extractor.share(PREFIX))
    wanted_TD = torch.cat([hidden_states(deep[family], layer, ids)[slice(*span)]
                           for ids, span in zip(PROMPTS, SPANS, strict=True)])
    torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-5)


def test_bfloat16_differs_behind_a_prefix_by_its_own_noise_alone(tiny_models):
    lm, exact = (load_model(str(tiny_models["llama"]), dtype=dtype) for dtype in ("bfloat16", "float32"))
    extractor = Extractor(lm, 0, 10_000)
    shared_TD = extractor.tokens(SIDES, extractor.share(PREFIX)).float()
    whole_TD = extractor.tokens(SIDES).float()
    exact_TD = Extractor(exact, 0, 10_000).tokens(SIDES)
    noise = (whole_TD - exact_TD).norm() / exact_TD.norm()
    assert 0 < noise < 0.05
    assert (shared_TD - exact_TD).norm() / exact_TD.norm() < 1.5 * noise


def test_later_layers_are_not_run(lm_of):
    lm = lm_of("llama")
    ran = []
    hooks = dict(lm.model.model.layers[0]._forward_hooks)
    handle = lm.model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    try:
        extractor = Extractor(lm, 0, 10_000)
        extractor.tokens(SIDES, extractor.share(PREFIX))
    finally:
        handle.remove()
    assert not ran and dict(lm.model.model.layers[0]._forward_hooks) == hooks


def test_what_follows_the_span_is_not_run(lm_of):
    extractor = Extractor(lm_of("llama"), 0, 10_000)
    extractor.tokens([(ids, (0, 10)) for ids in PROMPTS])
    assert extractor.work.tokens == 10 * len(PROMPTS)


# --- caches that cannot be reused ---------------------------------------------------------------------------------

def wrapped(model, name):
    return LanguageModel(name=name, model=model.eval().requires_grad_(False), tokenizer=None)


def dynamic_rope():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}))


def convolutional():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize(("make", "reason"), [
    (dynamic_rope, "rotary positions"), (convolutional, "layers of type conv")], ids=["dynamic rope", "convolution"])
def test_a_cache_that_cannot_be_reused_is_a_line_and_the_same_numbers(monkeypatch, make, reason):
    monkeypatch.setattr(LanguageModel, "context_length", 1_000)  # positions are rescaled beyond what the model says
    lm = wrapped(make(), "odd")
    extractor = Extractor(lm, 1, 10_000)
    prefix = extractor.share(PREFIX)
    assert prefix.cached == 0
    assert [reason in note and "run again for every question" in note for note in extractor.work.notes] == [True]
    # One at a time: with these rotary positions even the batch's longest prompt matters.
    found_TD = torch.cat([extractor.tokens([side], prefix) for side in SIDES])
    fresh, seen = make().eval(), []  # rescaled rotary positions are remembered from call to call
    fresh.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(resid_post(output)[0]))
    with torch.no_grad():
        for ids in PROMPTS:
            fresh(torch.tensor([ids]))
    wanted_TD = torch.cat([state[slice(*span)] for state, span in zip(seen, SPANS, strict=True)])
    torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-4, atol=1e-5)


def test_recurrent_models_are_recognised(lm_of, monkeypatch):
    model = lm_of("llama").model
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert "recurrent" in why_not_reusable(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_the_papers_families_can_reuse_theirs(lm_of, family):
    assert why_not_reusable(lm_of(family).model) == ""


# --- batches ------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 3000), st.integers(0, 50))
def test_batches_hold_every_index_once_within_budget_and_padding(lengths, budget, extra):
    seen = []
    for batch in batches(lengths, budget, extra=extra):
        seen += batch
        positions = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or positions + extra * len(batch) <= budget
        assert positions - sum(lengths[index] for index in batch) <= PADDING * positions
    assert sorted(seen) == list(range(len(lengths)))


def test_real_questions_are_padded_by_at_most_a_tenth(lm_of):
    prompts = [make_prompt(lm_of("llama").tokenizer, question_text(example))
               for example in load_examples("mmlu_exemplars")]
    extractor = Extractor(lm_of("llama"), 0, 4096)
    parts = list(extractor.batches([len(prompt.ids) for prompt in prompts]))
    for batch in parts:
        extractor.tokens([(prompts[index].ids, (0, len(prompts[index].ids))) for index in batch])
    work = extractor.work
    assert work.tokens == sum(len(prompt.ids) for prompt in prompts)
    assert 0 < work.padded_tokens - work.tokens <= PADDING * work.padded_tokens
    assert len(parts) < len(prompts) / 4  # batches, not single prompts


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]], 10) == 3
    assert common_prefix([[1, 2, 3, 4], [1, 2, 3, 4]], 2) == 2
    assert common_prefix([[1], [2]], 10) == 0


# --- memory -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_running_out_of_memory_halves_the_budget_and_goes_on(lm_of, monkeypatch, error):
    extractor = Extractor(lm_of("llama"), 0, 1000)
    wanted_TD = extractor.tokens(SIDES)
    forward = Extractor._forward

    def small_only(self, ids_BP, **inputs):
        if ids_BP.numel() > 250:
            raise error
        return forward(self, ids_BP, **inputs)

    monkeypatch.setattr(Extractor, "_forward", small_only)
    torch.testing.assert_close(extractor.tokens(SIDES), wanted_TD, rtol=1e-4, atol=1e-5)
    assert extractor.budget.most < 1000
    assert any("Memory ran out" in note for note in extractor.work.notes)
    # From here on batches are small enough.
    assert all(len(batch) <= 3 for batch in extractor.batches([len(ids) for ids in PROMPTS]))


def test_the_budget_settles_at_what_fits(lm_of, monkeypatch):
    extractor, tried = Extractor(lm_of("llama"), 0, 6_400), []
    forward = Extractor._forward

    def small_only(self, ids_BP, **inputs):
        tried.append(ids_BP.numel())
        if ids_BP.numel() > 250:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, ids_BP, **inputs)

    monkeypatch.setattr(Extractor, "_forward", small_only)
    prompts = [[*range(5, 105)]] * 64
    assert len(extractor.tokens([(ids, (0, 100)) for ids in prompts])) == 6_400
    assert extractor.budget.most == 200  # 6,400, 3,200, ... halved until it fits, and no further
    assert sum(size > 250 for size in tried) == 5


def test_a_prefix_that_does_not_fit_is_one_clear_error(lm_of, monkeypatch):
    def never(self, ids_BP, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Extractor, "_forward", never)
    with pytest.raises(StsError, match="sequence of 80 tokens does not fit"):
        Extractor(lm_of("llama"), 0, 1000).share(PREFIX)


def test_a_cached_prefix_counts_against_the_budget(lm_of):
    extractor = Extractor(lm_of("llama"), 0, 400)
    prefix = extractor.share(PREFIX)
    lengths = [len(PREFIX) + 20] * 40
    assert [len(batch) for batch in extractor.batches(lengths, prefix)][0] == 13  # 13 x (20 + 80 / 8) <= 400


def test_a_single_prompt_that_does_not_fit_is_one_clear_error(lm_of, monkeypatch):
    def never(self, ids_BP, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Extractor, "_forward", never)
    with pytest.raises(StsError, match="83 tokens does not fit in the memory of cpu.*fewer or shorter demonstrations"):
        Extractor(lm_of("llama"), 0, 1000).tokens(SIDES)


def test_other_runtime_errors_are_not_swallowed(lm_of, monkeypatch):
    def broken(self, ids_BP, **inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Extractor, "_forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        Extractor(lm_of("llama"), 0, 1000).tokens(SIDES)


def test_work_counts_layers(lm_of):
    work = Work()
    extractor = Extractor(lm_of("llama"), 0, 1000, work)
    extractor.tokens(SIDES[:1])
    assert (work.tokens, work.layer_tokens, work.of_layers) == (83, 83, 2)
    assert work.passes == 41.5  # one of two layers
    assert work.to_dict()["passes"] == 41.5
