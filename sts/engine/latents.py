"""Latents: encoded chunk by chunk, and their streamed statistics, float64 sums that take the same memory for a thousand
tokens and a billion. Chunks are dense (tokens x latents) or sparse (the few that fire); the sums are the same.

Shape suffixes: T tokens, D residual width, L latents, N nonzero values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from sts.engine.residuals import is_out_of_memory
from sts.engine.work import Work

#: Values in one chunk of latents (64 MB in float32): wide SAEs get fewer tokens at a time.
CHUNK_VALUES = 16_000_000
#: A GPU's chunks are this much larger: small ones would leave it waiting for the next.
GPU_CHUNKS = 8
#: Chunks with a smaller share of nonzero values are summed sparsely.
SPARSE_SHARE = 0.25
#: Values of a dense chunk that are in float64 at once (16 MB).
DENSE_VALUES = 2_000_000


@dataclass(frozen=True)
class SparseLatents:
    """The nonzero latents of a chunk of tokens: latents[n] of token rows[n] has values[n]; in order of token, latent.
    `shape` is (tokens, latents)."""

    rows_N: torch.Tensor
    latents_N: torch.Tensor
    values_N: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, latents_TL: torch.Tensor) -> SparseLatents:
        """The nonzero entries of a dense or a COO chunk."""
        if latents_TL.is_sparse:
            # Not `coalesce`: a TopK SAE names each place once, and zeros go first.
            rows_N, columns_N = latents_TL._indices()
            values_N = latents_TL._values()
            kept_N = values_N != 0
            rows_N, columns_N, values_N = rows_N[kept_N], columns_N[kept_N], values_N[kept_N]
            order_N = torch.argsort(rows_N * latents_TL.shape[1] + columns_N)
            rows_N, columns_N, values_N = rows_N[order_N], columns_N[order_N], values_N[order_N]
        else:
            rows_N, columns_N = latents_TL.nonzero(as_tuple=True)
            values_N = latents_TL[rows_N, columns_N]
        return cls(rows_N, columns_N, values_N.double(), (len(latents_TL), latents_TL.shape[1]))

    def minus(self, other: SparseLatents) -> SparseLatents:
        """Entry by entry difference of two chunks of the same tokens; its entries are not in order."""
        mine_N = self.rows_N * self.shape[1] + self.latents_N
        theirs_M = other.rows_N * other.shape[1] + other.latents_N
        values_N = self.values_N.clone()
        if len(mine_N):
            place_M = torch.searchsorted(mine_N, theirs_M).clamp(max=len(mine_N) - 1)
            both_M = mine_N[place_M] == theirs_M
            values_N[place_M[both_M]] -= other.values_N[both_M]  # each place occurs once
        else:
            both_M = torch.zeros_like(theirs_M, dtype=torch.bool)
        return SparseLatents(torch.cat([self.rows_N, other.rows_N[~both_M]]),
                             torch.cat([self.latents_N, other.latents_N[~both_M]]),
                             torch.cat([values_N, -other.values_N[~both_M]]), self.shape)


Chunk = torch.Tensor | SparseLatents


def sum_by_latent(chunk: Chunk, power: int = 1) -> torch.Tensor:
    """Per latent, the sum over a chunk's tokens of value**power, in float64 on the chunk's device."""
    if isinstance(chunk, SparseLatents):
        total_L = torch.zeros(chunk.shape[1], dtype=torch.float64, device=chunk.values_N.device)
        return total_L.index_add_(0, chunk.latents_N, chunk.values_N**power)
    total_L = torch.zeros(chunk.shape[1], dtype=torch.float64, device=chunk.device)
    for block_TL in chunk.split(max(1, DENSE_VALUES // chunk.shape[1])):
        total_L += block_TL.double().pow(power).sum(0)
    return total_L


def _changes(base: Chunk, icl: Chunk) -> Iterator[Chunk]:
    """icl - base in float64; dense chunks a block at a time."""
    if isinstance(icl, SparseLatents) and isinstance(base, SparseLatents):
        yield icl.minus(base)
    elif isinstance(icl, torch.Tensor) and isinstance(base, torch.Tensor):
        step = max(1, DENSE_VALUES // icl.shape[1])
        for base_TL, icl_TL in zip(torch.split(base, step), torch.split(icl, step), strict=True):
            yield icl_TL.double() - base_TL.double()


@dataclass
class LatentStats:
    """Per-latent sums over tokens, in float64: value, square, firing count and maximum (at least 0)."""

    latents: int
    device: torch.device | str = "cpu"
    tokens: int = 0

    SUMS: ClassVar = ("sum_L", "square_sum_L", "fired_L", "max_L")

    def __post_init__(self) -> None:
        self.sum_L, self.square_sum_L, self.fired_L, self.max_L = (
            torch.zeros(self.latents, dtype=torch.float64, device=self.device) for _ in self.SUMS)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk of latent activations, tokens x latents."""
        self.tokens += chunk.shape[0]
        self.sum_L += sum_by_latent(chunk)
        self.square_sum_L += sum_by_latent(chunk, 2)
        if isinstance(chunk, SparseLatents):
            positive_N = chunk.values_N > 0
            self.fired_L.index_add_(0, chunk.latents_N, positive_N.double())
            self.max_L.scatter_reduce_(0, chunk.latents_N, chunk.values_N, "amax")
        elif len(chunk):
            self.fired_L += (chunk > 0).sum(0)
            self.max_L = torch.maximum(self.max_L, chunk.amax(0).double())


@dataclass
class PairedStats:
    """Sums over token pairs: the same tokens without (`base`) and behind (`icl`) demonstrations."""

    base: LatentStats
    icl: LatentStats
    difference_L: torch.Tensor
    squared_difference_L: torch.Tensor

    @classmethod
    def empty(cls, latents: int, device: torch.device | str = "cpu") -> PairedStats:
        zeros = torch.zeros(latents, dtype=torch.float64, device=device)
        return cls(LatentStats(latents, device), LatentStats(latents, device), zeros.clone(), zeros.clone())

    @property
    def tokens(self) -> int:
        return self.base.tokens

    def add(self, base: Chunk, icl: Chunk) -> None:
        """Add a chunk of pairs: row t of both is the same token. Both dense or both sparse."""
        self.base.add(base)
        self.icl.add(icl)
        for change in _changes(base, icl):
            self.difference_L += sum_by_latent(change)
            self.squared_difference_L += sum_by_latent(change, 2)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """A flat dict of float64 tensors on the CPU, for storage; `tokens` is a vector of length one."""
        flat = {"tokens": torch.tensor([float(self.tokens)], dtype=torch.float64),
                "difference_L": self.difference_L.cpu(), "squared_difference_L": self.squared_difference_L.cpu()}
        for side in ("base", "icl"):
            flat |= {f"{side}_{name}": getattr(getattr(self, side), name).cpu() for name in LatentStats.SUMS}
        return flat


# --- encoding -----------------------------------------------------------------------------------------------------

def encode_chunks(sae, residual_TD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Encode tokens chunk by chunk: (slice of rows, latents of those rows, T x L, in the SAE's precision)."""
    step = max(1, CHUNK_VALUES // sae.cfg.d_sae)
    for start in range(0, len(residual_TD), step):
        rows = slice(start, min(start + step, len(residual_TD)))
        with torch.inference_mode():  # not around the yield: the caller would run in it too
            latents_TL = sae.encode(residual_TD[rows].to(sae.device, sae.dtype))
        yield rows, latents_TL


class Encoder:
    """An SAE's latents in chunks that bound the memory, sparse where few of them fire."""

    def __init__(self, sae, work: Work | None = None):
        self.sae, self.work = sae, work or Work()
        on_gpu = torch.device(sae.device).type == "cuda"
        self.step = max(1, CHUNK_VALUES * (GPU_CHUNKS if on_gpu else 1) // sae.cfg.d_sae)

    def chunks(self, *residuals_TD: torch.Tensor) -> Iterator[tuple[Chunk, ...]]:
        """Latents of residual streams with equally many rows, the same rows at a time; all sparse or all dense."""
        start, length = 0, len(residuals_TD[0])
        while start < length:
            try:
                with torch.inference_mode():
                    latents = [self._encode(residual_TD[start:start + self.step]) for residual_TD in residuals_TD]
                    sparse = sum(_nonzero(one) for one in latents) < SPARSE_SHARE * sum(one.numel() for one in latents)
                    chunks = tuple(SparseLatents.of(one) if sparse else one for one in latents)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.step == 1:
                    raise
                chunks = ()
            latents = None  # before the caller works with the chunks, or the next attempt begins
            if not chunks:  # outside the handler, whose traceback keeps the failed chunk's tensors alive
                self.step = max(1, self.step // 2)
                self.work.note(f"Memory ran out; going on with chunks of {self.step} tokens in the SAE.")
                continue
            yield chunks
            start += self.step if start + self.step < length else length - start

    def _encode(self, residual_TD: torch.Tensor) -> torch.Tensor:
        sae = self.sae
        inputs_TD = residual_TD.to(sae.dtype)
        # sae-lens' TopK can return the chosen values alone, without writing the zeros between them.
        few = getattr(sae.cfg, "k", sae.cfg.d_sae) < SPARSE_SHARE * sae.cfg.d_sae
        if not (few and hasattr(sae.activation_fn, "use_sparse_activations")):
            return sae.encode(inputs_TD)
        before = sae.activation_fn.use_sparse_activations
        sae.activation_fn.use_sparse_activations = True
        try:
            with torch.sparse.check_sparse_tensor_invariants(enable=False):
                return sae.encode(inputs_TD)
        finally:
            sae.activation_fn.use_sparse_activations = before


def _nonzero(latents_TL: torch.Tensor) -> int:
    return latents_TL._nnz() if latents_TL.is_sparse else int(torch.count_nonzero(latents_TL))
