"""Leading tokens that many prompts share, run once: their key-value cache, put before each prompt of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class _SharedLayer(DynamicLayer):
    """One layer's keys and values of a prefix, put before those of every row of a batch.

    transformers' own layers would copy the prefix for each row and keep it for all layers at once; here a layer's copy
    lives as long as that layer's attention, and the prefix is never changed.
    """

    def __init__(self, prefix: Any):
        super().__init__()
        self.prefix, self.is_sliding, self.is_initialized = prefix, prefix.is_sliding, prefix.is_initialized

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args,
               **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(key_states)
        return (torch.cat([self.prefix.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
                torch.cat([self.prefix.values.expand(rows, -1, -1, -1), value_states], dim=-2))

    def get_seq_length(self) -> int:
        return self.prefix.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix.get_mask_sizes(query_length)


@dataclass(frozen=True)
class Prefix:
    """Leading tokens that prompts share; `cache` holds their keys and values, None if each prompt runs them itself."""

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None

    @property
    def cached(self) -> int:
        """How many leading tokens need not be run again."""
        return len(self.ids) if self.cache is not None else 0

    def inputs(self) -> dict[str, Any]:
        """What a forward pass of a batch behind the prefix is called with."""
        if self.cache is None:
            return {"use_cache": False}
        layers: list[Any] = [_SharedLayer(one) for one in self.cache.layers]
        return {"use_cache": True, "past_key_values": Cache(layers=layers)}


NO_PREFIX = Prefix()


def common_prefix(prompts: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading tokens all prompts share, at most `limit`."""
    first = list(prompts[0][:limit])
    for ids in prompts[1:]:
        length = next((index for index, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b),
                      min(len(first), len(ids)))
        first = first[:length]
    return len(first)


def why_not_reusable(model: Any) -> str:
    """Why a prefix's key-value cache would not give what the whole prompt gives; "" if it would.

    Reusable are full and sliding-window attention with positions that do not depend on the prompt's length. State
    space, convolution and chunked layers, and rotary embeddings that rescale with the length, are not.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    other = kinds - {"full_attention", "sliding_attention"}
    if other or getattr(model, "_is_stateful", False):
        return f"it has layers of type {', '.join(sorted(other)) or 'recurrent'}"
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    scaled = {part.get("rope_type") for part in parts} & {"dynamic", "longrope"}
    return f"its rotary positions ({scaled.pop()}) change with the prompt's length" if scaled else ""
