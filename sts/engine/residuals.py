"""Residual streams of many prompts: early exit, batches by length, shared prefixes run once, memory that runs out.

The engine below everything that reads a model. It knows token ids and positions, not questions or SAEs.

Shape suffixes: B batch, P positions, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from sts.engine.models import LanguageModel, check_layer, decoder_layers, resid_post, residual_stream
from sts.engine.prefix import NO_PREFIX, Prefix, why_not_reusable
from sts.engine.work import Work
from sts.errors import StsError

#: Padding is at most this share of a batch's positions.
PADDING = 0.1
#: A token whose residual norm exceeds this multiple of the median norm is an attention sink, not content.
OUTLIER_NORM = 10.0
#: How many prompts the median is taken from.
SINK_SAMPLE = 8
#: A cached token takes memory and attention but no layer; against the budget it counts this much of a token.
CACHED_SHARE = 1 / 8


def batches(lengths: Sequence[int], budget: Callable[[], float] | float = float("inf"), *, extra: float = 0.0,
            most: float = float("inf"), padding: float = PADDING, slack: int = 0) -> Iterator[list[int]]:
    """Indices grouped by length: rows x longest row within the budget.

    Args:
        budget: tokens in a batch; a function is asked anew for each batch.
        extra: what each row costs besides its own tokens (a cached prefix).
        most: rows in a batch.
        padding: at most this share of a batch's positions, or `slack` positions.
    """
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


def sink_norms(residuals_TD: Sequence[torch.Tensor], multiple: float, layers: int = 1) -> list[float]:
    """For each layer, the norm above which a token is a sink: `multiple` times the median over these tokens, the
    counted ones of the first `SINK_SAMPLE` prompts whatever the batches; infinite for 0 or no token."""
    if not multiple or not sum(map(len, residuals_TD)):
        return [float("inf")] * layers
    return [multiple * part_TD.float().norm(dim=-1).median().item()
            for part_TD in torch.cat(list(residuals_TD)).chunk(layers, dim=-1)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")))


class Extractor:
    """Runs prompts up to one layer or several, within a token budget that halves when memory runs out.

    Attributes:
        layers: those that are read, side by side in the last dimension of what `tokens` returns.
        budget: padded tokens in one forward pass, at most.
        work: what has been run.
    """

    def __init__(self, lm: LanguageModel, layers: int | Sequence[int], tokens_per_batch: int,
                 work: Work | None = None):
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        for layer in self.layers:
            check_layer(lm.model, layer)
        self.lm, self.layer, self.budget = lm, max(self.layers), tokens_per_batch
        self.work = Work() if work is None else work
        self.work.of_layers = len(decoder_layers(lm.model))

    def share(self, ids: Sequence[int]) -> Prefix:
        """Run leading tokens once, for all prompts that begin with them."""
        ids = tuple(ids)
        reason = why_not_reusable(self.lm.model)
        if ids and reason:
            self.work.note(f"Model {self.lm.name!r}: its key-value cache cannot be reused, as {reason}; shared tokens "
                           "are run again for every question, which takes more time.")
        if not ids or reason:
            return Prefix(ids)
        cache = DynamicCache(config=self.lm.model.config)
        try:
            self._forward(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise StsError(f"The {len(ids)} tokens that all prompts begin with do not fit in the memory of "
                           f"{self.lm.device}. Use fewer or shorter demonstrations, or a smaller dtype.") from error
        self.work.add(len(ids), len(ids), self.layer + 1)
        return Prefix(ids, cache)

    def batches(self, lengths: Sequence[int], prefix: Prefix = NO_PREFIX) -> Iterator[list[int]]:
        """`batches` of prompts with these whole lengths behind a prefix, by the budget as it then is."""
        return batches([length - prefix.cached for length in lengths], lambda: self.budget,
                       extra=prefix.cached * CACHED_SHARE)

    def tokens(self, prompts: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]],
               prefix: Prefix = NO_PREFIX) -> torch.Tensor:
        """The residual stream at chosen tokens, T x D, prompt after prompt.

        Args:
            prompts: whole prompts, each beginning with the prefix.
            spans: for each prompt a half-open range of positions, at or after the end of a cached prefix. What
                follows the range is not run: attention is causal.

        Raises:
            StsError: NaN or infinite values, or a single prompt that does not fit in memory.
        """
        longest = max(last for _, last in spans) - prefix.cached
        size = int(len(prompts) * (longest + prefix.cached * CACHED_SHARE))
        if len(prompts) == 1 or size <= self.budget:
            try:
                return self._tokens(prompts, spans, prefix)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(prompts) == 1:
                    raise StsError(f"One prompt of {len(prompts[0])} tokens does not fit in the memory of "
                                   f"{self.lm.device}. Use fewer or shorter demonstrations, or a smaller "
                                   "dtype.") from error
            # Outside the handler, whose traceback keeps the failed pass' tensors alive.
            self.budget = max(1, size // 2)
            self.work.note(f"Memory ran out; going on with {self.budget} tokens a batch.")
            if self.lm.device.type == "cuda":
                torch.cuda.empty_cache()
        half = len(prompts) // 2
        return torch.cat([self.tokens(prompts[:half], spans[:half], prefix),
                          self.tokens(prompts[half:], spans[half:], prefix)])

    def _tokens(self, prompts: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]],
                prefix: Prefix) -> torch.Tensor:
        cached = prefix.cached
        if any(first < cached for first, _ in spans):
            raise ValueError("a span begins before the end of the cached prefix")
        rest = [ids[cached:max(last, cached + 1)] for ids, (_, last) in zip(prompts, spans, strict=True)]
        longest = max(map(len, rest))
        # Padding on the right needs no mask: causal attention never looks at it, and its rows are not chosen.
        ids_BP = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rest])
        chosen_T = torch.cat([torch.arange(row * longest + first - cached, row * longest + last - cached)
                              for row, (first, last) in enumerate(spans)])
        residual_BPD = self._forward(ids_BP, **prefix.inputs())
        residual_TD = residual_BPD.flatten(0, 1).index_select(0, self._to_device(chosen_T))
        # Before any mask of the caller: an outlier norm is left out on purpose, an overflow must not be.
        if not torch.isfinite(residual_TD).all():
            raise StsError("The residual stream holds NaN or infinite values, so no statistics can be computed. "
                           "Try dtype float32; if that does not help, the model's weights are damaged.")
        self.work.add(sum(map(len, rest)), ids_BP.numel(), self.layer + 1)
        return residual_TD

    def _forward(self, ids_BP: torch.Tensor, **inputs: Any) -> torch.Tensor:
        modules, found = decoder_layers(self.lm.model), {}

        def keep(layer: int):
            return lambda module, args, output: found.__setitem__(layer, resid_post(output))

        handles = [modules[layer].register_forward_hook(keep(layer)) for layer in self.layers if layer != self.layer]
        try:
            found[self.layer] = residual_stream(self.lm.model, self.layer, self._to_device(ids_BP), **inputs)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([found[layer] for layer in self.layers], dim=-1) if handles else found[self.layer]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the model's device; from pinned memory, so that the copy does not wait for the GPU."""
        if self.lm.device.type == "cuda":
            return tensor.pin_memory().to(self.lm.device, non_blocking=True)
        return tensor.to(self.lm.device)
