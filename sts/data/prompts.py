"""Prompts: token ids, and which of them are the question's own.

What is read, trained on and scored is one text, by the model's chat template or, without one, in a plain layout: on
every day, as templates are told a fixed date; and a format's token inside a question is plain text.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from sts.data.check import LETTERS
from sts.data.sources import Example
from sts.errors import StsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A character from Unicode's private use area, which no text holds.
MARKER = "\ue000"
#: The day that templates are told it is, which Llama 3's own falls back to; a definition put before each template.
DATE = datetime.datetime(2024, 7, 26)
_TODAY = "{% macro strftime_now(format) %}{{ format" + "".join(
    f"|replace('%{code}', '{DATE.strftime('%' + code)}')" for code in "aAdbBmyYHIMSpj") + " }}{% endmacro %}"
#: The layout for a tokenizer without a chat template.
LAYOUT = ("{% for message in messages %}{% if message.role == 'user' %}{{ '' if loop.first else '\\n\\n' }}Question: "
          "{{ message.content }}{{ '\\nAnswer:' }}{% else %}{{ ' ' + message.content }}{% endif %}{% endfor %}")
#: The end of a private use area, whose characters stand for the format's tokens where these are plain text.
PLAIN, _PLAIN = 0x10E000, re.compile("([\U0010e000-\U0010fffd])")
#: How an answer to a question with options opens where it has no worked solution.
OPENING = "The answer is ("


class Prompt(NamedTuple):
    """Token ids of a whole prompt; `question` is the half-open range of positions that hold the question itself."""

    ids: tuple[int, ...]
    question: tuple[int, int]


class PromptGroup(NamedTuple):
    """The same questions without (`base`) and behind (`icl`) one set of demonstrations, item by item."""

    base: tuple[Prompt, ...]
    icl: tuple[Prompt, ...]


def question_text(example: Example) -> str:
    """The question as the user's turn: the question, then its options as "(A) ..." lines."""
    options = [f"({letter}) {option.strip()}" for letter, option in zip(LETTERS, example.options, strict=False)]
    # Stripped: templates that trim their turns (Llama 3, Gemma) would otherwise change the question.
    return "\n".join([example.question.strip(), *options]).strip()


def solution_text(example: Example) -> str:
    """The worked solution as the assistant's turn. Where there are options, the last sentence is "The answer is (C)
    <option>.", in place of one of that form of its own."""
    worked = example.solution.strip()
    if not example.options:
        return worked or example.answer.strip()
    worked = re.sub(r"\s*(So |Thus,? |Therefore,? |Hence,? )?[Tt]he answer is \(?[A-J]\)?\.?\s*$", "", worked)
    return f"{worked} {OPENING}{LETTERS[example.answer_index]}) {example.answer.strip().rstrip('.')}.".strip()


def plain_text(document: Example | str) -> str:
    """A text as it is, or a question with its solution as one."""
    return document if isinstance(document, str) else f"{question_text(document)}\n{solution_text(document)}"


def without_options(example: Example) -> Example:
    """A question with options as an open one: the same solution, ending with the right answer without its letter."""
    solution = solution_text(example).replace(f"({LETTERS[example.answer_index]}) ", "")
    return replace(example, options=(), answer_index=-1, solution=solution)


def few_shot_text(example: Example, shots: Sequence[Example], kind: str) -> str:
    """A question behind examples of its domain in plain text, ready for the right option's `letter` or `text`, to the
    letter as lm-evaluation-harness' tasks `mmlu` and `mmlu_continuation` ask it."""
    def asked(one: Example) -> str:
        if kind == "text":
            return f"Question: {one.question.strip()}\nAnswer:"
        options = [f"{letter}. {option}" for letter, option in zip(LETTERS, one.options, strict=False)]
        return "\n".join([one.question.strip(), *options, "Answer:"])

    about = "questions" if kind == "text" else "multiple choice questions"
    return (f"The following are {about} (with answers) about {example.domain.replace('_', ' ')}.\n\n" + "".join(
        f"{asked(one)} {LETTERS[one.answer_index] if kind == 'letter' else one.answer}\n\n" for one in shots)
        + asked(example))


def render(tokenizer: PreTrainedTokenizerBase, question: str, demonstrations: Sequence[Example] = (),
           answer: str | None = None) -> str:
    """The prompt's text, for `encode`: demonstrations as earlier turns, the question last, ready for the answer; with
    `answer` the whole conversation, that answer included."""
    pairs = [*((question_text(one), solution_text(one)) for one in demonstrations), (question, answer or "")]
    messages = [{"role": role, "content": _plain(tokenizer, text)} for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)]
    return chat_text(tokenizer, messages[:-1] if answer is None else messages, awaiting=answer is None)


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, awaiting: bool) -> str:
    """Messages by the chat template, the same on every day; `awaiting` an answer, or finished."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else LAYOUT
    return str(tokenizer.apply_chat_template(messages, chat_template=_TODAY + template, tokenize=False,
                                             add_generation_prompt=awaiting))


def context_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What a finished turn has in front of its solution, for `encode`; some templates write more there than a prompt
    that awaits an answer ends with. Without a template, the blank behind "Answer:" is the solution's."""
    text = render(tokenizer, question, answer=MARKER)
    return text[:text.rfind(MARKER) - len(blank(tokenizer))]


def blank(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a solution begins with: a blank in the plain layout, nothing in a chat."""
    return "" if tokenizer.chat_template else " "


@lru_cache(maxsize=8)
def _format_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The format's own tokens, such as the end of a turn, the longest first."""
    return tuple(sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
                        key=lambda token: (-len(token), token)))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in which the format's tokens stand as plain text."""
    for place, token in enumerate(_format_tokens(tokenizer)):
        text = text.replace(token, chr(PLAIN + place))
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids of a rendered text, and each one's half-open range of characters in it (empty for a BOS added)."""
    ids, offsets, at = [], [], 0
    for place, part in enumerate(_PLAIN.split(text)):  # every second part is one of `_plain`'s characters
        if place % 2:
            own = tokenizer(_format_tokens(tokenizer)[ord(part) - PLAIN], add_special_tokens=False,
                            split_special_tokens=True)["input_ids"]
            ids += own
            offsets += [(at, at + 1)] * len(own)
        elif part or not place:
            # A chat template writes BOS itself; without one the tokenizer adds what the model expects.
            found = tokenizer(part, add_special_tokens=not (place or tokenizer.chat_template),
                              return_offsets_mapping=True)
            ids += found["input_ids"]
            offsets += [(left + at, right + at) for left, right in found["offset_mapping"]]
        at += len(part)
    return tuple(ids), offsets


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model expects before plain text: the BOS token if the tokenizer adds one and no chat template does."""
    ids = [] if tokenizer.chat_template else tokenizer("")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def document_ids(tokenizer: PreTrainedTokenizerBase, document: Example | str) -> list[int]:
    """Token ids of a plain text, or of a question with its solution as in a chat; without `start_ids`."""
    text = _plain(tokenizer, document) if isinstance(document, str) else \
        render(tokenizer, question_text(document), answer=solution_text(document))
    ids = encode(tokenizer, text)[0]
    return list(ids[len(start_ids(tokenizer)):])


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str, start: int, own_text: str, *, whole: bool) -> Prompt:
    """The prompt `text`, in which `own_text` is to stand at `start`; of tokens that merge with what is around it none
    counts, where `whole`, or all."""
    (ids, offsets), end = encode(tokenizer, text), start + len(own_text)
    own = [index for index, (left, right) in enumerate(offsets)
           if left < right and (start <= left and right <= end if whole else right > start and left < end)]
    if not (own and own_text.strip() and text[start:end] == own_text):  # a template that trims or rewrites the content
        raise StsError("The chat template changes the question or its answer, so its tokens cannot be found: "
                       f"{own_text[:60]!r}")
    return Prompt(ids, (own[0], own[-1] + 1))


def make_prompt(tokenizer: PreTrainedTokenizerBase, question: str, demonstrations: Sequence[Example] = ()) -> Prompt:
    """Tokenise a question behind demonstrations and find the question's own tokens."""
    # Where the question starts: a marker in its place, as the question's words may occur in the template too.
    start = render(tokenizer, MARKER, demonstrations).rfind(MARKER)
    return _prompt(tokenizer, render(tokenizer, question, demonstrations), start, _plain(tokenizer, question),
                   whole=True)


def solution_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, opening: str = "") -> Prompt:
    """A question with its worked solution, whose tokens behind `opening`, if it starts so, are the `question` range;
    `StsError` where there is none."""
    question, solution = question_text(example), blank(tokenizer) + _plain(tokenizer, solution_text(example))
    cut = len(blank(tokenizer) + opening) if opening and solution_text(example).startswith(opening) else 0
    return _prompt(tokenizer, render(tokenizer, question, answer=solution_text(example)),
                   len(context_text(tokenizer, question)) + cut, solution[cut:], whole=False)


def paired_positions(base: Prompt, icl: Prompt, *, question_tokens_only: bool = True,
                     drop_first_positions: int = 0) -> tuple[list[int], list[int]]:
    """(positions in base, positions in icl) of the tokens that both prompts share at their end, in step: those of the
    question and, unless `question_tokens_only`, the template around it. Raises `StsError` for two questions."""
    common = 0
    while common < min(len(base.ids), len(icl.ids)) and base.ids[-1 - common] == icl.ids[-1 - common]:
        common += 1
    shift = len(icl.ids) - len(base.ids)
    first, last = len(base.ids) - common, len(base.ids)
    if first > base.question[0] + 1:  # the first token may merge with what precedes it; more may not
        raise StsError("The two prompts of a pair hold different questions, so their tokens cannot be paired.")
    if question_tokens_only:
        first, last = max(first, base.question[0]), base.question[1]
    kept = range(max(first, drop_first_positions), last)
    return list(kept), [position + shift for position in kept]


def make_group(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Example], demonstrations: Sequence[Example], *,
               tokens: int = 0) -> PromptGroup:
    """Prompts for questions without and with demonstrations, until the questions hold `tokens` tokens (0: all)."""
    base, icl, total = [], [], 0
    for question in map(question_text, questions):
        base.append(make_prompt(tokenizer, question))
        icl.append(make_prompt(tokenizer, question, demonstrations))
        total += base[-1].question[1] - base[-1].question[0]
        if tokens and total >= tokens:
            break
    return PromptGroup(tuple(base), tuple(icl))
