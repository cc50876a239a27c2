"""Stages of the chapter on training domains on the smoke run: each cell against a run of its own, each test naively."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import spearmanr

import sts
from sts.errors import StsError
from sts.measure.training_sets import list_lead
from sts.run import resources, verify
from sts.run.others import EVERY_SET, trainings_of
from sts.run.recorded import record
from sts.run.store import Store

SETS = ["gsm_symbolic", "mmlu_exemplars", "gsm_symbolic+mmlu_exemplars"]


@pytest.fixture(scope="module")
def run():
    return sts.open_run("smoke")


def of_set(run, name):
    """The run trained on one of its training sets."""
    return next(own for own in trainings_of(run) if own.settings.sft_data == name)


def cells_of(run, **wanted):
    cells = run.get("training_matrix")
    for column, value in wanted.items():
        cells = cells[cells[column] == value]
    return cells


# --- one run for each training set --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SETS)
def test_a_training_set_is_a_run_of_its_own_with_the_same_sae(run, name):
    alone = sts.open_run("smoke", results=run.results, sft_data=name)
    other = of_set(run, name)
    assert {stage: other.key(stage) for stage in (*EVERY_SET, "sae")} == {
        stage: alone.key(stage) for stage in (*EVERY_SET, "sae")}
    assert resources.reader(other) is resources.reader(run) and resources.lm(other) is resources.lm(run)
    assert other.store is run.store and other.settings.seed == 0


def test_an_unknown_training_set_is_refused_at_once(run):
    with pytest.raises(StsError, match="sft_data.*data set 'gsm9k' is not known. Valid"):
        run.variant(sft_data="gsm9k")
    with pytest.raises(StsError, match="training_sets.*'gsm9k' is not known"):
        sts.open_run("smoke", training_sets=["gsm9k"])


# --- the matrix ---------------------------------------------------------------------------------------------------

def test_cells_are_the_numbers_of_each_training_sets_own_run(run):
    matrix = run.get("training_matrix")
    assert list(matrix["training_set"].unique()) == SETS
    assert set(matrix["measure"]) == {"accuracy", "p_right", "bits"}
    assert len(matrix) == 3 * 14 * 3 and set(matrix["seed"]) == {0}
    for name in SETS:
        alone = sts.open_run("smoke", results=run.results, sft_data=name)
        shifts = alone.get("domain_shift").query("measure == 'bits'").set_index("domain")
        scores = alone.get("scores").set_index(["variant", "domain"])
        cells = cells_of(run, training_set=name, measure="bits").set_index("domain")
        assert cells["shift"].to_dict() == shifts["shift"].to_dict()
        assert cells["high"].to_dict() == shifts["high"].to_dict() and (cells["n"] == 2).all()
        for variant, prefix in (("paper", "sts"), ("official_code", "official")):
            for score in ("act", "icl"):
                assert cells[f"{prefix}_{score}"].to_dict() == scores.loc[variant][f"sts_{score}"].to_dict()
        log = json.loads((alone.get("sft") / "training.json").read_text())
        assert cells["loss_fall"].iloc[0] == pytest.approx(1 - log["held_out_after"] / log["held_out_before"])


def test_only_a_training_set_of_one_domain_has_a_domain_of_its_own(run):
    named = {name: set(cells_of(run, training_set=name)["trained_domain"]) for name in SETS}
    assert named == {SETS[0]: {"math"}, SETS[1]: {"several"}, SETS[2]: {"several"}}


def top(values, count=16):
    return set(np.argsort(-values.numpy(), kind="stable")[:count].tolist())


def test_shared_latents_are_counted_between_every_two_training_sets(run):
    found = run.get("training_overlap")
    moved = {name: top(of_set(run, name).get("sft_shift")["sae/squared_difference_L"]) for name in SETS}
    shift = {name: of_set(run, name).get("shift") for name in SETS}
    assert len(found["rows"]) == 9 and (found["n"], found["width"]) == (16, 128)
    for row in found["rows"]:
        estimated, fires = (top(shift[row["estimated"]][field]) for field in ("squared_difference_L", "base_fired_L"))
        assert row["foreseen"] == len(estimated & moved[row["trained"]])
        assert row["by_rate"] == len(fires & moved[row["trained"]])
        assert row["estimates"] == len(estimated & top(shift[row["trained"]]["squared_difference_L"]))
        if row["estimated"] == row["trained"]:
            assert set(cells_of(run, training_set=row["trained"])["overlap"]) == {row["foreseen"]}
    shared = np.array([row["foreseen"] for row in found["rows"]]).reshape(3, 3)
    assert found["lead"]["foreseen"]["lead"] == pytest.approx(
        shared.trace() / 3 - (shared.sum() - shared.trace()) / 6)
    beyond, lead = list_lead(found["rows"], "foreseen", "by_rate"), found["lead"]
    assert beyond["lead"] == pytest.approx(lead["foreseen"]["lead"] - lead["by_rate"]["lead"])
    more = np.array([row["foreseen"] - row["by_rate"] for row in found["rows"]]).reshape(3, 3)
    traces = [sum(more[row, column] for column, row in enumerate(order)) for order in itertools.permutations(range(3))]
    assert beyond["p"] == pytest.approx(np.mean([trace >= traces[0] for trace in traces]))


def test_the_pooled_test_ranks_training_sets_in_each_domain(run):
    rows = {(row["measure"], row["forecast"]): row for row in run.get("training_specificity")}
    assert set(rows) == {(measure, name) for measure in ("accuracy", "p_right", "bits")
                         for name in ("sts_act", "sts_icl", "tfidf")}
    for forecast in ("sts_act", "sts_icl", "tfidf"):
        cells = cells_of(run, measure="bits")
        expected = [spearmanr(own[forecast], own["shift"].abs())[0] for _, own in cells.groupby("domain")]
        row = rows["bits", forecast]
        assert row["by_domain"] == pytest.approx(expected) and row["within"] == pytest.approx(np.mean(expected))
        assert (row["training_sets"], row["domains"], row["seeds"], row["orders"]) == (3, 14, 1, 6)


def test_further_seeds_train_every_set_again_and_are_averaged(run):
    both = sts.open_run("smoke", results=run.results, training_seeds=[0, 1], domains=["law", "math", "physics"])
    assert [(own.settings.sft_data, own.settings.seed) for own in trainings_of(both)] == [
        (name, seed) for name in SETS for seed in (0, 1)]
    matrix = both.get("training_matrix")
    assert len(matrix) == 2 * 3 * 3 * 3
    own = matrix.query("measure == 'bits'").set_index(["training_set", "seed", "domain"])["shift"]
    assert own["mmlu_exemplars", 0, "law"] != own["mmlu_exemplars", 1, "law"]
    assert own["gsm_symbolic", 1, "law"] == both.variant(seed=1).get("domain_shift").query(
        "measure == 'bits' and domain == 'law'")["shift"].iloc[0]
    row = next(row for row in both.get("training_specificity")
               if (row["measure"], row["forecast"]) == ("bits", "sts_act"))
    cells = matrix.query("measure == 'bits'")
    expected = [np.mean([spearmanr(rows["sts_act"], rows["shift"].abs())[0] for _, rows in own.groupby("seed")])
                for _, own in cells.groupby("domain")]
    assert row["seeds"] == 2 and row["by_domain"] == pytest.approx(expected)


# --- keys and resuming --------------------------------------------------------------------------------------------

NAMES = ("training_matrix", "training_correlations", "training_overlap", "training_specificity")


def test_keys_follow_every_training_sets_stages(run):
    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        return {name for name in NAMES if other.key(name) != run.key(name)}

    assert keys(training_sets=["mmlu_exemplars"]) == keys(sft_lr=1e-3) == keys(top_n=8) == set(NAMES)
    assert keys(training_seeds=[1]) == set(NAMES) and keys(seeds=[1, 2]) == keys(small_sae_k=2) == set()


def test_what_was_stored_for_a_training_set_is_not_computed_again(run):
    run.get("training_matrix")
    stored = {path: path.stat().st_mtime_ns for path in run.store.folder.glob("s*")}  # sft, shift, scores, ...
    for path in run.store.folder.glob("training_matrix-*"):
        path.unlink()
    sts.open_run("smoke").get("training_matrix")
    assert stored and all(path.stat().st_mtime_ns == time for path, time in stored.items())


def test_the_matrix_can_be_verified(run):
    run.get("training_matrix")
    assert verify.verify(sts.open_run("smoke"), "training_matrix") == []


# --- training sets that are not there -----------------------------------------------------------------------------

def test_a_training_set_from_a_local_folder_is_used(monkeypatch, tmp_path):
    (tmp_path / "mbpp").mkdir()
    rows = [{"text": f"Write a function to add {index}.", "code": f"def f(x):\n    return x + {index}"}
            for index in range(40)]
    (tmp_path / "mbpp" / "all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    run = sts.open_run("smoke", training_sets=["mbpp"], domains=["computer science", "law", "math"])
    cells = run.get("training_matrix")
    assert set(cells[cells["training_set"] == "mbpp"]["trained_domain"]) == {"computer science"}


def test_one_training_set_alone_has_nothing_to_be_compared_with():
    run = sts.open_run("smoke", training_sets=[])
    assert all("at least two" in row["undefined"] for row in run.get("training_specificity"))
    assert {kind: list(row) for kind, row in run.get("training_overlap")["lead"].items()} == {
        "foreseen": ["undefined"], "by_rate": ["undefined"]}
    json.dumps([run.get(name) for name in NAMES[1:]], allow_nan=False)


def test_recorded_results_need_neither_the_model_nor_any_training_sets_data(run, tmp_path, monkeypatch):
    for name in NAMES:
        run.get(name)
    record(run, tmp_path / "recorded")
    assert not list((tmp_path / "recorded").glob(f"sft-{of_set(run, 'mmlu_exemplars').key('sft')}/*"))
    identity = resources.identity

    def gone(run, what):
        if what in ("sae", "seeds", "training_sets"):  # made of keys
            return identity(run, what)
        raise StsError("not here")

    monkeypatch.setattr(resources, "identity", gone)
    elsewhere = sts.open_run("smoke", results=tmp_path)
    elsewhere.store = Store(elsewhere.store.folder, (tmp_path / "recorded",))
    # Each training set's own, although no setting that the stage uses tells them apart.
    assert {name: of_set(elsewhere, name).key("sft") for name in SETS} == {
        name: of_set(run, name).key("sft") for name in SETS}
    assert elsewhere.get("training_matrix").equals(run.get("training_matrix"))
    assert all(elsewhere.get(name) == run.get(name) for name in NAMES[1:])
    assert not list(tmp_path.glob("stages/*"))
