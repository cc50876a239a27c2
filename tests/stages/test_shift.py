"""Stages of the shift chapters on the smoke run: each result recomputed from its inputs by other means."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import sts
from sts.data import groups
from sts.data.groups import draws_of
from sts.data.load import load_examples
from sts.errors import StsError
from sts.measure.baselines import split_domains
from sts.measure.correlation import pearson
from sts.run import resources
from sts.run.others import seeds_of


def other_domain_sets(run):
    settings = run.settings
    return groups.other_domain_sets(resources.train(run), resources.examples_set_aside(run) or resources.questions(run),
                                    settings.shift_demonstrations, settings.overlap_draws, settings.seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("pipeline-shift"))


@pytest.fixture(scope="module")
def tuned(run):
    return resources.tuned(run)


def test_the_actual_shift_is_between_the_tuned_and_the_untuned_model(run, tuned):
    stats, raw = (split_domains(run.get("sft_shift"))[kind] for kind in ("sae", "raw"))
    sae, total, raw_total, tokens = resources.reader(run), 0, 0, 0
    for prompt in (prompt for group in resources.shift_groups(run) for prompt in group.base):
        with torch.no_grad():
            base, after = (one.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
                slice(*prompt.question)] for one in (resources.lm(run), tuned))
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
    tokens = split_domains(run.get("sft_shift"))["sae"]["tokens"]
    assert tokens == run.get("shift")["tokens"] == run.get("shift_controls")["raw/tokens"]


def test_a_pass_for_both_kinds_gives_what_each_alone_gives(run):
    from sts.data.prompts import make_group
    from sts.engine.extract import paired_stats

    settings = run.settings
    draws, questions = draws_of(resources.train(run), settings.shift_demonstrations, settings.overlap_draws,
                                settings.seed)
    group = make_group(resources.lm(run).tokenizer, questions, tuple(draws[1]), tokens=settings.overlap_tokens)
    alone = paired_stats(resources.lm(run), resources.reader(run), settings.layer, [group], resources.masks(run))
    found = run.get("shift_by_draw")
    torch.testing.assert_close(found["sae/squared_difference_RL"][1], alone.squared_difference_L, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found["sae/base_fired_L"], alone.base.fired_L)
    torch.testing.assert_close(found["sae/base_square_sum_L"], alone.base.square_sum_L, rtol=1e-5, atol=1e-9)
    assert found["raw/squared_difference_RL"].shape == (2, 64)
    assert found["random/squared_difference_RL"].shape == (2, 128)
    group = make_group(resources.lm(run).tokenizer, questions, tuple(other_domain_sets(run)[1]),
                       tokens=settings.overlap_tokens)
    other = paired_stats(resources.lm(run), resources.reader(run), settings.layer, [group], resources.masks(run))
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
def test_control_demonstrations_are_not_of_the_trained_domain_by_another_name(run, trained, domain):
    examples = [replace(example, domain=trained) for example in load_examples("gsm_symbolic", limit=24)]
    pool = {name: resources.questions(run)[name] for name in (domain, "law")}
    found = [groups.other_domain_sets(examples, pool, 1, 2, seed) for seed in range(4)]
    assert {example.domain for sets in found for chosen in sets for example in chosen} == {"law"}


def test_sets_of_demonstrations_are_disjoint_and_not_asked(run):
    examples = resources.train(run)
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
    other = run.variant(seed=1, seeds=[])
    assert resources.lm(other) is resources.lm(run) and other.key("sae") == run.key("sae")
    for name in ("shift", "sft", "evaluation_after", "correlations"):
        assert other.key(name) != run.key(name)
    rows = pandas.DataFrame(run.get("correlations_by_seed"))
    assert len(rows) == 2 * 2 * 12 and set(rows["seed"]) == {0, 1}
    alone = sts.open_run("smoke", results=run.results, seed=1, seeds=[])
    # The same experiment run by itself; only its SAE, trained within the run, has another seed.
    assert alone.key("sft") == other.key("sft")
    for seed, own in ((0, run), (1, other)):
        for result in own.get("correlations"):
            row, = rows[(rows["seed"] == seed) & (rows["domains"] == "all") & (rows["measure"] == result["measure"])
                        & (rows["variant"] == result["variant"]) & (rows["score"] == result["score"])].itertuples()
            assert row.pearson == pytest.approx(result.get("pearson", np.nan), nan_ok=True)


def test_the_runs_own_seed_is_not_another_one(run):
    assert [one.settings.seed for one in seeds_of(run)] == [0, 1]
    assert [one.settings.seed for one in seeds_of(sts.open_run("smoke", results=run.results, seed=1))] == [1]


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


@pytest.mark.parametrize(("setting", "value"), [("overlap_demonstrations", []), ("ablation_latents", [0, 3]),
                                                ("seeds", [-1])])
def test_lists_that_make_no_sense_are_refused(setting, value, tmp_path):
    with pytest.raises(StsError, match=setting):
        sts.open_run("smoke", results=tmp_path, **{setting: value})
