"""Learning rates are compared on problems of their own."""

import pytest

import sts
from sts.errors import StsError
from sts.run import resources

RATES = [1e-5, 1e-2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("choices"), sft_lr_tried=RATES, sft_trial_examples=8)


def test_every_rate_is_tried_from_the_same_start_on_the_same_problems(run):
    first, second = run.get("sft_trials")
    assert [one["lr"] for one in (first, second)] == RATES and second["held_out_after"] < second["held_out_before"]
    assert second["held_out_before"] == first["held_out_before"]
    assert (first["lr"], first["train"], first["held_out"], first["steps"]) == (1e-5, 8, 8, 2)
    # Random weights know nothing: a loss near the logarithm of the vocabulary, which so small a rate hardly moves.
    assert first["held_out_after"] == pytest.approx(first["held_out_before"], abs=0.01)


def test_trials_have_problems_of_their_own(run):
    train, held_out, seed = resources.trial(run)
    assert seed != run.settings.seed and len(train) == 8
    own = {example.question for example in (*resources.train(run), *resources.held_out(run))}
    assert not own & {example.question for example in (*train, *held_out)}


def test_the_key_does_not_depend_on_the_run_that_is_reported(run):
    def key(**changed):
        return sts.open_run("smoke", results=run.results, **{"sft_lr_tried": RATES, "sft_trial_examples": 8} | changed
                            ).key("sft_trials")

    assert key(sft_lr=0.5) == key(sft_examples=12) == run.key("sft_trials") != key(sft_held_out=4)


def test_no_rate_is_an_error(run):
    with pytest.raises(StsError, match="sft_lr_tried is empty"):
        sts.open_run("smoke", results=run.results).get("sft_trials")
