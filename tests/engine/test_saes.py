"""Training, saving, loading and judging SAEs."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers import topk_sae
from safetensors.torch import load_file

from sts.engine import saes
from sts.engine.sae_quality import reconstruction_quality, spliced_loss
from sts.engine.sae_training import (
    collect_activations,
    count_activations,
    save_sae,
    shard_paths,
    train_sae,
)
from sts.errors import ROOT, StsError

PIECES = [[(7 * i + 3 * j) % 300 for j in range(20 + i % 17)] for i in range(60)]


def collected(lm, layer, pieces, folder, **how):
    collect_activations(lm, {layer: folder}, pieces, pieces_per_shard=25, **how)
    return folder


@pytest.fixture(scope="module")
def activations(lm_of, tmp_path_factory):
    return collected(lm_of("llama"), 0, PIECES, tmp_path_factory.mktemp("activations"), tokens_per_batch=200)


@pytest.fixture(scope="module")
def trained(activations, tmp_path_factory):
    sae, curve = train_sae(activations, 96, 12, 60_000, batch=512, lr=3e-3, model_name="llama", layer=0, log_every=10)
    folder = tmp_path_factory.mktemp("sae")
    save_sae(sae, folder)
    return folder, curve, sae


def test_activations_are_the_models_hidden_states_without_first_positions(lm_of, activations):
    lm, seen = lm_of("llama"), 0
    for path in shard_paths(activations):
        shard = load_file(path)
        for row in range(0, len(shard["piece_T"]), 37):
            piece, position = shard["piece_T"][row].item(), shard["position_T"][row].item()
            assert position > 0
            with torch.no_grad():
                states = lm.model(torch.tensor([PIECES[piece]]), output_hidden_states=True).hidden_states
            # Stored in bf16: eight bits of mantissa.
            stored_D = shard["activations_TD"][row].float()
            torch.testing.assert_close(stored_D, states[1][0, position], rtol=1e-2, atol=1e-2)
            seen += 1
    assert seen > 20
    assert count_activations(activations) <= sum(len(piece) - 1 for piece in PIECES)


def test_a_killed_collection_goes_on_with_the_missing_shard(lm_of, activations):
    paths = shard_paths(activations)
    before = {path: path.stat().st_mtime_ns for path in paths}
    content = paths[1].read_bytes()
    paths[1].unlink()
    collected(lm_of("llama"), 0, PIECES, activations, tokens_per_batch=200)
    assert paths[1].read_bytes() == content
    assert all(path.stat().st_mtime_ns == before[path] for path in paths if path != paths[1])


def test_layers_collected_together_are_those_collected_alone(lm_of, activations, tmp_path):
    lm = lm_of("llama")
    collect_activations(lm, {layer: tmp_path / str(layer) for layer in (1, 0)}, PIECES, tokens_per_batch=200,
                        pieces_per_shard=25)
    alone = {0: activations, 1: collected(lm, 1, PIECES, tmp_path / "alone", tokens_per_batch=200)}
    for layer, folder in alone.items():
        pairs = zip(shard_paths(folder), shard_paths(tmp_path / str(layer)), strict=True)
        for one, together in ((load_file(path) for path in pair) for pair in pairs):
            assert one.keys() == together.keys() and all(torch.equal(one[name], together[name]) for name in one)


def test_training_learns(trained):
    _, curve, _ = trained
    assert curve[-1]["explained_variance"] > curve[0]["explained_variance"] + 0.2
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_saved_sae_loads_in_sae_lens_and_reconstructs_as_it_did_in_training(trained, activations):
    from sae_lens import SAE

    folder, _, sae = trained
    loaded = SAE.load_from_disk(str(folder))
    x_TD = load_file(shard_paths(activations)[0])["activations_TD"][:50].float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x_TD), sae(x_TD), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loaded.W_dec.norm(dim=-1), torch.ones(96), rtol=1e-4, atol=1e-4)


def test_bfloat16_halves_the_file_and_changes_little(trained, activations, tmp_path):
    folder, _, sae = trained
    save_sae(sae, tmp_path, dtype="bfloat16")
    small, large = (path / "sae_weights.safetensors" for path in (tmp_path, folder))
    assert small.stat().st_size < 0.55 * large.stat().st_size
    one = saes.load_sae(str(tmp_path))
    other = saes.load_sae(str(folder))
    a, b = (reconstruction_quality(x, activations)["fraction_of_variance_explained"] for x in (one, other))
    assert a == pytest.approx(b, abs=0.02)


def test_folding_decoder_norms_keeps_the_reconstruction(activations):
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    sae.W_dec.data *= torch.rand(128, 1) + 0.5
    x_TD = load_file(shard_paths(activations)[0])["activations_TD"][:20].float()
    with torch.no_grad():
        before, latents = sae(x_TD), sae.encode(x_TD)
        norms = sae.W_dec.norm(dim=-1)
        saes.fold_decoder_norms(sae)
        torch.testing.assert_close(sae(x_TD), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.encode(x_TD), latents * norms, rtol=1e-4, atol=1e-4)


def test_quality_by_a_naive_formula(trained, activations):
    folder, _, _ = trained
    sae = saes.load_sae(str(folder))
    quality = reconstruction_quality(sae, activations)
    x = torch.cat([load_file(path)["activations_TD"] for path in shard_paths(activations)]).double()
    with torch.no_grad():
        latents = sae.encode(x.float())
        x_hat = sae.decode(latents).double()
    explained = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert quality["fraction_of_variance_explained"] == pytest.approx(explained.item(), abs=1e-5)
    assert quality["l0"] == pytest.approx((latents > 0).sum(1).double().mean().item())
    assert quality["dead"] == int(((latents > 0).sum(0) == 0).sum())
    assert quality["tokens"] == len(x)


class Constant:
    """An 'SAE' that reconstructs every vector as the same one."""

    dtype = torch.float32

    def __init__(self, value_D):
        self.value_D = value_D

    def __call__(self, x_TD):
        return x_TD if self.value_D is None else self.value_D.expand_as(x_TD)


def naive_loss(lm, layer, value_D):
    """Next-token loss with all but the first position of the residual stream after `layer` set to `value_D`."""
    total, count = 0.0, 0
    decoder = lm.model.model
    for piece in PIECES:
        if count >= 300:
            break
        ids = torch.tensor([piece])
        with torch.no_grad():
            hidden = decoder.embed_tokens(ids)
            positions = torch.arange(len(piece))[None]
            rotary = decoder.rotary_emb(hidden, positions)
            for index, module in enumerate(decoder.layers):
                hidden = module(hidden, position_embeddings=rotary, position_ids=positions)
                if index == layer and value_D is not None:
                    hidden = hidden.clone()
                    hidden[:, 1:] = value_D
            logits = lm.model.lm_head(decoder.norm(hidden))
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += len(piece) - 1
    return total / count, count


@pytest.mark.parametrize("layer", [0, 1])
def test_spliced_loss_against_layers_run_by_hand(lm_of, layer):
    lm = lm_of("llama")
    torch.manual_seed(1)
    spliced_D, mean_D = torch.randn(2, 64)
    hooks = dict(lm.model.model.layers[layer]._forward_hooks)
    result = spliced_loss(lm, Constant(spliced_D), layer, PIECES, mean_D=mean_D, tokens=300, tokens_per_batch=100)
    clean, count = naive_loss(lm, layer, None)
    assert result["tokens"] == count
    assert result["clean"] == pytest.approx(clean, rel=1e-5)
    assert result["spliced"] == pytest.approx(naive_loss(lm, layer, spliced_D)[0], rel=1e-5)
    assert result["mean_ablated"] == pytest.approx(naive_loss(lm, layer, mean_D)[0], rel=1e-5)
    assert abs(result["spliced"] - clean) > 1e-3
    assert dict(lm.model.model.layers[layer]._forward_hooks) == hooks  # ours are gone


def test_splicing_the_identity_changes_nothing(lm_of):
    result = spliced_loss(lm_of("llama"), Constant(None), 0, PIECES, mean_D=torch.ones(64), tokens=300)
    assert result["spliced"] == pytest.approx(result["clean"], abs=1e-6)
    assert result["recovered"] == pytest.approx(1.0, abs=1e-4)


def test_loading_folds_norms_unless_told_otherwise(trained, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder, _, _ = trained
    shutil.copytree(folder, tmp_path / "sae")
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"] = weights["W_dec"] * 3
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    folded, raw = (saes.load_sae(str(tmp_path / "sae"), fold_norms=fold) for fold in (True, False))
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(96), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(raw.W_dec.norm(dim=-1), 3 * torch.ones(96), rtol=1e-3, atol=1e-3)
    x_TD = torch.randn(5, 64)
    torch.testing.assert_close(folded(x_TD), raw(x_TD), rtol=1e-3, atol=1e-3)


def test_nan_activations_stop_the_collection(tiny_models, tmp_path):
    from sts.engine.models import load_model

    lm = load_model(str(tiny_models["llama"]), dtype="float32")
    lm.model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(StsError, match="NaN"):
        collected(lm, 0, PIECES, tmp_path)
    assert not shard_paths(tmp_path)


def test_errors_say_what_would_work(lm_of, trained, tmp_path):
    folder, _, _ = trained
    with pytest.raises(StsError, match="cfg.json"):
        saes.load_sae("no_such_folder")
    with pytest.raises(StsError, match="registry.*without a network"):
        saes.load_sae("no-such-release/layer_1")
    wide = saes.load_sae(str(folder))
    wide.cfg.d_in = 576
    with pytest.raises(StsError, match="width 576; model .* has width 64"):
        saes.check_fits(wide, lm_of("llama"), 0)
    with pytest.raises(StsError, match="Layer 9 .* 0 to 1"):
        saes.check_fits(wide, lm_of("llama"), 9)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(StsError, match="no sae_weights.safetensors"):
        saes.load_sae(str(tmp_path))
    with pytest.raises(StsError, match="No activations"):
        train_sae(tmp_path, 8, 2, 100, model_name="x", layer=0)


def test_the_committed_sae_is_what_its_card_says():
    folder = ROOT / "data" / "sae" / "smollm2-135m-instruct-layer22-topk32-4608"
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder))
    card = json.loads((folder / "training.json").read_text())
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (576, 8 * 576, 32)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    assert card["tokens"] >= 2_000_000
    held_out = card["held_out"]
    assert held_out["fraction_of_variance_explained"] >= 0.80
    assert held_out["dead"] <= 0.10 * held_out["latents"]
    assert math.isfinite(held_out["splice"]["spliced"])
    assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


def test_a_random_code_is_as_sparse_as_the_sae_token_by_token():
    sae = topk_sae(16, latents=40, k=6)
    residual_TD = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    code = saes.random_code(sae, seed=3)
    latents_TL = code.encode(residual_TD)
    assert latents_TL.shape == (30, 40) and (latents_TL >= 0).all()
    assert ((latents_TL > 0).sum(1) == (sae.encode(residual_TD) > 0).sum(1)).all()
    # What is kept are the largest projections on unit vectors.
    directions_DL = torch.randn(16, 40, generator=torch.Generator().manual_seed(3))
    projection_TL = (residual_TD - sae.b_dec) @ torch.nn.functional.normalize(directions_DL, dim=0)
    for latents_L, projection_L in zip(latents_TL, projection_TL, strict=True):
        kept = latents_L > 0
        torch.testing.assert_close(latents_L[kept], projection_L[kept])
        assert projection_L[kept].min() > projection_L[~kept].max()
    assert not torch.equal(saes.random_code(sae, seed=4).encode(residual_TD), latents_TL)
    torch.testing.assert_close(saes.random_code(sae, seed=3).encode(residual_TD), latents_TL)
    assert code.encode(residual_TD[:0]).shape == (0, 40)


# --- what an SAE says of where and how it reads -------------------------------------------------------------------

def said(lm, layer=0, cfg=None, **metadata):
    """`check_fits` of an SAE that says this of itself."""
    sae = topk_sae(64)
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    for name, value in (cfg or {}).items():
        setattr(sae.cfg, name, value)
    saes.check_fits(sae, lm, layer)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "model.layers.0", "layers.0",
                                  "transformer.h.0", "blocks.0.hook_out", "model.layers.1.input", ""])
def test_the_residual_stream_after_the_layer_is_known_in_any_notation(lm_of, hook):
    said(lm_of("llama"), hook_name=hook)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "model.layers.1", "layers.1", "blocks.0.hook_resid_pre"])
def test_another_layer_is_refused(lm_of, hook):
    with pytest.raises(StsError, match=r"after layer -?1 .*; layer 0 was asked for. Set layer to"):
        said(lm_of("llama"), hook_name=hook)


@pytest.mark.parametrize("hook", ["blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid",
                                  "blocks.0.ln2.hook_normalized", "blocks.0.attn.hook_z", "blocks.0.mlp.hook_in",
                                  "model.layers.0.mlp"])
def test_another_site_is_refused(lm_of, hook):
    with pytest.raises(StsError, match="not the residual stream after a layer"):
        said(lm_of("llama"), hook_name=hook)
    with pytest.raises(StsError, match="not the residual stream after a layer"):  # a transcoder writes elsewhere
        said(lm_of("llama"), hook_name="blocks.0.hook_resid_post", hook_name_out=hook)


@pytest.mark.parametrize(("model", "sae", "noted"), [
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False), ("google/gemma-2-2b", "gemma-2-2b", False),
    ("results/models/my_model", "my_model", False), ("openai-community/gpt2", "gpt2-small", False),
    ("google/gemma-2-2b-it", "gemma-2-2b", True), ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B", True)])
def test_an_sae_of_the_model_or_of_its_base_model_is_taken(lm_of, caplog, model, sae, noted):
    said(dataclasses.replace(lm_of("llama"), name=model), model_name=sae)
    assert ("base model" in caplog.text) == noted


@pytest.mark.parametrize(("model", "sae"), [
    ("mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-8B"), ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
                                                               "Llama-3.1-8B"), ("google/gemma-2-9b", "gemma-2-2b")])
def test_an_sae_of_another_model_is_refused(lm_of, model, sae):
    with pytest.raises(StsError, match=f"trained on another model, '{sae}', than '{model}'"):
        said(dataclasses.replace(lm_of("llama"), name=model), model_name=sae)


def test_another_scale_of_the_input_is_refused(lm_of):
    with pytest.raises(StsError, match="center_writing_weights"):
        said(lm_of("llama"), model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(StsError, match="expected_average_only_in"):
        said(lm_of("llama"), cfg={"normalize_activations": "expected_average_only_in"})
    said(lm_of("llama"), model_from_pretrained_kwargs={"fold_ln": True})  # it leaves the residual stream as it is


def test_prompts_without_the_bos_of_training_are_noted(lm_of, caplog):
    said(lm_of("gemma3"), prepend_bos=True)  # a base model, whose prompts begin with BOS
    assert "BOS" not in caplog.text
    lm = lm_of("llama")
    assert lm.tokenizer.bos_token == "<|im_start|>"  # every turn of the template begins with it
    said(lm, prepend_bos=True)
    assert "BOS" not in caplog.text
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    said(dataclasses.replace(lm, tokenizer=tokenizer), prepend_bos=True)
    assert "trained behind BOS" in caplog.text


@pytest.mark.parametrize(("name", "content"), [("sae.safetensors", "x"), ("sae_weights.safetensors", "no tensors")])
def test_an_sae_that_another_library_saved_is_one_line(tmp_path, name, content):
    (tmp_path / "cfg.json").write_text(json.dumps({"expansion_factor": 32, "k": 32, "d_in": 64}))
    (tmp_path / name).write_text(content)
    with pytest.raises(StsError, match="sae-lens"):
        saes.load_sae(str(tmp_path))


def test_sinks_do_not_depend_on_batches(lm_of, tmp_path):
    """Pieces whose later ones have another typical norm: a median of each batch would give other rows."""
    lm = lm_of("llama")
    norms = lm.model.model.embed_tokens.weight.detach().norm(dim=-1)
    order = norms.argsort().tolist()
    pieces = [order[:12] for _ in range(30)] + [[*order[:3], *order[-12:]] for _ in range(30)]
    counts = {count_activations(collected(lm, 0, pieces, tmp_path / str(size), tokens_per_batch=size))
              for size in (30, 200, 8192)}
    assert len(counts) == 1
