"""What the shift chapters draw and say, worked out once from their stages.

Every function takes an open run and computes from stored sums, in a second or less.
"""

from __future__ import annotations

import pandas
import torch

from sts.pipeline_shift import of_kind
from sts.shift import overlap, shifted_dimensions
from sts.shift_stats import Concentration, concentrations, count_grid, overlap_rows, same_fraction
from sts.stages import OpenRun

KINDS = ("sae", "raw")
#: The paper's N = 100 of 28,672 latents (its Qwen SAE), as a fraction.
PAPER_FRACTION = 100 / 28_672


def paper_number(width: int) -> int:
    """How many of `width` latents are the paper's fraction, at least one."""
    return max(1, round(PAPER_FRACTION * width))


def equal_numbers(run: OpenRun) -> dict[str, int]:
    """How many latents are zeroed in on (top_n), and how many raw dimensions are the same fraction."""
    width = {kind: of_kind(run.get("sft_shift"), kind)["squared_difference_L"].shape[0] for kind in KINDS}
    return {"sae": run.settings.top_n, "raw": same_fraction(run.settings.top_n, width["sae"], width["raw"])}


def concentration_of(run: OpenRun, kind: str, stage: str = "sft_shift") -> Concentration:
    """Concentration of the actual shift on SAE latents ("sae") or raw dimensions ("raw")."""
    change_FL = of_kind(run.get(stage), kind)["fold_squared_difference_FL"]
    return concentrations(change_FL, *equal_numbers(run).values(), paper_number(change_FL.shape[1]),
                          resamples=run.settings.bootstrap, seed=run.settings.seed)


def estimated(run: OpenRun, kind: str) -> torch.Tensor:
    """Squared change behind demonstrations, per latent or raw dimension."""
    return run.get("shift" if kind == "sae" else "raw_shift")["squared_difference_L"]


def actual(run: OpenRun, kind: str, stage: str = "sft_shift") -> torch.Tensor:
    """Squared change by fine-tuning, per latent or raw dimension."""
    return of_kind(run.get(stage), kind)["squared_difference_L"]


def overlap_curve(run: OpenRun, kind: str) -> pandas.DataFrame:
    """Overlap of estimated and actual shifted dimensions for many N; columns of `overlap_rows` and `fraction`."""
    change_L = actual(run, kind)
    counts = count_grid(len(change_L), equal_numbers(run)[kind]).tolist()
    frame = pandas.DataFrame(overlap_rows(estimated(run, kind), change_L, counts))
    return frame.assign(fraction=frame["n"] / len(change_L))


def overlap_at(run: OpenRun, kind: str, stage: str = "sft_shift") -> dict:
    """`overlap_rows` for the run's N (or the same fraction of raw dimensions)."""
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
        changes_RL, goal_L = run.get("shift_by_draw")[kind], actual(run, kind)
        rows += [{"draw": draw, "kind": kind, **_share(change_L, goal_L, count)}
                 for draw, change_L in enumerate(changes_RL, 1)]
    return pandas.DataFrame(rows)


def _share(change_L: torch.Tensor, goal_L: torch.Tensor, count: int) -> dict[str, float]:
    shared = overlap(shifted_dimensions(change_L, count), shifted_dimensions(goal_L, count))
    return {"share": shared / count, "chance": count / len(goal_L)}


def agreement_between_draws(run: OpenRun) -> list[float]:
    """Share of the run's N that two sets of demonstrations estimate alike, for every pair of sets."""
    count = run.settings.top_n
    tops = [shifted_dimensions(change_L, count) for change_L in run.get("shift_by_draw")["sae"]]
    return [overlap(one, other) / count for place, one in enumerate(tops) for other in tops[place + 1:]]


def overlap_by_demonstrations(run: OpenRun) -> pandas.DataFrame:
    """Share of overlap with the actual shift; columns demonstrations, draw, kind, share, chance."""
    rows, numbers = [], equal_numbers(run)
    for name, changes_RL in run.get("shift_by_demonstrations").items():
        kind, _, number = name.partition("/")
        rows += [{"demonstrations": int(number), "draw": draw, "kind": kind,
                  **_share(change_L, actual(run, kind), numbers[kind])} for draw, change_L in enumerate(changes_RL, 1)]
    return pandas.DataFrame(rows).sort_values(["kind", "demonstrations", "draw"], ignore_index=True)
