"""Which texts a run reads: questions behind demonstrations, sets of demonstrations, text for SAEs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sts.data.load import load_examples, load_texts
from sts.data.prompts import (
    PromptGroup,
    demonstration_draws,
    document_ids,
    make_group,
    own_questions,
    start_ids,
    without_options,
)
from sts.data.sources import CORPORA, Example
from sts.errors import StsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a training set's domain is called among MMLU-Pro's, where the name differs.
DOMAIN_OF = {"code": "computer science", "medicine": "health", "mental health": "psychology"}


def trained_domains(examples: Sequence[Example]) -> set[str]:
    """The evaluation domains that training examples are of, by MMLU-Pro's names."""
    return {DOMAIN_OF.get(example.domain, example.domain) for example in examples}


def training_groups(tokenizer: PreTrainedTokenizerBase, examples: list[Example], count: int, draws: int, *, tokens: int,
                    context_length: int, seed: int, name: str) -> list[PromptGroup]:
    """Questions of the training set behind each draw of demonstrations; no question is read behind two draws.

    Args:
        count, draws: demonstrations of a draw, and draws.
        tokens: question tokens, at most, of all draws together.
        name: of the training set, for errors.

    Raises:
        StsError: too few examples for the demonstrations, or for a question behind each draw.
    """
    drawn = demonstration_draws(examples, count, draws, seed=seed, what=f"The training set {name!r}")
    parts = own_questions(drawn)
    if not all(parts):
        raise StsError(f"The training set {name!r} has {len(examples)} examples, too few for a question behind each of "
                       f"{draws} draws of {count} demonstrations. Lower demonstration_draws or shift_demonstrations, "
                       "or raise sft_examples.")
    own = max(1, tokens // draws)
    return [make_group(tokenizer, questions, demonstrations, context_length=context_length, tokens=own)
            for (demonstrations, _), questions in zip(drawn, parts, strict=True)]


def groups_of_domains(tokenizer: PreTrainedTokenizerBase, questions: Mapping[str, list[Example]],
                      pool: Mapping[str, list[Example]], count: int, draws: int, *, tokens: int, context_length: int,
                      seed: int) -> dict[str, list[PromptGroup]]:
    """Each domain's questions behind each draw of demonstrations from the same domain, set aside in `pool` or its own.
    """
    groups = {}
    for domain, examples in questions.items():
        drawn = demonstration_draws(pool.get(domain, examples), count, draws, seed=seed, what=f"Domain {domain!r}",
                                    set_aside=domain in pool)
        groups[domain] = [make_group(tokenizer, examples if domain in pool else others, demonstrations,
                                     context_length=context_length, tokens=max(1, tokens // draws))
                          for demonstrations, others in drawn]
    return groups


def draws_of(examples: list[Example], count: int, draws: int, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """`draws` disjoint sets of `count` demonstrations, and the questions, which stand in none of them.

    Raises:
        StsError: no question is left.
    """
    if len(examples) <= count * draws:
        raise StsError(f"{draws} sets of {count} demonstrations were asked of {len(examples)} training examples, which "
                       "leaves no question. Use fewer overlap_draws or overlap_demonstrations, or more sft_examples.")
    shuffled = random.Random(seed).sample(examples, len(examples))
    return [shuffled[draw * count:(draw + 1) * count] for draw in range(draws)], shuffled[count * draws:]


def other_domain_sets(train: Sequence[Example], pool: Mapping[str, list[Example]], count: int, draws: int,
                      seed: int) -> list[list[Example]]:
    """Sets of demonstrations, each from one domain that is not the training set's own, put as its examples are.

    Raises:
        StsError: no other domain has enough examples.
    """
    own = trained_domains(train)
    large = [domain for domain in sorted(set(pool) - own) if len(pool[domain]) >= count]
    if not large:
        raise StsError(f"The control takes {count} demonstrations from a domain other than {', '.join(sorted(own))}; "
                       "no domain has so many. Use fewer shift_demonstrations, or more domains.")
    generator = random.Random(seed)
    order = generator.sample(large, len(large))
    sets = [generator.sample(pool[order[draw % len(order)]], count) for draw in range(draws)]
    if any(example.options for example in train):
        return sets
    return [[without_options(example) for example in chosen] for chosen in sets]


def benchmark_questions(names: Sequence[str], held_out: list[Example], questions: Mapping[str, list[Example]],
                        pool: Mapping[str, list[Example]], count: int, limit: int,
                        seed: int) -> dict[str, tuple[str, list[Example], list[Example]]]:
    """What is answered in words: name -> (benchmark, questions, worked examples).

    Args:
        names: mmlu_pro (the domains' questions behind `count` worked examples of their own), sft_held_out (the held-out
            problems, as gsm8k asks), gsm8k or math.
        limit: questions a domain at most; 0 for all.
    """
    found: dict[str, tuple[str, list[Example], list[Example]]] = {}
    for name in names:
        if name == "mmlu_pro":
            drawn = [(pool[domain][:count], own) if domain in pool else
                     demonstration_draws(own, count, 1, seed=seed, what=f"Domain {domain!r}")[0]
                     for domain, own in questions.items()]
            found[name] = (name, [one for _, own in drawn for one in own[:limit or None]],
                           [one for worked, _ in drawn for one in worked])
        elif name == "sft_held_out":
            found[name] = "gsm8k", held_out, []
        else:
            found[name] = name, load_examples(name, split="test", limit=limit, seed=seed), []
    return found


def token_chunks(documents, context: int, limit: int) -> list[list[int]]:
    """Cut tokenised documents into pieces of at most `context` tokens until `limit` tokens are gathered."""
    pieces, total = [], 0
    for document in documents:
        for start in range(0, len(document), context):
            piece = document[start:start + context][: limit - total]
            if len(piece) > 8:
                pieces.append(piece)
                total += len(piece)
            if total >= limit:
                return pieces
    return pieces


def token_pieces(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Example | str], context: int,
                 tokens: int) -> list[list[int]]:
    """Token ids of about as many tokens as asked for, in pieces of at most `context` tokens, BOS in front of each."""
    start = start_ids(tokenizer)  # a position that is not trained on
    encoded = (document_ids(tokenizer, document) for document in documents)
    return [[*start, *piece] for piece in token_chunks(encoded, context - len(start), tokens)]


@dataclass(frozen=True)
class SaeTexts:
    """What SAEs train on: corpora, question sets ("mmlu:val" names a split) and text files, each with its tokens.

    Attributes:
        sources: name -> tokens.
        context: tokens of a piece.
    """

    sources: Mapping[str, int]
    tokenizer: PreTrainedTokenizerBase
    context: int

    def documents(self, name: str) -> list[Example | str]:
        """Documents of one source."""
        base, _, split = (name, "", "") if name.endswith((".txt", ".jsonl")) else name.partition(":")
        if base in CORPORA or base.endswith((".txt", ".jsonl")):
            # Books are cut, so that the tokens asked for come from many of them.
            return [text[start:start + 20_000].strip() for text in load_texts(base)
                    for start in range(0, len(text), 20_000)]
        return list(load_examples(base, split=split,
                                  limit=max(1, self.sources[name] // 50) if base == "gsm_symbolic" else 0))

    def pieces(self, tokens: int = 0, *, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Pieces to train on and held-out ones, from other documents (2% of them), in a seeded order.

        Args:
            tokens: to train on, the sources in proportion; 0 for as many as each source names.

        Raises:
            StsError: no text is named, or nothing is left to train on.
        """
        if not self.sources:
            raise StsError("SAEs train on the text named by sae_text, which is empty. For example: "
                           "sts stage sae -p sae_text '{my_text.txt: 2000000}'")
        train, held_out, whole = [], [], sum(self.sources.values())
        for name, own in self.sources.items():
            documents = self.documents(name)
            random.Random(seed).shuffle(documents)
            cut = max(1, len(documents) // 50)
            share = max(1, round(own / whole * tokens)) if tokens else own
            kept = max(1000, share // 20) if tokens else max(2_000, own // 50)
            held_out += token_pieces(self.tokenizer, documents[:cut], self.context, kept)
            train += token_pieces(self.tokenizer, documents[cut:], self.context, share)
        if not train:
            raise StsError("sae_text holds too little text: one document is held out, and nothing is left to train on.")
        random.Random(seed).shuffle(train)
        return train, held_out
