"""The store and the stages: what is written comes back, damage is noticed, and only what changed is computed again."""

import hashlib
import json
import os
import subprocess
import sys
import time
from itertools import product

import pandas
import pytest
import torch
from pandas.testing import assert_frame_equal

from sts.errors import ROOT, StsError
from sts.run.resources import lm, reader
from sts.run.run import OpenRun, open_run
from sts.run.stage import STAGES, stage
from sts.run.store import Store, read

TENSORS = {"float64": torch.tensor([1 / 3, 1e300], dtype=torch.float64), "turned": torch.arange(6.0).reshape(2, 3).T,
           "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16), "count": torch.tensor(7)}
FRAME = pandas.DataFrame({"domain": ["law", "mäth"], "n": [1, 2], "shift": [0.1, float("nan")], "hit": [True, False]})
VALUES = {"json": {"text": "zwölf", "list": [1, 2.5, None, True], "deep": {"a": []}}, "parquet": FRAME,
          "tensors": TENSORS, "folder": {"a.txt": "one", "deep/b.txt": "two"}}
KINDS = list(VALUES)


def put(store, kind, value=None, key="k1", **provenance):
    """Store a value as a stage would; for folders it is file names and texts."""
    value = VALUES[kind] if value is None else value
    if kind == "folder":
        work = store.scratch("result", key)
        for name, text in value.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text, encoding="utf-8")
        value = work
    return store.write("result", key, kind, value, provenance)


def assert_is(path, kind, expected):
    found = read(path, kind)
    if kind == "parquet":
        assert_frame_equal(found, expected)
    elif kind == "tensors":
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
                   for name, tensor in expected.items())
    elif kind == "folder":
        assert {item.relative_to(found).as_posix(): item.read_text(encoding="utf-8")
                for item in found.rglob("*") if item.is_file()} == expected
    else:
        assert found == expected


def some_file(path):
    return path if path.is_file() else path / "a.txt"


def bytes_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "stages")


# --- the store ---

@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back(store, kind):
    assert store.find("result", "k1", kind) is None
    put(store, kind)
    assert_is(store.find("result", "k1", kind), kind, VALUES[kind])


def test_results_with_other_keys_lie_side_by_side(store):
    put(store, "json", {"n": 1}, key="k1")
    put(store, "json", {"n": 2}, key="k2")
    assert [read(store.find("result", key, "json"), "json")["n"] for key in ("k1", "k2")] == [1, 2]
    assert store.find("result", "k3", "json") is None


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("kind", "damage"), [*product(KINDS, [truncate, alter, os.remove])])
def test_a_damaged_result_counts_as_missing_and_can_be_written_again(store, kind, damage):
    damage(some_file(put(store, kind)))
    assert store.find("result", "k1", kind) is None
    put(store, kind)
    assert_is(store.find("result", "k1", kind), kind, VALUES[kind])


@pytest.mark.parametrize("change", [lambda folder: (folder / "new.txt").write_text("x"),
                                    lambda folder: (folder / "a.txt").rename(folder / "c.txt")])
def test_a_folder_with_other_files_counts_as_missing(store, change):
    change(put(store, "folder"))
    assert store.find("result", "k1", "folder") is None


@pytest.mark.parametrize("damage", [truncate, os.remove, lambda file: file.write_text("{}")])
def test_a_result_without_readable_provenance_counts_as_missing(store, damage):
    path = put(store, "json")
    beside = path.with_name(path.name + ".provenance.json")
    truncate(beside)  # the final newline: still whole
    assert store.find("result", "k1", "json") == path
    damage(beside)
    assert store.find("result", "k1", "json") is None


def test_provenance_holds_what_was_recorded_and_the_files_sha256(store):
    assert store.provenance("result", "k1", "json") == {}
    path = put(store, "json", seed=3, settings={"top_n": 5})
    assert store.provenance("result", "k1", "json") == {
        "seed": 3, "settings": {"top_n": 5}, "checksum": hashlib.sha256(path.read_bytes()).hexdigest()}


REPLACEMENTS = {"json": {"new": 1}, "parquet": FRAME.iloc[:1], "tensors": {"new": torch.ones(2)},
                "folder": {"new.txt": "new"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_before_the_rename_leaves_the_old_result_readable(store, monkeypatch, kind):
    put(store, kind)

    def crash(*names):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            put(store, kind, REPLACEMENTS[kind])
    path = store.find("result", "k1", kind)
    assert path is not None
    assert_is(path, kind, VALUES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_between_the_renames_never_serves_a_result_with_anothers_provenance(store, monkeypatch, kind):
    put(store, kind, version=1)
    replace = os.replace

    def crash(source, target):
        if not str(target).endswith(".provenance.json"):
            raise OSError("power cut")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            put(store, kind, REPLACEMENTS[kind], version=2)
    assert store.find("result", "k1", kind) is None
    put(store, kind, REPLACEMENTS[kind], version=2)
    assert_is(store.find("result", "k1", kind), kind, REPLACEMENTS[kind])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_json(store, value):
    put(store, "json", {"p": 0.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        put(store, "json", {"p": value})
    assert read(store.find("result", "k1", "json"), "json") == {"p": 0.5}


def test_unfinished_work_is_kept_until_its_result_is_stored(store):
    (store.scratch("result", "k1") / "half.txt").write_text("half")
    assert (store.scratch("result", "k1") / "half.txt").read_text() == "half"
    put(store, "json")
    assert list(store.scratch("result", "k1").iterdir()) == []


def test_recorded_results_are_read_and_never_written(tmp_path):
    put(Store(tmp_path / "recorded"), "json", {"from": "recorded"}, note="published")
    before = bytes_below(tmp_path / "recorded")
    store = Store(tmp_path / "own", (tmp_path / "recorded",))
    assert read(store.find("result", "k1", "json"), "json") == {"from": "recorded"}
    assert store.provenance("result", "k1", "json")["note"] == "published"
    put(store, "json", {"from": "own"}, note="mine")
    assert read(store.find("result", "k1", "json"), "json") == {"from": "own"}
    assert store.provenance("result", "k1", "json")["note"] == "mine"
    assert bytes_below(tmp_path / "recorded") == before


def test_a_damaged_recorded_result_is_computed_into_the_own_folder(tmp_path):
    alter(put(Store(tmp_path / "recorded"), "json", {"from": "recorded"}))
    before = bytes_below(tmp_path / "recorded")
    store = Store(tmp_path / "own", (tmp_path / "recorded",))
    assert store.find("result", "k1", "json") is None
    assert put(store, "json").parent == tmp_path / "own"
    assert bytes_below(tmp_path / "recorded") == before


# --- stages ---

@pytest.fixture
def calls(registry):
    """Names of the fake stages computed so far: alpha feeds beta, gamma stands alone."""
    made = []
    register(made)
    return made


def register(made, alpha_version=1, beta_fails=False):
    @stage("json", version=alpha_version)
    def alpha(seed):
        """Alpha."""
        made.append("alpha")
        return {"seed": seed}

    @stage("parquet")
    def beta(alpha, top_n):
        """Beta."""
        made.append("beta")
        if beta_fails:
            raise RuntimeError("beta fell over")
        return pandas.DataFrame({"value": [alpha["seed"] * 100 + top_n]})

    @stage("tensors")
    def gamma(bootstrap):
        """Gamma."""
        made.append("gamma")
        return {"value": torch.tensor([bootstrap])}


def everything(folder, **changes):
    run = open_run("smoke", results=folder, **{"seed": 1, "top_n": 2, **changes})
    return int(run.get("beta")["value"][0]), int(run.get("gamma")["value"])


def test_a_stored_stage_is_loaded_and_not_computed_again(tmp_path, calls):
    assert everything(tmp_path) == (102, 500)
    assert sorted(calls) == ["alpha", "beta", "gamma"]
    assert everything(tmp_path) == (102, 500)
    assert len(calls) == 3


@pytest.mark.parametrize(("changes", "expected", "again"), [
    ({"top_n": 3}, (103, 500), ["beta"]),
    ({"seed": 2}, (202, 500), ["alpha", "beta"]),
    ({"bootstrap": 600}, (102, 600), ["gamma"]),
    ({"score_tokens": 7, "device": "cpu"}, (102, 500), [])])
def test_a_changed_setting_recomputes_what_depends_on_it_and_nothing_else(tmp_path, calls, changes, expected, again):
    everything(tmp_path)
    calls.clear()
    assert everything(tmp_path, **changes) == expected
    assert sorted(calls) == again
    calls.clear()
    assert everything(tmp_path) == (102, 500)  # the first results are still there
    assert calls == []


def test_profiles_share_what_is_equal(tmp_path, calls):
    everything(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text((ROOT / "runs" / "smoke.yaml").read_text() + "published: true\n")
    calls.clear()
    run = open_run(str(other), results=tmp_path, seed=1, top_n=3)
    assert (int(run.get("beta")["value"][0]), run.settings.name) == (103, "other")
    assert calls == ["beta"] and run.provenance("alpha")["run"] == "smoke"


def test_raising_a_version_recomputes_the_stage_and_its_dependants(tmp_path, calls):
    everything(tmp_path)
    calls.clear()
    register(calls, alpha_version=2)
    everything(tmp_path)
    assert sorted(calls) == ["alpha", "beta"]


def test_a_stage_that_fails_leaves_finished_inputs_stored(tmp_path, calls):
    register(calls, beta_fails=True)
    with pytest.raises(RuntimeError, match="beta fell over"):
        everything(tmp_path)
    assert calls == ["alpha", "beta"]
    run = open_run("smoke", results=tmp_path, seed=1, top_n=2)
    assert run.stored("alpha") and not run.stored("beta")
    calls.clear()
    register(calls)
    assert everything(tmp_path) == (102, 500)
    assert sorted(calls) == ["beta", "gamma"]


def test_a_damaged_stage_is_computed_again(tmp_path, calls):
    everything(tmp_path)
    calls.clear()
    alter(next(tmp_path.rglob("gamma-*.safetensors")))
    assert everything(tmp_path) == (102, 500)
    assert calls == ["gamma"]


def test_a_run_keeps_results_in_memory_and_says_what_it_used(tmp_path, calls):
    run = open_run("smoke", results=tmp_path)
    first = run.get("beta")
    assert run.get("beta") is first
    assert sorted(calls) == ["alpha", "beta"]
    assert set(run.used) == {"alpha", "beta"}


def test_changed_data_recomputes_what_reads_it(tmp_path, calls, monkeypatch):
    @stage("json")
    def delta(questions):
        """Delta."""
        calls.append("delta")
        return {domain: [example.question for example in group] for domain, group in questions.items()}

    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data" / "mmlu").mkdir(parents=True)

    def asked(text):
        row = {"subject": "virology", "question": text, "choices": ["a", "b"], "answer": 0}
        for split in ("test", "dev", "val"):
            (tmp_path / "data" / "mmlu" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        return open_run("smoke", results=tmp_path, domain_data="mmlu").get("delta")

    assert asked("first?") == asked("first?") == {"virology": ["first?"]}
    assert calls == ["delta"]
    assert asked("second?") == {"virology": ["second?"]}
    assert calls == ["delta", "delta"]


def test_provenance_says_how_a_result_was_made(tmp_path, calls):
    everything(tmp_path)
    run = open_run("smoke", results=tmp_path, seed=1, top_n=2)
    record = run.provenance("beta")
    assert record["run"] == "smoke" and record["settings"] == {"top_n": 2} and record["seed"] == 1
    assert record["needs"] == {"alpha": run.key("alpha")} and record["key"] == run.key("beta")
    assert record["versions"]["torch"].startswith("2.") and record["finished"].startswith("20")
    assert record["seconds"] >= 0 and record["process_peak_memory_mb"] > 0


def test_an_unknown_stage_lists_the_valid_ones(tmp_path):
    with pytest.raises(StsError, match="Stage 'score' is not known. Valid: .*scores.*shift.*Did you mean 'scores'"):
        open_run("smoke", results=tmp_path).get("score")


def test_nothing_in_the_store_is_a_pickle(tmp_path, calls):
    @stage("folder")
    def epsilon(seed, scratch):
        """Epsilon."""
        (scratch / "note.txt").write_text("note")
        return scratch

    everything(tmp_path)
    assert (open_run("smoke", results=tmp_path).get("epsilon") / "note.txt").read_text() == "note"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".parquet", ".safetensors", ".txt"}
    # Pickles start with 0x80, torch.save's archives with PK.
    assert [path.name for path in files if path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] == b"PK"] == []


# --- variants and declarations ---

def test_a_variant_shares_the_store_and_what_is_equal(tmp_path, calls):
    run = open_run("smoke", results=tmp_path, seed=1)
    run.get("gamma")
    other = run.variant(top_n=3)
    assert other.store is run.store and other.settings.top_n == 3 and run.settings.top_n == 16
    assert other.get("gamma") is run.get("gamma") and calls == ["gamma"]
    assert run.variant(top_n=3) is other and run.variant(top_n=16) is run
    assert other.changed == {"seed": 1, "top_n": 3}
    with pytest.raises(StsError, match="'topn' is not known.*Did you mean 'top_n'"):
        run.variant(topn=3)


def test_runs_of_other_seeds_and_training_sets_read_one_trained_sae_and_those_of_another_layer_do_not(tmp_path):
    run = open_run("smoke", results=tmp_path)
    key = run.key("sae")
    for same in ({"seed": 1}, {"sft_data": "mmlu_exemplars", "seed": 2}, {"demonstrations": 2}):
        assert run.variant(**same).key("sae") == key
    for opened in ({"seed": 1}, {"seed": 1, "sft_data": "mmlu_exemplars"}):  # as a job of a workflow is
        assert open_run("smoke", results=tmp_path, **opened).key("sae") == key
    for other in ({"layer": 1}, {"sae_k": 4}, {"context": 64}):
        assert run.variant(**other).key("sae") != key
        assert run.variant(**other).variant(seed=1).key("sae") == run.variant(**other).key("sae")
    assert lm(run.variant(seed=1)) is lm(run) and lm(run.variant(dtype="bfloat16")) is not lm(run)


def test_a_signature_declares_what_the_key_is_made_of(registry):
    @stage("json", also=("fold_norms",), inputs_without=("text_data",))
    def declared(lm, texts, masks, scores, top_n, report, work, scratch, device, passes, variant):
        """Declared."""

    spec = registry["declared"]
    assert set(spec.uses) == {"model", "model_revision", "dtype", "text_data", "text_examples", "context", "seed",
                              "question_tokens_only", "drop_first_positions", "outlier_norm", "top_n", "fold_norms"}
    assert (spec.needs, spec.inputs) == (("scores",), ("model",))


def test_tokens_per_batch_device_and_published_are_in_no_key(tmp_path):
    run = open_run("smoke", results=tmp_path)
    other = run.variant(tokens_per_batch=512, published=True, device="cpu")
    names = [name for name in STAGES if name != "sweep_correlations"]
    assert {name: other.key(name) for name in names} == {name: run.key(name) for name in names}
    assert not {"tokens_per_batch", "published", "device"} & {name for spec in STAGES.values() for name in spec.uses}


# --- two processes at one stage ---

SLOW = """
import sys, time
from pathlib import Path
from sts.run.run import open_run
from sts.run.stage import STAGES, stage

folder = Path(sys.argv[1])

@stage("json")
def slow(seed, scratch):
    with open(folder / "calls", "a") as stream:
        stream.write("call\\n")
    while sys.argv[2] == "hang":
        time.sleep(0.1)
    time.sleep(1.5)
    return {"from": sys.argv[2]}

(folder / f"ready-{sys.argv[2]}").touch()
while len(list(folder.glob("ready-*"))) < int(sys.argv[3]):
    time.sleep(0.01)
print(open_run("smoke", results=folder).get("slow")["from"])
"""


def start(folder, name, together=1):
    return subprocess.Popen([sys.executable, "-c", SLOW, str(folder), name, str(together)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_two_processes_at_one_stage_one_computes_and_both_have_its_result(tmp_path):
    processes = [start(tmp_path, name, together=2) for name in ("first", "second")]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert len({output for output, _ in told}) == 1 and told[0][0].strip() in ("first", "second")
    assert (tmp_path / "calls").read_text() == "call\n"
    assert not list(tmp_path.rglob("*.lock"))


def test_a_process_that_is_killed_holds_nobody_up(tmp_path):
    holder = start(tmp_path, "hang")
    wait_for(tmp_path / "calls")
    waiting = start(tmp_path, "second")
    wait_for(tmp_path / "ready-second")
    time.sleep(1)
    assert waiting.poll() is None and (tmp_path / "calls").read_text() == "call\n"
    holder.kill()
    killed = time.monotonic()
    while (tmp_path / "calls").read_text() == "call\n":
        assert time.monotonic() - killed < 60
        time.sleep(0.05)
    output, error = waiting.communicate(timeout=120)
    holder.communicate()
    assert (waiting.returncode, output) == (0, "second\n"), error


# --- settings that the SAE rules out ---

def test_an_sae_that_is_not_known_is_refused_when_the_run_is_opened(tmp_path):
    with pytest.raises(StsError, match="SAE 'nowhere' is not known"):
        open_run("smoke", results=tmp_path, sae="nowhere")


def test_more_latents_than_the_sae_has_are_refused_when_it_is_loaded(tmp_path):
    settings = open_run("smoke").settings.model_copy(update={"top_n": 129})
    with pytest.raises(StsError, match="the SAE has 128"):
        reader(OpenRun(settings, results=tmp_path))
