"""Reinforcement learning by TRL's GRPOTrainer with PEFT's LoRA, on problems whose answers can be verified.

GRPO (Shao et al., 2024, arXiv 2402.03300): several answers to a problem are sampled from the model; each is rewarded
for ending within the limit, a little, and for being right as well; what is learned from is by how much it is better
than the others of its group. A term of the loss keeps the model near the untuned one, by their Kullback-Leibler
divergence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sts.data.prompts import encode, make_prompt, question_text, render
from sts.data.sources import Example
from sts.engine.finetune import divide_batch, goes_on, trainer_options
from sts.engine.generation import is_same_answer
from sts.engine.models import LanguageModel, decoder_layers
from sts.engine.work import Work, count
from sts.errors import StsError

#: What an answer earns for ending within the limit, beside the 1 for being right.
FORMAT_WEIGHT = 0.1
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
#: What TRL logs of a step, by its name here: shares of answers, nats a token, tokens, share of groups without a signal.
LOGGED = {"reward": "reward", "correct": "rewards/correct/mean", "ended": "rewards/ended/mean", "kl": "kl",
          "entropy": "entropy", "length": "completions/mean_length", "alike": "frac_reward_zero_std"}


def is_right(right: str, text: str) -> bool:
    """Whether an answer's last number is the right one; where that is no number, whether math-verify finds it. To
    math-verify a sum is the same as its result, so that a model soon learns to write down the problem."""
    if not NUMBER.fullmatch(right):
        return is_same_answer(right, text)
    *_, last = ["nan", *NUMBER.findall(text)]
    return float(last.replace(",", "")) == float(right.replace(",", ""))


def reinforce(lm: LanguageModel, train: Sequence[Example], folder: Path, *, steps: int, lr: float, kl: float,
              problems: int, group: int, micro_batch: int, tokens: int, lora_rank: int, lora_alpha: int, seed: int,
              report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> dict:
    """Train a model by GRPO (AdamW, constant rate, one update a step) and save the adapter to `folder`.

    A step samples `group` answers of at most `tokens` tokens to each of `problems` problems, in an order drawn by the
    seed, and learns from `micro_batch` answers at once; `kl`, above 0, is the weight of the divergence. A killed run
    goes on from its last checkpoint. All processes of a launch call this alike. The model is changed in memory. `work`
    counts sampling, the untuned model's pass, the one that is learned from and the way back as a forward pass each.

    Returns:
        {"curve": [{"step", and the names of `LOGGED`}], "steps", "group", "trained_parameters", "batch": the last
        step's "answers", "correct", "ended" and "advantages", as TRL took them, group by group}; {} in all but the main
        process. `StsError` for no adapters, a single answer a problem, a step that processes cannot share, a problem
        without an answer that can be verified, or without room for one.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    if not lora_rank or group < 2:
        raise StsError("Reinforcement learning compares the answers of a group, and trains adapters beside the model: "
                       "rl_group is at least 2 and lora_rank at least 1.")
    for example in train:
        if example.options or not is_right(example.answer, example.answer):
            raise StsError(f"Whether an answer to {example.example_id} is right cannot be verified: a number or a "
                           "formula can, without options. Use another rl_data, such as chain_sum or gsm8k.")
        if len(make_prompt(lm.tokenizer, question_text(example)).ids) + tokens > lm.context_length:
            raise StsError(f"Problem {example.example_id} leaves no room for {tokens} tokens of answer in the model's "
                           f"context of {lm.context_length}. Lower rl_tokens.")
    batch = divide_batch(problems * group, micro_batch, count(), "rl_problems x rl_group")
    generator, order = random.Random(seed), []
    while len(order) < steps * problems:
        order += generator.sample(list(train), len(train))

    def ended(completion_ids, **_):
        return [float(ids[-1] in trainer.eos_token_ids) for ids in completion_ids]

    def correct(completions, completion_ids, answer, **_):
        return [whole * is_right(own, text) for own, text, whole in zip(
            answer, completions, ended(completion_ids), strict=True)]

    class Trainer(GRPOTrainer):
        def _tokenize_prompts(self, prompts):  # the very tokens that are read everywhere else
            return [list(encode(lm.tokenizer, prompt)[0]) for prompt in prompts], None, {}

    rewards: Any = [correct, ended]
    rows = [{"prompt": render(lm.tokenizer, question_text(one)), "answer": one.answer} for one in order]
    trainer: Any = Trainer(
        model=lm.model, reward_funcs=rewards, processing_class=lm.tokenizer,
        peft_config=LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        train_dataset=Dataset.from_list(rows[:steps * problems]),
        args=GRPOConfig(**trainer_options(lm, folder / "checkpoints", steps, batch, seed), max_steps=steps,
                        learning_rate=lr, lr_scheduler_type="constant", beta=kl, num_generations=group,
                        max_completion_length=tokens, reward_weights=[1.0, FORMAT_WEIGHT], shuffle_dataset=False))
    trainer.train(resume_from_checkpoint=goes_on(trainer, folder / "checkpoints", report))
    history, logs = [row for row in trainer.state.log_history if "reward" in row], trainer._logs
    if work is not None:
        read, layers = int(history[-1]["num_tokens"]), len(decoder_layers(lm.model))
        work.of_layers = layers
        work.add(read, read, 4 * layers)
    if main := trainer.is_world_process_zero():
        trainer.model.save_pretrained(str(folder / "adapter"))
    trainer.accelerator.wait_for_everyone()
    return {} if not main else {
        "curve": [{"step": row["step"]} | {name: row[said] for name, said in LOGGED.items()} for row in history],
        "steps": trainer.state.global_step, "group": group,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "batch": {name: [*values] for name, values in {"answers": logs["completion"], **logs["rewards"],
                                                       "advantages": logs["advantages"]}.items()}}


def right_answer(lm: LanguageModel, example: Example, answers: int, tokens: int) -> str:
    """The first right one of so many answers sampled from a model, that ends within so many tokens; "" if none does.
    At temperature 1, by PyTorch's global generator."""
    ids = torch.tensor([make_prompt(lm.tokenizer, question_text(example)).ids], device=lm.device)
    with torch.inference_mode():
        found = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True,
                                  temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=answers,
                                  pad_token_id=lm.tokenizer.pad_token_id)[:, ids.shape[1]:]
    ended = (found == lm.tokenizer.eos_token_id).any(1).tolist()
    texts = lm.tokenizer.batch_decode(found, skip_special_tokens=True)
    return next((text.strip() for text, whole in zip(texts, ended, strict=True)
                 if whole and is_right(example.answer, text)), "")
