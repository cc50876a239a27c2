"""Pages show the measures that were evaluated, and say what their intervals and tests are."""

import json
import math
import types

import nbformat
import numpy
import pandas
import pytest
import torch
from scipy import stats as scipy_stats

import sts
from sts.book import beside_paper, pages, pages_forecast, pages_limits, pages_measures, plots, plots_shift
from sts.book.chapters import run_chapter
from sts.engine.evaluate import item_shifts

#: eval_kinds -> the finest measure, the next and the accuracy
COMBINATIONS = {
    ("letter", "solution"): ("bits", "p_right", "accuracy"),
    ("letter",): ("p_right", "accuracy", "accuracy"),
    ("option",): ("accuracy_norm", "", ""),
    ("solution",): ("bits", "bits_answer", ""),
    ("option", "solution"): ("bits", "accuracy_norm", "accuracy_norm"),
    ("letter", "option"): ("p_right", "accuracy", "accuracy"),
    ("letter", "option", "solution"): ("bits", "p_right", "accuracy"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("measures")


def texts(figure) -> str:
    return " ".join(axis.get_xlabel() + axis.get_ylabel() + " ".join(text.get_text() for text in axis.texts)
                    for axis in figure.axes)


@pytest.mark.parametrize(("kinds", "shown"), COMBINATIONS.items(), ids=["+".join(kinds) for kinds in COMBINATIONS])
def test_every_page_function_shows_what_was_evaluated(results, kinds, shown):
    run = sts.open_run("smoke", results=results, eval_kinds=list(kinds), seeds=[])
    shifts, correlations, scores = run.get("domain_shift"), run.get("correlations"), run.get("scores")
    assert pages_measures.measures_shown(shifts) == shown
    finest, second, accuracy = shown
    for measure, figure in ((finest, plots.domain_shifts(shifts, finest)),
                            (second, plots.domain_shifts(shifts, second)),
                            (accuracy, plots.score_scatter(scores, shifts, correlations, accuracy))):
        assert (plots.MEASURES[measure] if measure else "No further measure was evaluated") in texts(figure)
    extremes = run.get("extreme_correlations")
    for measure in filter(None, (finest, accuracy)):
        assert len(plots_shift.figure3(scores, shifts, correlations, extremes, measure).axes) == 4
        plots_shift.correlations_compared(correlations, extremes, measure)
    plots_shift.correlations_of_seeds(run.get("correlations_by_seed"), finest)

    name = pages_measures.NAMES[finest]
    summary, conclusion = pages_forecast.forecast_summary(run), pages_forecast.forecast_conclusion(run)
    assert f"- Change in {name}" in summary and f"- {name}: " in conclusion
    assert "undefined (not evaluated" not in summary + conclusion
    assert ("not evaluated (`eval_kinds`)" in summary) == (kinds == ("solution",))
    assert "What limits this run" in summary  # the smoke run's noise meets no claim
    for measure in ("bits", "p_right"):
        assert (pages_measures.NAMES[measure] in summary + conclusion) == (measure in set(shifts["measure"]))
    assert beside_paper.claim_sentence(run, finest).count("**") == 8
    if not accuracy:
        assert beside_paper.claim_sentence(run, "") == beside_paper.extremes_sentence(run, "") \
            == pages_measures.NOTHING_ELSE

    table, beside = pages_measures.shift_table(shifts), beside_paper.shifts_beside(run)
    assert all(any(column.startswith(pages_measures.NAMES[measure]) for column in table)
               for measure in set(shifts["measure"]))
    assert ("this run, bits" in beside) == ("solution" in kinds)
    assert ("this run, accuracy" in beside) == ("letter" in kinds)
    assert ("this run, accuracy by option text" in beside) == ("option" in kinds and "letter" not in kinds)
    sentence = beside_paper.accuracy_sentence(run)
    assert "5-shot" in sentence and ("zero-shot" in sentence) == (kinds != ("solution",))
    assert ("letter is the likeliest" in sentence) == ("letter" in kinds)
    assert ("not evaluated here" in beside_paper.shifts_sentence(run)) == (kinds == ("solution",))


def test_the_chapter_runs_on_letters_alone():
    target = run_chapter("transferability_score", "smoke", {"eval_kinds": ["letter"]})
    outputs = [output for cell in nbformat.read(target, 4).cells if cell.cell_type == "code"
               for output in cell.outputs]
    page = "\n".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "Change in p(right option): STS_act" in page and "zero-shot" in page and "McNemar" in page
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 13
    assert not [output for output in outputs if output.output_type in ("error", "stream")]


# --- tables and notes ---------------------------------------------------------------------------------------------

def changes(**values):
    """Shifts of accuracy and bits from (before, after) of each domain's items."""
    def frame(which):
        return pandas.DataFrame([
            {"example_id": f"{domain}-{index}", "domain": domain, "accuracy": 100.0 * pair[which],
             "bits": pair[which] + index / 10 * which} for domain, pairs in values.items()
            for index, pair in enumerate(pairs)]).set_index("example_id")
    return item_shifts(frame(0), frame(1), resamples=200)


SHIFTS = changes(law=[(0, 1)] * 8 + [(1, 0)] + [(1, 1)] * 11, math=[(1, 0), (0, 0), (0, 1)], physics=[(0, 1)])


def test_mcnemars_p_stands_beside_accuracy_and_is_explained():
    table = pages_measures.shift_table(SHIFTS).set_index("domain")
    p = table["p (McNemar), accuracy"]
    # Nine questions turned, eight of them one way.
    assert p["law"] == f"{scipy_stats.binomtest(8, 9).pvalue:.2f}" == "0.04"
    assert p["math"] == "1.00" and p["physics"] == "1.00"
    assert not any("McNemar" in column and "bits" in column for column in table)
    assert "turned from wrong to right as from right to wrong" in pages_measures.mcnemar_note(SHIFTS)
    only_bits = SHIFTS[SHIFTS["measure"] == "bits"]
    assert pages_measures.mcnemar_note(only_bits) == ""
    assert not any("McNemar" in column for column in pages_measures.shift_table(only_bits))


def test_ties_are_told_before_and_after():
    def rows(ties):
        return pandas.DataFrame([(f"q{item}", "letter", -1.0 - (option and item >= ties)) for item in range(4)
                                 for option in range(2)], columns=["example_id", "kind", "loglikelihood"])

    def said(before, after):
        frames = {"evaluation_before": rows(before), "evaluation_after": rows(after)}
        return pages_measures.ties_sentence(types.SimpleNamespace(get=frames.get))

    assert said(1, 3).startswith("In 25% of the questions before training and 75% after it, two or more letters tie")
    assert said(0, 0) == ""


@pytest.mark.parametrize(("p", "text"), [(0.004, "<0.01"), (0.0149, "0.01"), (1.0, "1.00")])
def test_p_values_with_two_digits(p, text):
    assert pages.p_value(p, digits=2) == text


def test_one_question_has_no_interval_and_its_domain_is_drawn_hollow():
    own = SHIFTS.set_index(["domain", "measure"])
    assert own["interval"].loc[:, "bits"].to_dict() == {"law": "bootstrap", "math": "t", "physics": "none"}
    assert math.isnan(own.loc[("physics", "accuracy"), "low"])
    table = pages_measures.shift_table(SHIFTS).set_index("domain")
    assert table.loc["physics", "accuracy, points"] == "+100.0 (no interval)"
    assert table.loc["law", "accuracy, points"].startswith("+35.0 (+")
    scores = pandas.DataFrame([{"variant": "paper", "domain": domain, "sts_act": value, "sts_icl": value}
                               for value, domain in enumerate(("law", "math", "physics"))])
    undefined = [{"measure": "accuracy", "variant": "paper", "score": score, "undefined": "y"}
                 for score in ("sts_act", "sts_icl")]
    for figure in (plots.domain_shifts(SHIFTS, "accuracy"), plots.score_scatter(scores, SHIFTS, undefined, "accuracy")):
        faces = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_markerfacecolor()
                 for line in figure.axes[0].lines if line.get_marker() == "o"}
        assert len(faces) == 3
        assert sum(face == "white" for face in faces.values()) == 2  # all but law's
        assert all(numpy.isfinite(figure.axes[0].get_xlim() + figure.axes[0].get_ylim()))


def test_the_page_says_which_intervals_it_has():
    assert pages_measures.interval_note(SHIFTS, 5000) == (
        "95% interval over questions: bootstrap, 5,000 resamples; Student's t for the 1 of 3 domains with fewer than "
        "16; none for the 1 with a single question")
    law = SHIFTS[SHIFTS["domain"] == "law"]
    assert pages_measures.interval_note(law, 200) == "95% interval over questions: bootstrap, 200 resamples"


def test_limits_count_domains_that_moved_and_read_the_saes_record(results, monkeypatch, tmp_path):
    run = sts.open_run("smoke", results=results)
    rows = [("law", -0.3, -0.4, -0.2), ("math", 0.1, -0.1, 0.3), ("physics", -0.2, math.nan, math.nan)]
    shifts = pandas.DataFrame([{"domain": domain, "measure": "bits", "shift": shift, "low": low, "high": high}
                               for domain, shift, low, high in rows])
    shifts = pandas.concat([shifts, shifts.assign(measure="p_right", low=-1, high=1)])
    monkeypatch.setitem(run._memory, f"domain_shift-{run.key('domain_shift')}", shifts)
    held_out = {"fraction_of_variance_explained": 0.5, "splice": {"recovered": 0.25}}
    (tmp_path / "training.json").write_text(json.dumps({"held_out": held_out}))
    monkeypatch.setattr(type(run), "sae_folder", tmp_path)
    monkeypatch.setattr(type(run), "stored", lambda self, name: True)
    said = pages_limits.limits_sentence(run, "bits", "p_right")
    assert "1 of 3 domains changed in bits per character" in said and "median absolute change: 0.2)" in said
    assert "0 of 3 domains changed in p(right option)" in said and "0.2 percentage points)" in said
    assert "With 3 domains" not in said and "explains 50% of" in said and "avoids 25% of" in said
    (tmp_path / "training.json").unlink()
    assert "not recorded" in pages_limits.sae_fidelity(run)


def test_power_is_that_of_fishers_z():
    # The correlation whose z, with its standard error, lies 1.96 + 0.84 standard errors above zero.
    needed = math.tanh((1.959964 + 0.841621) / math.sqrt(14 - 3))
    assert f"of about {needed:.2f} or more" in pages_limits.power_sentence(14)


def test_limits_of_a_shift_are_its_size_and_the_length_of_training(results, monkeypatch, tmp_path):
    run = sts.open_run("smoke", results=results)
    ones, moved = torch.ones(4), torch.tensor([0.0, 0.0, 0.3, 0.4])
    sums = {"raw/squared_difference_L": moved**2, "raw/base_square_sum_L": 0.25 * ones, "sae/base_sum_L": torch.ones(8)}
    (tmp_path / "training.json").write_text(json.dumps({"steps": 7, "train": 30}))
    monkeypatch.setitem(run._memory, f"sft_shift-{run.key('sft_shift')}", sums)
    monkeypatch.setitem(run._memory, f"sft-{run.key('sft')}", tmp_path)
    said = pages_limits.shift_limits_sentence(run)
    assert "7 training steps on 30 problems" in said and "by 50% of its size" in said and "has 8 latents" in said
