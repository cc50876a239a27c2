"""How concentrated a shift is, and how far two shifts agree.

Shape suffixes: F folds (groups of questions), L latents, K numbers of latents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.correlation import overlap_p
from sts.measure.score import concentration, overlap, shifted_dimensions

# --- concentration ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Concentration:
    """Shares of the total squared change that numbers of latents carry.

    Attributes:
        counts_K: the numbers of latents.
        share_K: most shifted first, chosen and measured on the same questions.
        held_out_K: in the order of the other folds' change, measured on the fold left out; all folds together.
            Choosing and measuring on the same questions would flatter the chosen.
        low_K, high_K: 95% interval of `held_out_K` over folds.
        random_low_K, random_high_K: central 95% of random orders; their expectation is the diagonal.
        width, folds: number of all latents, and of folds.
    """

    counts_K: np.ndarray
    share_K: np.ndarray
    held_out_K: np.ndarray
    low_K: np.ndarray
    high_K: np.ndarray
    random_low_K: np.ndarray
    random_high_K: np.ndarray
    width: int
    folds: int

    def at(self, count: int) -> dict[str, float]:
        """The shares for one of `counts_K`: share, held_out, low, high."""
        place = self.counts_K.tolist().index(count)
        return {name: float(getattr(self, f"{name}_K")[place]) for name in ("share", "held_out", "low", "high")}


def count_grid(width: int, *also: int) -> np.ndarray:
    """About a hundred numbers from 1 to the width, evenly spaced in logarithm, and those in `also`."""
    grid = np.unique(np.geomspace(1, width, 120).round().astype(int))
    return np.union1d(grid, np.array([count for count in also if 1 <= count <= width], dtype=int))


def ratio_interval(part_FK: np.ndarray, whole_F: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low_K, high_K), within 0 and 1, of sum(part) / sum(whole) over folds: delete-one jackknife with Student's t, as
    a percentile bootstrap of eight folds is too narrow."""
    folds = len(whole_F)
    without_FK = (part_FK.sum(0) - part_FK) / (whole_F.sum() - whole_F)[:, None]
    error_K = np.sqrt((folds - 1) / folds * ((without_FK - without_FK.mean(0)) ** 2).sum(0))
    half_K = scipy_stats.t.ppf((1 + level) / 2, folds - 1) * error_K
    ratio_K = part_FK.sum(0) / whole_F.sum()
    return np.clip(ratio_K - half_K, 0, 1), np.clip(ratio_K + half_K, 0, 1)


def concentrations(change_FL: torch.Tensor, *also: int, orders: int = 200, seed: int = 0) -> Concentration:
    """How concentrated a change is on few latents (Figures 1a and 2b).

    Args:
        change_FL: summed squared change per fold and latent.
        also: numbers of latents that the result must hold, besides a grid.
        orders, seed: number and seed of random orders for their band.

    Raises:
        StsError: fewer than two folds, or no change at all.
    """
    (folds, width), change_FL = change_FL.shape, change_FL.double()
    if folds < 2:
        raise StsError(f"{folds} fold(s) of questions; choosing on some and measuring on others needs two. "
                       "More shift_tokens give more questions.")
    change_L, counts_K = change_FL.sum(0), count_grid(width, *also)
    share_K = concentration(change_L).numpy()[counts_K - 1]
    carried_FK = torch.stack([own_L[shifted_dimensions(change_L - own_L, width)].cumsum(0)[counts_K - 1]
                              for own_L in change_FL]).numpy()
    total_F, generator = change_FL.sum(1).numpy(), np.random.default_rng(seed)
    random_RK = np.stack([generator.permutation(change_L.numpy()).cumsum()[counts_K - 1] for _ in range(orders)])
    low_K, high_K = ratio_interval(carried_FK, total_F)
    random_low_K, random_high_K = np.quantile(random_RK / total_F.sum(), [0.025, 0.975], axis=0)
    return Concentration(counts_K, share_K, carried_FK.sum(0) / total_F.sum(), low_K, high_K, random_low_K,
                         random_high_K, width, folds)


def same_fraction(count: int, of: int, width: int) -> int:
    """How many of `width` dimensions are the fraction count / of, at least one."""
    return max(1, round(count / of * width))


# --- overlap ------------------------------------------------------------------------------------------------------

def overlap_rows(first_L: torch.Tensor, second_L: torch.Tensor, counts: Sequence[int], *,
                 level: float = 0.95) -> list[dict]:
    """How far two rankings, by squared change per latent of two kinds, agree on their top N, against chance.

    Returns:
        One dict an N: n, overlap, share (overlap / N), chance (N / L, the mean for random sets), chance_low and
        chance_high (central `level` of the hypergeometric distribution, as shares), p (upper tail: random sets share
        at least as many), and the same among active latents alone, a stricter null: active (latents with any change of
        the second kind), active_chance and active_p (None where a set reaches beyond the active latents).
    """
    width, active = len(second_L), second_L > 0
    first, second = (shifted_dimensions(change_L, width) for change_L in (first_L, second_L))
    rows = []
    for count in counts:
        shared, random = overlap(first[:count], second[:count]), scipy_stats.hypergeom(width, count, count)
        low, high = random.ppf([(1 - level) / 2, (1 + level) / 2])
        rows.append({"n": count, "overlap": shared, "share": shared / count, "chance": count / width,
                     "chance_low": float(low) / count, "chance_high": float(high) / count,
                     "p": overlap_p(width, count, count, shared), "active": int(active.sum()), "active_chance": None,
                     "active_p": None})
        if count <= rows[-1]["active"]:
            own, number = int(active[first[:count]].sum()), rows[-1]["active"]
            rows[-1] |= {"active_chance": own / number, "active_p": overlap_p(number, own, count, shared)}
    return rows
