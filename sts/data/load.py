"""Data sets: questions with worked solutions, and plain text.

Every question set is read into `Example`s, whether it comes from a local folder (`STS_DATA_DIR`), from the hub at a
pinned revision, or from an installed package. One reader serves local files and the hub alike; `check` holds each row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sts.data.check import LETTERS, Row, json_lines, read_text
from sts.data.sources import CORPORA, GENERATED, MMLU_PRO_CATEGORY, SOURCES, Example, Source, without_preamble
from sts.errors import MissingData, StsError, one_of

#: Whether data sets that are not here may be asked from the hub.
_HUB: ContextVar[bool] = ContextVar("hub", default=True)


# --- loading ------------------------------------------------------------------------------------------------------

def load_examples(name: str, *, split: str = "", limit: int = 0, seed: int = 0) -> list[Example]:
    """Read a question set: of `SOURCES`, or of `GENERATED`, which needs neither folder nor hub.

    Args:
        split: "" for the first.
        limit: how many, drawn without replacement in an order fixed by `seed`; 0 for all in file order.
        seed: for `limit`, and for generating "gsm_symbolic".

    Raises:
        StsError: unknown name or split; neither local folder nor hub has it; a row that does not pass `check`.
    """
    if name not in SOURCES and name not in GENERATED:
        raise one_of("Data set", name, [*SOURCES, *GENERATED])
    splits = GENERATED.get(name) or SOURCES[name].splits
    if split and split not in splits:
        raise one_of(f"Split of data set {name!r}", split, splits)
    if name == "gsm_symbolic":
        return gsm_symbolic(limit or 1000, seed=seed + (1_000_000 if split == "test" else 0))
    examples = mmlu_exemplars() if name == "mmlu_exemplars" else _read(name, SOURCES[name], split or splits[0])
    return random.Random(seed).sample(examples, min(limit, len(examples))) if limit else examples


def _read(name: str, source: Source, split: str) -> list[Example]:
    examples: dict[str, Example] = {}
    for index, row in enumerate(_rows(name, source, split)):
        example = source.read(row, f"{name}-{split}-{index}")
        if examples.setdefault(example.example_id, example) is not example:
            raise StsError(f"{row.file}, row {row.number}: a second question with the id {example.example_id!r}. "
                           "Give every question an id of its own.")
    return list(examples.values())


def load_mixture(names: str, count: int, *, seed: int = 0) -> list[Example]:
    """`count` examples of the first split of a question set, or of several ("gsm8k+math") in equal parts, mixed; fewer
    if it has fewer. No question of a released set comes twice. Raises as `load_examples`."""
    parts = names.split("+")
    shares = [count // len(parts) + (place < count % len(parts)) for place in range(len(parts))]
    examples = [example for name, share in zip(parts, shares, strict=True) for example in _drawn(name, share, seed)]
    return examples if len(parts) == 1 else random.Random(seed).sample(examples, len(examples))


def _drawn(name: str, count: int, seed: int) -> list[Example]:
    """`count` examples with different questions: of several answers to one, the first.

    Else a question that is trained on might be held out as well (counsel_chat has several answers to most).
    """
    if name in GENERATED:
        return load_examples(name, limit=count, seed=seed)
    first: dict[str, Example] = {}
    for example in load_examples(name):
        first.setdefault(example.question.strip(), example)
    return random.Random(seed).sample(list(first.values()), min(count, len(first)))


def training_split(names: str, train: int, held_out: int, *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Examples of `load_mixture` to train on, and others held out; where there are too few, both parts are smaller in
    proportion, with a warning; `StsError` where that leaves nothing for one of them."""
    examples = load_mixture(names, train + held_out, seed=seed)
    kept = len(examples) - held_out if len(examples) == train + held_out else \
        round(len(examples) * train / (train + held_out))
    if len(examples) < train + held_out:
        few = f"Data set {names!r} has {len(examples)} examples of {train + held_out} asked for ({train} to train on)"
        if not 0 < kept < len(examples):
            raise StsError(f"{few}: too few to train on some and hold out others. Use more examples, or ask for fewer.")
        logging.getLogger("sts").warning("%s: only %d are trained on and %d held out.", few, kept, len(examples) - kept)
    return examples[:kept], examples[kept:]


def shared_questions(first: Iterable[Example], second: Iterable[Example]) -> int:
    """How many questions of `second` are in `first` too, word for word: trained on and evaluated, say."""
    known = {" ".join(example.question.split()) for example in first}
    return sum(" ".join(example.question.split()) in known for example in second)


@contextmanager
def without_hub() -> Iterator[None]:
    """Inside it, a data set that is in no local folder is missing at once: nothing is downloaded or waited for."""
    before = _HUB.set(False)
    try:
        yield
    finally:
        _HUB.reset(before)


def local_file(folder: str, split: str) -> Path | None:
    """`$STS_DATA_DIR/<folder>/<split>.jsonl` if it exists."""
    root = os.environ.get("STS_DATA_DIR", "")
    path = Path(root).expanduser() / folder / f"{split}.jsonl"
    return path if root and path.is_file() else None


def _rows(name: str, source: Source, split: str) -> Iterator[Row]:
    path = local_file(source.folder, split)
    if path is not None:
        rows = list(json_lines(path))
        if not rows:
            raise StsError(f"{path} holds no rows; write one JSON object a line, or remove the file.")
        yield from rows
        return
    root = os.environ.get("STS_DATA_DIR", "")
    # What it names at present: most often it is not set, or misspelled.
    now = ("not set now" if not root else f"now {root}, "
           + ("without that file" if Path(root).expanduser().is_dir() else "which is no folder"))
    hint = f"put {source.folder}/{split}.jsonl in a folder and name that folder in STS_DATA_DIR ({now})"
    if not source.hub:
        raise MissingData(f"Data set {name!r} is read from a local folder only: {hint}.")
    if not _HUB.get():
        raise MissingData(f"Data set {name!r} is in no local folder: {hint}.")
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        for config in source.hub_configs:
            rows: Any = datasets.load_dataset(source.hub, config, split=split, revision=source.revision or None)
            yield from (Row(row, f"{source.hub} ({config}, {split})", number) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, DatasetNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingData(
            f"Data set {name!r} was asked from the hub ({source.hub}), which could not be reached or does not have "
            f"it ({reason}). What works without a network: {hint}, or the data sets {', '.join(GENERATED)}.") from error


# --- from installed packages --------------------------------------------------------------------------------------

def gsm_symbolic(count: int, *, seed: int) -> list[Example]:
    """Grade-school arithmetic problems with worked solutions from reasoning-gym's templates of GSM-Symbolic."""
    import reasoning_gym

    return [
        Example(f"gsm_symbolic-{seed}-{index}", "math",
                row["question"].removesuffix(" Give the result as your final answer. Do not include units."),
                (), -1, str(row["answer"]), row["metadata"]["answer_cot"])
        for index, row in enumerate(reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed))
    ]


def mmlu_exemplars() -> list[Example]:
    """The 282 worked MMLU examples (4 or 5 for each of 57 subjects) of lm-evaluation-harness' `flan_cot_fewshot` tasks,
    without the boilerplate that opens each solution."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    examples = []
    for subject in sorted(MMLU_PRO_CATEGORY):
        document = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text(encoding="utf-8"))
        for index, sample in enumerate(document["fewshot_config"]["samples"]):
            question, options = split_options(sample["question"])
            letter = re.search(r"answer is \(?([A-J])\)?", sample["target"])
            if letter is None:
                raise StsError(f"lm-eval's worked example {index} for {subject} names no answer.")
            answer_index = LETTERS.index(letter.group(1))
            examples.append(Example(
                f"mmlu_exemplars-{subject}-{index}", MMLU_PRO_CATEGORY[subject], question, options, answer_index,
                options[answer_index], without_preamble(sample["target"])))
    return examples


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Split "question\\n\\n(A) one (B) two ..." into the question and its options; `StsError` where there are none."""
    start = text.rfind("(A)")
    if start < 0:
        raise StsError(f"No options (A), (B), ... in: {text[:80]!r}")
    options, rest = [], text[start:]
    for letter, following in zip(LETTERS, LETTERS[1:], strict=False):
        rest = rest.removeprefix(f"({letter})")
        end = rest.find(f"({following})")
        options.append(" ".join((rest if end < 0 else rest[:end]).split()))
        if end < 0:
            break
        rest = rest[end:]
    return text[:start].strip(), tuple(options)


def by_domain(examples: list[Example], domains: tuple[str, ...] = ()) -> dict[str, list[Example]]:
    """Group examples by domain, in alphabetical order; `StsError` where a domain asked for has none."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.domain, []).append(example)
    for domain in domains:
        if domain not in groups:
            raise one_of("Domain", domain, groups)
    return {domain: groups[domain] for domain in sorted(domains or groups)}


# --- plain text ---------------------------------------------------------------------------------------------------

def load_texts(name: str) -> list[str]:
    """Documents of plain text: one of `CORPORA` from STS_DATA_DIR, or a .txt (one document) or .jsonl ("text") file."""
    if name in CORPORA:
        path = local_file("corpus", name)
        if path is None:
            raise StsError(f"Corpus {name!r} is read from a local folder only: put corpus/{name}.jsonl, one JSON "
                           'object with "text" a line, in a folder and name that folder in STS_DATA_DIR.')
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise StsError(f"Text {name!r} is not known. Valid: {', '.join(CORPORA)}, a question set "
                           f"({', '.join([*SOURCES, *GENERATED])}), or the path of a .txt or .jsonl file.")
    if path.suffix == ".jsonl":
        return [row.text("text") for row in json_lines(path)]
    return [read_text(path)]


def digest(examples: list[Example] | list[str]) -> str:
    """Hex digest of the content, for provenance and cache keys."""
    rows = [asdict(item) if isinstance(item, Example) else item for item in examples]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
