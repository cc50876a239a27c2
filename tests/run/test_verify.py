"""Verifying a stage: what counts as the same, which difference is named, and that the store is left alone."""

import math

import pandas
import pytest
import torch
from safetensors.torch import save_file

from sts.errors import StsError
from sts.run import verify
from sts.run.run import open_run
from sts.run.stage import STAGES, stage

FRAME = pandas.DataFrame({"domain": ["law", "math"], "n": [3, 4], "shift": [0.25, math.nan], "hit": [True, None],
                          "ids": [[1, 2], [3]]})
TENSORS = {"sum_L": torch.tensor([[1.0, 2.0], [3.0, math.nan]]), "count": torch.tensor([7, 8])}
JSON = {"r": 0.5, "n": 14, "rows": [{"p": 0.01, "domain": "law"}, {"p": math.nan, "domain": None}]}


def changed(frame, row, column, value):
    copy = frame.copy()
    copy.at[row, column] = value
    return copy


@pytest.mark.parametrize("value", [JSON, FRAME, TENSORS], ids=["json", "parquet", "tensors"])
def test_a_result_agrees_with_itself_nan_included(value):
    assert verify.differences(value, value, 0.0) == [] and len(list(verify.flat(value))) >= 2


@pytest.mark.parametrize(("stored", "computed", "where"), [
    (JSON, JSON | {"r": 0.6}, "r: stored 0.5, computed 0.6"),
    (JSON, JSON | {"n": 15}, "n: stored 14, computed 15"),
    (JSON, JSON | {"rows": [{"p": 0.01, "domain": "art"}, JSON["rows"][1]]},
     "rows[0].domain: stored 'law', computed 'art'"),
    (JSON, JSON | {"rows": [JSON["rows"][0], {"domain": None}]}, "rows[1].p: stored nan, computed nothing"),
    (JSON, {**JSON, "extra": 1}, "extra: stored nothing, computed 1"),
    ([1, True], [1, 1.5], "[1]: stored True, computed 1.5"),
    ({"domain": None}, {"domain": "None"}, "domain: stored None, computed 'None'"),
    (FRAME, changed(FRAME, 0, "shift", 0.3), "shift[0]: stored 0.25, computed 0.3"),
    (FRAME, changed(FRAME, 1, "shift", 0.3), "shift[1]: stored None, computed 0.3"),
    (FRAME, changed(FRAME, 1, "n", 5), "n[1]: stored 4, computed 5"),
    (FRAME, changed(FRAME, 1, "hit", False), "hit[1]: stored None, computed False"),
    (FRAME, changed(FRAME, 0, "ids", [1, 9]), "ids[0][1]: stored 2, computed 9"),
    (FRAME[["n"]], FRAME[["n"]][:1], "n[1]: stored 4, computed nothing"),
    (TENSORS, TENSORS | {"sum_L": torch.tensor([[1.0, 2.0], [4.0, math.nan]])},
     "sum_L[1, 0]: stored 3.0, computed 4.0"),
    (TENSORS, TENSORS | {"count": torch.tensor([7, 9])}, "count[1]: stored 8, computed 9"),
    (TENSORS, TENSORS | {"count": torch.tensor([7.0, 8.0])}, "count: stored int64 (2,), computed float64 (2,)"),
    (TENSORS, TENSORS | {"count": torch.tensor([[7, 8]])}, "count: stored int64 (2,), computed int64 (1, 2)"),
    (TENSORS, {"count": TENSORS["count"]}, "sum_L: stored float64 (2, 2), computed nothing")])
def test_one_difference_is_found_and_named(stored, computed, where):
    found = verify.differences(stored, computed, 1e-6)
    assert len(found) == 1 and found[0].startswith(where)


@pytest.mark.parametrize(("first", "second", "relative"), [
    (1.0, 1.0, 0), (0.0, -0.0, 0), (math.nan, math.nan, 0), (math.inf, math.inf, 0), (0.0, 1e-300, 1),
    (1.0, 1.001, 0.001 / 1.001), (-1.0, 1.0, 2), (1.0, math.nan, math.inf), (math.inf, 1.0, math.inf),
    (1e308, -1e308, 2)])
def test_floats_are_compared_by_their_relative_difference(first, second, relative):
    for tolerance in (0, 1e-6, 1e-2, 0.5):
        assert bool(verify.differences(first, second, tolerance)) == (relative > tolerance)


@pytest.mark.parametrize(("one", "other"), [
    ({"x": [1.0, 2.0]}, {"x": [1.0, 2.0002]}),
    (pandas.DataFrame({"x": [1.0, 2.0]}), pandas.DataFrame({"x": [1.0, 2.0002]})),
    ({"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([1.0, 2.0002])})])
def test_floats_agree_within_the_tolerance_and_not_beyond(one, other):
    wide, narrow = (verify.differences(one, other, tolerance) for tolerance in (1.1e-4, 0.9e-4))
    assert not wide and narrow


def test_whole_numbers_have_no_tolerance():
    assert verify.differences({"n": 1_000_000}, {"n": 1_000_001}, 0.1)


def test_folders_are_compared_by_training_record_and_weights(tmp_path):
    def folder(name, loss=2.5, weight=1.0, config="{}"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "training.json").write_text(f'{{"curve": [{{"loss": {loss}}}]}}')
        (tmp_path / name / "adapter" / "adapter_config.json").write_text(config)
        save_file({"a": torch.tensor([weight])}, tmp_path / name / "adapter" / "adapter_model.safetensors")
        return tmp_path / name

    stored = folder("stored")
    assert not verify.differences(stored, folder("same", config='{"path": "/elsewhere"}'), 1e-6)
    found = verify.differences(stored, folder("loss", loss=2.6), 1e-6)
    assert found[0].startswith("training.json.curve[0].loss: stored 2.5, computed 2.6")
    found = verify.differences(stored, folder("weight", weight=1.5), 1e-6)
    assert found[0].startswith("adapter/adapter_model.safetensors.a[0]: stored 1.0, computed 1.5")
    less = folder("less")
    (less / "adapter" / "adapter_model.safetensors").unlink()
    found = verify.differences(stored, less, 1e-6)
    assert found[0].startswith("adapter/adapter_model.safetensors.a: stored float64 (1,), computed nothing")


# --- against the store ---

@pytest.fixture
def counted(registry):
    """Two stages, the second made of the first; `offset` shifts what the second computes, `calls` counts both."""
    state = {"offset": 0.0, "calls": []}

    @stage("tensors")
    def first(seed):
        """The one that is needed."""
        state["calls"].append("first")
        return {"x": torch.tensor([1.0 + seed], dtype=torch.float64), "y": torch.tensor(1.0 + state["offset"])}

    @stage("json")
    def second(first, seed, dtype):
        """The one that is verified."""
        state["calls"].append("second")
        return {"x": first["x"].item() + state["offset"]}

    return state


def files_of(run):
    return {path.relative_to(run.results): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in run.results.rglob("*") if path.is_file()}


def test_a_stage_is_computed_again_from_what_is_stored_and_the_store_is_left_alone(counted, tmp_path):
    run = open_run("smoke", results=tmp_path)
    run.get("second")
    before = files_of(run)
    assert not verify.verify(run, "second")
    assert counted["calls"] == ["first", "second", "second"]
    counted["offset"] = 0.5
    found = verify.verify(open_run("smoke", results=tmp_path), "second")
    assert found[0].startswith("x: stored 1.0, computed 1.5")
    assert not verify.verify(run, "second", tolerance=0.4)
    assert files_of(run) == before
    assert [path.name for path in run.results.iterdir()] == ["stages"]


@pytest.mark.parametrize(("damaged", "message"), [
    ("second", "'second' cannot be verified: run 'smoke' has no undamaged result of second.*first: sts stage second"),
    ("first", "'second' cannot be verified: run 'smoke' has no undamaged result of first.*first: sts stage first")])
def test_what_is_not_stored_or_damaged_cannot_be_verified(counted, tmp_path, damaged, message):
    run = open_run("smoke", results=tmp_path)
    run.get("second")
    path = run.store.find(damaged, run.key(damaged), STAGES[damaged].kind)
    path.write_bytes(path.read_bytes() + b" ")
    before = files_of(run)
    with pytest.raises(StsError, match=message):
        verify.verify(run, "second")
    assert files_of(run) == before


def test_other_settings_are_another_result(counted, tmp_path):
    open_run("smoke", results=tmp_path).get("second")
    with pytest.raises(StsError, match="under these settings"):
        verify.verify(open_run("smoke", results=tmp_path, seed=5), "second")


@pytest.mark.parametrize(("name", "dtype", "agrees"), [
    ("second", "float32", False), ("second", "bfloat16", True), ("first", "bfloat16", False)])
def test_the_default_tolerance_depends_on_the_precision_of_the_models_passes(counted, tmp_path, name, dtype, agrees):
    run = open_run("smoke", results=tmp_path, dtype=dtype)
    run.get("second")
    counted["offset"] = 0.005  # 0.5%; the first stage reads no dtype, so it runs no model
    assert (verify.verify(run, name) == []) == agrees


def test_a_stage_of_the_book_comes_out_again(tmp_path):
    run = open_run("smoke", results=tmp_path)
    run.get("shift")
    found = verify.verify(run, "shift")
    assert found == []
