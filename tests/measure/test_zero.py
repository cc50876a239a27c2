"""The experiment that zeroes latents: stages on the smoke run against other means, effects, rule and sentences."""

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import scipy.stats
import torch

import sts
from sts.book import learned, plots_shift, verdicts, zero_results
from sts.data.prompts import make_prompt, question_text
from sts.engine.evaluate import evaluate
from sts.engine.finetune import load_tuned
from sts.engine.models import decoder_layers
from sts.errors import StsError
from sts.measure.sets import sets_to_zero
from sts.stages.shift import of_kind, solution_prompts
from tests.helpers import topk_sae

KINDS = ("most_shifted", "most_active", "random", "matched")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def tuned(run):
    return load_tuned(run.load_model(), run.get("sft"))


def solution_states(run, lm) -> torch.Tensor:
    """The residual stream after layer 0 on the solutions' tokens, by plain forward passes, T x D."""
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
            slice(*prompt.question)] for prompt in solution_prompts(run)])


def hooked(run, lm, latents, limit=float("inf")):
    """The model with latents taken out by hand: weights written out, the first token and sinks left alone."""
    sae = run.sae()

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
    found = evaluate(lm, run.sft_examples("held_out")[:run.settings.ablation_examples]).set_index("example_id")
    handle.remove()
    return (-found["loglikelihood"] / np.log(2) / found["characters"]).to_dict()


def sets_of(run):
    values_TL = run.sae().encode(solution_states(run, load_tuned(run.load_model(), run.get("sft")))).double()
    return sets_to_zero(of_kind(run.get("sft_shift"), "sae")["squared_difference_L"], values_TL.square().mean(0),
                        run.settings.ablation_latents, run.settings.ablation_draws, run.settings.seed), values_TL


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


@pytest.mark.parametrize("fold_norms", [True, False])
def test_energy_is_the_squared_length_of_what_a_latent_adds(run, tuned, tmp_path, fold_norms):
    other = run
    if not fold_norms:  # decoder rows of many lengths, so that a latent's value is not the length of what it adds
        sae = topk_sae(64, latents=128)
        sae.W_dec.data *= torch.linspace(2, 20, 128)[:, None]
        sae.save_model(tmp_path)
        other = sts.open_run("smoke", results=run.results, sae=str(tmp_path), fold_norms=False)
    states_TD, sae = solution_states(other, tuned), other.sae()
    assert ((sae.W_dec.norm(dim=1) - 1).abs() < 1e-3).all() == fold_norms
    values_TL = sae.encode(states_TD)
    energies = zero_results.activity(other).energy_L
    for latent in values_TL.square().sum(0).topk(3).indices:
        added_TD = values_TL[:, latent, None] * sae.W_dec[latent]
        assert energies[latent].item() == pytest.approx(added_TD.double().square().sum(1).mean().item(), rel=1e-3)


def test_tokens_of_outlier_norm_are_left_alone(run, tuned):
    # A limit that cuts through the random model's norms; half of the tokens keep their latents.
    other = sts.open_run("smoke", results=run.results, outlier_norm=1.0, ablation_latents=[16])
    norms = []
    for prompt in solution_prompts(other)[:8]:
        with torch.no_grad():
            states = tuned.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0]
        norms.append(states[slice(*prompt.question)].norm(dim=-1))
    limit = torch.cat(norms).median().item()
    most = of_kind(other.get("sft_shift"), "sae")["squared_difference_L"].topk(16).indices
    rows = other.get("ablation")
    own = rows[rows["kind"] == "most_shifted"].set_index("example_id")["bits"].to_dict()
    assert own == pytest.approx(bits_by_hand(other, tuned, most, limit), abs=1e-5)
    assert own != pytest.approx(bits_by_hand(other, tuned, most), abs=5e-5)


def test_the_untuned_models_own_activity_counts_where_it_is_zeroed(run):
    other = sts.open_run("smoke", results=run.results, ablation_model="base", ablation_latents=[16])
    values_TL = other.sae().encode(solution_states(other, other.lm)).double()
    torch.testing.assert_close(zero_results.activity(other).energy_L, values_TL.square().mean(0), rtol=1e-3, atol=1e-6)
    active = values_TL.square().mean(0).topk(16).indices
    rows = other.get("ablation")
    own = rows[rows["kind"] == "most_active"].set_index("example_id")["bits"].to_dict()
    assert own == pytest.approx(bits_by_hand(other, other.lm, active), abs=1e-5)


def test_answers_are_written_by_the_changed_model_from_the_question_alone(run, tuned):
    written, example = run.get("ablated_answers"), run.sft_examples("held_out")[0]
    kinds = [one["zeroed"] for one in written["answers"]]
    assert kinds[:4] == ["none", "most_shifted", "most_active", "random"]
    most = of_kind(run.get("sft_shift"), "sae")["squared_difference_L"].topk(16).indices
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


# --- effects ------------------------------------------------------------------------------------------------------

def table(costs: dict[str, np.ndarray], energy: dict[str, float], count: int = 10) -> pandas.DataFrame:
    """Rows as of stage `ablation`, of 20 units of energy in all: kind -> added bits, sets x problems; no entry for
    matched where nothing matches."""
    problems = next(iter(costs.values())).shape[1]
    plain_P = np.linspace(1, 2, problems)
    rows = [{"kind": "none", "latents": 0, "draw": 0, "rate": 0.0, "energy": 0.0, "example_id": f"q{item}",
             "bits": bits} for item, bits in enumerate(plain_P)]
    for kind in KINDS:
        base = {"kind": kind, "latents": count, "rate": 0.1, "energy": energy[kind]}
        if kind not in costs:
            rows += [base | {"draw": draw, "energy": energy[kind] - draw} for draw in range(2)]
        else:
            rows += [base | {"draw": draw, "example_id": f"q{item}", "bits": plain_P[item] + cost}
                     for draw, own in enumerate(costs[kind]) for item, cost in enumerate(own)]
    frame = pandas.DataFrame(rows).sample(frac=1, random_state=0)
    return frame.assign(share=frame["energy"] / 20)


def simulated(per_energy: dict[str, float], energy: dict[str, float], seed: int = 0) -> pandas.DataFrame:
    """Effects where a set costs its energy times a factor of its kind, on 16 problems of unequal sensitivity."""
    generator = np.random.default_rng(seed)
    sensitivity_P = generator.lognormal(0, 0.3, 16)
    sets = {"most_shifted": 1, "most_active": 1, "random": 5, "matched": 5}
    costs = {kind: factor * energy[kind] * sensitivity_P * generator.normal(1, 0.05, (sets[kind], 1))
             + generator.normal(0, 0.01, (sets[kind], 16)) for kind, factor in per_energy.items()}
    return zero_results.zero_effects(table(costs, energy))


ENERGY = {"most_shifted": 5.0, "most_active": 9.0, "random": 0.5, "matched": 5.0}
ALIKE = {"most_shifted": 0.1, "most_active": 0.1, "random": 0.1, "matched": 0.1}


def test_effects_are_paired_by_problem():
    costs = {"most_shifted": [[0.4, 0.6, 0.8]], "most_active": [[0.1, 0.2, 0.3]],
             "random": [[0.0, 0.1, 0.2], [0.2, 0.1, 0.0]], "matched": [[0.5, 0.5, 0.5], [0.7, 0.7, 0.7]]}
    effects = zero_results.zero_effects(table({kind: np.array(own) for kind, own in costs.items()},
                                              ENERGY)).set_index("kind")
    assert effects["mean"].to_dict() == pytest.approx({
        "most_shifted": 0.6, "most_active": 0.2, "random": 0.1, "matched": 0.6, "most_shifted - most_active": 0.4,
        "most_shifted - random": 0.5, "most_shifted - matched": 0.0})
    expected = scipy.stats.ttest_1samp([0.3, 0.4, 0.5], 0).confidence_interval()
    assert tuple(effects.loc["most_shifted - most_active", ["low", "high"]]) == pytest.approx(tuple(expected))
    assert effects["draws"].dropna().to_dict() == {"most_shifted": 1, "most_active": 1, "random": 2, "matched": 2}
    assert effects.loc["most_shifted", "per_percent"] == pytest.approx(0.6 / 25) and (effects["n"] == 3).all()


def test_sets_that_differ_widen_the_interval():
    alike = np.tile(np.linspace(0.1, 0.2, 16), (5, 1))
    differ = alike + np.array([-0.2, -0.1, 0, 0.1, 0.2])[:, None]
    costs = {"most_shifted": alike[:1] + 0.15, "most_active": alike[:1]}
    low = {}
    for name, own in (("alike", alike), ("differ", differ)):
        effects = zero_results.zero_effects(table(costs | {"random": own, "matched": alike}, ENERGY))
        low[name] = effects.set_index("kind")["low"]["most_shifted - random"]
        assert effects.set_index("kind")["mean"]["most_shifted - random"] == pytest.approx(0.15)
    # Five means with a standard deviation of 0.158, and one more set: 2.776 x 0.158 x sqrt(1 + 1 / 5) = 0.481.
    assert low["alike"] > 0.14 and low["differ"] == pytest.approx(0.15 - 0.481, abs=0.001)


# --- the rule -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_a_cost_in_proportion_to_energy_is_not_held(seed):
    assert zero_results.zero_verdict(simulated(ALIKE, ENERGY, seed), 10) == "held against random latents only"
    # Nor where no match is possible, and nor where the most active are the most shifted.
    apart = {kind: factor for kind, factor in ALIKE.items() if kind != "matched"}
    assert zero_results.zero_verdict(simulated(apart, ENERGY, seed), 10) == "held against random latents only"


def test_sets_that_fire_as_often_must_be_beaten_too():
    effects = simulated(ALIKE | {"most_shifted": 0.4}, ENERGY)
    for low, verdict in ((0.1, "held"), (-0.1, "held against random latents only")):
        row = {"kind": "most_shifted - like_rate", "latents": 10, "low": low}
        assert zero_results.zero_verdict(pandas.concat([effects, pandas.DataFrame([row])]), 10) == verdict


@pytest.mark.parametrize("seed", range(4))
def test_a_cost_beyond_the_energy_is_held(seed):
    more = ALIKE | {"most_shifted": 0.4}
    assert zero_results.zero_verdict(simulated(more, ENERGY, seed), 10) == "held"
    del more["matched"]
    assert zero_results.zero_verdict(simulated(more, ENERGY, seed), 10) == "held"


def test_the_same_latents_twice_do_not_hurt_more():
    cost = np.linspace(0.5, 0.9, 16)[None]
    effects = zero_results.zero_effects(table({"most_shifted": cost, "most_active": cost, "random": 0.1 * cost[[0, 0]]},
                                              ENERGY))
    assert zero_results.zero_verdict(effects, 10) == "held against random latents only"


@pytest.mark.parametrize(("random", "active", "matched", "verdict"), [
    (0.1, 0.1, 0.1, "held"), (0.1, 0.1, None, "held"), (0.1, -0.1, 0.1, "held"),
    (0.1, 0.1, 0.0, "held against random latents only"), (0.1, -0.1, None, "held against random latents only"),
    (0.0, 0.1, 0.1, "not shown"), (-0.1, 0.1, 0.1, "not shown"), (float("nan"), 0.1, 0.1, "not shown"),
    (0.1, 0.1, float("nan"), "held against random latents only")])
def test_all_lower_ends_decide_at_the_number_asked_for(random, active, matched, verdict):
    effects = pandas.DataFrame([
        {"kind": f"most_shifted - {kind}", "latents": count, "low": low if count == 10 else -1.0}
        for kind, low in (("random", random), ("most_active", active), ("matched", matched)) if low is not None
        for count in (5, 10)])
    assert zero_results.zero_verdict(effects, 10) == verdict
    assert zero_results.zero_verdict(effects, 5) == "not shown"


# --- the page -----------------------------------------------------------------------------------------------------

def test_numbers_in_the_sentence_come_from_the_effects():
    effects = simulated(ALIKE, {"most_shifted": 5.12, "most_active": 9.24, "random": 0.5, "matched": 5.05})
    text = zero_results.effects_sentence(effects, 10, 7, "tuned")
    own = effects.set_index("kind")
    for kind in KINDS:
        assert f"{own.loc[kind, 'mean']:+.2g} ({own.loc[kind, 'low']:+.2g} to" in text
    assert "7 of 10 latents in common" in text and "16 held-out solutions" in text and "10 most shifted" in text
    for kind in ("random", "matched"):
        row = own.loc[f"most_shifted - {kind}"]
        assert f"the most shifted cost {row['mean']:+.2g} ({row['low']:+.2g} to" in text
    assert text.count("(5 sets") == 2 and "they hold 46.2%" in text and "most shifted 25.6% (random ones 2.5%)" in text
    assert f"{own.loc['most_active', 'per_percent']:.2g} against {own.loc['most_shifted', 'per_percent']:.2g}" in text


def test_no_match_is_said_with_what_the_nearest_holds():
    costs = {"most_shifted": np.full((1, 4), 0.5), "most_active": np.full((1, 4), 0.4), "random": np.zeros((2, 4))}
    effects = zero_results.zero_effects(table(costs, ENERGY | {"most_shifted": 10.0, "matched": 7.0}))
    row = effects.set_index("kind").loc["matched"]
    assert row["draws"] == 0 and np.isnan(row["mean"]) and row["energy"] == 7  # the other attempt holds 6
    assert "most_shifted - matched" not in set(effects["kind"])
    text = zero_results.effects_sentence(effects, 10, 3, "tuned")
    assert "no such set can be made (the nearest holds 35.0% of all energy)" in text and "nan" not in text
    shown = zero_results.effects_table(effects).set_index("which")
    assert shown.loc["others of as much energy", "change in bits per character"] == "no match possible"
    assert shown.loc["others of as much energy", "of all energy"] == "35.0%" and "nan" not in shown.to_string()
    labels = {label for axis in plots_shift.zeroing(effects).axes for label in axis.get_legend_handles_labels()[1]}
    assert "most shifted" in labels


def test_the_runs_sentence_says_its_verdict_and_its_shared_latents(run):
    text, count = verdicts.zero_sentence(run), zero_results.zeroed_number(run)
    effects = zero_results.run_effects(run)
    verdict = learned.judged(run, zero_results.zero_verdict(effects, count))
    assert text.endswith(f"hurts more: **{verdict}**.") and count == 16
    chosen, _ = sets_of(run)
    most, active = ({*next(one for one in chosen if (one.kind, one.count) == (kind, 16)).latents.tolist()}
                    for kind in ("most_shifted", "most_active"))
    assert f"{len(most & active)} of 16 latents in common" in text and "in the tuned model" in text
    assert zero_results.zeroed_number(sts.open_run("smoke", results=run.results, top_n=10)) == 4


def test_few_problems_are_noted():
    few, enough = (pandas.DataFrame([{"n": number}]) for number in (15, 16))
    assert "with only 15 problems" in zero_results.interval_note(few)
    assert "only" not in zero_results.interval_note(enough)


def test_the_figure_draws_costs_against_number_and_energy():
    effects = pandas.concat([simulated(ALIKE, ENERGY).assign(latents=count) for count in (10, 100)])
    left, right = plots_shift.zeroing(effects).axes
    for axis in (left, right):
        drawn = {container.get_label(): container for container in axis.containers}
        assert set(drawn) == {"most shifted", "most active", "random", "others of as much energy"}
        own = effects[effects["kind"] == "random"]
        assert list(drawn["random"].lines[0].get_ydata()) == list(own["mean"])
        ends = [segment[:, 1].tolist() for segment in drawn["random"].lines[2][0].get_segments()]
        assert np.array(ends) == pytest.approx(own[["low", "high"]].to_numpy())
    assert list(right.containers[0].lines[0].get_xdata()) == [25.0, 25.0]
    assert [label.get_text() for label in left.get_xticklabels()] == ["10", "100"]
    assert left.figure.get_figwidth() <= 7 and plt.get_fignums() == []


def test_answers_are_escaped():
    page = zero_results.answers_html({"question": "1 < 2?", "answer": "yes", "answers": [
        {"zeroed": "matched", "latents": 3, "answer": "<script>"}, {"zeroed": "none", "latents": 0, "answer": ""}]})
    assert "<script>" not in page and "1 &lt; 2?" in page and "others of as much energy (3 latents)" in page
    assert "nothing written" in page
