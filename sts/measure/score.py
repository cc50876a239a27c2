"""STS, the SAE-based transferability score: which latents a worked example shifts, and how much a domain uses them.

Two named variants. `paper`: the formulas of arXiv 2603.02908, section 3: activations summed over the shifted latents
and averaged over tokens; changes taken between the same token without and behind demonstrations. `official_code`: what
the notebook of the official repository computes: squared activations averaged over tokens and latents; changes taken
between row r of two separate runs. Whatever scores anything goes through `score_domain`; a changed formula is changed
in this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sts.errors import StsError, one_of

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
    number of latents, or the change holds NaN.
    """
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
    Units: activation (the paper's act), squared activation (the others).
    """
    if variant not in FORMULAS:
        raise one_of("Score variant", variant, VARIANTS)
    tokens = stats["tokens"].item()
    return {score: stats[field][dimensions].sum().item() / tokens / (len(dimensions) if averaged else 1)
            for score, (field, averaged) in FORMULAS[variant].items()} | {"tokens": tokens}


def score_domains(variant: str, shift: Stats, domains: Mapping[str, Stats], top_n: int) -> list[dict]:
    """Scores of all domains, as rows {"variant", "domain", "sts_act", "sts_icl", "tokens"}, on the N latents that the
    training domain shifts most; all statistics of the pairing that `variant` calls for."""
    dimensions = shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], top_n)
    return [{"variant": variant, "domain": domain, **score_domain(variant, stats, dimensions)}
            for domain, stats in domains.items()]
