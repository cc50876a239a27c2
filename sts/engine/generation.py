"""Evaluation by generation: lm-evaluation-harness answers and scores; one Python dict says what a benchmark is."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from sts.data.check import LETTERS
from sts.data.prompts import chat_text, question_text
from sts.data.sources import Example
from sts.engine.models import LanguageModel
from sts.errors import StsError

#: Benchmarks by name: of mmlu_pro a letter is read from the answer, of the others a mathematical expression.
BENCHMARKS = ("mmlu_pro", "gsm8k", "math")
STEPS = "Let's think step by step."
#: Seconds that one comparison of two formulas may take.
COMPARISON_SECONDS = 5


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
        blocks.append(f"Question:\n{one.question.strip()}\nOptions:\n{options}Answer: {STEPS}"
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

    # Its timeouts are signals, which only the main thread may set.
    seconds: Any = COMPARISON_SECONDS if threading.current_thread() is threading.main_thread() else None
    one, other = (parse(answer, parsing_timeout=seconds) for answer in (f"\\boxed{{{right}}}", text))
    return bool(verify(one, other, timeout_seconds=seconds))


def generate_and_score(engine: Any, benchmark: str, examples: Sequence[Example],
                       demonstrations: Sequence[Example] = (), *, shots: int = 5,
                       max_tokens: int = 1024) -> pandas.DataFrame:
    """Let a model answer in words, greedily, and score its answers.

    Args:
        engine: a model of the harness, of `open_engine` or `open_vllm`.
        benchmark: of `BENCHMARKS`.
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

    rows: list[dict[str, Any]] = []
    letters, tokenizer = benchmark == "mmlu_pro", engine.tokenizer
    # A chat template writes BOS itself; before plain text belongs what the tokenizer puts there.
    engine.add_bos_token = False if tokenizer.chat_template and not letters else None
    for place, example in enumerate(examples):
        if letters and not example.options:
            raise StsError(f"Benchmark {benchmark!r} asks for a letter; {example.example_id} has no options.")
        worked = [one for one in demonstrations if one.domain == example.domain][:shots]
        rows.append({"place": place, "prompt": prompt_text(tokenizer, benchmark, example, worked),
                     "answer": LETTERS[example.answer_index] if letters else example.answer})
        room, length = engine.max_length - max_tokens, len(engine.tok_encode(rows[-1]["prompt"]))
        if length > room:
            raise StsError(f"The prompt of item {example.example_id} has {length} tokens, and the model's context "
                           f"leaves {room} beside the answer. Lower eval_max_tokens or demonstrations.")

    def score(doc: dict, results: list[str]) -> dict[str, int]:
        right = extract_letter(results[0]) == doc["answer"] if letters else is_same_answer(doc["answer"], results[0])
        return {"acc": int(right)}

    with contextlib.redirect_stderr(io.StringIO()):  # the harness's bars would end up in notebooks
        config: Any = {
            "task": benchmark, "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}",
            "doc_to_target": "answer", "process_results": score, "num_fewshot": 0,
            "generation_kwargs": {"until": ["Question:"], "max_gen_toks": max_tokens, "do_sample": False,
                                  "temperature": 0.0},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
        tasks: Any = {"tasks": {benchmark: ConfigurableTask(config=config)}, "groups": {}, "group_map": {}}
        answered: Any = evaluate(lm=engine, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    found = []
    for sample in sorted(answered["samples"][benchmark], key=lambda sample: sample["doc"]["place"]):
        text, example = sample["resps"][0][0], examples[sample["doc"]["place"]]
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
    """The harness's vLLM model.

    Args:
        location: local folder or hub id of the model.
        tensor_parallel: GPUs that one copy of the model is split over.
        adapter: folder that `fine_tune` wrote: a LoRA adapter, or a whole model, which then takes the model's place.
        lora_rank: the adapter's rank.

    Raises:
        StsError: vLLM is not installed.
    """
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
