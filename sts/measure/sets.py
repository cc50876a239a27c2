"""Which latents are set to zero: the most shifted, and the sets that they are compared with.

A latent's energy is its mean square over tokens. With decoder norms of one that is the squared length of what zeroing
the latent takes out of the residual stream, so energy says how much a set removes, whatever its latents mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sts.errors import StsError
from sts.measure.score import shifted_dimensions

TOLERANCE = 0.1  # how far a matched set's total may be from that of the set it imitates
NEAREST = 3  # a partner is drawn among at least so many nearest ones, so that the draws differ
FEWEST = 2  # matched sets that must be within the tolerance: one alone does not tell how much sets differ


@dataclass(frozen=True)
class ZeroSet:
    """A set of latents to zero.

    `kind` is none, most_shifted, most_active, random, matched (in energy) or like_rate (matched in firing rate); `draw`
    tells drawn sets apart; `energy` is the latents' sum, per token. A set that failed to match is not `usable`.
    """

    kind: str
    count: int
    draw: int
    latents: torch.Tensor
    energy: float
    usable: bool = True


def sets_to_zero(change_L: torch.Tensor, energy_L: torch.Tensor, counts: Sequence[int], draws: int,
                 seed: int, rate_L: torch.Tensor) -> list[ZeroSet]:
    """Every set that is zeroed, the empty one first: for each number of latents those that fine-tuning changed most,
    those of largest energy, and `draws` sets each without any of the most changed: random ones, and ones matched to
    them in energy and in firing rate, on the tokens whose bits are counted. Each draw has random numbers of its own.
    """
    def built(kind: str, count: int, draw: int, latents: torch.Tensor) -> ZeroSet:
        return ZeroSet(kind, count, draw, latents, energy_L[latents].sum().item())

    sets = [built("none", 0, 0, torch.tensor([], dtype=torch.long))]
    for count in counts:
        most = shifted_dimensions(change_L, count)
        sets += [built("most_shifted", count, 0, most),
                 built("most_active", count, 0, shifted_dimensions(energy_L, count))]
        sets += [built("random", count, draw, random_latents(len(change_L), most, (seed, draw)))
                 for draw in range(draws)]
        for kind, measure_L in (("matched", energy_L), ("like_rate", rate_L)):
            own = [built(kind, count, draw, matched_latents(measure_L, most, (seed, draw))) for draw in range(draws)]
            goal = measure_L[most].sum()
            near = [bool((measure_L[one.latents].sum() - goal).abs() <= TOLERANCE * goal) for one in own]
            enough = sum(near) >= min(FEWEST, draws)
            sets += [replace(one, usable=enough and fits) for one, fits in zip(own, near, strict=True)]
    return sets


def _others(width: int, chosen: torch.Tensor) -> np.ndarray:
    """All latents but the chosen; `StsError` if they are fewer."""
    others = np.setdiff1d(np.arange(width), chosen.numpy())
    if len(others) < len(chosen):
        raise StsError(f"{len(chosen)} latents were chosen, and the {len(others)} others are too few for a set beside "
                       f"them. Set top_n to at most {width // 2}, and ablation_latents too.")
    return others


def random_latents(width: int, chosen: torch.Tensor, seed: int | Sequence[int]) -> torch.Tensor:
    """As many latents as chosen, drawn evenly from all others; `StsError` if those are fewer."""
    others = _others(width, chosen)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(others, len(chosen), replace=False)))


def matched_latents(energy_L: torch.Tensor, chosen: torch.Tensor, seed: int | Sequence[int]) -> torch.Tensor:
    """As many latents as chosen, none of them chosen, of like energy (or another measure) one by one and in total.

    Each of the chosen, largest first, gets a partner drawn from those still left: among those whose energy differs by
    less than `TOLERANCE` (in logarithm), and the `NEAREST` nearest. What a partner has too little, the next one is
    asked to have more. Where the others do not hold enough, the result holds less: compare the totals. `StsError` if
    fewer latents are left than were chosen.
    """
    generator, energies = np.random.default_rng(seed), energy_L.double().numpy()
    left = _others(len(energies), chosen)
    # Silent latents stand a factor of ten below the weakest that fires.
    floor = energies[energies > 0].min() / 10 if (energies > 0).any() else 1.0
    log_L = np.log(np.maximum(energies, floor))
    found, owed = [], 0.0
    for own in np.sort(energies[chosen.numpy()])[::-1]:
        away = np.abs(log_L[left] - np.log(max(own + owed, floor)))
        reach = max(np.sort(away)[min(NEAREST, len(away)) - 1], TOLERANCE)
        place = generator.choice(np.flatnonzero(away <= reach))
        found.append(left[place])
        owed += own - energies[left[place]]
        left = np.delete(left, place)
    return torch.from_numpy(np.sort(np.array(found, dtype=np.int64)))


def latent_activity(stats: Mapping[str, torch.Tensor], norms_L: torch.Tensor, *,
                    tuned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Firing rates and energies in one of the models of paired statistics; `norms_L` are decoder vectors' lengths."""
    side = "icl" if tuned else "base"
    return (stats[f"{side}_fired_L"] / stats["tokens"],
            stats[f"{side}_square_sum_L"] / stats["tokens"] * norms_L.square())
