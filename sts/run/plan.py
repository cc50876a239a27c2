"""What a run asks for, as jobs: a stage with the seed and training set that it takes, after what it needs; and the same
as a workflow of Snakemake, in which a job's end is a marker file and its result lies in the store as always."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sts.run.resources import EVERY_SET, INPUTS, seeds_of, trainings_of
from sts.run.run import OpenRun

#: Settings in which the further runs of a profile differ from it.
VARIED = ("sft_data", "seed")
#: Parameters of stages that run a model.
MODELS = {"lm", "tuned", "fresh_lm"}
#: What a job is given, with a model and without: GPUs, memory in MB, minutes at most.
WITH_MODEL, WITHOUT = {"gpu": 1, "mem_mb": 12_000, "runtime": 720}, {"gpu": 0, "mem_mb": 4_000, "runtime": 60}


@dataclass(frozen=True)
class Job:
    """One call of `sts stage`: settings that differ from the profile's own, and the names of the jobs it needs."""

    stage: str
    changes: Mapping[str, Any]
    needs: tuple[str, ...]
    resources: Mapping[str, int]
    stored: bool

    def command(self, run: str) -> str:
        options = "".join(f" -p {name} {shlex.quote(str(value))}" for name, value in self.changes.items())
        return f"sts stage {self.stage} --run {shlex.quote(run)}{options}"


def decided_by(run: OpenRun, name: str) -> set[str]:
    """The settings on which a stage's result depends, through all that it needs."""
    spec = run.spec(name)
    read = {setting for what in spec.inputs if what in INPUTS for setting in INPUTS[what][0]}
    return {*spec.uses, *read}.union(*(decided_by(run, need) for need in run.needs(name)))


def jobs(run: OpenRun, stages: Iterable[str]) -> dict[str, Job]:
    """All jobs that stages of a run ask for, by name, each after what it needs."""
    found: dict[str, Job] = {}

    def add(one: OpenRun, name: str) -> str:
        one = run if name == "sae" else one  # one SAE, whatever the seed
        own, decided = one.spec(name), decided_by(one, name)
        changes = {key: value for key in VARIED if key in decided
                   and (value := getattr(one.settings, key)) != getattr(run.settings, key)}
        label = "-".join([name, *(re.sub(r"\W", "_", f"{key}_{value}") for key, value in changes.items())])
        if label not in found:
            asked = [(one, need) for need in one.needs(name)]
            if "each_seed" in own.parameters:  # of other seeds what it reads through them, not what it is handed
                asked += [(other, need) for other in seeds_of(one)[1:] for need in own.needs
                          if need not in own.parameters]
            if "each_training" in own.parameters:
                asked += [(other, need) for other in trainings_of(one) for need in EVERY_SET]
            needs = tuple(dict.fromkeys(add(*pair) for pair in asked))
            found[label] = Job(name, changes, needs, WITH_MODEL if MODELS & {*own.parameters} else WITHOUT,
                               one.stored(name))
        return label

    for name in stages:
        add(run, name)
    return found


def snakefile(found: Mapping[str, Job], run: str, profile: str) -> str:
    """A Snakefile of these jobs. A changed profile file makes all jobs run, of which the store gives back most."""
    def marker(label: str) -> str:
        return f"results/jobs/{run}/{label}.done"

    rules = ["rule all:\n    input: " + ", ".join(repr(marker(label)) for label in found)]
    for label, job in found.items():
        needs = ", ".join(map(repr, [profile, *map(marker, job.needs)]))
        given = ", ".join(f"{name}={value}" for name, value in job.resources.items())
        rules.append(f"rule {label.replace('-', '_')}:\n    input: {needs}\n    output: touch({marker(label)!r})\n"
                     f"    resources: {given}\n    shell: {job.command(run)!r}")
    return "\n\n\n".join(rules) + "\n"
