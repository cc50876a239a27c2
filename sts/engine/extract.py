"""Extraction: run models up to the SAE's layer, encode, keep per-latent sums and nothing else.

Memory does not grow with the number of tokens: residual streams live for one batch, latents for one chunk, and one
key-value cache for each set of demonstrations, which a group of questions shares and which is run once.

Shape suffixes: T tokens, D residual width, L latents, F folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sts.data.prompts import Prompt, PromptGroup, make_group, paired_positions
from sts.data.sources import Example
from sts.engine.latents import PairedStats, encode_chunks
from sts.engine.models import LanguageModel
from sts.engine.residuals import NO_PREFIX, OUTLIER_NORM, Extractor, Prefix, Side, common_prefix, is_content
from sts.engine.saes import SideBySide, identity_sae, random_code
from sts.engine.work import Work
from sts.errors import StsError

#: Groups of questions; latents are chosen on some of them and measured on the others.
FOLDS = 8
#: Seed of the random code's directions: the same in every run.
CODE_SEED = 20_000


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


def _share(extractor: Extractor, sides: list[Side]) -> Prefix:
    """What all prompts begin with, but for tokens that count."""
    if not sides:
        return NO_PREFIX
    return extractor.share(sides[0][0][:common_prefix([ids for ids, _ in sides], min(span[0] for _, span in sides))])


def paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], masks: Masks, *,
                 tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None,
                 work: Work | None = None, each=None) -> PairedStats:
    """Token-paired statistics of questions without and behind demonstrations (the paper's definition). A group's
    questions share one set of demonstrations; a question in several counts in each, and is run without them once.

    `tokens_per_batch`: padded tokens in one forward pass, halved when memory runs out. `report` is told the fraction
    done, `each` ids and statistics of each question. `StsError` for prompts that do not pair, NaN, or no token left.
    """
    extractor, stats, done = Extractor(lm, layer, tokens_per_batch, work), PairedStats(sae.cfg.d_sae, sae.device), 0
    behind: dict[Side, list[tuple[int, Side]]] = {}  # of a question: (group, the same behind its demonstrations)
    for number, group in enumerate(groups):
        for base, icl in zip(group.base, group.icl, strict=True):
            at_base, at_icl = paired_positions(base, icl, question_tokens_only=masks.question_tokens_only,
                                               drop_first_positions=masks.drop_first_positions)
            if at_base:
                own = behind.setdefault((base.ids, (at_base[0], at_base[-1] + 1)), [])
                own.append((number, (icl.ids, (at_icl[0], at_icl[-1] + 1))))
    bases = list(behind)
    limit, = extractor.sink_norms(bases, masks.outlier_norm)
    start, *fronts = (_share(extractor, sides) for sides in (bases, *(
        [side for own in behind.values() for place, side in own if place == number] for number in range(len(groups)))))
    longest = max(start, *fronts, key=lambda one: one.cached)  # behind which most memory is needed
    for batch in extractor.batches([last - start.cached + longest.cached for _, (_, last) in bases], longest):
        questions = [bases[index] for index in batch]
        rows = extractor.tokens(questions, start).split([last - first for _, (first, last) in questions])
        for number, front in enumerate(fronts):
            pairs = [(row_TD, side) for row_TD, base in zip(rows, questions, strict=True)
                     for place, side in behind[base] if place == number]
            if pairs:
                icl_TD = extractor.tokens([side for _, side in pairs], front)
                _add(stats, sae, torch.cat([row_TD for row_TD, _ in pairs]), icl_TD, limit)
                if each:
                    for (row_TD, (ids, _)), its_TD in zip(pairs, icl_TD.split([len(x) for x, _ in pairs]), strict=True):
                        _add(own := PairedStats(sae.cfg.d_sae, sae.device), sae, row_TD, its_TD, limit)
                        each(ids, own)
        done += len(batch)
        report(done / len(bases))
    return _checked([stats])[0]


def row_paired_stats(lm: LanguageModel, sae, layer: int, groups: list[PromptGroup], rows: int, *,
                     tokens_per_batch: int = 4096, work: Work | None = None) -> PairedStats:
    """Statistics of two separate runs compared row by row, as the paper's official notebook does.

    Row r of the first run is the r-th token of all prompts without demonstrations, row r of the second the r-th token
    of all prompts with them: not the same token. Template and demonstration tokens count as well; nothing is masked.
    At most `rows` rows are compared, fewer if either run has fewer."""
    extractor, stats = Extractor(lm, layer, tokens_per_batch, work), PairedStats(sae.cfg.d_sae, sae.device)
    runs = [[prompt.ids for group in groups for prompt in getattr(group, side)] for side in ("base", "icl")]
    rows, first = min([rows, *(sum(map(len, prompts)) for prompts in runs)]), []
    for prompts in runs:
        sides, left = [], rows
        for ids in prompts:
            if left:
                sides.append((ids, (0, min(len(ids), left))))
                left -= sides[-1][1][1]
        first.append(extractor.tokens(sides))
    _add(stats, sae, *first, limit=float("inf"))
    return stats


def model_paired_folds(lm: LanguageModel, tuned: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks,
                       folds: int = 1, *, tokens_per_batch: int = 4096,
                       report: Callable[[float], None] = lambda fraction: None,
                       work: Work | None = None) -> list[PairedStats]:
    """Token-paired statistics of every `folds`-th prompt, from the first, the second and so on, in two models: `base`
    is `lm`, whose median norm sets the threshold of sinks, and in the place of `icl` stands `tuned`, which has its own
    memory. `StsError` for NaN activations, or masks that leave a fold without a token."""
    work = Work() if work is None else work
    here, there = (Extractor(one, layer, tokens_per_batch, work) for one in (lm, tuned))
    sides = [(prompt.ids, masks.span(prompt)) for prompt in prompts]
    kept = [side for side in sides if side[1][0] < side[1][1]]
    limit, = here.sink_norms(kept, masks.outlier_norm)
    stats, done = [PairedStats(sae.cfg.d_sae, sae.device) for _ in range(folds)], 0
    for fold, own in enumerate(stats):
        part = [side for side in sides[fold::folds] if side[1][0] < side[1][1]]
        for batch in here.batches([last for _, (_, last) in part]):
            chosen = [part[index] for index in batch]
            _add(own, sae, here.tokens(chosen), there.tokens(chosen), limit)
            done += len(batch)
            report(done / len(kept))
    return _checked(stats)


def folded(parts: list[PairedStats]) -> dict[str, torch.Tensor]:
    """Statistics of folds as one dict of tensors: `PairedStats.to_tensors()` of all folds together, and for each fold
    fold_squared_difference_FL and fold_tokens_F."""
    fields = [part.to_tensors() for part in parts]
    stacked = {name: torch.stack([one[name] for one in fields]) for name in fields[0]}
    total = {name: part.amax(0) if name.endswith("max_L") else part.sum(0) for name, part in stacked.items()}
    return total | {"fold_squared_difference_FL": stacked["squared_difference_L"],
                    "fold_tokens_F": stacked["tokens"].flatten()}


def three_codes(lm: LanguageModel, reader) -> SideBySide:
    """The run's SAE ("sae"), a random code as sparse ("random") and the raw dimensions ("raw")."""
    return SideBySide({"sae": reader, "random": random_code(reader, CODE_SEED), "raw": identity_sae(lm)})


def shift_by_training(lm: LanguageModel, tuned: LanguageModel, reader, layer: int, groups: list[PromptGroup],
                      masks: Masks, **passes) -> dict[str, torch.Tensor]:
    """Actual shift: the questions of `groups` in the untuned and a tuned model, in folds; every code of `three_codes`.
    `passes` go to `model_paired_folds`."""
    codes, prompts = three_codes(lm, reader), [prompt for group in groups for prompt in group.base]
    return codes.split(folded(model_paired_folds(lm, tuned, codes, layer, prompts, masks, min(FOLDS, len(prompts)),
                                                 **passes)))


def shifts_behind(sets: Sequence[Sequence[Example]], questions: Sequence[Example], tokens: int, lm: LanguageModel,
                  reader, layer: int, masks: Masks, *, report: Callable[[float], None] = lambda fraction: None,
                  **passes) -> dict[str, torch.Tensor]:
    """The same questions behind each set of demonstrations: kind/squared_difference_RL, one row a set; and the
    questions' own kind/base_fired_L and kind/base_square_sum_L, which are the same behind all."""
    codes, rows = three_codes(lm, reader), []
    for done, demonstrations in enumerate(sets):
        stats = paired_stats(lm, codes, layer, [make_group(lm.tokenizer, questions, demonstrations, tokens=tokens)],
                             masks, report=lambda own, done=done: report((done + own) / len(sets)), **passes)
        fields = stats.to_tensors()
        rows.append(codes.split({name: fields[name] for name in (
            "squared_difference_L", "base_fired_L", "base_square_sum_L")}))
    return {name.replace("difference_L", "difference_RL"):
            torch.stack([row[name] for row in rows]) if name.endswith("difference_L") else rows[0][name]
            for name in rows[0]}
