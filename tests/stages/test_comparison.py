"""Stages that compare forecasts, on the smoke run: each result recomputed from its inputs by other means."""

import json

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import sts
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.baselines import split_domains
from sts.measure.correlation import correlation_rows
from sts.run import resources
from sts.run.resources import seeds_of
from sts.stages.comparison import baseline_power


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("pipeline-baselines"))


def question_states(lm, prompts):
    """Residual stream after the smoke run's layer 0 on the question tokens of prompts, all in one matrix."""
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[1][0][
            slice(*prompt.question)] for prompt in prompts]).double()


def row_of(rows, **wanted):
    own, = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return own


# --- passes through the model -------------------------------------------------------------------------------------

def test_raw_statistics_are_sums_of_the_residual_stream(run):
    group, own = resources.domain_groups(run)["law"][0], split_domains(run.get("domain_raw_stats"))["law"]
    base, icl = (question_states(resources.lm(run), side) for side in (group.base, group.icl))
    assert own["tokens"].item() == len(base)  # no token of the random model has an outlier norm
    torch.testing.assert_close(own["base_sum_L"], base.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["base_square_sum_L"], base.square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["squared_difference_L"], (icl - base).square().sum(0), rtol=1e-3, atol=1e-4)
    # One draw of demonstrations in this run, so that raw dimensions and latents saw the same tokens.
    assert own["tokens"] == split_domains(run.get("domain_stats"))["law"]["tokens"]


def test_the_models_change_is_measured_between_untuned_and_tuned(run):
    group, own = resources.domain_groups(run)["math"][0], split_domains(run.get("domain_model_change"))["math"]
    base, after = (question_states(lm, group.base) for lm in (resources.lm(run), resources.tuned(run)))
    torch.testing.assert_close(own["base_sum_L"], base.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["tuned_sum_L"], after.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["squared_difference_L"], (after - base).square().sum(0), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        encode = resources.reader(run).encode
        latents = (encode(after.float()) - encode(base.float())).double().square().sum()
    assert own["latents_squared"].item() == pytest.approx(latents.item(), rel=1e-3)
    values = run.get("baseline_values").set_index("domain").loc["math"]
    assert values["change_rms"] == pytest.approx((after - base).square().sum(1).mean().sqrt().item(), rel=1e-3)


# --- one value a domain -------------------------------------------------------------------------------------------

def test_every_baseline_has_a_value_in_every_domain(run):
    values, names = run.get("baseline_values"), set(baselines.PREDICTORS) - {"probe_raw", "probe_sae"}
    assert set(values.columns) == names | {"domain"} and len(values) == 14
    assert np.isfinite(values[list(names)].to_numpy()).all()
    own, scores = values.set_index("domain"), run.get("scores").query("variant == 'paper'").set_index("domain")
    before = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["before"]
    assert own["sts_icl"].to_dict() == scores["sts_icl"].to_dict()
    assert own["base_bits"].to_dict() == before.to_dict()
    solutions = run.get("evaluation_before").query("kind == 'solution'").set_index("domain")
    bits = (-solutions["loglikelihood"] / np.log(2) / solutions["characters"]).groupby("domain").mean()
    assert own["base_bits"].to_dict() == pytest.approx(bits.to_dict())


def test_all_latents_are_the_score_at_full_width(run):
    full = sts.open_run("smoke", results=run.results, top_n=128)
    scores = full.get("scores").query("variant == 'paper'").set_index("domain")
    values = run.get("baseline_values").set_index("domain")
    for name in ("act", "icl"):
        assert values[f"all_{name}"].to_dict() == pytest.approx(scores[f"sts_{name}"].to_dict())


def test_length_is_the_mean_number_of_the_questions_tokens(run):
    from sts.data.prompts import question_text

    tokenizer, examples = resources.lm(run).tokenizer, resources.questions(run)["health"]
    lengths = [len(tokenizer.encode(question_text(example), add_special_tokens=False)) for example in examples]
    own = run.get("text_baselines").set_index("domain").loc["health"]
    assert own["question_tokens"] == pytest.approx(np.mean(lengths)) and own["questions"] == len(examples)


def test_probes_predict_from_mean_activations(run):
    row = row_of(run.get("probe_predictions"), measure="bits", features="sae")
    stats = split_domains(run.get("domain_stats"))
    features = np.stack([(stats[name]["base_sum_L"] / stats[name]["tokens"]).numpy() for name in row["domains"]])
    shift = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()
    assert row["actual"] == pytest.approx(shift[row["domains"]].tolist())
    expected = baselines.held_out_predictions(features, np.array(row["actual"])[:, None])[:, 0]
    assert row["predicted"] == pytest.approx(expected.tolist()) and len(row["shuffled"]) == run.settings.baseline_draws


# --- over seeds ---------------------------------------------------------------------------------------------------

def test_correlations_are_means_of_the_seeds_own(run):
    rows = run.get("baseline_correlations")
    for score in ("sts_act", "sts_icl"):
        each = [row_of(own.get("correlations"), measure="bits", variant="paper", score=score)
                for own in (run, seeds_of(run)[1])]
        row = row_of(rows, measure="bits", predictor=score)
        assert row["by_seed"] == pytest.approx([one["pearson"] for one in each])
        assert row["pearson"] == pytest.approx(np.mean(row["by_seed"])) and row["seeds"] == 2
        assert row["spearman"] == pytest.approx(np.mean([one["spearman"] for one in each]))
        assert row["pearson_interval"]["low"] < row["pearson"] < row["pearson_interval"]["high"]
    rival = row_of(rows, measure="bits", predictor="tfidf")
    assert rival["less"]["sts_icl"]["mean"] == pytest.approx(row["pearson"] - rival["pearson"])
    assert set(row_of(rows, measure="bits", predictor="sts_icl")["less"]) == {"sts_act"}


def test_extremes_are_the_four_domains_at_either_end(run):
    row = row_of(run.get("extreme_correlations"), measure="bits", variant="paper", score="sts_icl")
    change = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs().sort_values()
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")["sts_icl"]
    assert set(row["domains"]) == {*change.index[:4], *change.index[-4:]}
    assert row["pearson"] == pytest.approx(pearsonr(scores[row["domains"]], change[row["domains"]])[0])
    assert row["spearman"] == pytest.approx(spearmanr(scores[row["domains"]], change[row["domains"]])[0])
    kept = [own["pearson"] for own in run.get("correlations_by_seed") if (own["seed"], own["domains"], own["measure"],
            own["variant"], own["score"]) == (0, "extremes", "bits", "paper", "sts_icl")]
    assert kept == [row["pearson"]]


def test_nulls_need_no_sums_of_the_domains(run):
    run.get("baseline_nulls")
    for path in run.store.folder.glob("domain_stats-*"):
        path.rename(path.with_name("." + path.name))
    try:
        path = run.store.find("baseline_nulls", run.key("baseline_nulls"), "json")
        rows = json.loads(path.read_text())
        path.unlink()
        assert sts.open_run("smoke", results=run.results).get("baseline_nulls") == rows
        assert not list(run.store.folder.glob("domain_stats-*"))
    finally:
        for path in run.store.folder.glob(".domain_stats-*"):
            path.rename(path.with_name(path.name[1:]))


def test_one_seed_alone_has_the_p_of_the_score_chapter(run):
    alone = sts.open_run("smoke", results=run.results, seeds=[])
    row = row_of(alone.get("baseline_correlations"), measure="bits", predictor="sts_act")
    other = row_of(alone.get("correlations"), measure="bits", variant="paper", score="sts_act")
    assert row["p"] == pytest.approx(other["p"], abs=0.03) and row["pearson"] == pytest.approx(other["pearson"])


def test_only_shuffled_targets_judge_a_probe(run):
    row = row_of(run.get("baseline_correlations"), measure="bits", predictor="probe_sae")
    assert "p" not in row and "less" not in row
    null = row_of(run.get("baseline_nulls"), measure="bits", predictor="probe_sae")
    each = [row_of(own.get("probe_predictions"), measure="bits", features="sae") for own in (run, seeds_of(run)[1])]
    assert null["observed"] == pytest.approx(np.mean([pearsonr(one["predicted"], one["actual"])[0] for one in each]))
    shuffled = np.mean([one["shuffled"] for one in each], axis=0)
    assert null["p"] == pytest.approx((1 + (shuffled >= null["observed"]).sum()) / (1 + len(shuffled)))
    assert null["mean"] < -0.2  # what leaving one out does to noise


def test_random_sets_are_correlated_like_the_score(run):
    null = row_of(run.get("baseline_nulls"), measure="bits", null="rate", predictor="sts_icl")
    values = []
    for own in (run, seeds_of(run)[1]):
        shift = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()
        values.append([pearsonr(one, shift[sorted(shift.index)])[0]
                       for one in own.get("random_latent_scores")["rate/icl_RD"].double().numpy()])
    means = np.mean(values, axis=0)
    assert null["mean"] == pytest.approx(means.mean(), abs=1e-5)
    assert (null["low"], null["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-5)
    observed = row_of(run.get("baseline_correlations"), measure="bits", predictor="sts_icl")["pearson"]
    assert null["p"] == pytest.approx((1 + (means >= observed).sum()) / (1 + len(means)), abs=0.01)


@pytest.mark.parametrize("controls", [["base_bits", "question_tokens"], ["question_tokens"]])
def test_confounds_are_partial_correlations_of_the_seeds(run, controls):
    row = row_of(run.get("baseline_confounds"), measure="bits", score="sts_icl", controls=controls)
    expected = []
    for own in seeds_of(run):
        values = own.get("baseline_values").set_index("domain")
        shift = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()[values.index]
        expected.append(correlation_rows(values["sts_icl"], shift, values[controls].to_numpy()))
    assert row["by_seed"] == pytest.approx(expected) and 0 < row["p"] <= 1


def test_an_accuracy_that_did_not_move_is_undefined_everywhere(run):
    rows = [row for row in run.get("baseline_correlations") if row["measure"] == "accuracy"]
    shift = run.get("domain_shift").query("measure == 'accuracy'")["shift"]
    assert (shift == 0).all() and all("constant" in row["undefined"] or "same in every" in row["undefined"]
                                      for row in rows)


def test_what_the_design_could_find_is_judged_by_absolute_changes(run):
    row = row_of(run.get("baseline_power"), measure="bits")
    own = run.get("domain_shift").query("measure == 'bits'")
    share = 1 - (own["standard_error"]**2).mean() / own["shift"].abs().var()
    assert row["reliability"] == pytest.approx(max(0, share)) and row["n"] == 14


def test_changes_of_both_signs_are_judged_by_their_size():
    """What is forecast is how far a domain moves; domains that move as far up as down do not differ in that."""
    frame = pandas.DataFrame({"measure": "bits", "shift": [0.5, -0.5, 0.6, -0.6, 0.7, -0.7], "standard_error": 0.05})
    row, = baseline_power(frame)
    assert row["reliability"] == pytest.approx(1 - 0.05**2 / frame["shift"].abs().var())


def test_one_question_a_domain_leaves_the_reliability_undefined():
    frame = pandas.DataFrame({"measure": "bits", "shift": [0.5, 0.4, 0.6, 0.9], "standard_error": np.nan})
    row, = baseline_power(frame)
    assert "one question" in row["undefined"] and json.dumps(row, allow_nan=False)


# --- settings -----------------------------------------------------------------------------------------------------

def test_keys_follow_what_the_stages_read(run):
    names = ("domain_raw_stats", "domain_model_change", "text_baselines", "baseline_values", "random_latent_scores",
             "probe_predictions", "baseline_correlations", "baseline_nulls", "baseline_confounds", "baseline_power")
    after = {"baseline_correlations", "baseline_nulls", "baseline_confounds"}

    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(baseline_draws=20) == {"random_latent_scores", "probe_predictions", "baseline_correlations",
                                       "baseline_nulls"}
    assert keys(top_n=8) == {"baseline_values", "random_latent_scores"} | after
    assert keys(seeds=[1, 2]) == after
    assert keys(sft_lr=1e-3) == {"domain_model_change", "baseline_values", "probe_predictions",
                                 "baseline_power"} | after
    assert "domain_raw_stats" not in keys(sae_k=4) and "domain_raw_stats" in keys(score_tokens=100)


def test_too_many_latents_are_refused_before_anything_is_drawn(run):
    with pytest.raises(StsError, match="Set top_n to at most 64"):
        sts.open_run("smoke", results=run.results, top_n=100).get("random_latent_scores")


@pytest.mark.parametrize("domains", [["law", "math"], ["law", "math", "biology", "health"]])
def test_with_few_domains_rows_say_what_is_undefined(run, domains):
    few = sts.open_run("smoke", results=run.results, domains=domains, seeds=[])
    rows = few.get("baseline_correlations")
    assert all("undefined" in row for row in rows if row["predictor"].startswith("probe_") or len(domains) == 2)
    assert all("undefined" in row for row in few.get("baseline_confounds") if len(row["controls"]) == 2)
    for name in ("baseline_correlations", "baseline_nulls", "baseline_power"):
        json.dumps(few.get(name), allow_nan=False)
