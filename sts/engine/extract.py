"""Extraction: run models up to the SAE's layer, encode, keep per-latent sums and nothing else.

Memory does not grow with the number of tokens: residual streams live for one batch, latents for one chunk, and one
key-value cache for each side of a group. The demonstrations that a group of questions shares are run once.

Shape suffixes: T tokens, D residual width, L latents, F folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sts.data.prompts import Prompt, PromptGroup, paired_positions
from sts.engine.latents import PairedStats, encode_chunks
from sts.engine.models import LanguageModel
from sts.engine.residuals import OUTLIER_NORM, Extractor, Prefix, common_prefix, is_content
from sts.engine.work import Work
from sts.errors import StsError

#: Token ids of a prompt, and the half-open range of its positions that counts.
Side = tuple[tuple[int, ...], tuple[int, int]]


@dataclass(frozen=True)
class Masks:
    """Which tokens count: those of a prompt's `question` range alone, not those at its first positions, not those whose
    residual norm is above so many times the median (`Extractor.sink_norms`); False or 0 switch a part off."""

    question_tokens_only: bool = True
    drop_first_positions: int = 1
    outlier_norm: float = OUTLIER_NORM

    def span(self, prompt: Prompt) -> tuple[int, int]:
        """The half-open range of positions of a prompt that count; empty where first is not below last."""
        first, last = prompt.question if self.question_tokens_only else (0, len(prompt.ids))
        return max(self.drop_first_positions, first), last


def _add(stats: PairedStats, sae, base_TD: torch.Tensor, icl_TD: torch.Tensor, limit: float) -> None:
    """Add token pairs; a token that is a sink on either side counts on neither."""
    kept_T = is_content(base_TD, limit) & is_content(icl_TD, limit)
    for _, (base_TL, icl_TL) in encode_chunks(sae, base_TD[kept_T], icl_TD[kept_T]):
        stats.add(base_TL, icl_TL)


def _checked(stats: list[PairedStats]) -> list[PairedStats]:
    if not all(part.tokens for part in stats):
        raise StsError("No token is left after masking; switch off question_tokens_only, drop_first_positions or "
                       "outlier_norm.")
    return stats


# --- without and behind demonstrations ------------------------------------------------------------------------------

def _sides(group: PromptGroup, masks: Masks) -> tuple[list[Side], list[Side]]:
    """A group's questions without and behind demonstrations, but for those that the masks leave nothing of."""
    bases, icls = [], []
    for base, icl in zip(group.base, group.icl, strict=True):
        at_base, at_icl = paired_positions(base, icl, question_tokens_only=masks.question_tokens_only,
                                           drop_first_positions=masks.drop_first_positions)
        if at_base:
            bases.append((base.ids, (at_base[0], at_base[-1] + 1)))
            icls.append((icl.ids, (at_icl[0], at_icl[-1] + 1)))
    return bases, icls


def paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], masks: Masks, *,
                 tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None,
                 work: Work | None = None) -> PairedStats:
    """Token-paired statistics of questions without and behind demonstrations (the paper's definition). A group's
    questions share one set of demonstrations; a question in several groups counts in each.

    Args:
        tokens_per_batch: padded tokens in one forward pass; halved when memory runs out.
        report: called with the fraction done.
        work: counts what is run.

    Raises:
        StsError: prompts that do not pair, NaN activations, or masks that leave no token.
    """
    extractor, stats = Extractor(lm, layer, tokens_per_batch, work), PairedStats(sae.cfg.d_sae, sae.device)
    pairs = [sides for sides in (_sides(group, masks) for group in groups) if sides[0]]
    every = [side for bases, _ in pairs for side in bases]
    limit, = extractor.sink_norms([ids for ids, _ in every], [span for _, span in every], masks.outlier_norm)
    done = 0
    for sides in pairs:
        # Run once: the template before the questions, and the demonstrations, but for tokens that are paired.
        fronts = [_share(extractor, side) for side in sides]
        for batch in extractor.batches([last for _, (_, last) in sides[1]], fronts[1]):
            base_TD, icl_TD = (extractor.tokens([side[index][0] for index in batch],
                                                [side[index][1] for index in batch], front)
                               for side, front in zip(sides, fronts, strict=True))
            _add(stats, sae, base_TD, icl_TD, limit)
            done += len(batch)
            report(done / len(every))
    return _checked([stats])[0]


def _share(extractor: Extractor, side: list[Side]) -> Prefix:
    return extractor.share(side[0][0][:common_prefix([ids for ids, _ in side], min(first for _, (first, _) in side))])


def row_paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], rows: int, *,
                     tokens_per_batch: int = 4096, work: Work | None = None) -> PairedStats:
    """Statistics of two separate runs compared row by row, as the paper's official notebook does.

    Row r of the first run is the r-th token of all prompts without demonstrations, row r of the second the r-th token
    of all prompts with them: not the same token. Template and demonstration tokens count as well; nothing is masked.
    At most `rows` rows are compared, fewer if either run has fewer.
    """
    extractor, stats = Extractor(lm, layer, tokens_per_batch, work), PairedStats(sae.cfg.d_sae, sae.device)
    runs = [[prompt.ids for group in groups for prompt in getattr(group, side)] for side in ("base", "icl")]
    rows = min([rows, *(sum(map(len, prompts)) for prompts in runs)])
    base_TD, icl_TD = (_first_rows(extractor, prompts, rows) for prompts in runs)
    _add(stats, sae, base_TD, icl_TD, float("inf"))
    return stats


def _first_rows(extractor: Extractor, prompts: list[tuple[int, ...]], rows: int) -> torch.Tensor:
    """The residual stream of the first `rows` tokens of all prompts."""
    ends, found = [], {}
    for ids in prompts:
        if rows > sum(ends):
            ends.append(min(len(ids), rows - sum(ends)))
    for batch in extractor.batches(ends):
        own = [ends[index] for index in batch]
        residual_TD = extractor.tokens([prompts[index] for index in batch], [(0, end) for end in own])
        found |= zip(batch, residual_TD.split(own), strict=True)
    return torch.cat([found[index] for index in range(len(ends))])


# --- in two models ------------------------------------------------------------------------------------------------

def model_paired_folds(lm: LanguageModel, tuned: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks,
                       folds: int = 1, *, tokens_per_batch: int = 4096,
                       report: Callable[[float], None] = lambda fraction: None,
                       work: Work | None = None) -> list[PairedStats]:
    """Token-paired statistics of every `folds`-th prompt, from the first, the second and so on, in two models: `base`
    is `lm`, whose median norm sets the threshold of sinks, and in the place of `icl` stands `tuned`, which has its own
    memory. `StsError` for NaN activations, or masks that leave a fold without a token."""
    work = Work() if work is None else work
    here, there = (Extractor(one, layer, tokens_per_batch, work) for one in (lm, tuned))
    chosen = [(prompt.ids, masks.span(prompt), place % folds) for place, prompt in enumerate(prompts)
              if masks.span(prompt)[0] < masks.span(prompt)[1]]
    limit, = here.sink_norms([ids for ids, *_ in chosen], [span for _, span, _ in chosen], masks.outlier_norm)
    stats, done = [PairedStats(sae.cfg.d_sae, sae.device) for _ in range(folds)], 0
    for fold, own in enumerate(stats):
        part = [(ids, span) for ids, span, place in chosen if place == fold]
        for batch in here.batches([last for _, (_, last) in part]):
            ids, spans = zip(*(part[index] for index in batch), strict=True)
            _add(own, sae, here.tokens(ids, spans), there.tokens(ids, spans), limit)
            done += len(batch)
            report(done / len(chosen))
    return _checked(stats)


def folded(parts: list[PairedStats]) -> dict[str, torch.Tensor]:
    """Statistics of folds as one dict of tensors: `PairedStats.to_tensors()` of all folds together, and for each fold
    fold_squared_difference_FL and fold_tokens_F."""
    fields = [part.to_tensors() for part in parts]
    stacked = {name: torch.stack([one[name] for one in fields]) for name in fields[0]}
    total = {name: part.amax(0) if name.endswith("max_L") else part.sum(0) for name, part in stacked.items()}
    return total | {"fold_squared_difference_FL": stacked["squared_difference_L"],
                    "fold_tokens_F": stacked["tokens"].flatten()}
