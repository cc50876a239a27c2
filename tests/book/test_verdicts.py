"""Verdicts follow their rules; figures draw the numbers they are given."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch

from sts.book import learned, plots_shift, verdicts
from sts.measure.items import MeanInterval
from sts.measure.shift_stats import concentrations, overlap_rows


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.26, 0.5, "held"), (0.25, 0.3, "held"), (0.2, 0.3, "undecided"), (0.1, 0.24, "not held")])
def test_few_latents_carry_the_change(low, high, verdict):
    assert verdicts.few_verdict({"low": low, "high": high}) == verdict


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.5, 0.6, "held"), (0.3, 0.4, "not shown"), (0.1, 0.2, "reversed")])
def test_more_concentrated_than_the_activity(low, high, verdict):
    assert verdicts.beyond_verdict({"low": low, "high": high}, 0.35) == verdict


@pytest.mark.parametrize(("sae", "raw", "random", "verdict"), [
    ((0.4, 0.5), (0.2, 0.3), (0.1, 0.3), "held"),
    ((0.4, 0.5), (0.2, 0.3), (0.3, 0.4), "held against raw dimensions only"),
    ((0.1, 0.15), (0.2, 0.3), (0.0, 0.01), "reversed"), ((0.25, 0.5), (0.2, 0.3), (0.0, 0.1), "not shown")])
def test_raw_dimensions_share_it_more_evenly(sae, raw, random, verdict):
    shares = ({"low": low, "high": high} for low, high in (sae, raw, random))
    assert verdicts.even_verdict(*shares) == verdict


def lead(low, high=0.9, n=6):
    return MeanInterval((low + high) / 2, 0.1, low, high, 0.95, n, "t")


NAN = float("nan")


@pytest.mark.parametrize(("p", "lows", "verdict"), [
    (0.01, (0.1, 0.1, 0.1), "held"), (0.01, (-0.1, 0.1, 0.1), "beyond chance only"),
    (0.01, (0.1, 0.0, 0.1), "beyond chance only"), (0.01, (0.1, 0.1, -0.2), "beyond chance only"),
    (0.01, (0.1, 0.1, NAN), "beyond chance only"), (0.05, (-0.1, 0.1, 0.1), "not shown"),
    (None, (-0.1, -0.1, -0.1), "not shown")])
def test_demonstrations_foresee_the_shift(p, lows, verdict):
    # Chance is not enough, and the test among active latents counts, not the easier one among all.
    leads = {name: lead(low) for name, low in zip(("rate", "energy", "other_domain"), lows, strict=True)}
    assert verdicts.foreseen_verdict({"p": 1e-9, "active_p": p}, leads) == verdict


@pytest.mark.parametrize(("raw", "random", "verdict"), [
    ((0.1, 0.2), (0.1, 0.2), "held"), ((0.1, 0.2), (-0.1, 0.2), "held against raw dimensions only"),
    ((-0.1, 0.1), (0.1, 0.2), "not shown"), ((-0.3, -0.1), (0.1, 0.2), "reversed"),
    ((NAN, NAN), (0.1, 0.2), "not shown")])
def test_better_than_raw_dimensions(raw, random, verdict):
    assert verdicts.better_verdict({"raw": lead(*raw), "random": lead(*random)}) == verdict


@pytest.mark.parametrize(("interval", "verdict"), [
    ((0.1, 0.2), "held"), ((-0.1, 0.2), "not shown"), ((-0.2, -0.1), "reversed"),
    ((NAN, NAN), "not judged, as there is a single draw")])
def test_more_demonstrations_foresee_more(interval, verdict):
    assert verdicts.more_verdict(lead(*interval)) == verdict


class Stub:
    """A run whose fine-tuning ended at this held-out loss, from 2."""

    def __init__(self, folder, after):
        log = {"held_out_before": 2.0, "held_out_after": after, "held_out": 8}
        (folder / "training.json").write_text(json.dumps(log))
        self.folder, self.settings = folder, SimpleNamespace(seed=0)

    def get(self, name):
        assert name == "sft"
        return self.folder


def test_a_run_that_learned_nothing_is_not_judged(tmp_path):
    assert learned.judged(Stub(tmp_path, 1.79), "held") == "held"
    assert "fell by 10%" in learned.learned_sentence(Stub(tmp_path, 1.79))
    assert "held" not in learned.judged(Stub(tmp_path, 1.81), "held")
    assert "**did not learn**" in learned.learned_sentence(Stub(tmp_path, 1.81))
    assert "rose by 5%" in learned.learned_sentence(Stub(tmp_path, 2.1))


class Seeds:
    """A run with one held-out loss a seed, each from 2; the first is the run's own."""

    def __init__(self, folder, *after):
        self.runs = []
        for seed, loss in enumerate(after):
            (folder / str(seed)).mkdir(exist_ok=True)
            self.runs.append(Stub(folder / str(seed), loss))
        self.settings, self.other_seeds, self.get = self.runs[0].settings, tuple(range(1, len(after))), self.runs[0].get

    def with_seed(self, seed):
        return self.runs[seed]


def test_a_mean_over_seeds_is_judged_only_if_every_seed_learned(tmp_path):
    mixed = Seeds(tmp_path, 1.6, 1.9, 2.1)
    assert learned.loss_falls(mixed) == pytest.approx({0: 0.2, 1: 0.05, 2: -0.05})
    assert learned.learned(mixed) and learned.judged(mixed, "held") == "held"  # the run's own seed
    assert not learned.learned(mixed, every_seed=True)
    assert learned.judged(mixed, "held", every_seed=True).endswith("nothing with seeds 1, 2")
    told = learned.learned_sentence(mixed, every_seed=True)
    for part in ("fell by 20% with seed 0", "fell by 5% with seed 1", "rose by 5% with seed 2"):
        assert part in told
    assert "**learned with 1 of 3 seeds only**" in told
    assert learned.judged(Seeds(tmp_path, 1.9, 1.6), "held", every_seed=True).endswith("nothing with seed 0")
    assert learned.judged(Seeds(tmp_path, 1.9, 1.9), "held", every_seed=True) == learned.judged(mixed.runs[1], "held")
    every = Seeds(tmp_path, 1.6, 1.7)
    assert learned.learned(every, every_seed=True) and learned.judged(every, "held", every_seed=True) == "held"
    assert "the run **learned**" in learned.learned_sentence(every, every_seed=True)


def test_a_page_about_one_seed_asks_for_no_other(tmp_path):
    run = Stub(tmp_path, 1.6)
    run.other_seeds, run.with_seed = (1,), None  # opening another seed would fail
    assert learned.learned(run) and "seed" not in learned.learned_sentence(run)


def test_narrow_intervals_get_a_digit():
    assert verdicts._percent({"held_out": 0.342, "low": 0.338, "high": 0.344}) == "34.2% (95% interval 33.8% to 34.4%)"
    assert verdicts._percent({"held_out": 0.342, "low": 0.3, "high": 0.4}) == "34% (95% interval 30% to 40%)"


def test_the_papers_overlap_is_read_from_its_numbers():
    assert verdicts._published_overlap() == 0.57


CHANGE_FL = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) ** 4


def lines(axis):
    return {line.get_label(): line for line in axis.lines}


def test_concentration_figures_draw_the_shares():
    found, raw = concentrations(CHANGE_FL, 7), concentrations(CHANGE_FL[:, :20])
    energy_L = np.linspace(1 / 60, 1, 60) ** 0.5
    axis = plots_shift.concentration_curve(found, energy_L, 7).axes[0]
    assert list(lines(axis)["squared activation, most active"].get_ydata()) == list(energy_L[found.counts_K - 1])
    drawn = lines(axis)["most shifted on other questions"]
    assert list(drawn.get_ydata()) == list(found.held_out_K) and list(drawn.get_xdata()) == list(found.counts_K)
    assert list(lines(axis)["random order"].get_ydata()) == pytest.approx(found.counts_K / 60)
    right = plots_shift.concentration_by_kind({"sae": found, "raw": raw}).axes[1]
    assert list(lines(right)["raw dimensions (20)"].get_xdata()) == pytest.approx(raw.counts_K / 20)


def test_overlap_figures_draw_the_shares():
    first, second = CHANGE_FL[0], CHANGE_FL[1]
    frame = pandas.DataFrame(overlap_rows(first, second, [1, 5, 20, 60]))
    curves = {"sae": frame.assign(fraction=frame["n"] / 60), "raw": frame.assign(fraction=frame["n"] / 60)}
    busy = pandas.DataFrame(overlap_rows(CHANGE_FL[2], second, [1, 5, 20, 60]))
    left, right = plots_shift.overlap_curves(curves, {"rate": busy}, 5).axes
    assert list(lines(left)["by demonstrations"].get_ydata()) == list(frame["share"])
    assert list(lines(left)["by firing rate"].get_ydata()) == list(busy["share"])
    assert list(lines(left)["chance, all latents"].get_ydata()) == pytest.approx([1 / 60, 5 / 60, 20 / 60, 1])
    assert list(lines(right)["raw dimensions"].get_xdata()) == list(frame["n"] / 60)
    shares = pandas.DataFrame([{"demonstrations": number, "draw": draw, "kind": kind, "chance": 0.1,
                                "share": 0.1 * number + 0.1 * draw}
                               for number in (1, 2) for draw in (0, 1) for kind in ("sae", "raw")])
    axis = plots_shift.overlap_by_number(shares, {"energy": 0.42}).axes[0]
    assert list(lines(axis)["SAE latents by energy"].get_ydata()) == [0.42, 0.42]
    assert list(lines(axis)["SAE latents"].get_ydata()) == pytest.approx([0.15, 0.25])
    points = [line for line in axis.lines if line.get_linestyle() == "None"]
    assert sorted(points[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.2, 0.3])


def row(measure="bits", variant="paper", score="sts_act", pearson=0.5, **more):
    return {"measure": measure, "variant": variant, "score": score, "n": 14, "pearson": pearson,
            "pearson_interval": {"low": pearson - 0.3, "high": pearson + 0.2}, **more}


def test_correlations_are_drawn_for_both_selections_and_skipped_where_undefined():
    kinds = [(variant, score) for variant in ("paper", "official_code") for score in ("sts_act", "sts_icl")]
    every = [row(variant=variant, score=score, pearson=0.1 * place) for place, (variant, score) in enumerate(kinds)]
    kept = [{"measure": "bits", "variant": variant, "score": score, "undefined": "too few"} for variant, score in kinds]
    axis = plots_shift.correlations_compared(every, kept, "bits").axes[0]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())] == (
        pytest.approx([0.0, 0.1, 0.2, 0.3]))
    assert not [line for line in axis.lines if line.get_marker() == "s" and len(line.get_xdata())]
    assert "undefined" in str([line.get_label() for line in axis.lines])
    rows = [{"seed": seed, "domains": "all", "measure": "bits", "variant": "paper", "score": "sts_act",
             "pearson": value} for seed, value in ((0, 0.2), (1, -0.4), (2, None))]
    drawn = plots_shift.correlations_of_seeds(rows, "bits").axes[0].lines[0]
    assert list(drawn.get_ydata()) == [0.2, -0.4]


def test_figure_3_marks_the_extremes_and_fits_both_lines():
    domains = list("abcdefghi")
    scores = pandas.DataFrame([{"variant": variant, "domain": domain, "sts_act": float(place), "sts_icl": 2.0 * place}
                               for variant in ("paper", "official_code") for place, domain in enumerate(domains)])
    shifts = pandas.DataFrame([{"domain": domain, "measure": "bits", "shift": -float(place)}
                               for place, domain in enumerate(domains)])
    kinds = [(variant, score) for variant in ("paper", "official_code") for score in ("sts_act", "sts_icl")]
    every, kept = ([row(variant=variant, score=score, line={"slope": slope, "intercept": 0.5}, **more)
                    for variant, score in kinds] for slope, more in ((1.0, {}), (2.0, {"domains": list("abcdfghi")})))
    for place, axis in enumerate(plots_shift.figure3(scores, shifts, every, kept, "bits").axes):
        width = 2.0 if place % 2 else 1.0
        circles, squares, dashed, solid = axis.lines[:4]
        assert (list(circles.get_xdata()), list(circles.get_ydata())) == ([4 * width], [4.0])
        assert list(squares.get_ydata()) == [0, 1, 2, 3, 5, 6, 7, 8]
        assert list(dashed.get_ydata()) == [0.5, 0.5 + 8 * width] and dashed.get_linestyle() == "--"
        assert list(solid.get_ydata()) == [0.5, 0.5 + 16 * width] and solid.get_linestyle() == "-"
        assert axis.get_title() == "r = 0.50 (all), 0.50 (extremes)"


def test_every_figure_fits_a_phone_and_is_closed():
    shares = pandas.DataFrame([{"draw": draw, "kind": kind, "share": 0.3, "chance": 0.1}
                               for draw in (1, 2) for kind in ("sae", "raw")])
    found, energy_L = concentrations(CHANGE_FL), np.linspace(0, 1, 60)
    others = pandas.DataFrame([{"draw": draw, "baseline": name, "share": 0.1 * draw}
                               for draw in (1, 2) for name in ("rate", "energy", "other_domain")])
    by_set = plots_shift.overlap_by_set(shares, others, {"sae": 0.6, "raw": 0.4, "random": 0.5})
    levels = {line.get_color(): line.get_ydata()[0] for line in by_set.axes[0].lines
              if line.get_linestyle() == "--" and len(line.get_ydata())}
    assert levels == {plots_shift.KIND_STYLE[kind][1]: level
                      for kind, level in (("sae", 0.6), ("raw", 0.4), ("random", 0.5))}
    assert list(lines(by_set.axes[1])["other domains' demonstrations"].get_ydata()) == [0.1, 0.2]
    for figure in (plots_shift.concentration_curve(found, energy_L, 3), by_set,
                   plots_shift.concentration_by_kind({"sae": found, "raw": found})):
        assert figure.get_figwidth() <= 7
        assert all(text.get_fontsize() >= 9 for axis in figure.axes for text in axis.get_xticklabels())
    assert plt.get_fignums() == []
    assert np.isfinite(found.low_K).all()
