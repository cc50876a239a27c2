"""Latents: encoded chunk by chunk, and their streamed statistics, float64 sums that take the same memory for a thousand
tokens and a billion.

Shape suffixes: T tokens, D residual width, L latents, N nonzero values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Values in one chunk of latents (64 MB in float32), so that wide SAEs get fewer tokens at a time; on a GPU so many
#: times as many, as small chunks would leave it waiting for the next.
CHUNK_VALUES, GPU_CHUNKS = 16_000_000, 8


def encode_chunks(sae, *residuals_TD: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Latents of residual streams with equally many rows, the same rows at a time: (slice of rows, T x L of each)."""
    step = CHUNK_VALUES * (GPU_CHUNKS if torch.device(sae.device).type == "cuda" else 1) // sae.cfg.d_sae
    for start in range(0, len(residuals_TD[0]), max(1, step)):
        rows = slice(start, start + max(1, step))
        with torch.inference_mode():  # not around the yield: the caller would run in it too
            latents = [sae.encode(residual_TD[rows].to(sae.device, sae.dtype)) for residual_TD in residuals_TD]
        yield rows, latents


class LatentStats:
    """Per-latent sums over tokens, in float64: value, square, firing count and maximum (at least 0)."""

    SUMS = ("sum_L", "square_sum_L", "fired_L", "max_L")

    def __init__(self, latents: int, device: torch.device | str = "cpu", tokens: int = 0):
        self.tokens = tokens
        self.sum_L, self.square_sum_L, self.fired_L, self.max_L = torch.zeros(
            4, latents, dtype=torch.float64, device=device)

    def add(self, latents_TL: torch.Tensor) -> None:
        at = latents_TL.nonzero(as_tuple=True)
        self.add_values(len(latents_TL), at[1], latents_TL[at].double())

    def add_values(self, tokens: int, latents_N: torch.Tensor, values_N: torch.Tensor) -> None:
        """Add so many tokens, by the latents and values of all that are not zero on them."""
        self.tokens += tokens
        self.sum_L.index_add_(0, latents_N, values_N)
        self.square_sum_L.index_add_(0, latents_N, values_N.square())
        self.fired_L.index_add_(0, latents_N, (values_N > 0).double())
        self.max_L.scatter_reduce_(0, latents_N, values_N, "amax")


class PairedStats:
    """Sums over token pairs: the same tokens without (`base`) and behind (`icl`) demonstrations."""

    def __init__(self, latents: int, device: torch.device | str = "cpu"):
        self.base, self.icl = LatentStats(latents, device), LatentStats(latents, device)
        self.difference_L, self.squared_difference_L = torch.zeros(2, latents, dtype=torch.float64, device=device)

    @property
    def tokens(self) -> int:
        return self.base.tokens

    def add(self, base_TL: torch.Tensor, icl_TL: torch.Tensor) -> None:
        """Add pairs: row t of both is the same token."""
        at = ((base_TL != 0) | (icl_TL != 0)).nonzero(as_tuple=True)
        base_N, icl_N = base_TL[at].double(), icl_TL[at].double()
        self.base.add_values(len(base_TL), at[1], base_N)
        self.icl.add_values(len(icl_TL), at[1], icl_N)
        self.difference_L.index_add_(0, at[1], icl_N - base_N)
        self.squared_difference_L.index_add_(0, at[1], (icl_N - base_N).square())

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """A flat dict of float64 tensors on the CPU, for storage; `tokens` is a vector of length one."""
        flat = {"tokens": torch.tensor([float(self.tokens)], dtype=torch.float64),
                "difference_L": self.difference_L, "squared_difference_L": self.squared_difference_L}
        for side in ("base", "icl"):
            flat |= {f"{side}_{name}": getattr(getattr(self, side), name) for name in LatentStats.SUMS}
        return {name: tensor.cpu().clone() for name, tensor in flat.items()}  # files hold no views of one tensor
