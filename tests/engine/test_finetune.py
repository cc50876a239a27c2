"""Fine-tuning learns, trains on the solution alone, can be resumed, and its adapter comes back as it was."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch

import sts
from sts.data.load import load_examples
from sts.data.prompts import make_prompt, question_text, render, solution_text
from sts.data.sources import Example
from sts.engine import work as processes
from sts.engine.finetune import FineTuning, divide_batch, fine_tune, load_tuned, tokens_to_train_on
from sts.engine.models import load_model
from sts.errors import ROOT, StsError

SETTINGS = FineTuning(epochs=2, lr=1e-2, batch=4, micro_batch=2, max_length=512, lora_rank=8, lora_alpha=16, seed=0)
EXAMPLES = load_examples("gsm_symbolic", limit=20, seed=3)


def fresh(tiny_models):
    return load_model(str(tiny_models["llama"]), dtype="float32")


@pytest.fixture(scope="module")
def tuned(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return folder, fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, folder)


def solution_terms(lm, example):
    """Loss of every token of a problem's solution, with the prompt's tokens left out."""
    prompt = render(lm.tokenizer, example.question.strip())
    start = len(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    text = render(lm.tokenizer, example.question.strip(), answer=solution_text(example))
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -log_p[range(start - 1, len(ids) - 1), ids[start:]]


def solution_loss(lm, examples):
    """Loss per solution token, averaged over problems."""
    with torch.no_grad():
        return sum(solution_terms(lm, example).mean().item() for example in examples) / len(examples)


def test_held_out_loss_falls_and_is_the_loss_of_the_solution_alone(tiny_models, tuned):
    folder, log = tuned
    assert log["held_out_after"] < 0.95 * log["held_out_before"]
    assert log["steps"] == 8 and len(log["curve"]) == 8
    base = fresh(tiny_models)
    assert log["held_out_before"] == pytest.approx(solution_loss(base, EXAMPLES[16:]), rel=2e-3)
    assert log["held_out_after"] == pytest.approx(solution_loss(load_tuned(base, folder), EXAMPLES[16:]), rel=2e-3)


def test_only_adapters_are_trained_and_nothing_is_pickled_in_them(tuned):
    folder, log = tuned
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    # Rank 8 on seven projections of two layers: r x (in + out) each.
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert log["trained_parameters"] == 2 * sum(8 * (a + b) for a, b in shapes)


class Killed(Exception):
    pass


def kill_at(step, steps):
    """A progress report that ends the run after `step` of `steps`, before that step's own checkpoint is written."""
    def report(fraction):
        if fraction >= step / steps - 1e-9:
            raise Killed
    return report


def with_dropout(lm):
    """The model with dropout on its attention weights, so that training draws random numbers at every step."""
    for layer in lm.model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return lm


@pytest.mark.parametrize("lora_rank", [8, 0], ids=["lora", "full"])
def test_a_run_killed_within_an_epoch_ends_as_if_it_had_not_been(tiny_models, tmp_path, lora_rank):
    # Two epochs of five steps, a checkpoint every second: steps 6 and 8 lie within the second epoch.
    settings = replace(SETTINGS, lora_rank=lora_rank, lr=1e-2 if lora_rank else 1e-3)
    train, held_out = load_examples("gsm_symbolic", limit=18, seed=5), EXAMPLES[16:]

    def run(folder, *, random_state, **how):
        # Another process starts with other generators.
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(random_state)
        return fine_tune(with_dropout(fresh(tiny_models)), train, held_out, settings, folder, **how)

    whole = run(tmp_path / "whole", random_state=1)
    for step in (4, 7, 9):  # within the first epoch, then twice within the second
        with pytest.raises(Killed):
            run(tmp_path / "killed", random_state=step, report=kill_at(step, 10))
        saved, = (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")
        assert saved.name == f"checkpoint-{2 * ((step - 1) // 2)}"
    fractions = []
    resumed = run(tmp_path / "killed", random_state=2, report=fractions.append)
    assert fractions == [0.9, 1.0]
    assert [row["step"] for row in resumed["curve"]] == list(range(1, 11))
    assert [row["loss"] for row in resumed["curve"]] == pytest.approx([row["loss"] for row in whole["curve"]], abs=1e-5)
    assert resumed["held_out_before"] == pytest.approx(whole["held_out_before"], abs=1e-5)
    assert resumed["held_out_after"] == pytest.approx(whole["held_out_after"], abs=1e-5)


def test_full_fine_tuning_takes_the_steps_of_a_plain_loop(tiny_models, tmp_path):
    # One step an epoch on all four problems, so that their order is of no account; ten steps, of which one warms up.
    settings = FineTuning(epochs=10, lr=1e-2, batch=4, micro_batch=2, max_length=512, lora_rank=0, lora_alpha=1, seed=0)
    log = fine_tune(fresh(tiny_models), EXAMPLES[:4], EXAMPLES[16:], settings, tmp_path)
    lm = fresh(tiny_models)
    model = lm.model.train().requires_grad_(True)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    groups = [[weight for name, weight in model.named_parameters() if ("norm" in name) == norms]
              for norms in (False, True)]
    # Norms do not decay.
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.01},
                                   {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((1 + math.cos(math.pi * (step - 1) / 9)) / 2 if step else 0)
        terms = torch.cat([solution_terms(lm, example) for example in EXAMPLES[:4]])
        optimizer.zero_grad()
        terms.mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(terms.mean().item())
    assert max(norms) > 1  # some gradients are clipped
    assert [row["loss"] for row in log["curve"]] == pytest.approx(losses, abs=1e-4)
    trained = dict(load_tuned(fresh(tiny_models), tmp_path).model.named_parameters())
    apart = sum((trained[name] - weight).square().sum().item() for name, weight in model.named_parameters())
    moved = sum((weight - start[name]).square().sum().item() for name, weight in model.named_parameters())
    assert apart < 1e-10 * moved


def test_full_fine_tuning_trains_every_weight(tiny_models, tmp_path):
    settings = FineTuning(epochs=1, lr=1e-3, batch=4, micro_batch=2, max_length=512, lora_rank=0, lora_alpha=1, seed=0)
    base = fresh(tiny_models)
    count = base.model.num_parameters()
    log = fine_tune(base, EXAMPLES[:8], EXAMPLES[16:], settings, tmp_path)
    assert log["trained_parameters"] == count
    loaded = load_tuned(fresh(tiny_models), tmp_path)
    assert solution_loss(loaded, EXAMPLES[16:]) == pytest.approx(log["held_out_after"], rel=2e-3)
    assert (tmp_path / "adapter" / "model.safetensors").is_file()


def test_what_is_trained_on_are_the_tokens_of_the_whole_turn_behind_the_prompt(tiny_models):
    tokenizer = fresh(tiny_models).tokenizer
    (row,), _ = tokens_to_train_on(tokenizer, EXAMPLES[:1], 512)
    whole = tokenizer.apply_chat_template([{"role": "user", "content": EXAMPLES[0].question.strip()},
                                           {"role": "assistant", "content": solution_text(EXAMPLES[0])}])["input_ids"]
    prompt = make_prompt(tokenizer, question_text(EXAMPLES[0])).ids
    assert row["input_ids"] == whole and tuple(whole[:len(prompt)]) == prompt
    assert row["completion_mask"] == [0] * len(prompt) + [1] * (len(whole) - len(prompt))


def test_a_base_model_learns_plain_solutions_behind_bos_and_stops_behind_them(tiny_models, tmp_path):
    lm = load_model(str(tiny_models["gemma3"]), dtype="float32")
    bos, end = lm.tokenizer.bos_token, lm.tokenizer.eos_token
    losses = []
    for example in EXAMPLES[16:]:
        prompt = f"{bos}Question: {example.question.strip()}\nAnswer:"
        ids, start = (lm.tokenizer(text, add_special_tokens=False)["input_ids"]
                      for text in (f"{prompt} {solution_text(example)}{end}", prompt))
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(-numpy.mean([log_p[place - 1, ids[place]].item() for place in range(len(start), len(ids))]))
    log = fine_tune(lm, EXAMPLES[:16], EXAMPLES[16:], SETTINGS, tmp_path)
    assert log["held_out_before"] == pytest.approx(numpy.mean(losses), rel=2e-3)
    assert log["held_out_after"] < log["held_out_before"]


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tiny_models, tuned, tmp_path):
    _, uninterrupted = tuned
    broken = tmp_path / "checkpoints" / "checkpoint-6"
    broken.mkdir(parents=True)
    (broken / "optimizer.pt").write_bytes(b"half")
    log = fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, tmp_path)
    assert log["held_out_after"] == pytest.approx(uninterrupted["held_out_after"], rel=1e-3)


def with_long_question(example):
    return replace(example, example_id="long", question=example.question * 60)


def test_questions_that_leave_no_room_for_their_solution_are_left_out_and_named(tiny_models, tuned, tmp_path):
    train, held_out = [with_long_question(EXAMPLES[0]), *EXAMPLES[:16]], EXAMPLES[16:]
    log = fine_tune(fresh(tiny_models), train, held_out, SETTINGS, tmp_path)
    assert log["left_out"] == ["long"] and log["train"] == 16 and log["held_out"] == len(held_out)
    assert log["held_out_after"] == pytest.approx(tuned[1]["held_out_after"], rel=1e-3)  # as if it had not been there
    assert tuned[1]["left_out"] == []


def counting(number):
    """A question that grows with its number, and a short answer."""
    return Example(f"e{number}", "math", "What is one and " + "one and " * number + "one?", (), -1, "5", "It is 5.")


@pytest.mark.parametrize("place", ["train", "held_out"])
def test_a_question_that_fills_the_limit_with_bos_is_left_out(tiny_models, tmp_path, place):
    """A base model's tokenizer puts BOS before the question: one token more."""
    lm = load_model(str(tiny_models["gemma3"]))
    examples = [counting(number) for number in range(12)]
    limit = len(make_prompt(lm.tokenizer, question_text(examples[8])).ids)
    parts = {"train": examples[:5], "held_out": examples[5:8]}
    parts[place] = [examples[8], *parts[place]]
    log = fine_tune(lm, *parts.values(), replace(SETTINGS, epochs=1, max_length=limit), tmp_path)
    assert log["left_out"] == ["e8"] and (log["train"], log["held_out"]) == (5, 3)
    assert math.isfinite(log["held_out_before"]) and math.isfinite(log["held_out_after"])


def test_solutions_that_are_cut_and_examples_without_one_are_counted(tiny_models, tmp_path):
    lm, long = fresh(tiny_models), replace(EXAMPLES[0], example_id="cut", solution="We add one. " * 200)
    empty = replace(EXAMPLES[1], example_id="empty", solution="", answer=" ")
    short = [counting(number) for number in range(6)]
    log = fine_tune(lm, [long, empty, *short], [*short, replace(long, example_id="held")], replace(SETTINGS, epochs=1),
                    tmp_path)
    assert log["cut"] == ["cut", "held"] and log["left_out"] == ["empty"] and log["train"] == 7
    (row, *_), _ = tokens_to_train_on(lm.tokenizer, [long], 512)
    assert len(row["input_ids"]) == len(row["completion_mask"]) == 512
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in [token for token, own in zip(row["input_ids"], row["completion_mask"], strict=True) if own]


@pytest.mark.parametrize(("part", "named"), [("train", "training"), ("held_out", "held-out")])
def test_without_an_example_that_has_room_for_its_solution_training_does_not_start(tiny_models, tmp_path, part, named):
    parts = {"train": EXAMPLES[:8], "held_out": EXAMPLES[16:]}
    parts[part] = [with_long_question(example) for example in parts[part]]
    with pytest.raises(StsError, match=f"No {named} example .* sft_max_length. Raise it"):
        fine_tune(fresh(tiny_models), *parts.values(), SETTINGS, tmp_path)


# --- several processes --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("batch", "micro", "count", "divided"), [
    (8, 4, 1, (4, 2)), (8, 3, 1, (2, 4)), (4, 8, 1, (4, 1)), (8, 4, 2, (4, 1)), (8, 4, 8, (1, 1)), (24, 4, 4, (3, 2))])
def test_the_batch_is_that_of_all_processes_together(batch, micro, count, divided):
    assert divide_batch(batch, micro, count) == divided
    assert divided[0] * divided[1] * count == batch


def test_processes_are_counted_only_where_they_were_launched_together(monkeypatch):
    # Schedulers set WORLD_SIZE in jobs of one process too; what launches several gives each of them a rank.
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.count() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.count() == 1 and processes.is_main()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.count() == 3


def test_a_batch_that_cannot_be_shared_is_said(tiny_models, tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(StsError, match="sft_batch is 4, which 3 processes cannot share.* such as 6"):
        fine_tune(fresh(tiny_models), EXAMPLES[:8], EXAMPLES[16:], SETTINGS, tmp_path)


def test_other_stages_are_not_computed_several_times_at_once(tmp_path, monkeypatch):
    run = sts.open_run("smoke", results=tmp_path)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(StsError, match="'scores' runs in one process and 2 were launched.*these stages: rl, sft"):
        run.get("scores")


def test_two_processes_train_as_one_does(tmp_path):
    # Seven held-out problems and two processes: one of them gets a problem twice, which must not count.
    changed = {"device": "cpu", "sft_held_out": 7, "sft_examples": 24, "sft_micro_batch": 1, "sft_epochs": 2}
    one = sts.open_run("smoke", results=tmp_path / "one", **changed)
    alone = json.loads((one.get("sft") / "training.json").read_text())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "sts.cli", "stage", "sft", "--run", "smoke"]
    for name, value in changed.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={
        **os.environ, "STS_RESULTS": str(tmp_path / "two"), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sft: done in") == 1 and done.stdout.count("sft [") == 1  # one of them speaks
    stages = tmp_path / "two" / "stages"
    assert [path.name for path in stages.glob("sft-*.json")] == [f"sft-{one.key('sft')}.provenance.json"]
    assert not list((stages / "unfinished").iterdir())
    together = json.loads((stages / f"sft-{one.key('sft')}" / "training.json").read_text())
    assert together["steps"] == alone["steps"] == 12
    for key in ("held_out_before", "held_out_after"):
        assert together[key] == pytest.approx(alone[key], abs=1e-4)
    # Every step, not the first alone: processes that do not add up their gradients part from the third step on.
    losses, expected = ([row["loss"] for row in log["curve"]] for log in (together, alone))
    assert losses == pytest.approx(expected, abs=1e-4)
    two = sts.open_run("smoke", results=tmp_path / "two", **changed)
    assert two.stored("sft")
