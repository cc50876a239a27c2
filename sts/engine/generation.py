"""Evaluation by generation: lm-evaluation-harness with the task files in `tasks/`, one row per question.

- `mmlu_pro`: worked examples of the domain, then a chain of thought, in the layout of MMLU-Pro's official script.
- `gsm8k`, `math`: one worked answer to a mathematics problem, compared with the right one by math-verify.

The engine is the harness's Hugging Face class, or its vLLM class.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import random
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from sts.data.load import Example, by_domain, load_examples
from sts.engine.tasks.utils import extract_answer, extract_letter
from sts.errors import StsError, one_of

TASKS = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True)
class Benchmark:
    """A generation task: its file in `tasks/`, its own data set, and whether it goes through the chat template."""

    file: str
    data: str
    split: str
    demonstration_split: str
    metric: str
    chat: bool


BENCHMARKS = {
    # The official script completes plain text, with instruction-tuned models as well.
    "mmlu_pro": Benchmark("mmlu_pro_cot.yaml", "mmlu_pro", "test", "validation", "exact_match", chat=False),
    "gsm8k": Benchmark("gsm8k.yaml", "gsm8k", "test", "", "math_verify", chat=True),
    "math": Benchmark("math.yaml", "math", "test", "", "math_verify", chat=True),
}


def open_vllm(location: str, *, revision: str = "", dtype: str = "auto", tensor_parallel: int = 1,
              context_length: int = 0, adapter: Path | None = None, lora_rank: int = 16, seed: int = 0) -> Any:
    """The harness's vLLM model.

    Args:
        location: local folder or hub id of the model.
        tensor_parallel: GPUs that one copy of the model is split over.
        context_length: tokens of prompt and answer together; 0 for the model's own limit.
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
    if context_length:
        options["max_model_len"] = context_length
    if adapter is not None and (adapter / "adapter_config.json").is_file():
        options |= {"lora_local_path": str(adapter), "max_lora_rank": lora_rank}
    elif adapter is not None:
        options |= {"pretrained": str(adapter), "tokenizer": location}
        options.pop("revision", None)
    return get_model("vllm").create_from_arg_obj(options)


def benchmark_examples(benchmark: str, *, limit: int = 0, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """A benchmark's own (questions, demonstrations): `limit` questions a domain at most, drawn by `seed`; 0 for all.

    Raises:
        StsError: an unknown benchmark, or as `load_examples`.
    """
    if benchmark not in BENCHMARKS:
        raise one_of("Benchmark", benchmark, BENCHMARKS)
    spec = BENCHMARKS[benchmark]
    chosen: list[Example] = []
    for group in by_domain(load_examples(spec.data, split=spec.split)).values():
        chosen += random.Random(seed).sample(group, min(limit, len(group))) if limit else group
    return chosen, load_examples(spec.data, split=spec.demonstration_split) if spec.demonstration_split else []


def build_tasks(benchmark: str, examples: Sequence[Example], demonstrations: Sequence[Example] = (), *,
                shots: int = 5, max_tokens: int = 0) -> dict[str, Any]:
    """The harness's tasks for these questions, one a domain where the task's file has one a domain.

    Args:
        examples: the questions.
        demonstrations: worked examples; a question gets the first `shots` of its own domain.
        shots: how many, at most; fewer where a domain has fewer.
        max_tokens: tokens generated at most; 0 for the task file's own number.

    Returns:
        name -> `ConfigurableTask`.

    Raises:
        StsError: an unknown benchmark, no examples, or a multiple-choice question without options or demonstrations.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES
    from lm_eval.tasks._yaml_loader import load_yaml

    if benchmark not in BENCHMARKS:
        raise one_of("Benchmark", benchmark, BENCHMARKS)
    if not examples:
        raise StsError(f"Benchmark {benchmark!r} was given no questions.")
    config = load_yaml(TASKS / BENCHMARKS[benchmark].file, resolve_func=True)
    grouped = "group" in config
    tasks = {}
    for domain, own in (by_domain(list(examples)) if grouped else {"": list(examples)}).items():
        name = f"{config['group']}_{domain.replace(' ', '_')}" if grouped else config["task"]
        worked = [example for example in demonstrations if example.domain == domain][:shots] if grouped else []
        if grouped and not all(example.options for example in own):
            raise StsError(f"Benchmark {benchmark!r} asks for a letter; domain {domain!r} has questions without "
                           "options. Use gsm8k or math, which compare final answers.")
        if grouped and not worked:
            raise StsError(f"Benchmark {benchmark!r}: no worked example of domain {domain!r} was given.")
        shared = {key: deepcopy(value) for key, value in config.items()
                  if not grouped or key not in GROUP_FIELD_NAMES or key == "metadata"}
        if max_tokens:
            shared["generation_kwargs"]["max_gen_toks"] = max_tokens
        tasks[name] = ConfigurableTask(config=shared | {
            "task": name, "num_fewshot": len(worked),
            "dataset_kwargs": {"examples": own, "demonstrations": worked}})
    return tasks


def generate_and_score(engine: Any, benchmark: str, examples: Sequence[Example],
                       demonstrations: Sequence[Example] = (), *, shots: int = 5,
                       max_tokens: int = 0) -> pandas.DataFrame:
    """Let a model answer in words, greedily, and score its answers.

    Args:
        engine: a model of the harness: `harness.open_harness(...)` or `open_vllm(...)`. Its `add_bos_token` is set to
            what the benchmark's prompts need.
        benchmark: a key of `BENCHMARKS`, which says how questions are put and answers scored.
        examples, demonstrations: see `benchmark_examples` and `build_tasks`.

    Returns:
        One row per question: example_id, domain, characters (of the answer), sha256 (its first 12 hexadecimal digits),
        extracted (the letter or final answer read from it; "" if none, which counts as wrong), answer (the right one)
        and correct.

    Raises:
        StsError: as `build_tasks`, or a prompt that leaves no room for `max_tokens`.
    """
    from lm_eval.evaluator import evaluate as run_harness

    from sts.engine.harness import add_bos

    # The harness's bars would end up in notebooks.
    with contextlib.redirect_stderr(io.StringIO()):
        tasks = build_tasks(benchmark, examples, demonstrations, shots=shots, max_tokens=max_tokens)
        chat = BENCHMARKS[benchmark].chat and bool(engine.tokenizer.chat_template)
        engine.add_bos_token = add_bos(chat=chat)
        how = {"apply_chat_template": chat, "fewshot_as_multiturn": True}
        for task in tasks.values():
            _check_lengths(engine, task, chat)
        results = run_harness(lm=engine, task_dict={"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=0,
                              log_samples=True, **how)
    extract = extract_letter if BENCHMARKS[benchmark].metric == "exact_match" else extract_answer
    rows = [_row(sample, extract, BENCHMARKS[benchmark].metric)
            for samples in results["samples"].values() for sample in samples]
    order = {example.example_id: index for index, example in enumerate(examples)}
    return pandas.DataFrame(sorted(rows, key=lambda row: order[row["example_id"]]))


def _row(sample: Mapping[str, Any], extract, metric: str) -> dict[str, Any]:
    text = sample["resps"][0][0]
    return {"example_id": sample["doc"]["example_id"], "domain": sample["doc"]["domain"], "characters": len(text),
            "sha256": hashlib.sha256(text.encode()).hexdigest()[:12], "extracted": extract(text),
            "answer": str(sample["target"]), "correct": bool(sample[metric])}


def _check_lengths(engine: Any, task: Any, chat: bool) -> None:
    """The harness would cut a prompt from the left, and with it the demonstrations' beginning."""
    task.build_all_requests(apply_chat_template=chat, fewshot_as_multiturn=True,
                            chat_template=engine.apply_chat_template if chat else None,
                            tokenizer_name=engine.tokenizer_name if chat else "")
    room = engine.max_length - task.config.generation_kwargs["max_gen_toks"]
    for instance in task.instances:
        length = len(engine.tok_encode(instance.args[0]))
        if length > room:
            raise StsError(f"The prompt of item {instance.doc['example_id']} has {length} tokens, and the model's "
                           f"context leaves {room} beside the answer. Lower eval_max_tokens or demonstrations.")
