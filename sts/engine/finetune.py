"""Fine-tuning by TRL's SFTTrainer with PEFT's LoRA (or in full); the loss is on the solution alone.

On several GPUs: `accelerate launch --num_processes 4 -m sts.cli stage sft --run X`. Every process holds a copy of the
model and takes its share of each batch; the main one writes.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas
import torch

from sts.data.prompts import question_text, solution_prompt, solution_text
from sts.data.sources import Example
from sts.engine.models import LanguageModel, decoder_layers
from sts.engine.work import Work, count
from sts.errors import StsError


@dataclass(frozen=True)
class FineTuning:
    """Settings of one supervised fine-tuning run (AdamW, cosine schedule with 10% warm-up, gradients clipped at 1).

    `batch` is the examples of one optimiser step over all processes, `micro_batch` those in memory of one at once.
    """

    epochs: int
    lr: float
    batch: int
    micro_batch: int
    max_length: int
    lora_rank: int
    lora_alpha: int
    seed: int


def tokens_to_train_on(tokenizer, examples: list[Example], max_length: int) -> tuple[list[dict], dict[str, list[str]]]:
    """(what is trained on of each example, names of what is not trained on).

    Rows are {"input_ids", "completion_mask"}, 1 from the solution's first token on: the tokens that are read and scored
    (`prompts.solution_prompt`), to the end of the turn, cut at `max_length`. "left_out" of them is an example without a
    solution or whose question alone fills `max_length`; "cut" is one with only the beginning of its solution.
    """
    rows, not_trained = [], {"left_out": [], "cut": []}
    for example in examples:
        prompt = solution_prompt(tokenizer, example) if solution_text(example) and question_text(example) else None
        if prompt is None or prompt.question[0] >= max_length:
            not_trained["left_out"].append(example.example_id)
            continue
        # A chat template ends the turn itself.
        ids = prompt.ids if tokenizer.chat_template else (*prompt.ids, tokenizer.eos_token_id)
        if prompt.question[1] > max_length:
            not_trained["cut"].append(example.example_id)
        mask = [int(place >= prompt.question[0]) for place in range(len(ids))]
        rows.append({"input_ids": list(ids[:max_length]), "completion_mask": mask[:max_length]})
    return rows, not_trained


def divide_batch(batch: int, micro_batch: int, count: int, name: str = "sft_batch") -> tuple[int, int]:
    """(examples in memory at once, passes added up to a step) of each of `count` processes; batch is their product. The
    first is at most `micro_batch`, and less where that does not divide a process's share, which has to be whole."""
    if batch % count:
        raise StsError(f"{name} is {batch}, which {count} processes cannot share equally. Use a multiple of "
                       f"{count}, such as {math.ceil(batch / count) * count}, or launch another number of processes.")
    share = batch // count
    micro = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
    return micro, share // micro


def trainer_options(lm: LanguageModel, checkpoints: Path, steps: int, batch: tuple[int, int],
                    seed: int) -> dict[str, Any]:
    """What TRL's trainers are told alike; `batch` is what `divide_batch` gives. They show no progress of their own."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    on_cpu = lm.device.type == "cpu"
    return {"output_dir": str(checkpoints), "per_device_train_batch_size": batch[0], "data_seed": seed, "seed": seed,
            "gradient_accumulation_steps": batch[1], "max_grad_norm": 1.0, "adam_beta2": 0.95, "logging_steps": 1,
            "save_strategy": "steps", "save_steps": max(1, steps // 4), "save_total_limit": 1, "report_to": [],
            "disable_tqdm": True, "use_cpu": on_cpu, "fp16": False, "gradient_checkpointing": False,
            "bf16": not on_cpu and lm.model.dtype == torch.bfloat16, "dataloader_pin_memory": not on_cpu}


def goes_on(trainer: Any, checkpoints: Path, report: Callable[[float], None]) -> bool:
    """Whether there is a whole checkpoint to go on from; others are removed. The trainer prints no step, but reports
    the fraction done."""
    from transformers import PrinterCallback, TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            report(state.global_step / state.max_steps)

    trainer.add_callback(Progress())
    trainer.remove_callback(PrinterCallback)  # it prints every step into the notebook
    if trainer.is_world_process_zero():
        for checkpoint in checkpoints.glob("checkpoint-*"):
            if not (checkpoint / "trainer_state.json").is_file():  # written last
                shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()  # before anyone looks for checkpoints
    return any(checkpoints.glob("checkpoint-*"))


def with_adapters(model: Any, rank: int, alpha: int, seed: int) -> Any:
    """The model, which is changed, with LoRA adapters on all linear layers as training begins; as it is, of rank 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # before the adapters get their random start
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear",
                                            task_type="CAUSAL_LM")) if rank else model


def fine_tune(lm: LanguageModel, train: list[Example], held_out: list[Example], settings: FineTuning, folder: Path, *,
              module: torch.nn.Module | None = None, report: Callable[[float], None] = lambda fraction: None,
              work: Work | None = None) -> dict:
    """Fine-tune a model on worked solutions and save the adapter (or the whole model) to `folder`.

    With `module`, a part that was added to the model (`readouts.attached`), that part alone is trained, whatever
    `lora_rank` says; nothing is saved, and the model is as it was. With `held_out` empty no loss is taken on it.

    A killed run goes on from its last checkpoint in `folder`, and ends as it would have without the interruption. All
    processes call this with the same arguments; a step holds the same examples as with one process, but for an epoch's
    last one, which is filled up with the epoch's first examples where it cannot be shared equally.

    The model's weights are changed in memory, so load it for this purpose alone. `work` counts a backward pass as one
    forward pass for activations and, in full fine-tuning, one more for weights.

    Returns:
        {"curve": [{"step", "loss"}], "held_out_before", "held_out_after" (nats per solution token, averaged over
        problems; None without), "steps", "trained_parameters", "train" and "held_out" (numbers of examples used),
        "left_out", "cut" (see `tokens_to_train_on`)}; {} in all but the main process. `StsError` if none is left.
    """
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    parts = [tokens_to_train_on(lm.tokenizer, part, settings.max_length) for part in (train, held_out)]
    (train_rows, _), (held_out_rows, _) = parts
    if not train_rows or (held_out and not held_out_rows):
        raise StsError(f"No {'held-out' if train_rows else 'training'} example leaves room for its solution, or "
                       f"none has one: the questions alone fill the {settings.max_length} tokens of sft_max_length. "
                       "Raise it, or use other examples.")
    batch = divide_batch(settings.batch, settings.micro_batch, count())
    added, whole = module is not None, module is None and not settings.lora_rank
    rank = 0 if added else settings.lora_rank
    model = with_adapters(lm.model.requires_grad_(whole), rank, settings.lora_alpha, settings.seed)
    if module is not None:
        module.requires_grad_(True)
    steps = settings.epochs * math.ceil(len(train_rows) / settings.batch)
    checkpoints = folder / "checkpoints"
    options = trainer_options(lm, checkpoints, steps, batch, settings.seed)
    if added:
        options["save_strategy"] = "no"
    config = SFTConfig(
        **options, num_train_epochs=settings.epochs,
        # One held-out problem a batch: the trainer averages batches, so this is the mean over problems.
        learning_rate=settings.lr, per_device_eval_batch_size=1, max_length=None, completion_only_loss=True,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 10), weight_decay=0.01,
        # Batches of like length would save padding, but their order is drawn from the global generator, so that a run
        # that goes on from a checkpoint would see other batches than one that was never killed.
        train_sampling_strategy="random")
    trainer: Any = SFTTrainer(
        model=model, args=config, processing_class=lm.tokenizer, train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out else None)
    main, meet = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    resumable = goes_on(trainer, checkpoints, report)
    # Inside `train`: evaluated before it, the model would be taken for prepared, and several processes would train a
    # copy each without adding up their gradients.
    trainer.args.eval_on_start = bool(held_out) and not resumable
    trainer.train(resume_from_checkpoint=resumable)
    after = trainer.evaluate()["eval_loss"] if held_out else None
    if work is not None:
        layers = work.of_layers = len(decoder_layers(lm.model))
        trained, scored = (sum(len(row["input_ids"]) for row in rows) for rows, _ in parts)
        work.add(settings.epochs * trained, settings.epochs * trained, layers * (3 if whole else 2))
        work.add(2 * scored, 2 * scored, layers)
    if added:
        for name in ("forward", "_original_forward"):  # the trainer's; another one would wrap it again
            vars(model).pop(name, None)
        model.eval()
    elif main:
        (model if whole else trainer.model).save_pretrained(str(folder / "adapter"))
    meet()
    history = trainer.state.log_history
    return {} if not main else {
        "curve": [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row],
        "held_out_before": next((row["eval_loss"] for row in history if "eval_loss" in row), None),
        "held_out_after": after,
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "train": len(train_rows), "held_out": len(held_out_rows),
    } | {why: [name for _, not_trained in parts for name in not_trained[why]] for why in ("left_out", "cut")}


def load_tuned(lm: LanguageModel, folder: Path) -> LanguageModel:
    """The base model, which is changed, with the adapter that training wrote to `folder` (merged in float32; in bf16
    that would round small changes away), or the whole model; `StsError` for a recorded folder without weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise StsError(f"{folder.name} was recorded without its weights. To compute it here: sts stage "
                       f"{folder.name.partition('-')[0]} --again, with the same run and parameters.")
    if (adapter / "adapter_config.json").is_file():
        # Adapted layers may stay inside the base model; that is what a harness expects to be handed.
        adapted: Any = PeftModel.from_pretrained(lm.model, str(adapter))
        model: Any = adapted.merge_and_unload() if lm.model.dtype == torch.float32 else adapted.get_base_model()
    else:
        model = AutoModelForCausalLM.from_pretrained(adapter, dtype=lm.model.dtype)
    return replace(lm, name=f"{lm.name} (tuned)", model=model.to(lm.device).eval().requires_grad_(False))


def to_train(fresh_lm: Callable[..., LanguageModel], settings: FineTuning) -> LanguageModel:
    """A copy of the model to fine-tune; all weights in bf16 would round most updates away, and adapters are float32."""
    return fresh_lm() if settings.lora_rank else fresh_lm(dtype="float32")


def retrained(fresh_lm: Callable[..., LanguageModel], train: list[Example], settings: FineTuning, folder: Path,
              measured: Callable[[LanguageModel], pandas.DataFrame], *, report: Callable[[float], None],
              work: Work) -> pandas.DataFrame:
    """What is `measured` of a copy of the model after fine-tuning on other examples, kept beside `folder`."""
    kept = folder.with_name(f"{folder.name}.parquet")
    if not kept.exists():
        fine_tune(to_train(fresh_lm, settings), train, [], settings, folder, report=report, work=work)
        gc.collect()  # the trainer, which refers to itself, holds the model
        measured(load_tuned(fresh_lm(), folder)).to_parquet(kept.with_suffix(".new"), index=False)
        kept.with_suffix(".new").replace(kept)  # killed before this line, the training counts as not measured
        shutil.rmtree(folder)
    return pandas.read_parquet(kept)
