"""The ways to per-latent sums that are compared. Each takes prompts and gives the sums; the work between differs.

`ours` is the engine itself (`latent_stats` puts its parts together as `paired_stats` does). The others are what one
would write otherwise, on the same prompts in the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sts.data.prompts import Prompt, PromptGroup, paired_positions
from sts.engine.extract import Masks, paired_stats
from sts.engine.latents import LatentStats, encode_chunks
from sts.engine.models import LanguageModel, decoder_layers
from sts.engine.residuals import Extractor, batches, is_content

#: All tokens of a text but its first, and those with an outlier norm, which the product leaves out and others keep.
EVERY_TOKEN = Masks(question_tokens_only=False)
QUESTION_TOKENS = Masks()


@dataclass(frozen=True)
class Setup:
    """What all routes share."""

    lm: LanguageModel
    sae: object
    layer: int
    tokens_per_batch: int

    def padded(self, prompts: list[Prompt]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The batches that every route runs: padded ids (batch x positions) and the prompts' indices."""
        for batch in batches([len(prompt.ids) for prompt in prompts], self.tokens_per_batch):
            longest = max(len(prompts[index].ids) for index in batch)
            ids_BP = torch.tensor([[*prompts[index].ids, *[0] * (longest - len(prompts[index].ids))]
                                   for index in batch], device=self.lm.device)
            yield ids_BP, batch


def truncated_decoder(lm: LanguageModel, layer: int) -> torch.nn.Module:
    """The decoder up to and including `layer`, sharing its weights: a model that has no later layers."""
    decoder = copy.copy(lm.model.get_decoder())
    decoder._modules = dict(decoder._modules)
    decoder.layers = decoder_layers(lm.model)[:layer + 1]
    decoder.norm = torch.nn.Identity()
    return decoder


def truncated_forward(setup: Setup, prompts: list[Prompt]) -> None:
    """The forward pass alone, up to the layer: what the machine can do."""
    decoder = truncated_decoder(setup.lm, setup.layer)
    with torch.inference_mode():
        for ids_BP, _ in setup.padded(prompts):
            decoder(input_ids=ids_BP, use_cache=False)


def full_forward(setup: Setup, prompts: list[Prompt]) -> None:
    """The forward pass alone, through all layers and the LM head."""
    with torch.inference_mode():
        for ids_BP, _ in setup.padded(prompts):
            setup.lm.model(input_ids=ids_BP, use_cache=False)


def latent_stats(lm: LanguageModel, sae, layer: int, prompts: list[Prompt], masks: Masks, *,
                 tokens_per_batch: int) -> LatentStats:
    """The engine's statistics of every latent over prompts, in memory that does not grow with their number."""
    extractor, stats = Extractor(lm, layer, tokens_per_batch), LatentStats(sae.cfg.d_sae, sae.device)
    sides = [(prompt.ids, masks.span(prompt)) for prompt in prompts]
    limit, = extractor.sink_norms(sides, masks.outlier_norm)
    for batch in extractor.batches([last for _, (_, last) in sides]):
        residual_TD = extractor.tokens([sides[index] for index in batch])
        for _, (latents_TL,) in encode_chunks(sae, residual_TD[is_content(residual_TD, limit)]):
            stats.add(latents_TL)
    return stats


def ours(setup: Setup, prompts: list[Prompt]) -> torch.Tensor:
    """The product's engine: forward, SAE and statistics. Returns the sum of each latent."""
    return latent_stats(setup.lm, setup.sae, setup.layer, prompts, EVERY_TOKEN,
                        tokens_per_batch=setup.tokens_per_batch).sum_L


def _kept(residual_BPD: torch.Tensor, prompts: list[Prompt], batch: list[int]) -> torch.Tensor:
    return torch.cat([residual_BPD[row, 1:len(prompts[index].ids)] for row, index in enumerate(batch)])


def sae_lens(setup: Setup, proxy, prompts: list[Prompt], *, stop: bool) -> torch.Tensor:
    """sae-lens' proxy of a Hugging Face model: run with a cache, encode the batch, add up.

    Args:
        proxy: what `sae_lens.load_model("AutoModelForCausalLM", ...)` returned.
        stop: leave at the layer (`stop_at_layer`), which is not the default.
    """
    name = f"model.layers.{setup.layer}"
    extra = {"stop_at_layer": setup.layer + 1} if stop else {}
    total_L = torch.zeros(setup.sae.cfg.d_sae, dtype=torch.float64, device=setup.lm.device)
    with torch.inference_mode():
        for ids_BP, batch in setup.padded(prompts):
            _, cache = proxy.run_with_cache(ids_BP, names_filter=[name], **extra)
            residual_BPD = cache[name]
            residual_BPD = residual_BPD[0] if isinstance(residual_BPD, tuple) else residual_BPD
            latents_TL = setup.sae.encode(_kept(residual_BPD, prompts, batch).to(setup.sae.dtype))
            total_L += latents_TL.sum(0, dtype=torch.float64)
    return total_L


def dense_append(setup: Setup, prompts: list[Prompt]) -> torch.Tensor:
    """The scheme of the paper's official code, in our own words: all layers, all latents of all tokens in one matrix
    that grows by concatenation, sums at the end."""
    collected_TL, captured = None, []
    handle = decoder_layers(setup.lm.model)[setup.layer].register_forward_hook(
        lambda module, args, output: captured.append(output if isinstance(output, torch.Tensor) else output[0]))
    try:
        with torch.inference_mode():
            for ids_BP, batch in setup.padded(prompts):
                setup.lm.model(input_ids=ids_BP, use_cache=False)
                latents_TL = setup.sae.encode(_kept(captured.pop(), prompts, batch).to(setup.sae.dtype))
                collected_TL = latents_TL if collected_TL is None else torch.cat([collected_TL, latents_TL])
    finally:
        handle.remove()
    return collected_TL.sum(0, dtype=torch.float64)


# --- behind demonstrations ----------------------------------------------------------------------------------------

def ours_paired(setup: Setup, group: PromptGroup) -> torch.Tensor:
    """The product's engine on questions without and behind demonstrations. Returns each latent's squared change."""
    return paired_stats(setup.lm, setup.sae, setup.layer, [group], QUESTION_TOKENS,
                        tokens_per_batch=setup.tokens_per_batch).squared_difference_L


def naive_paired(setup: Setup, group: PromptGroup, *, full: bool) -> torch.Tensor:
    """Whole prompts, demonstrations run again for every question, latents dense.

    Args:
        full: run all layers and the LM head; else leave at the layer, so that only the prompts differ from `ours`.
    """
    decoder = setup.lm.model if full else truncated_decoder(setup.lm, setup.layer)
    captured = []
    handle = decoder_layers(setup.lm.model)[setup.layer].register_forward_hook(
        lambda module, args, output: captured.append(output if isinstance(output, torch.Tensor) else output[0]))
    total_L = torch.zeros(setup.sae.cfg.d_sae, dtype=torch.float64, device=setup.lm.device)
    positions = [paired_positions(base, icl, drop_first_positions=1)
                 for base, icl in zip(group.base, group.icl, strict=True)]
    base_TD: dict[int, torch.Tensor] = {}
    try:
        with torch.inference_mode():
            # Each side in batches of its own lengths; what is kept between them is the questions' residual stream.
            for side, prompts in enumerate((group.base, group.icl)):
                for ids_BP, batch in setup.padded(list(prompts)):
                    decoder(input_ids=ids_BP, use_cache=False)
                    residual_BPD = captured.pop()
                    rows = {index: residual_BPD[row][positions[index][side]] for row, index in enumerate(batch)}
                    if side == 0:
                        base_TD |= rows
                        continue
                    before, after = (setup.sae.encode(torch.cat([one[index] for index in batch]).to(setup.sae.dtype))
                                     for one in (base_TD, rows))
                    total_L += (after - before).double().square().sum(0)
    finally:
        handle.remove()
    return total_L
