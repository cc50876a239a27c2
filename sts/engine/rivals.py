"""What rivals of the score ask of a model: mean states over answers, and gradients through adapters.

Shape suffixes: E examples, T tokens, D residual width, L latents (of a code), P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sts.data.prompts import Prompt
from sts.engine.latents import encode_chunks
from sts.engine.models import LanguageModel
from sts.engine.residuals import OUTLIER_NORM, Extractor, is_content
from sts.engine.work import Work
from sts.errors import StsError


def answer_states(lm: LanguageModel, code, layer: int, prompts: Sequence[Prompt], *, most: int = 0,
                  outlier_norm: float = OUTLIER_NORM, tokens_per_batch: int = 4096,
                  work: Work | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prompt, as `prompts.solution_prompt` makes it, the mean over its answer's tokens of what `code` (an SAE,
    or several side by side) reads after a layer, and the residual stream at the last of them: E x L and E x D, float32.

    `most`: the answer's first so many tokens alone (0: all). Sinks (`Extractor.sink_norms`) are left out of the mean.
    """
    extractor = Extractor(lm, layer, tokens_per_batch, work)
    sides = [(prompt.ids, (first, min(last, first + most) if most else last))
             for prompt in prompts for first, last in (prompt.question,)]
    limit, = extractor.sink_norms(sides, outlier_norm)
    means, lasts = [torch.empty(0)] * len(sides), [torch.empty(0)] * len(sides)
    for batch in extractor.batches([last for _, (_, last) in sides]):
        rows = [sides[place] for place in batch]
        states = extractor.tokens(rows).split([last - first for _, (first, last) in rows])
        for place, state_TD in zip(batch, states, strict=True):
            kept_TD = state_TD[is_content(state_TD, limit)]
            if not len(kept_TD):
                raise StsError(f"Answer {place} has no token but attention sinks; raise outlier_norm, or set it to 0.")
            sums = [latents_TL.double().sum(0) for _, (latents_TL,) in encode_chunks(code, kept_TD)]
            means[place] = (torch.stack(sums).sum(0) / len(kept_TD)).float().cpu()
            lasts[place] = state_TD[-1].float().cpu()
    return torch.stack(means), torch.stack(lasts)
