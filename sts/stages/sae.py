"""Stages that train an SAE and read one on texts: the run's own SAE, and what the first chapter shows."""

from __future__ import annotations

import json
import random
import shutil

from sts.data.groups import token_pieces
from sts.engine import sae_quality as quality
from sts.engine.sae_training import collect_activations, save_sae, train_sae
from sts.engine.saes import load_sae
from sts.errors import StsError
from sts.run.stage import stage, steps

#: Latents whose texts the first chapter shows.
CARDS = 10
#: What the recorded keys of stages on chapter one's texts leave out, as `text_activations` holds it.
KNOWN = ("model", "text_data")


def _quality(lm, one, layer, held_out, pieces, splice_tokens, report=lambda fraction: None):
    """How well an SAE reconstructs held-out activations, which came from `pieces`, and what that costs the model."""
    return quality.reconstruction_quality(one, held_out) | {"splice": quality.spliced_loss(
        lm, one, layer, pieces, tokens=splice_tokens, mean_D=quality.activation_mean(held_out), report=report)}


@stage("folder", also=("seed",))
def sae(lm, layer, sae_texts, sae_latents, sae_k, sae_samples, sae_lr, splice_tokens, seed, report, work, scratch,
        device):
    """Train an SAE on `sae_text`: weights, loss curve and quality on held-out text."""
    train, held_out = sae_texts.pieces(seed=seed)
    collect_activations(lm, {layer: scratch / "held_out"}, held_out, work=work)
    collect_activations(lm, {layer: scratch / "train"}, train, work=work, report=lambda f: report(0.5 * f))
    trained, curve = train_sae(
        scratch / "train", sae_latents, sae_k, sae_samples, lr=sae_lr, seed=seed, model_name=lm.name, layer=layer,
        device=device, report=lambda f: report(0.5 + 0.5 * f))
    save_sae(trained, scratch, dtype="bfloat16")
    found = _quality(lm, load_sae(str(scratch), device=device), layer, scratch / "held_out", held_out, splice_tokens)
    (scratch / "training.json").write_text(json.dumps({
        "text": dict(sae_texts.sources), "tokens": sum(map(len, train)), "curve": curve, "held_out": found},
        indent=1) + "\n", encoding="utf-8")
    for part in ("train", "held_out"):  # gigabytes that nothing needs any more
        shutil.rmtree(scratch / part)
    return scratch


def _pieces(lm, texts, context, seed, part):
    """Token ids of chapter one's texts: `train` (four fifths) or `held_out`."""
    if not texts:
        raise StsError("text_data is empty: name the question sets that the first chapter reads, such as "
                       "[mmlu_exemplars, gsm_symbolic].")
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    cut = len(shuffled) * 4 // 5
    return token_pieces(lm.tokenizer, shuffled[:cut] if part == "train" else shuffled[cut:], context, 10**9)


@stage("folder")
def text_activations(lm, layer, texts, context, seed, report, work, scratch):
    """The residual stream of chapter one's texts, in two parts: train and held_out."""
    for part, told in steps(("train", "held_out"), report):
        collect_activations(lm, {layer: scratch / part}, _pieces(lm, texts, context, seed, part), pieces_per_shard=64,
                            work=work, report=told)
    return scratch


@stage("folder", also=("texts",), inputs_without=KNOWN)
def small_sae(text_activations, lm, layer, small_sae_latents, small_sae_k, small_sae_samples, seed, report, scratch,
              device):
    """A small SAE trained live on chapter one's texts, with its loss curve."""
    trained, curve = train_sae(text_activations / "train", small_sae_latents, small_sae_k, small_sae_samples,
                               batch=1024, lr=1e-3, seed=seed, model_name=lm.name, layer=layer, device=device,
                               log_every=5, report=report)
    save_sae(trained, scratch)
    (scratch / "training.json").write_text(json.dumps({"curve": curve}, indent=1) + "\n", encoding="utf-8")
    return scratch


@stage("json", inputs_without=KNOWN)
def sae_quality(lm, layer, texts, context, seed, reader, text_activations, splice_tokens, report):
    """Quality of the run's SAE on chapter one's held-out texts."""
    pieces = _pieces(lm, texts, context, seed, "held_out")
    return {"k": getattr(reader.cfg, "k", None), "architecture": reader.cfg.architecture(),
            **_quality(lm, reader, layer, text_activations / "held_out", pieces, splice_tokens, report)}


@stage("json", inputs_without=KNOWN)
def small_sae_quality(lm, layer, texts, context, seed, text_activations, small_sae, splice_tokens, report, device):
    """Quality of the small SAE on the same texts."""
    return sae_quality(lm, layer, texts, context, seed, load_sae(str(small_sae), device=device), text_activations,
                       splice_tokens, report)


@stage("json", inputs_without=KNOWN)
def latent_examples(lm, layer, texts, context, seed, reader, text_activations):
    """Ten latents of the run's SAE, spread over firing rates by rule, with the texts they fire on most."""
    train, pieces = text_activations / "train", _pieces(lm, texts, context, seed, "train")
    chosen = quality.spread_by_rate(quality.latent_statistics(reader, train), CARDS)
    return quality.top_contexts(quality.Firings(reader, train, pieces, lm.tokenizer, chosen))


@stage("json", version=2, inputs_without=KNOWN)
def latent_strengths(latent_examples, lm, layer, texts, context, seed, reader, text_activations):
    """How strongly the latents of `latent_examples` fire, and texts on which half as strongly as they can."""
    train, pieces = text_activations / "train", _pieces(lm, texts, context, seed, "train")
    latents = [row["latent"] for row in latent_examples]
    return quality.strengths(quality.Firings(reader, train, pieces, lm.tokenizer, latents))


@stage("json")
def latent_logits(latent_examples, lm, reader):
    """Tokens that the latents of `latent_examples` promote and demote: their decoder vectors through the LM head."""
    return quality.promoted_tokens(lm, reader, [row["latent"] for row in latent_examples])
