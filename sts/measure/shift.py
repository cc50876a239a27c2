"""Which latents shift: ranking, concentration and overlap of shifted dimensions."""

from __future__ import annotations

import torch

from sts.errors import StsError


def check_top_n(top_n: int, latents: int) -> None:
    """Raise `StsError` unless the N most shifted of so many latents can be named."""
    if not 1 <= top_n <= latents:
        raise StsError(f"The {top_n} most shifted latents were asked for; the SAE has {latents}. "
                       f"Set top_n between 1 and {latents}.")


def shifted_dimensions(squared_difference_L: torch.Tensor, top_n: int) -> torch.Tensor:
    """D_N: indices of the N latents with the largest summed squared change, largest first.

    Args:
        squared_difference_L: per latent, sum (or mean) over tokens of the squared change.

    Returns:
        int64 indices; ties go to the lower index, so that the choice is the same on every machine.

    Raises:
        StsError: N is larger than the number of latents, or the change holds NaN.
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
