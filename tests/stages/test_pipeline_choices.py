"""Learning rates are compared on problems of their own, and what was finished before a kill is kept."""

import io
import json

import pandas
import pytest

import sts
from sts.book import pages_choices
from sts.errors import StsError
from sts.stages.choices import TRIAL_SEED, trial_run

RATES = [1e-5, 1e-2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("choices"), sft_lr_tried=RATES, sft_trial_examples=8)


def test_every_rate_is_tried_from_the_same_start_on_the_same_problems(run):
    folder = run.scratch("sft_trials") / "0.01"
    folder.mkdir()
    finished = {"lr": 1e-2, "train": 8, "held_out": 8, "steps": 2, "held_out_before": 5.0, "held_out_after": 4.0}
    (folder / "row.json").write_text(json.dumps(finished))  # as if killed after the second
    first, second = run.get("sft_trials")
    assert second == finished
    assert (first["lr"], first["train"], first["held_out"], first["steps"]) == (1e-5, 8, 8, 2)
    # Random weights know nothing: a loss near the logarithm of the vocabulary, which so small a rate hardly moves.
    assert first["held_out_after"] == pytest.approx(first["held_out_before"], abs=0.01)


def test_trials_have_problems_of_their_own(run):
    trial = trial_run(run)
    assert trial.settings.seed == run.settings.seed + TRIAL_SEED
    assert len(trial.sft_examples("train")) == 8
    own, tried = ({example.question for part in ("train", "held_out") for example in one.sft_examples(part)}
                  for one in (run, trial))
    assert not own & tried


def test_the_key_does_not_depend_on_the_run_that_is_reported(run):
    def key(**changed):
        return sts.open_run("smoke", results=run.results, **{"sft_lr_tried": RATES, "sft_trial_examples": 8} | changed
                            ).key("sft_trials")

    assert key(sft_lr=0.5) == key(sft_examples=12) == run.key("sft_trials") != key(sft_held_out=4)


def test_no_rate_is_an_error(run):
    with pytest.raises(StsError, match="sft_lr_tried is empty"):
        sts.open_run("smoke", results=run.results).get("sft_trials")


def test_the_page_lists_what_was_tried_and_computes_nothing(run, tmp_path):
    run.get("sft_trials")
    table = pandas.read_html(io.StringIO(pages_choices.choice_table(run)))[0]
    assert list(table["learning rate"]) == RATES
    by_hand = 4.0 / 5.0 - 1  # the second row of the first test
    assert table["change"].iloc[1] == f"{by_hand:+.1%}"
    assert list(table["falls by 10% or more"]) == ["no", "yes"]
    said = pages_choices.choice_sentence(run)  # smoke's own rate is the larger one
    assert "was at 0.01, which this run uses; it is at an edge of the rates tried" in said
    other = sts.open_run("smoke", results=run.results, sft_lr_tried=RATES, sft_trial_examples=8, sft_lr=1e-5)
    told = pages_choices.choice_sentence(other)
    assert "was at 0.01. **This run uses another rate, 1e-05.**" in told and "which this run uses" not in told
    untried = sts.open_run("smoke", results=tmp_path, sft_lr_tried=RATES)
    assert "sts stage sft_trials --run smoke" in pages_choices.choice_sentence(untried)
    assert pages_choices.choice_table(untried) == ""
    assert "names no learning rates" in pages_choices.choice_sentence(sts.open_run("smoke", results=tmp_path))
