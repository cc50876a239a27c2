"""The stages of the book, in the order in which they feed each other. The machinery is in stages.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas
import torch

from sts.data.prompts import PromptGroup, demonstration_draws, make_group, own_questions
from sts.data.sources import Example
from sts.engine import processes
from sts.engine.evaluate import MEASURES, domain_shifts, evaluate
from sts.engine.extract import Masks, paired_stats, row_paired_stats
from sts.engine.finetune import FineTuning, fine_tune, load_tuned
from sts.engine.models import LanguageModel
from sts.errors import StsError
from sts.measure.correlation import correlate
from sts.measure.cost import prompt_tokens
from sts.measure.score import VARIANTS, score_domains
from sts.measure.shift import overlap, shifted_dimensions
from sts.run.run import OpenRun, stage
from sts.stages.sae import MODEL, SAE, write_json

MASKS = ("question_tokens_only", "drop_first_positions", "outlier_norm")


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
        write_json(work / "training.json", log)
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
