"""Fine-tuning learns, trains on the solution alone, can be resumed, and its adapter comes back as it was."""

import json

import pytest
import torch

from sts.data import load_examples
from sts.errors import StsError
from sts.finetune import FineTuning, conversation, fine_tune, load_tuned
from sts.models import load_model
from sts.prompts import render, solution_text

SETTINGS = FineTuning(epochs=2, lr=1e-2, batch=4, micro_batch=2, max_length=512, lora_rank=8, lora_alpha=16, seed=0)
EXAMPLES = load_examples("gsm_symbolic", limit=20, seed=3)


def fresh(tiny_models):
    return load_model(str(tiny_models["llama"]), dtype="float32")


@pytest.fixture(scope="module")
def tuned(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return folder, fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, folder)


def solution_loss(lm, examples):
    """Loss per solution token, with the prompt's tokens left out, averaged over problems."""
    losses = []
    for example in examples:
        prompt = render(lm.tokenizer, example.question.strip())
        start = len(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = render(lm.tokenizer, example.question.strip(), answer=solution_text(example))
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(-sum(log_p[position - 1, ids[position]].item() for position in range(start, len(ids)))
                      / (len(ids) - start))
    return sum(losses) / len(losses)


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


def test_a_killed_run_goes_on_from_its_checkpoint(tiny_models, tuned, tmp_path, monkeypatch):
    _, uninterrupted = tuned

    class Killed(Exception):
        pass

    def kill(fraction):
        if fraction >= 0.75:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, tmp_path, report=kill)
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))
    fractions = []
    resumed = fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, tmp_path, report=fractions.append)
    assert fractions[0] > 0.5  # it did not start over
    assert resumed["held_out_after"] == pytest.approx(uninterrupted["held_out_after"], rel=1e-3)
    assert resumed["held_out_before"] == pytest.approx(uninterrupted["held_out_before"], rel=1e-6)


def test_full_fine_tuning_trains_every_weight(tiny_models, tmp_path):
    settings = FineTuning(epochs=1, lr=1e-3, batch=4, micro_batch=2, max_length=512, lora_rank=0, lora_alpha=1, seed=0)
    base = fresh(tiny_models)
    count = base.model.num_parameters()
    log = fine_tune(base, EXAMPLES[:8], EXAMPLES[16:], settings, tmp_path)
    assert log["trained_parameters"] == count
    loaded = load_tuned(fresh(tiny_models), tmp_path)
    assert solution_loss(loaded, EXAMPLES[16:]) == pytest.approx(log["held_out_after"], rel=2e-3)
    assert (tmp_path / "adapter" / "model.safetensors").is_file()


def test_conversations_follow_the_chat_template_or_a_plain_layout(tiny_models):
    lm = fresh(tiny_models)
    chat = conversation(lm.tokenizer, EXAMPLES[0])
    assert [message["role"] for message in chat["prompt"] + chat["completion"]] == ["user", "assistant"]
    lm.tokenizer.chat_template = None
    plain = conversation(lm.tokenizer, EXAMPLES[0])
    assert plain["prompt"].startswith("Question: ") and plain["prompt"].endswith("Answer:")
    assert json.dumps(plain)


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tiny_models, tuned, tmp_path):
    _, uninterrupted = tuned
    broken = tmp_path / "checkpoints" / "checkpoint-6"
    broken.mkdir(parents=True)
    (broken / "optimizer.pt").write_bytes(b"half")
    log = fine_tune(fresh(tiny_models), EXAMPLES[:16], EXAMPLES[16:], SETTINGS, tmp_path)
    assert log["held_out_after"] == pytest.approx(uninterrupted["held_out_after"], rel=1e-3)


def test_a_question_that_leaves_no_room_for_its_solution_is_named(tiny_models, tmp_path):
    settings = FineTuning(epochs=1, lr=1e-3, batch=4, micro_batch=2, max_length=40, lora_rank=4, lora_alpha=8, seed=0)
    with pytest.raises(StsError, match="gsm_symbolic-.* Raise sft_max_length"):
        fine_tune(fresh(tiny_models), EXAMPLES[:8], EXAMPLES[16:], settings, tmp_path)
