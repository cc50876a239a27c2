"""The stages of the book, in the order in which they feed each other. The machinery is in stages.py."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pandas
import torch

from sts import processes, saes
from sts.activations import Masks, paired_stats, row_paired_stats
from sts.cost import prompt_tokens
from sts.data import CORPORA, Example, load_examples, load_texts
from sts.errors import StsError
from sts.evaluate import MEASURES, domain_shifts, evaluate
from sts.finetune import FineTuning, fine_tune, load_tuned
from sts.latents import latent_statistics, spread_by_rate, top_contexts
from sts.models import LanguageModel
from sts.prompts import (
    PromptGroup,
    demonstration_draws,
    make_group,
    own_questions,
    question_text,
    render,
    solution_text,
    start_ids,
)
from sts.sae_quality import activation_mean, reconstruction_quality, spliced_loss
from sts.sae_training import SaeTraining, collect_activations, save_sae, shard_paths, token_chunks, train_sae
from sts.score import VARIANTS, score_domains
from sts.shift import overlap, shifted_dimensions
from sts.stages import OpenRun, stage
from sts.stats import correlate

MODEL = ("model", "model_revision", "dtype", "layer")
SAE = ("fold_norms", "sae_dtype")
MASKS = ("question_tokens_only", "drop_first_positions", "outlier_norm")


# --- the SAE ------------------------------------------------------------------------------------------------------

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


def _pieces(run: OpenRun, documents: list[str], tokens: int) -> list[list[int]]:
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
        held_out += _pieces(run, documents[:cut], max(2_000, tokens // 50))
        train += _pieces(run, documents[cut:], tokens)
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
    _write(work / "training.json", {
        "text": settings.sae_text, "tokens": sum(map(len, train)), "curve": curve, "held_out": quality})
    for part in ("train", "held_out"):  # gigabytes that nothing needs any more
        for path in shard_paths(work / part):
            path.unlink()
        (work / part).rmdir()
    return work


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


TEXT = (*MODEL, "text_data", "text_examples", "context", "seed")


def text_pieces(run: OpenRun, part: str) -> list[list[int]]:
    """Token ids of chapter one's texts: `train` (four fifths) or `held_out`."""
    examples = list(run.text_examples())
    random.Random(run.settings.seed).shuffle(examples)
    cut = len(examples) * 4 // 5
    texts = [chat_text(run, example) for example in (examples[:cut] if part == "train" else examples[cut:])]
    return _pieces(run, texts, 10**9)


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
    _write(work / "training.json", {"curve": curve})
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


# --- the forecast -------------------------------------------------------------------------------------------------

def masks(run: OpenRun) -> Masks:
    return Masks(**{name: getattr(run.settings, name) for name in MASKS})


def shift_groups(run: OpenRun) -> list[PromptGroup]:
    """Questions of the training domain behind each draw of demonstrations; no question is read behind two draws.

    Raises:
        StsError: too few examples for the demonstrations, or for a question behind each draw.
    """
    settings = run.settings
    examples = run.sft_examples("train")
    draws = demonstration_draws(examples, settings.shift_demonstrations, settings.demonstration_draws,
                                seed=settings.seed, what=f"The training set {settings.sft_data!r}")
    parts = own_questions(draws)
    if not all(parts):
        raise StsError(f"The training set {settings.sft_data!r} has {len(examples)} examples, too few for a question "
                       f"behind each of {len(draws)} draws of {settings.shift_demonstrations} demonstrations. Lower "
                       "demonstration_draws or shift_demonstrations, or raise sft_examples.")
    share = settings.shift_tokens // len(draws)
    return [make_group(run.lm.tokenizer, questions, demonstrations, context_length=run.lm.context_length,
                       tokens=max(1, share))
            for (demonstrations, _), questions in zip(draws, parts, strict=True)]


def domain_groups(run: OpenRun) -> dict[str, list[PromptGroup]]:
    """Each domain's questions behind each draw of demonstrations from the same domain."""
    settings, pool = run.settings, run.demonstration_pool()
    groups = {}
    for domain, examples in run.domain_examples().items():
        draws = demonstration_draws(pool.get(domain, examples), settings.demonstrations, settings.demonstration_draws,
                                    seed=settings.seed, what=f"Domain {domain!r}", set_aside=domain in pool)
        groups[domain] = [
            make_group(run.lm.tokenizer, examples if domain in pool else questions, demonstrations,
                       context_length=run.lm.context_length,
                       tokens=max(1, settings.score_tokens // settings.demonstration_draws))
            for demonstrations, questions in draws]
    return groups


SHIFT = (*MODEL, *SAE, "shift_tokens", "shift_demonstrations", "demonstration_draws",
         "seed")
DOMAIN = (*MODEL, *SAE, "score_tokens", "demonstrations", "demonstration_draws", "seed")


@stage("tensors", version=3, uses=(*SHIFT, *MASKS), inputs=("model", "sae", "sft_train"))
def shift(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Paired statistics of the training domain's questions without and behind demonstrations."""
    return paired_stats(run.lm, run.sae(), run.settings.layer, shift_groups(run), masks(run),
                        tokens_per_batch=run.settings.tokens_per_batch, report=report, work=report.work).to_tensors()


@stage("tensors", version=2, uses=(*SHIFT, "official_rows"), inputs=("model", "sae", "sft_train"))
def shift_rows(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """The same, paired by row index as in the official code."""
    return row_paired_stats(run.lm, run.sae(), run.settings.layer, shift_groups(run), run.settings.official_rows,
                            tokens_per_batch=run.settings.tokens_per_batch, work=report.work).to_tensors()


@stage("tensors", version=2, uses=(*DOMAIN, *MASKS), inputs=("model", "sae", "domain_data", "demonstrations"))
def domain_stats(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """Paired statistics of every domain's questions; tensors are named domain/field."""
    groups = domain_groups(run)
    flat = {}
    for index, (domain, own) in enumerate(groups.items()):
        stats = paired_stats(run.lm, run.sae(), run.settings.layer, own, masks(run),
                             tokens_per_batch=run.settings.tokens_per_batch, work=report.work,
                             report=lambda f, index=index: report((index + f) / len(groups)))
        flat |= {f"{domain}/{name}": tensor for name, tensor in stats.to_tensors().items()}
    return flat


@stage("tensors", uses=(*DOMAIN, "official_rows"), inputs=("model", "sae", "domain_data", "demonstrations"))
def domain_rows(run: OpenRun, report) -> dict[str, torch.Tensor]:
    """The same, paired by row index as in the official code."""
    groups = domain_groups(run)
    flat = {}
    for index, (domain, own) in enumerate(groups.items()):
        stats = row_paired_stats(run.lm, run.sae(), run.settings.layer, own, run.settings.official_rows,
                                 tokens_per_batch=run.settings.tokens_per_batch, work=report.work)
        flat |= {f"{domain}/{name}": tensor for name, tensor in stats.to_tensors().items()}
        report((index + 1) / len(groups))
    return flat


def split_domains(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """domain/field tensors -> domain -> field -> tensor."""
    domains: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        domain, _, field = name.rpartition("/")
        domains.setdefault(domain, {})[field] = tensor
    return dict(sorted(domains.items()))


@stage("parquet", uses=("top_n",), needs=("shift", "shift_rows", "domain_stats", "domain_rows"))
def scores(run: OpenRun, report) -> pandas.DataFrame:
    """STS_act and STS_ICL of every domain in both variants."""
    sources = {"paper": ("shift", "domain_stats"), "official_code": ("shift_rows", "domain_rows")}
    return pandas.DataFrame([
        row for variant in VARIANTS
        for row in score_domains(variant, run.get(sources[variant][0]), split_domains(run.get(sources[variant][1])),
                                 run.settings.top_n)])


@stage("json", uses=("top_n",), needs=("shift", "shift_rows"))
def variant_overlap(run: OpenRun, report) -> dict:
    """How many shifted latents the two variants agree on."""
    top_n = run.settings.top_n
    sets = [shifted_dimensions(run.get(name)["squared_difference_L"], top_n) for name in ("shift", "shift_rows")]
    return {"overlap": overlap(*sets), "top_n": top_n, "latents": len(run.get("shift")["squared_difference_L"])}


@stage("json", version=2, uses=("model", "model_revision", "shift_tokens", "shift_demonstrations", "score_tokens",
                     "demonstrations", "demonstration_draws", "seed"),
       inputs=("model", "sft_train", "domain_data", "demonstrations"))
def forecast_tokens(run: OpenRun, report) -> dict:
    """Tokens of the forecast's prompts, each counted whole, beside which `shift` and `domain_stats` ran fewer."""
    return {"shift": prompt_tokens(shift_groups(run)),
            "domain_stats": prompt_tokens([group for own in domain_groups(run).values() for group in own])}


@stage("json", needs=("shift", "domain_stats"))
def forecast_sums(run: OpenRun, report) -> dict:
    """Of `shift` and `domain_stats` the numbers of counted tokens and latents, and the bytes of the sums kept.

    Raises:
        StsError: only a part of these sums is recorded.
    """
    found = {}
    for name in ("shift", "domain_stats"):
        tensors = run.get(name)
        if missing := set(run.get("shift")) - {field.rpartition("/")[2] for field in tensors}:
            raise StsError(f"Stage {name!r} was recorded without {', '.join(sorted(missing))}, so the bytes of its "
                           f"sums are not known. To compute it here: sts stage {name} --again, with the same run and "
                           "parameters.")
        found[name] = {
            "tokens": sum(tensor.item() for field, tensor in tensors.items() if field.rpartition("/")[2] == "tokens"),
            "latents": next(len(tensor) for field, tensor in tensors.items() if field.endswith("squared_difference_L")),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())}
    return found


# --- what really happens ------------------------------------------------------------------------------------------

@stage("folder", version=2, uses=("model", "model_revision", "dtype", "sft_epochs", "sft_lr", "sft_batch",
                                  "sft_micro_batch", "sft_max_length", "lora_rank", "lora_alpha", "seed"),
       inputs=("model", "sft_train", "sft_held_out"), parallel=True)
def sft(run: OpenRun, report) -> Path:
    """Fine-tune on the training domain's worked solutions: adapter, loss curve, held-out loss before and after."""
    settings = run.settings
    work = run.scratch("sft")
    # All weights in bf16 would round most updates away; adapters are float32 in any case.
    lm = run.load_model("" if settings.lora_rank else "float32")
    log = fine_tune(lm, run.sft_examples("train"), run.sft_examples("held_out"),
                    FineTuning(settings.sft_epochs, settings.sft_lr, settings.sft_batch, settings.sft_micro_batch,
                               settings.sft_max_length, settings.lora_rank, settings.lora_alpha, settings.seed),
                    work, report=report, work=report.work)
    if processes.is_main():
        _write(work / "training.json", log)
        # Renamed first: killed halfway through the removal, nobody takes the rest for checkpoints.
        shutil.rmtree((work / "checkpoints").rename(work / "finished"))
    return work


EVALUATION = ("model", "model_revision", "dtype", "eval_limit", "eval_batch", "eval_kinds")


def _evaluated(run: OpenRun) -> list[Example]:
    limit = run.settings.eval_limit
    return [example for group in run.domain_examples().values() for example in (group[:limit] if limit else group)]


def _evaluation(run: OpenRun, lm: LanguageModel, report) -> pandas.DataFrame:
    return evaluate(lm, _evaluated(run), kinds=run.settings.eval_kinds, batch=run.settings.eval_batch, report=report,
                    work=report.work)


@stage("parquet", version=2, uses=EVALUATION, inputs=("model", "domain_data"))
def evaluation_before(run: OpenRun, report) -> pandas.DataFrame:
    """Log-likelihoods of `eval_kinds` (option letters, option texts, worked solutions) under the untuned model."""
    return _evaluation(run, run.lm, report)


@stage("parquet", version=2, uses=EVALUATION, needs=("sft",), inputs=("model", "domain_data"))
def evaluation_after(run: OpenRun, report) -> pandas.DataFrame:
    """The same under the tuned model."""
    return _evaluation(run, load_tuned(run.load_model(), run.get("sft")), report)


@stage("parquet", version=4, uses=("bootstrap", "seed"), needs=("evaluation_before", "evaluation_after"))
def domain_shift(run: OpenRun, report) -> pandas.DataFrame:
    """Change of every measure that `eval_kinds` gives, by domain, with intervals and McNemar's test."""
    return domain_shifts(run.get("evaluation_before"), run.get("evaluation_after"),
                         resamples=run.settings.bootstrap, seed=run.settings.seed)


@stage("json", uses=("bootstrap", "permutations", "seed"), needs=("scores", "domain_shift"))
def correlations(run: OpenRun, report) -> list[dict]:
    """Correlation of each score with the absolute shift in each measure, over all domains."""
    settings, rows = run.settings, []
    scored, shifts = run.get("scores"), run.get("domain_shift")
    for measure in MEASURES:
        actual = shifts[shifts["measure"] == measure].set_index("domain")["shift"].abs()
        if actual.empty:  # not evaluated
            continue
        for variant in VARIANTS:
            own = scored[scored["variant"] == variant].set_index("domain").loc[actual.index]
            for score in ("sts_act", "sts_icl"):
                base = {"measure": measure, "variant": variant, "score": score}
                try:
                    result = correlate(own[score].to_numpy(), actual.to_numpy(), list(actual.index),
                                       seed=settings.seed, permutations=settings.permutations,
                                       resamples=settings.bootstrap)
                except StsError as error:  # e.g. no domain's accuracy moved: a fact to report, not a crash
                    rows.append(base | {"undefined": str(error)})
                else:
                    rows.append(base | result.to_dict())
    return rows
