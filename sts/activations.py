"""Extraction: run the model up to the SAE's layer, encode, keep per-latent sums and nothing else.

Memory does not grow with the number of tokens: residual streams live for one batch, latents for one chunk. The
demonstrations that a group of questions shares are run once and their key-value cache is reused.

Shape suffixes: B batch, P positions, T tokens, D residual width, L latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch

from sts.errors import StsError
from sts.models import LanguageModel, residual_stream
from sts.prompts import Prompt, PromptGroup, paired_positions

#: Values in one chunk of latents (64 MB in float32): wide SAEs get fewer tokens at a time.
CHUNK_VALUES = 16_000_000


@dataclass
class LatentStats:
    """Per-latent sums over tokens, in float64: value, square, firing count and maximum."""

    latents: int
    tokens: int = 0
    sum_L: torch.Tensor = field(default=None)
    square_sum_L: torch.Tensor = field(default=None)
    fired_L: torch.Tensor = field(default=None)
    max_L: torch.Tensor = field(default=None)

    def __post_init__(self) -> None:
        for item in fields(self)[2:]:
            if getattr(self, item.name) is None:
                setattr(self, item.name, torch.zeros(self.latents, dtype=torch.float64))

    def add(self, latents_TL: torch.Tensor) -> None:
        """Add a chunk of latent activations, tokens x latents."""
        self.tokens += len(latents_TL)
        self.sum_L += latents_TL.sum(0, dtype=torch.float64).cpu()
        self.square_sum_L += latents_TL.square().sum(0, dtype=torch.float64).cpu()
        self.fired_L += (latents_TL > 0).sum(0).double().cpu()
        if len(latents_TL):
            self.max_L = torch.maximum(self.max_L, latents_TL.amax(0).double().cpu())


@dataclass
class PairedStats:
    """Sums over token pairs: the same tokens without (`base`) and behind (`icl`) demonstrations."""

    base: LatentStats
    icl: LatentStats
    difference_L: torch.Tensor
    squared_difference_L: torch.Tensor

    @classmethod
    def empty(cls, latents: int) -> PairedStats:
        zeros = torch.zeros(latents, dtype=torch.float64)
        return cls(LatentStats(latents), LatentStats(latents), zeros.clone(), zeros.clone())

    @property
    def tokens(self) -> int:
        return self.base.tokens

    def add(self, base_TL: torch.Tensor, icl_TL: torch.Tensor) -> None:
        """Add a chunk of pairs: row t of both is the same token."""
        self.base.add(base_TL)
        self.icl.add(icl_TL)
        change_TL = icl_TL - base_TL
        self.difference_L += change_TL.sum(0, dtype=torch.float64).cpu()
        self.squared_difference_L += change_TL.square().sum(0, dtype=torch.float64).cpu()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """A flat dict of float64 tensors, for storage; `tokens` is a vector of length one."""
        flat = {"tokens": torch.tensor([float(self.tokens)], dtype=torch.float64),
                "difference_L": self.difference_L, "squared_difference_L": self.squared_difference_L}
        for side in ("base", "icl"):
            stats = getattr(self, side)
            flat |= {f"{side}_{item.name}": getattr(stats, item.name) for item in fields(stats)[2:]}
        return flat


@dataclass(frozen=True)
class Masks:
    """Which tokens count; each part can be switched off (see the fields of the same names in `config.Run`)."""

    question_tokens_only: bool = True
    drop_first_positions: int = 1
    outlier_norm: float = 10.0


def encode_chunks(sae, residual_TD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Encode tokens chunk by chunk; yields (slice of rows, latents of those rows, T x L, in the SAE's precision)."""
    step = max(1, CHUNK_VALUES // sae.cfg.d_sae)
    for start in range(0, len(residual_TD), step):
        rows = slice(start, min(start + step, len(residual_TD)))
        with torch.inference_mode():  # not around the yield: the caller would run in it too
            latents_TL = sae.encode(residual_TD[rows].to(sae.dtype))
        yield rows, latents_TL


# --- batches of prompts -------------------------------------------------------------------------------------------

def common_prefix(prompts: tuple[Prompt, ...]) -> int:
    """How many leading tokens all prompts share, at most up to their first question token."""
    limit = min(prompt.question[0] for prompt in prompts)
    first = prompts[0].ids[:limit]
    for prompt in prompts[1:]:
        length = next((index for index, (a, b) in enumerate(zip(first, prompt.ids, strict=False)) if a != b), limit)
        first = first[:length]
        limit = min(limit, length)
    return limit


def prefix_cache(lm: LanguageModel, layer: int, ids: tuple[int, ...]):
    """Key-value cache of a prefix (batch of one) up to `layer`; None for an empty prefix."""
    if not ids:
        return None
    from transformers import DynamicCache

    cache = DynamicCache(config=lm.model.config)
    residual_stream(lm.model, layer, torch.tensor([ids], device=lm.device), past_key_values=cache, use_cache=True)
    return cache


def batch_residuals(lm: LanguageModel, layer: int, prompts: list[Prompt], prefix: int = 0,
                    cache=None) -> list[torch.Tensor]:
    """Residual streams of a batch, behind a cached prefix if there is one.

    Args:
        prefix: leading tokens of every prompt that `cache` already holds.

    Returns:
        One tensor a prompt, (length - prefix) x D: row r belongs to position prefix + r.

    Raises:
        StsError: a residual stream holds NaN or infinite values.
    """
    rest = [prompt.ids[prefix:] for prompt in prompts]
    longest = max(map(len, rest))
    # Padding on the right: causal attention never looks at it, and its rows are dropped.
    ids_BP = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rest], device=lm.device)
    if cache is None:
        mask_BP = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rest], device=lm.device)
        residual_BPD = residual_stream(lm.model, layer, ids_BP, attention_mask=mask_BP, use_cache=False)
    else:
        own = copy.deepcopy(cache)  # the pass appends to its cache; the prefix must stay as it is
        own.batch_repeat_interleave(len(rest))
        mask_BP = torch.tensor([[1] * (prefix + len(ids)) + [0] * (longest - len(ids)) for ids in rest],
                               device=lm.device)
        residual_BPD = residual_stream(lm.model, layer, ids_BP, attention_mask=mask_BP, past_key_values=own,
                                       use_cache=True)
    own_BP = torch.arange(longest, device=lm.device) < torch.tensor([[len(ids)] for ids in rest], device=lm.device)
    # Here, before any mask: an outlier norm is left out on purpose, an overflow must not be.
    if not torch.isfinite(residual_BPD[own_BP]).all():
        raise StsError("The residual stream holds NaN or infinite values, so no statistics can be computed. "
                       "Try dtype float32; if that does not help, the model's weights are damaged.")
    return [residual_BPD[row, :len(ids)] for row, ids in enumerate(rest)]


def _batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices grouped by length, so that rows x longest row stays within the budget."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def norm_threshold(lm: LanguageModel, layer: int, prompts: tuple[Prompt, ...], multiple: float) -> float:
    """`multiple` times the median norm of the question tokens of the first eight prompts; infinite for 0.

    A fixed small sample, so that the threshold does not depend on how prompts are batched.
    """
    if not multiple:
        return float("inf")
    sample = list(prompts[:8])
    rows = [residual[slice(*prompt.question)]
            for prompt, residual in zip(sample, batch_residuals(lm, layer, sample), strict=True)]
    return multiple * torch.cat(rows).float().norm(dim=-1).median().item()


# --- the passes ---------------------------------------------------------------------------------------------------

def paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], masks: Masks, *,
                 tokens_per_batch: int = 4096,
                 report: Callable[[float], None] = lambda fraction: None) -> PairedStats:
    """Token-paired statistics of questions without and behind demonstrations (the paper's definition).

    Args:
        groups: each holds the questions that share one set of demonstrations.
        report: called with the fraction done.

    Raises:
        StsError: prompts that do not pair, NaN activations, or masks that leave no token.
    """
    stats = PairedStats.empty(sae.cfg.d_sae)
    threshold = norm_threshold(lm, layer, groups[0].base, masks.outlier_norm)
    total, done = sum(len(group.base) for group in groups), 0
    for group in groups:
        positions = [paired_positions(base, icl, question_tokens_only=masks.question_tokens_only,
                                      drop_first_positions=masks.drop_first_positions)
                     for base, icl in zip(group.base, group.icl, strict=True)]
        # Template tokens before the question may be shared by all prompts and paired as well: run those again.
        prefix = min([common_prefix(group.icl), *(at_icl[0] for _, at_icl in positions if at_icl)])
        cache = prefix_cache(lm, layer, group.icl[0].ids[:prefix])
        # The whole prompt counts towards a batch, cached or not: its keys and values take memory all the same.
        for batch in _batches([len(prompt.ids) for prompt in group.icl], tokens_per_batch):
            base = batch_residuals(lm, layer, [group.base[index] for index in batch])
            icl = batch_residuals(lm, layer, [group.icl[index] for index in batch], prefix, cache)
            base_TD = torch.cat([base[row][positions[index][0]] for row, index in enumerate(batch)])
            icl_TD = torch.cat([icl[row][[position - prefix for position in positions[index][1]]]
                                for row, index in enumerate(batch)])
            sink_T = ((base_TD.float().norm(dim=-1) > threshold) | (icl_TD.float().norm(dim=-1) > threshold))
            base_TD, icl_TD = base_TD[~sink_T], icl_TD[~sink_T]
            for (_, base_TL), (_, icl_TL) in zip(encode_chunks(sae, base_TD), encode_chunks(sae, icl_TD), strict=True):
                stats.add(base_TL, icl_TL)
            done += len(batch)
            report(done / total)
    if not stats.tokens:
        raise StsError("No token is left after masking; switch off question_tokens_only, drop_first_positions or "
                       "outlier_norm.")
    return stats


def row_paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], rows: int, *,
                     tokens_per_batch: int = 4096) -> PairedStats:
    """Statistics of two separate runs compared row by row, as the paper's official notebook does.

    Row r of the first run is the r-th token of all prompts without demonstrations, row r of the second the r-th token
    of all prompts with them: not the same token. Template and demonstration tokens count as well; nothing is masked.
    At most `rows` rows are compared, fewer if either run has fewer.
    """
    base = [prompt for group in groups for prompt in group.base]
    icl = [prompt for group in groups for prompt in group.icl]
    rows = min(rows, sum(len(prompt.ids) for prompt in base), sum(len(prompt.ids) for prompt in icl))
    base_TD = _first_rows(lm, layer, base, rows, tokens_per_batch)
    icl_TD = _first_rows(lm, layer, icl, rows, tokens_per_batch)
    stats = PairedStats.empty(sae.cfg.d_sae)
    for (_, base_TL), (_, icl_TL) in zip(encode_chunks(sae, base_TD), encode_chunks(sae, icl_TD), strict=True):
        stats.add(base_TL, icl_TL)
    return stats


def _first_rows(lm: LanguageModel, layer: int, prompts: list[Prompt], rows: int,
                tokens_per_batch: int) -> torch.Tensor:
    """The residual stream of the first `rows` tokens of prompts run in order, rows x D."""
    kept, total, batch = [], 0, []
    for index, prompt in enumerate(prompts):
        batch.append(prompt)
        full = (len(batch) + 1) * max(len(item.ids) for item in batch) > tokens_per_batch
        enough = total + sum(len(item.ids) for item in batch) >= rows
        if full or enough or index == len(prompts) - 1:
            kept += batch_residuals(lm, layer, batch)
            total += sum(len(item.ids) for item in batch)
            batch = []
        if total >= rows:
            break
    return torch.cat(kept)[:rows]
