"""Residual streams of many prompts: early exit, batches by length, shared prefixes run once, memory that runs out.

The engine below everything that reads a model. It knows token ids and positions, not questions or SAEs.

Shape suffixes: B batch, P positions, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sts.engine.models import LanguageModel, check_layer, decoder_layers, residual_stream
from sts.engine.work import Work
from sts.errors import StsError

#: Token ids of a prompt, and the half-open range of its positions that counts.
Side = tuple[Sequence[int], tuple[int, int]]
#: Padding is at most this share of a batch's positions.
PADDING = 0.1
#: A token whose residual norm exceeds this multiple of the median norm is an attention sink, not content.
OUTLIER_NORM = 10.0
#: How many prompts the median is taken from.
SINK_SAMPLE = 8
#: A cached token takes memory and attention but no layer; against the budget it counts this much of a token.
CACHED_SHARE = 1 / 8


def is_content(residual_TD: torch.Tensor, limit: float) -> torch.Tensor:
    """Which tokens are no sinks: their norm is not above the limit (`Extractor.sink_norms`)."""
    return residual_TD.float().norm(dim=-1) <= limit


def batches(lengths: Sequence[int], budget: Callable[[], float] | float = float("inf"), *, extra: float = 0.0,
            most: float = float("inf"), padding: float = PADDING, slack: int = 0) -> Iterator[list[int]]:
    """Indices grouped by length: rows x longest row within a budget of tokens, which as a function is asked anew for
    each batch. A row costs `extra` besides its own tokens (a cached prefix), a batch has at most so many rows, and
    padding is at most a share of its positions, or `slack` positions."""
    batch, real = [], 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        positions = (len(batch) + 1) * lengths[index]
        too_many = positions + (len(batch) + 1) * extra > (budget() if callable(budget) else budget)
        empty = positions - real - lengths[index]
        if batch and (too_many or len(batch) == most or empty > max(padding * positions, slack)):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += lengths[index]
    if batch:
        yield batch


@dataclass
class Budget:
    """How many tokens are run at once, at most: half of what was tried whenever memory runs out."""

    most: float
    work: Work
    device: torch.device

    def run(self, call: Callable[[list], Any], items: list, size: Callable[[list], float]) -> list:
        """What `call` gives of all items, or of parts of them in order; `size` says how many tokens some items take.
        `StsError` for a single item that does not fit in memory."""
        if len(items) == 1 or size(items) <= self.most:
            try:
                return [call(items)]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(items) == 1:
                    raise StsError(f"A sequence of {size(items):.0f} tokens does not fit in the memory of "
                                   f"{self.device}. Use fewer or shorter demonstrations, or a smaller dtype."
                                   ) from error
            # Outside the handler, whose traceback keeps the failed pass' tensors alive.
            self.most = max(1, size(items) // 2)
            self.work.note("Memory ran out; going on with smaller batches.")
            clear_device_cache()
        half = len(items) // 2
        return self.run(call, items[:half], size) + self.run(call, items[half:], size)


class _SharedLayer(DynamicLayer):
    """One layer's keys and values of a prefix, put before those of every row of a batch. A copy lives as long as the
    layer's attention, where transformers' own would be kept for all layers at once; the prefix is never changed."""

    def __init__(self, prefix: Any):
        super().__init__()
        self.prefix, self.is_sliding, self.is_initialized = prefix, prefix.is_sliding, prefix.is_initialized
        self.get_seq_length, self.get_mask_sizes = prefix.get_seq_length, prefix.get_mask_sizes

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(key_states)
        return (torch.cat([self.prefix.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
                torch.cat([self.prefix.values.expand(rows, -1, -1, -1), value_states], dim=-2))


@dataclass(frozen=True)
class Prefix:
    """So many leading tokens that prompts share and that need not be run again: their keys and values."""

    cached: int = 0
    cache: DynamicCache | None = None

    def inputs(self) -> dict[str, Any]:
        """What a forward pass of rows that stand behind it takes."""
        layers: list[Any] = [_SharedLayer(one) for one in self.cache.layers] if self.cache else []
        return {"use_cache": True, "past_key_values": Cache(layers=layers)} if layers else {"use_cache": False}


NO_PREFIX = Prefix()


def common_prefix(prompts: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading tokens all prompts share, at most `limit`."""
    columns = enumerate(zip(*(ids[:limit] for ids in prompts), strict=False))
    return next((place for place, column in columns if len(set(column)) > 1), min(limit, *map(len, prompts)))


def why_not_reusable(model: Any) -> str:
    """Why a prefix's key-value cache would not give what the whole prompt gives: layers other than full and
    sliding-window attention, or rotary positions that depend on the prompt's length; "" if it would."""
    config = model.config.get_text_config()
    other = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if other or getattr(model, "_is_stateful", False):
        return f"it has layers of type {', '.join(sorted(other)) or 'recurrent'}"
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    scaled = {part.get("rope_type") for part in parts} & {"dynamic", "longrope"}
    return f"its rotary positions ({scaled.pop()}) change with the prompt's length" if scaled else ""


class Extractor:
    """Runs prompts up to one layer or several, which are read side by side, with a budget of padded tokens in one
    forward pass, and counts in `work` what is run."""

    def __init__(self, lm: LanguageModel, layers: int | Sequence[int], tokens_per_batch: int,
                 work: Work | None = None):
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        for layer in self.layers:
            check_layer(lm.model, layer)
        self.lm, self.work = lm, Work() if work is None else work
        self.budget = Budget(tokens_per_batch, self.work, lm.device)
        self.work.of_layers = len(decoder_layers(lm.model))

    def share(self, ids: Sequence[int]) -> Prefix:
        """Run leading tokens once, for all prompts that begin with them."""
        reason = why_not_reusable(self.lm.model)
        if ids and reason:
            self.work.note(f"Model {self.lm.name!r}: its key-value cache cannot be reused, as {reason}; shared tokens "
                           "are run again for every question, which takes more time.")
        if not ids or reason:
            return NO_PREFIX
        cache = DynamicCache(config=self.lm.model.config)
        self.budget.run(lambda rows: self._forward(torch.tensor(rows), past_key_values=cache, use_cache=True),
                        [list(ids)], lambda rows: len(ids))
        self.work.add(len(ids), len(ids), max(self.layers) + 1)
        return Prefix(len(ids), cache)

    def batches(self, lengths: Sequence[int], prefix: Prefix = NO_PREFIX) -> Iterator[list[int]]:
        """`batches` of prompts with these whole lengths behind a prefix, by the budget as it then is."""
        return batches([length - prefix.cached for length in lengths], lambda: self.budget.most,
                       extra=prefix.cached * CACHED_SHARE)

    def tokens(self, sides: Sequence[Side], prefix: Prefix = NO_PREFIX) -> torch.Tensor:
        """The residual stream at the tokens that count, T x D, prompt after prompt; of whole prompts, each beginning
        with the prefix, ranges that are not empty or before its end. What follows a range is not run, as attention is
        causal. `StsError` for NaN or infinite values, or what fits neither context nor memory."""
        if (longest := len(ids := max((ids for ids, _ in sides), key=len))) > self.lm.context_length:
            raise StsError(f"A prompt of {longest} tokens does not fit the model's context of "
                           f"{self.lm.context_length}. Shorten this text in its middle, or use fewer demonstrations: "
                           f"{self.lm.tokenizer.decode(list(ids[longest // 2:][:20]))!r}.")

        def size(rows: list[Side]) -> float:
            return len(rows) * (max(last for _, (_, last) in rows) - prefix.cached * (1 - CACHED_SHARE))

        return torch.cat(self.budget.run(lambda rows: self._tokens(rows, prefix), list(sides), size))

    def _tokens(self, rows: list[Side], prefix: Prefix) -> torch.Tensor:
        rest = [torch.tensor(ids[prefix.cached:last]) for ids, (_, last) in rows]
        # Padding on the right needs no mask: causal attention never looks at it, and its rows are not chosen.
        ids_BP = pad_sequence(rest, batch_first=True)
        residual_BPD = self._forward(ids_BP, **prefix.inputs())
        residual_TD = torch.cat([row_PD[first - prefix.cached:last - prefix.cached]
                                 for row_PD, (_, (first, last)) in zip(residual_BPD, rows, strict=True)])
        # Before any mask of the caller: an outlier norm is left out on purpose, an overflow must not be.
        if not torch.isfinite(residual_TD).all():
            raise StsError("The residual stream holds NaN or infinite values, so no statistics can be computed. "
                           "Try dtype float32; if that does not help, the model's weights are damaged.")
        self.work.add(sum(map(len, rest)), ids_BP.numel(), max(self.layers) + 1)
        return residual_TD

    def _forward(self, ids_BP: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return residual_stream(self.lm.model, self.layers, ids_BP.to(self.lm.device), **inputs)

    def sink_norms(self, sides: Sequence[Side], multiple: float) -> list[float]:
        """For each layer, the norm above which a token is a sink: `multiple` times the median over the tokens of the
        first `SINK_SAMPLE` prompts that count, whatever the batches; infinite for 0 or no prompt."""
        if not multiple or not sides:
            return [float("inf")] * len(self.layers)
        sample_TD = self.tokens(sides[:SINK_SAMPLE])
        return [multiple * part_TD.float().norm(dim=-1).median().item()
                for part_TD in sample_TD.chunk(len(self.layers), dim=-1)]
