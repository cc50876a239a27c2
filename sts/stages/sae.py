"""Stages that train an SAE and read one on texts: the run's own SAE, and what the first chapter shows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from sts.data.load import CORPORA, Example, load_examples, load_texts
from sts.data.prompts import question_text, render, solution_text, start_ids
from sts.engine import saes
from sts.engine.latent_examples import latent_statistics, spread_by_rate, top_contexts
from sts.engine.sae_quality import activation_mean, reconstruction_quality, spliced_loss
from sts.engine.sae_training import SaeTraining, collect_activations, save_sae, shard_paths, token_chunks, train_sae
from sts.errors import StsError
from sts.run.run import OpenRun, stage

#: Settings that a pass through the model depends on, and those of the SAE that reads it.
MODEL = ("model", "model_revision", "dtype", "layer")
SAE = ("fold_norms", "sae_dtype")


# --- the SAE ------------------------------------------------------------------------------------------------------

def write_json(path: Path, value: dict) -> None:
    """A record that a stage leaves in its folder."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def chat_text(run: OpenRun, example: Example) -> str:
    """A question and its solution as the model sees them in a chat."""
    return render(run.lm.tokenizer, question_text(example), answer=solution_text(example))


def sae_documents(run: OpenRun, name: str) -> list[str]:
    """Documents of one entry of `sae_text`: a corpus, a question set ("mmlu:val" names a split) or a text file."""
    base, _, split = name.partition(":")
    if base in CORPORA or base.endswith((".txt", ".jsonl")):
        # Books are cut, so that the tokens asked for come from many of them.
        return [text[start:start + 20_000].strip() for text in load_texts(base)
                for start in range(0, len(text), 20_000)]
    limit = max(1, run.settings.sae_text[name] // 50) if base == "gsm_symbolic" else 0
    return [chat_text(run, example) for example in load_examples(base, split=split, limit=limit)]


def token_pieces(run: OpenRun, documents: list[str], tokens: int) -> list[list[int]]:
    """Token ids of about as many tokens as asked for, in pieces of the run's context."""
    tokenizer = run.lm.tokenizer
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents)
    start = start_ids(tokenizer)  # a position that is not trained on
    return [[*start, *piece] for piece in token_chunks(encoded, run.settings.context - len(start), tokens)]


@stage("folder", uses=(*MODEL, "sae_text", "sae_latents", "sae_k", "sae_samples", "sae_lr", "context", "splice_tokens",
                       "seed"),
       inputs=("model", "sae_text"))
def sae(run: OpenRun, report) -> Path:
    """Train an SAE on `sae_text`: weights, loss curve and quality on held-out text."""
    settings = run.settings
    if not settings.sae_text:
        raise StsError("Stage 'sae' trains on the text named by sae_text, which is empty. For example: "
                       "sts stage sae -p sae_text '{my_text.txt: 2000000}'")
    train, held_out = [], []
    for name, tokens in settings.sae_text.items():
        documents = sae_documents(run, name)
        random.Random(settings.seed).shuffle(documents)
        cut = max(1, len(documents) // 50)  # 2% of the documents are held out
        held_out += token_pieces(run, documents[:cut], max(2_000, tokens // 50))
        train += token_pieces(run, documents[cut:], tokens)
    if not train:
        raise StsError("sae_text holds too little text: one document is held out, and nothing is left to train on.")
    random.Random(settings.seed).shuffle(train)
    work = run.scratch("sae")
    collect_activations(run.lm, settings.layer, held_out, work / "held_out", work=report.work)
    collect_activations(run.lm, settings.layer, train, work / "train", work=report.work,
                        report=lambda f: report(0.5 * f))
    trained, curve = train_sae(
        work / "train", SaeTraining(settings.sae_latents, settings.sae_k, settings.sae_samples, lr=settings.sae_lr,
                                    seed=settings.seed),
        model_name=settings.model, layer=settings.layer, device=run.device,
        report=lambda fraction, row: report(0.5 + 0.5 * fraction))
    save_sae(trained, work, dtype=torch.bfloat16)
    stored = saes.load_sae(str(work), device=run.device)
    quality = reconstruction_quality(stored, work / "held_out") | {
        "splice": spliced_loss(run.lm, stored, settings.layer, held_out, tokens=settings.splice_tokens,
                               mean_D=activation_mean(work / "held_out"))}
    write_json(work / "training.json", {
        "text": settings.sae_text, "tokens": sum(map(len, train)), "curve": curve, "held_out": quality})
    for part in ("train", "held_out"):  # gigabytes that nothing needs any more
        for path in shard_paths(work / part):
            path.unlink()
        (work / part).rmdir()
    return work


TEXT = (*MODEL, "text_data", "text_examples", "context", "seed")


def text_pieces(run: OpenRun, part: str) -> list[list[int]]:
    """Token ids of chapter one's texts: `train` (four fifths) or `held_out`."""
    examples = list(run.text_examples())
    random.Random(run.settings.seed).shuffle(examples)
    cut = len(examples) * 4 // 5
    texts = [chat_text(run, example) for example in (examples[:cut] if part == "train" else examples[cut:])]
    return token_pieces(run, texts, 10**9)


@stage("folder", uses=TEXT, inputs=("model", "text_data"))
def text_activations(run: OpenRun, report) -> Path:
    """The residual stream of chapter one's texts, in two parts: train and held_out."""
    if not run.settings.text_data:
        raise StsError("text_data is empty: name the question sets that the first chapter reads, such as "
                       "[mmlu_exemplars, gsm_symbolic].")
    work = run.scratch("text_activations")
    for index, part in enumerate(("train", "held_out")):
        collect_activations(run.lm, run.settings.layer, text_pieces(run, part), work / part, pieces_per_shard=64,
                            work=report.work,
                            report=lambda f, index=index: report(0.8 * f if index == 0 else 0.8 + 0.2 * f))
    return work


@stage("folder", uses=(*TEXT, "small_sae_latents", "small_sae_k", "small_sae_samples"), needs=("text_activations",))
def small_sae(run: OpenRun, report) -> Path:
    """A small SAE trained live on chapter one's texts, with its loss curve."""
    settings = run.settings
    work = run.scratch("small_sae")
    trained, curve = train_sae(
        run.get("text_activations") / "train",
        SaeTraining(settings.small_sae_latents, settings.small_sae_k, settings.small_sae_samples, batch=1024,
                    lr=1e-3, seed=settings.seed),
        model_name=settings.model, layer=settings.layer, device=run.device, log_every=5,
        report=lambda fraction, row: report(fraction))
    save_sae(trained, work)
    write_json(work / "training.json", {"curve": curve})
    return work


def _quality(run: OpenRun, one, report) -> dict:
    held_out = run.get("text_activations") / "held_out"
    return reconstruction_quality(one, held_out) | {
        "k": getattr(one.cfg, "k", None), "architecture": one.cfg.architecture(),
        "splice": spliced_loss(run.lm, one, run.settings.layer, text_pieces(run, "held_out"),
                               tokens=run.settings.splice_tokens, mean_D=activation_mean(held_out), report=report)}


@stage("json", uses=(*TEXT, *SAE, "splice_tokens"), needs=("text_activations",), inputs=("sae",))
def sae_quality(run: OpenRun, report) -> dict:
    """Quality of the run's SAE on chapter one's held-out texts."""
    return _quality(run, run.sae(), report)


@stage("json", uses=(*TEXT, "splice_tokens"), needs=("text_activations", "small_sae"))
def small_sae_quality(run: OpenRun, report) -> dict:
    """Quality of the small SAE on the same texts."""
    return _quality(run, saes.load_sae(str(run.get("small_sae")), device=run.device), report)


@stage("json", uses=(*TEXT, *SAE), needs=("text_activations",), inputs=("sae",))
def latent_examples(run: OpenRun, report) -> list[dict]:
    """Ten latents of the run's SAE, spread over firing rates by rule, with the texts they fire on most."""
    train, one = run.get("text_activations") / "train", run.sae()
    chosen = spread_by_rate(latent_statistics(one, train), 10)
    return top_contexts(one, train, text_pieces(run, "train"), run.lm.tokenizer, chosen)
