"""Evaluation by log-likelihoods through lm-evaluation-harness, and what a domain's shift is measured in.

Prompts and targets are ours; tokenisation, requests and scores are the harness's (see `harness`). The kinds of target:

- `letter`: each option's letter after "The answer is (", one forward pass a question.
- `option`: each option's text after "The answer is"; divided by its characters it gives normalised accuracy.
- `solution`: the right answer with its worked solution; divided by its characters it gives bits per character, which a
  small model can resolve where its accuracy is near chance.

Every target's log-likelihood is kept, so that any measure can be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy
import pandas

from sts.data.prompts import OPENING, question_text, render, solution_text
from sts.data.sources import LETTERS, Example
from sts.engine.models import LanguageModel
from sts.engine.work import Work
from sts.errors import StsError, one_of
from sts.measure.items import mcnemar_p, paired_mean_interval

#: What the domain shift is measured in: column -> label with units.
MEASURES = {
    "accuracy": "accuracy (percentage points)",
    "accuracy_norm": "normalised accuracy (percentage points)",
    "p_right": "probability of the right option (percentage points)",
    "bits": "bits per character of the right answer",
    "accuracy_generated": "accuracy of generated answers (percentage points)",
    "bits_answer": "bits of the whole right answer",
}
#: The measures that say of an item only whether it is right.
BINARY = ("accuracy", "accuracy_norm", "accuracy_generated")
KINDS = ("letter", "option", "solution")


def evaluate(lm: LanguageModel, examples: list[Example], *, kinds: Sequence[str] = ("letter", "solution"),
             batch: int = 8, report: Callable[[float], None] = lambda fraction: None,
             work: Work | None = None) -> pandas.DataFrame:
    """Score every example's targets of the given kinds: options where it has some, its solution where it has one.

    Args:
        kinds: of `KINDS`.
        batch: questions in one batch.
        report: called with the fraction done.
        work: counts what is run.

    Returns:
        One row per item and option and kind, and one per item's solution: example_id, domain, kind, option (index; -1
        for a solution), is_right, loglikelihood (nats), characters (of the target; of an option its text alone).

    Raises:
        StsError: an unknown kind, nothing to score, or a prompt longer than the model's context.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise one_of("Kind of evaluation", kind, KINDS)
    by_id = {example.example_id: example for example in examples}
    requests = [row for example in examples for row in _requests(lm, example) if row["kind"] in kinds]
    if not requests:
        raise StsError(f"None of the {len(examples)} examples has anything to score by {', '.join(kinds)}; letter and "
                       "option need questions with options, solution a worked solution or an answer.")
    limit = lm.context_length
    for request in requests:
        length = len(lm.tokenizer(request["context"] + request["target"], add_special_tokens=False)["input_ids"])
        if length > limit:
            raise StsError(f"Item {request['example_id']} needs {length} tokens; the model's context is {limit}.")
    loglikelihoods = harness_loglikelihoods(lm, requests, batch=batch, report=report, work=work)
    rows = []
    for request, value in zip(requests, loglikelihoods, strict=True):
        example = by_id[request["example_id"]]
        rows.append({"example_id": example.example_id, "domain": example.domain, "kind": request["kind"],
                     "option": request["option"], "loglikelihood": value, "characters": request["characters"],
                     "is_right": request["kind"] == "solution" or request["option"] == example.answer_index})
    return pandas.DataFrame(rows)


def _requests(lm: LanguageModel, example: Example) -> list[dict]:
    context = render(lm.tokenizer, question_text(example))
    # Without a template the prompt ends with "Answer:", and a blank comes next.
    blank = "" if lm.tokenizer.chat_template else " "

    def row(kind: str, option: int, cue: str, target: str, characters: int) -> dict:
        return {"example_id": example.example_id, "kind": kind, "option": option, "context": context + cue,
                "target": target, "characters": characters}

    # As the options are written in the question and the solutions: "(A)".
    rows = [row("letter", index, blank + OPENING, letter, len(letter))
            for index, letter in enumerate(LETTERS[:len(example.options)])]
    rows += [row("option", index, blank + "The answer is", f" {option.strip()}", max(1, len(option.strip())))
             for index, option in enumerate(example.options)]
    if solution := solution_text(example):
        rows.append(row("solution", -1, "", blank + solution, len(blank + solution)))
    return rows


def openings(lm: LanguageModel, examples: list[Example], *, batch: int = 8,
             report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> pandas.DataFrame:
    """Score the words that an answer opens with (`prompts.OPENING`), of the examples whose solution opens with them.

    Args:
        batch, report, work: as in `evaluate`.

    Returns:
        One row an item: example_id, domain, loglikelihood (nats). Items with a worked solution have none.
    """
    chosen = [example for example in examples if solution_text(example).startswith(OPENING)]
    blank = "" if lm.tokenizer.chat_template else " "
    requests = [{"example_id": example.example_id, "context": render(lm.tokenizer, question_text(example)),
                 "target": blank + OPENING} for example in chosen]
    values = harness_loglikelihoods(lm, requests, batch=batch, report=report, work=work) if requests else []
    return pandas.DataFrame([(example.example_id, example.domain, value)
                             for example, value in zip(chosen, values, strict=True)],
                            columns=["example_id", "domain", "loglikelihood"])


def harness_loglikelihoods(lm: LanguageModel, requests: list[dict], *, batch: int,
                           report: Callable[[float], None] = lambda fraction: None,
                           work: Work | None = None) -> list[float]:
    """Log-likelihoods (nats) of `target` after `context`, a text made by `prompts.render`, by lm-evaluation-harness.

    Raises:
        StsError: a log-likelihood is not a finite number.
    """
    from lm_eval.api.instance import Instance

    from sts.engine.harness import open_harness

    harness = open_harness(lm, batch=batch, chat=bool(lm.tokenizer.chat_template), report=report, work=work)
    instances = [Instance(request_type="loglikelihood", doc={}, arguments=(row["context"], row["target"]), idx=index)
                 for index, row in enumerate(requests)]
    values = [value for value, _ in harness.loglikelihood(instances, disable_tqdm=True)]
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise StsError(f"Item {request['example_id']}: its log-likelihood is {value}. The model's output is not "
                           "finite; if it was fine-tuned, try a lower sft_lr, else dtype float32.")
    return values


# --- from log-likelihoods to measures -----------------------------------------------------------------------------

def item_measures(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Every measure of every item.

    accuracy: the right option's letter is the likeliest; accuracy_norm: its text is, per character (the harness's
    `acc_norm`); p_right: the right letter's share of the letters' probability. All three are 0 to 100. bits and
    bits_answer: of the solution, per character and in all.

    Letters that tie for the likeliest count as the harness counts them: the first is taken.

    Returns:
        index example_id; columns domain and the keys of `MEASURES`; NaN where an item was not evaluated that way.
    """
    items = rows.groupby("example_id", sort=False)["domain"].first().to_frame()
    items[list(MEASURES)] = numpy.nan
    letters = rows[rows["kind"] == "letter"]
    if len(letters):
        relative = letters["loglikelihood"] - letters.groupby("example_id")["loglikelihood"].transform("max")
        weight = numpy.exp(relative)
        p = weight / weight.groupby(letters["example_id"]).transform("sum")
        items["p_right"] = 100 * p[letters["is_right"]].set_axis(letters.loc[letters["is_right"], "example_id"])
        items["accuracy"] = _best_is_right(letters, letters["loglikelihood"])
    options = rows[rows["kind"] == "option"]
    if len(options):
        items["accuracy_norm"] = _best_is_right(options, options["loglikelihood"] / options["characters"])
    solutions = rows[rows["kind"] == "solution"].set_index("example_id")
    items["bits_answer"] = -solutions["loglikelihood"] / math.log(2)
    items["bits"] = items["bits_answer"] / solutions["characters"]
    return items


def _best_is_right(rows: pandas.DataFrame, score: pandas.Series) -> pandas.Series:
    """100 where an item's highest score is its right option's, else 0; by example_id."""
    best = rows.loc[score.groupby(rows["example_id"]).idxmax()]
    return 100.0 * best.set_index("example_id")["is_right"].astype(float)


def tied_share(rows: pandas.DataFrame) -> float:
    """Share of the items with letters, 0 to 1, in which two or more letters tie for the likeliest; NaN without any.

    In bfloat16 that is common: its 8 bits of precision give many letters the same logit.
    """
    letters = rows[rows["kind"] == "letter"]
    best = letters["loglikelihood"] == letters.groupby("example_id")["loglikelihood"].transform("max")
    return float((best.groupby(letters["example_id"]).sum() > 1).mean()) if len(letters) else math.nan


def domain_shifts(before: pandas.DataFrame, after: pandas.DataFrame, *, resamples: int = 5000,
                  seed: int = 0) -> pandas.DataFrame:
    """Change of every measure in every domain, paired by item, with an interval over items.

    Args:
        before, after: what `evaluate` returned for the same examples.

    Returns:
        One row per domain and measure that was evaluated: domain, measure, n, before, after, shift, low, high (NaN for
        one item), interval (its kind, see `stats_items.MeanInterval`), standard_error, mcnemar_p (McNemar's exact test
        that items turn right as often as wrong; NaN unless the measure is one of `BINARY`).
    """
    return item_shifts(item_measures(before), item_measures(after), resamples=resamples, seed=seed)


def item_shifts(first: pandas.DataFrame, second: pandas.DataFrame, *, resamples: int = 5000,
                seed: int = 0) -> pandas.DataFrame:
    """`domain_shifts` from measures of items: index example_id, columns domain and any of `MEASURES`."""
    if set(first.index) != set(second.index):
        raise StsError("Before and after hold different items; evaluate the same examples with both models.")
    second = second.loc[first.index]
    rows = []
    for domain, items in first.groupby("domain"):
        for measure in (measure for measure in MEASURES if measure in items):
            old = items[measure].dropna()
            new = second.loc[old.index, measure]
            if old.empty:
                continue
            change = paired_mean_interval((new - old).to_numpy(), resamples=resamples, seed=seed)
            rows.append({"domain": domain, "measure": measure, "n": len(old), "before": old.mean(),
                         "after": new.mean(), "shift": change.mean, "low": change.low, "high": change.high,
                         "interval": change.kind, "standard_error": change.standard_error,
                         "mcnemar_p": mcnemar_p(old > 0, new > 0) if measure in BINARY else math.nan})
    return pandas.DataFrame(rows)
