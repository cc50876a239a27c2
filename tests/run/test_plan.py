"""The jobs of a run: every stage once for each seed and training set that it depends on, after what it needs; what they
take; and the same as a workflow that Snakemake runs, is killed in, and goes on with."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

import sts
from sts import cli
from sts.errors import ROOT, StsError
from sts.run import estimate
from sts.run.plan import asked_for, decided_by, jobs, left
from sts.run.stage import STAGES

#: Stages that dominate what a run takes.
LARGE = ("domain_stats", "domain_rows", "domain_model_change", "evaluation_before", "sft", "shift_by_demonstrations",
         "text_activations", "ablation")


def test_jobs_are_told_apart_by_what_their_results_depend_on(tmp_path):
    run = sts.open_run("smoke", results=tmp_path, seeds=[1], training_sets=["mbpp"])
    found = jobs(run, ["baseline_correlations", "training_matrix"])
    assert [name for name in found if name.startswith("evaluation_before")] == ["evaluation_before"]
    assert {name for name in found if name.startswith("sft-") or name == "sft"} == {"sft", "sft-seed_1",
                                                                                   "sft-sft_data_mbpp"}
    assert "seed" not in decided_by(run, "evaluation_before") and "seed" in decided_by(run, "scores")
    names = list(found)
    for name, job in found.items():
        assert all(names.index(need) < names.index(name) for need in job.needs)
    # Two jobs never compute one result.
    alone = {"seeds": [], "training_sets": []}
    keys = [(job.stage, run.variant(**job.changes | alone).key(job.stage)) for job in found.values()
            if job.stage not in ("baseline_correlations", "training_matrix") and job.changes.get("sft_data") != "mbpp"]
    assert len(set(keys)) == len(keys)


def test_a_job_is_the_command_line_that_computes_it(tmp_path):
    run = sts.open_run("smoke", results=tmp_path, domains=["law", "computer science"], model_revision="1.0", seeds=[1])
    command = jobs(run, ["correlations_by_seed"])["evaluation_after-seed_1"].command("smoke")
    assert command == ("""sts stage evaluation_after --run smoke -p domains '["law", "computer science"]' """
                       """-p model_revision '"1.0"' -p seed 1""")


def test_the_chapters_stages_are_asked_for_and_those_that_no_setting_asks_for_are_not(tmp_path):
    run = sts.open_run("smoke", results=tmp_path)
    found = {job.stage for job in jobs(run, asked_for(run)).values()}
    sources = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "sts" / "book").glob("*.py"), ROOT / "book/claims.yaml"]
    read = {name for path in sources for name in re.findall(
        r"""(?:page|self|run|own|one)(?:\.get\(|\[)\\?["'](\w+)|stage: (\w+)""", path.read_text(encoding="utf-8"))
        for name in name if name in STAGES}
    assert len(read) > 30 and read <= found | {"judge_labels"}
    by_hand = {"sft_trials", "answer_forms", "generation_shift", "judge_labels"}
    assert not by_hand & found and "sae" not in asked_for(run)
    assert by_hand <= {*asked_for(run.variant(sft_lr_tried=[1e-3], validation_limit=2, eval_generate=["gsm8k"],
                                                judge_url="http://localhost:1/v1"))}
    assert "sae_quality" not in asked_for(run.variant(text_data=[]))
    without = run.variant(selective_latents=[], mixture_steps=[])
    assert found - {job.stage for job in jobs(without, asked_for(without)).values()} == {
        "selective", "read_out_leads", "mixture_plan", "mixture_answers", "mixture", "mixture_effects"}


def test_ablations_of_seeds_that_they_leave_out_are_no_jobs(tmp_path):
    assert "sweep_saes-seed_1" in jobs(sts.open_run("smoke", results=tmp_path), ["sweep_correlations"])
    found = jobs(sts.open_run("smoke", results=tmp_path, sweep_seeds=[]), ["sweep_correlations"])
    assert "sweep_saes" in found and not [name for name in found if "seed" in name]


def test_mixtures_are_trained_at_the_seeds_that_are_named_for_them(tmp_path):
    run = sts.open_run("smoke", results=tmp_path)
    assert not [name for name in jobs(run, ["mixture_effects", "read_out_leads"]) if "seed" in name]
    found = jobs(run.variant(mixture_seeds=[1]), ["mixture_effects", "read_out_leads"])
    assert {"mixture-seed_1", "mixture_answers-seed_1"} <= {*found} and "selective-seed_1" not in found


def test_what_stored_results_were_made_of_need_not_be_run(tmp_path):
    run = sts.open_run("smoke", results=tmp_path)
    asked = ["scores", "text_baselines"]
    assert left(jobs(run, asked), asked).keys() == jobs(run, asked).keys()
    run.get("scores")
    (path,) = run.store.folder.glob("shift-*.safetensors")
    path.unlink()
    found = jobs(sts.open_run("smoke", results=tmp_path), asked)
    assert found["scores"].stored and not found["shift"].stored
    assert list(left(found, asked)) == ["text_baselines"]
    assert list(left(found, ["shift", "scores"])) == ["shift"]


def test_an_estimate_is_near_what_is_run_and_a_record_is_taken_instead(tmp_path):
    run = sts.open_run("smoke", results=tmp_path)
    for name in LARGE:
        run.get(name)
    found = jobs(run, LARGE)
    for name in LARGE:
        job = found[name]
        record, guess = estimate.cost(job), estimate.cost(replace(job, provenance={}))
        assert record.read + record.trained == pytest.approx(job.provenance["work"]["tokens"])
        assert 0.5 < guess.operations / record.operations < 2, name
        assert guess.trained == pytest.approx(record.trained, rel=0.05)


def test_a_stage_without_an_estimate_is_named(tmp_path, monkeypatch):
    run = sts.open_run("smoke", results=tmp_path)
    found = jobs(run, ["sft"])
    assert "Without an estimate" not in estimate.summary(run, found, found, estimate.costs(found, found))
    monkeypatch.setattr(estimate, "reads", lambda *_: [])
    assert "Without an estimate: sft." in estimate.summary(run, found, found, estimate.costs(found, found))


def test_parameters_are_counted_and_no_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    run = sts.open_run("laptop", results=tmp_path)
    assert sum(one.numel() for one in estimate.sized(run).parameters()) == 134_515_008
    found = jobs(run, ["correlations"])
    known = estimate.costs(found, found)
    assert 1e4 < known["domain_stats"].read < 1e5 and known["correlations"] == estimate.Cost()
    assert not list(tmp_path.rglob("*.safetensors"))
    text = estimate.summary(run, found, found, known)
    assert re.search(r"\nall +10 +0 .*\nleft to run +10 +0 ", text) and "one H100" in text


def test_texts_are_needed_for_what_is_not_recorded_alone(tmp_path, monkeypatch):
    run = sts.open_run("smoke", results=tmp_path, sft_data="gsm8k")
    found = jobs(run, ["sft"])
    assert estimate.costs(found, []) == {"sft": estimate.Cost()}
    with pytest.raises(StsError, match="gsm8k"):
        estimate.costs(found, found)


# --- as a workflow

def command(*arguments, folder, **more):
    """Start Snakemake on the profiles of this repository, in a folder with a workflow."""
    profile = ROOT / "workflow" / "profiles" / more.pop("profile", "local")
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--profile", str(profile), "--nocolor", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env={
            **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "PWD": str(folder), "STS_RESULTS": str(folder / "results")})


MADE_BY = ["plan", "shift_rows", "shift", "sft", "--run", "tiny.yaml", "-p", "domains", "[law, math]", "--snakemake"]
JOBS = {"sae", "sft", "shift", "shift_rows"}


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """A folder with the workflow of one result, of a profile of its own, as `sts plan` writes it."""
    folder = tmp_path_factory.mktemp("workflow")
    (folder / "tiny.yaml").write_text((ROOT / "runs" / "smoke.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STS_RESULTS", str(folder / "results"))
        patch.setattr(sys, "argv", ["sts", *MADE_BY])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
    return folder


def test_a_workflow_has_a_rule_a_job_and_says_how_it_was_made_and_is_run(workflow):
    text = (workflow / "workflow" / "Snakefile").read_text()
    assert set(re.findall(r"^rule (\w+):", text, re.M)) == JOBS | {"all"}
    assert text.startswith(f"# Made by: sts {shlex.join(MADE_BY)}\n")
    assert "snakemake -c2 --profile" in text.splitlines()[1]
    assert f"""'sts stage sft --run {workflow}/tiny.yaml -p domains \\'["law", "math"]\\''""" in text
    shift = text.partition("rule shift:")[2].partition("rule ")[0]
    assert "input: 'tiny.yaml', 'results/jobs/tiny/sae.done'" in shift and "gpu=1, mem_mb=6000, runtime=720" in shift


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_every_profile_plans_the_same_jobs(workflow, profile):
    output, _ = command("-n", folder=workflow, profile=profile).communicate(timeout=120)
    assert set(re.findall(r"^(\w+) +1$", output, re.M)) == JOBS | {"all"}, output


def test_a_killed_workflow_goes_on_and_runs_nothing_again(workflow):
    def recorded():
        return {path.name: json.loads(path.read_text())["finished"] + str(path.stat().st_mtime_ns)
                for path in (workflow / "results" / "stages").glob("*.provenance.json")}

    def marked():
        return {path.stem: path.stat().st_mtime_ns for path in (workflow / "results" / "jobs" / "tiny").glob("*.done")}

    process, deadline = command("-c2", folder=workflow), time.monotonic() + 300
    while not marked():  # others of them are running now
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    results, ends = recorded(), marked()
    assert ends.keys() < JOBS and len(results) >= len(ends)
    again = command("-c2", folder=workflow)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert marked().keys() == JOBS and recorded().keys() > results.keys()
    assert results.items() <= recorded().items() and ends.items() <= marked().items()
    assert set(re.findall(r"^(?:local)?rule (\w+):", output, re.M)) == JOBS - ends.keys() | {"all"}
