"""What really happens: fine-tuning, and every domain's questions before and after it; answers in words only where
`eval_generate` names something."""

from __future__ import annotations

import json
import shutil

import pandas

from sts.data.load import shared_questions
from sts.engine.evaluate import evaluate
from sts.engine.finetune import FineTuning, fine_tune, load_tuned, to_train
from sts.engine.generation import generate_and_score, open_engine
from sts.errors import StsError
from sts.measure.items import above_chance, item_measures, item_shifts
from sts.run.stage import stage, steps


@stage("folder", version=2, parallel=True)
def sft(fresh_lm, train, held_out, fine_tuning, report, work, scratch):
    """Fine-tune on the training domain's worked solutions: adapter, loss curve, held-out loss before and after."""
    log = fine_tune(to_train(fresh_lm, fine_tuning), train, held_out, fine_tuning, scratch, report=report, work=work)
    if log:  # the main process alone has one
        (scratch / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        for what, said in (("left_out", "left out: no solution, or no room for it"), ("cut", "cut at sft_max_length")):
            if log[what]:
                work.note(f"{len(log[what])} examples to train on or to hold out are {said}.")
        # Renamed first: killed halfway through the removal, nobody takes the rest for checkpoints.
        shutil.rmtree(scratch / "finished", ignore_errors=True)
        shutil.rmtree((scratch / "checkpoints").rename(scratch / "finished"))
    return scratch


@stage("json")
def sft_trials(fresh_lm, trial, sft_lr_tried, sft_epochs, sft_batch, sft_micro_batch, sft_max_length, lora_rank,
               lora_alpha, report, work, scratch):
    """Held-out loss (nats per solution token) after a short fine-tuning with each rate in `sft_lr_tried`, at a seed of
    its own: one row a rate, with numbers of problems and steps. Run by hand before a profile is fixed."""
    if not sft_lr_tried:
        raise StsError("sft_lr_tried is empty: name the learning rates to compare, such as [1.0e-4, 3.0e-4].")
    (train, held_out, seed), rows = trial, []
    for lr, told in steps(sft_lr_tried, report):
        # A finished rate's checkpoints stay, so that a killed stage does not train it again.
        own = FineTuning(sft_epochs, lr, sft_batch, sft_micro_batch, sft_max_length, lora_rank, lora_alpha, seed)
        log = fine_tune(to_train(fresh_lm, own), train, held_out, own, scratch / f"{lr:g}", report=told, work=work)
        rows.append({"lr": lr} | {name: log[name] for name in (
            "train", "held_out", "steps", "held_out_before", "held_out_after")})
    return rows


def _asked(questions, limit):
    return [example for group in questions.values() for example in group[:limit or None]]


@stage("json")
def answer_forms(lm, validation, eval_batch, report, work, scratch):
    """Options' letters and texts on validation questions, untuned: `items.above_chance` of each, by which `eval_kinds`
    is chosen before anything is trained; and how many parameters the model has."""
    questions, shots = validation
    rows = evaluate(lm, _asked(questions, 0), kinds=("letter", "text"), shots=shots, batch=eval_batch, scratch=scratch,
                    report=report, work=work)
    return [{"form": str(form), "parameters": lm.model.num_parameters()} | above_chance(own)
            for form, own in rows.groupby("kind")]


@stage("parquet", version=3)
def evaluation_before(lm, questions, shots, eval_limit, eval_batch, eval_kinds, report, work, scratch):
    """Log-likelihoods of `eval_kinds` under the untuned model."""
    return evaluate(lm, _asked(questions, eval_limit), kinds=eval_kinds, shots=shots, batch=eval_batch, scratch=scratch,
                    report=report, work=work)


@stage("parquet", version=3, inputs_without=("sft_train",))
def evaluation_after(tuned, train, questions, shots, eval_limit, eval_batch, eval_kinds, report, work, scratch):
    """The same under the tuned model; questions that it was trained on are counted in the record of what was run."""
    asked = _asked(questions, eval_limit)
    if shared := shared_questions(train, asked):
        work.note(f"{shared} of the {len(asked)} questions that are evaluated were trained on.")
    return evaluate(tuned, asked, kinds=eval_kinds, shots=shots, batch=eval_batch, scratch=scratch, report=report,
                    work=work)


@stage("parquet", version=4)
def domain_shift(evaluation_before, evaluation_after, bootstrap, seed):
    """Change of every measure that was evaluated, by domain, with intervals and McNemar's test."""
    before, after = item_measures(evaluation_before), item_measures(evaluation_after)
    return item_shifts(before, after, resamples=bootstrap, seed=seed)


def _generated(lm, benchmarks, shots, tokens, batch):
    if not benchmarks:
        raise StsError("eval_generate is empty: name what is to be answered in words, such as [gsm8k] or "
                       "[sft_held_out].")
    engine = open_engine(lm(), batch=batch)
    return pandas.concat([
        generate_and_score(engine, benchmark, questions, worked, shots=shots, max_tokens=tokens).assign(benchmark=name)
        for name, (benchmark, questions, worked) in benchmarks.items()], ignore_index=True)


@stage("parquet", version=3)
def generation_before(fresh_lm, benchmarks, demonstrations, eval_max_tokens, eval_batch):
    """Generated answers to `eval_generate`, scored, by the untuned model."""
    return _generated(fresh_lm, benchmarks, demonstrations, eval_max_tokens, eval_batch)


@stage("parquet", version=3)
def generation_after(fresh_lm, sft, benchmarks, demonstrations, eval_max_tokens, eval_batch):
    """The same by the tuned model."""
    return _generated(lambda: load_tuned(fresh_lm(), sft), benchmarks, demonstrations, eval_max_tokens, eval_batch)


@stage("parquet", version=3)
def generation_shift(generation_before, generation_after, bootstrap, seed):
    """Change of the accuracy of generated answers, by benchmark and domain, with intervals and McNemar's test."""
    before, after = (frame.assign(accuracy_generated=100.0 * frame["correct"]).set_index(["benchmark", "example_id"])
                     for frame in (generation_before, generation_after))
    return pandas.concat([item_shifts(before.loc[name], after.loc[name], resamples=bootstrap, seed=seed).assign(
        benchmark=name) for name in before.index.unique("benchmark")], ignore_index=True)
