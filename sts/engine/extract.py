"""Extraction: run models up to the SAE's layer, encode, keep per-latent sums and nothing else.

Memory does not grow with the number of tokens: residual streams live for one batch, latents for one chunk, and one
key-value cache for each set of demonstrations. The demonstrations that a group of questions shares are run once
(residuals.py), and a question is run once without demonstrations however many sets of them it is compared behind.

Shape suffixes: T tokens, D residual width, L latents, F folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sts.data.prompts import Prompt, PromptGroup, paired_positions
from sts.engine.latents import Encoder, PairedStats
from sts.engine.models import LanguageModel
from sts.engine.prefix import NO_PREFIX, Prefix, common_prefix
from sts.engine.residuals import OUTLIER_NORM, SINK_SAMPLE, Extractor, sink_norms
from sts.engine.work import Work
from sts.errors import StsError


@dataclass(frozen=True)
class Masks:
    """Which tokens count: those of a prompt's `question` range alone, not those at its first positions, not those whose
    residual norm is above so many times the median (`residuals.sink_norms`); False or 0 switch a part off."""

    question_tokens_only: bool = True
    drop_first_positions: int = 1
    outlier_norm: float = OUTLIER_NORM

    def span(self, prompt: Prompt) -> tuple[int, int]:
        """The half-open range of positions of a prompt that count; empty where first is not below last."""
        first, last = prompt.question if self.question_tokens_only else (0, len(prompt.ids))
        return max(self.drop_first_positions, first), last


# --- rows of residual streams -------------------------------------------------------------------------------------

class Rows:
    """The counted tokens of prompts; those that the threshold was taken from are kept and not run again."""

    def __init__(self, extractor: Extractor, prompts: Sequence[Sequence[int]], spans: list[tuple[int, int]],
                 prefix: Prefix = NO_PREFIX):
        self.extractor, self.prompts, self.spans, self.prefix = extractor, prompts, spans, prefix
        self.kept: dict[int, torch.Tensor] = {}

    def thresholds(self, multiple: float) -> list[float]:
        """`sink_norms` of the extractor's layers."""
        if multiple:
            sample = list(range(min(SINK_SAMPLE, len(self.prompts))))
            self.kept = dict(zip(sample, self.take(sample), strict=True))
        return sink_norms(list(self.kept.values()), multiple, len(self.extractor.layers))

    def take(self, batch: list[int]) -> list[torch.Tensor]:
        """One tensor a prompt of the batch, its counted tokens x D."""
        new, rows = [index for index in batch if index not in self.kept], dict(self.kept)
        for part in self.extractor.batches([self.spans[index][1] for index in new], self.prefix):
            own = [new[place] for place in part]
            spans = [self.spans[index] for index in own]
            residual_TD = self.extractor.tokens([self.prompts[index] for index in own], spans, self.prefix)
            rows |= zip(own, residual_TD.split([last - first for first, last in spans]), strict=True)
        return [rows[index] for index in batch]


def norm_threshold(extractor: Extractor, prompts: list[tuple[int, ...]], spans: list[tuple[int, int]],
                   multiple: float) -> float:
    """The norm above which a token of these prompts is a sink at the extractor's layer (`residuals.sink_norms`)."""
    return Rows(extractor, prompts, spans).thresholds(multiple)[-1]


def _sinks(residual_TD: torch.Tensor, threshold: float) -> torch.Tensor:
    return residual_TD.float().norm(dim=-1) > threshold


def _nothing_left() -> StsError:
    return StsError("No token is left after masking; switch off question_tokens_only, drop_first_positions or "
                    "outlier_norm.")


# --- without and behind demonstrations ------------------------------------------------------------------------------

class _Pair(NamedTuple):
    """A question behind one set of demonstrations: which group, its prompt there, and the spans that pair."""

    group: int
    icl: Prompt
    base_span: tuple[int, int]
    icl_span: tuple[int, int]


def _pairs(groups: list[PromptGroup], masks: Masks) -> list[tuple[Prompt, list[_Pair]]]:
    """Every question once, with all that it is compared to; questions that the masks leave nothing of are dropped."""
    questions: dict[tuple[int, ...], tuple[Prompt, list[_Pair]]] = {}
    for number, group in enumerate(groups):
        for base, icl in zip(group.base, group.icl, strict=True):
            at_base, at_icl = paired_positions(base, icl, question_tokens_only=masks.question_tokens_only,
                                               drop_first_positions=masks.drop_first_positions)
            if at_base:
                questions.setdefault(base.ids, (base, []))[1].append(
                    _Pair(number, icl, (at_base[0], at_base[-1] + 1), (at_icl[0], at_icl[-1] + 1)))
    return list(questions.values())


def paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], masks: Masks, *,
                 tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None,
                 work: Work | None = None) -> PairedStats:
    """Token-paired statistics of questions without and behind demonstrations (the paper's definition).

    Args:
        groups: each holds the questions that share one set of demonstrations. A question that stands in several
            counts once for each, and is run without demonstrations once.
        tokens_per_batch: padded tokens in one forward pass; halved when memory runs out.
        report: called with the fraction done.
        work: counts what is run.

    Raises:
        StsError: prompts that do not pair, NaN activations, or masks that leave no token.
    """
    extractor = Extractor(lm, layer, tokens_per_batch, work)
    encoder, stats = Encoder(sae, extractor.work), PairedStats.empty(sae.cfg.d_sae, sae.device)
    questions = _pairs(groups, masks)
    if not questions:
        raise _nothing_left()
    # What is run once: the template before the questions, and each group's demonstrations. Template tokens that are
    # themselves paired are run with every question.
    first = [min(pair.base_span[0] for pair in pairs) for _, pairs in questions]
    start = _share(extractor, [base.ids for base, _ in questions], first)
    fronts = {}
    for number in {pair.group for _, pairs in questions for pair in pairs}:
        own = [pair for _, pairs in questions for pair in pairs if pair.group == number]
        fronts[number] = _share(extractor, [pair.icl.ids for pair in own], [pair.icl_span[0] for pair in own])

    spans = [(low, max(pair.base_span[1] for pair in pairs)) for low, (_, pairs) in zip(first, questions, strict=True)]
    base_rows = Rows(extractor, [base.ids for base, _ in questions], spans, start)
    threshold, = base_rows.thresholds(masks.outlier_norm)
    done = 0
    # Grouped by what is left to run of a question behind demonstrations, nearly the same as without them.
    for batch in extractor.batches([pairs[0].icl_span[1] - fronts[pairs[0].group].cached for _, pairs in questions]):
        rows = base_rows.take(batch)
        for number, front in fronts.items():
            own = [(index, row_TD, pair) for index, row_TD in zip(batch, rows, strict=True)
                   for pair in questions[index][1] if pair.group == number]
            for part in extractor.batches([pair.icl_span[1] for *_, pair in own], front):
                chosen = [own[place] for place in part]
                icl_TD = extractor.tokens([pair.icl.ids for *_, pair in chosen],
                                          [pair.icl_span for *_, pair in chosen], front)
                same_TD = torch.cat([row_TD[pair.base_span[0] - spans[index][0]:pair.base_span[1] - spans[index][0]]
                                     for index, row_TD, pair in chosen])
                kept_T = ~(_sinks(same_TD, threshold) | _sinks(icl_TD, threshold))
                for base, icl in encoder.chunks(same_TD[kept_T], icl_TD[kept_T]):
                    stats.add(base, icl)
        done += len(batch)
        report(done / len(questions))
    if not stats.tokens:
        raise _nothing_left()
    return stats


def _share(extractor: Extractor, prompts: list[tuple[int, ...]], first: list[int]):
    """Run the tokens that all prompts begin with and that none of them counts."""
    return extractor.share(prompts[0][:common_prefix(prompts, min(first))])


def row_paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], rows: int, *,
                     tokens_per_batch: int = 4096, work: Work | None = None) -> PairedStats:
    """Statistics of two separate runs compared row by row, as the paper's official notebook does.

    Row r of the first run is the r-th token of all prompts without demonstrations, row r of the second the r-th token
    of all prompts with them: not the same token. Template and demonstration tokens count as well; nothing is masked.
    At most `rows` rows are compared, fewer if either run has fewer.
    """
    extractor = Extractor(lm, layer, tokens_per_batch, work)
    encoder, stats = Encoder(sae, extractor.work), PairedStats.empty(sae.cfg.d_sae, sae.device)
    sides = [[prompt.ids for group in groups for prompt in side(group)]
             for side in (lambda group: group.base, lambda group: group.icl)]
    rows, first = min([rows, *(sum(map(len, prompts)) for prompts in sides)]), []
    for prompts in sides:
        left, spans = rows, []
        for ids in prompts:
            spans.append((0, min(len(ids), left)))
            left -= spans[-1][1]
            if not left:
                break
        first.append(torch.cat(Rows(extractor, prompts, spans).take(list(range(len(spans))))))
    for base, icl in encoder.chunks(*first):
        stats.add(base, icl)
    return stats


# --- in two models ------------------------------------------------------------------------------------------------

def model_paired_folds(lm: LanguageModel, tuned: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks,
                       folds: int = 1, *, tokens_per_batch: int = 4096,
                       report: Callable[[float], None] = lambda fraction: None,
                       work: Work | None = None) -> list[PairedStats]:
    """Token-paired statistics of every `folds`-th prompt, from the first, the second and so on, in two models.

    Args:
        lm: the base model; its values are the statistics' `base`.
        tuned: the same architecture with other weights, in memory of its own; its values are in the place of `icl`.
            A token whose norm is an outlier in either model counts in neither; the threshold is the base model's.

    Raises:
        StsError: NaN activations, or masks that leave a fold without a token.
    """
    work = Work() if work is None else work
    here, there = (Extractor(one, layer, tokens_per_batch, work) for one in (lm, tuned))
    encoder, stats = Encoder(sae, work), [PairedStats.empty(sae.cfg.d_sae, sae.device) for _ in range(folds)]
    chosen = [(prompt.ids, masks.span(prompt), place % folds) for place, prompt in enumerate(prompts)
              if masks.span(prompt)[0] < masks.span(prompt)[1]]
    threshold = norm_threshold(here, [ids for ids, *_ in chosen], [span for _, span, _ in chosen], masks.outlier_norm)
    done = 0
    for batch in here.batches([span[1] for _, span, _ in chosen]):
        ids, own, fold_of = zip(*(chosen[index] for index in batch), strict=True)
        base_TD, tuned_TD = here.tokens(ids, own), there.tokens(ids, own)
        kept_T = ~(_sinks(base_TD, threshold) | _sinks(tuned_TD, threshold))
        fold_T = torch.tensor([fold for fold, (first, last) in zip(fold_of, own, strict=True)
                               for _ in range(first, last)], device=kept_T.device)
        for fold in set(fold_of):
            rows_T = kept_T & (fold_T == fold)
            for base, after in encoder.chunks(base_TD[rows_T], tuned_TD[rows_T]):
                stats[fold].add(base, after)
        done += len(batch)
        report(done / len(chosen))
    if not all(part.tokens for part in stats):
        raise _nothing_left()
    return stats


def folded(parts: list[PairedStats]) -> dict[str, torch.Tensor]:
    """Statistics of folds as one dict of tensors: `PairedStats.to_tensors()` of all folds together, and for each fold
    fold_squared_difference_FL and fold_tokens_F."""
    fields = [part.to_tensors() for part in parts]
    total = {name: torch.stack([one[name] for one in fields]).amax(0) if name.endswith("max_L")
             else torch.stack([one[name] for one in fields]).sum(0) for name in fields[0]}
    return total | {"fold_squared_difference_FL": torch.stack([one["squared_difference_L"] for one in fields]),
                    "fold_tokens_F": torch.cat([one["tokens"] for one in fields])}
