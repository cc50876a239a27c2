"""Answers in words, written and scored by lm-eval; no chapter asks for them unless `eval_generate` names something."""

from __future__ import annotations

import pandas

from sts.engine.finetune import load_tuned
from sts.engine.generation import generate_and_score, open_engine, open_vllm
from sts.engine.models import resolve_model
from sts.errors import StsError
from sts.measure.items import item_shifts
from sts.run.stage import stage


def _answers(benchmarks, shots, max_tokens, backend, batch, lm, sft, location, **vllm):
    if not benchmarks:
        raise StsError("eval_generate is empty: name what is to be answered in words, such as [gsm8k] or "
                       "[sft_held_out].")
    if backend == "vllm":
        engine = open_vllm(resolve_model(*location)[0], revision=location[1], adapter=sft and sft / "adapter", **vllm)
    else:
        engine = open_engine(load_tuned(lm(), sft) if sft else lm(), batch=batch)
    return pandas.concat([
        generate_and_score(engine, benchmark, questions, worked, shots=shots, max_tokens=max_tokens).assign(
            benchmark=name) for name, (benchmark, questions, worked) in benchmarks.items()], ignore_index=True)


@stage("parquet", version=3)
def generation_before(fresh_lm, benchmarks, demonstrations, eval_max_tokens, eval_backend, eval_batch, model,
                      model_revision, dtype, eval_tensor_parallel, seed, scratch):
    """Generated answers to `eval_generate`, scored, by the untuned model."""
    return _answers(benchmarks, demonstrations, eval_max_tokens, eval_backend, eval_batch, fresh_lm, None,
                    (model, model_revision, scratch), dtype=dtype, tensor_parallel=eval_tensor_parallel, seed=seed)


@stage("parquet", version=3)
def generation_after(fresh_lm, sft, benchmarks, demonstrations, eval_max_tokens, eval_backend, eval_batch, model,
                     model_revision, dtype, eval_tensor_parallel, lora_rank, seed, scratch):
    """The same by the tuned model."""
    return _answers(benchmarks, demonstrations, eval_max_tokens, eval_backend, eval_batch, fresh_lm, sft,
                    (model, model_revision, scratch), dtype=dtype, tensor_parallel=eval_tensor_parallel,
                    lora_rank=lora_rank, seed=seed)


@stage("parquet", version=3)
def generation_shift(generation_before, generation_after, bootstrap, seed):
    """Change of the accuracy of generated answers, by benchmark and domain, with intervals and McNemar's test."""
    before, after = (dict(list(
        frame.assign(accuracy_generated=100.0 * frame["correct"]).set_index("example_id").groupby("benchmark"))) for
        frame in (generation_before, generation_after))
    return pandas.concat([item_shifts(own, after[name], resamples=bootstrap, seed=seed).assign(benchmark=name)
                          for name, own in before.items()], ignore_index=True)
