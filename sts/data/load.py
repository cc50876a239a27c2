"""Question sets from a local folder (`STS_DATA_DIR`), the hub or an installed package, every row checked; and text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sts.data.check import LETTERS, Row, json_lines, read_text
from sts.data.sources import CORPORA, GENERATED, MMLU_PRO_CATEGORY, PUZZLES, SOURCES, Example, own_row, without_preamble
from sts.errors import MissingData, StsError, one_of

#: Plain texts from installed packages.
PACKAGED_TEXTS = ("python_library", "story", "story_speech")
#: Whether data sets and models that are not here may be asked from the hub.
_HUB: ContextVar[bool] = ContextVar("hub", default=True)


def load_examples(name: str, *, split: str = "", limit: int = 0, seed: int = 0) -> list[Example]:
    """A question set of `SOURCES` or `GENERATED`, of its first split unless one is named: `limit` of them, drawn in an
    order fixed by `seed`, or all (0). `StsError` for an unknown name or split, a set that is not here, a wrong row."""
    known = {**{one: source.splits for one, source in SOURCES.items()}, **GENERATED}
    if is_own(name):
        known[name], split = ("",), ""
    if name not in known:
        raise one_of("Data set", name, known)
    if split and split not in known[name]:
        raise one_of(f"Split of data set {name!r}", split, known[name])
    made, own = limit or 1000, seed + 1_000_000 * (split == "test")
    if name == "gsm_symbolic":
        return gsm_symbolic(made, seed=own)
    if name in PUZZLES:
        return puzzles(name, made, seed=own)
    worked = (name, split) in (("mmlu_exemplars", split), ("mmlu", "worked"))
    examples = own_examples(Path(name)) if is_own(name) else mmlu_exemplars(by_subject=name == "mmlu") if worked else (
        _read(name, split or known[name][0]))
    return random.Random(seed).sample(examples, min(limit, len(examples))) if limit else examples


def is_own(name: str) -> bool:
    """Whether a question set is one's own, named by a path."""
    return name.endswith(".jsonl") or os.sep in name


def own_examples(path: Path) -> list[Example]:
    """A .jsonl file of `own_row`, or a folder of them, each called as its domain is; of rows that ask the same the
    first. `StsError` for a wrong row, an empty file, or none."""
    examples: dict[tuple, Example] = {}
    files = [path] if os.path.isfile(path) else sorted(path.glob("[!.]*.jsonl"))
    if odd := [one for one in (path, *files) if not str(one).isprintable()]:
        raise StsError(f"File name {ascii(str(odd[0]))} is no text in UTF-8. Rename it.")
    for file, example in ((one, own_row(row, one.stem)) for one in files for row in json_lines(one)):
        examples.setdefault((file, " ".join(example.question.split()), example.options), example)
    if empty := {*(files or [path])} - {file for file, *_ in examples}:
        raise StsError(f"{min(empty)} {'holds no problems' if os.path.exists(min(empty)) else 'is not there'}. Name a "
                       ".jsonl file with one JSON object a line, or a folder of them.")
    return [*examples.values()]


def _read(name: str, split: str) -> list[Example]:
    examples: dict[str, Example] = {}
    for index, row in enumerate(_rows(name, split)):
        example = SOURCES[name].read(row, f"{name}-{split}-{index}")
        if examples.setdefault(example.example_id, example) is not example:
            raise StsError(f"{row.file}, row {row.number}: a second question with the id {example.example_id!r}. "
                           "Give every question an id of its own.")
    if not examples:
        raise StsError(f"{local_file(name, split)} holds no rows; write one JSON object a line, or remove the file.")
    return list(examples.values())


def _rows(name: str, split: str) -> Iterator[Row]:
    path, source = local_file(name, split), SOURCES[name]
    if path is not None:
        yield from json_lines(path)
        return
    root = os.environ.get("STS_DATA_DIR", "")
    mistyped = bool(root) and not Path(root).expanduser().is_dir()
    there = f"now {root}, {'which is no folder' if mistyped else 'without that file'}" if root else "not set now"
    hint = f"put {name}/{split}.jsonl in a folder and name that folder in STS_DATA_DIR ({there})"
    if mistyped or not (source.hub and hub_allowed()):
        raise MissingData(f"Data set {name!r} is in no local folder: {hint}.")
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        for config in source.hub_configs:
            table: Any = datasets.load_dataset(source.hub, config, split=dict(source.hub_splits).get(split, split),
                                               revision=source.revision)
            yield from (Row(row, f"{source.hub} ({config}, {split})", number) for number, row in enumerate(table, 1))
    except (OSError, ValueError, DatasetNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingData(
            f"Data set {name!r} was asked from the hub ({source.hub}), which could not be reached or does not have "
            f"it ({reason}). What works without a network: {hint}, or the data sets {', '.join(GENERATED)}.") from error


def local_file(folder: str, name: str) -> Path | None:
    """`$STS_DATA_DIR/<folder>/<name>.jsonl` if it exists."""
    root = os.environ.get("STS_DATA_DIR", "")
    path = Path(root).expanduser() / folder / f"{name}.jsonl"
    return path if root and path.is_file() else None


def hub_allowed() -> bool:
    """Whether what is not here may be asked from the hub."""
    return _HUB.get()


@contextmanager
def without_hub() -> Iterator[None]:
    """Inside it, a data set in no local folder, or a model not in the cache, is missing at once: nothing is downloaded
    or waited for."""
    before = _HUB.set(False)
    try:
        yield
    finally:
        _HUB.reset(before)


def load_mixture(names: str, count: int, *, seed: int = 0) -> list[Example]:
    """At most `count` examples of a question set's first split, or of several ("gsm8k+math") in equal parts, mixed. Of
    several answers to a question (counsel_chat) the first alone, so that none is both trained on and held out."""
    parts, examples = [names] if is_own(names) else names.split("+"), []
    for place, name in enumerate(parts[:count]):
        share = count // len(parts) + (place < count % len(parts))
        if name in GENERATED:
            examples += load_examples(name, limit=share, seed=seed)
        else:
            first: dict[str, Example] = {}
            for example in load_examples(name):
                first.setdefault(example.question.strip(), example)
            examples += random.Random(seed).sample(list(first.values()), min(share, len(first)))
    return examples if len(parts) == 1 else random.Random(seed).sample(examples, len(examples))


def training_split(names: str, train: int, held_out: int, *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Examples of `load_mixture` to train on, and others held out; of too few, smaller parts in proportion, with a
    warning; `StsError` where that leaves nothing for one of them."""
    examples = load_mixture(names, train + held_out, seed=seed)
    few = (f"Data set {names!r} has {len(examples)} different questions of {train + held_out} asked for "
           f"({train} to train on)")
    kept = train
    if len(examples) < train + held_out:
        kept = round(len(examples) * train / (train + held_out))
        if not 0 < kept < len(examples) + (not held_out):
            raise StsError(f"{few}: too few to train on some and hold out others. Use more examples, or ask for fewer.")
        logging.getLogger("sts").warning("%s: only %d are trained on and %d held out.", few, kept, len(examples) - kept)
    return examples[:kept], examples[kept:]


def shared_questions(first: Iterable[Example], second: Iterable[Example]) -> int:
    """How many questions of `second` are in `first` too, word for word: trained on and evaluated, say."""
    known = {" ".join(example.question.split()) for example in first}
    return sum(" ".join(example.question.split()) in known for example in second)


def by_domain(examples: list[Example], domains: Iterable[str] = ()) -> dict[str, list[Example]]:
    """Group examples by domain, in alphabetical order; `StsError` where a domain asked for has none."""
    known = {example.domain for example in examples}
    if unknown := [domain for domain in domains if domain not in known]:
        raise one_of("Domain", unknown[0], known)
    return {domain: [one for one in examples if one.domain == domain] for domain in sorted(domains or known)}


def gsm_symbolic(count: int, *, seed: int) -> list[Example]:
    """Grade-school arithmetic problems with worked solutions from reasoning-gym's templates of GSM-Symbolic."""
    import reasoning_gym

    boilerplate = " Give the result as your final answer. Do not include units."
    return [Example(f"gsm_symbolic-{seed}-{index}", "math", row["question"].removesuffix(boilerplate), (), -1,
                    str(row["answer"]), row["metadata"]["answer_cot"])
            for index, row in enumerate(reasoning_gym.create_dataset("gsm_symbolic", size=count, seed=seed))]


def puzzles(name: str, count: int, *, seed: int) -> list[Example]:
    """Different puzzles of one kind in `PUZZLES`, with the answer for a solution; fewer where there are not so many."""
    import reasoning_gym

    # Item i of reasoning-gym's seed s is item i + 1 of its seed s - 1.
    rows, found = reasoning_gym.create_dataset(name, size=20 * count, seed=100_000 * seed, **PUZZLES[name]), {}
    for row in rows:
        found[row["question"]] = str(row["answer"])
        if len(found) == count:
            break
    return [Example(f"{name}-{seed}-{index}", "math", question, (), -1, answer, "")
            for index, (question, answer) in enumerate(found.items())]


def mmlu_exemplars(*, by_subject: bool = False) -> list[Example]:
    """The 282 worked MMLU examples (4 or 5 for each of 57 subjects) of lm-evaluation-harness' `flan_cot_fewshot` tasks,
    without the boilerplate that opens each solution; their domain is MMLU-Pro's category, or the subject."""
    import lm_eval
    import yaml

    folder, examples = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot", []
    for subject, domain in sorted(MMLU_PRO_CATEGORY.items()):
        document = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text(encoding="utf-8"))
        for index, sample in enumerate(document["fewshot_config"]["samples"]):
            question, options = split_options(sample["question"])
            right = LETTERS.index(re.findall(r"answer is \(?([A-J])\)?", sample["target"])[0])
            examples.append(Example(f"mmlu_exemplars-{subject}-{index}", subject if by_subject else domain, question,
                                    options, right, options[right], without_preamble(sample["target"])))
    return examples


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Split "question\\n\\n(A) one (B) two ..." into the question and its options; `StsError` where there are none."""
    question, found, options = text.rpartition("(A)")
    if not found:
        raise StsError(f"No options (A), (B), ... in: {text[:80]!r}")
    return question.strip(), tuple(" ".join(option.split()) for option in re.split(r"\([B-J]\)", options))


def load_texts(name: str) -> list[str]:
    """Documents of plain text: one of `CORPORA` from STS_DATA_DIR; a .txt (one document) or .jsonl ("text") file; forty
    lines from the middle of each module of Python's library; paragraphs of a story by M. and J. Verne (1889, carried by
    reasoning-gym), those in direct speech or the others, 400 characters together."""
    if name == "python_library":
        files = [read_text(path).split("\n") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
        return ["\n".join(lines[len(lines) // 2 - 20:][:40]) for lines in files if len(lines) > 80]
    if name in PACKAGED_TEXTS:
        from reasoning_gym.data import read_data_file

        story, documents = read_data_file("in_the_year_2889.txt").partition("*** START")[2].partition("*** END"), [""]
        for paragraph in (" ".join(own.split()) for own in story[0].split("\n\n")):
            if paragraph.startswith('"') if name == "story_speech" else re.match('[^"[].{99}', paragraph):
                documents[-1:] = [documents[-1] + paragraph + "\n", *[""] * (len(documents[-1] + paragraph) > 400)]
        return documents[:-1]
    path = local_file("corpus", name) if name in CORPORA else Path(name).expanduser()
    if path is None:
        raise MissingData(f"Corpus {name!r} is read from a local folder only: put corpus/{name}.jsonl, one JSON object "
                          'with "text" a line, in a folder and name that folder in STS_DATA_DIR.')
    if not path.is_file():
        raise StsError(f"Text {name!r} is not known. Valid: {', '.join(CORPORA + PACKAGED_TEXTS)}, a question set "
                       f"({', '.join([*SOURCES, *GENERATED])}), or the path of a .txt or .jsonl file.")
    return [row.text("text") for row in json_lines(path)] if path.suffix == ".jsonl" else [read_text(path)]


def digest(examples: list[Example] | list[str]) -> str:
    """Hex digest of the content, for provenance and cache keys."""
    text = json.dumps(examples, sort_keys=True, ensure_ascii=False, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
