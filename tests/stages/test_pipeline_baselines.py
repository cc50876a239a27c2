"""Stages of the chapter on baselines on the smoke run: each result recomputed from its inputs by other means."""

import itertools
import json
import re
import types

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import pearsonr

import sts
from sts.book import learned, pages_baselines, pages_forecast, pages_headline
from sts.engine.finetune import load_tuned
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.resampling import hierarchical_resamples, partial_correlation
from sts.stages.comparison import baseline_power, item_differences, partial_rows
from sts.stages.forecast import domain_groups, split_domains


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
    group, own = domain_groups(run)["law"][0], split_domains(run.get("domain_raw_stats"))["law"]
    base, icl = (question_states(run.lm, side) for side in (group.base, group.icl))
    assert own["tokens"].item() == len(base)  # no token of the random model has an outlier norm
    torch.testing.assert_close(own["base_sum_L"], base.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["base_square_sum_L"], base.square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["squared_difference_L"], (icl - base).square().sum(0), rtol=1e-3, atol=1e-4)
    # One draw of demonstrations in this run, so that raw dimensions and latents saw the same tokens.
    assert own["tokens"] == split_domains(run.get("domain_stats"))["law"]["tokens"]


def test_the_models_change_is_measured_between_untuned_and_tuned(run):
    group, own = domain_groups(run)["math"][0], split_domains(run.get("domain_model_change"))["math"]
    base, after = (question_states(lm, group.base) for lm in (run.lm, load_tuned(run.load_model(), run.get("sft"))))
    torch.testing.assert_close(own["base_sum_L"], base.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["tuned_sum_L"], after.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own["squared_difference_L"], (after - base).square().sum(0), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        latents = (run.sae().encode(after.float()) - run.sae().encode(base.float())).double().square().sum()
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
    whole = -solutions["loglikelihood"].groupby("domain").mean() / np.log(2)
    assert own["base_bits_answer"].to_dict() == pytest.approx(whole.to_dict())
    short = {domain: np.mean([1 / n for n in solutions.loc[[domain], "characters"]]) for domain in own.index}
    assert own["answer_shortness"].to_dict() == pytest.approx(short)


def test_all_latents_are_the_score_at_full_width(run):
    full = sts.open_run("smoke", results=run.results, top_n=128)
    scores = full.get("scores").query("variant == 'paper'").set_index("domain")
    values = run.get("baseline_values").set_index("domain")
    for name in ("act", "icl"):
        assert values[f"all_{name}"].to_dict() == pytest.approx(scores[f"sts_{name}"].to_dict())


def test_length_is_the_mean_number_of_the_questions_tokens(run):
    from sts.data.prompts import question_text

    tokenizer, examples = run.lm.tokenizer, run.domain_examples()["health"]
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

def test_changes_of_questions_average_to_the_domains_shift(run):
    found = item_differences(run)
    assert set(found) == {"accuracy", "p_right", "bits", "bits_answer"}
    for seed, own in enumerate((run, run.with_seed(1))):
        shifts = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"]
        assert {name: items[:, seed].mean() for name, items in found["bits"].items()} == pytest.approx(shifts.to_dict())


def test_correlations_are_means_of_the_seeds_own(run):
    rows = run.get("baseline_correlations")
    for score in ("sts_act", "sts_icl"):
        each = [row_of(own.get("correlations"), measure="bits", variant="paper", score=score)
                for own in (run, run.with_seed(1))]
        row = row_of(rows, measure="bits", predictor=score)
        assert row["by_seed"] == pytest.approx([one["pearson"] for one in each])
        assert row["pearson"] == pytest.approx(np.mean(row["by_seed"])) and row["seeds"] == 2
        assert row["spearman"] == pytest.approx(np.mean([one["spearman"] for one in each]))
        assert row["pearson_interval"]["low"] < row["pearson"] < row["pearson_interval"]["high"]
    rival = row_of(rows, measure="bits", predictor="tfidf")
    assert rival["less"]["sts_icl"]["mean"] == pytest.approx(row["pearson"] - rival["pearson"])
    assert set(row_of(rows, measure="bits", predictor="sts_icl")["less"]) == {"sts_act"}


def test_one_seed_alone_has_the_p_of_the_score_chapter(run):
    alone = sts.open_run("smoke", results=run.results, seeds=[])
    row = row_of(alone.get("baseline_correlations"), measure="bits", predictor="sts_act")
    other = row_of(alone.get("correlations"), measure="bits", variant="paper", score="sts_act")
    assert row["p"] == pytest.approx(other["p"], abs=0.03) and row["pearson"] == pytest.approx(other["pearson"])


def test_only_shuffled_targets_judge_a_probe(run):
    row = row_of(run.get("baseline_correlations"), measure="bits", predictor="probe_sae")
    assert "p" not in row and "less" not in row
    null = row_of(run.get("baseline_nulls"), measure="bits", predictor="probe_sae")
    each = [row_of(own.get("probe_predictions"), measure="bits", features="sae") for own in (run, run.with_seed(1))]
    assert null["observed"] == pytest.approx(np.mean([pearsonr(one["predicted"], one["actual"])[0] for one in each]))
    shuffled = np.mean([one["shuffled"] for one in each], axis=0)
    assert null["p"] == pytest.approx((1 + (shuffled >= null["observed"]).sum()) / (1 + len(shuffled)))
    assert null["mean"] < -0.2  # what leaving one out does to noise


def test_random_sets_are_correlated_like_the_score(run):
    null = row_of(run.get("baseline_nulls"), measure="bits", null="rate", predictor="sts_icl")
    values = []
    for own in (run, run.with_seed(1)):
        shift = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()
        values.append([pearsonr(one, shift[sorted(shift.index)])[0]
                       for one in own.get("random_latent_scores")["rate/icl_RD"].double().numpy()])
    means = np.mean(values, axis=0)
    assert null["mean"] == pytest.approx(means.mean(), abs=1e-5)
    assert (null["low"], null["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-5)
    observed = row_of(run.get("baseline_correlations"), measure="bits", predictor="sts_icl")["pearson"]
    assert null["p"] == pytest.approx((1 + (means >= observed).sum()) / (1 + len(means)), abs=0.01)


@pytest.mark.parametrize(("measure", "controls"), [
    ("bits", ["base_bits", "question_tokens", "answer_shortness"]), ("bits", ["answer_shortness"]),
    ("bits_answer", ["base_bits_answer", "question_tokens", "answer_shortness"])])
def test_confounds_are_partial_correlations_of_the_seeds(run, measure, controls):
    row = row_of(run.get("baseline_confounds"), measure=measure, score="sts_icl", controls=controls)
    expected = []
    for own in (run, run.with_seed(1)):
        values = own.get("baseline_values").set_index("domain")
        shift = own.get("domain_shift").query("measure == @measure").set_index("domain")["shift"].abs()[values.index]
        expected.append(partial_correlation(values["sts_icl"], shift, [values[name] for name in controls]))
    assert row["by_seed"] == pytest.approx(expected) and 0 < row["p"] <= 1
    said = f"STS_ICL partial r = {pages_baselines._two(row['pearson'])} ("
    assert (said in pages_baselines.confound_sentence(run, measure)) == (len(controls) == 3)


def test_partial_rows_resample_and_permute_with_the_controls(run):
    generator = np.random.default_rng(3)
    controls, x, noise = generator.normal(size=(2, 7, 2)), generator.normal(size=(1, 2, 7)), generator.normal(
        size=(7, 30, 2))
    x += 2 * controls[..., 0]
    differences = [5 + 2 * controls[:, domain, 0] + own for domain, own in enumerate(noise)]
    change = np.abs(np.stack([own.mean(0) for own in differences], axis=1))
    resamples = hierarchical_resamples(differences, resamples=400, seed=0)
    row, = partial_rows(x, change, controls, resamples, run.settings)
    each = [partial_correlation(x[0, seed], change[seed], controls[seed].T) for seed in (0, 1)]
    assert row["by_seed"] == pytest.approx(each) and row["pearson"] == pytest.approx(np.mean(each))

    drawn = []
    for domains, weights, changes in zip(resamples.domains_BN, resamples.weights_BS, resamples.change_BSN, strict=True):
        if len(set(domains)) >= 5:  # two controls
            drawn.append(sum(weight * partial_correlation(x[0, seed][domains], changes[seed], controls[seed][domains].T)
                             for seed, weight in enumerate(weights) if weight))
    assert (row["pearson_interval"]["low"], row["pearson_interval"]["high"]) == pytest.approx(
        tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-6)

    left = np.stack([least_squares_residuals(change[seed], controls[seed]) for seed in (0, 1)])
    shuffled = [np.mean([partial_correlation(x[0, seed], left[seed][list(order)], controls[seed].T)
                         for seed in (0, 1)]) for order in itertools.permutations(range(7))]
    assert row["p"] == pytest.approx(np.mean(np.abs(shuffled) >= abs(row["pearson"]) - 1e-12))


def least_squares_residuals(values, controls):
    design = np.column_stack([np.ones(len(values)), controls])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def residuals(values, control):
    """What a least-squares line through a control leaves of the values."""
    design = np.stack([np.ones(len(control)), control], axis=1)
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def test_hardness_is_set_beside_the_score_with_the_runs_own_seed(run):
    alone = sts.open_run("smoke", results=run.results, seeds=[])
    row = row_of(run.get("hardness"), measure="bits")
    values = run.get("baseline_values").set_index("domain")
    shift = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()[values.index]
    rival = row_of(alone.get("baseline_correlations"), measure="bits", predictor="base_bits")
    assert row["pearson"] == pytest.approx(pearsonr(values["base_bits"], shift)[0]) and row["n"] == 14
    assert row["pearson_interval"] == rival["pearson_interval"]
    for score, found in row["scores"].items():
        own = row_of(alone.get("baseline_correlations"), measure="bits", predictor=score)
        assert (found["pearson"], found["pearson_interval"]) == (pytest.approx(own["pearson"]), own["pearson_interval"])
        assert found["less"] == {"mean": pytest.approx(rival["less"][score]["mean"]),
                                 "interval": rival["less"][score]["interval"]}
        left = found["left"]
        assert left["pearson"] == pytest.approx(pearsonr(*(
            residuals(one.to_numpy(), values["base_bits"].to_numpy()) for one in (values[score], shift)))[0])
        confound = row_of(alone.get("baseline_confounds"), measure="bits", score=score, controls=["base_bits"])
        assert (left["pearson_interval"], left["p"]) == (confound["pearson_interval"], confound["p"])
    answers, frames = row["answers"], {}
    for when in ("before", "after"):
        frame = run.get(f"evaluation_{when}").query("kind == 'solution'")
        frames[when] = frame.assign(bits=-frame["loglikelihood"] / np.log(2), short=1 / frame["characters"])
    mean = {when: frame.groupby("domain")[["bits", "short"]].mean() for when, frame in frames.items()}
    change = (mean["after"]["bits"] - mean["before"]["bits"]).abs()
    assert answers["shortness"] == pytest.approx(pearsonr(mean["before"]["short"], shift[change.index])[0])
    assert [row["measure"] for row in run.get("hardness")] == ["bits", "bits_answer"]
    whole = row_of(run.get("hardness"), measure="bits_answer")
    assert whole["pearson"] == pytest.approx(pearsonr(mean["before"]["bits"], change)[0])
    assert whole["scores"]["sts_icl"]["pearson"] == pytest.approx(
        pearsonr(values.loc[change.index, "sts_icl"], change)[0])
    length = pages_forecast.length_sentence(run)
    assert f"r = {answers['shortness']:.2f} with" in length and f"{whole['pearson']:.2f} (" in length
    said = pages_forecast.hardness_sentence(run, "bits")
    act = row["scores"]["sts_act"]
    assert f"r = {row['pearson']:.2f} (" in said and f"partial r is {act['left']['pearson']:.2f} (" in said
    assert f"difference {act['less']['mean']:+.2f}" in said and "seed 0" in said
    assert said in pages_forecast.forecast_summary(run) and length in pages_forecast.forecast_summary(run)


def test_hardness_is_left_out_where_it_was_not_measured_and_undefined_with_few_domains(run):
    letters = sts.open_run("smoke", results=run.results, eval_kinds=["letter"])
    assert letters.get("hardness") == [] and pages_forecast.hardness_sentence(letters, "p_right") == ""
    two = sts.open_run("smoke", results=run.results, domains=["law", "math"])
    assert "no correlation that is defined" in pages_forecast.hardness_sentence(two, "bits")
    three = sts.open_run("smoke", results=run.results, domains=["law", "math", "physics"])
    assert "undefined" in pages_forecast.hardness_sentence(three, "bits")


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
    assert f"{row['simulated']:.0%}" in pages_baselines.power_sentence(run, "bits")


def test_changes_of_both_signs_are_judged_by_their_size():
    """What is forecast is how far a domain moves; domains that move as far up as down do not differ in that."""
    frame = pandas.DataFrame({"measure": "bits", "shift": [0.5, -0.5, 0.6, -0.6, 0.7, -0.7], "standard_error": 0.05})
    row, = baseline_power(types.SimpleNamespace(get=lambda name: frame), None)
    assert row["reliability"] == pytest.approx(1 - 0.05**2 / frame["shift"].abs().var())


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
def test_with_few_domains_the_chapter_says_what_is_undefined(run, domains):
    few = sts.open_run("smoke", results=run.results, domains=domains, seeds=[])
    rows = few.get("baseline_correlations")
    assert all("undefined" in row for row in rows if row["predictor"].startswith("probe_") or len(domains) == 2)
    assert all("undefined" in row for row in few.get("baseline_confounds") if len(row["controls"]) == 3)
    page = pages_baselines.summary(few)
    assert "undefined" in page and "nan" not in page.lower().split()
    json.dumps([few.get(name) for name in ("baseline_nulls", "baseline_power")], allow_nan=False)


# --- the page -----------------------------------------------------------------------------------------------------

SENTENCES = (pages_baselines.score_sentence, pages_baselines.comparison_sentence, pages_baselines.choice_sentence,
             pages_baselines.probe_sentence, pages_baselines.confound_sentence)


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.__name__)
def test_no_sentence_gives_a_verdict_where_a_seed_learned_nothing(run, monkeypatch, sentence):
    falls = {0: 0.5, 1: 0.5}
    monkeypatch.setattr(learned, "loss_fall", lambda own: falls[own.settings.seed])
    assert "not judged" not in sentence(run, "bits")
    for idle in (0, 1):
        falls |= {0: 0.5, 1: 0.5, idle: 0.09}
        told = sentence(run, "bits")
        # The score's two variants, or two probes: one verdict each; of confounds also by the rule as it stood first.
        verdicts = 4 if sentence is pages_baselines.confound_sentence else 2
        assert told.count(f"not judged, as training taught nothing with seed {idle}") == verdicts
        assert not any(word in told for word in ("**held**", "**not shown**", "better than", "not told apart"))


def test_the_summary_says_of_every_seed_what_it_learned(run):
    page = pages_baselines.summary(run)
    for seed, own in enumerate((run, run.with_seed(1))):
        log = json.loads((own.get("sft") / "training.json").read_text())
        assert f"{1 - log['held_out_after'] / log['held_out_before']:.0%} with seed {seed}" in page
    assert "the run **did not learn**" in page and learned.EVERY_SEED_RULE in page


def test_the_page_quotes_the_stages(run):
    row = row_of(run.get("baseline_correlations"), measure="bits", predictor="sts_act")
    page = pages_baselines.summary(run)
    assert f"STS_act r = {row['pearson']:.2f}" in page and "n = 14 domains, 2 seeds" in page
    for rule in (pages_baselines.BASELINE_RULE, pages_baselines.CHOICE_RULE, pages_baselines.PROBE_RULE,
                 pages_baselines.CONFOUND_RULE):
        assert rule in page
    table = pages_baselines.baseline_table(run, "bits")
    assert isinstance(table, pandas.DataFrame) and len(table) == len(baselines.PREDICTORS) + 6
    by_seed = table.set_index("forecast from").loc["STS_act", "r by seed"].split(", ")
    assert [float(one) for one in by_seed] == pytest.approx(row["by_seed"], abs=0.0051)
    beside = pages_baselines.beside_paper_table(run).set_index("baseline of the paper")
    assert beside["paper"].tolist() == ["0.03", "0.11", "0.61", "0.03", "0.08", "0.79"]
    assert pages_baselines.measures(run) == ["bits", "bits_answer", "accuracy", "p_right"]
    assert len(pages_baselines.forest_panels(run)) == 3


def test_the_headline_holds_each_scores_r_and_what_is_left_of_it(run):
    table = pages_headline.headline_table(run).set_index("r with the absolute change in")
    assert list(table) == ["bits per character", "bits per answer", "p(right option)", "accuracy"]
    assert (table["accuracy"] == "undefined").all()  # it did not move
    for measure, column, hard in (("bits", "bits per character", "base_bits"),
                                  ("bits_answer", "bits per answer", "base_bits_answer")):
        of = {label: row_of(run.get("baseline_correlations"), measure=measure, predictor=name)
              for label, name in (("STS_act", "sts_act"), ("STS_ICL", "sts_icl"),
                                  ("bits per character before", "base_bits"))}
        of["STS_ICL, given hardness and lengths"] = row_of(
            run.get("baseline_confounds"), measure=measure, score="sts_icl",
            controls=[hard, "question_tokens", "answer_shortness"])
        sets = row_of(run.get("baseline_nulls"), measure=measure, predictor="sts_act", null="energy")
        of["STS_act, random latents of like energy"] = {"pearson": sets["mean"], "pearson_interval": sets}
        probe = row_of(run.get("baseline_nulls"), measure=measure, predictor="probe_raw", null="shuffled")
        of["probe on raw activations *"] = {"pearson": probe["observed"], "pearson_interval": probe}
        for label, row in of.items():
            r, low, high = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", table.loc[label, column]).groups()
            assert (float(r), float(low), float(high)) == pytest.approx(
                (row["pearson"], *(row["pearson_interval"][end] for end in ("low", "high"))), abs=0.0051)
