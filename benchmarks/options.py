"""Log-likelihoods of ten options a question: the book's packed rows against lm-evaluation-harness's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from benchmarks.measure import Ratio, Row
from benchmarks.routes import Setup
from benchmarks.workloads import _ratio, _repeat
from sts.data.check import LETTERS
from sts.data.load import load_examples
from sts.data.prompts import render
from sts.engine.evaluate import loglikelihoods

OPTIONS = 10

Request = tuple[None, list[int], list[int]]


def ten_option_requests(setup: Setup, questions: int, seed: int = 0) -> list[Request]:
    """Token ids (context, option) of MMLU's worked questions, their options filled up to ten.

    MMLU-Pro has ten options a question, but is not on every machine; the options added are those of other questions
    of the same domain, so their lengths are real.
    """
    generator = random.Random(seed)
    examples = load_examples("mmlu_exemplars")
    encode = partial(setup.lm.tokenizer.encode, add_special_tokens=False)
    requests: list[Request] = []
    for example in generator.sample(examples, min(questions, len(examples))):
        others = sorted({option for other in examples if other.domain == example.domain
                         for option in other.options} - set(example.options))
        options = [*example.options, *generator.sample(others, OPTIONS - len(example.options))]
        text = "\n".join([example.question, *(f"({LETTERS[index]}) {option}" for index, option in enumerate(options))])
        context = encode(render(setup.lm.tokenizer, text) + "The answer is")
        requests += [(None, context, encode(f" {option}")) for option in options]
    return requests


def ours(setup: Setup, requests: list[Request], batch: int) -> list[float]:
    """Contexts once, their options packed behind them."""
    return loglikelihoods(setup.lm, [(context, option) for _, context, option in requests], batch=batch)


def harness_own(setup: Setup, requests: list[Request], batch: int) -> list[float]:
    """`HFLM`: the context again for every option."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(setup.lm.model, tokenizer=setup.lm.tokenizer, batch_size=batch, max_length=setup.lm.context_length,
                 softmax_dtype="float32")
    return [value for value, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]


def options_workload(setup: Setup, questions: int, repetitions: int,
                     report: Callable[[Row], None]) -> tuple[list[Row], list[Ratio]]:
    """The same requests through both model classes; `tokens` counts the context for each option."""
    requests = ten_option_requests(setup, questions)
    tokens = sum(len(context) + len(option) for _, context, option in requests)
    note = f"{len(requests) // OPTIONS} questions of MMLU, options filled up to ten from other questions"
    mine = Row("options", "ours", "this book: contexts run once", tokens, 0, note=note)
    own = Row("options", "harness", "lm-evaluation-harness's own class", tokens, 0, note=note)
    rows = _repeat([(mine, partial(ours, setup, requests, 8)), (own, partial(harness_own, setup, requests, OPTIONS))],
                   repetitions, str(setup.lm.device), report)
    return rows, [_ratio("lm-evaluation-harness's own class / contexts run once, ten options a question, time", own,
                         mine, "at least", 4.0)]
