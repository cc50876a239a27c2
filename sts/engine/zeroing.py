"""Zeroing (or scaling) latents while the model runs, in evaluation and in generation (Figure 1b of arXiv 2603.02908).

A latent is taken out of the residual stream by subtracting what it adds to the SAE's reconstruction. What the SAE does
not reconstruct, its error, stays where it is: zeroing nothing leaves the model exactly as it is.

Shape suffixes: B batch, P positions, T tokens, D residual width, L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from sts.engine.latents import encode_chunks
from sts.engine.models import LanguageModel, decoder_layers, resid_post
from sts.engine.residuals import is_content
from sts.engine.work import Work

#: Inputs under which a pass depends on more than its token ids and which of them are padding.
MORE = ("past_key_values", "position_ids", "inputs_embeds")


@contextmanager
def changed(lm: LanguageModel, layer: int, change: Callable[[torch.Tensor], torch.Tensor], *,
            drop_first_positions: int = 1, norm_limit: float = float("inf")) -> Iterator[None]:
    """A context in which the residual stream after a layer (zero-based) is changed, T x D, at every token that counts.

    Inside it `lm.model` may be called in any way: whole texts, batches padded on either side, or token by token with a
    key-value cache. Which tokens count depends on nothing but the token itself, so all of these give the same: not
    those at the first positions of a text, by the model's own position ids, nor those with a larger residual norm, the
    other attention sinks (`Extractor.sink_norms`).
    """
    def hook(module, args, inputs, output):
        residual_BPD = resid_post(output).clone()
        kept_BP = is_content(residual_BPD, norm_limit)
        kept_BP &= inputs["position_ids"].to(kept_BP.device) >= drop_first_positions
        residual_BPD[kept_BP] = change(residual_BPD[kept_BP]).to(residual_BPD.dtype)
        return residual_BPD if isinstance(output, torch.Tensor) else (residual_BPD, *output[1:])

    handle = decoder_layers(lm.model)[layer].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def zeroed(lm: LanguageModel, sae, layer: int, latents: Sequence[int] | torch.Tensor, *, drop_first_positions: int = 1,
           norm_limit: float = float("inf"), factor: float = 0.0) -> AbstractContextManager[None]:
    """A context in which latents, by index, are zero at every token that counts (see `changed`), or `factor` times what
    they are: x becomes x - (decode(h) - decode(h')), where h = encode(x), and h' is h with these latents multiplied.
    With none the model is not touched at all."""
    chosen = torch.as_tensor(latents, dtype=torch.long).flatten().to(sae.device)
    if not len(chosen):
        return nullcontext()
    return changed(lm, layer, lambda residual_TD: without(sae, residual_TD, chosen, factor),
                   drop_first_positions=drop_first_positions, norm_limit=norm_limit)


def without(sae, residual_TD: torch.Tensor, latents: torch.Tensor, factor: float = 0.0) -> torch.Tensor:
    """Residual vectors less what the chosen latents add to their reconstruction (or with `factor` times as much), T x D
    in the input's precision."""
    found_TD = torch.empty_like(residual_TD)
    for rows, (latents_TL,) in encode_chunks(sae, residual_TD):
        with torch.inference_mode():
            zeroed_TL = latents_TL.clone()
            zeroed_TL[:, latents] *= factor
            # Decoded together: an SAE that normalises its input remembers the scale for one call of decode.
            with_TD, without_TD = sae.decode(torch.stack([latents_TL, zeroed_TL])).float()
            found_TD[rows] = (residual_TD[rows].float() - (with_TD - without_TD)).to(residual_TD.dtype)
    return found_TD


@contextmanager
def lower_layers_once(lm: LanguageModel, layer: int, work: Work | None = None) -> Iterator[None]:
    """A context in which layers 0 to `layer` run once for every batch of token ids, whose output is kept; later passes
    over it start above, and `work`, in which whoever runs the model counts all layers, loses those that did not run.

    Hooks on layer `layer` see and may change its output at every pass, as `changed` does. The weights and hooks of the
    layers below must stay as they are, untrained. Passes with a key-value cache, positions, or a mask that is not one
    of padding run in full.
    """
    lower = list(decoder_layers(lm.model)[:layer + 1])
    kept: dict[tuple, torch.Tensor | tuple] = {}
    now: tuple | None = None

    def begin(module, args: tuple, inputs: dict) -> None:
        nonlocal now
        ids_BP = inputs.get("input_ids", args[0] if args else None)
        mask_BP = inputs.get("attention_mask")
        plain = inputs.get("use_cache") is False and all(inputs.get(name) is None for name in MORE) and (
            mask_BP is None or isinstance(mask_BP, torch.Tensor) and mask_BP.dim() == 2)
        now = (tuple(ids_BP.shape), *(one if one is None else one.cpu().numpy().tobytes() for one in (ids_BP, mask_BP))
               ) if plain and ids_BP is not None else None
        if now in kept and ids_BP is not None and work is not None:
            work.layer_tokens -= ids_BP.numel() * len(lower)

    def once(forward: Callable, *, last: bool) -> Callable:
        def run(residual_BPD, *args, **inputs):
            if now in kept:
                return kept[now] if last else residual_BPD
            output = forward(residual_BPD, *args, **inputs)
            if last and now is not None:
                kept[now] = output
            return output
        return run

    handle = lm.model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for place, one in enumerate(lower):
            one.forward = once(one.forward, last=place == layer)
        yield
    finally:
        handle.remove()
        for one in lower:
            one.__dict__.pop("forward", None)
