"""Stages of the shift chapters on the smoke run: each result recomputed from its inputs by other means."""

import re
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import sts
from sts.book import beside_paper, learned, pages, verdicts
from sts.data.load import load_examples
from sts.engine.finetune import load_tuned
from sts.errors import StsError
from sts.measure import shift_results
from sts.measure.correlation import pearson
from sts.run import resources as inputs
from sts.stages.shift import draws_of, of_kind, other_domain_sets, shift_questions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("pipeline-shift"))


@pytest.fixture(scope="module")
def tuned(run):
    return load_tuned(run.load_model(), run.get("sft"))


def test_the_actual_shift_is_between_the_tuned_and_the_untuned_model(run, tuned):
    stats, raw = (of_kind(run.get("sft_shift"), kind) for kind in ("sae", "raw"))
    sae, total, raw_total, tokens = run.sae(), 0, 0, 0
    for prompt in shift_questions(run):
        with torch.no_grad():
            base, after = (one.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
                slice(*prompt.question)] for one in (run.lm, tuned))
            total = total + (sae.encode(after) - sae.encode(base)).double().square().sum(0)
            raw_total = raw_total + (after - base).double().square().sum(0)
            tokens += len(base)
    # No token of the random model has an outlier norm, so all of them count.
    assert stats["tokens"].item() == raw["tokens"].item() == tokens
    torch.testing.assert_close(stats["squared_difference_L"], total, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(raw["squared_difference_L"], raw_total, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(stats["fold_squared_difference_FL"].sum(0), stats["squared_difference_L"])
    assert len(stats["squared_difference_L"]) == 128 and len(raw["squared_difference_L"]) == 64


def test_estimate_and_actual_shift_count_the_same_tokens(run):
    tokens = of_kind(run.get("sft_shift"), "sae")["tokens"]
    assert tokens == run.get("shift")["tokens"] == run.get("shift_controls")["raw/tokens"]


def test_a_pass_for_both_kinds_gives_what_each_alone_gives(run):
    from sts.data.prompts import make_group
    from sts.engine.extract import paired_stats
    from sts.stages.shift import masks

    settings = run.settings
    draws, questions = draws_of(run.sft_examples("train"), settings.shift_demonstrations, settings.overlap_draws,
                                settings.seed)
    group = make_group(run.lm.tokenizer, questions, tuple(draws[1]), tokens=settings.overlap_tokens)
    alone = paired_stats(run.lm, run.sae(), settings.layer, [group], masks(run))
    found = run.get("shift_by_draw")
    torch.testing.assert_close(found["sae/squared_difference_RL"][1], alone.squared_difference_L, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["sae/base_fired_L"], alone.base.fired_L)
    torch.testing.assert_close(found["sae/base_square_sum_L"], alone.base.square_sum_L, rtol=1e-5, atol=1e-9)
    assert found["raw/squared_difference_RL"].shape == (2, 64)
    assert found["random/squared_difference_RL"].shape == (2, 128)
    other = paired_stats(run.lm, run.sae(), settings.layer, [make_group(
        run.lm.tokenizer, questions, tuple(other_domain_sets(run)[1]), tokens=settings.overlap_tokens)], masks(run))
    torch.testing.assert_close(run.get("shift_by_other_domain")["sae/squared_difference_RL"][1],
                               other.squared_difference_L, rtol=1e-5, atol=1e-9)
    assert run.get("shift_by_demonstrations")["sae/2"].shape == (2, 128)


def test_control_demonstrations_come_from_other_domains(run):
    sets = other_domain_sets(run)
    assert len(sets) == run.settings.overlap_draws
    for chosen in sets:
        assert len(chosen) == run.settings.shift_demonstrations and len({example.domain for example in chosen}) == 1
        assert chosen[0].domain != "math"
    assert len({chosen[0].domain for chosen in sets}) == len(sets)
    # Put as the training set's problems are: open questions.
    assert all(not example.options and f"The answer is {example.answer.rstrip('.')}." in example.solution
               for chosen in sets for example in chosen)
    with pytest.raises(StsError, match="other than math; no domain has so many"):
        other_domain_sets(sts.open_run("smoke", results=run.results, domains=["math"]))


@pytest.mark.parametrize(("trained", "domain"), [("code", "computer science"), ("medicine", "health"),
                                                 ("mental health", "psychology")])
def test_control_demonstrations_are_not_of_the_trained_domain_by_another_name(run, monkeypatch, trained, domain):
    examples = [replace(example, domain=trained) for example in load_examples("gsm_symbolic", limit=24)]
    monkeypatch.setattr(inputs, "load_mixture", lambda *args, **kwargs: examples)
    found = [sts.open_run("smoke", results=run.results, domains=[domain, "law"], seed=seed) for seed in range(4)]
    assert {example.domain for one in found for chosen in other_domain_sets(one) for example in chosen} == {"law"}


def test_sets_of_demonstrations_are_disjoint_and_not_asked(run):
    examples = run.sft_examples("train")
    draws, questions = draws_of(examples, 3, 4, seed=5)
    ids = [example.example_id for draw in draws for example in draw] + [example.example_id for example in questions]
    assert sorted(ids) == sorted(example.example_id for example in examples) and len(questions) == len(examples) - 12
    assert draws_of(examples, 3, 4, seed=6)[0] != draws
    with pytest.raises(StsError, match="4 sets of 4 demonstrations were asked of 16"):
        draws_of(examples, 4, 4, seed=0)


def test_extremes_are_the_ends_of_the_absolute_shift(run):
    shifts, scores = run.get("domain_shift"), run.get("scores")
    row = next(row for row in run.get("extreme_correlations")
               if (row["measure"], row["variant"], row["score"]) == ("bits", "paper", "sts_icl"))
    change = shifts[shifts["measure"] == "bits"].set_index("domain")["shift"].abs().sort_values()
    kept = [*change.index[:4], *change.index[-4:]]
    assert set(row["domains"]) == set(kept) and row["n"] == 8 and row["exact"]
    own = scores[scores["variant"] == "paper"].set_index("domain")["sts_icl"]
    assert row["pearson"] == pytest.approx(pearson(own[kept], change[kept]))
    assert row["spread_ratio"] == pytest.approx(change[kept].std() / change.std())


def test_another_seed_repeats_the_experiment_and_shares_the_models(run):
    other = run.with_seed(1)
    assert other.lm is run.lm and other.key("sae") == run.key("sae") and run.with_seed(0) is run
    for name in ("shift", "sft", "evaluation_after", "correlations"):
        assert other.key(name) != run.key(name)
    rows = pandas.DataFrame(run.get("correlations_by_seed"))
    assert len(rows) == 2 * 2 * 16 and set(rows["seed"]) == {0, 1}
    alone = sts.open_run("smoke", results=run.results, seed=1, seeds=[])
    # The same experiment run by itself; only its SAE, trained within the run, has another seed.
    assert alone.key("sft") == other.key("sft")
    for seed, own in ((0, run), (1, other)):
        for result in own.get("correlations"):
            row, = rows[(rows["seed"] == seed) & (rows["domains"] == "all") & (rows["measure"] == result["measure"])
                        & (rows["variant"] == result["variant"]) & (rows["score"] == result["score"])].itertuples()
            assert row.pearson == pytest.approx(result.get("pearson", np.nan), nan_ok=True)


def test_the_runs_own_seed_is_not_another_one(run):
    assert run.other_seeds == (1,)
    assert sts.open_run("smoke", results=run.results, seed=1).other_seeds == ()


def test_asking_for_a_key_trains_nothing(tmp_path):
    sts.open_run("smoke", results=tmp_path).key("correlations_by_seed")
    assert not (tmp_path / "smoke").exists()


def test_keys_of_the_shift_stages_follow_what_they_read(run):
    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        names = ("sft_shift", "sft_shift_solutions", "shift_controls", "shift_by_draw", "shift_by_other_domain",
                 "shift_by_demonstrations", "ablation", "ablated_answers", "extreme_correlations",
                 "correlations_by_seed")
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(ablation_latents=[4]) == {"ablation"}
    assert keys(overlap_draws=3) == {"shift_by_draw", "shift_by_other_domain", "shift_by_demonstrations"}
    assert keys(sft_lr=1e-3) == {"sft_shift", "sft_shift_solutions", "ablation", "ablated_answers",
                                 "extreme_correlations", "correlations_by_seed"}
    assert keys(seeds=[1, 2]) == {"correlations_by_seed"}
    assert keys(ablation_model="base") == {"ablation", "ablated_answers"}
    assert "shift_controls" in keys(shift_tokens=100) and "shift_controls" not in keys(overlap_tokens=100)


@pytest.mark.parametrize(("setting", "value"), [("overlap_demonstrations", []), ("overlap_demonstrations", [2, 2]),
                                                ("ablation_latents", [0, 3]), ("seeds", [-1]), ("seeds", [3, 3])])
def test_lists_that_make_no_sense_are_refused(setting, value, tmp_path):
    with pytest.raises(StsError, match=f"{setting}: .* must be different numbers"):
        sts.open_run("smoke", results=tmp_path, **{setting: value})


# --- what the pages make of it ------------------------------------------------------------------------------------

def test_overlap_at_n_is_the_sets_overlap(run):
    n = run.settings.top_n
    estimate, goal = (set(np.argsort(-change.numpy(), kind="stable")[:n]) for change in (
        run.get("shift")["squared_difference_L"], of_kind(run.get("sft_shift"), "sae")["squared_difference_L"]))
    assert shift_results.overlap_at(run, "sae")["overlap"] == len(estimate & goal)
    assert shift_results.equal_numbers(run) == {"sae": 16, "random": 16, "raw": 8}
    curve = shift_results.overlap_curve(run, "sae").set_index("n")
    assert curve.loc[n, "overlap"] == len(estimate & goal) and curve.loc[128, "share"] == 1
    by_draw = shift_results.overlap_by_draw(run)
    first = set(np.argsort(-run.get("shift_by_draw")["sae/squared_difference_RL"][0].numpy(), kind="stable")[:n])
    assert by_draw[by_draw["kind"] == "sae"]["share"].iloc[0] == pytest.approx(len(first & goal) / n)


def test_the_ceiling_is_how_far_two_halves_of_the_questions_agree(run):
    n, folds_FL = run.settings.top_n, of_kind(run.get("sft_shift"), "sae")["fold_squared_difference_FL"].numpy()
    first, second = (set(np.argsort(-sum(folds_FL[fold] for fold in half), kind="stable")[:n])
                     for half in ((0, 2), (1,)))
    assert len(folds_FL) == 3 and first != second
    assert shift_results.ceiling(run, "sae") == pytest.approx(len(first & second) / n)


def test_baselines_are_the_busiest_latents_and_the_leads_their_distance(run):
    n, stats = run.settings.top_n, run.get("shift_by_draw")
    goal = set(np.argsort(-of_kind(run.get("sft_shift"), "sae")["squared_difference_L"].numpy(), kind="stable")[:n])

    def share_of(values, kind):
        number = shift_results.equal_numbers(run)[kind]
        aim = of_kind(run.get("sft_shift"), kind)["squared_difference_L"]
        top, own = (set(np.argsort(-one.numpy(), kind="stable")[:number]) for one in (values, aim))
        return len(top & own) / number

    def share(values):
        return len(set(np.argsort(-values.numpy(), kind="stable")[:n]) & goal) / n

    table = shift_results.baselines_by_draw(run).pivot(index="draw", columns="baseline", values="share")
    assert set(table["rate"]) == {share(stats["sae/base_fired_L"])}
    assert set(table["energy"]) == {share(stats["sae/base_square_sum_L"])}
    others = [share(change) for change in run.get("shift_by_other_domain")["sae/squared_difference_RL"]]
    assert table["other_domain"].tolist() == others
    own = [share(change) for change in stats["sae/squared_difference_RL"]]
    lead = shift_results.leads(run)
    assert set(lead) == {"rate", "energy", "other_domain", "raw", "random"}
    raw, alone = ([share_of(values, "raw") for values in kept] for kept in (
        stats["raw/squared_difference_RL"], (stats["raw/base_fired_L"], stats["raw/base_square_sum_L"])))
    mine = max(share(stats["sae/base_fired_L"]), share(stats["sae/base_square_sum_L"]))
    assert lead["raw"].mean == pytest.approx(np.mean(own) - mine - (np.mean(raw) - max(alone)))
    assert lead["energy"].mean == pytest.approx(np.mean(own) - share(stats["sae/base_square_sum_L"]))
    assert lead["other_domain"].mean == pytest.approx(np.mean(own) - np.mean(others)) and lead["rate"].n == 2
    curve = shift_results.baseline_curves(run)["rate"].set_index("n")
    assert curve.loc[n, "share"] == share(run.get("shift")["base_fired_L"])


def test_the_energy_curve_is_the_squared_activation_before_training(run):
    squares = of_kind(run.get("sft_shift"), "sae")["base_square_sum_L"].numpy()
    curve = shift_results.energy_curve(run)
    assert curve[9] == pytest.approx(np.sort(squares)[-10:].sum() / squares.sum()) and curve[-1] == pytest.approx(1)


def test_sentences_say_the_numbers_that_decide(run):
    lead, by_draw = shift_results.leads(run), shift_results.overlap_by_draw(run)
    told = verdicts.foreseen_sentence(run)
    for name in shift_results.BASELINES:
        assert f"{100 * lead[name].mean:+.0f}" in told
    random = by_draw[by_draw["kind"] == "random"]["share"].mean()
    assert f"{random:.0%} of a random code" in verdicts.better_sentence(run)
    share = shift_results.concentration_of(run, "sae").at(1)
    assert f"these carry {verdicts._percent(share)}" in verdicts.few_sentence(run)
    assert f"carry {shift_results.energy_curve(run)[15]:.0%} of the squared activation" in verdicts.beyond_sentence(run)


@pytest.mark.parametrize("sentence", ["few", "beyond", "even", "zero", "foreseen", "better"])
def test_no_claim_is_judged_where_training_taught_nothing(run, monkeypatch, sentence):
    def verdict():
        return re.findall(r"\*\*(.+?)\*\*", getattr(verdicts, f"{sentence}_sentence")(run))[-1]

    monkeypatch.setattr(learned, "loss_fall", lambda own: 0.09)
    assert verdict() == "not judged, as training taught nothing"
    # One seed's page: what the other learned plays no part.
    monkeypatch.setattr(learned, "loss_fall", lambda own: {0: 0.5}[own.settings.seed])
    assert "not judged" not in verdict()


def test_the_papers_claim_is_judged_only_in_a_run_that_learned(run, monkeypatch):
    def told(fall):
        monkeypatch.setattr(learned, "loss_fall", lambda own: {0: fall}[own.settings.seed])
        return re.findall(r"\*\*(.+?)\*\*", beside_paper.claim_sentence(run, "bits"))

    assert told(0.09) == ["not judged, as training taught nothing"] * 4
    rows = {(row["variant"], row["score"]): row for row in run.get("correlations") if row["measure"] == "bits"}
    assert told(0.5) == [pages.correlation_verdict(rows[variant, score]) for variant in ("paper", "official_code")
                         for score in ("sts_act", "sts_icl")]


def test_tables_beside_the_papers_hold_its_numbers(run):
    shifts = beside_paper.shifts_beside(run).set_index("domain")
    assert len(shifts) == 14 and shifts.index[0] == "engineering"
    assert shifts.loc["engineering", "paper, Llama3-8B-Instruct"] == "-11.97"
    own = run.get("domain_shift").set_index(["domain", "measure"])["shift"]
    assert float(shifts.loc["law", "this run, bits"]) == pytest.approx(own["law", "bits"], abs=6e-4)
    table = beside_paper.correlations_beside(run, "pearson").set_index(["source", "domains"])
    assert table.loc[("paper, Qwen2.5-7B-Instruct", "8 extremes"), "STS_act"] == "0.90 ± 0.02"
    squared = beside_paper.correlations_beside(run, "r_squared").set_index(["source", "domains"])
    assert squared.loc[("paper, Gemma2-9B-Instruct", "8 extremes"), "STS_ICL"] == "0.60 ± 0.02"
    result = next(row for row in run.get("correlations")
                  if (row["measure"], row["variant"], row["score"]) == ("bits", "paper", "sts_act"))
    ours = ("this run, bits per character", "all domains")
    assert table.loc[ours, "STS_act"] == f"{result['pearson']:.2f}"
    assert float(squared.loc[ours, "STS_act"]) == pytest.approx(result["pearson"] ** 2, abs=0.006)


def test_seeds_are_told_or_their_absence_is(run):
    assert "Over 2 seeds (0, 1)" in beside_paper.seeds_sentence(run)
    assert "did not learn" in beside_paper.seeds_sentence(run)
    assert "one seed, 0" in beside_paper.seeds_sentence(sts.open_run("smoke", results=run.results, seeds=[]))
    table = beside_paper.seeds_table(run)
    assert list(table.columns[3:]) == ["seed 0, all", "seed 0, extremes", "seed 1, all", "seed 1, extremes"]
    assert len(table) == 16


def test_seeds_are_counted_only_if_each_of_them_learned(run, monkeypatch):
    falls = {0: 0.5, 1: 0.3}
    monkeypatch.setattr(learned, "loss_fall", lambda own: falls[own.settings.seed])
    told = beside_paper.seeds_sentence(run)
    assert "50% with seed 0" in told and "30% with seed 1" in told and "of 2 with p below 0.05" in told
    falls[1] = -0.1
    told = beside_paper.seeds_sentence(run)
    assert "rose by 10% with seed 1" in told and "p below 0.05" not in told
    assert told.count("(not judged, as training taught nothing with seed 1)") == 6
