"""STS, the SAE-based transferability score: which latents a worked example shifts, and how much a domain uses them; and
how concentrated a shift is, and how far two shifts agree.

Two named variants. `paper`: the formulas of arXiv 2603.02908, section 3: activations summed over the shifted latents
and averaged over tokens; changes taken between the same token without and behind demonstrations. `official_code`: what
the notebook of the official repository computes: squared activations averaged over tokens and latents; changes taken
between row r of two separate runs. A changed formula is changed in this file alone.

Shape suffixes: F folds (groups of questions), L latents, K numbers of latents, R random orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas
import torch
from scipy import stats as scipy_stats

from sts.errors import StsError

Stats = Mapping[str, torch.Tensor]
#: Variant -> score -> the sum over tokens that it is made of, and whether the N latents are averaged and not summed.
FORMULAS = {"paper": {"sts_act": ("base_sum_L", False), "sts_icl": ("squared_difference_L", False)},
            "official_code": {"sts_act": ("base_square_sum_L", True), "sts_icl": ("squared_difference_L", True)}}
VARIANTS = tuple(FORMULAS)
#: Raise it when a formula changes: it is part of the version of every stage that scores.
REVISION = 0


def sums_of(variant: str) -> set[str]:
    """The sums by latent that a variant's scores are made of."""
    return {field for field, _ in FORMULAS[variant].values()}


def check_top_n(top_n: int, latents: int) -> None:
    """Raise `StsError` unless the N most shifted of so many latents can be named."""
    if not 1 <= top_n <= latents:
        raise StsError(f"The {top_n} most shifted latents were asked for; the SAE has {latents}. "
                       f"Set top_n between 1 and {latents}.")


def shifted_dimensions(squared_difference_L: torch.Tensor, top_n: int) -> torch.Tensor:
    """D_N: int64 indices of the N latents with the largest summed (or mean) squared change, largest first.

    Ties go to the lower index, so that the choice is the same on every machine. `StsError` if N is larger than the
    number of latents, or the change holds NaN."""
    check_top_n(top_n, len(squared_difference_L))
    if not torch.isfinite(squared_difference_L).all():
        raise StsError("The change per latent holds NaN or infinite values; the extraction that made it is broken.")
    return torch.sort(squared_difference_L, descending=True, stable=True).indices[:top_n]


def concentration(squared_difference_L: torch.Tensor) -> torch.Tensor:
    """Cumulative share of the total squared change carried by the 1, 2, ... most shifted latents (Figure 1a)."""
    total = squared_difference_L.sum()
    if total <= 0:
        raise StsError("No latent changed at all, so its concentration is undefined.")
    return torch.sort(squared_difference_L, descending=True).values.cumsum(0) / total


def overlap(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many indices two sets of latents share (Figure 2a)."""
    return len(set(first.tolist()) & set(second.tolist()))


def score_domain(variant: str, stats: Stats, dimensions: torch.Tensor) -> dict[str, float]:
    """STS_act and STS_ICL of one domain on the dimensions of these indices: {"sts_act", "sts_icl", "tokens"}.

    `stats` are the domain's `PairedStats.to_tensors()`: token-paired for `paper`, row-paired for `official_code`.
    Units: activation (the paper's act), squared activation (the others)."""
    tokens = stats["tokens"].item()
    return {score: stats[field][dimensions].sum().item() / tokens / (len(dimensions) if averaged else 1)
            for score, (field, averaged) in FORMULAS[variant].items()} | {"tokens": tokens}


def chosen_by(shift: Stats, count: int) -> torch.Tensor:
    """The `count` dimensions (all, at most) that `shift` moves most, most first."""
    return shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], count)


def score_domains(variant: str, shift: Stats, domains: Mapping[str, Stats], top_n: int) -> list[dict]:
    """Scores of all domains, as rows {"variant", "domain", "sts_act", "sts_icl", "tokens"}, on the N latents that the
    training domain shifts most; all statistics of the pairing that `variant` calls for."""
    chosen = chosen_by(shift, top_n)
    return [{"variant": variant, "domain": domain, **score_domain(variant, stats, chosen)}
            for domain, stats in domains.items()]


def count_grid(width: int, *also: int) -> np.ndarray:
    """About a hundred numbers from 1 to the width, evenly spaced in logarithm, and those in `also`."""
    grid = np.unique(np.geomspace(1, width, 120).round().astype(int))
    return np.union1d(grid, np.array([count for count in also if 1 <= count <= width], dtype=int))


def concentrations(change_FL: torch.Tensor, *also: int, random_orders: int = 200, seed: int = 0) -> pandas.DataFrame:
    """How concentrated a change, summed per fold and latent, is on few latents (Figures 1a and 2b).

    Indexed by numbers of latents, a grid and those in `also`, the shares of the total squared change that they carry:
    `share`, most shifted first, chosen and measured on the same questions, which flatters them; `held_out`, chosen by
    the other folds' change and measured on the fold left out, all folds together, with `low` and `high` (95% over
    folds); `random_low` and `random_high`, central 95% of random orders. `StsError` without two folds or a change."""
    (folds, width), change_FL = change_FL.shape, change_FL.double()
    if folds < 2:
        raise StsError(f"{folds} fold(s) of questions; choosing on some and measuring on others needs two. "
                       "More shift_tokens give more questions.")
    change_L, counts_K = change_FL.sum(0), count_grid(width, *also)
    share_K = concentration(change_L).numpy()[counts_K - 1]
    carried_FK = torch.stack([own_L[shifted_dimensions(change_L - own_L, width)].cumsum(0)[counts_K - 1]
                              for own_L in change_FL]).numpy()
    total_F, generator = change_FL.sum(1).numpy(), np.random.default_rng(seed)
    random_RK = np.stack([generator.permutation(change_L.numpy()).cumsum()[counts_K - 1] for _ in range(random_orders)])
    # Delete-one jackknife with Student's t: a percentile bootstrap of eight folds is too narrow.
    held_K = carried_FK.sum(0) / total_F.sum()
    without_FK = (carried_FK.sum(0) - carried_FK) / (total_F.sum() - total_F)[:, None]
    half_K = scipy_stats.t.ppf(0.975, folds - 1) * math.sqrt(folds - 1) * without_FK.std(0)
    low_K, high_K = np.clip([held_K - half_K, held_K + half_K], 0, 1)
    random_low_K, random_high_K = np.quantile(random_RK / total_F.sum(), [0.025, 0.975], axis=0)
    return pandas.DataFrame({
        "share": share_K, "held_out": held_K, "low": low_K, "high": high_K,
        "random_low": random_low_K, "random_high": random_high_K}, index=pandas.Index(counts_K, name="latents"))


def same_fraction(count: int, of: int, width: int) -> int:
    """How many of `width` dimensions are the fraction count / of, at least one."""
    return max(1, round(count / of * width))


def shares_named(change_RL: torch.Tensor, moved_L: torch.Tensor, count: int) -> np.ndarray:
    """Share of the `count` dimensions that moved most which each row's own `count` largest name."""
    goal = shifted_dimensions(moved_L, count)
    return np.array([overlap(shifted_dimensions(change_L, count), goal) / count for change_L in change_RL])


def overlap_rows(first_L: torch.Tensor, second_L: torch.Tensor, counts: Sequence[int]) -> list[dict]:
    """How far two rankings, by squared change per latent of two kinds, agree on their top N, against chance.

    One dict an N: n, overlap, share (overlap / N), chance (N / L, the mean for random sets), chance_low and chance_high
    (central 95% of the hypergeometric distribution, as shares), p (upper tail: random sets share at least as many), and
    the same among active latents alone, a stricter null: active (latents with any change of the second kind),
    active_chance and active_p (None where a set reaches beyond the active latents)."""
    width, active = len(second_L), second_L > 0
    first, second = (shifted_dimensions(change_L, width) for change_L in (first_L, second_L))
    rows, number = [], int(active.sum())
    for count in counts:
        shared, own = overlap(first[:count], second[:count]), int(active[first[:count]].sum())
        random, within = scipy_stats.hypergeom(width, count, count), count <= number
        low, high = random.ppf([0.025, 0.975])
        rows.append({"n": count, "overlap": shared, "share": shared / count, "chance": count / width,
                     "chance_low": float(low) / count, "chance_high": float(high) / count,
                     "p": float(random.sf(shared - 1)), "active": number,
                     "active_chance": own / number if within else None,
                     "active_p": float(scipy_stats.hypergeom.sf(shared - 1, number, own, count)) if within else None})
    return rows
