"""Stages of the chapter on reinforcement learning on the smoke run: each result recomputed by other means."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

import sts
from sts.book import evidence
from sts.book.claims import NOT_DONE, NOT_TESTABLE, read_claims
from sts.data.prompts import make_group
from sts.engine.extract import paired_stats
from sts.errors import StsError
from sts.measure.items import item_measures
from sts.run import others, resources
from sts.run.plan import asked_for, jobs
from sts.stages import reinforcement


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("reinforcement"), rl_seeds=[1])


@pytest.fixture(scope="module")
def both(run):
    """The run's two seeds, with the problems of reinforcement learning to train on."""
    return others.rl_runs_of(run)


def logged(own, stage):
    return json.loads((own.get(stage) / "training.json").read_text())


def top(change_L, count=16):
    return set(np.argsort(-change_L.numpy(), kind="stable")[:count].tolist())


def test_both_trainings_have_the_same_problems_at_every_seed(run, both):
    assert [own.settings.seed for own in both] == [0, 1]
    for own in both:
        assert own.settings.sft_data == "chain_sum" and len(resources.train(own)) == 16
        assert logged(own, "rl")["steps"] == 10 and (own.get("rl") / "adapter" / "adapter_config.json").is_file()
        assert not [path for path in own.get("rl").iterdir() if path.name not in ("adapter", "training.json")]
    assert resources.train(both[0]) != resources.train(both[1])
    assert run.get("sft") != both[0].get("sft")


def test_the_actual_shift_is_between_the_untuned_model_and_the_one_that_was_rewarded(both):
    own = both[0]
    sae, total = resources.reader(own), 0
    for prompt in (prompt for group in resources.shift_groups(own) for prompt in group.base):
        with torch.no_grad():
            base, after = (one.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
                slice(*prompt.question)] for one in (resources.lm(own), resources.reinforced(own)))
            total = total + (sae.encode(after) - sae.encode(base)).double().square().sum(0)
    shift = own.get("rl_shift")
    torch.testing.assert_close(shift["sae/squared_difference_L"], total, rtol=1e-3, atol=1e-6)
    assert shift["sae/tokens"] == own.get("shift")["tokens"] and shift["raw/squared_difference_L"].sum() > 0


def test_rises_are_differences_of_fifths_the_weakest_first(run, both):
    rewards = run.get("rl_rewards")
    found = {(row["seed"], row["part"]): row for row in rewards["rises"]}
    assert len(found) == 6
    for own in both:
        curve = logged(own, "rl")["curve"]
        for part in ("reward", "correct", "ended"):
            row, values = found[own.settings.seed, part], [one[part] for one in curve]
            assert (row["n"], row["steps"], row["data"]) == (2, 10, "chain_sum")
            assert row["rise"] == pytest.approx(sum(values[8:]) / 2 - sum(values[:2]) / 2)
            differences = np.subtract(values[8:], values[:2])
            if np.ptp(differences):
                low, high = scipy_stats.t.interval(0.95, 1, np.mean(differences), scipy_stats.sem(differences))
                assert (row["low"], row["high"]) == pytest.approx((low, high))
    lows = [row["low"] for row in rewards["rises"]]
    assert lows == sorted(lows)
    assert [row["kl"] for row in rewards["curves"] if row["seed"] == 1] == [
        row["kl"] for row in logged(both[1], "rl")["curve"]]
    assert rewards["batch"] == logged(both[0], "rl")["batch"] and rewards["group"] == 8
    log = logged(both[1], "sft")
    assert rewards["falls"][1] == pytest.approx(1 - log["held_out_after"] / log["held_out_before"])


def test_an_interval_that_is_not_known_comes_first(both, monkeypatch):
    monkeypatch.setattr(reinforcement, "_log", lambda own: {"curve": [
        {"reward": 0.0, "correct": 0.0, "ended": 0.0}, {"reward": 1.0, "correct": 1.0, "ended": 1.0}]})
    assert {(row["low"], row["rise"]) for row in reinforcement._rises(both, 500)} == {(None, 1.0)}


def test_overlaps_are_shares_of_the_actual_list(run, both):
    found = run.get("rl_overlap")
    sets = {(row["seed"], row["training"], row["answers"]): row for row in found["sets"]}
    leads = {row["seed"]: row for row in found["leads"] if row["lead"] == "sft_less_rl"}
    for own in both:
        seed, shares = own.settings.seed, {}
        for training, stage in (("sft", "sft_shift"), ("rl", "rl_shift")):
            actual = top(own.get(stage)["sae/squared_difference_L"])
            shares[training] = [len(top(row_L) & actual) / 16
                                for row_L in own.get("shift_by_draw")["sae/squared_difference_RL"]]
            row, = (row for row in found["lists"] if (row["seed"], row["training"]) == (seed, training))
            assert row["overlap"] == len(top(own.get("shift")["squared_difference_L"]) & actual)
            assert row["chance"] == 16 / 128
            assert sets[seed, training, "data"]["mean"] == pytest.approx(np.mean(shares[training]))
            assert sets[seed, training, "data"]["n"] == 2
            fires = top(own.get("shift")["base_fired_L"].double())
            assert sets[seed, training, "none"]["mean"] == len(fires & actual) / 16
        differences = np.subtract(shares["sft"], shares["rl"])
        low, high = scipy_stats.t.interval(0.95, 1, np.mean(differences), scipy_stats.sem(differences))
        assert [leads[seed][end] for end in ("mean", "low", "high")] == pytest.approx(
            [np.mean(differences), low, high], nan_ok=True)


def test_the_seed_whose_lead_is_least_sure_is_judged(run):
    lows = [row["low"] for row in run.get("rl_overlap")["leads"] if row["lead"] == "sft_less_rl"]
    claim = read_claims()[1]["rl-overlap"]
    assert len(lows) == 2 and evidence.row(run, **claim.arguments).low == min(lows)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_correlations_are_naive_ones_of_scores_on_each_list(run, both):
    rows = {(row["list"], row["score"]): row for row in run.get("rl_correlations") if row["measure"] == "bits"}
    assert len(rows) == 4
    compared, r = [], {}
    for own in both:
        stats, lists = own.get("domain_stats"), {"estimated": own.get("shift")["squared_difference_L"],
                                                 "actual": own.get("rl_shift")["sae/squared_difference_L"]}
        before, then = (item_measures(own.get(name)) for name in ("evaluation_before", "rl_evaluation"))
        change = (then["bits"] - before["bits"]).groupby(before["domain"]).mean().abs()
        for name, change_L in lists.items():
            for score, field in (("sts_act", "base_sum_L"), ("sts_icl", "squared_difference_L")):
                values = [sum(stats[f"{domain}/{field}"][one].item() for one in top(change_L))
                          / stats[f"{domain}/tokens"].item() for domain in change.index]
                r.setdefault((name, score), []).append(scipy_stats.pearsonr(values, change).statistic)
    for (name, score), by_seed in r.items():
        row = rows[name, score]
        if not np.isfinite(by_seed).all():  # these latents say the same of all domains
            assert "is constant" in row["undefined"]
            continue
        compared.append((name, score))
        assert row["by_seed"] == pytest.approx(by_seed) and row["pearson"] == pytest.approx(np.mean(by_seed))
        assert 0 < row["p"] <= 1 and row["n"] == 14
    for score in {score for _, score in compared if {("estimated", score), ("actual", score)} <= {*compared}}:
        less = rows["estimated", score]["less"][f"actual/{score}"]["mean"]
        assert less == pytest.approx(np.mean(r["actual", score]) - np.mean(r["estimated", score]))
    assert {name for name, _ in compared} == {"estimated", "actual"} and len(compared) >= 3


def test_demonstrations_are_the_models_own_right_answers(both, monkeypatch):
    own, asked = both[0], []

    def answer(lm, example, answers, tokens):
        asked.append((example, answers, tokens))
        return f"It is {example.answer}" if len(asked) > 1 else ""
    monkeypatch.setattr(reinforcement, "right_answer", answer)
    passes = {"tokens_per_batch": 4096, "work": None}
    train, settings = resources.train(own), own.settings
    rest = (resources.lm(own), resources.reader(own), settings.layer, train, resources.masks(own), 4, 8, 200, 2, 1, 0)
    found = reinforcement.rollout_shift(*rest, lambda fraction: None, passes)
    # The first one asked is not solved, the next two are, which are enough.
    assert (found["asked"], found["solved"]) == (3, 2) and {one[1:] for one in asked} == {(4, 8)}
    questions = [one for one in train if one not in [example for example, *_ in asked[1:]]]
    for place, (example, *_) in enumerate(asked[1:]):
        for kind, shown in (("given", example), ("own", replace(example, solution=f"It is {example.answer}"))):
            group = make_group(resources.lm(own).tokenizer, questions, [shown], tokens=200)
            alone = paired_stats(resources.lm(own), resources.reader(own), settings.layer, [group],
                                 resources.masks(own))
            torch.testing.assert_close(found[f"{kind}/sae/squared_difference_RL"][place], alone.squared_difference_L,
                                       rtol=1e-5, atol=1e-9)


def test_own_answers_are_compared_set_by_set(run, both, monkeypatch):
    monkeypatch.setattr(reinforcement, "right_answer", lambda lm, example, *rest: f"It is {example.answer}")
    again = sts.open_run("smoke", results=run.results, rl_seeds=[1], overlap_tokens=190)
    found, own = again.get("rl_overlap"), others.rl_runs_of(again)
    for one in own:
        actual, stats = top(one.get("rl_shift")["sae/squared_difference_L"]), one.get("rollout_shift")
        differences = [(len(top(mine_L) & actual) - len(top(theirs_L) & actual)) / 16 for mine_L, theirs_L in zip(
            *(stats[f"{kind}/sae/squared_difference_RL"] for kind in ("own", "given")), strict=True)]
        lead, = (row for row in found["leads"] if (row["seed"], row["lead"]) == (one.settings.seed, "own_less_given"))
        assert (lead["mean"], lead["n"]) == (pytest.approx(np.mean(differences)), 2)
    assert {(row["training"], row["answers"]) for row in found["sets"]} == {
        (training, kind) for training in ("sft", "rl") for kind in ("data", "none", "own", "given")}


def test_no_right_answer_leaves_no_demonstration(run, both):
    stats = both[0].get("rollout_shift")  # the random model's
    assert (stats["asked"], stats["solved"]) == (16, 0) and len(stats) == 2
    assert run.get("rl_overlap")["leads"][:2] == [
        {"seed": seed, "lead": "own_less_given", "undefined": "too few right answers"} for seed in (0, 1)]
    claim = read_claims()[1]["own-answers"]
    assert evidence.weigh(run, claim)[1:] == (NOT_TESTABLE, "too few right answers")


def test_nothing_is_judged_where_the_reward_did_not_rise(run, monkeypatch):
    claim = read_claims()[1]["rl-overlap"]
    assert evidence.weigh(run, claim)[1:] == (NOT_TESTABLE, "the reward did not rise")
    rewards = run.get("rl_rewards")
    for row in rewards["rises"]:
        monkeypatch.setitem(row, "low", 0.1)
    monkeypatch.setitem(rewards, "falls", [0.5, 0.05])
    assert evidence.weigh(run, claim)[2] == evidence.UNLEARNED
    monkeypatch.setitem(rewards, "falls", [0.5, 0.5])
    found, word, reason = evidence.weigh(run, claim)
    assert reason == "" and word != NOT_TESTABLE and found.n == 2
    assert evidence.weigh(run, read_claims()[1]["reward-rises"])[0].against.keys() == {"right answers alone"}


def test_a_run_may_do_without(run):
    without = sts.open_run("smoke", results=run.results, rl_steps=0)
    with pytest.raises(StsError, match="rl_steps is 0"):
        without.get("rl_rewards")
    for name in ("reward-rises", "rl-overlap", "rl-actual", "own-answers"):
        found, word, reason = evidence.weigh(without, read_claims()[1][name])
        assert found is None and word == NOT_DONE and "rl_steps is 0" in reason
    stages = {"rl_rewards", "rl_overlap", "rl_correlations"}
    assert not stages & {*asked_for(without)} and stages <= {*asked_for(run)}
    assert not {"rl_shift", "rl_evaluation", "rollout_shift"} & {*asked_for(run)}


def test_at_rate_zero_there_is_nothing_to_foresee(run):
    still = sts.open_run("smoke", results=run.results, rl_lr=0)
    own = others.rl_runs_of(still)[0]
    assert own.get("rl_shift")["sae/squared_difference_L"].sum() == 0
    rows = still.get("rl_correlations")
    assert rows and all("undefined" in row for row in rows)
    assert {row["active"] for row in still.get("rl_overlap")["lists"] if row["training"] == "rl"} == {0}


def test_an_unknown_set_is_an_error_that_names_the_others():
    with pytest.raises(StsError, match="rl_data.*'nosuch' is not known. Valid: .*chain_sum"):
        sts.open_run("smoke", rl_data="nosuch")
    with pytest.raises(StsError, match="rl_group"):
        sts.open_run("smoke", rl_group=1)


def test_settings_of_reinforcement_learning_are_in_its_keys_alone(run):
    other = sts.open_run("smoke", results=run.results, rl_seeds=[1], rl_lr=1e-3)
    for name in ("sft", "sft_shift", "shift", "evaluation_after", "correlations", "training_matrix"):
        assert other.key(name) == run.key(name)
    for name in ("rl", "rl_shift", "rl_evaluation", "rl_rewards", "rl_overlap", "rl_correlations"):
        assert other.key(name) != run.key(name)
    assert sts.open_run("smoke", results=run.results).key("rl_rewards") != run.key("rl_rewards")


def test_a_workflow_holds_both_trainings_of_every_seed(run):
    found = jobs(run, ["rl_overlap"])
    for name in ("rl-sft_data_chain_sum", "rl-sft_data_chain_sum-seed_1", "sft_shift-sft_data_chain_sum-seed_1"):
        assert name in found and name in found["rl_overlap"].needs
