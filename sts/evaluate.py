"""Evaluation through lm-evaluation-harness: log-likelihoods of option letters and of worked solutions.

Two measurements, from prompts we render and tasks we describe; batching and scoring are the harness's.

- `letter`: the log-probability of each option's letter after "The answer is (", one forward pass a question.
- `solution`: the log-probability of the right answer with its worked solution; divided by its characters it gives
  bits per character, which a small model can resolve where its accuracy is near chance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy
import pandas

from sts.data import LETTERS, Example
from sts.errors import StsError
from sts.models import LanguageModel, decoder_layers
from sts.prompts import question_text, render, solution_text
from sts.stats import paired_mean_interval
from sts.work import Work

#: What the domain shift is measured in: column -> label with units.
MEASURES = {
    "accuracy": "accuracy (percentage points)",
    "p_right": "probability of the right option (percentage points)",
    "bits": "bits per character of the worked solution",
}


def evaluate(lm: LanguageModel, examples: list[Example], *, batch: int = 8,
             report: Callable[[float], None] = lambda fraction: None, work: Work | None = None) -> pandas.DataFrame:
    """Score every example's option letters (where it has options) and its worked solution.

    Returns:
        One row per item and option, and one per item's solution: example_id, domain, kind ("letter" or "solution"),
        option (index; -1 for a solution), is_right, loglikelihood (nats), characters.

    Raises:
        StsError: a prompt longer than the model's context.
    """
    examples = [example for example in examples if example.options or solution_text(example)]
    by_id = {example.example_id: example for example in examples}
    requests = [row for example in examples for row in _requests(lm, example)]
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
                     "option": request["option"], "loglikelihood": value, "characters": len(request["target"]),
                     "is_right": request["kind"] == "solution" or request["option"] == example.answer_index})
    return pandas.DataFrame(rows)


def _requests(lm: LanguageModel, example: Example) -> list[dict]:
    context = render(lm.tokenizer, question_text(example))
    base = {"example_id": example.example_id}
    # As the options are written in the question and the solutions: "(A)".
    rows = [{**base, "kind": "letter", "option": index, "context": context + "The answer is (", "target": letter}
            for index, letter in enumerate(LETTERS[:len(example.options)])]
    target = solution_text(example)
    if not lm.tokenizer.chat_template:
        target = " " + target
    return [*rows, {**base, "kind": "solution", "option": -1, "context": context, "target": target}]


def harness_loglikelihoods(lm: LanguageModel, requests: list[dict], *, batch: int,
                           report: Callable[[float], None] = lambda fraction: None,
                           work: Work | None = None) -> list[float]:
    """Log-likelihoods (nats) of `target` after `context`, by lm-evaluation-harness.

    Letters of one question share a context and differ in a single token, which the harness scores in one pass.

    Raises:
        StsError: a log-likelihood is not a finite number.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class Reporting(HFLM):
        """The harness' own Hugging Face class, reporting how many passes it has made."""

        passes, expected = 0, 1

        def _model_call(self, *args, **kwargs):
            self.passes += 1
            report(min(1.0, self.passes / self.expected))
            if work is not None:
                work.of_layers = len(decoder_layers(lm.model))
                work.add(args[0].numel(), args[0].numel(), work.of_layers)  # the harness does not say what is padding
            return super()._model_call(*args, **kwargs)

        def _encode_pair(self, context, continuation):
            # The harness' own moves blanks from the end of the context to the target, and would score the line
            # break that closes a chat template's header as part of every answer.
            whole, start = self.tok_encode(context + continuation), self.tok_encode(context)
            if whole[:len(start)] == start and len(whole) > len(start):
                return start, whole[len(start):]
            # The last token of the context would merge with the target: keep them apart.
            return start, self.tok_encode(continuation, add_special_tokens=False)

    # softmax in float32: in bf16 a solution's sum would be rounded to one or two nats.
    harness = Reporting(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch, max_length=lm.context_length,
                        softmax_dtype="float32", add_bos_token=False if lm.tokenizer.chat_template else None)
    contexts = {(row["context"], row["target"] if row["kind"] == "solution" else "") for row in requests}
    harness.expected = max(1, math.ceil(len(contexts) / batch))
    instances = [Instance(request_type="loglikelihood", doc={}, arguments=(row["context"], row["target"]), idx=index)
                 for index, row in enumerate(requests)]
    values = [float(value) for value, _ in harness.loglikelihood(instances, disable_tqdm=True)]
    for request, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise StsError(f"Item {request['example_id']}: its log-likelihood is {value}. The model's output is not "
                           "finite; if it was fine-tuned, try a lower sft_lr, else dtype float32.")
    return values


# --- from log-likelihoods to measures -----------------------------------------------------------------------------

def item_measures(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Per item: accuracy (0 or 1), p_right (softmax over the options' letters) and bits per character.

    Returns:
        index example_id; columns domain and the keys of `MEASURES`; NaN where an item has no options.
    """
    items = rows.groupby("example_id", sort=False)["domain"].first().to_frame()
    letters = rows[rows["kind"] == "letter"]
    if len(letters):
        relative = letters["loglikelihood"] - letters.groupby("example_id")["loglikelihood"].transform("max")
        weight = numpy.exp(relative)
        p = weight / weight.groupby(letters["example_id"]).transform("sum")
        items["p_right"] = 100 * p[letters["is_right"]].set_axis(letters.loc[letters["is_right"], "example_id"])
        best = letters.loc[letters.groupby("example_id")["loglikelihood"].idxmax()]
        items["accuracy"] = 100.0 * best.set_index("example_id")["is_right"].astype(float)
    else:
        items["p_right"] = items["accuracy"] = numpy.nan
    solutions = rows[rows["kind"] == "solution"].set_index("example_id")
    items["bits"] = -solutions["loglikelihood"] / math.log(2) / solutions["characters"]
    return items


def domain_shifts(before: pandas.DataFrame, after: pandas.DataFrame, *, resamples: int = 5000,
                  seed: int = 0) -> pandas.DataFrame:
    """Change of every measure in every domain, paired by item, with a bootstrap interval over items.

    Args:
        before, after: what `evaluate` returned for the same examples.

    Returns:
        One row per domain and measure: domain, measure, n, before, after, shift, low, high, standard_error.
    """
    first, second = item_measures(before), item_measures(after)
    if set(first.index) != set(second.index):
        raise StsError("Before and after hold different items; evaluate the same examples with both models.")
    second = second.loc[first.index]
    rows = []
    for domain, items in first.groupby("domain"):
        for measure in MEASURES:
            old = items[measure].dropna()
            new = second.loc[old.index, measure]
            if old.empty:
                continue
            change = paired_mean_interval((new - old).to_numpy(), resamples=resamples, seed=seed)
            rows.append({"domain": domain, "measure": measure, "n": len(old), "before": old.mean(),
                         "after": new.mean(), "shift": change.mean, "low": change.low, "high": change.high,
                         "standard_error": change.standard_error})
    return pandas.DataFrame(rows)
