"""Stages of the chapter on rivals, on the smoke run, each recomputed by other means."""

from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr

import sts
from sts.data.prompts import make_prompt, question_text, solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.finetune import fine_tune, load_tuned
from sts.engine.generation import greedy_answer
from sts.engine.rivals import first_weights, gradient
from sts.engine.work import Work
from sts.measure import rivals
from sts.measure.baselines import split_domains
from sts.measure.items import item_measures
from sts.run import resources
from sts.run.others import seeds_of
from sts.run.recorded import record
from sts.stages.rivals import example_effects, rival_tests


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("rivals"), training_sets=[], rival_problems=6,
                        rival_tokens=12)


def answer_tokens(run, example, **changes):
    """Residual stream after layer 0 on the tokens of an answer, by a plain pass."""
    prompt = solution_prompt(resources.tokenizer(run), replace(
        example, options=(), answer_index=-1, **changes))
    with torch.no_grad():
        hidden = resources.lm(run).model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0]
    return hidden[slice(*prompt.question)]


# --- what is read -------------------------------------------------------------------------------------------------

def test_the_untuned_models_own_answers_are_greedy(run):
    rows, train = run.get("greedy_answers"), resources.train(run)
    assert [row["example_id"] for row in rows] == [one.example_id for one in train[:6]]
    for row, example in zip(rows[:3], train, strict=False):
        ids = make_prompt(resources.tokenizer(run), question_text(example)).ids
        assert row["answer"] == greedy_answer(resources.lm(run), ids, 12).strip()
    assert run.provenance("greedy_answers")["work"]["tokens"] > 6 * 12


def test_states_of_training_and_own_answers_are_of_equally_many_tokens(run):
    found, train = run.get("training_answer_states"), resources.train(run)
    answers = run.get("greedy_answers")
    for row, place in enumerate(found["place_E"].tolist()):
        example = train[place]
        for side, own in (("training", answer_tokens(run, example)),
                          ("own", answer_tokens(run, example, solution=answers[place]["answer"]))):
            torch.testing.assert_close(found[f"{side}_raw_ED"][row], own[:12].mean(0), rtol=1e-4, atol=1e-5)
            latents = resources.reader(run).encode(own[:12]).mean(0)
            torch.testing.assert_close(found[f"{side}_sae_EL"][row], latents, rtol=1e-3, atol=1e-4)
    lasts = torch.stack([answer_tokens(run, train[place])[-1] for place in found["place_E"].tolist()])
    torch.testing.assert_close(found["training_last_ED"], lasts, rtol=1e-4, atol=1e-5)


def test_domains_are_read_on_their_right_answers(run):
    found, questions = run.get("domain_answer_states"), resources.questions(run)
    for domain in ("law", "math"):
        own = [answer_tokens(run, one) for one in questions[domain][:run.settings.rival_questions]]
        torch.testing.assert_close(found[f"{domain}/raw_ED"], torch.stack([one.mean(0) for one in own]), rtol=1e-4,
                                   atol=1e-5)
        torch.testing.assert_close(found[f"{domain}/last_D"], torch.stack([one[-1] for one in own]).mean(0), rtol=1e-4,
                                   atol=1e-5)
    assert run.key("domain_answer_states") == run.alone(seed=5).key("domain_answer_states")


# --- what acts on the model ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_an_injected_state_is_added_behind_the_layer_and_zero_changes_nothing(run, alpha):
    own = sts.open_run("smoke", results=run.results, training_sets=[], rival_problems=6, rival_tokens=12,
                       rival_alpha=alpha)
    found, before = own.get("injection"), own.get("evaluation_before")
    rows = found.merge(before, on=["example_id", "kind", "option"], suffixes=("", "_before"))
    assert len(rows) == len(found) > 0
    same = np.allclose(rows["loglikelihood"], rows["loglikelihood_before"], rtol=0, atol=1e-5)
    assert same == (alpha == 0.0)
    # One solution by a plain pass with the state added at every position but the first.
    lm, lasts = resources.lm(own), own.get("domain_answer_states")
    neutral = torch.stack([lasts[name] for name in lasts if name.endswith("/last_D")]).mean(0)
    state_D = alpha * (own.get("training_answer_states")["training_last_ED"].mean(0) - neutral)
    example = resources.questions(own)["law"][0]
    prompt = solution_prompt(lm.tokenizer, example)

    def add(module, args, output):
        output[:, 1:] += state_D

    handle = lm.model.model.layers[0].register_forward_hook(add)
    with torch.no_grad():
        log_p = lm.model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    handle.remove()
    expected = sum(log_p[at - 1, prompt.ids[at]].item() for at in range(*prompt.question))
    row, = found[(found["example_id"] == example.example_id) & (found["kind"] == "solution")].itertuples()
    assert row.loglikelihood == pytest.approx(expected, rel=1e-4)


def test_influence_is_minus_the_inner_product_of_the_starts_gradients(run):
    """By one backward pass over all answers at once, on adapters of peft alone."""
    from peft import LoraConfig, get_peft_model

    own, lm = run.settings, resources.fresh_lm(run)()
    torch.manual_seed(own.seed)
    get_peft_model(lm.model.requires_grad_(False), LoraConfig(r=own.lora_rank, lora_alpha=own.lora_alpha,
                                                              target_modules="all-linear", task_type="CAUSAL_LM"))

    def gradients(examples):
        lm.model.zero_grad()
        for one in examples:
            prompt = solution_prompt(lm.tokenizer, replace(one, options=(),
                                                           answer_index=-1))
            labels = torch.tensor([[token if prompt.question[0] <= at < prompt.question[1] else -100
                                    for at, token in enumerate(prompt.ids)]])
            (lm.model(torch.tensor([prompt.ids]), labels=labels).loss / len(examples)).backward()
        return torch.cat([one.grad.flatten() for name, one in lm.model.named_parameters() if "lora_B" in name])

    training = gradients(resources.train(run)[:6])
    found = run.get("influence")
    assert list(found) == list(resources.questions(run))
    for domain in ("law", "math"):
        expected = -(training @ gradients(resources.questions(run)[domain][:own.rival_questions])).item()
        assert found[domain] == pytest.approx(expected, rel=1e-3)


# --- one value a domain, and what is tested ------------------------------------------------------------------------

def test_every_rival_has_a_value_in_every_domain(run):
    values = run.get("rival_values").set_index("domain")
    assert {*values.columns} == {*rivals.RIVALS, "sts_act", "sts_icl"} and len(values) == 14
    assert np.isfinite(values.to_numpy(float)).all()
    states, domains = run.get("training_answer_states"), split_domains(run.get("domain_answer_states"))
    shift, law = run.get("shift"), split_domains(run.get("domain_stats"))["law"]
    chosen = np.argsort(-shift["squared_difference_L"].numpy(), kind="stable")[:run.settings.top_n]
    rise = (states["training_sae_EL"] - states["own_sae_EL"]).double().mean(0).numpy()
    toward = (domains["law"]["sae_L"] - torch.stack([one["sae_L"] for one in domains.values()]).mean(0)).numpy()
    for name, kept in (("pd_sae", slice(None)), ("pd_chosen", chosen)):
        expected = rise[kept] @ toward[kept] / np.linalg.norm(toward[kept])
        assert values.loc["law", name] == pytest.approx(expected, rel=1e-3)
    assert values["influence"].to_dict() == run.get("influence")
    change = item_measures(run.get("injection"))["bits"] - item_measures(run.get("evaluation_before"))["bits"]
    bits = change[[one.example_id for one in resources.questions(run)["law"][:2]]]
    assert values.loc["law", "injection_bits"] == pytest.approx(bits.mean())
    moved, base = (one[field].numpy() / one["tokens"].item() for one, field in (
        (shift, "difference_L"), (law, "base_sum_L")))
    split = sum(base[one] if moved[one] > 0 else -base[one] for one in chosen if moved[one])
    assert values.loc["law", "sts_split"] == pytest.approx(split, rel=1e-5)
    assert values.loc["law", "icl_dot"] == pytest.approx(
        moved @ law["difference_L"].numpy() / law["tokens"].item(), rel=1e-5)


def test_sizes_are_correlated_by_the_one_engine(run):
    rows = {(row["measure"], row["predictor"]): row for row in run.get("rival_correlations")}
    each = [own.get("rival_values").set_index("domain").sort_index() for own in seeds_of(run)]
    changes = [own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].sort_index().abs()
               for own in seeds_of(run)]
    for name in ("sts_icl", "pd_raw", "logme"):
        r = [pearsonr(own[name].abs() if name == "pd_raw" else own[name], change).statistic
             for own, change in zip(each, changes, strict=True)]
        assert rows["bits", name]["by_seed"] == pytest.approx(r) and len(r) == 2
    known = {row["predictor"]: row for row in run.get("baseline_correlations") if row["measure"] == "bits"}
    assert rows["bits", "sts_act"]["pearson"] == known["sts_act"]["pearson"]
    less = rows["bits", "pd_raw"]["less"]["sts_act"]["mean"]
    assert less == pytest.approx(rows["bits", "sts_act"]["pearson"] - rows["bits", "pd_raw"]["pearson"])


class Run:
    """A training set's results, as stages over training sets ask for them."""

    def __init__(self, name, values, bits):
        domains = [f"d{place:02}" for place in range(len(bits))]
        self.settings = SimpleNamespace(sft_data=name, seed=0)
        blank = dict.fromkeys({*rivals.RIVALS, "sts_act", "sts_icl"}, 1.0)
        self.results = {
            "rival_values": pandas.DataFrame(blank | values | {"domain": domains}),
            "domain_shift": pandas.DataFrame({"domain": domains, "measure": "bits", "shift": bits})}

    def get(self, stage):
        return self.results[stage]


def test_the_forecast_best_on_mathematics_is_named_whatever_the_others_show():
    rng = np.random.default_rng(0)
    bits, other = rng.standard_normal(20), rng.standard_normal(20)
    noise = np.where(np.arange(20) < 3, -1, 1)
    sets = [Run("maths", {"influence": bits, "pd_raw": -bits * noise, "sts_act": np.abs(bits)}, bits),
            Run("code", {"influence": -other, "pd_raw": -other, "sts_act": np.abs(other)}, other)]
    found = rival_tests(sets, "maths")
    rows = {(row["part"], row["forecast"]): row for row in found["signs"]}
    # More bits are worse: a projection towards a domain's answers is to make them fewer.
    assert rows["own", "influence"]["share"] == 1.0 and rows["own", "pd_raw"]["share"] == pytest.approx(17 / 20)
    assert rows["others", "influence"]["share"] == 0.0 and rows["others", "pd_raw"]["share"] == 1.0
    assert {name for (_, name), row in rows.items() if row["best"]} == {"influence"}
    assert rows["own", "influence"]["pearson"] == pytest.approx(1)
    blind = max((bits > 0).mean(), (bits < 0).mean())
    assert rows["own", "influence"]["lead"]["mean"] == pytest.approx(1 - blind)
    held = {(row["score"], row["part"]): row for row in found["coverage"]}
    assert held["sts_act", "own"]["share"] == 1.0 and held["sts_act", "own"]["width"] < 1e-6
    assert held["sts_act", "others"]["narrower"] == pytest.approx(1)
    assert held["sts_icl", "own"]["narrower"] == pytest.approx(0, abs=1e-6)


def test_without_other_training_sets_only_the_own_is_tested():
    bits = np.random.default_rng(0).standard_normal(12)
    found = rival_tests([Run("maths", {"influence": bits}, bits)], "maths")
    assert {row["part"] for row in (*found["signs"], *found["coverage"])} == {"own"}
    assert rival_tests([Run("maths", {}, 0 * bits)], "maths") == {"signs": [], "coverage": []}
    few = rival_tests([Run("maths", {"influence": bits[:9]}, bits[:9])], "maths")
    assert few["signs"] and few["coverage"] == []  # an interval of 90% takes nine domains beside the own


def test_records_hold_no_answers_and_only_means_of_states(run, tmp_path):
    for name in ("greedy_answers", "training_answer_states", "domain_answer_states"):
        run.get(name)
    record(run, tmp_path)
    assert [path for path in tmp_path.glob("greedy_answers-*") if "provenance" not in path.name] == []
    states = load_file(tmp_path / f"training_answer_states-{run.key('training_answer_states')}.safetensors")
    assert len(states["training_raw_ED"]) == 1
    torch.testing.assert_close(states["own_sae_EL"][0], run.get("training_answer_states")["own_sae_EL"].mean(0))
    states = load_file(tmp_path / f"domain_answer_states-{run.key('domain_answer_states')}.safetensors")
    assert {name.rpartition("/")[2] for name in states} == {"raw_ED", "last_D"}


# --- single examples ----------------------------------------------------------------------------------------------

def test_problems_are_ranked_by_what_each_alone_should_do(run):
    ranked, own = run.get("example_forecasts"), run.settings
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")["sts_act"].drop("math")
    assert ranked["domain"].unique().tolist() == [scores.idxmax()] == [ranked["domain"][0]]
    states, domains = run.get("training_answer_states"), split_domains(run.get("domain_answer_states"))
    name, train = scores.idxmax(), resources.train(run)
    middle = torch.stack([one["raw_ED"].mean(0) for one in domains.values()]).mean(0)
    toward = domains[name]["raw_ED"].mean(0) - middle
    active = {*domains[name]["sae_L"].argsort(descending=True, stable=True)[:own.top_n].tolist()}
    lm = resources.fresh_lm(run)()
    weights = first_weights(lm, own.lora_rank, own.lora_alpha, own.seed)

    def slope(examples):
        prompts = [solution_prompt(lm.tokenizer, replace(one, options=(), answer_index=-1)) for one in examples]
        return gradient(lm, weights, prompts, micro_batch=8, work=Work())

    goal = slope(resources.questions(run)[name][:own.rival_questions])
    for at, row in enumerate(ranked.itertuples()):
        assert row.place == states["place_E"][at]
        moved = states["training_raw_ED"][at] - states["own_raw_ED"][at]
        assert row.projection == pytest.approx((moved @ toward / toward.norm()).item(), rel=1e-3, abs=1e-5)
        latents = states["training_sae_EL"][at].argsort(descending=True, stable=True)[:own.top_n].tolist()
        assert row.overlap == len(active & {*latents}) / own.top_n
        assert row.influence == pytest.approx((slope([train[row.place]]) @ goal).item(), rel=1e-3, abs=1e-6)


def test_a_training_leaves_out_the_fifth_that_its_name_says(run, tmp_path):
    ranked, found, name = run.get("example_forecasts"), run.get("example_retraining"), "influence"
    assert len(found.groupby(["ranking", "left_out"])) == 4 + 3 * 2
    fifth, train = len(ranked) // 5, resources.train(run)
    for end, gone in (("top", ranked[name].idxmax()), ("bottom", ranked[name].idxmin())):
        assert fifth == 1
        kept = [train[place] for place in ranked["place"].drop(gone)]
        fine_tune(resources.fresh_lm(run)(), kept, [], resources.fine_tuning(run), tmp_path / end)
        tuned = load_tuned(resources.fresh_lm(run)(), tmp_path / end)
        asked = resources.questions(run)[ranked["domain"][0]][:run.settings.eval_limit]
        again = item_measures(evaluate(tuned, asked, kinds=run.settings.eval_kinds, shots=resources.shots(run),
                                       batch=8))
        rows = found[(found["ranking"] == name) & (found["left_out"] == end)].set_index("example_id")
        assert rows.loc[again.index, "bits"].to_dict() == pytest.approx(again["bits"].to_dict(), rel=1e-4)


def retrained(seed, top, bottom, drawn, domain="law"):
    """A stand-in for a run, with bits of nine questions after training without each fifth."""
    rows = [("projection", "top", top), ("projection", "bottom", bottom), ("overlap", "top", 1),
            ("overlap", "bottom", 1), ("influence", "top", bottom), ("influence", "bottom", top),
            *(("random", str(n), one) for n, one in enumerate(drawn))]
    frame = pandas.DataFrame([{"domain": domain, "example_id": f"{domain} {item}", "ranking": ranking, "left_out": end,
                               "bits": bits + 0.01 * item * (end == "top"), "accuracy": np.nan}
                              for ranking, end, bits in rows for item in range(9)])
    return SimpleNamespace(settings=SimpleNamespace(seed=seed, example_domains=1), get=lambda stage: frame)


def test_a_lead_is_judged_among_those_of_all_fifths():
    # Fewer bits are likelier answers: without the top fifth they cost 3 and 2 bits, and a little, without the bottom 1.
    drawn = [0, 0, 0, 4], [0, 1, 2, 3]
    found = example_effects([retrained(0, 3, 1, drawn[0]), retrained(1, 2, 1, drawn[1])], 500, 0)
    rows = {row["ranking"]: row for row in found}
    assert {one["measure"] for one in found} == {"bits"}  # accuracy was not evaluated
    assert [rows[name]["mean"] for name in ("projection", "overlap", "influence")] == pytest.approx([1.54, 0.04, -1.46])
    leads = [[first - second for first, second in permutations([*one, top + 0.04, 1], 2)]
             for one, top in zip(drawn, (3, 2), strict=True)]
    null = [(first + second) / 2 for first in leads[0] for second in leads[1]]
    assert rows["projection"]["p"] == pytest.approx(np.mean(np.array(null) >= 1.54 - 1e-9))
    assert [one["mean"] for one in rows["projection"]["each"]] == pytest.approx([2.04, 1.04])


def test_questions_count_once_however_many_seeds_ask_them():
    one, again, other = retrained(0, 3, 1, [0] * 4), retrained(1, 3, 1, [0] * 4), retrained(1, 3, 1, [0] * 4, "art")
    alone, twice, apart = (example_effects(runs, 2000, 0)[0] for runs in ([one], [one, again], [one, other]))
    assert (alone["n"], twice["n"], apart["n"]) == (9, 9, 18)
    assert (alone["low"], alone["high"]) == pytest.approx((twice["low"], twice["high"]))
    assert apart["high"] - apart["low"] < 0.8 * (alone["high"] - alone["low"])


def test_without_domains_to_rank_for_there_is_nothing_to_train(run):
    none = run.variant(example_domains=0)
    assert none.get("example_effects") == []
    assert none.get("example_retraining").empty and none.get("example_forecasts").empty
