"""Extraction: run the model up to the SAE's layer, encode, keep per-latent sums and nothing else.

Memory does not grow with the number of tokens: residual streams live for one batch, latents for one chunk, and one
key-value cache for each set of demonstrations. The demonstrations that a group of questions shares are run once
(residuals.py), and a question is run once without demonstrations however many sets of them it is compared behind.

Shape suffixes: T tokens, D residual width, L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sts.data.prompts import Prompt, PromptGroup, paired_positions
from sts.engine.latents import Chunk, LatentStats, PairedStats, SparseLatents
from sts.engine.models import LanguageModel
from sts.engine.prefix import NO_PREFIX, Prefix, common_prefix
from sts.engine.residuals import Extractor, is_out_of_memory
from sts.engine.work import Work
from sts.errors import StsError

#: Values in one chunk of latents (64 MB in float32): wide SAEs get fewer tokens at a time.
CHUNK_VALUES = 16_000_000
#: A GPU's chunks are this much larger: small ones would leave it waiting for the next.
GPU_CHUNKS = 8
#: Chunks with a smaller share of nonzero values are summed sparsely.
SPARSE_SHARE = 0.25


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
            latents_TL = sae.encode(residual_TD[rows].to(sae.device, sae.dtype))
        yield rows, latents_TL


class Encoder:
    """An SAE's latents in chunks that bound the memory, sparse where few of them fire."""

    def __init__(self, sae, work: Work | None = None):
        self.sae, self.work = sae, work or Work()
        on_gpu = torch.device(sae.device).type == "cuda"
        self.step = max(1, CHUNK_VALUES * (GPU_CHUNKS if on_gpu else 1) // sae.cfg.d_sae)

    def chunks(self, *residuals_TD: torch.Tensor) -> Iterator[tuple[Chunk, ...]]:
        """Latents of residual streams with equally many rows, the same rows of each at a time.

        Yields:
            One chunk for each residual stream; all sparse or all dense.
        """
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


# --- one pass -----------------------------------------------------------------------------------------------------

def latent_stats(lm: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks, *,
                 tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None,
                 work: Work | None = None) -> LatentStats:
    """Statistics of every latent over prompts, in memory that does not grow with their number.

    Args:
        prompts: token ids; with `masks.question_tokens_only` the tokens of their `question` range count alone.
        report: called with the fraction done.
        work: counts what is run.

    Raises:
        StsError: NaN activations, or masks that leave no token.
    """
    extractor = Extractor(lm, layer, tokens_per_batch, work)
    encoder, stats = Encoder(sae, extractor.work), LatentStats(sae.cfg.d_sae, sae.device)
    spans = [(max(masks.drop_first_positions, prompt.question[0] if masks.question_tokens_only else 0),
              prompt.question[1] if masks.question_tokens_only else len(prompt.ids)) for prompt in prompts]
    chosen = [(prompt, span) for prompt, span in zip(prompts, spans, strict=True) if span[0] < span[1]]
    rows = _Rows(extractor, [prompt.ids for prompt, _ in chosen], [span for _, span in chosen])
    threshold = rows.threshold(masks.outlier_norm)
    done = 0
    for batch in extractor.batches([span[1] for _, span in chosen]):
        residual_TD = torch.cat(rows.take(batch))
        for (chunk,) in encoder.chunks(residual_TD[~_sinks(residual_TD, threshold)]):
            stats.add(chunk)
        done += len(batch)
        report(done / len(chosen))
    if not stats.tokens:
        raise _nothing_left()
    return stats


def norm_threshold(extractor: Extractor, prompts: list[tuple[int, ...]], spans: list[tuple[int, int]],
                   multiple: float) -> float:
    """`multiple` times the median norm of the counted tokens of the first eight prompts; infinite for 0.

    A fixed small sample, so that the threshold does not depend on how prompts are batched.
    """
    return _Rows(extractor, prompts, spans).threshold(multiple)


class _Rows:
    """The counted tokens of prompts; those that the threshold was taken from are kept and not run again."""

    def __init__(self, extractor: Extractor, prompts: list[tuple[int, ...]], spans: list[tuple[int, int]],
                 prefix: Prefix = NO_PREFIX):
        self.extractor, self.prompts, self.spans, self.prefix = extractor, prompts, spans, prefix
        self.kept: dict[int, torch.Tensor] = {}

    def threshold(self, multiple: float) -> float:
        """See `norm_threshold`."""
        if not multiple or not self.prompts:
            return float("inf")
        sample = list(range(min(8, len(self.prompts))))
        self.kept = dict(zip(sample, self.take(sample), strict=True))
        return multiple * torch.cat(list(self.kept.values())).float().norm(dim=-1).median().item()

    def take(self, batch: list[int]) -> list[torch.Tensor]:
        """One tensor a prompt of the batch, its counted tokens x D."""
        new, rows = [index for index in batch if index not in self.kept], dict(self.kept)
        for part in self.extractor.batches([self.spans[index][1] for index in new], self.prefix):
            own = [new[place] for place in part]
            spans = [self.spans[index] for index in own]
            residual_TD = self.extractor.tokens([self.prompts[index] for index in own], spans, self.prefix)
            rows |= zip(own, residual_TD.split([last - first for first, last in spans]), strict=True)
        return [rows[index] for index in batch]


def _sinks(residual_TD: torch.Tensor, threshold: float) -> torch.Tensor:
    return residual_TD.float().norm(dim=-1) > threshold


def _nothing_left() -> StsError:
    return StsError("No token is left after masking; switch off question_tokens_only, drop_first_positions or "
                    "outlier_norm.")


# --- paired passes ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Pair:
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
                pair = _Pair(number, icl, (at_base[0], at_base[-1] + 1), (at_icl[0], at_icl[-1] + 1))
                questions.setdefault(base.ids, (base, []))[1].append(pair)
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
    base_rows = _Rows(extractor, [base.ids for base, _ in questions], spans, start)
    threshold = base_rows.threshold(masks.outlier_norm)
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
    rows = min([rows, *(sum(map(len, prompts)) for prompts in sides)])
    for base, icl in encoder.chunks(*(_first_rows(extractor, prompts, rows) for prompts in sides)):
        stats.add(base, icl)
    return stats


def _first_rows(extractor: Extractor, prompts: list[tuple[int, ...]], rows: int) -> torch.Tensor:
    """The residual stream of the first `rows` tokens of prompts run in order, rows x D."""
    spans, total = [], 0
    for ids in prompts:
        spans.append((0, min(len(ids), rows - total)))
        total += spans[-1][1]
        if total == rows:
            break
    parts: dict[int, torch.Tensor] = {}
    for batch in extractor.batches([last for _, last in spans]):
        residual_TD = extractor.tokens([prompts[index] for index in batch], [spans[index] for index in batch])
        parts |= zip(batch, residual_TD.split([spans[index][1] for index in batch]), strict=True)
    return torch.cat([parts[index] for index in range(len(spans))])
