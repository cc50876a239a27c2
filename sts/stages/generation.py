"""The stages in which the model answers in words; no chapter needs them unless `eval_generate` names something."""

from __future__ import annotations

import pandas

from sts.data.prompts import demonstration_draws
from sts.data.sources import Example
from sts.engine.evaluate import item_shifts
from sts.engine.finetune import load_tuned
from sts.engine.generation import benchmark_examples, generate_and_score, open_vllm
from sts.engine.models import resolve_model
from sts.errors import StsError
from sts.run.run import OpenRun, stage

GENERATION = ("model", "model_revision", "dtype", "eval_generate", "eval_max_tokens", "eval_limit", "eval_batch",
              "eval_backend", "eval_tensor_parallel", "demonstrations", "seed")


def generation_questions(run: OpenRun) -> dict[str, tuple[str, list[Example], list[Example]]]:
    """For each entry of `eval_generate`: (benchmark, questions, demonstrations)."""
    settings, chosen = run.settings, {}
    for name in settings.eval_generate:
        if name == "sft_held_out":
            chosen[name] = ("gsm8k", run.sft_examples("held_out"), [])
        elif name == "mmlu_pro":
            chosen[name] = (name, *_domain_questions(run))
        else:
            chosen[name] = (name, *benchmark_examples(name, limit=settings.eval_limit, seed=settings.seed))
    return chosen


def _domain_questions(run: OpenRun) -> tuple[list[Example], list[Example]]:
    """Each domain's questions, and its demonstrations: those set aside, in their order, or some of the questions."""
    settings, pool = run.settings, run.demonstration_pool()
    questions, worked = [], []
    for domain, examples in run.domain_examples().items():
        shown = pool.get(domain, [])[:settings.demonstrations]
        if domain not in pool:
            (shown, examples), = demonstration_draws(examples, settings.demonstrations, 1, seed=settings.seed,
                                                     what=f"Domain {domain!r}")
        worked += shown
        questions += examples[:settings.eval_limit or None]
    return questions, worked


def _generation(run: OpenRun, report, *, tuned: bool) -> pandas.DataFrame:
    settings = run.settings
    if not settings.eval_generate:
        raise StsError("eval_generate is empty: name what is to be answered in words, such as [gsm8k] or "
                       "[sft_held_out].")
    frames: list[pandas.DataFrame] = []
    questions = generation_questions(run)
    if settings.eval_backend == "vllm":
        location, _ = resolve_model(settings.model, settings.model_revision, run.results / "models")
        engine = open_vllm(location, revision=settings.model_revision, dtype=settings.dtype,
                           tensor_parallel=settings.eval_tensor_parallel, lora_rank=settings.lora_rank,
                           adapter=run.get("sft") / "adapter" if tuned else None, seed=settings.seed)
    else:
        from sts.engine.harness import open_harness

        engine = open_harness(load_tuned(run.load_model(), run.get("sft")) if tuned else run.lm,
                              batch=settings.eval_batch, work=report.work,
                              report=lambda fraction: report((len(frames) + fraction) / len(questions)))
    for name, (benchmark, examples, worked) in questions.items():
        frames.append(generate_and_score(engine, benchmark, examples, worked, shots=settings.demonstrations,
                                         max_tokens=settings.eval_max_tokens).assign(benchmark=name))
    return pandas.concat(frames, ignore_index=True)


@stage("parquet", version=2, uses=GENERATION, inputs=("model", "generation_data"))
def generation_before(run: OpenRun, report) -> pandas.DataFrame:
    """Generated answers to `eval_generate`, scored, by the untuned model."""
    return _generation(run, report, tuned=False)


@stage("parquet", version=2, uses=GENERATION, needs=("sft",), inputs=("model", "generation_data"))
def generation_after(run: OpenRun, report) -> pandas.DataFrame:
    """The same by the tuned model."""
    return _generation(run, report, tuned=True)


@stage("parquet", version=2, uses=("bootstrap", "seed"), needs=("generation_before", "generation_after"))
def generation_shift(run: OpenRun, report) -> pandas.DataFrame:
    """Change of the accuracy of generated answers, by benchmark and domain, with intervals and McNemar's test."""
    def items(frame: pandas.DataFrame) -> pandas.DataFrame:
        return frame.assign(accuracy_generated=100.0 * frame["correct"]).set_index("example_id")[
            ["domain", "accuracy_generated"]]

    after = dict(list(run.get("generation_after").groupby("benchmark")))
    return pandas.concat([
        item_shifts(items(own), items(after[name]), resamples=run.settings.bootstrap,
                    seed=run.settings.seed).assign(benchmark=name)
        for name, own in run.get("generation_before").groupby("benchmark", sort=False)], ignore_index=True)
