"""What rivals of the score ask of a model: mean states over answers, and gradients where fine-tuning starts.

Shape suffixes: E examples, B batch, P positions, T tokens, D residual width, L latents, G parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from sts.data.prompts import Prompt
from sts.engine.finetune import with_adapters
from sts.engine.latents import encode_chunks
from sts.engine.models import LanguageModel, decoder_layers, logits_at
from sts.engine.residuals import OUTLIER_NORM, Extractor, batches, is_content
from sts.engine.work import Work
from sts.errors import StsError


def answer_states(lm: LanguageModel, sae, layer: int, prompts: Sequence[Prompt], *, most: int | None = None,
                  outlier_norm: float = OUTLIER_NORM, tokens_per_batch: int = 4096,
                  work: Work | None = None) -> dict[str, torch.Tensor]:
    """What prompts of `prompts.solution_prompt` hold after a layer, float32: raw_ED and sae_EL, means over the first
    `most` tokens of each answer but sinks (`Extractor.sink_norms`), and last_ED, the residual at its last token."""
    extractor, found = Extractor(lm, layer, tokens_per_batch, work), {}
    sides = [(prompt.ids, prompt.question) for prompt in prompts]
    limit, = extractor.sink_norms(sides, outlier_norm)
    for batch in extractor.batches([last for _, (_, last) in sides]):
        rows = [sides[place] for place in batch]
        states = extractor.tokens(rows).split([last - first for _, (first, last) in rows])
        for place, state_TD in zip(batch, states, strict=True):
            kept_TD = state_TD[:most][is_content(state_TD[:most], limit)]
            if not len(kept_TD):
                raise StsError(f"Answer {place} has no token but attention sinks; set outlier_norm higher, or to 0.")
            sums = [latents_TL.double().sum(0) for _, (latents_TL,) in encode_chunks(sae, kept_TD)]
            found[place] = kept_TD.double().mean(0), torch.stack(sums).sum(0) / len(kept_TD), state_TD[-1]
    ordered = zip(*(found[place] for place in range(len(sides))), strict=True)
    return {name: torch.stack(own).float().cpu() for name, own in zip(("raw_ED", "sae_EL", "last_ED"), ordered,
                                                                      strict=True)}


def first_weights(lm: LanguageModel, rank: int, alpha: int, seed: int) -> list[torch.nn.Parameter]:
    """The weights that fine-tuning's first step moves: its adapters' matrices B, which are zero there, so that no
    gradient reaches A (all weights, with rank 0). The model is changed, so load it for this purpose alone."""
    with_adapters(lm.model.requires_grad_(not rank), rank, alpha, seed)
    return [one for name, one in lm.model.named_parameters() if not rank or "lora_B" in name]


def gradient(lm: LanguageModel, weights: Sequence[torch.nn.Parameter], prompts: Sequence[Prompt], *, micro_batch: int,
             work: Work) -> torch.Tensor:
    """Of the mean over prompts of their answer's nats per token, flat, G, in float32 on the CPU."""
    total_G, work.of_layers = torch.zeros(sum(one.numel() for one in weights)), len(decoder_layers(lm.model))
    for batch in batches([len(prompt.ids) for prompt in prompts], most=micro_batch):
        ids_BP = pad_sequence([torch.tensor(prompts[one].ids) for one in batch], batch_first=True).to(lm.device)
        spans = [torch.arange(*prompts[one].question, device=lm.device) for one in batch]
        at_T = torch.cat([row * ids_BP.shape[1] + span for row, span in enumerate(spans)])
        share_T = torch.cat([torch.full_like(span, 1, dtype=torch.float) / len(span) for span in spans])
        with logits_at(lm.model, at_T - 1):
            logits_TV = lm.model(input_ids=ids_BP, use_cache=False).logits[0].float()
        nats_T = torch.nn.functional.cross_entropy(logits_TV, ids_BP.flatten()[at_T], reduction="none")
        parts = torch.autograd.grad(nats_T @ share_T / len(prompts), weights)
        total_G += torch.cat([own.flatten() for own in parts]).float().cpu()
        work.add(sum(len(prompts[one].ids) for one in batch), ids_BP.numel(), 2 * work.of_layers)
    return total_G
