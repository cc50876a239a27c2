"""Read-outs of chosen latents on the smoke run, against their definitions; and what a page says of them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from scipy import stats as scipy_stats

import sts
from sts.book import claims, evidence
from sts.book.claims import HELD, IN_PART, NOT_DONE, NOT_HELD
from sts.data.prompts import solution_prompt
from sts.engine.evaluate import evaluate
from sts.engine.finetune import load_tuned
from sts.engine.saes import load_sae
from sts.errors import StsError
from sts.measure.items import item_measures
from sts.run import resources
from sts.run.run import OpenRun
from sts.stages import selective as stages

KINDS = {"most_shifted": 1, "most_active": 1, "like_rate": 2, "random": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One layer, and few latents, so that sets of like rate can be made."""
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("selective"), sweep_layers=[], sweep_widths=[],
                        sweep_k=[], selective_latents=[2, 4], selective_draws=2)


@pytest.fixture(scope="module")
def rows(run):
    return run.get("selective")


def bits_of(rows, kind, count=None, draw=0):
    own = rows[(rows["kind"] == kind) & (rows["on"] == "held out")]
    own = own if count is None else own[(own["latents"] == count) & (own["draw"] == draw)]
    return own.set_index("example_id")["bits"]


# --- controls -----------------------------------------------------------------------------------------------------

def test_untrained_read_outs_change_nothing_and_trained_ones_do(rows):
    before, untrained = bits_of(rows, "none"), bits_of(rows, "untrained")
    assert before.equals(untrained) and len(before) == 8
    trained = bits_of(rows, "most_shifted", 4)
    assert (trained != before).all() and trained.mean() < before.mean()


def test_the_models_are_those_of_the_run(run, rows):
    for kind, model in (("none", resources.lm(run)), ("sft", load_tuned(resources.fresh_lm(run)(), run.get("sft")))):
        found = item_measures(evaluate(model, resources.held_out(run), kinds=("solution",)))["bits"]
        assert bits_of(rows, kind).to_dict() == pytest.approx(found.to_dict(), rel=1e-4)


def test_every_set_is_trained_for_every_number_and_draw(rows):
    found = rows.dropna(subset="latents").groupby(["kind", "latents", "draw"]).size()
    assert {kind: found[kind].groupby("draw").size().size for kind in KINDS} == KINDS
    assert all((found[kind].groupby("latents").size() == draws).all() for kind, draws in KINDS.items())
    assert set(found[found > 1]) == {8 + 2 * 8}  # held-out problems, and others for each of two rates


def test_a_set_is_held_to_the_rate_that_is_best_on_problems_neither_trained_on_nor_held_out(run, rows):
    others = {example.example_id for example in resources.train(run)[run.settings.selective_examples:][:8]}
    for _, own in rows.dropna(subset="bits").dropna(subset="latents").groupby(["kind", "latents", "draw"]):
        tried, told = (own[own["on"] == on] for on in ("validation", "held out"))
        assert set(tried["example_id"]) == others and len(told) == 8
        assert told["lr"].unique().tolist() == [tried.groupby("lr")["bits"].mean().idxmin()]
    for lr in run.settings.selective_lr:
        alone = run.variant(selective_lr=[lr], selective_latents=[2]).get("selective")
        assert set(alone["on"].dropna()) == {"held out"}  # nothing to choose
        same = alone.merge(rows[(rows["lr"] == lr) & (rows["on"] == "held out")], on=[
            "kind", "latents", "draw", "example_id"])
        assert same["bits_x"].equals(same["bits_y"])
    assert len(same)  # of the last rate at least


def test_rates_without_problems_to_choose_on_are_refused_before_anything_is_trained(run, monkeypatch):
    monkeypatch.setattr(stages, "fine_tune", None)
    with pytest.raises(StsError, match="of 16 these are 0. Lower it, or name one rate."):
        run.variant(selective_examples=0).get("selective")


# --- which latents ------------------------------------------------------------------------------------------------

def solution_latents(run):
    """Latents on all solution tokens of the training problems, from whole passes."""
    lm, sae, found = resources.lm(run), resources.reader(run), []
    handle = lm.model.model.layers[0].register_forward_hook(lambda module, args, output: found.append(output[0]))
    spans = []
    for example in resources.train(run)[:run.settings.selective_examples]:
        prompt = solution_prompt(lm.tokenizer, example)
        with torch.no_grad():
            lm.model(torch.tensor([prompt.ids]))
        spans.append(slice(*prompt.question))
    handle.remove()
    with torch.no_grad():
        return sae.encode(torch.cat([state[span] for state, span in zip(found, spans, strict=True)]))


def test_rate_and_energy_are_those_of_the_chosen_latents_on_the_solutions(run, rows):
    latents_TL = solution_latents(run).double()
    norms = resources.reader(run).W_dec.double().norm(dim=1)
    rate_L, energy_L = (latents_TL > 0).double().mean(0), latents_TL.square().mean(0) * norms**2
    change_L = run.get("shift")["squared_difference_L"]
    for kind, order_L in (("most_shifted", change_L), ("most_active", energy_L)):
        for count in (2, 4):
            chosen = order_L.argsort(descending=True)[:count]
            row = rows[(rows["kind"] == kind) & (rows["latents"] == count)].iloc[0]
            assert row["rate"] == pytest.approx(rate_L[chosen].mean().item(), rel=0.02)
            assert row["energy"] == pytest.approx(energy_L[chosen].sum().item(), rel=0.02)


def test_sets_of_like_rate_fire_as_often_as_the_estimated_or_are_not_trained(rows):
    for count, own in rows.dropna(subset="latents").groupby("latents"):
        goal = own[own["kind"] == "most_shifted"]["rate"].iloc[0]
        for _, one in own[own["kind"] == "like_rate"].groupby("draw"):
            assert len(one) == 1 or abs(one["rate"].iloc[0] - goal) <= 0.1 * goal, count


# --- several layers -----------------------------------------------------------------------------------------------

def test_a_sweep_over_layers_reads_out_at_each_of_them(tmp_path, monkeypatch):
    swept = sts.open_run("smoke", results=tmp_path, sweep_widths=[], sweep_k=[], selective_latents=[4])
    readers = resources.readers(swept)
    folder = swept.get("sweep_sae_training")
    assert list(readers) == [0, 1]
    for layer, sae in readers.items():
        assert torch.equal(sae.W_enc, load_sae(str(folder / f"layer{layer}-latents128-k8")).W_enc)
    made = []
    monkeypatch.setattr(stages, "ReadOuts", lambda saes, latents: made.append(latents) or readouts(saes, latents))
    readouts = sts.engine.readouts.ReadOuts
    rows = swept.get("selective")
    assert all(list(one) == [0, 1] and all(len(own) == 4 for own in one.values()) for one in made)
    assert bits_of(rows, "none").equals(bits_of(rows, "untrained"))
    assert (bits_of(rows, "most_shifted", 4) != bits_of(rows, "none")).all()
    # Each layer's own: what demonstrations shift there, from whole passes.
    group, = resources.shift_groups(swept)
    found = []
    for side in (group.base, group.icl):
        states = []
        handle = resources.lm(swept).model.model.layers[1].register_forward_hook(
            lambda module, args, output, states=states: states.append(output[0]))
        for prompt in side:
            with torch.no_grad():
                resources.lm(swept).model(torch.tensor([prompt.ids]))
        handle.remove()
        found.append(readers[1].encode(torch.cat([state[slice(*prompt.question)] for state, prompt in zip(
            states, side, strict=True)])))
    wanted = (found[1] - found[0]).square().sum(0).argsort(descending=True)[:4]
    assert len(set(wanted.tolist()) & set(made[0][1].tolist())) >= 3  # the engine rounds otherwise


def test_a_layer_without_an_sae_is_said(tmp_path, monkeypatch):
    swept = sts.open_run("smoke", results=tmp_path)
    (tmp_path / "sweep" / "layer0-latents128-k8").mkdir(parents=True)
    monkeypatch.setattr(OpenRun, "get", lambda self, name: tmp_path / "sweep")
    with pytest.raises(StsError, match="SAE of layer 1 was recorded without weights.*--again"):
        resources.readers(swept)


# --- wrong numbers, killing and keys --------------------------------------------------------------------------------

@pytest.mark.parametrize("latents", [[], [65], [4, 4096]])
def test_numbers_that_an_sae_does_not_have_are_refused_before_anything_is_trained(run, latents, monkeypatch):
    monkeypatch.setattr(stages, "fine_tune", None)
    other = run.variant(selective_latents=latents)
    with pytest.raises(StsError, match="selective_latents is .*of 1 to 64, half of what an SAE has"):
        other.get("selective")


def test_a_killed_training_of_sets_goes_on_with_the_next(run, rows, tmp_path, monkeypatch):
    other = sts.open_run("smoke", results=run.results, sweep_layers=[], sweep_widths=[], sweep_k=[],
                         selective_latents=[4], selective_draws=2)
    done, fine_tune = [], stages.fine_tune

    def killed(*args, **more):
        done.append(args)
        if len(done) == 3:
            raise KeyboardInterrupt
        return fine_tune(*args, **more)

    monkeypatch.setattr(stages, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        other.get("selective")
    found = other.get("selective").dropna(subset="latents")
    trained = found.dropna(subset="bits").groupby(["kind", "draw", "lr"]).ngroups
    assert len(done) == trained + 1  # the third was begun twice
    same = rows[rows["latents"] == 4]
    for (kind, draw), own in found.dropna(subset="bits").groupby(["kind", "draw"]):
        assert bits_of(own, kind).equals(bits_of(same, kind, 4, draw))


def test_keys_follow_what_the_training_rests_on(run):
    def key(**changes):
        return run.variant(**changes).key("selective")

    assert key(sft_lr=0.5) != run.key("selective")  # the adapters beside it
    assert key(selective_lr=[0.5]) != run.key("selective") != key(sweep_layers=[1])
    assert key(top_n=4) == key(mixture_steps=[0.5]) == run.key("selective")


# --- what a page says ---------------------------------------------------------------------------------------------

def leads_of(counts, *frames):
    """A stand-in for a run with the leads of read-outs at several seeds."""
    runs = [type("Run", (), {"get": lambda self, stage, own=own: own, "settings": type("Settings", (), {
        "selective_latents": counts, "seed": seed})})() for seed, own in enumerate(frames)]
    more = [*range(1, len(runs))]
    leads = stages.read_out_leads(runs, more, 0)
    return SimpleNamespace(get=lambda stage: leads, alone=lambda seed: None, settings=SimpleNamespace(
        seed=0, seeds=[*more, 7], selective_seeds=more))


def frame_of(**bits):
    """kind_count_draw -> bits of four problems; of a set that failed to match, None."""
    parts = []
    for name, values in bits.items():
        kind, *numbers = name.rsplit("_", 2) if name[-1].isdigit() else (name,)
        about = dict(zip(("latents", "draw"), map(float, numbers), strict=False))
        about |= {"kind": kind, "on": None if values is None else "held out"}
        parts += [{"example_id": place, "bits": one, **about} for place, one in enumerate(
            [math.nan] if values is None else values)]
    return pandas.DataFrame(parts)


BASE = np.array([1.0, 2.0, 3.0, 2.5])
OWN = BASE - [0.30, 0.31, 0.29, 0.30]


def test_leads_are_over_problems_and_draws_by_students_t():
    draws = np.stack([BASE - [0.1, 0.11, 0.1, 0.09], BASE - [0.12, 0.1, 0.1, 0.1]])
    frame = frame_of(none=BASE, untrained=BASE, most_shifted_5_0=OWN, most_shifted_2_0=BASE, most_active_5_0=BASE,
                     like_rate_5_0=None, random_5_0=draws[0], random_5_1=draws[1])
    found = evidence.read_outs(leads_of([5, 2], frame))
    lost = BASE - OWN
    reach = scipy_stats.t.ppf(0.975, 3) * lost.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach)) and found.n == 4
    others = evidence.read_outs(leads_of([5, 2], frame), than="others")
    assert others.value == pytest.approx((draws - OWN).mean()) and others.n == 4
    table = draws - OWN
    half = [scipy_stats.t.ppf(0.975, 3)**2 * table.mean(0).var(ddof=1) / 4,
            scipy_stats.t.ppf(0.975, 1)**2 * table.mean(1).var(ddof=1) * (1 / 2 + 1)]
    assert others.high - others.value == pytest.approx(math.sqrt(sum(half)))
    rate, active = others.against.values()
    assert rate.value is None and active.above  # no set matched in rate
    leads = leads_of([5, 2], frame).get("read_out_leads")
    assert {*zip(leads["kind"], leads["latents"], strict=True)} == {
        ("untrained", 2), ("untrained", 5), ("random", 5), ("most_active", 5)}


def test_the_weakest_seed_is_judged():
    frames = [frame_of(none=BASE, untrained=BASE, most_shifted_5_0=BASE - gain, most_active_5_0=BASE, random_5_0=BASE)
              for gain in (np.array([0.3, 0.31, 0.29, 0.3]), np.array([0.1, 0.11, 0.09, 0.1]))]
    for order in (frames, frames[::-1]):
        found = evidence.read_outs(leads_of([5], *order))
        assert found.value == pytest.approx(0.1) and found.seeds == 2


@pytest.mark.parametrize(("like_rate", "random", "words"), [
    (BASE, BASE, (HELD, HELD)), (OWN, BASE, (HELD, IN_PART)), (OWN, OWN - 0.1, (HELD, NOT_HELD)),
    (None, BASE, (HELD, IN_PART))])
def test_the_cards_compare_with_each_kind_of_set(like_rate, random, words):
    frame = frame_of(none=BASE, untrained=BASE, most_shifted_5_0=OWN, most_active_5_0=BASE, like_rate_5_0=like_rate,
                     random_5_0=random)
    known = claims.read_claims()[1]
    found = [known[name].judge(evidence.read_outs(leads_of([5], frame), **known[name].arguments))
             for name in ("read-outs-learn", "read-outs-specific")]
    assert tuple(found) == words


def test_a_run_that_trains_none_is_not_judged(tmp_path):
    other = sts.open_run("smoke", results=tmp_path, selective_latents=[])
    claim = claims.read_claims()[1]["read-outs-learn"]
    found, word, why = evidence.weigh(other, replace(claim, learned="no"))
    assert found is None and word == NOT_DONE and "selective_latents is []" in why
    assert not list(tmp_path.glob("smoke/stages/*"))
