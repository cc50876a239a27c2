"""What the shift chapters draw and say, worked out once from their stages.

Every function takes an open run and computes from stored sums, in a second or less.
"""

from __future__ import annotations

import numpy as np
import pandas
import torch

from sts.measure.items import MeanInterval, paired_mean_interval
from sts.measure.shift import concentration, overlap, shifted_dimensions
from sts.measure.shift_stats import Concentration, concentrations, count_grid, overlap_rows, same_fraction
from sts.run.run import OpenRun
from sts.stages.shift import KINDS, of_kind

#: The paper's N = 100 of 28,672 latents (its Qwen SAE), as a fraction.
PAPER_FRACTION = 100 / 28_672
#: Lists of latents that need no demonstration of the training domain: what each is called in a sentence.
BASELINES = {"rate": "the latents that fire most often on the same questions",
             "energy": "the latents of largest energy on them",
             "other_domain": "those that demonstrations of other domains move"}


def paper_number(width: int) -> int:
    """How many of `width` latents are the paper's fraction, at least one."""
    return max(1, round(PAPER_FRACTION * width))


def equal_numbers(run: OpenRun) -> dict[str, int]:
    """How many latents are zeroed in on (top_n), and how many of each other code are the same fraction."""
    width = {kind: of_kind(run.get("sft_shift"), kind)["squared_difference_L"].shape[0] for kind in KINDS}
    return {"sae": run.settings.top_n} | {kind: same_fraction(run.settings.top_n, width["sae"], width[kind])
                                          for kind in KINDS if kind != "sae"}


# --- how concentrated the change is -------------------------------------------------------------------------------

def concentration_of(run: OpenRun, kind: str, stage: str = "sft_shift") -> Concentration:
    """Concentration of the actual shift on SAE latents ("sae"), a random code ("random") or raw dimensions ("raw")."""
    change_FL = of_kind(run.get(stage), kind)["fold_squared_difference_FL"]
    return concentrations(change_FL, *equal_numbers(run).values(), paper_number(change_FL.shape[1]),
                          seed=run.settings.seed)


def energy_curve(run: OpenRun, kind: str = "sae") -> np.ndarray:
    """Share of the squared activation (before training, same tokens) in the 1, 2, ... latents of largest energy."""
    return concentration(of_kind(run.get("sft_shift"), kind)["base_square_sum_L"]).numpy()


# --- how well it is foreseen --------------------------------------------------------------------------------------

def estimated(run: OpenRun, kind: str) -> torch.Tensor:
    """Squared change behind demonstrations, per latent of a code."""
    if kind == "sae":
        return run.get("shift")["squared_difference_L"]
    return of_kind(run.get("shift_controls"), kind)["squared_difference_L"]


def actual(run: OpenRun, kind: str, stage: str = "sft_shift") -> torch.Tensor:
    """Squared change by fine-tuning, per latent of a code."""
    return of_kind(run.get(stage), kind)["squared_difference_L"]


def _curve(run: OpenRun, kind: str, first_L: torch.Tensor) -> pandas.DataFrame:
    change_L = actual(run, kind)
    counts = count_grid(len(change_L), equal_numbers(run)[kind]).tolist()
    frame = pandas.DataFrame(overlap_rows(first_L, change_L, counts))
    return frame.assign(fraction=frame["n"] / len(change_L))


def overlap_curve(run: OpenRun, kind: str) -> pandas.DataFrame:
    """Overlap of estimated and actual shifted dimensions for many N; columns of `overlap_rows` and `fraction`."""
    return _curve(run, kind, estimated(run, kind))


def baseline_curves(run: OpenRun) -> dict[str, pandas.DataFrame]:
    """The same for two lists that no demonstration is needed for: SAE latents by firing rate ("rate") and by energy."""
    stats = run.get("shift")
    return {"rate": _curve(run, "sae", stats["base_fired_L"]),
            "energy": _curve(run, "sae", stats["base_square_sum_L"])}


def overlap_at(run: OpenRun, kind: str, stage: str = "sft_shift") -> dict:
    """`overlap_rows` for the run's N (or the same fraction of another code)."""
    return overlap_rows(estimated(run, kind), actual(run, kind, stage), [equal_numbers(run)[kind]])[0]


def ceiling(run: OpenRun, kind: str) -> float:
    """Share of the run's N on which the actual shift of one half of the questions agrees with the other half's."""
    change_FL = of_kind(run.get("sft_shift"), kind)["fold_squared_difference_FL"]
    count = equal_numbers(run)[kind]
    halves = [shifted_dimensions(change_FL[start::2].sum(0), count) for start in (0, 1)]
    return overlap(*halves) / count


def overlap_by_draw(run: OpenRun) -> pandas.DataFrame:
    """For each set of demonstrations: share of overlap with the actual shift; columns draw, kind, share, chance."""
    rows = []
    for kind, count in equal_numbers(run).items():
        goal_L = actual(run, kind)
        rows += [{"draw": draw, "kind": kind, **_share(change_L, goal_L, count)}
                 for draw, change_L in enumerate(run.get("shift_by_draw")[f"{kind}/squared_difference_RL"], 1)]
    return pandas.DataFrame(rows)


def baselines_by_draw(run: OpenRun) -> pandas.DataFrame:
    """Share of the actual top N that each list of `BASELINES` names, beside each set; columns draw, baseline, share.

    The questions are those behind the sets, so that all lists rest on the same tokens. Firing rates and energies do
    not depend on the set; the sets of other domains are paired with the training domain's in order.
    """
    goal_L, count = actual(run, "sae"), run.settings.top_n
    stats = of_kind(run.get("shift_by_draw"), "sae")
    others_RL = run.get("shift_by_other_domain")["sae/squared_difference_RL"]
    lists = [{"rate": stats["base_fired_L"], "energy": stats["base_square_sum_L"], "other_domain": other_L}
             for other_L in others_RL]
    return pandas.DataFrame([{"draw": draw, "baseline": name, "share": _share(value_L, goal_L, count)["share"]}
                             for draw, own in enumerate(lists, 1) for name, value_L in own.items()])


def activity_shares(run: OpenRun) -> dict[str, float]:
    """For each code, the share of its actual top N in the better of two lists made without demonstrations.

    The lists are by firing rate and by energy, on the questions behind the sets. Codes differ in how far activity
    alone tells what will change, so a code's share foreseen is compared with this.
    """
    found, numbers = {}, equal_numbers(run)
    for kind in KINDS:
        stats, goal_L = of_kind(run.get("shift_by_draw"), kind), actual(run, kind)
        found[kind] = max(_share(stats[name], goal_L, numbers[kind])["share"]
                          for name in ("base_fired_L", "base_square_sum_L"))
    return found


def leads(run: OpenRun) -> dict[str, MeanInterval]:
    """By how much the sets' share foreseen exceeds each baseline's, and each other code's; intervals over sets.

    Returns:
        Keys of `BASELINES`: mean difference of shares. "raw" and "random": of what either code's share exceeds its own
        `activity_shares` by.
    """
    by_draw, alone = overlap_by_draw(run).pivot(index="draw", columns="kind", values="share"), activity_shares(run)
    baselines = baselines_by_draw(run).pivot(index="draw", columns="baseline", values="share")
    gain = by_draw - pandas.Series(alone)
    differences = {name: by_draw["sae"] - baselines[name] for name in BASELINES}
    differences |= {kind: gain["sae"] - gain[kind] for kind in KINDS if kind != "sae"}
    return {name: paired_mean_interval(values.to_numpy(), resamples=run.settings.bootstrap, seed=run.settings.seed)
            for name, values in differences.items()}


def _share(change_L: torch.Tensor, goal_L: torch.Tensor, count: int) -> dict[str, float]:
    shared = overlap(shifted_dimensions(change_L, count), shifted_dimensions(goal_L, count))
    return {"share": shared / count, "chance": count / len(goal_L)}


def agreement_between_draws(run: OpenRun) -> list[float]:
    """Share of the run's N that two sets of demonstrations estimate alike, for every pair of sets."""
    count = run.settings.top_n
    tops = [shifted_dimensions(change_L, count) for change_L in run.get("shift_by_draw")["sae/squared_difference_RL"]]
    return [overlap(one, other) / count for place, one in enumerate(tops) for other in tops[place + 1:]]


def overlap_by_demonstrations(run: OpenRun) -> pandas.DataFrame:
    """Share of overlap with the actual shift; columns demonstrations, draw, kind, share, chance."""
    rows, numbers = [], equal_numbers(run)
    for name, changes_RL in run.get("shift_by_demonstrations").items():
        kind, _, number = name.partition("/")
        rows += [{"demonstrations": int(number), "draw": draw, "kind": kind,
                  **_share(change_L, actual(run, kind), numbers[kind])} for draw, change_L in enumerate(changes_RL, 1)]
    return pandas.DataFrame(rows).sort_values(["kind", "demonstrations", "draw"], ignore_index=True)
