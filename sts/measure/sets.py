"""Which latents are set to zero: the most shifted, and the sets that they are compared with.

A latent's energy is its mean square over tokens. With decoder norms of one that is the squared length of what zeroing
the latent takes out of the residual stream, so energy says how much a set removes, whatever its latents mean.

Shape suffixes: K chosen latents, L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sts.errors import StsError
from sts.measure.score import shifted_dimensions

#: How far a matched set's total energy may be from that of the set it imitates.
TOLERANCE = 0.1
#: A partner is drawn among at least so many nearest ones, so that the draws differ.
NEAREST = 3
#: Matched sets that must be within the tolerance: one alone does not tell how much sets differ.
FEWEST = 2


@dataclass(frozen=True)
class ZeroSet:
    """A set of latents to zero.

    Attributes:
        kind: none, most_shifted, most_active, random, matched (in energy) or like_rate (matched in firing rate).
        count: number of latents.
        draw: of sets that are drawn, which one; else 0.
        latents: their indices.
        energy: the latents' energies summed, per token.
        usable: False for a matched set that failed to match; it is not evaluated.
    """

    kind: str
    count: int
    draw: int
    latents: torch.Tensor
    energy: float
    usable: bool = True


def sets_to_zero(change_L: torch.Tensor, energy_L: torch.Tensor, counts: Sequence[int], draws: int,
                 seed: int, rate_L: torch.Tensor | None = None) -> list[ZeroSet]:
    """Every set that is zeroed; first the empty one.

    For each number of latents: the most shifted; the most active, those of largest energy; `draws` random sets, drawn
    evenly from all that are not among the most shifted; `draws` sets matched to the most shifted in energy; and, given
    firing rates, as many matched in those.

    Args:
        change_L: squared change by fine-tuning.
        energy_L: energy on the tokens whose bits are counted.
        rate_L: firing rates on the same tokens.
        seed: of the draws; each draw has a stream of random numbers of its own.

    Raises:
        StsError: more latents than half of the SAE's.
    """
    def built(kind: str, count: int, draw: int, latents: torch.Tensor) -> ZeroSet:
        return ZeroSet(kind, count, draw, latents, energy_L[latents].sum().item())

    sets = [built("none", 0, 0, torch.tensor([], dtype=torch.long))]
    for count in counts:
        most = built("most_shifted", count, 0, shifted_dimensions(change_L, count))
        sets += [most, built("most_active", count, 0, shifted_dimensions(energy_L, count))]
        sets += [built("random", count, draw, random_latents(len(change_L), most.latents, count, (seed, draw)))
                 for draw in range(draws)]
        for kind, measure_L in (("matched", energy_L), ("like_rate", rate_L)):
            if measure_L is None:
                continue
            own = [built(kind, count, draw, matched_latents(measure_L, most.latents, (seed, draw)))
                   for draw in range(draws)]
            goal = measure_L[most.latents].sum()
            near = [bool((measure_L[one.latents].sum() - goal).abs() <= TOLERANCE * goal) for one in own]
            enough = sum(near) >= min(FEWEST, draws)
            sets += [replace(one, usable=enough and fits) for one, fits in zip(own, near, strict=True)]
    return sets


def random_latents(width: int, without: torch.Tensor, count: int, seed: int | Sequence[int]) -> torch.Tensor:
    """`count` latents drawn evenly from all but those in `without`.

    Raises:
        StsError: there are not so many.
    """
    others = np.setdiff1d(np.arange(width), without.numpy())
    if count > len(others):
        raise StsError(f"{count} random latents were asked for beside {len(without)} chosen ones; the SAE has "
                       f"{width}. Use at most {width // 2} in ablation_latents.")
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(others, count, replace=False)))


def matched_latents(energy_L: torch.Tensor, chosen: torch.Tensor, seed: int | Sequence[int]) -> torch.Tensor:
    """As many latents as chosen, none of them chosen, of like energy one by one and in total.

    Each of the chosen, largest first, gets a partner drawn from those still left: among those whose energy differs by
    less than `TOLERANCE` (in logarithm), and the `NEAREST` nearest. What a partner has too little, the next one is
    asked to have more, so that the total comes out right wherever the others hold enough. Where they do not, the
    result holds less: compare the totals.

    Args:
        energy_L: energy of each latent, or another measure of at least 0 to match by.

    Raises:
        StsError: fewer latents are left than were chosen.
    """
    generator = np.random.default_rng(seed)
    energies = energy_L.double().numpy()
    left = np.setdiff1d(np.arange(len(energies)), chosen.numpy())
    if len(left) < len(chosen):
        raise StsError(f"{len(chosen)} latents were chosen and {len(left)} others are left to match them. Use at "
                       f"most {len(energies) // 2} in ablation_latents.")
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


def latent_activity(stats: dict[str, torch.Tensor], *, tuned: bool, norms_L: torch.Tensor) -> tuple[torch.Tensor,
                                                                                                  torch.Tensor]:
    """Firing rates, and energies: mean over tokens of the squared length of what a latent adds to the residual stream.

    Args:
        stats: paired statistics of the untuned and the tuned model.
        tuned: which of the two.
        norms_L: lengths of the decoder vectors.
    """
    side = "icl" if tuned else "base"
    return (stats[f"{side}_fired_L"] / stats["tokens"],
            stats[f"{side}_square_sum_L"] / stats["tokens"] * norms_L.square())
