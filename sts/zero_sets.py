"""Which latents are set to zero: the most shifted, and the sets that they are compared with.

A latent's energy is its mean square over tokens. With decoder norms of one that is the squared length of what zeroing
the latent takes out of the residual stream, so energy says how much a set removes, whatever its latents mean.

Shape suffixes: K chosen latents, L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sts.errors import StsError
from sts.shift import shifted_dimensions

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
        kind: none, most_shifted, most_active, random or matched.
        count: number of latents.
        draw: of random and matched sets, which one; else 0.
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
                 seed: int) -> list[ZeroSet]:
    """Every set that is zeroed; first the empty one.

    For each number of latents: the most shifted; the most active, those of largest energy; `draws` random sets, drawn
    evenly from all that are not among the most shifted; and `draws` sets matched to the most shifted in energy.

    Args:
        change_L: squared change by fine-tuning.
        energy_L: energy on the tokens whose bits are counted.
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
        matched = []
        for draw in range(draws):
            sets.append(built("random", count, draw, random_latents(len(change_L), most.latents, count, (seed, draw))))
            matched.append(built("matched", count, draw, matched_latents(energy_L, most.latents, (seed, draw))))
        near = [abs(one.energy - most.energy) <= TOLERANCE * most.energy for one in matched]
        enough = sum(near) >= min(FEWEST, draws)
        sets += [ZeroSet(one.kind, count, one.draw, one.latents, one.energy, usable=enough and fits)
                 for one, fits in zip(matched, near, strict=True)]
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
