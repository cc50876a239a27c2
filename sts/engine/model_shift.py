"""What fine-tuning itself shifts: latents of the same tokens in the base model and in the tuned one.

Tokens are counted in folds, groups of prompts, so that latents can be chosen on some questions and measured on others,
and so that an interval can be had by resampling groups of questions.

Shape suffixes: F folds, L latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sts.data.prompts import Prompt
from sts.engine.extract import Encoder, Masks, norm_threshold
from sts.engine.latents import PairedStats
from sts.engine.models import LanguageModel
from sts.engine.residuals import Extractor
from sts.engine.work import Work
from sts.errors import StsError


def model_paired_stats(lm: LanguageModel, tuned: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks,
                       *, tokens_per_batch: int = 4096, report: Callable[[float], None] = lambda fraction: None,
                       work: Work | None = None) -> PairedStats:
    """Token-paired statistics of prompts in two models.

    Args:
        lm: the base model; its values are the statistics' `base`.
        tuned: the same architecture with other weights, in memory of its own (`load_tuned` changes the model it is
            given); its values are in the place of `icl`.
        prompts: token ids; with `masks.question_tokens_only` the tokens of their `question` range count alone. A
            token whose norm is an outlier in either model counts in neither; the threshold is the base model's.

    Raises:
        StsError: NaN activations, or masks that leave no token.
    """
    return model_paired_folds(lm, tuned, sae, layer, prompts, masks, 1, tokens_per_batch=tokens_per_batch,
                              report=report, work=work)[0]


def model_paired_folds(lm: LanguageModel, tuned: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks,
                       folds: int, *, tokens_per_batch: int = 4096,
                       report: Callable[[float], None] = lambda fraction: None,
                       work: Work | None = None) -> list[PairedStats]:
    """`model_paired_stats` of every `folds`-th prompt, from the first, the second and so on, in one pass.

    Raises:
        StsError: as there; a fold without a token counts as masks that leave none.
    """
    work = Work() if work is None else work
    here, there = (Extractor(one, layer, tokens_per_batch, work) for one in (lm, tuned))
    encoder, stats = Encoder(sae, work), [PairedStats.empty(sae.cfg.d_sae, sae.device) for _ in range(folds)]
    spans = [(max(masks.drop_first_positions, prompt.question[0] if masks.question_tokens_only else 0),
              prompt.question[1] if masks.question_tokens_only else len(prompt.ids)) for prompt in prompts]
    chosen = [(prompt.ids, span, place % folds) for place, (prompt, span) in enumerate(zip(prompts, spans, strict=True))
              if span[0] < span[1]]
    threshold = norm_threshold(here, [ids for ids, *_ in chosen], [span for _, span, _ in chosen], masks.outlier_norm)
    done = 0
    for batch in here.batches([span[1] for _, span, _ in chosen]):
        ids, own, fold_of = zip(*(chosen[index] for index in batch), strict=True)
        base_TD, tuned_TD = here.tokens(ids, own), there.tokens(ids, own)
        kept_T = ((base_TD.float().norm(dim=-1) <= threshold) & (tuned_TD.float().norm(dim=-1) <= threshold))
        fold_T = torch.tensor([fold for fold, (first, last) in zip(fold_of, own, strict=True)
                               for _ in range(first, last)], device=kept_T.device)
        for fold in set(fold_of):
            rows_T = kept_T & (fold_T == fold)
            for base, after in encoder.chunks(base_TD[rows_T], tuned_TD[rows_T]):
                stats[fold].add(base, after)
        done += len(batch)
        report(done / len(chosen))
    if not all(part.tokens for part in stats):
        raise StsError("No token is left after masking; switch off question_tokens_only, drop_first_positions or "
                       "outlier_norm.")
    return stats


def folded(parts: list[PairedStats]) -> dict[str, torch.Tensor]:
    """Statistics of folds as one dict of tensors: `PairedStats.to_tensors()` of all folds together, and for each fold
    fold_squared_difference_FL and fold_tokens_F."""
    fields = [part.to_tensors() for part in parts]
    total = {name: torch.stack([one[name] for one in fields]).amax(0) if name.endswith("max_L")
             else torch.stack([one[name] for one in fields]).sum(0) for name in fields[0]}
    return total | {"fold_squared_difference_FL": torch.stack([one["squared_difference_L"] for one in fields]),
                    "fold_tokens_F": torch.cat([one["tokens"] for one in fields])}
