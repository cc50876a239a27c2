"""lm-evaluation-harness' Hugging Face class, with what requests have in common run once.

The harness' own class reads a question again for each of its options. The class here gives the same log-likelihoods
and takes the question's keys and values from a cache, by `shared_prefix`. Once this module is imported, the harness
knows it as the model "sts-shared-context", for any of its tasks.

Shape suffixes: B batch, P positions, K positions whose logits are needed, V vocabulary, T tokens of a continuation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers.cache_utils import DynamicCache

from sts.engine.models import LanguageModel, decoder_layers
from sts.engine.prefix import NO_PREFIX, Prefix, attending, joins_prefix, leading, why_not_reusable
from sts.engine.residuals import PADDING, is_out_of_memory
from sts.engine.work import Work
from sts.errors import StsError

Ids = tuple[int, ...]

#: A forward pass costs about as much as this many tokens in one that is made anyway.
PASS_TOKENS = 32


@dataclass(frozen=True)
class Group:
    """Token sequences that share their first `shared` tokens, none of which predicts a token that is asked for."""

    shared: int
    sequences: tuple[Ids, ...]


def group_by_context(contexts: dict[Ids, int], *, reusable: bool = True) -> list[Group]:
    """Sequences by the context that they begin with; a context that begins with another joins it.

    Args:
        contexts: sequence -> how many of its tokens are context; the last of them predicts the continuation.
        reusable: whether a cached context may serve several sequences; else every sequence is a group of its own.
    """
    by_context: dict[Ids, list[Ids]] = {}
    for ids, length in contexts.items():
        by_context.setdefault(ids[:length], []).append(ids)
    roots: dict[Ids, list[Ids]] = {}
    root: Ids | None = None
    for context in sorted(by_context):  # what begins with a context follows it
        # A root much shorter than the context, such as BOS alone, would save little and cost the better ones.
        if root is None or context[:len(root)] != root or 2 * len(root) < len(context):
            root = context
        roots.setdefault(root, []).extend(by_context[context])
    groups = []
    for root, sequences in roots.items():
        shared = len(root) - 1
        if reusable and shared * (len(sequences) - 1) >= PASS_TOKENS:
            groups.append(Group(shared, tuple(sorted(sequences, key=len))))
        else:
            groups += [Group(0, (ids,)) for ids in sequences]
    return groups


def batches_of_rows(lengths: Sequence[int], most: int, *, padded: bool = True) -> Iterator[list[int]]:
    """Indices grouped by length, at most `most` in a batch.

    Padding is at most `PADDING` of a batch or what another pass would cost; none at all unless `padded`.
    """
    batch: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        positions = (len(batch) + 1) * lengths[index]
        padding = positions - real - lengths[index]
        allowed = max(PADDING * positions, PASS_TOKENS) if padded else 0
        if batch and (len(batch) == most or padding > allowed):
            yield batch
            batch, real = [], 0
        batch.append(index)
        real += lengths[index]
    if batch:
        yield batch


@register_model("sts-shared-context")
class SharedContextLM(HFLM):
    """`HFLM` that runs each context once and all its continuations behind the context's cache.

    Differences to `HFLM` besides: `batch_size` counts contexts, not sequences; the softmax is taken in float32 unless
    told otherwise (in bf16 a solution's sum would be rounded to one or two nats); blanks at the end of a context stay
    there; no progress bars.

    Args:
        report: called with the fraction done.
        work: counts what is run.
    """

    def __init__(self, pretrained, *args, report: Callable[[float], None] = lambda fraction: None,
                 work: Work | None = None, **kwargs):
        kwargs.setdefault("softmax_dtype", "float32")
        super().__init__(pretrained, *args, **kwargs)
        self.report, self.work = report, Work() if work is None else work
        self.work.of_layers = len(decoder_layers(self.model))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # The harness' own moves blanks from the end of the context to the target, and would score the line break
        # that closes a chat template's header as part of every answer.
        whole, start = self.tok_encode(context + continuation), self.tok_encode(context)
        if whole[:len(start)] == start and len(whole) > len(start):
            return start, whole[len(start):]
        # The last token of the context would merge with the target: keep them apart.
        return start, self.tok_encode(continuation, add_special_tokens=False)

    # --- log-likelihoods

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (texts, context ids, continuation ids).

        As in `HFLM`, what exceeds the model's context is cut from the left.

        Raises:
            StsError: an empty continuation or one longer than the context, or a single one that memory has no room for.
        """
        wanted: dict[Ids, list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            ids = (*context, *continuation)[-self.max_length - 1:-1]
            if not 0 < len(continuation) <= len(ids):
                raise StsError(f"A continuation of {len(continuation)} tokens cannot be scored; 1 to "
                               f"{self.max_length} tokens behind a context can.")
            wanted.setdefault(ids, []).append((index, list(continuation)))
        reason = why_not_reusable(self.model)
        contexts = {ids: min(len(ids) - len(continuation) for _, continuation in own) + 1
                    for ids, own in wanted.items()}
        groups = group_by_context(contexts, reusable=not reason)
        if reason and len(set(contexts)) > len({ids[:length] for ids, length in contexts.items()}):
            self.work.note(f"The model's key-value cache cannot be reused, as {reason}; each question is run again for "
                           "every option (same numbers, more time).")
        size = override_bs or (self.max_batch_size if self.batch_size == "auto" else int(self.batch_size))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(groups, size, padded=not reason):
            for index, result in self._score(batch, wanted):
                results[index] = result
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
            done += sum(len(group.sequences) for group in batch)
            self.report(done / len(wanted))
        return results

    def _batches(self, groups: list[Group], size: int, *, padded: bool) -> Iterator[list[Group]]:
        """Groups to run together: single sequences of about equal length, contexts of about equal length."""
        single = [group for group in groups if len(group.sequences) == 1]
        for batch in batches_of_rows([len(group.sequences[0]) for group in single], size, padded=padded):
            yield [single[index] for index in batch]
        batch: list[Group] = []
        # `prefix_attention` knows one prefix.
        size = size if joins_prefix(self.model) else 1
        for group in sorted((group for group in groups if len(group.sequences) > 1), key=lambda group: group.shared):
            # What the shortest context of a batch lacks is run with every row.
            again = sum((other.shared - batch[0].shared) * len(other.sequences) for other in [*batch, group]) \
                if batch else 0
            if batch and (len(batch) == size
                          or again > max(PADDING * sum(other.shared for other in batch), PASS_TOKENS)):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    def _score(self, groups: list[Group], wanted: dict) -> list[tuple[int, tuple[float, bool]]]:
        """(request, result) of every request of these groups; in halves where memory runs out."""
        try:
            return list(self._run(groups, wanted))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(groups) == len(groups[0].sequences) == 1:
                raise StsError(f"A sequence of {len(groups[0].sequences[0])} tokens does not fit in the memory of "
                               f"{self.device}. Use a smaller dtype, or fewer demonstrations.") from error
        # Outside the handler, whose traceback keeps the failed pass' tensors alive.
        self.work.note("Memory ran out; going on in halves. A smaller eval_batch avoids the attempt.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(groups) == 1:
            only, half = groups[0], len(groups[0].sequences) // 2
            halves = [[Group(only.shared, only.sequences[:half])], [Group(only.shared, only.sequences[half:])]]
        else:
            halves = [groups[:len(groups) // 2], groups[len(groups) // 2:]]
        return [one for half in halves for one in self._score(half, wanted)]

    def _run(self, groups: list[Group], wanted: dict) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The first sequence of every group in one pass; all others behind the cache that it leaves."""
        rest = [(owner, ids) for owner, group in enumerate(groups) for ids in group.sequences[1:]]
        first = [group.sequences[0] for group in groups]
        if not rest:
            yield from self._pass(first, wanted, NO_PREFIX, {"use_cache": False})
            return
        cache = DynamicCache()
        yield from self._pass(first, wanted, NO_PREFIX, {"use_cache": True, "past_key_values": cache})
        length = min(group.shared for group in groups)
        prefix = Prefix(first[0][:length], leading(cache, length))
        del cache
        joined = joins_prefix(self.model)
        with attending(self.model, prefix, joined=joined):
            for batch in batches_of_rows([len(ids) for _, ids in rest], len(rest)):
                owner_B = torch.tensor([rest[row][0] for row in batch], device=self.device) if len(groups) > 1 else None
                yield from self._pass([rest[row][1] for row in batch], wanted, prefix,
                                      prefix.inputs(joined=joined, owner_B=owner_B))

    def _pass(self, rows: list[Ids], wanted: dict, prefix: Prefix,
              inputs: dict[str, Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """One forward pass of sequences, without what is cached of them."""
        start, longest = prefix.cached, max(map(len, rows)) - prefix.cached
        # Padding on the right needs no mask: causal attention never looks at it, and its logits are not taken.
        ids_BP = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_BP[row, :len(ids) - start] = torch.tensor(ids[start:])
        spans = [(len(ids) - max(len(continuation) for _, continuation in wanted[ids]) - start, len(ids) - start)
                 for ids in rows]
        needed = sorted({position for span in spans for position in range(*span)})
        place = {position: index for index, position in enumerate(needed)}
        with torch.no_grad(), torch.autocast(self.device.type, self.mixed_precision_dtype,
                                             enabled=self.mixed_precision_dtype is not None):
            logits_BKV = self.model(input_ids=ids_BP.to(self.device), **inputs,
                                    logits_to_keep=torch.tensor(needed, device=self.device)).logits
        indices, sums, greedy = [], [], []
        for ids, (first, last), logits_KV in zip(rows, spans, logits_BKV, strict=True):
            own_TV = logits_KV[place[first]:place[last - 1] + 1].log_softmax(-1, dtype=self.softmax_dtype)
            best_T = own_TV.argmax(-1)
            for index, continuation in wanted[ids]:
                target_T = torch.tensor(continuation, device=self.device)
                log_p_T = own_TV[-len(continuation):].gather(1, target_T[:, None])
                indices.append(index)
                sums.append(log_p_T.double().sum())
                greedy.append((best_T[-len(continuation):] == target_T).all())
        self.work.add(sum(map(len, rows)) - start * len(rows), ids_BP.numel(), self.work.of_layers)
        yield from zip(indices, zip(torch.stack(sums).tolist(), torch.stack(greedy).tolist(), strict=True), strict=True)

    # --- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`'s, reporting progress by batches."""
        self._generated, self._to_generate = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        whole_BP = super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask_BP = generation_kwargs.get("attention_mask")
        prompt = context.numel() if mask_BP is None else int(mask_BP.sum())
        new_BP = whole_BP[:, context.shape[1]:]
        # The last token of an answer is not run, and what follows the end of a shorter one is padding.
        answers = int((new_BP != self.tokenizer.pad_token_id).sum())
        self.work.add(prompt + answers, whole_BP.numel(), self.work.of_layers)
        self._generated += len(whole_BP)
        self.report(min(1.0, self._generated / max(1, self._to_generate)))
        return whole_BP


def add_bos(*, chat: bool) -> bool | None:
    """The harness's `add_bos_token` for prompts that a chat template rendered (`chat`), or for plain text.

    A chat template writes BOS itself, or means none to be there; before plain text belongs what the tokenizer puts
    there by default (None), which the harness leaves out where the text begins with BOS already.
    """
    return False if chat else None


def open_harness(lm: LanguageModel, *, batch: int, chat: bool = False,
                 report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> SharedContextLM:
    """A loaded model as the harness takes it, its log lines silenced (they say what is chosen on purpose here).

    Args:
        batch: contexts in one batch.
        chat: whether the prompts are rendered by the chat template; else they are plain text. See `add_bos`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return SharedContextLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch, max_length=lm.context_length,
                           add_bos_token=add_bos(chat=chat), report=report, work=work)
