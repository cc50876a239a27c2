"""The experiment that zeroes latents: stages on the smoke run against other means."""

import numpy as np
import pytest
import torch

import sts
from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.models import decoder_layers
from sts.errors import StsError
from sts.measure.baselines import split_domains
from sts.measure.sets import sets_to_zero
from sts.run import resources


def solution_prompts(lm, held_out):
    return [solution_prompt(lm.tokenizer, example) for example in held_out]


KINDS = ("most_shifted", "most_active", "random", "matched", "like_rate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def tuned(run):
    return resources.tuned(run)


def solution_states(run, lm) -> torch.Tensor:
    """The residual stream after layer 0 on the solutions' tokens, by plain forward passes, T x D."""
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
            slice(*prompt.question)] for prompt in solution_prompts(resources.lm(run), resources.held_out(run))])


def hooked(run, lm, latents, limit=float("inf")):
    """The model with latents taken out by hand: weights written out, the first token and sinks left alone."""
    sae = resources.reader(run)

    def hook(module, args, inputs, output):
        with torch.no_grad():
            values = sae.encode(output)
            part = torch.zeros_like(values)
            part[..., latents] = values[..., latents]
            kept = (inputs["position_ids"] >= 1) & (output.norm(dim=-1) <= limit)
            return output - kept[..., None] * (part @ sae.W_dec)

    return decoder_layers(lm.model)[0].register_forward_hook(hook, with_kwargs=True)


def bits_by_hand(run, lm, latents, limit=float("inf")) -> dict[str, float]:
    handle = hooked(run, lm, latents, limit)
    found = evaluate(lm, resources.held_out(run)[:run.settings.ablation_examples]).set_index("example_id")
    handle.remove()
    return (-found["loglikelihood"] / np.log(2) / found["characters"]).to_dict()


def sets_of(run):
    values_TL = resources.reader(run).encode(solution_states(run, resources.tuned(run))).double()
    return sets_to_zero(split_domains(run.get("sft_shift"))["sae"]["squared_difference_L"], values_TL.square().mean(0),
                        run.settings.ablation_latents, run.settings.ablation_draws, run.settings.seed,
                        (values_TL > 0).double().mean(0)), values_TL


def test_bits_rates_and_energies_are_those_of_the_latents_taken_out(run, tuned):
    rows = run.get("ablation")
    chosen, values_TL = sets_of(run)
    assert {one.kind for one in chosen} == {"none", *KINDS}
    for one in chosen:
        own = rows[(rows["kind"] == one.kind) & (rows["latents"] == one.count) & (rows["draw"] == one.draw)]
        part_TL = values_TL[:, one.latents]
        assert own["share"].to_numpy() == pytest.approx((part_TL.square().sum() / values_TL.square().sum()).item(),
                                                        rel=1e-3)
        assert own["energy"].to_numpy() == pytest.approx(part_TL.square().sum(1).mean().item(), rel=1e-3)
        if one.count:
            assert own["rate"].to_numpy() == pytest.approx((part_TL > 0).double().mean().item(), abs=1e-4)
        if one.usable:
            assert dict(zip(own["example_id"], own["bits"], strict=True)) == pytest.approx(
                bits_by_hand(run, tuned, one.latents), abs=1e-5)
        else:
            assert len(own) == 1 and own["bits"].isna().all()
    wanted = {one.kind for one in chosen if one.usable}
    assert set(rows[rows["bits"].notna()]["kind"]) == wanted >= {"none", "most_shifted", "most_active", "random"}


def test_tokens_of_outlier_norm_are_left_alone(run, tuned):
    # A limit that cuts through the random model's norms; half of the tokens keep their latents.
    other = sts.open_run("smoke", results=run.results, outlier_norm=1.0, ablation_latents=[16])
    norms = []
    for prompt in solution_prompts(resources.lm(other), resources.held_out(other))[:8]:
        with torch.no_grad():
            states = tuned.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0]
        norms.append(states[slice(*prompt.question)].norm(dim=-1))
    limit = torch.cat(norms).median().item()
    most = split_domains(other.get("sft_shift"))["sae"]["squared_difference_L"].topk(16).indices
    rows = other.get("ablation")
    own = rows[rows["kind"] == "most_shifted"].set_index("example_id")["bits"].to_dict()
    assert own == pytest.approx(bits_by_hand(other, tuned, most, limit), abs=1e-5)
    assert own != pytest.approx(bits_by_hand(other, tuned, most), abs=5e-5)


def test_answers_are_written_by_the_changed_model_from_the_question_alone(run, tuned):
    written, example = run.get("ablated_answers"), resources.held_out(run)[0]
    kinds = [one["zeroed"] for one in written["answers"]]
    assert kinds[:4] == ["none", "most_shifted", "most_active", "random"]
    most = split_domains(run.get("sft_shift"))["sae"]["squared_difference_L"].topk(16).indices
    ids = torch.tensor([make_prompt(tuned.tokenizer, question_text(example)).ids])
    for one, latents in ((written["answers"][0], []), (written["answers"][1], most)):
        assert one["latents"] == len(latents)
        whole = ids
        handle = hooked(run, tuned, latents)
        with torch.no_grad():
            for _ in range(written["tokens"]):  # greedily, every step from the whole text
                following = tuned.model(whole, use_cache=False).logits[:, -1:].argmax(-1)
                whole = torch.cat([whole, following], dim=1)
                if following.item() == tuned.model.generation_config.eos_token_id:
                    break
        handle.remove()
        text = tuned.tokenizer.decode(whole[0, ids.shape[1]:], skip_special_tokens=True)
        assert one["answer"] == text
    assert written["question"] == example.question and written["answer"] == example.answer


def test_keys_follow_what_the_stages_read(run):
    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        return {name for name in ("ablation", "ablated_answers") if other.key(name) != run.key(name)}

    assert keys(ablation_latents=[4]) == keys(ablation_draws=3) == {"ablation"}
    assert keys(top_n=5) == {"ablated_answers"}
    assert keys(ablation_model="base") == keys(sft_lr=1e-3) == keys(seed=1) == {"ablation", "ablated_answers"}
    assert keys(overlap_draws=3) == set()


def test_one_draw_is_refused(tmp_path):
    with pytest.raises(StsError, match="ablation_draws"):
        sts.open_run("smoke", results=tmp_path, ablation_draws=1)
