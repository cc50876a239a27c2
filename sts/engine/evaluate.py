"""Evaluation by log-likelihoods: of each option's `letter`, of each option's `text`, and of the right answer with its
worked `solution`, whose bits per character a small model can resolve where its accuracy is near chance.

Behind examples of the domain questions are asked in plain text as lm-evaluation-harness' `mmlu` asks them, each option
alone; without, in a chat, the letter after "The answer is (".

What is scored are the very tokens that fine-tuning trains on (`prompts.solution_prompt`), but for the opening words
that all answers without worked steps share. Sequences that begin alike are packed into one row: the tokens that they
share once, then each one's rest, which attends to what is shared and to itself ("tree attention", Miao et al., 2023,
arXiv 2305.09781). lm-evaluation-harness' own class takes twice the time.

Shape suffixes: B rows, P positions, T tokens whose logits are needed, V vocabulary, N target tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas
import torch

from sts.data.check import LETTERS
from sts.data.load import by_domain
from sts.data.prompts import (
    OPENING,
    blank,
    context_text,
    document_ids,
    encode,
    few_shot_text,
    question_text,
    solution_prompt,
    solution_text,
    start_ids,
)
from sts.data.sources import Example
from sts.engine.models import LanguageModel, decoder_layers, logits_at
from sts.engine.residuals import PADDING, Budget, Extractor, Prefix, batches, common_prefix, why_not_reusable
from sts.engine.work import Work
from sts.errors import StsError

KINDS = ("letter", "text", "solution")
Ids = tuple[int, ...]
#: Sequences are packed where that saves at least so many tokens, which is what another forward pass costs.
PASS_TOKENS = 32
#: Tokens of a packed row, at most: attention grows with their square.
ROW_TOKENS = 2048


def evaluate(lm: LanguageModel, examples: list[Example], *, kinds: Sequence[str] = KINDS,
             shots: Mapping[str, Sequence[Example]] | None = None, batch: int = 8, scratch: Path | None = None,
             report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> pandas.DataFrame:
    """Score every example's targets of the given kinds: letters and texts where it has options (texts behind `shots`
    alone: domain -> examples in front of its questions), its solution where it has one and there are no shots.

    A domain behind shots, once finished, is kept in folder `scratch` and not computed again.

    Returns:
        One row per target: example_id, domain, kind, option (index; -1 for a solution), loglikelihood (nats),
        characters (of the target), is_right. `StsError` where there is nothing to score, a prompt is longer than the
        model's context, or a log-likelihood is not finite.
    """
    work = Work() if work is None else work
    if not shots:
        return _evaluated(lm, examples, partial(targets, kinds=kinds), batch, report, work)
    if not (kinds := [kind for kind in kinds if kind != "solution"]):
        raise StsError("Behind shots letters and texts are scored, and eval_kinds names neither.")
    parts, groups = [], by_domain(examples)
    for domain, own in groups.items():
        path = scratch and scratch / f"{domain}.parquet"
        if not (path and path.exists()):
            counted = Work()
            part = pandas.concat([_evaluated(lm, own, partial(shot_targets, shots=shots[domain], kind=kind), batch,
                                             lambda fraction: None, counted, behind=True) for kind in kinds])
            part.attrs.update(counted.to_dict())
            if path:
                part.to_parquet(path.with_suffix(".new"), index=False)
                path.with_suffix(".new").replace(path)  # killed before this line, the domain counts as not begun
        else:
            part = pandas.read_parquet(path)
        work.include(part.attrs)
        part.attrs.clear()
        parts.append(part)
        report(len(parts) / len(groups))
    return pandas.concat(parts, ignore_index=True)


def _evaluated(lm: LanguageModel, examples: list[Example], targets_of: Callable, batch: int,
               report: Callable[[float], None], work: Work, *, behind: bool = False) -> pandas.DataFrame:
    """See `evaluate`; `behind`: whether what all contexts begin with is run once for all."""
    rows, asked = [], []
    for example in examples:
        for kind, option, characters, context, target in targets_of(lm.tokenizer, example):
            if (length := len(context) + len(target)) > lm.context_length:
                raise StsError(f"Item {example.example_id} needs {length} tokens; the model's context is "
                               f"{lm.context_length}.")
            rows.append({"example_id": example.example_id, "domain": example.domain, "kind": kind, "option": option,
                         "characters": characters, "is_right": option in (-1, example.answer_index)})
            asked.append((context, target))
    if not rows:
        raise StsError(f"None of the {len(examples)} examples has anything to score: letter needs questions with "
                       "options, text examples in front of them as well, solution a worked solution or an answer.")
    shared = common_prefix([context for context, _ in asked], min(len(context) for context, _ in asked) - 1)
    frame = pandas.DataFrame(rows)
    values = loglikelihoods(lm, asked, shared=shared if behind else 0, batch=batch, report=report, work=work)
    for row, value in zip(rows, values, strict=True):
        if not math.isfinite(value):
            raise StsError(f"Item {row['example_id']}: its log-likelihood is {value}. The model's output is not "
                           "finite; if it was fine-tuned, try a lower sft_lr, else dtype float32.")
    frame.insert(4, "loglikelihood", values)
    return frame


def targets(tokenizer, example: Example, kinds: Sequence[str]) -> Iterator[tuple[str, int, int, Ids, Ids]]:
    """(kind, option, characters, token ids of its context, of the target) for each of an example's targets."""
    if "letter" in kinds and example.options:
        # As the options are written in the question and the solutions: "(A)".
        context = encode(tokenizer, context_text(tokenizer, question_text(example)) + blank(tokenizer) + OPENING)[0]
        cue = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
        for index, letter in enumerate(LETTERS[:len(example.options)]):
            ids = tokenizer(OPENING + letter, add_special_tokens=False)["input_ids"]
            # Where the bracket would merge with the letter, they are kept apart.
            own = ids[len(cue):] if ids[:len(cue)] == cue else tokenizer(letter, add_special_tokens=False)["input_ids"]
            yield "letter", index, len(letter), context, tuple(own)
    if "solution" in kinds and solution_text(example):
        ids, (first, last) = solution_prompt(tokenizer, example, OPENING)
        # The blank behind "Answer:" is scored, so it is counted; the words that all answers open with are neither.
        said = (blank(tokenizer) + solution_text(example)).removeprefix(blank(tokenizer) + OPENING)
        yield "solution", -1, len(said), ids[:first], ids[first:last]


def shot_targets(tokenizer, example: Example, *, shots: Sequence[Example],
                 kind: str) -> Iterator[tuple[str, int, int, Ids, Ids]]:
    """The same for each option's letter or text behind examples of the domain."""
    asked, start = few_shot_text(example, shots, kind), start_ids(tokenizer)
    context = (*start, *document_ids(tokenizer, asked))
    for index, option in enumerate(example.options):
        said = f" {LETTERS[index] if kind == 'letter' else option}"
        whole = (*start, *document_ids(tokenizer, asked + said))
        yield kind, index, len(said), context, whole[len(context):]


@dataclass(frozen=True)
class Row:
    """Sequences in one row: their first `shared` tokens once, then each one's rest."""

    shared: int
    sequences: tuple[Ids, ...]

    def __len__(self) -> int:
        return self.shared + sum(len(ids) - self.shared for ids in self.sequences)


def pack(sequences: Iterable[Ids], saved: float = PASS_TOKENS) -> list[Row]:
    """Rows of different sequences, in lexical order; each but a row's first shares so many tokens, at least."""
    rows: list[Row] = []
    for ids in sorted(sequences):
        if rows:
            last = rows[-1]
            shared = common_prefix([last.sequences[0][:last.shared], ids], last.shared)
            joined = Row(shared, (*last.sequences, ids))
            if len(last) + len(ids) - len(joined) >= saved and len(joined) <= max(ROW_TOKENS, len(ids)):
                rows[-1] = joined
                continue
        rows.append(Row(len(ids), (ids,)))
    return rows


def loglikelihoods(lm: LanguageModel, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, shared: int = 0,
                   batch: int = 8, report: Callable[[float], None] = lambda fraction: None,
                   work: Work | None = None) -> list[float]:
    """Log-likelihood (nats) of each (context, target), token ids, neither of them empty; at most `batch` packed rows in
    one forward pass. So many leading tokens that all contexts share, fewer than any has, are run once. `StsError` for a
    request that memory has no room for."""
    work = Work() if work is None else work
    work.of_layers = layers = len(decoder_layers(lm.model))
    prefix = Extractor(lm, layers - 1, sys.maxsize, work).share(requests[0][0][:shared])
    kept: dict[Ids, list[tuple[int, int, Ids]]] = {}  # the last target token is predicted, not read
    for index, (context, target) in enumerate(requests):
        own = tuple(context[prefix.cached:])
        kept.setdefault((*own, *target[:-1]), []).append((index, len(own), tuple(target)))
    # What forbids a shared cache forbids shared rows, and padding.
    packed, padding, slack = (partial(pack, saved=math.inf), 0.0, 0) if why_not_reusable(lm.model) else \
        (pack, PADDING, PASS_TOKENS)
    rows, budget, values, done = packed(kept), Budget(math.inf, work, lm.device), [0.0] * len(requests), 0
    for alone in (True, False):  # rows of one sequence need no mask
        own = [row for row in rows if (len(row.sequences) == 1) == alone]
        for places in batches([len(row) for row in own], most=batch, padding=padding, slack=slack):
            sequences = [ids for place in places for ids in own[place].sequences]
            for part in budget.run(lambda some: _run(lm, packed(some), kept, work, prefix), sequences,
                                   lambda some: sum(map(len, some))):
                for index, value in part:
                    values[index] += value
            done += len(places)
            report(done / len(rows))
    return values


def _run(lm: LanguageModel, rows: list[Row], kept: dict, work: Work, prefix: Prefix) -> list[tuple[int, float]]:
    """(request, log-likelihood) of each target token of all requests of these rows."""
    longest = max(map(len, rows))
    ids_BP, position_BP = torch.zeros(2, len(rows), longest, dtype=torch.long)
    branch_BP = torch.full((len(rows), longest), -1)  # of padding; what is shared is 0
    requests, tokens, targets = [], [], []
    for number, row in enumerate(rows):
        start = row.shared
        for branch, ids in enumerate(row.sequences, 1):
            own = slice(start, start + len(ids) - row.shared)
            for part, first, last, name in ((slice(0, row.shared), 0, row.shared, 0),
                                            (own, row.shared, len(ids), branch)):
                ids_BP[number, part] = torch.tensor(ids[first:last], dtype=torch.long)
                position_BP[number, part] = torch.arange(first, last)
                branch_BP[number, part] = name
            for index, first, target in kept[ids]:
                places = range(first - 1, first - 1 + len(target))
                tokens += [number * longest + (place if place < row.shared else start + place - row.shared)
                           for place in places]
                targets += target
                requests += [index] * len(target)
            start = own.stop
    needed_T, row_N = torch.tensor(tokens, device=lm.device).unique(return_inverse=True)
    inputs = prefix.inputs()
    if any(len(row.sequences) > 1 for row in rows):
        inputs |= {"position_ids": (position_BP + prefix.cached).to(lm.device),
                   "attention_mask": _masks(lm, position_BP, branch_BP, prefix.cached)}
    with torch.inference_mode(), logits_at(lm.model, needed_T):
        logits_TV = lm.model(input_ids=ids_BP.to(lm.device), **inputs).logits[0]
        # In float32: in bf16 a solution's sum would be rounded to one or two nats.
        norm_T = logits_TV.float().logsumexp(-1)
        log_p_N = (logits_TV[row_N, torch.tensor(targets, device=lm.device)].float() - norm_T[row_N]).double().cpu()
    work.add(sum(map(len, rows)), ids_BP.numel(), work.of_layers)
    return list(zip(requests, log_p_N.tolist(), strict=True))


def _masks(lm: LanguageModel, position_BP: torch.Tensor, branch_BP: torch.Tensor, cached: int):
    """What each position attends to, as the model's own layers take it: itself and what it stands behind, so many
    cached tokens first, of which a layer with a window keeps the last."""
    config = lm.model.config.get_text_config()
    longest = position_BP.shape[1]
    seen_BPP = torch.ones(longest, longest, dtype=torch.bool).tril() & (
        (branch_BP[:, None] == 0) | (branch_BP[:, None] == branch_BP[:, :, None]))
    window, masks = getattr(config, "sliding_window", None), []
    for reach in (None, window):
        before_C = torch.arange(-cached if reach is None else -min(cached, reach - 1), 0)
        at_BC = torch.cat([before_C.expand(len(position_BP), -1), position_BP], dim=1)
        own_BPC = torch.cat([torch.ones(*position_BP.shape, len(before_C), dtype=torch.bool), seen_BPP], dim=2)
        if reach:
            own_BPC &= position_BP[:, :, None] - at_BC[:, None] < reach
        masks.append(torch.zeros(own_BPC.shape, dtype=lm.model.dtype).masked_fill_(
            ~own_BPC, torch.finfo(lm.model.dtype).min)[:, None].to(lm.device))
    full, near = masks
    kinds = getattr(config, "layer_types", None)
    return {"full_attention": full, "sliding_attention": near} if kinds else near
