"""Stages of the chapter on ablations on the smoke run: sweeps against runs and models opened anew."""

import json

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr
from statsmodels.stats.multitest import multipletests

import sts
from sts.book import pages_sweeps, tables_sweeps, verdicts_sweeps
from sts.engine.saes import load_sae
from sts.errors import StsError
from sts.measure import compare as sweep_comparison
from sts.measure import sweeps
from sts.measure.resampling import hierarchical_resamples
from sts.stages import sweeps as pipeline_sweeps
from sts.stages.forecast import domain_groups, shift_groups

NONE = {"sweep_demonstrations": [], "sweep_tokens": [], "sweep_masks": [], "sweep_widths": [], "sweep_layers": [],
        "sweep_k": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("pipeline-sweeps"))


@pytest.fixture(scope="module")
def cheap(run):
    """The same run without the sweeps that read the model again, as the laptop profile has it."""
    return sts.open_run("smoke", results=run.results, seeds=[], **NONE)


def scores_of(frame, axis, value):
    own = frame[(frame["axis"] == axis) & (frame["value"] == value)].set_index("domain")
    assert len(own) == 14
    return own


def paper_scores(run):
    return run.get("scores").query("variant == 'paper'").set_index("domain")


def assert_same_scores(own, other):
    for name in sweeps.SCORES:
        assert own[name].to_dict() == pytest.approx(other[name].to_dict(), rel=1e-5)


def row_of(rows, **wanted):
    own, = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return own


# --- sweeps of latents and settings -------------------------------------------------------------------------------

def test_the_runs_own_value_has_the_scores_of_the_run(run):
    frame = pipeline_sweeps.swept(run)
    own = frame[frame["own"] & ~frame["axis"].isin(("width", "width_share", "layer", "k", "norms"))]
    assert own["axis"].nunique() == 6
    for _, group in own.groupby("axis"):
        assert_same_scores(group.set_index("domain"), paper_scores(run))


def test_two_bands_together_are_twice_as_many_latents(run):
    frame = run.get("sweep_latents")
    double = paper_scores(sts.open_run("smoke", results=run.results, top_n=32))
    for name in sweeps.SCORES:
        both = sum(scores_of(frame, "bands", value)[name] for value in ("1-16", "17-32"))
        assert both.to_dict() == pytest.approx(double[name].to_dict())
    four = paper_scores(sts.open_run("smoke", results=run.results, top_n=4))
    assert_same_scores(scores_of(frame, "top_n", "4"), four)


@pytest.mark.parametrize(("axis", "value", "changes"), [
    ("demonstrations", "2", {"demonstrations": 2}), ("score_tokens", "100", {"score_tokens": 100}),
    ("masks", "all tokens", {"question_tokens_only": False, "drop_first_positions": 0, "outlier_norm": 0.0})])
def test_a_value_has_the_scores_of_a_run_opened_with_it(run, axis, value, changes):
    found = scores_of(run.get("sweep_settings"), axis, value)
    assert_same_scores(found, paper_scores(sts.open_run("smoke", results=run.results, **changes)))
    assert (found["sts_icl"] != paper_scores(run)["sts_icl"]).any()


def test_another_forecast_shares_what_it_may_and_nothing_else(run):
    other = run.with_forecast(demonstrations=2)
    assert other.settings.demonstrations == 2 and other.settings.sae == run.settings.sae
    assert other.lm is run.lm and other.key("sae") == run.key("sae") and other.key("sft") == run.key("sft")
    assert other.identity("seeds") != run.identity("seeds")
    again = sts.open_run("smoke", results=run.results, demonstrations=2)
    assert other.key("correlations_by_seed") == again.key("correlations_by_seed")
    with pytest.raises(ValueError, match="more than the forecast"):
        run.with_forecast(layer=1)
    with pytest.raises(StsError, match="demonstrations"):
        run.with_forecast(demonstrations=0)


# --- other SAEs ---------------------------------------------------------------------------------------------------

def question_states(lm, prompts, layer):
    """Outputs of a decoder layer on question tokens; `hidden_states` would hold the last one behind the final norm."""
    found = []
    handle = lm.model.model.layers[layer].register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad():
        for prompt in prompts:
            lm.model(torch.tensor([prompt.ids]))
    handle.remove()
    return torch.cat([state[slice(*prompt.question)] for state, prompt in zip(found, prompts, strict=True)])


def scored_by_hand(run, sae, layer, domain, norms):
    """Scores with the latents divided by `norms`, from whole passes and every latent of every token."""
    def latents(prompts):
        with torch.no_grad():
            return sae.encode(question_states(run.lm, prompts, layer)).double() / norms

    def change(group):
        return (latents(group.icl) - latents(group.base)).square().mean(0)

    chosen = change(shift_groups(run)[0]).argsort(descending=True)[:run.settings.top_n]
    group = domain_groups(run)[domain][0]
    return latents(group.base).mean(0)[chosen].sum().item(), change(group)[chosen].sum().item()


@pytest.mark.parametrize(("axis", "value", "spec"), [
    ("layer", "1", sweeps.SaeSpec(1, 128, 8)), ("width", "64", sweeps.SaeSpec(0, 64, 8)),
    ("k", "4", sweeps.SaeSpec(0, 128, 4)), ("norms", "as trained", sweeps.SaeSpec(0, 128, 8)),
    ("norms", "folded", sweeps.SaeSpec(0, 128, 8))])
def test_scores_with_another_sae_are_those_of_its_latents(run, axis, value, spec):
    folder = run.get("sweep_sae_training") / spec.name
    norms = load_file(folder / "decoder_norms.safetensors")["norms_L"].double() if value == "as trained" else 1
    found = scores_of(run.get("sweep_saes"), axis, value).loc["law"]
    sae = load_sae(str(folder))
    wanted = scored_by_hand(run, sae, spec.layer, "law", norms)
    # The engine runs demonstrations once; a latent at the edge of the k largest may change sides by rounding.
    assert (found["sts_act"], found["sts_icl"]) == pytest.approx(wanted, rel=2e-2)
    assert (found["layer"], found["latents"], found["k"]) == (spec.layer, spec.latents, spec.k)
    assert found["l0"] == pytest.approx(spec.k, rel=0.05)


def test_in_proportion_a_narrow_sae_has_fewer_latents(run):
    frame = run.get("sweep_saes")
    fixed, share = (scores_of(frame, axis, "64")["sts_act"] for axis in ("width", "width_share"))
    assert (share < fixed).all()  # 8 of the same 16 latents, none of them negative
    assert_same_scores(scores_of(frame, "width", "128"), scores_of(frame, "width_share", "128"))


def test_norms_before_folding_differ(run):
    folder = run.get("sweep_sae_training") / sweeps.own_sae(run.settings).name
    assert load_file(folder / "decoder_norms.safetensors")["norms_L"].std() > 0
    torch.testing.assert_close(load_sae(str(folder), fold_norms=False).W_dec.norm(dim=-1), torch.ones(128), rtol=1e-2,
                               atol=1e-2)


def test_all_seeds_share_the_saes_and_no_activations_are_kept(run):
    other = run.with_seed(1)
    assert other.key("sweep_sae_training") == run.key("sweep_sae_training")
    assert other.key("sweep_saes") != run.key("sweep_saes")
    folder = run.get("sweep_sae_training")
    saes = json.loads((folder / "plan.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"plan.json", *saes} and len(saes) == 4


def test_saes_that_were_trained_before_a_kill_are_kept(tmp_path, monkeypatch):
    fresh = sts.open_run("smoke", results=tmp_path, sweep_widths=[], sweep_layers=[])
    trained = []

    def killed(*args, **more):
        trained.append(args[1].k)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **more)

    train = pipeline_sweeps.train_sae
    monkeypatch.setattr(pipeline_sweeps, "train_sae", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.get("sweep_sae_training")
    fresh.get("sweep_sae_training")
    assert trained == [4, 8, 8]


def test_a_layer_that_was_read_before_a_kill_is_not_read_again(run, monkeypatch):
    folder, frame = run.scratch("sweep_saes"), run.get("sweep_saes")
    run.store.path("sweep_saes", run.key("sweep_saes"), "parquet").unlink()
    again = sts.open_run("smoke", results=run.results)
    calls, layer_rows = [], pipeline_sweeps._layer_rows

    def second_is_killed(run, layer, *more):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return layer_rows(run, layer, *more)

    monkeypatch.setattr(pipeline_sweeps, "_layer_rows", second_is_killed)
    with pytest.raises(KeyboardInterrupt):
        again.get("sweep_saes")
    assert (folder / "layer-0.json").is_file()
    assert again.get("sweep_saes").equals(frame) and calls == [0, 1, 1]


# --- comparisons --------------------------------------------------------------------------------------------------

def test_the_sweeps_may_be_repeated_at_fewer_seeds_than_the_run_has(run):
    """A run's first seed alone, of two: the page says so, and the numbers are those of a run with one seed."""
    fewer = sts.open_run("smoke", results=run.results, sweep_seeds=[])
    alone = sts.open_run("smoke", results=run.results, seeds=[])
    assert fewer.other_seeds == (1,)
    assert fewer.get("sweep_correlations") == alone.get("sweep_correlations")
    assert "1 seed (of the run's 2)" in pages_sweeps.summary(fewer)
    assert "1 seed," in pages_sweeps.summary(alone) and "2 seeds," in pages_sweeps.summary(run)
    named = sts.open_run("smoke", results=run.results, sweep_seeds=[1]).with_seed(1)
    assert named.with_forecast(top_n=4).settings.top_n == 4 and named.with_training("gsm8k").settings.seed == 1
    with pytest.raises(StsError, match=r"sweep_seeds: \[5\] must be among the run's seeds, \[1\]"):
        sts.open_run("smoke", sweep_seeds=[5])


def test_correlations_are_means_over_seeds_and_the_own_one_is_that_of_the_score(run):
    rows = run.get("sweep_correlations")["values"]
    for score in sweeps.SCORES:
        each = [row_of(own.get("correlations"), measure="bits", variant="paper", score=score)["pearson"]
                for own in (run, run.with_seed(1))]
        row = row_of(rows, measure="bits", score=score, axis="top_n", value="16")
        assert row["by_seed"] == pytest.approx(each) and row["pearson"] == pytest.approx(np.mean(each))
        assert row["own"] and "less" not in row and (row["n"], row["seeds"]) == (14, 2)
    row = row_of(rows, measure="bits", score="sts_icl", axis="layer", value="1")
    expected = []
    for own in (run, run.with_seed(1)):
        x = scores_of(own.get("sweep_saes"), "layer", "1")["sts_icl"].sort_index()
        y = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs().sort_index()
        expected.append(pearsonr(x, y)[0])
    assert row["by_seed"] == pytest.approx(expected) and 0 < row["p"] <= 1
    assert row["pearson_interval"]["low"] < row["pearson"] < row["pearson_interval"]["high"]


def test_a_value_is_compared_with_the_own_one_of_its_sweep(run):
    rows = [row for row in run.get("sweep_correlations")["values"] if (row["measure"], row["score"]) == (
        "bits", "sts_act")]
    own = {row["axis"]: row["pearson"] for row in rows if row["own"]}
    assert len(own) == len({row["axis"] for row in rows}) == 11
    for row in (row for row in rows if not row["own"]):
        assert row["less"]["mean"] == pytest.approx(row["pearson"] - own[row["axis"]])
        assert row["less"]["interval"]["low"] <= row["less"]["mean"] <= row["less"]["interval"]["high"]


def test_holm_corrects_for_all_differences_of_a_measure(run):
    less = [row["less"] for row in run.get("sweep_correlations")["values"] if row["measure"] == "bits"
            and "less" in row]
    assert len(less) == 26
    assert [one["p_holm"] for one in less] == pytest.approx(
        multipletests([one["p"] for one in less], method="holm")[1])


def test_holms_correction_by_hand():
    """Sorted p times 4, 3, 2, 1, each at least the one before it, none above one."""
    rows = [{"p": p} for p in (0.03, 0.01, 0.9, 0.02)]
    sweep_comparison.correct(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.06, 0.04, 0.9, 0.06])
    one = [{"p": 0.04}]
    sweep_comparison.correct(one)
    assert one[0]["p_holm"] == pytest.approx(0.04)


def test_the_runs_own_sae_and_the_middle_one_of_the_sweep_are_compared(run):
    found = run.get("sweep_correlations")
    assert {(row["measure"], row["score"]) for row in found["saes"]} == {
        (measure, score) for measure in ("bits", "bits_answer", "p_right") for score in sweeps.SCORES}
    for row in found["saes"]:
        same = {name: row[name] for name in ("measure", "score")}
        both = {axis: row_of(found["values"], **same, axis=axis, own=True)["pearson"] for axis in ("top_n", "k")}
        assert (row["own"], row["middle"]) == pytest.approx((both["top_n"], both["k"]))
        assert row["mean"] == pytest.approx(both["k"] - both["top_n"]) and 0 < row["p"] <= 1
    said = pages_sweeps.sae_sentence(run, "bits")
    assert "alike in layer, width and k" in said and "trained on 4,0" in said and "8,192 samples" in said
    assert said in pages_sweeps.summary(run)
    assert len(tables_sweeps.own_sae_table(run)) == 6


def synthetic(scores, own="own"):
    """One seed of seven domains: a table of named values of one axis, and a change of three questions a domain."""
    domains, generator = [f"domain {place}" for place in range(7)], np.random.default_rng(0)
    frame = pandas.DataFrame([{"axis": axis, "value": value, "own": value == own, "domain": domain, "sts_act": x,
                               "sts_icl": x} for (axis, value), own_N in scores.items()
                              for domain, x in zip(domains, own_N, strict=True)])
    differences = {domain: 1.0 + place + 0.1 * generator.normal(size=(3, 1)) for place, domain in enumerate(domains)}
    return frame, differences


def test_a_best_has_the_resamples_of_the_runs_own_and_none_if_it_is_that(run):
    generator = np.random.default_rng(1)
    good, poor, middle = np.arange(7.0), *generator.normal(size=(2, 7))
    frame, differences = synthetic({("top_n", "own"): poor, ("top_n", "9"): good, ("k", "own"): middle})
    settings = run.settings
    found = sweep_comparison.compared("bits", [frame], differences, settings)
    resamples = hierarchical_resamples(list(differences.values()), resamples=settings.bootstrap, seed=settings.seed)

    def interval(one, other):
        values = resamples.correlations(one[None]) - resamples.correlations(other[None])
        return np.nanquantile(values, [0.025, 0.975])

    best = row_of(found["best"], score="sts_act")
    change = [np.abs(differences[f"domain {place}"].mean()) for place in range(7)]
    assert best["value"] == "9" and best["less_own"]["mean"] == pytest.approx(
        pearsonr(good, change)[0] - pearsonr(poor, change)[0])
    for row, (one, other) in ((best["less_own"], (good, poor)), (found["saes"][0], (middle, poor))):
        assert (row["interval"]["low"], row["interval"]["high"]) == pytest.approx(interval(one, other))
    frame, differences = synthetic({("bands", "own"): good, ("top_n", "own"): good, ("top_n", "9"): poor})
    found = sweep_comparison.compared("bits", [frame], differences, settings)
    assert row_of(found["best"], score="sts_act")["less_own"] is None and found["saes"] == []


def test_claims_compare_the_ends_and_the_best_is_the_largest(run):
    found = run.get("sweep_correlations")
    values = {(row["axis"], row["value"]): row.get("pearson") for row in found["values"]
              if (row["measure"], row["score"]) == ("bits", "sts_icl")}
    claim = row_of(found["claims"], measure="bits", score="sts_icl", axis="bands")
    assert (claim["first"], claim["last"]) == ("1-16", "33-48")
    assert claim["mean"] == pytest.approx(values["bands", "33-48"] - values["bands", "1-16"])
    best = row_of(found["best"], measure="bits", score="sts_icl")
    assert best["pearson"] == pytest.approx(max(values.values())) == pytest.approx(values[best["axis"], best["value"]])
    assert best["scores"] == 15 and best["chance_mean"] > 0  # 13 other values, the run's own, the sweep's middle
    assert best["less_own"]["mean"] == pytest.approx(best["pearson"] - values["top_n", "16"])


def test_a_change_that_is_the_same_everywhere_is_undefined_everywhere(run):
    found = run.get("sweep_correlations")
    rows = [row for row in found["values"] if row["measure"] == "accuracy"]
    assert rows and all("constant" in row["undefined"] for row in rows)
    assert not [row for name in ("claims", "best", "saes") for row in found[name] if row["measure"] == "accuracy"]


def test_two_domains_are_too_few_and_the_page_says_so(run):
    few = sts.open_run("smoke", results=run.results, domains=["law", "math"], seeds=[], **NONE)
    assert all("undefined" in row for row in few.get("sweep_correlations")["values"])
    page = pages_sweeps.summary(few)
    assert "no comparison is defined" in page.lower() and "nan" not in page.lower().split()
    assert (tables_sweeps.values_table(few, "bits")["STS_act: r (95% interval)"] == "undefined").all()
    assert tables_sweeps.best_table(few).empty


# --- settings -----------------------------------------------------------------------------------------------------

def test_keys_follow_what_the_stages_read(run):
    names = ("sweep_latents", "sweep_settings", "sweep_sae_training", "sweep_saes", "sweep_correlations")

    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(sft_lr=1e-3) == {"sweep_correlations"}
    assert keys(sweep_top_n=[8]) == {"sweep_latents", "sweep_correlations"}
    assert keys(sweep_masks=["outliers"]) == {"sweep_settings", "sweep_correlations"}
    assert keys(sweep_sae_samples=8192) == {"sweep_sae_training", "sweep_saes", "sweep_correlations"}
    assert keys(top_n=8) == set(names) - {"sweep_sae_training"}


def test_a_run_without_lists_trains_and_reads_nothing(cheap):
    assert cheap.get("sweep_settings").empty and cheap.get("sweep_saes").empty
    assert json.loads((cheap.get("sweep_sae_training") / "plan.json").read_text()) == []
    assert tables_sweeps.axes_of(cheap) == ["bands", "top_n", "variant"]
    values, best = cheap.get("sweep_correlations")["values"], cheap.get("sweep_correlations")["best"][0]
    assert f", {best['scores']} different values in all, the run's own among them" in pages_sweeps.summary(cheap)
    assert pages_sweeps.sae_sentence(cheap, "bits") == "" and tables_sweeps.own_sae_table(cheap) is None
    assert {row["axis"] for row in values} == {"bands", "top_n", "variant"}
    said = pages_sweeps.missing_sentence(cheap)
    assert all(f"`{name}`" in said for name in NONE)
    assert tables_sweeps.sae_table(cheap) is None and tables_sweeps.sparsity_table(cheap) is None
    assert set(tables_sweeps.claims_table(cheap)["the paper's claim"]) == {"Lower-ranked latents predict worse"}


@pytest.mark.parametrize(("key", "value", "words"), [
    ("sweep_k", [4, 4], "names a value twice"), ("sweep_widths", [0], "at least 1"), ("sweep_layers", [-1], "at least"),
    ("sweep_k", [200], "200 active latents of only 128"), ("sweep_widths", [4], "8 active latents of only 4"),
    ("sweep_masks", ["nothing"], "whole_prompt")])
def test_impossible_sweeps_are_refused_by_name(key, value, words):
    with pytest.raises(StsError, match=f"{key}.*{words}"):
        sts.open_run("smoke", **{key: value})


def test_saes_need_a_text_to_train_on():
    with pytest.raises(StsError, match="sae_text names no text"):
        sts.open_run("laptop", sweep_k=[8])


# --- the page -----------------------------------------------------------------------------------------------------

def test_the_page_quotes_the_stages(run):
    page, found = pages_sweeps.summary(run), run.get("sweep_correlations")
    for rule in (verdicts_sweeps.SETTING_RULE, verdicts_sweeps.CLAIM_RULE, verdicts_sweeps.BEST_RULE):
        assert page.index("The answer of this run") < page.index("The rules of these verdicts") < page.index(rule)
    best = row_of(found["best"], measure="bits", score="sts_act")
    assert f"{best['scores']} different values in all" in page  # each of them is another score here
    assert pages_sweeps.matter_sentence(run, "bits_answer") in page
    assert pages_sweeps.claims_sentence(run, "bits_answer") in page
    assert f"r = {best['pearson']:.2f}" in page and "n = 14 domains, 2 seeds" in page
    table = tables_sweeps.values_table(run, "bits").set_index(["setting", "value"])
    row = row_of(found["values"], measure="bits", score="sts_act", axis="k", value="4")
    shown = table.loc[("active latents a token, k", "4")]
    assert shown["STS_act: r (95% interval)"].startswith(f"{row['pearson']:.2f} (")
    assert shown["STS_act: less own"].startswith(f"{row['less']['mean']:+.2f} (")
    assert len(table) == 24
    missing = pages_sweeps.missing_sentence(run)  # smoke sweeps no settings of the training set's forecast
    assert missing.count("`") == 4 and "`sweep_shift_demonstrations`" in missing and "`sweep_shift_tokens`" in missing
    assert tables_sweeps.sparsity_table(run)["STS"].tolist()[:5] == ["0.78", "0.77", "0.72", "0.75", "0.65"]
    assert tables_sweeps.measures(run) == ["bits", "bits_answer", "accuracy", "p_right"]
