"""Stages of the chapter on ablations on the smoke run: sweeps against runs and models opened anew."""

import json

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import pearsonr
from statsmodels.stats.multitest import multipletests

import sts
from sts.engine.saes import load_sae
from sts.errors import StsError
from sts.measure.compare import SCORES
from sts.run import resources
from sts.run.others import seeds_of
from sts.stages import sweeps

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
    for name in SCORES:
        assert own[name].to_dict() == pytest.approx(other[name].to_dict(), rel=1e-5)


def row_of(rows, **wanted):
    own, = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return own


# --- values by hand -----------------------------------------------------------------------------------------------

NAMES = ("art", "law", "math")


def activations(seed, tokens=30, latents=12):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, latents, generator=generator, dtype=torch.float64) *
            (torch.rand(tokens, latents, generator=generator) > 0.4) for _ in range(2)]


def stats(base, icl):
    return {"tokens": torch.tensor([float(len(base))]), "base_sum_L": base.sum(0),
            "squared_difference_L": ((icl - base)**2).sum(0)}


SHIFT = stats(*activations(0))
DOMAINS = {name: stats(*activations(seed)) for seed, name in enumerate(NAMES, 1)}


def by_place(rows):
    return {(row["axis"], row["value"], row["domain"]): row for row in rows}


def naive(domain_seed, places):
    """STS_act and STS_ICL with the latents at some places of the ranking, token by token."""
    change = ((activations(0)[1] - activations(0)[0])**2).mean(0).tolist()
    ranked = sorted(range(12), key=lambda latent: -change[latent])
    base, icl = activations(domain_seed)
    chosen = [ranked[place] for place in places]
    act = sum(base[token, latent].item() for token in range(30) for latent in chosen) / 30
    return act, sum((icl - base)[token, latent].item()**2 for token in range(30) for latent in chosen) / 30


def latents_swept(top_n, bands, numbers):
    """Rows of `sweep_latents` of the stats above, by axis, value and domain."""
    flat = {f"{name}/{field}": tensor for name, own in DOMAINS.items() for field, tensor in own.items()}
    rows = sweeps.sweep_latents(SHIFT, flat, pandas.DataFrame(), top_n, bands, numbers).to_dict("records")
    return {(row["axis"], row["value"], row["domain"]): row for row in rows}


def test_bands_are_consecutive_ranks():
    rows = latents_swept(4, 3, [])
    assert [value for axis, value, domain in rows if (axis, domain) == ("bands", "law")] == ["1-4", "5-8", "9-12"]
    for first in (0, 4, 8):
        row = rows["bands", f"{first + 1}-{first + 4}", "law"]
        assert (row["sts_act"], row["sts_icl"]) == pytest.approx(naive(2, range(first, first + 4)))
        assert row["own"] == (first == 0)


def test_bands_that_do_not_fit_are_left_out_and_one_too_large_is_refused():
    assert {value for axis, value, _ in latents_swept(5, 4, []) if axis == "bands"} == {"1-5", "6-10"}
    with pytest.raises(StsError, match="13 most shifted latents were asked for; the SAE has 12"):
        latents_swept(13, 1, [])


def test_numbers_of_latents_stand_in_order_with_the_own_one_once():
    rows = latents_swept(5, 1, [12, 2, 5, 1000])
    assert [value for axis, value, domain in rows if (axis, domain) == ("top_n", "art")] == ["2", "5", "12"]
    assert (rows["top_n", "2", "math"]["sts_act"], rows["top_n", "2", "math"]["sts_icl"]) == pytest.approx(
        naive(3, range(2)))
    assert [rows["top_n", value, "art"]["own"] for value in ("2", "5", "12")] == [False, True, False]


def test_every_sae_differs_from_the_middle_one_in_one_thing():
    own = sweeps.SaeSpec(0, 128, 8)
    axes = sweeps.sae_values(own, [64, 256], [], [4])
    assert list(axes) == ["width", "k"] and all(own in specs for specs in axes.values())
    assert [(spec.latents, spec.k) for spec in axes["width"]] == [(64, 8), (128, 8), (256, 8)]
    assert [(spec.latents, spec.k) for spec in axes["k"]] == [(128, 4), (128, 8)]
    assert sweeps.sae_values(own, [], [], []) == {}


# --- sweeps of latents and settings -------------------------------------------------------------------------------

def test_a_runs_values_are_sorted_around_its_own(run):
    frame = run.get("sweep_settings").drop_duplicates(["axis", "value"])
    numbers = frame[frame["axis"] != "masks"]
    for name, own in numbers.groupby("axis"):
        values = [int(value.replace(",", "")) for value in own["value"]]
        assert values == sorted(values) and len(values) > 1
        assert own.loc[own["own"], "value"].tolist() == [f"{getattr(run.settings, name):,}"]
    masks = frame[frame["axis"] == "masks"]
    assert masks["own"].tolist() == [True] + [False] * len(run.settings.sweep_masks)


def test_the_runs_own_value_has_the_scores_of_the_run(run):
    frame = pandas.concat([run.get(name) for name in ("sweep_latents", "sweep_saes", "sweep_settings")])
    own = frame[frame["own"] & ~frame["axis"].isin(("width", "layer", "k"))]
    assert own["axis"].nunique() == 6
    for _, group in own.groupby("axis"):
        assert_same_scores(group.set_index("domain"), paper_scores(run))


def test_two_bands_together_are_twice_as_many_latents(run):
    frame = run.get("sweep_latents")
    double = paper_scores(sts.open_run("smoke", results=run.results, top_n=32))
    for name in SCORES:
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


def scored_by_hand(run, sae, layer, domain):
    """Scores from whole passes and every latent of every token."""
    def latents(prompts):
        with torch.no_grad():
            return sae.encode(question_states(resources.lm(run), prompts, layer)).double()

    def change(group):
        return (latents(group.icl) - latents(group.base)).square().mean(0)

    chosen = change(resources.shift_groups(run)[0]).argsort(descending=True)[:run.settings.top_n]
    group = resources.domain_groups(run)[domain][0]
    return latents(group.base).mean(0)[chosen].sum().item(), change(group)[chosen].sum().item()


@pytest.mark.parametrize(("axis", "value", "spec"), [
    ("layer", "1", sweeps.SaeSpec(1, 128, 8)), ("width", "64", sweeps.SaeSpec(0, 64, 8)),
    ("k", "4", sweeps.SaeSpec(0, 128, 4))])
def test_scores_with_another_sae_are_those_of_its_latents(run, axis, value, spec):
    folder = run.get("sweep_sae_training") / spec.name
    found = scores_of(run.get("sweep_saes"), axis, value).loc["law"]
    sae = load_sae(str(folder))
    wanted = scored_by_hand(run, sae, spec.layer, "law")
    # The engine runs demonstrations once; a latent at the edge of the k largest may change sides by rounding.
    assert (found["sts_act"], found["sts_icl"]) == pytest.approx(wanted, rel=2e-2)
    assert (found["layer"], found["latents"], found["k"]) == (spec.layer, spec.latents, spec.k)
    assert found["l0"] == pytest.approx(spec.k, rel=0.05)


def test_saes_are_judged_on_text_that_they_are_not_trained_on(run):
    train, held_out = (sum(map(len, pieces)) for pieces in resources.sae_texts(run).pieces(
        run.settings.sweep_text_tokens, seed=sweeps.SAE_SEED))
    for path in run.get("sweep_sae_training").glob("*/quality.json"):
        assert 0.8 * held_out < json.loads(path.read_text())["tokens"] <= held_out < train / 3


def test_all_seeds_share_the_saes_and_no_activations_are_kept(run):
    other = seeds_of(run)[1]
    assert other.key("sweep_sae_training") == run.key("sweep_sae_training")
    assert other.key("sweep_saes") != run.key("sweep_saes")
    folder = run.get("sweep_sae_training")
    saes = json.loads((folder / "plan.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"plan.json", *saes} and len(saes) == 4


def test_saes_that_were_trained_before_a_kill_are_kept(tmp_path, monkeypatch):
    fresh = sts.open_run("smoke", results=tmp_path, sweep_widths=[], sweep_layers=[])
    trained = []

    def killed(*args, **more):
        trained.append(args[2])
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **more)

    train = sweeps.train_sae
    monkeypatch.setattr(sweeps, "train_sae", killed)
    with pytest.raises(KeyboardInterrupt):
        fresh.get("sweep_sae_training")
    fresh.get("sweep_sae_training")
    assert trained == [4, 8, 8]


# --- comparisons --------------------------------------------------------------------------------------------------

def test_the_sweeps_may_be_repeated_at_fewer_seeds_than_the_run_has(run):
    """A run's first seed alone, of two: the page says so, and the numbers are those of a run with one seed."""
    fewer = sts.open_run("smoke", results=run.results, sweep_seeds=[])
    alone = sts.open_run("smoke", results=run.results, seeds=[])
    assert [one.settings.seed for one in seeds_of(fewer)] == [0, 1]
    assert fewer.get("sweep_correlations") == alone.get("sweep_correlations")
    with pytest.raises(StsError, match=r"sweep_seeds: \[5\] must be among the run's seeds, \[1\]"):
        sts.open_run("smoke", sweep_seeds=[5])


def test_correlations_are_means_over_seeds_and_the_own_one_is_that_of_the_score(run):
    rows = run.get("sweep_correlations")["values"]
    for score in SCORES:
        each = [row_of(own.get("correlations"), measure="bits", variant="paper", score=score)["pearson"]
                for own in (run, seeds_of(run)[1])]
        row = row_of(rows, measure="bits", score=score, axis="top_n", value="16")
        assert row["by_seed"] == pytest.approx(each) and row["pearson"] == pytest.approx(np.mean(each))
        assert row["own"] and "less" not in row and (row["n"], row["seeds"]) == (14, 2)
    row = row_of(rows, measure="bits", score="sts_icl", axis="layer", value="1")
    expected = []
    for own in (run, seeds_of(run)[1]):
        x = scores_of(own.get("sweep_saes"), "layer", "1")["sts_icl"].sort_index()
        y = own.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs().sort_index()
        expected.append(pearsonr(x, y)[0])
    assert row["by_seed"] == pytest.approx(expected) and 0 < row["p"] <= 1
    assert row["pearson_interval"]["low"] < row["pearson"] < row["pearson_interval"]["high"]


def test_a_value_is_compared_with_the_own_one_of_its_sweep(run):
    rows = [row for row in run.get("sweep_correlations")["values"] if (row["measure"], row["score"]) == (
        "bits", "sts_act")]
    own = {row["axis"]: row["pearson"] for row in rows if row["own"]}
    assert len(own) == len({row["axis"] for row in rows}) == 9
    for row in (row for row in rows if not row["own"]):
        assert row["less"]["mean"] == pytest.approx(row["pearson"] - own[row["axis"]])
        assert row["less"]["interval"]["low"] <= row["less"]["mean"] <= row["less"]["interval"]["high"]


def test_holm_corrects_for_all_differences_of_a_measure(run):
    less = [row["less"] for row in run.get("sweep_correlations")["values"] if row["measure"] == "bits"
            and "less" in row]
    assert len(less) == 22
    assert [one["p_holm"] for one in less] == pytest.approx(
        multipletests([one["p"] for one in less], method="holm")[1])


def test_a_change_that_is_the_same_everywhere_is_undefined_everywhere(run):
    found = run.get("sweep_correlations")
    rows = [row for row in found["values"] if row["measure"] == "accuracy"]
    assert rows and all("constant" in row["undefined"] for row in rows)
    assert not [row for name in ("claims", "best") for row in found[name] if row["measure"] == "accuracy"]


def test_two_domains_are_too_few(run):
    few = sts.open_run("smoke", results=run.results, domains=["law", "math"], seeds=[], **NONE)
    found = few.get("sweep_correlations")
    assert all("undefined" in row for row in found["values"]) and found["best"] == []


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
    assert {row["axis"] for row in cheap.get("sweep_correlations")["values"]} == {"bands", "top_n", "variant"}


@pytest.mark.parametrize(("key", "value", "words"), [
    ("sweep_widths", [0], "got 0"), ("sweep_layers", [-1], "got -1"),
    ("sweep_k", [200], "200 .*latents of only 128"), ("sweep_widths", [4], "8 .*latents of only 4"),
    ("sweep_masks", ["nothing"], "whole_prompt")])
def test_impossible_sweeps_are_refused_by_name(key, value, words):
    with pytest.raises(StsError, match=f"{key}.*{words}"):
        sts.open_run("smoke", **{key: value})


def test_saes_need_a_text_to_train_on():
    with pytest.raises(StsError, match="text named by sae_text, which is empty"):
        sts.open_run("smoke", sae_text={}).get("sae")


def test_an_sae_text_that_would_not_be_trained_on_is_named(tmp_path):
    (tmp_path / "own.txt").write_text("One document alone, of which a part cannot be held out. " * 40)
    run = sts.open_run("smoke", results=tmp_path, sae_text={"gsm_symbolic": 2000, str(tmp_path / "own.txt"): 2000})
    with pytest.raises(StsError, match="own.txt has too little text to train on some documents and hold out others"):
        run.get("sae")
