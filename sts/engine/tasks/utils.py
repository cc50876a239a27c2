"""What the task files call: documents from `sts.data.load`, prompts, answers read from generated text, and their scores."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

from sts.data.load import load_examples, load_rows
from sts.data.prompts import question_text
from sts.data.sources import LETTERS, Example, last_boxed
from sts.errors import one_of

STEPS = "Let's think step by step."
#: Seconds that one comparison of two formulas may take.
COMPARISON_SECONDS = 5


# --- documents ----------------------------------------------------------------------------------------------------

def documents(*, data: str = "", split: str = "", domain: str = "", demonstration_split: str = "",
              examples: Sequence[Example] | None = None, demonstrations: Sequence[Example] | None = None,
              **metadata: Any) -> dict:
    """The questions of a task ("test") and its worked examples ("demonstrations"), as the harness' data sets.

    Args:
        data, split: a data set of `sts.data.load`, read from a local folder or the hub.
        domain: the one domain to keep; "" for all.
        demonstration_split: the split of worked examples; "" for none.
        examples, demonstrations: take these instead.
        metadata: what the harness passes besides.

    Raises:
        StsError: as `load_examples`, or a domain without a question.
    """
    import datasets

    if examples is None:
        examples = load_examples(data, split=split)
    if demonstrations is None:
        demonstrations = load_examples(data, split=demonstration_split) if demonstration_split else ()
    if domain and domain not in {example.domain for example in examples}:
        raise one_of("Domain", domain, {example.domain for example in examples})
    published = _published_solutions(demonstrations)
    parts = {}
    for part, chosen in (("test", examples), ("demonstrations", demonstrations)):
        rows = [{"example_id": example.example_id, "domain": example.domain, "question": example.question,
                 "options": list(example.options), "answer_index": example.answer_index, "answer": example.answer,
                 "text": question_text(example),
                 "worked": published.get(example.example_id) or f"A: {STEPS} {example.solution}"}
                for example in chosen if not domain or example.domain == domain]
        if rows:
            parts[part] = datasets.Dataset.from_list(rows)
    return parts


def _published_solutions(demonstrations: Sequence[Example]) -> dict[str, str]:
    """MMLU-Pro's worked solutions as published, with the opening that `sts.data.load` strips."""
    if not any(example.example_id.startswith("mmlu_pro-") for example in demonstrations):
        return {}
    return {f"mmlu_pro-{row['question_id']}": row["cot_content"] for row in load_rows("mmlu_pro", "validation")}


# --- MMLU-Pro -----------------------------------------------------------------------------------------------------

def mmlu_pro_prompt(doc: dict) -> str:
    """A question in the layout of MMLU-Pro's official script, up to the answer's first words."""
    options = [f"{letter}. {option.strip()}\n" for letter, option in zip(LETTERS, doc["options"], strict=False)]
    return f"Question:\n{doc['question']}\nOptions:\n{''.join(options)}Answer: {STEPS}"


def mmlu_pro_worked(doc: dict) -> str:
    """A demonstration's answer, after the words with which the prompt ends."""
    return doc["worked"].removeprefix(f"A: {STEPS}").strip()


def right_letter(doc: dict) -> str:
    return LETTERS[doc["answer_index"]]


def extract_letter(text: str) -> str:
    """The letter that MMLU-Pro's official script reads from an answer; "" where it would guess at random.

    From `evaluate_from_local.py` of TIGER-AI-Lab/MMLU-Pro, whose third step has changed over time: here it is the last
    letter that stands alone.
    """
    for pattern, flags in ((r"answer is \(?([A-J])\)?", 0), (r".*[aA]nswer:\s*([A-J])", 0),
                           (r"\b([A-J])\b(?!.*\b[A-J]\b)", re.DOTALL)):
        if match := re.search(pattern, text, flags):
            return match.group(1)
    return ""


def score_letter(doc: dict, results: list[str]) -> dict[str, int]:
    return {"exact_match": int(extract_letter(results[0]) == right_letter(doc))}


def letters_prompt(doc: dict) -> str:
    """A question as the book's own prompts write it without a chat template, up to the letter."""
    return f"Question: {doc['text']}\nAnswer: The answer is ("


def letters(doc: dict) -> list[str]:
    return list(LETTERS[:len(doc["options"])])


# --- mathematics --------------------------------------------------------------------------------------------------

def maths_prompt(doc: dict) -> str:
    return f"{doc['text']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


def _parse(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """math-verify's timeouts are signals, which only the main thread may set."""
    return COMPARISON_SECONDS if threading.current_thread() is threading.main_thread() else None


def extract_answer(text: str) -> str:
    """The final answer of a worked solution: its last \\boxed{...}, else what math-verify finds; "" if nothing."""
    if boxed := last_boxed(text):
        return boxed
    found = _parse(text)
    return str(found[-1]) if found else ""


def is_same_answer(right: str, text: str) -> bool:
    """Whether a worked solution ends with an answer equal to `right`, by math-verify (1/2 is 0.5 is \\frac12)."""
    from math_verify import verify

    return bool(verify(_parse(f"\\boxed{{{right}}}"), _parse(text), timeout_seconds=_seconds()))


def score_maths(doc: dict, results: list[str]) -> dict[str, int]:
    return {"math_verify": int(is_same_answer(doc["answer"], results[0]))}
