"""What a run asks for, as jobs: a stage with the seed and training set that it takes, after what it needs; and those of
them that are left as a workflow of Snakemake, in which a job's end is a marker file and its result is in the store."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from yaml import YAMLError

from sts.run.others import seeds_of
from sts.run.resources import INPUTS, OTHERS
from sts.run.run import OpenRun
from sts.run.settings import read_yaml
from sts.run.stage import STAGES

#: Settings in which the further runs of a profile differ from it.
VARIED = ("sft_data", "seed")
#: Parameters of stages that run a model.
MODELS = {"lm", "tuned", "reinforced", "fresh_lm", "variant"}
#: What a job is given, with a model and without: GPUs, memory in MB at least, minutes at most.
WITH_MODEL, WITHOUT = {"gpu": 1, "mem_mb": 6_000, "runtime": 720}, {"mem_mb": 4_000, "runtime": 60}
#: Stages that are asked for only where a setting is not empty; an SAE is trained where another stage needs it, and
#: reinforcement learning is done on a training set of its own.
WHERE = {"sft_trials": "sft_lr_tried", "generation_shift": "eval_generate", "answer_forms": "validation_limit",
         "judge_labels": "judge_url",
         "read_out_leads": "selective_latents", "mixture_effects": "mixture_steps",
         **dict.fromkeys(("rl_rewards", "rl_overlap", "rl_correlations"), "rl_steps"),
         **dict.fromkeys(("sae", "rl_shift", "rl_evaluation", "rollout_shift")),
         **dict.fromkeys(("sae_quality", "small_sae_quality", "latent_strengths", "latent_logits"), "text_data")}


@dataclass(frozen=True)
class Job:
    """One call of `sts stage`: its run, settings in which that differs from the profile, names of the jobs it needs,
    whether its result is there, and what is recorded about it."""

    stage: str
    run: OpenRun
    changes: Mapping[str, Any]
    needs: tuple[str, ...]
    stored: bool
    provenance: Mapping[str, Any]

    @property
    def takes(self) -> set[str]:
        """What of `MODELS` the stage takes; nothing where it runs no model."""
        return MODELS & {*self.run.spec(self.stage).parameters}

    def command(self, run: str) -> str:
        """The command line that does the job, of a run by this name or YAML file."""
        options = "".join(f" -p {name} {shlex.quote(_written(value))}" for name, value in self.changes.items())
        return f"sts stage {self.stage} --run {shlex.quote(run)}{options}"


def _written(value: Any) -> str:
    """A setting's value as `-p` reads it back."""
    with suppress(YAMLError, ValueError):
        if isinstance(value, str) and read_yaml(value) == value:
            return value
    return json.dumps(value)


def decided_by(run: OpenRun, name: str) -> set[str]:
    """The settings on which a stage's result depends, through all that it needs."""
    spec = run.spec(name)
    read = {setting for what in spec.inputs if what in INPUTS for setting in INPUTS[what][0]}
    return {*spec.uses, *read}.union(*(decided_by(run, need) for need in run.needs(name)))


def asked_for(run: OpenRun) -> list[str]:
    """The stages that make a run's book: all that no other stage needs, but those that no setting asks for."""
    needed = {need for name in STAGES for need in run.needs(name) if name != "judge_labels"}  # which few runs have
    return [name for name in STAGES if name not in needed
            and (name not in WHERE or (WHERE[name] and getattr(run.settings, WHERE[name])))]


def jobs(run: OpenRun, stages: Iterable[str]) -> dict[str, Job]:
    """All jobs that stages of a run ask for, by name, each after what it needs."""
    found: dict[str, Job] = {}

    def add(one: OpenRun, name: str) -> str:
        one = run if name == "sae" else one  # one SAE, whatever the seed
        own, decided = one.spec(name), decided_by(one, name)
        varied = {key: value for key in VARIED if key in decided
                  and (value := getattr(one.settings, key)) != getattr(run.settings, key)}
        label = "-".join([name, *(re.sub(r"\W", "_", f"{key}_{value}") for key, value in varied.items())])
        if label not in found:
            asked = [(one, need) for need in one.needs(name)]
            if "each_seed" in own.parameters:  # of other seeds what it reads through them, not what it is handed
                asked += [(other, need) for other in seeds_of(one, own)[1:] for need in own.needs
                          if need not in own.parameters]
            asked += [(other, need) for what in own.inputs if what in OTHERS and what != "seeds"
                      for other in OTHERS[what][0](one) for need in OTHERS[what][1]]
            needs, record = tuple(dict.fromkeys(add(*pair) for pair in asked)), one.provenance(name)
            found[label] = Job(name, one, run.changed | varied, needs, bool(record) and one.stored(name), record)
        return label

    for name in stages:
        add(run, name)
    return found


def left(found: Mapping[str, Job], stages: Iterable[str]) -> dict[str, Job]:
    """Of these jobs for stages those that have to be run: they are not stored, and nothing stored is made of them."""
    asked = {*stages}
    for label, job in reversed([*found.items()]):
        asked.update(() if job.stored or label not in asked else job.needs)
    return {label: job for label, job in found.items() if label in asked and not job.stored}


def snakefile(found: Mapping[str, Job], run: str, profile: str, markers: str, memory: Mapping[str, float]) -> str:
    """A Snakefile of these jobs, of a run by this name, from its profile's file; in the folder `markers` a job's end is
    marked. `memory`: bytes that a job takes. Where the profile changes all run, and most are found in the store."""
    def marker(label: str) -> str:
        return f"{markers}/{label}.done"

    rules = ["rule all:\n    input:" + ",".join(f"\n        {marker(label)!r}" for label in found)]
    for label, job in found.items():
        needs = ", ".join(map(repr, [profile, *(marker(need) for need in job.needs if need in found)]))
        given = {name: value for name, value in (WITH_MODEL if job.takes else WITHOUT).items()
                 if name != "gpu" or job.run.settings.device != "cpu"}
        threads = 'config.get("threads", 1)' if job.takes else 1
        given["mem_mb"] = max(given["mem_mb"], round(1.5 * memory[label] / 1e6))
        rules.append(f"rule {label.replace('-', '_')}:\n    input: {needs}\n    output: touch({marker(label)!r})\n"
                     f"    resources: {', '.join(f'{name}={value}' for name, value in given.items())}\n"
                     f"    threads: {threads}\n"
                     f"    shell: {job.command(run).replace('{', '{{').replace('}', '}}')!r}")
    return "\n\n\n".join(rules) + "\n"
