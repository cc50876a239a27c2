"""Learning rates are compared on problems of their own."""

import json

import pytest

import sts
from sts.data.load import by_domain, load_examples
from sts.engine.evaluate import evaluate
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


def write_mmlu(folder, splits):
    (folder / "mmlu").mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        rows = [{"subject": subject, "question": f"{subject}, {split}, question {place}?", "answer": place % 4,
                 "choices": ["one", "two more", "three", "four"]}
                for subject in ("virology", "anatomy") for place in range(count)]
        (folder / "mmlu" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_letters_and_texts_are_compared_on_validation_questions_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    write_mmlu(tmp_path, {"test": 2, "val": 6, "dev": 2})

    def opened():
        return sts.open_run("smoke", results=tmp_path, domain_data="mmlu", domains=[])

    own = opened()
    rows = own.get("answer_forms")
    assert [row["form"] for row in rows] == ["letter", "text"]
    for row in rows:
        kind = evaluate(resources.lm(own), load_examples("mmlu", split="val"), kinds=[row["form"]],
                        shots=by_domain(load_examples("mmlu", split="dev")))
        best = kind.loc[kind.groupby("example_id")["loglikelihood"].idxmax(), "is_right"]
        assert row["n"] == 12 and row["accuracy"] == pytest.approx(100 * best.mean()) and row["chance"] == 25
        assert row["parameters"] == sum(one.numel() for one in resources.lm(own).model.parameters())
    key = own.key("answer_forms")
    write_mmlu(tmp_path, {"test": 3})
    assert opened().key("answer_forms") == key
    write_mmlu(tmp_path, {"val": 7})
    assert opened().key("answer_forms") != key
