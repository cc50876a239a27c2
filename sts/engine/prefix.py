"""Leading tokens that many prompts share, run once: their key-value cache, put before each prompt of a batch.

Shape suffixes: B batch, H query heads, G key-value heads, R query heads per key-value head, Q new positions, P prefix
positions, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sts.engine.models import FAMILIES, bf16_is_fast

#: Attention scores in one block of `prefix_attention`: small enough to stay in a processor's cache.
BLOCK_SCORES = 2_000_000
NAME = "sts_shared_prefix"


class _SharedLayer(DynamicLayer):
    """One layer's keys and values of a prefix, put before those of every row of a batch.

    transformers' own layers would copy the prefix for each row and keep it for all layers at once; here a layer's copy
    lives as long as that layer's attention, and the prefix is never changed.
    """

    def __init__(self, prefix: DynamicLayer, *, joined: bool):
        super().__init__()
        self.prefix, self.joined = prefix, joined
        self.is_sliding, self.is_initialized = prefix.is_sliding, prefix.is_initialized

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args,
               **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.joined:  # `prefix_attention` takes the prefix from where it is
            return key_states, value_states
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

    def inputs(self, *, joined: bool) -> dict[str, Any]:
        """What a forward pass of a batch behind the prefix is called with.

        Args:
            joined: put the prefix' keys before each row's own; else leave it to `prefix_attention`.
        """
        if self.cache is None:
            return {"use_cache": False}
        cache = Cache(layers=[_SharedLayer(layer, joined=joined) for layer in self.cache.layers])
        return {"use_cache": True, "past_key_values": cache} | ({} if joined else {"shared_prefix": self.cache})


NO_PREFIX = Prefix()


def common_prefix(prompts: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading tokens all prompts share, at most `limit`."""
    first = list(prompts[0][:limit])
    for ids in prompts[1:]:
        length = next((index for index, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b),
                      min(len(first), len(ids)))
        first = first[:length]
    return len(first)


def why_not_reusable(model: torch.nn.Module) -> str:
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


# --- attention behind a prefix ------------------------------------------------------------------------------------

def joins_prefix(model: PreTrainedModel) -> bool:
    """Whether a batch behind a prefix runs through transformers' own attention, with the prefix copied to each row.

    On a CPU in bf16 `prefix_attention` takes half the time; it knows plain softmax attention only.
    """
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    plain = family and family.plain and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    return not (plain and model.device.type == "cpu" and model.dtype == torch.bfloat16 and bf16_is_fast("cpu"))


def prefix_attention(module: torch.nn.Module, query_BHQE: torch.Tensor, key_BGQE: torch.Tensor,
                     value_BGQE: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float,
                     shared_prefix: DynamicCache, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Causal attention to a shared prefix and to a row's own tokens, as two products under one softmax.

    The prefix's keys are never copied, and a head group's queries meet them in large matrix products, block by block
    (the idea of "hydragen" attention: Juravsky et al., 2024, arXiv 2402.05099). Scores are rounded to bf16 and the
    softmax is taken in float32, as in transformers' eager attention.
    """
    layer = shared_prefix.layers[module.layer_idx]
    prefix_key_GPE, prefix_value_GPE = layer.keys[0], layer.values[0]
    rows, heads, new, width = query_BHQE.shape
    groups, prefix = prefix_key_GPE.shape[:2]
    each = heads // groups * new  # a key-value head's queries from one row
    query_BGRE = query_BHQE.reshape(rows, groups, each, width)
    later_QQ = torch.ones(new, new, dtype=torch.bool, device=query_BHQE.device).triu(1)
    out_BGRE = torch.empty_like(query_BGRE)
    step = max(1, min(rows, BLOCK_SCORES // (groups * each * (prefix + new))))
    scores = query_BHQE.new_empty(groups, step * each, prefix + new)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        count = part.stop - part.start
        block = scores[:, :count * each]
        own_query = query_BGRE[part]
        joint_query = own_query.transpose(0, 1).reshape(groups, count * each, width)
        block[..., :prefix] = joint_query @ prefix_key_GPE.transpose(1, 2)
        own = (own_query @ key_BGQE[part].transpose(2, 3)).view(count, groups, -1, new, new)
        own = own.masked_fill_(later_QQ, float("-inf")).view(count, groups, each, new)
        block[..., prefix:] = own.transpose(0, 1).reshape(groups, count * each, new)
        weights = torch.softmax(block.mul_(scaling), dim=-1)
        from_prefix = (weights[..., :prefix] @ prefix_value_GPE).view(groups, count, each, width).transpose(0, 1)
        own_weights = weights[..., prefix:].view(groups, count, each, new).transpose(0, 1)
        out_BGRE[part] = (own_weights @ value_BGQE[part]).add_(from_prefix)
    return out_BGRE.view(rows, heads, new, width).transpose(1, 2), None


AttentionInterface.register(NAME, prefix_attention)


@contextmanager
def _attention(model: PreTrainedModel, name: str):
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attending(model: PreTrainedModel, prefix: Prefix, *, joined: bool):
    """A context in which the model's forward pass takes `prefix.inputs(joined=joined)`."""
    return nullcontext() if joined or prefix.cache is None else _attention(model, NAME)
