"""What is recorded of a run, and pages' results from it without model and data."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import sts
from sts.errors import ROOT, MissingData, StsError
from sts.run.others import rl_runs_of, seeds_of, trainings_of
from sts.run.recorded import BLANK, CHANGED, NO_TEXT, record, recorded_key, texts_withheld
from sts.run.resources import identity, lm
from sts.run.stage import STAGES, Stage
from sts.run.store import Store
from sts.run.verify import verify

NAMES = ("scores", "latent_examples", "small_sae_quality", "sft_shift", "ablated_answers", "domain_shift",
         "text_baselines", "sweep_latents")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    opened = sts.open_run("smoke", results=tmp_path_factory.mktemp("recorded-run"), seeds=[])
    for name in NAMES:
        opened.get(name)
    return opened


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("recorded")
    record(run, target)
    return target


@pytest.fixture
def elsewhere(run, folder, tmp_path, monkeypatch):
    """The same run where neither model nor data can be had."""
    def missing(*args, **kwargs):
        raise MissingData("not here")

    for name in ("engine.models.resolve_model", "data.load.load_examples", "data.load.load_mixture"):
        monkeypatch.setattr(f"sts.{name}", missing)
    opened = sts.open_run("smoke", results=tmp_path, seeds=[])
    opened.store = Store(opened.store.folder, (folder,))
    return opened


def test_results_come_back_without_model_and_data(run, elsewhere):
    for name in ("scores", "domain_shift"):
        assert elsewhere.key(name) == run.key(name)
        assert elsewhere.get(name).equals(run.get(name))
    for name, tensor in run.get("sft_shift").items():
        found = elsewhere.get("sft_shift")[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), tensor.double(), rtol=1e-6, atol=0)
    assert elsewhere.provenance("text_activations")["withheld"] == "all of it"


def test_texts_and_weights_are_not_recorded(run, elsewhere, folder):
    written = run.get("ablated_answers")
    cards = run.get("latent_examples")
    content = "".join(path.read_text() for path in folder.glob("*.json"))
    assert written["question"] not in content and NO_TEXT in content
    found = elsewhere.get("latent_examples")
    assert {token for card in found for context in card["contexts"] for token in context["tokens"]} == {BLANK}
    assert [card["contexts"][0]["values"] for card in found] == [card["contexts"][0]["values"] for card in cards]
    assert [path.name for path in elsewhere.get("sft").iterdir()] == ["training.json"]
    assert not list(folder.glob("text_activations-*.safetensors")) and list(folder.glob("shift-*.safetensors"))
    assert all(load_file(path) for path in folder.glob("*.safetensors"))


def test_what_is_not_recorded_says_what_is_missing(elsewhere):
    with pytest.raises(StsError, match="not here"):
        elsewhere.get("text_activations")
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], score_tokens=100)
    other.store = elsewhere.store
    with pytest.raises(StsError, match="not here"):  # other settings: recorded results are not taken for these
        other.get("scores")


def test_scores_with_other_numbers_of_latents_are_computed_from_what_is_recorded(run, elsewhere):
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], sweep_top_n=[3])
    other.store = Store(other.store.folder, elsewhere.store.recorded)
    found = other.get("sweep_latents").query("axis == 'top_n' and value == '3'").set_index("domain")
    chosen = run.get("shift")["squared_difference_L"].argsort(descending=True)[:3]
    sums = run.get("domain_stats")
    act = (sums["law/base_sum_L"][chosen].sum() / sums["law/tokens"]).item()
    assert found.loc["law", "sts_act"] == pytest.approx(act, rel=1e-5)


@pytest.mark.parametrize("stage", ["domain_shift", "sweep_latents"])
def test_recorded_results_are_verified_from_recorded_ones(run, folder, elsewhere, stage):
    assert verify(elsewhere, stage) == []


@pytest.mark.parametrize("stage", ["latent_examples", "domain_stats", "sae"])
def test_what_is_recorded_in_part_is_verified_in_that_part(run, folder, tmp_path, stage):
    opened = sts.open_run("smoke", results=tmp_path, seeds=[])
    for need in opened.needs(stage):  # what it is computed from, such as the SAE's weights, is here
        opened.compute(need)
    opened.store = Store(opened.store.folder, (folder,))
    assert verify(opened, stage) == []


def test_further_seeds_record_their_scores_without_the_sums(run, tmp_path):
    opened = sts.open_run("smoke", results=run.results, seeds=[1])
    seeds_of(opened)[1].get("scores")
    record(opened, tmp_path / "recorded")
    assert len(list((tmp_path / "recorded").glob("scores-*.parquet"))) == 2
    own, = (tmp_path / "recorded").glob("domain_stats-*.safetensors")
    assert opened.key("domain_stats") in own.name
    note = tmp_path / "recorded" / (f"domain_stats-{seeds_of(opened)[1].key('domain_stats')}"
                                       ".safetensors.provenance.json")
    assert json.loads(note.read_text())["withheld"] == "all of it"


def test_an_input_that_is_here_and_differs_is_not_passed_over(elsewhere, monkeypatch):
    assert elsewhere.key("sft")
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[])
    other.store = elsewhere.store
    monkeypatch.setattr("sts.data.load.load_mixture", lambda *args, **kwargs: sts.data.load.gsm_symbolic(24, seed=99))
    with pytest.raises(StsError, match="not here"):
        other.key("sft")


def test_the_hub_is_asked_only_for_what_is_not_recorded(run, tmp_path, monkeypatch):
    """Pages must render in a minute where the hub cannot be reached, and not download where it can."""
    rows, asked = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)], []

    def hub(name, *args, **kwargs):
        asked.append(name)
        return rows

    monkeypatch.delenv("STS_DATA_DIR", raising=False)
    monkeypatch.setattr("datasets.load_dataset", hub)

    def opened(results):
        return sts.open_run("smoke", results=tmp_path / results, seeds=[], sft_data="gsm8k")

    first = opened("first")
    key = first.key("sft")
    assert asked
    spec = STAGES["sft"]
    provenance = {"stage": "sft", "key": key, "version": spec.version, "needs": {},
                  "drawn": {"sft_examples": first.settings.sft_examples},
                  "settings": {name: getattr(first.settings, name) for name in spec.uses},
                  "inputs": {what: identity(first, what) for what in spec.inputs}}
    folder = tmp_path / "recorded"
    folder.mkdir()
    (folder / f"sft-{key}.provenance.json").write_text(json.dumps(provenance))
    asked.clear()
    second = opened("second")
    second.store = Store(second.store.folder, (folder,))
    assert second.key("sft") == key and not asked
    assert second.key("shift") and asked  # not recorded


@pytest.mark.parametrize(("stage", "changed"), [
    ("sft", {"sft_examples": 4}), ("sft", {"sft_held_out": 2}), ("sft", {"seed": 1}), ("sft", {"sft_data": "gsm8k"}),
    ("evaluation_before", {"domain_limit": 3}), ("evaluation_before", {"domains": ["law", "math"]}),
    ("evaluation_before", {"domain_data": "mmlu_pro"}), ("evaluation_before", {"domain_split": "test"}),
    ("text_baselines", {"sft_examples": 4}), ("text_baselines", {"domain_limit": 3}),
    ("domain_stats", {"demonstration_split": "validation"})], ids=str)
def test_a_result_of_other_data_is_not_handed_out(run, elsewhere, stage, changed):
    assert elsewhere.key(stage) == run.key(stage)
    other = sts.open_run("smoke", results=elsewhere.results, **{"seeds": []} | changed)
    other.store = elsewhere.store
    with pytest.raises(StsError, match="not here"):
        other.key(stage)


def test_a_folder_without_settings_of_its_own_is_recorded_by_its_provenance_alone(run, tmp_path):
    opened = sts.open_run("smoke", results=run.results, seeds=[])
    opened.get("sweep_sae_training")
    record(opened, tmp_path / "recorded")
    name = f"sweep_sae_training-{opened.key('sweep_sae_training')}"
    assert not (tmp_path / "recorded" / name).exists()
    assert json.loads((tmp_path / "recorded" / f"{name}.provenance.json").read_text())["withheld"] == "all of it"


def test_weights_are_computed_again_where_they_are_needed(run, folder):
    from sts.engine.finetune import load_tuned

    opened = sts.open_run("smoke", results=run.results, seeds=[])
    opened.store = Store(opened.store.folder.parent / "fresh", (folder,))
    with pytest.raises(StsError, match="sts stage sft --again"):
        load_tuned(lm(opened), opened.get("sft"))


def test_a_stage_that_reads_what_is_not_recorded_names_the_stages_to_compute(run, folder, tmp_path, registry):
    def reads_rest(domain_stats):
        return [domain_stats["math/rest"].item()]

    opened = sts.open_run("smoke", results=tmp_path, seeds=[])
    opened.store = Store(opened.store.folder, (folder,))
    sts.run.stage.stage("json")(reads_rest)
    with pytest.raises(StsError, match="'reads_rest' does not find 'math/rest' .* of domain_stats; .*--again"):
        opened.get("reads_rest")


def test_recording_removes_what_the_run_no_longer_asks_for(run, tmp_path):
    first = sts.open_run("smoke", results=run.results, seeds=[])
    record(first, tmp_path / "recorded")
    second = sts.open_run("smoke", results=run.results, seeds=[], top_n=3)
    second.get("scores")
    record(second, tmp_path / "recorded")
    kept = {path.name.partition(".")[0] for path in (tmp_path / "recorded").iterdir()}
    assert f"scores-{second.key('scores')}" in kept and f"scores-{first.key('scores')}" not in kept
    assert {f"shift-{first.key('shift')}", f"sft-{first.key('sft')}"} <= kept  # they do not depend on N


def test_recording_stops_and_removes_nothing_while_a_training_set_cannot_be_read(run, tmp_path):
    first = sts.open_run("smoke", results=run.results, seeds=[])
    record(first, tmp_path / "recorded")
    before = {path.name for path in (tmp_path / "recorded").iterdir()}
    second = sts.open_run("smoke", results=run.results, seeds=[], top_n=3, training_sets=["counsel_chat"])
    with pytest.raises(MissingData, match="counsel_chat"):
        record(second, tmp_path / "recorded")
    assert before == {path.name for path in (tmp_path / "recorded").iterdir()}


def test_texts_that_are_not_recorded_are_known_as_such(run, folder, elsewhere):
    for stage in ("ablated_answers", "latent_examples"):
        assert texts_withheld(elsewhere.get(stage)) and not texts_withheld(run.get(stage))


def test_a_changed_setting_of_a_recorded_run_says_why_data_are_needed(elsewhere, monkeypatch):
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], domain_data="mmlu_pro")
    other.store = elsewhere.store

    def missing(*args, **kwargs):
        raise MissingData("no data")

    monkeypatch.setattr("sts.data.load.load_examples", missing)
    with pytest.raises(StsError, match="'evaluation_before' with .*domain_data = mmlu_pro is not recorded.*no data"):
        other.get("evaluation_before")


def test_recording_nothing_is_an_error(tmp_path):
    with pytest.raises(StsError, match="no results"):
        record(sts.open_run("smoke", results=tmp_path, seeds=[]), tmp_path / "none")


def test_provenance_keeps_where_and_when_it_was_computed(run, folder):
    noted = json.loads((folder / f"scores-{run.key('scores')}.parquet.provenance.json").read_text())
    own = run.provenance("scores")
    assert (noted["finished"], noted["seconds"], noted["device"]) == (own["finished"], own["seconds"], own["device"])


@pytest.mark.parametrize("folder", sorted(path for path in (ROOT / "data" / "recorded").iterdir() if path.is_dir()),
                         ids=lambda path: path.name)
def test_every_result_in_the_repository_is_one_that_its_run_asks_for(folder):
    """A raised version, or a changed profile, leaves results behind that no page would find."""
    run = sts.open_run(folder.name).only_stored(reading=False)
    asked = set()
    for one in (*seeds_of(run), *trainings_of(run), *rl_runs_of(run)):
        for stage in STAGES:
            with contextlib.suppress(StsError):  # not recorded
                asked.add(f"{stage}-{one.key(stage)}")
    found = {re.match(r"\w+-[0-9a-f]{12}", path.name)[0] for path in folder.glob("*.provenance.json")}
    assert found and found - asked == set()


def test_a_comparison_of_training_sets_is_stale_once_what_it_was_made_of_is(registry):
    """Where data are missing, the keys of other training sets' stages are worked out from records, or nothing is."""
    assert sts.open_run("full").only_stored(reading=False).get("training_correlations")
    for raised in ("shift", "sft_shift", "evaluation_after"):
        own = registry[raised]
        registry[raised] = dataclasses.replace(own, version=own.version + 1)
        run = sts.open_run("full").only_stored(reading=False)
        for stage in ("training_matrix", "training_correlations", "training_overlap", "training_specificity"):
            with pytest.raises(StsError, match="is not recorded"):
                run.get(stage)
        registry[raised] = own


SPEC = Stage("made", print, "json", ("top_n",), ("top_n",), ("shift",), ("model", "sft_train", "seeds"), version=2)
RECORD = {"key": "k", "version": 2, "settings": {"top_n": 16}, "needs": {"shift": "s"}, "drawn": {"seed": 0},
          "inputs": {"model": "a", "sft_train": "b", "seeds": "c"}}


@pytest.mark.parametrize(("inputs", "changed", "expected"), [
    ({}, {}, "k"), ({"model": None, "sft_train": None}, {}, "k"), ({"model": "other"}, {}, None),
    ({"seeds": None}, {}, None), ({}, {"version": 1}, None), ({}, {"drawn": {"seed": 1}}, None),
    ({}, {"settings": {"top_n": 17}}, None), ({}, {"settings": {"top_n": 16, "layer": 2}}, None),
    ({}, {"needs": {"shift": "t"}}, None), ({}, {"inputs": {"model": "a", "seeds": "c"}}, None)], ids=str)
def test_a_recorded_key_is_found_by_what_is_known(tmp_path, inputs, changed, expected):
    (tmp_path / "made-k.json.provenance.json").write_text(json.dumps(RECORD | changed))
    settings = sts.open_run("smoke").settings
    assert (settings.top_n, settings.seed) == (16, 0)
    assert recorded_key([tmp_path], settings, SPEC, {"shift": "s"}, RECORD["inputs"] | inputs) == expected


def test_a_missing_model_is_explained_like_missing_data(elsewhere):
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], score_tokens=100)
    other.store = elsewhere.store
    with pytest.raises(StsError, match="'domain_stats' with score_tokens = 100 is not recorded.*not here") as error:
        other.get("domain_stats")
    assert str(error.value).count("is not recorded") == 1


def test_what_is_withheld_later_and_stages_that_are_gone_leave_nothing_behind(run, tmp_path, registry, monkeypatch):
    record(run, tmp_path)
    name = f"scores-{run.key('scores')}"
    assert (tmp_path / f"{name}.parquet").exists() and list(tmp_path.glob("variant_*")) == []
    monkeypatch.setitem(CHANGED, "scores", None)
    (tmp_path / "gone_stage-0123456789ab.json").write_text("{}")
    record(run, tmp_path)
    assert not (tmp_path / f"{name}.parquet").exists() and not list(tmp_path.glob("gone_stage*"))
    assert json.loads((tmp_path / f"{name}.parquet.provenance.json").read_text())["withheld"] == "all of it"
