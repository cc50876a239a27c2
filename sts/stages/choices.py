"""Stages that show how settings were chosen: on the training domain's held-out problems, before any domain is scored.

They are run by hand (`sts stage sft_trials`) before a profile is fixed; their results are kept for the page to list.
"""

from __future__ import annotations

import json

from sts.engine.finetune import FineTuning, fine_tune
from sts.errors import StsError
from sts.run.run import OpenRun, stage

#: Added to the run's seed, so that the problems of the trials are drawn apart from those of the runs reported.
TRIAL_SEED = 1_000


def trial_run(run: OpenRun) -> OpenRun:
    """The run with the trials' seed and number of training examples."""
    return OpenRun(run.settings.model_copy(update={
        "seed": run.settings.seed + TRIAL_SEED, "seeds": [], "sft_examples": run.settings.sft_trial_examples}),
        results=run.results)


@stage("json", uses=("model", "model_revision", "dtype", "sft_data", "sft_lr_tried", "sft_trial_examples",
                     "sft_held_out", "sft_epochs", "sft_batch", "sft_micro_batch", "sft_max_length", "lora_rank",
                     "lora_alpha", "seed"), inputs=("model", "trial_problems"))
def sft_trials(run: OpenRun, report) -> list[dict]:
    """Held-out training-domain loss after a short fine-tuning with each rate in `sft_lr_tried`, at a seed of its own.

    One row a rate: lr, train and held_out (numbers of problems), steps, held_out_before, held_out_after (nats per
    solution token, averaged over problems).
    """
    rates = run.settings.sft_lr_tried
    if not rates:
        raise StsError("sft_lr_tried is empty: name the learning rates to compare, such as [1.0e-4, 3.0e-4].")
    trial = trial_run(run)
    settings, train, held_out = trial.settings, trial.sft_examples("train"), trial.sft_examples("held_out")
    rows = []
    for place, lr in enumerate(rates):
        folder = run.scratch("sft_trials") / f"{lr:g}"
        finished = folder / "row.json"
        if not finished.is_file():  # else done before the stage was killed
            tuning = FineTuning(settings.sft_epochs, lr, settings.sft_batch, settings.sft_micro_batch,
                                settings.sft_max_length, settings.lora_rank, settings.lora_alpha, settings.seed)
            log = fine_tune(run.load_model("" if settings.lora_rank else "float32"), train, held_out, tuning, folder,
                            report=lambda fraction, place=place: report((place + fraction) / len(rates)),
                            work=report.work)
            finished.write_text(json.dumps({"lr": lr} | {
                name: log[name] for name in ("train", "held_out", "steps", "held_out_before", "held_out_after")}))
        rows.append(json.loads(finished.read_text()))
    return rows
