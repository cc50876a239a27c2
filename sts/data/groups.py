"""Which texts a run reads: questions behind demonstrations, sets of demonstrations, text for SAEs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts.data.load import PACKAGED_TEXTS, load_examples, load_texts
from sts.data.prompts import PromptGroup, document_ids, make_group, plain_text, start_ids, without_options
from sts.data.sources import CORPORA, MMLU_PRO_CATEGORY, Example
from sts.errors import StsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of a pool's document, at most, and documents of a pool, at least.
DOCUMENT_TOKENS, FEWEST_DOCUMENTS = 200, 5
#: What a training set's domain is called among MMLU-Pro's, where the name differs.
DOMAIN_OF = {"code": "computer science", "medicine": "health", "mental health": "psychology"}


def trained_domains(examples: Iterable[Example]) -> set[str]:
    """The evaluation domains that training examples are of, by MMLU-Pro's names."""
    return {DOMAIN_OF.get(example.domain, example.domain) for example in examples}


def untrained(domains: Iterable[str], train: Iterable[Example]) -> list[str]:
    """The domains that are none of the training set's own, nor subjects of one."""
    own = trained_domains(train)
    return [domain for domain in domains if MMLU_PRO_CATEGORY.get(domain, domain) not in own]


def demonstration_draws(examples: list[Example], count: int, draws: int, *, seed: int, what: str,
                        set_aside: bool = False, apart: bool = False) -> list[tuple[list[Example], list[Example]]]:
    """`draws` pairs of `count` demonstrations and all other examples, by a moving window over a seeded shuffle.

    `set_aside`: none needs to be left over; `apart`: each of the others stands in one pair alone. `StsError`, which
    says `what` these are, for too few examples."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    pairs, taken = [], set()
    for draw in range(draws):
        chosen = [(draw * count + offset) % len(shuffled) for offset in range(count)]
        others = [index for index in range(len(shuffled)) if index not in chosen]
        if apart:
            others = [index for index in others[draw::draws] if index not in taken]
            taken.update(others)
        pairs.append(([shuffled[index] for index in chosen], [shuffled[index] for index in others]))
    most = len(examples) - (draws if apart else not set_aside)
    if len(examples) < count or not (set_aside or all(others for _, others in pairs)):
        raise StsError(f"{what} has {len(examples)} different questions, too few for one behind each of {draws} draws "
                       f"of {count} demonstrations. Use {f'at most {most} demonstrations, ' * (most > 0)}fewer "
                       "demonstration_draws, or more examples.")
    return pairs


def prompt_groups(tokenizer: PreTrainedTokenizerBase, questions: Mapping[str, list[Example]],
                  pool: Mapping[str, list[Example]], count: int, draws: int, *, tokens: int, seed: int,
                  what: str = "Domain", apart: bool = False) -> dict[str, list[PromptGroup]]:
    """Each domain's questions, of at most `tokens` tokens in all, behind each draw of demonstrations from the same
    domain, set aside in `pool` or its own; `what`, `apart`: see `demonstration_draws`."""
    return {domain: [make_group(tokenizer, own if domain in pool else others, demonstrations,
                                tokens=max(1, tokens // draws))
                     for demonstrations, others in demonstration_draws(
                         pool.get(domain, own), count, draws, seed=seed, what=f"{what} {domain!r}",
                         set_aside=domain in pool, apart=apart)]
            for domain, own in questions.items()}


def draws_of(examples: list[Example], count: int, draws: int, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """`draws` disjoint sets of `count` demonstrations, and the questions, which stand in none of them."""
    if len(examples) <= count * draws:
        raise StsError(f"{draws} sets of {count} demonstrations were asked of {len(examples)} training examples, which "
                       "leaves no question. Use fewer overlap_draws or overlap_demonstrations, or more sft_examples.")
    shuffled = random.Random(seed).sample(examples, len(examples))
    return [shuffled[draw * count:(draw + 1) * count] for draw in range(draws)], shuffled[count * draws:]


def other_domain_sets(train: Sequence[Example], pool: Mapping[str, list[Example]], count: int, draws: int,
                      seed: int) -> list[list[Example]]:
    """Sets of demonstrations, each from one domain that is not the training set's own, put as its examples are."""
    own = trained_domains(train)
    large = [domain for domain in untrained(sorted(pool), train) if len(pool[domain]) >= count]
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
    """What is answered in words: name -> (benchmark, questions, worked examples). mmlu_pro: `limit` (0: all) of each
    domain's questions, behind `count` examples; sft_held_out: asked as gsm8k; others: `limit` of their test split."""
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


def token_pieces(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Example | str], context: int, tokens: int, *,
                 whole: bool = True) -> list[list[int]]:
    """Token ids of as many tokens as asked for, in pieces of at most `context` tokens, BOS in front of each; of each
    document all of them, or its first alone, where not `whole`."""
    start, pieces, total = start_ids(tokenizer), [], 0  # BOS is a position that is not trained on
    for ids in (document_ids(tokenizer, document) for document in documents):
        for first in range(0, len(ids) if whole else 1, context - len(start)):
            piece = ids[first:first + context - len(start)][:tokens - total]
            if len(piece) > 8:
                pieces.append([*start, *piece])
                total += len(piece)
            if total >= tokens:
                return pieces
    return pieces


def documents_of(name: str, tokens: int) -> list[Example | str]:
    """Documents of a corpus, a text of an installed package, a text file, or a question set ("mmlu:val" names a split),
    of which the generated one has as many as `tokens` tokens take."""
    base, _, split = (name, "", "") if name.endswith((".txt", ".jsonl")) else name.partition(":")
    if base in (*CORPORA, *PACKAGED_TEXTS) or base.endswith((".txt", ".jsonl")):
        # Books are cut, so that the tokens asked for come from many of them.
        return [text[start:start + 20_000].strip() for text in load_texts(base)
                for start in range(0, len(text), 20_000)]
    return [*load_examples(base, split=split, limit=max(1, tokens // 50) if base == "gsm_symbolic" else 0)]


def pool_texts(pool: Mapping[str, Sequence[str]], tokens: int) -> dict[str, list[str]]:
    """Texts of each pool, of all its sets, in a fixed random order; all plain, as a chat's template in some pools alone
    would be taken for what they are about."""
    texts = {name: [plain_text(one) for source in sources for one in documents_of(source, tokens)]
             for name, sources in pool.items()}
    return {name: random.Random(0).sample(own, len(own)) for name, own in texts.items()}


def pool_pieces(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, list[str]],
                tokens: int) -> list[tuple[str, list[int]]]:
    """(pool, token ids) of the beginnings of each pool's texts, about `tokens` tokens a pool; `StsError` for a pool of
    too few texts."""
    pieces = {name: token_pieces(tokenizer, own, DOCUMENT_TOKENS, tokens, whole=False) for name, own in texts.items()}
    if few := [name for name, own in pieces.items() if len(own) < FEWEST_DOCUMENTS]:
        raise StsError(f"Pool {few[0]!r} has {len(pieces[few[0]])} documents; labels that are tested by shuffling them "
                       f"take {FEWEST_DOCUMENTS} a pool. Raise pool_tokens, or name more text.")
    return [(name, piece) for name, own in pieces.items() for piece in own]


@dataclass(frozen=True)
class SaeTexts:
    """What SAEs train on, in pieces of `context` tokens. `sources`: corpora, question sets ("mmlu:val" names a split)
    and text files, each with its tokens."""

    sources: Mapping[str, int]
    tokenizer: Any
    context: int

    def pieces(self, tokens: int = 0, *, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Pieces to train on, of `tokens` tokens, the sources in proportion (0: as many as each names), in a seeded
        order, and held-out ones from other documents (2% of them); `StsError` where there is nothing to train on."""
        if not self.sources:
            raise StsError("SAEs train on the text named by sae_text, which is empty. For example: "
                           "sts stage sae -p sae_text '{my_text.txt: 2000000}'")
        train, held_out, whole = [], [], sum(self.sources.values())
        for name, own in self.sources.items():
            documents = documents_of(name, own)
            random.Random(seed).shuffle(documents)
            cut = max(1, len(documents) // 50)
            share = max(1, round(own / whole * tokens)) if tokens else own
            kept = max(1000, share // 20) if tokens else max(2_000, own // 50)
            parts = (token_pieces(self.tokenizer, documents[:cut], self.context, kept),
                     token_pieces(self.tokenizer, documents[cut:], self.context, share))
            if not all(parts):
                raise StsError(f"sae_text: {name} has too little text to train on some documents and hold out others.")
            held_out, train = held_out + parts[0], train + parts[1]
        random.Random(seed).shuffle(train)
        return train, held_out
