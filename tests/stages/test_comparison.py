"""Stages that compare forecasts, on the smoke run: each result recomputed from its inputs by other means."""

import json
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import sts
from sts.data.sources import MMLU_PRO_CATEGORY
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.baselines import split_domains
from sts.measure.correlation import correlation_rows
from sts.measure.items import item_measures
from sts.run import resources
from sts.run.others import seeds_of
from sts.stages.comparison import baseline_confounds, score_checks


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
    values, names = run.get("baseline_values"), set(baselines.PREDICTORS) - {
        "probe_raw", "probe_sae", "answer_shortness"}
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


@pytest.mark.parametrize("controls", [["base_bits"], ["question_tokens"], ["answer_shortness"]])
def test_confounds_are_partial_correlations_of_the_seeds(run, controls):
    row = row_of(run.get("baseline_confounds"), measure="bits", score="sts_icl", controls=controls)
    expected = []
    for own in seeds_of(run):
        answered = own.get("evaluation_before").query("kind == 'solution'")
        values = own.get("baseline_values").set_index("domain").assign(
            answer_shortness=(1 / answered["characters"]).groupby(answered["domain"]).mean())
        shift = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()[values.index]
        expected.append(correlation_rows(values["sts_icl"], shift, values[controls].to_numpy()))
    assert row["by_seed"] == pytest.approx(expected) and 0 < row["p"] <= 1


def test_an_accuracy_that_did_not_move_is_undefined_everywhere(run):
    rows = [row for row in run.get("baseline_correlations") if row["measure"] == "accuracy"]
    shift = run.get("domain_shift").query("measure == 'accuracy'")["shift"]
    assert (shift == 0).all() and all("constant" in row["undefined"] or "same in every" in row["undefined"]
                                      for row in rows)


def test_how_well_a_change_is_known_is_said_of_every_measure(run):
    own, before = run.get("domain_shift"), item_measures(run.get("evaluation_before"))
    for row in run.get("change_quality"):
        assert row["n"] == 14 and row["before"] == pytest.approx(
            own[own["measure"] == row["measure"]]["before"].mean())
        assert 0 <= row["beyond"] <= 1 and row["detectable"] > row["needed"] > 0
    measured = set(before.columns[before.notna().any()]) - {"domain"}
    assert {row["measure"] for row in run.get("change_quality")} == measured


def test_too_few_questions_leave_the_reliability_undefined(run):
    few = sts.open_run("smoke", results=run.results, eval_limit=1)
    row = few.get("change_quality")[0]
    assert "too few for two halves" in row["undefined"] and json.dumps(row, allow_nan=False)


def subjects():
    """Two seeds of 24 subjects in three categories, with a change that follows the category and the score a little."""
    generator = np.random.default_rng(3)
    names = sorted(name for name, of in MMLU_PRO_CATEGORY.items() if of in ("math", "health", "physics", "history"))
    level = np.array([{"math": 0.0, "health": 2.0, "physics": 4.0, "history": 1.0}[MMLU_PRO_CATEGORY[name]]
                      for name in names])
    score = level + generator.standard_normal(len(names))
    return names, level, score, level + 0.3 * score + generator.standard_normal((2, len(names)))


class Seed:
    """What a stage over all seeds reads of one of them."""

    def __init__(self, seed, names, score, change, level=0.0):
        items = [f"{name}-{place}" for name in names for place in range(4)]
        before = pandas.DataFrame({"example_id": items, "domain": np.repeat(names, 4), "kind": "solution", "option": -1,
                                   "loglikelihood": -np.log(2) * np.repeat(20 + level, 4), "characters": 1,
                                   "is_right": True})
        after = before.assign(loglikelihood=before["loglikelihood"] - np.log(2) * np.repeat(change, 4))
        self.settings, self.tables = SimpleNamespace(seed=seed), {
            "evaluation_before": before, "evaluation_after": after, "baseline_values": pandas.DataFrame(
                {"domain": names, "sts_act": score, "sts_icl": -score, "base_bits": np.arange(len(names)) % 5,
                 "question_tokens": np.arange(len(names)) % 7}), "scores": pandas.DataFrame(
                {"variant": "paper", "domain": names, "sts_act": score, "sts_icl": -score})}

    def get(self, name):
        return self.tables[name]


def test_a_category_is_a_control_and_whole_categories_are_drawn():
    names, level, score, change = subjects()
    seeds = [Seed(seed, names, score, own, level) for seed, own in enumerate(change)]
    rows = baseline_confounds(seeds, 200, 500, 0)
    row = row_of(rows, score="sts_act", controls=["category"])
    dummies = pandas.get_dummies([MMLU_PRO_CATEGORY[name] for name in names], drop_first=True).to_numpy(float)
    assert row["by_seed"] == pytest.approx([naive_partial(score, np.abs(own), dummies) for own in change])
    assert row["pearson_interval"]["resamples"] == 200
    everything = row_of(rows, score="sts_act", all=True)
    more = np.column_stack([dummies, np.arange(len(names)) % 5, np.arange(len(names)) % 7])
    assert everything["by_seed"] == pytest.approx([naive_partial(score, np.abs(own), more) for own in change])
    act, icl = score_checks([{"measure": "bits", "reliability": 0.64}], seeds, 2000, 100, 0)
    assert act["pearson"] == pytest.approx(np.mean([np.corrcoef(score, np.abs(own))[0, 1] for own in change]))
    assert act["corrected"] == pytest.approx(act["pearson"] / 0.8)
    assert act["category_interval"]["high"] - act["category_interval"]["low"] > 0.1
    assert act["given_before"]["by_seed"] == pytest.approx([naive_partial(score, np.abs(own), level) for own in change])
    assert icl["category_interval"]["low"] == pytest.approx(-act["category_interval"]["high"])
    assert score_checks([{"measure": "bits", "reliability": 0.05}], seeds, 200, 100, 0)[0]["corrected"] is None


def naive_partial(x, y, controls):
    design = np.column_stack([np.ones(len(x)), controls])
    left = [own - design @ np.linalg.lstsq(design, own, rcond=None)[0] for own in (x, y)]
    return np.corrcoef(*left)[0, 1]


# --- settings -----------------------------------------------------------------------------------------------------

def test_keys_follow_what_the_stages_read(run):
    names = ("domain_raw_stats", "domain_model_change", "text_baselines", "baseline_values", "random_latent_scores",
             "probe_predictions", "baseline_correlations", "baseline_nulls", "baseline_confounds", "change_quality")
    after = {"baseline_correlations", "baseline_nulls", "baseline_confounds", "change_quality"}

    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(baseline_draws=20) == {"random_latent_scores", "probe_predictions", "baseline_correlations",
                                       "baseline_nulls"}
    assert keys(top_n=8) == {"baseline_values", "random_latent_scores"} | after
    assert keys(seeds=[1, 2]) == after
    assert keys(sft_lr=1e-3) == {"domain_model_change", "baseline_values", "probe_predictions"} | after
    assert "domain_raw_stats" not in keys(sae_k=4) and "domain_raw_stats" in keys(score_tokens=100)


def test_too_many_latents_are_refused_before_anything_is_drawn(run):
    with pytest.raises(StsError, match="Set top_n to at most 64"):
        sts.open_run("smoke", results=run.results, top_n=100).get("random_latent_scores")


@pytest.mark.parametrize("domains", [["law", "math"], ["law", "math", "biology", "health"]])
def test_with_few_domains_rows_say_what_is_undefined(run, domains):
    few = sts.open_run("smoke", results=run.results, domains=domains, seeds=[])
    rows = few.get("baseline_correlations")
    assert all("undefined" in row for row in rows if row["predictor"].startswith("probe_") or len(domains) == 2)
    assert all("undefined" in row for row in few.get("baseline_confounds") if row["all"])
    for name in ("baseline_correlations", "baseline_nulls", "change_quality", "score_checks"):
        json.dumps(few.get(name), allow_nan=False)
