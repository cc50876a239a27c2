"""Further runs that stages are handed: of other seeds, on other training sets, by reinforcement learning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sts.errors import StsError
from sts.run.resources import OTHERS, resource
from sts.run.stage import RESOURCES

if TYPE_CHECKING:
    from sts.run.run import OpenRun
    from sts.run.stage import Stage

#: What is asked of every training set, before its key is part of another, and of every reinforcement learning.
EVERY_SET = ("scores", "shift", "sft", "sft_shift", "domain_shift", "correlations", "text_baselines")
EVERY_RL = ("rl", "rl_shift", "rl_evaluation", "rollout_shift", "sft", "sft_shift", "shift", "shift_by_draw",
            "domain_stats", "evaluation_before")


def seeds_of(run: OpenRun, stage: Stage | None = None) -> list[OpenRun]:
    """The run with each of its seeds, its own first; for a stage with those that it is repeated at."""
    chosen = [getattr(run.settings, name) for name in stage.parameters if name.endswith("_seeds")] if stage else []
    others = run.settings.seeds if chosen in ([], [None]) else chosen[0]
    return [run.alone(seed=seed) for seed in dict.fromkeys((run.settings.seed, *others))]


resource(("seeds", "seed"), ("seeds",), name="each_seed")(seeds_of)


@resource(("training_sets", "training_seeds", "sft_data", "seed"), ("training_sets",), name="each_training")
def trainings_of(run: OpenRun) -> list[OpenRun]:
    """The run with every training set, its own first, and of each all `training_seeds`."""
    own = run.settings
    return [run.alone(sft_data=name, seed=seed) for name in dict.fromkeys((own.sft_data, *own.training_sets))
            for seed in dict.fromkeys((own.seed, *own.training_seeds))]


def rl_runs_of(run: OpenRun) -> list[OpenRun]:
    """The run with `rl_data` to train on, at its own seed and all `rl_seeds`; none where it takes no step."""
    own = run.settings
    return [run.alone(sft_data=own.rl_data, seed=seed) for seed in dict.fromkeys((own.seed, *own.rl_seeds))
            if own.rl_steps]


@resource(("rl_data", "rl_seeds", "seed"), ("rl_runs",))
def each_rl(run):
    if not (found := rl_runs_of(run)):
        raise StsError("In this run nothing is learned by reinforcement: its rl_steps is 0. Use 20 or more.")
    return found


RESOURCES["each_rival_set"] = replace(RESOURCES["each_training"], inputs=("rival_sets",))
OTHERS |= {"rival_sets": (trainings_of, ("rival_values", "domain_shift")),
           "seeds": (lambda run: seeds_of(run)[1:], ("correlations", "extreme_correlations")),
           "training_sets": (trainings_of, EVERY_SET), "rl_runs": (rl_runs_of, EVERY_RL)}
