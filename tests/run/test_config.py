"""Run profiles: what is accepted, what is refused, and what the refusal says."""

import pydantic
import pytest
import yaml

from sts.errors import StsError
from sts.run.run import open_run
from sts.run.settings import ROOT, Run, available_runs, load_run, read_yaml

PROFILES = sorted(path.stem for path in (ROOT / "runs").iterdir())
MINIMAL = {"model": "random-llama", "layer": 0, "sae": "some-folder", "sft_data": "gsm_symbolic",
           "domain_data": "mmlu_exemplars"}


def write(path, settings):
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_in_runs_loads_with_exactly_what_its_file_says(name):
    written = yaml.safe_load((ROOT / "runs" / f"{name}.yaml").read_text(encoding="utf-8"))
    loaded = load_run(name).model_dump()
    assert loaded["name"] == name
    assert {key: loaded[key] for key in written} == written


def test_every_file_in_runs_is_offered_as_a_profile():
    assert available_runs() == PROFILES
    assert {"laptop", "smoke"} <= set(PROFILES)


def test_the_default_run_is_laptop():
    assert load_run() == load_run("laptop")


def test_a_yaml_path_works_and_names_the_run(tmp_path):
    run = load_run(write(tmp_path / "mine.yaml", {**MINIMAL, "top_n": 7}))
    assert (run.name, run.top_n, run.seed) == ("mine", 7, 0)
    assert load_run(write(tmp_path / "other.yml", {**MINIMAL, "name": "called"})).name == "called"


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(StsError) as error:
        load_run("lapdog")
    assert "'lapdog'" in str(error.value)
    assert all(name in str(error.value) for name in PROFILES)


def test_a_missing_yaml_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StsError, match="nowhere.yaml"):
        load_run(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("text", ["model: [unclosed\n", "a: b: c\n", "\tmodel: x\n"])
def test_broken_yaml_is_one_clear_error(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StsError, match="broken.yaml is not valid YAML") as error:
        load_run(str(path))
    assert "line 1" in str(error.value) or "line 2" in str(error.value)


@pytest.mark.parametrize(("text", "key", "line"), [
    ("seed: 1\nmodel: x\nseed: 2\n", "'seed'", "line 3"), ("sae_text:\n  web: 5\n  web: 6\n", "'web'", "line 3"),
    ("seed: 1\n'seed': 1\n", "'seed'", "line 2"), ("text_data: [{a: 1, a: 2}]\n", "'a'", "line 1")])
def test_a_key_that_stands_twice_is_an_error_that_names_it(tmp_path, text, key, line):
    path = tmp_path / "twice.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StsError, match=rf"twice.yaml .*key {key} stands twice; keep one\n.*{line}"):
        load_run(str(path))


def test_the_same_key_in_different_mappings_and_a_merged_one_are_fine():
    assert read_yaml("a: {x: 1}\nb: {x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}
    assert read_yaml("a: &a {x: 1, y: 1}\nb:\n  <<: *a\n  x: 2\n")["b"] == {"x": 2, "y": 1}


@pytest.mark.parametrize("text", ["- model\n- layer\n", "just words\n", ""])
def test_yaml_that_is_no_list_of_settings_is_refused(tmp_path, text):
    path = tmp_path / "shape.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StsError, match="shape.yaml must hold"):
        load_run(str(path))


@pytest.mark.parametrize("key", [5, True])
def test_a_key_that_is_no_word_is_refused_like_any_unknown_key(tmp_path, key):
    # YAML reads `on: 1` as True: 1.
    with pytest.raises(StsError, match="is not known. Valid: .*seed.*top_n"):
        load_run(write(tmp_path / "odd.yaml", {**MINIMAL, key: 1}))


def test_a_missing_setting_is_named_with_its_meaning(tmp_path):
    settings = {key: value for key, value in MINIMAL.items() if key != "layer"}
    with pytest.raises(StsError, match="'layer' is missing: zero-based decoder layer"):
        load_run(write(tmp_path / "run.yaml", settings))


def test_an_unknown_key_is_named_and_all_valid_ones_are_listed():
    with pytest.raises(StsError) as error:
        load_run("smoke", {"topn": 3})
    assert "'topn'" in str(error.value)
    assert all(name in str(error.value) for name in Run.model_fields)


@pytest.mark.parametrize(("key", "value"), [
    ("seed", "one"), ("seed", True), ("seed", 1.5), ("sft_lr", "fast"), ("fold_norms", 1), ("model", 3),
    ("domains", "law"), ("sae_text", ["web"]), ("sae_text", {"web": "many"})])
def test_a_wrong_type_is_an_error_that_names_key_meaning_and_value(key, value):
    with pytest.raises(StsError) as error:
        load_run("smoke", {key: value})
    message = str(error.value)
    assert f"'{key}" in message
    assert Run.model_fields[key].description in message
    assert "should be a valid" in message and "; got " in message


@pytest.mark.parametrize(("changes", "named", "valid"), [
    ({"sae_k": 129}, "sae_k", "128"),
    ({"small_sae_k": 65}, "small_sae_k", "64"),
    ({"sft_data": "gsm9k"}, "sft_data", "gsm8k"),
    ({"domain_data": "mmlu_max"}, "domain_data", "mmlu_exemplars"),
    ({"text_data": ["gsm_symbolic", "nosuch"]}, "text_data", "gsm_symbolic"),
    ({"sae_text": {"web": 0}}, "sae_text.web", "greater than or equal to 1; got 0"),
    ({"dtype": "int8"}, "dtype", "'bfloat16'"),
    ({"device": "tpu"}, "device", "'cuda'"),
    ({"layer": -1}, "layer", "greater than or equal to 0"),
    ({"sft_lr": 0.0}, "sft_lr", "greater than 0"),
    ({"top_n": 0}, "top_n", "greater than or equal to 1"),
])
def test_an_impossible_value_is_an_error_that_names_the_key_and_says_what_works(changes, named, valid):
    with pytest.raises(StsError) as error:
        load_run("smoke", changes)
    assert named in str(error.value)
    assert valid in str(error.value)


def test_every_wrong_setting_is_reported_at_once():
    with pytest.raises(StsError) as error:
        load_run("smoke", {"layer": -1, "dtype": "int8", "nosuch": 1})
    assert all(name in str(error.value) for name in ("'layer'", "'dtype'", "'nosuch'"))


def test_k_may_be_as_large_as_the_width():
    assert load_run("smoke", {"sae_latents": 16, "sae_k": 16}).sae_k == 16


def test_text_entries_may_be_corpora_splits_of_question_sets_and_files():
    text = {"web": 5, "mmlu:val": 5, "notes.txt": 5, "/tmp/pages.jsonl": 5}
    assert load_run("smoke", {"sae_text": text}).sae_text == text


def test_an_override_changes_its_key_and_none_keeps_the_profiles_value():
    plain = load_run("smoke")
    changed = open_run("smoke", top_n=3, seed=None, demonstrations=None)
    assert changed.settings.top_n == 3 != plain.top_n and changed.changed == {"top_n": 3}
    assert changed.settings == plain.model_copy(update={"top_n": 3})


def test_a_run_can_be_opened_again_with_overrides():
    first = load_run("smoke", {"seed": 5})
    assert load_run(first) == first
    assert load_run(first, {"top_n": 2}).model_dump() == {**first.model_dump(), "top_n": 2}
    with pytest.raises(StsError, match="'topn'"):
        load_run(first, {"topn": 2})


def test_a_whole_number_may_stand_for_a_decimal_one():
    assert load_run("smoke", {"outlier_norm": 0}).outlier_norm == 0.0


def test_a_learning_rate_may_be_written_without_a_decimal_point(tmp_path):
    # YAML 1.1 alone would read 4e-4 as a word.
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "sae_lr: 4e-4\nsft_lr: 1E-3\n", encoding="utf-8")
    run = load_run(str(path))
    assert (run.sae_lr, run.sft_lr) == (0.0004, 0.001)


def test_a_run_is_frozen():
    run = load_run("smoke")
    with pytest.raises(pydantic.ValidationError):
        run.seed = 1
    assert run.seed == 0


def test_every_setting_says_what_it_means():
    assert [name for name, field in Run.model_fields.items() if not (field.description or "").strip()] == []


def test_a_name_cannot_leave_the_results_folder():
    with pytest.raises(StsError, match="'name'"):
        load_run("smoke", {"name": "../escape"})


def test_a_profile_in_another_encoding_is_one_error(tmp_path):
    profile = tmp_path / "old.yaml"
    profile.write_bytes("description: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(StsError, match="old.yaml is not valid YAML in UTF-8"):
        load_run(str(profile))


def test_a_missing_file_and_a_value_for_a_list_are_named(tmp_path):
    with pytest.raises(StsError, match="nosuch.yaml' is not known. Valid: .*smoke"):
        load_run(str(tmp_path / "nosuch.yaml"))
    with pytest.raises(StsError, match=r"'domains'.*valid list; got 'law'. Write \[law\]."):
        load_run("smoke", {"domains": "law"})


def test_paths_in_a_profile_are_relative_to_its_file_and_overrides_to_where_one_stands(tmp_path, monkeypatch):
    """Case: the same profile opened from its own folder and from elsewhere."""
    project = tmp_path / "my project"
    for name, mark in (("my_model", "config.json"), ("my_sae", "cfg.json")):
        (project / name).mkdir(parents=True)
        (project / name / mark).write_text("{}")
    (project / "my_text.txt").write_text("text")
    profile = write(project / "run.yaml", {**MINIMAL, "model": "my_model", "sae": "my_sae",
                                           "sae_text": {"my_text.txt": 5, "web": 6}})
    for folder in (project, tmp_path):
        monkeypatch.chdir(folder)
        run = load_run(profile)
        assert (run.model, run.sae) == (str(project / "my_model"), str(project / "my_sae"))
        assert run.sae_text == {str(project / "my_text.txt"): 5, "web": 6}
    assert load_run("smoke", {"model": "my project/my_model"}).model == str(project / "my_model")
    assert load_run("smoke", {"model": "owner/name"}).model == "owner/name"
    assert load_run("smoke", {"sae_text": {r"C:\data\my_text.txt": 5}}).sae_text == {r"C:\data\my_text.txt": 5}


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": ["a"]}, r"'model' \(packaged name.*valid string; got \['a'\]"),
    ({"sft_data": "gsm8k+gsm8k"}, "'sft_data'.*names a set twice"),
    ({"sft_data": "gsm8"}, "Did you mean 'gsm8k'"),
    ({"top_n": 129}, "top_n: 129 latents of only 128"),
    ({"seeds": [1, -1]}, "'seeds.1'.*greater than or equal to 0"), ({"sweep_k": [0]}, "'sweep_k.0'.*equal to 1"),
    ({"sweep_seeds": [7]}, r"sweep_seeds: \[7\] must be among the run's seeds, \[1\]"),
    ({"mixture_seeds": [7]}, r"mixture_seeds: \[7\] must be among the run's seeds, \[1\]"),
    ({"mixture_kinds": ["even"]}, "mixture_kinds must name sts"),
    ({"sweep_widths": [4]}, "sweep_widths: 8 latents of only 4"),
    ({"overlap_demonstrations": []}, "'overlap_demonstrations'.*at least 1 item"),
    ({"eval_kinds": ["option"]}, "'eval_kinds.0'.*'letter', 'text' or 'solution'")], ids=str)
def test_values_that_do_not_go_together_are_one_line(changes, message):
    with pytest.raises(StsError, match=message) as error:
        load_run("smoke", changes)
    assert "\n" not in str(error.value)
