"""Prompts: token ids, and which of them are the question's own.

A prompt is the model's chat template (or a plain question-and-answer layout where the tokenizer has none) around
zero or more worked demonstrations and one question.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from sts.data.sources import LETTERS, Example
from sts.errors import StsError

#: A character from Unicode's private use area, which no text holds.
MARKER = "\ue000"


@dataclass(frozen=True)
class Prompt:
    """Token ids of a whole prompt; `question` is the half-open range of positions that hold the question itself."""

    ids: tuple[int, ...]
    question: tuple[int, int]


@dataclass(frozen=True)
class PromptGroup:
    """The same questions without (`base`) and behind (`icl`) one set of demonstrations, item by item."""

    base: tuple[Prompt, ...]
    icl: tuple[Prompt, ...]


#: How an answer to a question with options opens where it has no worked solution.
OPENING = "The answer is ("


def question_text(example: Example) -> str:
    """The question as the user's turn: the question, then its options as "(A) ..." lines."""
    options = [f"({letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False)]
    # Stripped: templates that trim their turns (Llama 3, Gemma) would otherwise change the question.
    return "\n".join([example.question.strip(), *options]).strip()


def solution_text(example: Example) -> str:
    """The worked solution as the assistant's turn, ending with the right answer.

    For a question with options the last sentence is "The answer is (C) <option>."; the solution's own closing
    sentence of that form is replaced, so that every item ends alike.
    """
    worked = example.solution.strip()
    if not example.options:
        return worked or example.answer
    worked = re.sub(r"\s*(So |Thus,? |Therefore,? |Hence,? )?[Tt]he answer is \(?[A-J]\)?\.?\s*$", "", worked)
    return f"{worked} {OPENING}{LETTERS[example.answer_index]}) {example.answer.rstrip('.')}.".strip()


def without_options(example: Example) -> Example:
    """A question with options as an open one: the same solution, ending with the right answer without its letter."""
    if not example.options:
        return example
    solution = solution_text(example).replace(f"({LETTERS[example.answer_index]}) ", "")
    return replace(example, options=(), answer_index=-1, solution=solution)


def render(tokenizer: PreTrainedTokenizerBase, question: str, demonstrations: tuple[Example, ...] = (),
           answer: str | None = None) -> str:
    """The prompt's text: demonstrations as earlier turns, the question last, ready for the answer.

    With `answer`, the whole conversation including that answer instead.
    """
    turns = [(question_text(example), solution_text(example)) for example in demonstrations]
    if tokenizer.chat_template:
        messages = [message for user, assistant in turns
                    for message in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})]
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    blocks = [f"Question: {user}\nAnswer: {assistant}" for user, assistant in turns]
    blocks.append(f"Question: {question}\nAnswer:" + (f" {answer}" if answer is not None else ""))
    return "\n\n".join(blocks)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model expects before plain text: the BOS token if the tokenizer adds one and no chat template does."""
    ids = [] if tokenizer.chat_template else tokenizer("")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def make_prompt(tokenizer: PreTrainedTokenizerBase, question: str, demonstrations: tuple[Example, ...] = (), *,
                context_length: int = 0) -> Prompt:
    """Tokenise a question behind demonstrations and find the question's own tokens.

    Args:
        context_length: the model's context in tokens; 0 for no check.

    Raises:
        StsError: the prompt does not fit the context.
    """
    text = render(tokenizer, question, demonstrations)
    # Where the question starts: a marker in its place, as the question's words may occur in the template too.
    start = render(tokenizer, MARKER, demonstrations).rfind(MARKER)
    if text[start:start + len(question)] != question:  # a template that trims or rewrites the content
        raise StsError(f"The chat template changes the question, so its tokens cannot be found: {question[:60]!r}")
    # A chat template writes BOS itself; without one the tokenizer adds what the model expects.
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    own = [index for index, (left, right) in enumerate(encoded["offset_mapping"])
           if left < right and left >= start and right <= start + len(question)]
    if not own:
        raise StsError(f"The question has no tokens of its own: {question[:60]!r}")
    if context_length and len(ids) > context_length:
        raise StsError(f"A prompt of {len(ids)} tokens does not fit the model's context of {context_length} "
                       f"({len(demonstrations)} demonstrations). Use fewer demonstrations or shorter questions.")
    return Prompt(ids, (own[0], own[-1] + 1))


def solution_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, *, context_length: int = 0) -> Prompt:
    """A question with its worked solution; the `question` range holds the solution's tokens.

    Args:
        context_length: the model's context in tokens; 0 for no check.

    Raises:
        StsError: the conversation does not fit the context, or the template changes the solution.
    """
    solution = solution_text(example)
    text = render(tokenizer, question_text(example), answer=solution)
    start = text.rfind(solution)
    if not solution or start < 0:
        raise StsError(f"The solution of {example.example_id} has no tokens of its own in the chat: {solution[:60]!r}")
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    own = [index for index, (left, right) in enumerate(encoded["offset_mapping"])
           if left < right and right > start and left < start + len(solution)]
    if context_length and len(ids) > context_length:
        raise StsError(f"Item {example.example_id} has {len(ids)} tokens with its solution; the model's context is "
                       f"{context_length}.")
    return Prompt(ids, (own[0], own[-1] + 1))


def paired_positions(base: Prompt, icl: Prompt, *, question_tokens_only: bool = True,
                     drop_first_positions: int = 0) -> tuple[list[int], list[int]]:
    """Positions of the tokens that both prompts share at their end, in step.

    Both prompts end with the same question, so their token ids agree from some point to the end. That common end is
    the pairing; it holds the question and, unless `question_tokens_only`, the template around it.

    Returns:
        (positions in base, positions in icl), of equal length.

    Raises:
        StsError: the two prompts do not hold the same question.
    """
    common = 0
    while common < min(len(base.ids), len(icl.ids)) and base.ids[-1 - common] == icl.ids[-1 - common]:
        common += 1
    shift = len(icl.ids) - len(base.ids)
    first, last = len(base.ids) - common, len(base.ids)
    if first > base.question[0] + 1:  # the first token may merge with what precedes it; more may not
        raise StsError("The two prompts of a pair hold different questions, so their tokens cannot be paired.")
    if question_tokens_only:
        first, last = max(first, base.question[0]), base.question[1]
    kept = [position for position in range(first, last) if position >= drop_first_positions]
    return kept, [position + shift for position in kept]


def demonstration_draws(examples: list[Example], count: int, draws: int, *, seed: int, what: str,
                        set_aside: bool = False) -> list[tuple[tuple[Example, ...], list[Example]]]:
    """Split examples into demonstrations and questions, `draws` times, with a moving window over a seeded shuffle.

    Args:
        set_aside: the examples serve as demonstrations only, so that none needs to be left over.

    Returns:
        `draws` pairs (demonstrations, questions): `count` demonstrations and all other examples.

    Raises:
        StsError: fewer examples than `count` + 1 (`count` if set aside).
    """
    if len(examples) < count + (not set_aside):
        raise StsError(f"{what} has {len(examples)} examples; {count} demonstrations leave no question to score. "
                       f"Use at most {max(0, len(examples) - 1)} demonstrations, or more examples.")
    shuffled = random.Random(seed).sample(examples, len(examples))
    pairs = []
    for draw in range(draws):
        chosen = [(draw * count + offset) % len(shuffled) for offset in range(count)]
        pairs.append((tuple(shuffled[index] for index in chosen),
                      [example for index, example in enumerate(shuffled) if index not in chosen]))
    return pairs


def own_questions(draws: list[tuple[tuple[Example, ...], list[Example]]]) -> list[list[Example]]:
    """For each of `demonstration_draws`' draws, questions that no other draw reads: one in `len(draws)` of its own.

    A draw's questions leave out its demonstrations, so the same place in two draws' lists may hold different questions;
    what an earlier draw has taken is left out. With one or two draws nothing has to be.
    """
    taken: set[str] = set()
    parts = []
    for index, (_, questions) in enumerate(draws):
        parts.append([example for example in questions[index::len(draws)] if example.example_id not in taken])
        taken.update(example.example_id for example in parts[-1])
    return parts


def make_group(tokenizer: PreTrainedTokenizerBase, questions: list[Example], demonstrations: tuple[Example, ...], *,
               context_length: int = 0, tokens: int = 0) -> PromptGroup:
    """Prompts for questions without and with demonstrations, until the questions hold `tokens` tokens (0: all)."""
    base, icl, total = [], [], 0
    for example in questions:
        question = question_text(example)
        base.append(make_prompt(tokenizer, question, context_length=context_length))
        icl.append(make_prompt(tokenizer, question, demonstrations, context_length=context_length))
        total += base[-1].question[1] - base[-1].question[0]
        if tokens and total >= tokens:
            break
    return PromptGroup(tuple(base), tuple(icl))
