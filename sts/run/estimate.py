"""What a plan takes before anything is run, about: tokens, hours on named hardware, memory and disk.

Where a job's record says what was run, that is taken. Else tokens follow from the settings and the texts: characters by
so many a token as the model's tokenizer makes of a sample. Of the model its configuration is read, never its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from sts.data.load import without_hub
from sts.data.prompts import encode, question_text, render, solution_text
from sts.data.sources import Example
from sts.engine.models import decoder_layers
from sts.errors import StsError
from sts.run import resources
from sts.run.plan import Job
from sts.run.run import OpenRun

#: Useful floating-point operations a second: of two cores in float32 as measured with models of 0.5 and 1.5 billion
#: parameters; of an H100 in bf16 30% of its 990e12 are assumed.
HARDWARE = {"2 cores AVX-512": 1.7e11, "2 cores AVX2": 1.1e11, "one H100": 0.3 * 990e12}
#: Tokens of a template around a demonstration; examples that characters a token are taken from; prompts that say what
#: norm makes a sink.
TURN, SAMPLE, SINKS = 10, 64, 8
#: Bytes: of Python and libraries; a token and dimension while reading; a token, dimension and layer while training; a
#: token and word of the vocabulary while training; a number of each precision.
LIBRARIES, READING, TRAINING, LOGITS, BYTES = 1.5e9, 80, 100, 16, {"float32": 4, "bfloat16": 2, "float16": 2}
#: Stage -> samples that it trains SAEs on, times their latents.
SAES = {"sae": lambda own: own.sae_samples * own.sae_latents,
        "small_sae": lambda own: own.small_sae_samples * own.small_sae_latents,
        "sweep_sae_training": lambda own: own.sweep_sae_samples * (
            sum(own.sweep_widths) + own.sae_latents * (1 + len(own.sweep_layers) + len(own.sweep_k))
            if own.sweep_widths or own.sweep_layers or own.sweep_k else 0)}
#: Parameters of stages that run more than a few passes.
COUNTED = {"work", "passes", "tuned", "fresh_lm"}


class Cost(NamedTuple):
    """What a job takes: tokens read and trained on (each once an epoch), floating-point operations, bytes."""

    read: float = 0.0
    trained: float = 0.0
    operations: float = 0.0
    memory: float = LIBRARIES
    disk: float = 0.0


def sized(run: OpenRun) -> Any:
    """The run's model without weights."""
    def made() -> Any:
        config = resources.described(run)[1].get_text_config()
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    return run.once("size", ("model", "model_revision"), made)


def characters(run: OpenRun, examples: Sequence[Example]) -> float:
    """About how many characters a token of these texts is, by the model's tokenizer on a sample."""
    sample = [question_text(one) + solution_text(one) for one in examples[::len(examples) // SAMPLE + 1]] or [" "]
    return sum(map(len, sample)) / sum(map(len, resources.described(run)[0](sample)["input_ids"]))


def lengths(run: OpenRun, found: Any) -> list[list[tuple[float, float]]]:
    """About how many tokens examples' questions and solutions are, by domain where they are."""
    parts = [*found.values()] if isinstance(found, dict) else [found]
    per = characters(run, [one for own in parts for one in own])
    return [[(len(question_text(one)) / per, len(solution_text(one)) / per) for one in own] for own in parts]


class Asked:
    """Tokens of reading questions, of at most `budget`: `alone`, the questions'; `all`, with those behind each of
    `sets` of `count` demonstrations, from the `pool` or from among them, and of the template, `front`; `twice`, in two
    models without demonstrations. `apart` if a question stands behind one set alone."""

    def __init__(self, front: int, own: list, budget: float, count: int, sets: int = 1, pool: list | None = None, *,
                 apart: bool = False):
        mean = max(1.0, sum(question for question, _ in own) / max(1, len(own)))
        there = mean * max(1, len(own) - (0 if pool else count)) / (sets if apart else 1)
        each = min(budget / sets + mean / 2, there)  # the last question is whole
        self.alone = each * (sets if apart else 1)
        prompts, worked = self.alone / mean, sum(map(sum, pool or own)) / max(1, len(pool or own)) + TURN
        sinks = min(SINKS, prompts) * (mean + front)
        self.all = self.alone + front + sinks + sets * (each + count * worked + front)
        self.twice = 2 * prompts * (mean + front) + sinks


def reads(run: OpenRun, stage: str) -> list[tuple[float, float]]:
    """What a stage reads: tokens, and through which share of the layers, above 1 with backward passes; nothing where it
    runs no model, or briefly."""
    own, layers, tokenizer = run.settings, sized(run).config.num_hidden_layers, resources.described(run)[0]
    share, front = (own.layer + 1) / layers, len(encode(tokenizer, render(tokenizer, ""))[0])
    sites, draws = {own.layer, *own.sweep_layers}, own.demonstration_draws

    def of(what: str) -> list[list[tuple[float, float]]]:
        return lengths(run, getattr(resources, what)(run))

    def whole(parts: list, limit: int = 0, most: float = float("inf"), around: float = front) -> float:
        return sum(min(most, sum(one) + around) for part in parts for one in part[:limit or None])

    def asked() -> list[Asked]:
        if stage.startswith("domain"):
            questions = of("questions")
            return [Asked(front, one, own.score_tokens, own.demonstrations, draws, pool)
                    for one, pool in zip(questions, of("examples_set_aside") or [None] * len(questions), strict=True)]
        return [Asked(front, of("train")[0], own.shift_tokens, own.shift_demonstrations, draws, apart=True)]

    match stage:
        case "shift" | "shift_controls" | "domain_stats" | "domain_raw_stats":
            return [(sum(one.all for one in asked()), share)]
        case "shift_rows" | "domain_rows":
            return [(sum(2 * min(own.official_rows, one.alone) for one in asked()), share)]
        case "sft_shift" | "rl_shift" | "domain_model_change":
            return [(sum(one.twice for one in asked()), share)]
        case "sft_shift_solutions":
            return [(2 * whole(of("held_out")) + whole(of("held_out"), SINKS), share)]
        case "shift_by_draw" | "shift_by_other_domain" | "shift_by_demonstrations":
            counts = own.overlap_demonstrations if "demonstrations" in stage else [own.shift_demonstrations]
            (train,), sets = of("train"), own.overlap_draws
            return [(sets * Asked(front, train[max(counts) * sets:], own.overlap_tokens, count, 1, train).all, share)
                    for count in counts]
        case "evaluation_before" | "evaluation_after" | "rl_evaluation" | "answer_forms":
            kinds, asks, limit = (2, "validation", 0) if "forms" in stage else (
                len(own.eval_kinds), "questions", own.eval_limit)
            # In plain text, and run once for all questions of a domain.
            shots = whole(of("shots"), around=0)
            return [((whole(of(asks), limit, around=0 if shots else front) + shots) * (kinds if shots else 1), 1.0)]
        case "generation_before" | "generation_after":
            return [((1 + own.demonstrations * bool(worked)) * whole(lengths(run, questions))
                     + len(questions) * own.eval_max_tokens, 1.0)
                    for _, questions, worked in resources.benchmarks(run).values()]
        case "ablation":
            once, sets = whole(of("held_out"), own.ablation_examples), 2 + 3 * own.ablation_draws
            return [(once, share), (once * (1 + len(own.ablation_latents) * sets), 1 - share)]
        case "sft" | "sft_trials":
            times, parts = (len(own.sft_lr_tried), resources.trial(run)[:2]) if "trials" in stage else (
                1, (resources.train(run), resources.held_out(run)))
            train, held_out = (times * whole(lengths(run, part), most=own.sft_max_length) for part in parts)
            return [(own.sft_epochs * train, 2.0 if own.lora_rank else 3.0), (2 * held_out, 1.0)]
        case "rl":  # as its work is counted: sampling, the untuned model's pass, the way there and back
            (train,), answers = of("train"), own.rl_steps * own.rl_problems * own.rl_group
            asked_of = sum(question for question, _ in train) / len(train) + front
            return [(answers * (asked_of + own.rl_tokens), 4.0)]
        case "text_activations":
            return [(whole(of("texts")), share)]
        case "pool_activations":
            return [(len(own.pool) * own.pool_tokens, share)]
        case "sae":
            return [(1.02 * sum(own.sae_text.values()), share)]  # with the held-out part
        case "sweep_sae_training":
            return [(1.05 * own.sweep_text_tokens, (max(sites) + 1) / layers)] if SAES[stage](own) else []
        case "sweep_saes":
            return [(tokens, (one + 1) / layers) for one in sites if SAES["sweep_sae_training"](own)
                    for name in ("shift", "domain_stats") for tokens, _ in reads(run, name)]
        case "sweep_settings":
            values = {"demonstrations": own.sweep_demonstrations, "score_tokens": own.sweep_tokens,
                      "shift_demonstrations": own.sweep_shift_demonstrations, "shift_tokens": own.sweep_shift_tokens}
            return [part for name, swept in values.items() for value in swept for part in reads(
                run.variant(**{name: value}), "shift" if name.startswith("shift") else "domain_stats")
                    ] + len(own.sweep_masks) * (reads(run, "shift") + reads(run, "domain_stats"))
    return []


def cost(job: Job) -> Cost:
    """About what a job takes; `StsError` where no record says it and the texts are not here."""
    run, work, own, model = job.run, job.provenance.get("work", {}), job.run.settings, sized(job.run)
    layers, width, training = decoder_layers(model), model.config.hidden_size, job.stage in ("sft", "sft_trials")
    inner, parameters = (sum(one.numel() for one in part.parameters()) for part in (layers, model))
    if tokens := work.get("tokens"):  # a backward pass counts once, in full fine-tuning twice
        passes, trained = work["passes"], training * (work["passes"] - tokens) / (1 if own.lora_rank else 2)
        read = tokens - trained
    else:
        parts = reads(run, job.stage)
        read, trained = (sum(tokens for tokens, share in parts if (share > 1) == more) for more in (False, True))
        passes = sum(tokens * share for tokens, share in parts)
    samples = SAES.get(job.stage, lambda settings: 0)(own)
    memory = LIBRARIES + parameters * BYTES[own.dtype] * len(job.takes) + own.tokens_per_batch * width * READING
    disk = read * width * 2 * (job.stage in ("text_activations", "sae"))
    if training:
        disk = 4 * (own.lora_rank * sum(one.in_features + one.out_features for one in layers.modules()
                                        if isinstance(one, torch.nn.Linear)) or parameters)
        memory += 3 * disk + own.sft_micro_batch * own.sft_max_length * (
            len(layers) * width * TRAINING + model.config.vocab_size * LOGITS)
    # Of an SAE's encoder and decoder 2 operations a parameter and sample, forward once and backward twice.
    return Cost(read, trained, 2 * inner * passes + 12 * width * samples, memory, disk)


def costs(found: Mapping[str, Job], todo: Collection[str]) -> dict[str, Cost]:
    """About what each job takes; of one that need not be run nothing, where that is neither recorded nor at hand.
    `StsError` for another one."""
    known = {label: cost(job) if job.takes and label in todo else Cost() for label, job in found.items()}
    for label, job in found.items():
        if job.takes and label not in todo:
            with suppress(StsError), without_hub():
                known[label] = cost(job)
    return known


def summary(run: OpenRun, found: Mapping[str, Job], todo: Collection[str], known: Mapping[str, Cost]) -> str:
    """What a run's jobs take, by stage, in all, and those that are left to run; and how that is known."""
    def row(name: str, labels: Collection[str]) -> str:
        read, trained, operations = (sum(known[label][place] for label in labels) for place in range(3))
        numbers = (len(labels), sum(found[label].stored for label in labels), round(read), round(trained))
        return f"{name:<24}" + "".join(f"{number:>14,}" for number in numbers) + "".join(
            f"{operations / speed / 3600:>17,.3f}" for speed in HARDWARE.values())

    stages = {job.stage: [label for label, own in found.items() if own.stage == job.stage] for job in found.values()}
    models = {name: labels for name, labels in stages.items() if any(known[label].operations for label in labels)}
    unknown = [name for name, (first, *_) in stages.items() if name not in models and first in todo
               and COUNTED & {*run.spec(name).parameters}]
    heads = f"{'':<24}" + "".join(f"{name:>14}" for name in ("jobs", "stored", "tokens read", "trained on")) + "".join(
        f"{name:>17}" for name in HARDWARE)
    memory, disk = max(one.memory for one in known.values()), sum(one.disk for one in known.values())
    lines = [f"{'hours on':>{len(heads)}}", heads, *(row(name, labels) for name, labels in models.items()),
             row("other stages", [label for label, job in found.items() if job.stage not in models]),
             row("all", found), row("left to run", todo), "",
             f"Memory: about {memory / 1e9:.1f} GB a job at most. Disk: about {disk / 1e9:.1f} GB, and the model.",
             "Two cores compute in float32, as fast as was measured; the H100 in bf16, at an assumed 30% of its peak.",
             f"Without an estimate: {', '.join(unknown)}." if unknown else "Other stages run no model, or briefly."]
    return "\n".join(lines)
