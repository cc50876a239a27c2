"""Lower layers run once: what repeated passes over the same tokens have in common when only upper layers change.

Shape suffixes: B batch, P positions, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sts.engine.models import LanguageModel, check_layer, decoder_layers
from sts.engine.work import Work

#: Inputs under which a pass depends on more than its token ids.
MORE = ("past_key_values", "attention_mask", "position_ids", "inputs_embeds")


@contextmanager
def lower_layers_once(lm: LanguageModel, layer: int, work: Work | None = None) -> Iterator[None]:
    """A context in which layers 0 to `layer` run once for every batch of token ids; later passes over it start above.

    Hooks on layer `layer` see and may change its output at every pass, as `ablation.zeroed` does. The weights and
    hooks of the layers below must stay as they are. Passes with a mask, a key-value cache or positions of their own
    run in full.

    Args:
        layer: zero-based; its output is kept for each batch, B x P x D in the model's precision.
        work: whoever runs the model counts all layers; those that did not run are taken off again.

    Raises:
        StsError: no such layer.
    """
    check_layer(lm.model, layer)
    lower = list(decoder_layers(lm.model)[:layer + 1])
    kept: dict[tuple, Any] = {}
    now: tuple | None = None

    def begin(module, args: tuple, inputs: dict) -> None:
        nonlocal now
        ids_BP = inputs.get("input_ids", args[0] if args else None)
        plain = inputs.get("use_cache") is False and all(inputs.get(name) is None for name in MORE)
        now = (tuple(ids_BP.shape), ids_BP.cpu().numpy().tobytes()) if plain and ids_BP is not None else None
        if now in kept and work is not None:
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
