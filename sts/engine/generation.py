"""Evaluation by generation: models answer through lm-evaluation-harness, and each benchmark scores in its own way; and
another language model is asked what a latent is about."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import pandas
import torch

from sts.data.check import LETTERS
from sts.data.prompts import chat_text, question_text
from sts.data.sources import Example
from sts.engine.models import LanguageModel
from sts.errors import StsError


def prompt_text(tokenizer, benchmark: str, example: Example, worked: Sequence[Example]) -> str:
    """The plain text of MMLU-Pro's official script, with worked examples, or a mathematics problem in a chat."""
    if benchmark != "mmlu_pro":
        text = f"{question_text(example)}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        message = {"role": "user", "content": text}
        return chat_text(tokenizer, [message], awaiting=True) if tokenizer.chat_template else text
    blocks = [f"The following are multiple choice questions (with answers) about {example.domain}. Think step by step "
              'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n']
    for one in (*worked, example):
        options = "".join(f"{letter}. {option.strip()}\n" for letter, option in zip(LETTERS, one.options, strict=False))
        blocks.append(f"Question:\n{one.question.strip()}\nOptions:\n{options}Answer: Let's think step by step."
                      + (f" {one.solution}\n\n" if one is not example else ""))
    return "".join(blocks)


def extract_letter(text: str) -> str:
    """The letter that MMLU-Pro's official script reads from an answer; "" where it would guess at random."""
    for pattern, flags in ((r"answer is \(?([A-J])\)?", 0), (r".*[aA]nswer:\s*([A-J])", 0),
                           (r"\b([A-J])\b(?!.*\b[A-J]\b)", re.DOTALL)):
        if match := re.search(pattern, text, flags):
            return match.group(1)
    return ""


def is_same_answer(right: str, text: str) -> bool:
    """Whether a worked solution ends with an answer equal to `right`, by math-verify (1/2 is 0.5 is \\frac12)."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{right}}}"), parse(text)))


def _written(engine: Any, names: Sequence[str], prompts: Sequence[str], max_tokens: int, *, plain: bool) -> list[str]:
    """What a model writes behind each prompt, greedily; `plain`: whether prompts are plain text in any case."""
    from lm_eval.api.instance import Instance

    requests, room = [], engine.max_length - max_tokens
    # A chat template writes BOS itself; before plain text belongs what the tokenizer puts there.
    engine.add_bos_token = False if engine.tokenizer.chat_template and not plain else None
    for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        if (length := len(engine.tok_encode(prompt))) > room:
            raise StsError(f"The prompt of item {name} has {length} tokens, and the model's context "
                           f"leaves {room} beside the answer. Lower eval_max_tokens (of a mixture, mixture_tokens) "
                           "or demonstrations.")
        greedy = {"until": ["Question:"], "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0}
        requests.append(Instance("generate_until", {}, (prompt, greedy), place))
    return engine.generate_until(requests, disable_tqdm=True)


def own_answers(engine: Any, examples: Sequence[Example], max_tokens: int) -> list[tuple[str, bool]]:
    """A model's own answer to each question, asked as fine-tuning asks it, and whether it ended within `max_tokens`."""
    prompts = [chat_text(engine.tokenizer, [{"role": "user", "content": question_text(example)}], awaiting=True)
               for example in examples]
    texts = _written(engine, [example.example_id for example in examples], prompts, max_tokens, plain=False)
    return [(text.strip(), len(engine.tok_encode(text)) < max_tokens) for text in texts]


def generate_and_score(engine: Any, benchmark: str, examples: Sequence[Example],
                       demonstrations: Sequence[Example] = (), *, shots: int = 5,
                       max_tokens: int = 1024) -> pandas.DataFrame:
    """Let a model (of `open_engine`) answer in words, greedily, and score its answers.

    Of mmlu_pro a letter is read from the answer, and a question gets the first `shots` demonstrations of its own
    domain; of gsm8k and math a mathematical expression is read. One row a question: example_id, domain, characters (of
    the answer), sha256 (its first 12 hexadecimal digits), answer (the right letter or expression) and correct.
    `StsError` for a question of mmlu_pro without options, or a prompt that leaves no room for `max_tokens`.
    """
    found: list[dict[str, Any]] = []
    prompts, letters = [], benchmark == "mmlu_pro"
    for example in examples:
        if letters and not example.options:
            raise StsError(f"Benchmark {benchmark!r} asks for a letter; {example.example_id} has no options.")
        worked = [one for one in demonstrations if one.domain == example.domain][:shots]
        prompts.append(prompt_text(engine.tokenizer, benchmark, example, worked))
    texts = _written(engine, [example.example_id for example in examples], prompts, max_tokens, plain=letters)
    for example, text in zip(examples, texts, strict=True):
        answer = LETTERS[example.answer_index] if letters else example.answer
        found.append({"example_id": example.example_id, "domain": example.domain, "characters": len(text),
                      "sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "answer": answer,
                      "correct": extract_letter(text) == answer if letters else is_same_answer(answer, text)})
    return pandas.DataFrame(found)


def greedy_answer(lm: LanguageModel, ids: Sequence[int], tokens: int) -> str:
    """What a model writes behind a prompt, at most so many tokens of the largest probability, as text."""
    ids_BP = torch.tensor([[*ids]], device=lm.device)
    with torch.inference_mode():
        found_BP = lm.model.generate(ids_BP, attention_mask=torch.ones_like(ids_BP), max_new_tokens=tokens,
                                     do_sample=False, pad_token_id=lm.tokenizer.pad_token_id)
    return str(lm.tokenizer.decode(found_BP[0, len(ids):], skip_special_tokens=True))


def open_engine(lm: LanguageModel, *, batch: int) -> Any:
    """A loaded model as the harness takes it."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    make: Any = HFLM  # a decorator hides its parameters
    return make(lm.model, tokenizer=lm.tokenizer, batch_size=batch, max_length=lm.context_length)


def judge_prompt(card: Mapping[str, Any], labels: Sequence[str]) -> str:
    """What a judge is asked about a latent, from the texts on which it fires most and half as much."""
    texts = ["".join(f"<<{token}>>" if value > 0 else token for token, value in zip(
        context["tokens"], context["values"], strict=True)) for context in (*card["contexts"], *card["middling"])]
    return ("One unit of a language model responds to the tokens that stand in << >> in these passages:\n\n"
            + "\n---\n".join(texts) + "\n\nWhich kind of text is the unit about? Look at what they have in common and "
            f"where they stand. Answer with one of these words and nothing else: {', '.join(labels)}.")


def judge_label(answer: str, labels: Sequence[str]) -> str:
    """The one label that a judge's answer names; "" where it names none, or more than one."""
    found = [label for label in labels if re.search(rf"\b{re.escape(label)}\b", answer, re.IGNORECASE)]
    return found[0] if len(found) == 1 else ""


def ask_judge(url: str, model: str, prompts: Sequence[str], report: Callable[[float], None], *,
              seconds: float = 60) -> list[str]:
    """A model's answers, at temperature 0, from any endpoint for OpenAI's chat completions. Its key is in the variable
    STS_JUDGE_KEY, if it has one, and never stored. `StsError` where it is not there, refuses, or answers otherwise."""
    if not (url and model) or "@" in url.partition("://")[2].partition("/")[0]:
        raise StsError("A judge is asked where judge_url (http://localhost:8000/v1, say, without a password) and "
                       "judge_model are set; put its key, if it has one, in the variable STS_JUDGE_KEY.")
    key, answers = os.environ.get("STS_JUDGE_KEY"), []
    with httpx.Client(timeout=seconds, headers={"Authorization": f"Bearer {key}"} if key else {}) as client:
        for prompt in prompts:
            try:
                response = client.post(f"{url.rstrip('/')}/chat/completions", json={
                    "model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]})
                answers.append(str(response.raise_for_status().json()["choices"][0]["message"]["content"]))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise StsError(f"The judge at {url} gave no answer that can be read ({reason}). Check judge_url, "
                               "judge_model and STS_JUDGE_KEY.") from error
            report(len(answers) / len(prompts))
    return answers
