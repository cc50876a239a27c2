"""The jobs of a run: every stage once for each seed and training set that it depends on, after what it needs."""

import sts
from sts.run.plan import decided_by, jobs, snakefile


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
    assert found["evaluation_after-seed_1"].command("smoke") == "sts stage evaluation_after --run smoke -p seed 1"
    # Two jobs never compute one result.
    keys = [(job.stage, run.variant(seeds=[], training_sets=[], **job.changes).key(job.stage)) for job in found.values()
            if job.stage not in ("baseline_correlations", "training_matrix")
            and job.changes.get("sft_data") != "mbpp"]
    assert len(set(keys)) == len(keys)


def test_a_workflow_has_a_rule_a_job(tmp_path):
    found = jobs(sts.open_run("smoke", results=tmp_path), ["correlations"])
    text = snakefile(found, "smoke", "runs/smoke.yaml")
    assert text.count("\nrule ") + text.startswith("rule all") == 1 + len(found)
    assert "resources: gpu=1" in text and "'sts stage scores --run smoke'" in text
