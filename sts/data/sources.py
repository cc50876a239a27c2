"""What the question sets are: where each is found, how a row of it becomes an `Example`, and MMLU-Pro's categories."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import yaml

from sts.data.check import LETTERS, Row
from sts.errors import ROOT


@dataclass(frozen=True)
class Example:
    """One question; without options an open one, whose `answer_index` is -1. `answer`: the right option's text, or the
    final answer; `solution`: the worked one, "" where the data set has none."""

    example_id: str
    domain: str
    question: str
    options: tuple[str, ...]
    answer_index: int
    answer: str
    solution: str


@dataclass(frozen=True)
class Source:
    """A question set: its reader of rows, its splits, and repository, configurations and revision on the hub, if any,
    with splits that are called otherwise there. Local files are <name>/<split>.jsonl. `shots`: the split whose examples
    of the same domain are put in front of a question that is evaluated; `validation`: one that is never reported on."""

    read: Callable[[Row, str], Example]
    splits: tuple[str, ...]
    hub: str = ""
    revision: str | None = None
    hub_configs: tuple[str, ...] = ("default",)
    hub_splits: tuple[tuple[str, str], ...] = ()
    shots: str = ""
    validation: str = ""


_PREAMBLE = re.compile(
    r"^(A:\s*)?(Let['’]s think step by step\.\s*)?(We refer to Wikipedia( articles on [^.]*?)? for help\.\s*)?"
    r"(Let['’]s solve this( problem)? step by step\.\s*)?", re.IGNORECASE)


def without_preamble(solution: str) -> str:
    """A worked solution without the boilerplate that many of a release open with."""
    return _PREAMBLE.sub("", solution.strip(), count=1).strip()


def last_boxed(solution: str) -> str:
    """The content of the last \\boxed{...} of a LaTeX solution, braces balanced; "" if there is none."""
    _, mark, rest = solution.rpartition("\\boxed{")
    depth = 1
    for position, character in enumerate(rest if mark else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:position]
    return ""


def _open(domain: str, question: str, solution: str, answer: str = "") -> Callable[[Row, str], Example]:
    """A reader of open questions, by names of columns: several for the question; a "?" marks one that may be empty."""
    def read(row: Row, row_id: str) -> Example:
        *asked, worked = (row.text(name.rstrip("?"), empty=name.endswith("?"))
                          for name in (*question.split(), solution))
        return Example(row_id, domain, "\n".join(asked).strip(), (), -1, row.text(answer) if answer else "",
                       worked.replace("\r\n", "\n"))
    return read


def _mmlu_pro(row: Row, row_id: str) -> Example:
    options = row.options("options")
    index, said = row.index("answer_index", options), row.text("answer", empty=True).strip()
    right = options[index].strip()
    if said not in ("", LETTERS[index], right):  # the right option is named once more, by letter or text
        raise row.wrong("answer", f"says {said[:60]!r}, while the index says ({LETTERS[index]}) {right[:60]!r}. "
                                  "Correct one of them.")
    return Example(f"mmlu_pro-{row.text('question_id')}", row.text("category"), row.text("question"), options, index,
                   options[index], without_preamble(row.text("cot_content", empty=True)))


def _mmlu(row: Row, row_id: str) -> Example:
    options = row.options("choices")
    index, subject = row.index("answer", options), row.text("subject", of=MMLU_PRO_CATEGORY)
    return Example(row_id, subject, row.text("question"), options, index, options[index], "")


def _arc(row: Row, row_id: str) -> Example:
    choices = row.value("choices")
    if not isinstance(choices, dict):
        raise row.wrong("choices", f'{str(choices)[:60]!r} is no object with "text" and "label".')
    choices = Row(choices, row.file, row.number)
    options, labels = choices.options("text"), choices.texts("label")
    index = labels.index(row.text("answerKey", of=labels))
    return Example(row_id, "science", row.text("question"), options, index, options[index], "")


def _gsm8k(row: Row, row_id: str) -> Example:
    worked, _, final = (part.strip() for part in row.text("answer").partition("####"))
    if not final:
        raise row.wrong("answer", 'no final answer. End the solution with a line such as "#### 42".')
    # <<48/2=24>> are calculator annotations of the release, not part of the prose.
    worked = re.sub(r"<<.*?>>", "", worked).strip()
    return Example(row_id, "math", row.text("question"), (), -1, final, f"{worked}\n#### {final}")


def _math(row: Row, row_id: str) -> Example:
    solution = row.text("solution")
    if not last_boxed(solution):
        raise row.wrong("solution", "no final answer. Put it in \\boxed{...}.")
    return Example(row_id, "math", row.text("problem"), (), -1, last_boxed(solution), solution)


def _pubmedqa(row: Row, row_id: str) -> Example:
    question = "\n".join([*row.texts("contexts"), row.text("question")])
    return Example(row_id, "medicine", question, (), -1, row.text("final_decision"), row.text("long_answer"))


def own_row(row: Row, domain: str) -> Example:
    """A row of one's own: question and solution, or answer (worked as GSM8K's, where it has a "####"); or question,
    options, answer_index or answer (a letter or the right option's text), and perhaps solution."""
    row_id = f"{domain}.jsonl, row {row.number}"
    if long := [name for name, own in row.values.items() if len(str(own)) > 200_000]:  # no model here reads as much
        raise row.wrong(long[0], "more than 200,000 characters. Cut it, or leave the row out.")
    row = replace(row, values={name: own.strip() if isinstance(own, str) else own for name, own in row.values.items()
                               if own is not None})  # null: as a table writes a column that a row does not have
    row.text("question")
    if "options" in row.values:
        options = [one.strip() for one in row.options("options")]
        known = [*options, *LETTERS[:len(options)]]
        right = row.values["answer_index"] if "answer_index" in row.values else (
            known.index(row.text("answer", of={*known})) % len(options))
        return replace(_mmlu_pro(Row({
            "cot_content": row.values.get("solution"), **row.values, "answer_index": right, "question_id": 0,
            "category": domain}, row.file, row.number), row_id), example_id=row_id)
    if "solution" not in row.values and "####" in row.text("answer"):
        return replace(_gsm8k(row, row_id), domain=domain)
    return _open(domain, "question", "solution" if "solution" in row.values else "answer")(row, row_id)


SOURCES: dict[str, Source] = {
    "mmlu_pro": Source(_mmlu_pro, ("test", "validation"), "TIGER-Lab/MMLU-Pro",
                       "b189ec765aa7ed75c8acfea42df31fdae71f97be"),
    "gsm8k": Source(_gsm8k, ("train", "test"), "openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", ("main",)),
    "math": Source(_math, ("train", "test"), "EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3",
                   ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                    "prealgebra", "precalculus")),
    "limo": Source(_open("math", "question", "solution", "answer"), ("train",), "GAIR/LIMO"),
    # "worked": the same five questions a subject as "dev", with solutions, which lm-evaluation-harness carries.
    "mmlu": Source(_mmlu, ("test", "val", "dev", "worked"), "cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe",
                   ("all",), (("val", "validation"),), shots="dev", validation="val"),
    "arc_easy": Source(_arc, ("train", "test")),
    "arc_challenge": Source(_arc, ("train", "test")),
    "mbpp": Source(_open("code", "text", "code"), ("all",)),
    "counsel_chat": Source(_open("mental health", "title question?", "answer?"), ("all",)),
    "pubmedqa": Source(_pubmedqa, ("labelled",)),
    "roleplay": Source(_open("roleplay", "instruction input?", "response"), ("all",)),
}
#: Puzzles of reasoning-gym that a small model solves now and then: name there -> its settings.
PUZZLES: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_digits": 1, "max_digits": 1},
    "count_bits": {"max_n": 255},
    "gcd": {"max_value": 20},
    "letter_counting": {"min_words": 1, "max_words": 2}}
#: Question sets from installed packages, and their splits.
GENERATED = {"mmlu_exemplars": ("train",), **dict.fromkeys(("gsm_symbolic", *PUZZLES), ("train", "test"))}
CORPORA = ("web", "books", "textbook")

_SUBJECTS = yaml.safe_load((ROOT / "data" / "mmlu_subjects.yaml").read_text(encoding="utf-8"))
#: MMLU's 57 subjects -> MMLU-Pro's 14 categories.
MMLU_PRO_CATEGORY = {subject: domain for domain, names in _SUBJECTS.items() for subject in names}
