"""Zeroing latents while the model runs, in evaluation and in generation (Figure 1b of arXiv 2603.02908).

A latent is taken out of the residual stream by subtracting what it adds to the SAE's reconstruction. What the SAE does
not reconstruct, its error, stays where it is: zeroing nothing leaves the model exactly as it is.

Shape suffixes: B batch, P positions, T tokens, D residual width, L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sts.engine.latents import encode_chunks
from sts.engine.models import LanguageModel, check_layer, decoder_layers, resid_post
from sts.engine.work import Work
from sts.errors import StsError

#: Inputs under which a pass depends on more than its token ids.
MORE = ("past_key_values", "attention_mask", "position_ids", "inputs_embeds")


@contextmanager
def zeroed(lm: LanguageModel, sae, layer: int, latents: Sequence[int] | torch.Tensor, *,
           drop_first_positions: int = 1, norm_limit: float = float("inf")) -> Iterator[None]:
    """A context in which latents are zero at every token that counts: x becomes x - (decode(h) - decode(h')).

    h = encode(x), and h' is h with the chosen latents at zero. Inside the context `lm.model` may be called in any way:
    whole texts, batches padded on either side, or token by token with a key-value cache. Which tokens count depends
    on nothing but the token itself, so all of these give the same.

    Args:
        layer: zero-based decoder layer after which the residual stream is changed.
        latents: indices into the SAE's latents; with none the model is not touched at all.
        drop_first_positions: leave the tokens at these first positions of every text alone (attention sinks).
            Positions are the model's own position ids, so padding on the left does not count.
        norm_limit: leave tokens with a larger residual norm alone (other sinks); see `extract.norm_threshold`.

    Raises:
        StsError: a latent that the SAE does not have, no such layer, or a model that does not hand its layers
            position ids.
    """
    check_layer(lm.model, layer)
    chosen = torch.as_tensor(latents, dtype=torch.long).flatten()
    if not len(chosen):
        yield
        return
    wrong = chosen[(chosen < 0) | (chosen >= sae.cfg.d_sae)]
    if len(wrong):
        raise StsError(f"Latent {wrong[0].item()} was asked to be zeroed; the SAE has latents 0 to "
                       f"{sae.cfg.d_sae - 1}.")
    chosen = chosen.to(sae.device)

    def hook(module, args, inputs, output):
        residual_BPD = resid_post(output)
        kept_BP = residual_BPD.float().norm(dim=-1) <= norm_limit
        if drop_first_positions:
            positions_BP = inputs.get("position_ids")
            if positions_BP is None:
                raise StsError(f"{type(lm.model).__name__} does not tell its layers the tokens' positions, so the "
                               "first ones cannot be left alone; drop_first_positions=0 changes every token.")
            kept_BP &= positions_BP.to(kept_BP.device) >= drop_first_positions
        return replaced(output, kept_BP, lambda residual_TD: without(sae, residual_TD, chosen))

    handle = decoder_layers(lm.model)[layer].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def replaced(output: torch.Tensor | tuple, kept_BP: torch.Tensor,
             change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | tuple:
    """A decoder layer's output with the residual stream of some tokens, T x D, changed."""
    residual_BPD = resid_post(output).clone()
    residual_BPD[kept_BP] = change(residual_BPD[kept_BP])
    return residual_BPD if isinstance(output, torch.Tensor) else (residual_BPD, *output[1:])


def without(sae, residual_TD: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Residual vectors less what the chosen latents add to their reconstruction, T x D in the input's precision."""
    changed_TD = torch.empty_like(residual_TD)
    for rows, latents_TL in encode_chunks(sae, residual_TD):
        with torch.no_grad():
            dense_TL = latents_TL.to_dense() if latents_TL.is_sparse else latents_TL
            zeroed_TL = dense_TL.clone()
            zeroed_TL[:, latents] = 0
            # Decoded together: an SAE that normalises its input remembers the scale for one call of decode.
            with_TD, without_TD = sae.decode(torch.stack([dense_TL, zeroed_TL])).float()
            changed_TD[rows] = (residual_TD[rows].float() - (with_TD - without_TD)).to(residual_TD.dtype)
    return changed_TD


@contextmanager
def lower_layers_once(lm: LanguageModel, layer: int, work: Work | None = None,
                      kept: dict[tuple, Any] | None = None) -> Iterator[None]:
    """A context in which layers 0 to `layer` run once for every batch of token ids; later passes over it start above.

    Hooks on layer `layer` see and may change its output at every pass, as `zeroed` does. The weights and hooks of the
    layers below must stay as they are. Passes with a mask, a key-value cache or positions of their own run in full.

    Args:
        layer: zero-based; its output is kept for each batch, B x P x D in the model's precision.
        work: whoever runs the model counts all layers; those that did not run are taken off again.
        kept: where outputs are kept, if a later context is to go on from them.

    Raises:
        StsError: no such layer.
    """
    check_layer(lm.model, layer)
    lower = list(decoder_layers(lm.model)[:layer + 1])
    kept = {} if kept is None else kept
    now: tuple | None = None

    def begin(module, args: tuple, inputs: dict) -> None:
        nonlocal now
        ids_BP = inputs.get("input_ids", args[0] if args else None)
        plain = inputs.get("use_cache") is False and all(inputs.get(name) is None for name in MORE)
        now = (tuple(ids_BP.shape), ids_BP.cpu().numpy().tobytes()) if plain and ids_BP is not None else None
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

    before = [one.__dict__.get("forward") for one in lower]
    handle = lm.model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for place, one in enumerate(lower):
            one.forward = once(one.forward, last=place == layer)
        yield
    finally:
        handle.remove()
        for one, own in zip(lower, before, strict=True):
            one.__dict__.pop("forward", None)
            if own is not None:
                one.forward = own
