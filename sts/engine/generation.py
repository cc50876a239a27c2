"""Evaluation by generation: lm-evaluation-harness answers and scores; one Python dict says what a benchmark is."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

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


def generate_and_score(engine: Any, benchmark: str, examples: Sequence[Example],
                       demonstrations: Sequence[Example] = (), *, shots: int = 5,
                       max_tokens: int = 1024) -> pandas.DataFrame:
    """Let a model answer in words, greedily, and score its answers.

    Args:
        engine: a model of the harness, of `open_engine` or `open_vllm`.
        benchmark: of mmlu_pro a letter is read from the answer, of gsm8k and math a mathematical expression.
        demonstrations: worked examples; a question of mmlu_pro gets the first `shots` of its own domain.

    Returns:
        One row per question: example_id, domain, characters (of the answer), sha256 (its first 12 hexadecimal digits),
        answer (the right letter or expression) and correct.

    Raises:
        StsError: a question of mmlu_pro without options, or a prompt that leaves no room for `max_tokens`.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    rows: list[dict[str, str]] = []
    letters, room = benchmark == "mmlu_pro", engine.max_length - max_tokens
    # A chat template writes BOS itself; before plain text belongs what the tokenizer puts there.
    engine.add_bos_token = False if engine.tokenizer.chat_template and not letters else None
    for example in examples:
        if letters and not example.options:
            raise StsError(f"Benchmark {benchmark!r} asks for a letter; {example.example_id} has no options.")
        worked = [one for one in demonstrations if one.domain == example.domain][:shots]
        rows.append({"prompt": prompt_text(engine.tokenizer, benchmark, example, worked),
                     "answer": LETTERS[example.answer_index] if letters else example.answer})
        if (length := len(engine.tok_encode(rows[-1]["prompt"]))) > room:
            raise StsError(f"The prompt of item {example.example_id} has {length} tokens, and the model's context "
                           f"leaves {room} beside the answer. Lower eval_max_tokens or demonstrations.")

    def score(doc: dict, results: list[str]) -> dict[str, int]:
        right = extract_letter(results[0]) == doc["answer"] if letters else is_same_answer(doc["answer"], results[0])
        return {"acc": int(right)}

    config: Any = {
        "task": benchmark, "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "answer",
        "process_results": score, "num_fewshot": 0, "metric_list": [{"metric": "acc"}],
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": max_tokens, "do_sample": False,
                              "temperature": 0.0}}
    with contextlib.redirect_stderr(io.StringIO()):  # the harness's bars would end up in notebooks
        tasks: Any = {"tasks": {benchmark: ConfigurableTask(config=config)}, "groups": {}, "group_map": {}}
        answered: Any = evaluate(lm=engine, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    found = []
    for example, sample in zip(examples, answered["samples"][benchmark], strict=True):
        text = sample["resps"][0][0]
        found.append({"example_id": example.example_id, "domain": example.domain, "characters": len(text),
                      "sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "answer": sample["doc"]["answer"],
                      "correct": bool(sample["acc"])})
    return pandas.DataFrame(found)


def open_engine(lm: LanguageModel, *, batch: int) -> Any:
    """A loaded model as the harness takes it."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    make: Any = HFLM  # a decorator hides its parameters
    return make(lm.model, tokenizer=lm.tokenizer, batch_size=batch, max_length=lm.context_length)


def open_vllm(location: str, *, revision: str = "", dtype: str = "auto", tensor_parallel: int = 1,
              adapter: Path | None = None, lora_rank: int = 16, seed: int = 0) -> Any:
    """The harness's vLLM model from a folder or hub id, split over so many GPUs; `StsError` where there is no vLLM.
    `adapter`: what `fine_tune` wrote, a LoRA adapter, or a whole model, which then takes the model's place."""
    if importlib.util.find_spec("vllm") is None:
        raise StsError("Setting eval_backend 'vllm': vLLM is not installed. It needs a GPU and its own version of "
                       "PyTorch; install it with: pip install 'lm-eval[vllm]'. eval_backend hf works without it.")
    from lm_eval.api.registry import get_model

    options: dict[str, Any] = {"pretrained": location, "dtype": dtype, "tensor_parallel_size": tensor_parallel,
                               "batch_size": "auto", "seed": seed, "enable_prefix_caching": True}
    if revision:
        options |= {"revision": revision, "tokenizer_revision": revision}
    if adapter is not None and (adapter / "adapter_config.json").is_file():
        options |= {"lora_local_path": str(adapter), "max_lora_rank": lora_rank}
    elif adapter is not None:
        options |= {"pretrained": str(adapter), "tokenizer": location}
        options.pop("revision", None)
    return get_model("vllm").create_from_arg_obj(options)
