"""Linear read-outs of chosen latents, added to the residual stream and trained in place of the model (Figure 7 of arXiv
2603.02908): after a layer, x becomes x + W h_S(x), where h_S are the K chosen latents of that layer's SAE.

The SAE stays as it is and reads the residual stream as it then is, changed by the read-outs of lower layers. W begins
at zero, so that untrained read-outs leave the model exactly as it is.

Shape suffixes: T tokens, D residual width, L latents, K chosen latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from sts.engine.models import LanguageModel, check_layer
from sts.engine.zeroing import changed
from sts.errors import StsError


class ReadOuts(torch.nn.Module):
    """Read-outs after several layers: layer -> SAE, layer -> indices of chosen latents; `weights` holds each layer's W,
    D x K in float32. `StsError` for a layer without an SAE, or a latent that its SAE does not have."""

    def __init__(self, saes: Mapping[int, Any], latents: Mapping[int, torch.Tensor]):
        super().__init__()
        if missing := {*latents} - {*saes}:
            raise StsError(f"There is no SAE of layer {min(missing)} to read latents with.")
        if wrong := [(layer, one) for layer, own in latents.items() for one in own.tolist()
                     if not 0 <= one < saes[layer].cfg.d_sae]:
            raise StsError("The SAE of layer {} has no latent {}.".format(*wrong[0]))
        self.saes = dict(saes)  # as a plain dict they are no part of what is trained
        self.latents = {layer: chosen.to(saes[layer].device) for layer, chosen in latents.items()}
        self.weights = torch.nn.ParameterDict({str(layer): torch.zeros(
            saes[layer].cfg.d_in, len(chosen), device=saes[layer].device) for layer, chosen in latents.items()})

    def forward(self, layer: int, residual_TD: torch.Tensor) -> torch.Tensor:
        """Residual vectors after a layer with its read-out added, T x D in float32."""
        latents_TL = self.saes[layer].encode(residual_TD.to(self.saes[layer].dtype))
        return residual_TD.float() + latents_TL[:, self.latents[layer]].float() @ self.weights[str(layer)].T


@contextmanager
def attached(lm: LanguageModel, read_outs: ReadOuts, norm_limits: Mapping[int, float],
             drop_first_positions: int = 1) -> Iterator[None]:
    """A context in which read-outs are a part of the model, at every token that counts (see `zeroing.changed`): not at
    sinks, whose latents would outweigh all others; layer -> residual norm above which a token is one."""
    with ExitStack() as stack:
        for layer in read_outs.latents:
            check_layer(lm.model, layer)
            stack.enter_context(changed(lm, layer, partial(read_outs, layer), norm_limit=norm_limits[layer],
                                        drop_first_positions=drop_first_positions))
        lm.model.add_module("read_outs", read_outs)  # where a trainer finds their weights
        stack.callback(delattr, lm.model, "read_outs")
        yield
