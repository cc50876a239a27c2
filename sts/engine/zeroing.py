"""Zeroing latents while the model runs, in evaluation and in generation (Figure 1b of arXiv 2603.02908).

A latent is taken out of the residual stream by subtracting what it adds to the SAE's reconstruction. What the SAE does
not reconstruct, its error, stays where it is: zeroing nothing leaves the model exactly as it is.

Shape suffixes: B batch, P positions, T tokens, D residual width, L latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sts.engine.extract import encode_chunks
from sts.engine.models import LanguageModel, check_layer, decoder_layers, resid_post
from sts.errors import StsError


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
        norm_limit: leave tokens with a larger residual norm alone (other sinks); see `activations.norm_threshold`.

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
        changed_BPD = residual_BPD.clone()
        changed_BPD[kept_BP] = without(sae, residual_BPD[kept_BP], chosen)
        return changed_BPD if isinstance(output, torch.Tensor) else (changed_BPD, *output[1:])

    handle = decoder_layers(lm.model)[layer].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
