"""What is measured: workloads, each with its routes on the same tokens, and the ratios that must hold.

The memory workload is the exception: matrices that grow are measured on fewer tokens, as the table says.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import routes
from benchmarks.measure import Ratio, Row, measured
from benchmarks.routes import Setup
from sts.data.load import Example, load_examples
from sts.data.prompts import Prompt, PromptGroup, make_group, question_text, render, solution_text

#: Tokens of each of the two worked examples that questions stand behind.
DEMONSTRATION_TOKENS = 1_000


def texts(setup: Setup, tokens: int, seed: int = 0) -> list[Prompt]:
    """Chats of arithmetic questions and their solutions, about `tokens` tokens in all."""
    prompts, total = [], 0
    for example in load_examples("gsm_symbolic", limit=max(8, tokens // 80), seed=seed):
        text = render(setup.lm.tokenizer, question_text(example), answer=solution_text(example))
        ids = tuple(setup.lm.tokenizer(text, add_special_tokens=False)["input_ids"])[:setup.lm.context_length]
        prompts.append(Prompt(ids, (0, len(ids))))
        total += len(ids)
        if total >= tokens:
            break
    return prompts


def behind_long_demonstrations(setup: Setup, questions: int, demonstration_tokens: int = DEMONSTRATION_TOKENS,
                               seed: int = 0) -> PromptGroup:
    """Questions behind two long worked examples, each made of several problems solved in turn."""
    examples = load_examples("gsm_symbolic", limit=questions + 60, seed=seed)
    random.Random(seed).shuffle(examples)
    demonstrations, used = [], questions
    for _ in range(2):
        parts: list[Example] = []
        while used < len(examples):
            parts.append(examples[used])
            used += 1
            joined = dataclasses.replace(
                parts[0], question="\n".join(f"Problem {n}: {one.question}" for n, one in enumerate(parts, 1)),
                solution="\n".join(f"Problem {n}: {one.solution}" for n, one in enumerate(parts, 1)))
            text = question_text(joined) + solution_text(joined)
            if len(setup.lm.tokenizer(text, add_special_tokens=False)["input_ids"]) >= demonstration_tokens:
                break
        demonstrations.append(joined)
    return make_group(setup.lm.tokenizer, examples[:questions], demonstrations)


def _run(row: Row, call: Callable[[], object], device: str) -> float:
    seconds, peak, _ = measured(call, device)
    row.seconds.append(seconds)
    if peak is not None:
        row.peak_memory_mb = max(row.peak_memory_mb or 0.0, peak)
    return seconds


def _repeat(calls: list[tuple[Row, Callable[[], object]]], repetitions: int, device: str,
            report: Callable[[Row], None]) -> list[Row]:
    """Routes in turn, again and again, so that a machine that slows down slows all of them."""
    for repetition in range(repetitions + 1):
        for row, call in calls:
            if repetition == 0:  # the first pass compiles kernels and packs weights: its time is not kept
                measured(call, device)
                continue
            _run(row, call, device)
            report(row)
    return [row for row, _ in calls]


def _ratio(what: str, first: Row, second: Row, bound: str, required: float) -> Ratio:
    # One repetition of a slow route serves all repetitions of the other.
    pairs = [(a, second.seconds[min(index, len(second.seconds) - 1)]) for index, a in enumerate(first.seconds)]
    if len(first.seconds) < len(second.seconds):
        pairs = [(first.seconds[min(index, len(first.seconds) - 1)], b) for index, b in enumerate(second.seconds)]
    return Ratio(what, [a / b for a, b in pairs], bound, required)


def text_workload(setup: Setup, proxies: dict[str, object], tokens: int, repetitions: int,
                  report: Callable[[Row], None], compiled: Setup | None = None) -> tuple[list[Row], list[Ratio]]:
    """Statistics of every token of a text, without demonstrations.

    Args:
        compiled: the same with a compiled model; its compilation is not in the times.
        proxies: "same" (the same precision) and "default": models as sae-lens loads them.
    """
    prompts = texts(setup, tokens)
    count, latents = sum(len(prompt.ids) - 1 for prompt in prompts), setup.sae.cfg.d_sae
    device = str(setup.lm.device)

    def row(route: str, label: str, note: str = "") -> Row:
        return Row("text", route, label, count, latents, note=note)

    calls = [
        (row("truncated", "forward to the layer, nothing else", "the machine's limit"),
         partial(routes.truncated_forward, setup, prompts)),
        (row("ours", "this book: forward, SAE, statistics"), partial(routes.ours, setup, prompts)),
        (row("sae_lens_stop", "sae-lens proxy, stop_at_layer, same precision", "forward, SAE, sums"),
         partial(routes.sae_lens, setup, proxies["same"], prompts, stop=True)),
        (row("sae_lens_same", "sae-lens proxy without stop_at_layer, same precision", "all layers; forward, SAE, sums"),
         partial(routes.sae_lens, setup, proxies["same"], prompts, stop=False)),
        (row("full", "forward through all layers and the LM head"), partial(routes.full_forward, setup, prompts)),
        (row("sae_lens", "sae-lens proxy, default settings",
             "all layers, in the precision of our checkpoint, float32; forward, SAE, sums"),
         partial(routes.sae_lens, setup, proxies["default"], prompts, stop=False)),
        (row("dense_append", "dense append (the official code's scheme)", "all layers; memory grows with the tokens"),
         partial(routes.dense_append, setup, prompts)),
    ]
    if compiled:
        calls.append((row("ours_compiled", "this book, layers compiled", "without the time of compiling"),
                      partial(routes.ours, compiled, prompts)))
    by_route = {one.route: one for one in _repeat(calls, repetitions, device, report)}
    mine = by_route["ours"]
    return list(by_route.values()), [
        _ratio("whole job / truncated forward, time", mine, by_route["truncated"], "at most", 1.15),
        # No slower; two per cent are what repetitions differ by.
        _ratio("whole job / sae-lens proxy with stop_at_layer, time", mine, by_route["sae_lens_stop"], "at most", 1.02),
        _ratio("sae-lens proxy by default / whole job, time", by_route["sae_lens"], mine, "at least", 1.5),
    ]


def demonstrations_workload(setup: Setup, questions: int, repetitions: int, report: Callable[[Row], None],
                            demonstration_tokens: int = DEMONSTRATION_TOKENS) -> tuple[list[Row], list[Ratio]]:
    """Questions without and behind two long worked examples. The naive runs are long, so they are run once."""
    group = behind_long_demonstrations(setup, questions, demonstration_tokens)
    front = group.icl[0].question[0]
    count = sum(prompt.question[1] - prompt.question[0] for prompt in group.base)
    device, latents = str(setup.lm.device), setup.sae.cfg.d_sae

    def row(route: str, label: str, note: str = "") -> Row:
        return Row("demonstrations", route, label, count, latents, note=note)

    mine = row("ours", "this book: demonstrations run once", f"{questions} questions behind {front:,} tokens")
    _repeat([(mine, partial(routes.ours_paired, setup, group))], repetitions, device, report)
    naive = row("naive", "whole prompts, leaving at the layer", "demonstrations run again for every question")
    naive_full = row("naive_full", "whole prompts, all layers and the LM head", "the same, and nothing left out")
    warm = type(group)(group.base[:2], group.icl[:2])
    for one, full in ((naive, False), (naive_full, True)):
        routes.naive_paired(setup, warm, full=full)
        _run(one, partial(routes.naive_paired, setup, group, full=full), device)
        report(one)
    return [mine, naive, naive_full], [
        _ratio(f"whole prompts, leaving at the layer / demonstrations of {front:,} tokens run once, time", naive, mine,
               "at least", 10.0),
        _ratio(f"whole prompts, all layers / demonstrations of {front:,} tokens run once, time", naive_full, mine,
               "at least", 10.0),
    ]


def precision_workload(setup: Setup, exact: Setup, questions: int, report: Callable[[Row], None],
                       demonstration_tokens: int = 300) -> tuple[list[Row], list[Ratio]]:
    """What reusing the demonstrations' cache does to the squared change of each latent, beside what bf16 does anyway.

    Args:
        exact: the same model in float32; whole prompts through it are the reference.
    """
    group = behind_long_demonstrations(setup, questions, demonstration_tokens)
    count = sum(prompt.question[1] - prompt.question[0] for prompt in group.base)
    device, rows, change = str(setup.lm.device), [], {}
    for route, label, call in (
            ("float32", "whole prompts, float32", partial(routes.naive_paired, exact, group, full=False)),
            ("whole", "whole prompts, the run's precision", partial(routes.naive_paired, setup, group, full=False)),
            ("ours", "demonstrations run once, the run's precision", partial(routes.ours_paired, setup, group))):
        row = Row("precision", route, label, count, setup.sae.cfg.d_sae)
        seconds, row.peak_memory_mb, change[route] = measured(call, device)
        row.seconds.append(seconds)
        rows.append(row)
    noise, with_cache = ((change[route] - change["float32"]).abs().sum().item() / change["float32"].sum().item()
                         for route in ("whole", "ours"))
    for row, distance in zip(rows, (0.0, noise, with_cache), strict=True):
        row.note = f"sum over latents of |difference from float32| / sum: {distance:.2%}"
        report(row)
    # In float32 itself nothing but the order of additions differs.
    bound = 1.2 if noise > 1e-3 else float("inf")
    return rows, [Ratio("distance from float32, cache reused / whole prompts", [with_cache / max(noise, 1e-12)],
                        "at most", bound)] if bound < float("inf") else []


def memory_workload(setup: Setup, proxy: object, latents: int, tokens: tuple[int, ...], others: int,
                    report: Callable[[Row], None]) -> tuple[list[Row], list[Ratio]]:
    """Peak memory with a wide random SAE: ours at several numbers of tokens, the alternatives at `others` tokens."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    device = str(setup.lm.device)
    wide = TopKSAE(TopKSAEConfig(d_in=setup.sae.cfg.d_in, d_sae=latents, k=32, device=device))
    setup = dataclasses.replace(setup, sae=wide.eval().requires_grad_(False))
    rows, ratios = [], []

    def add(route: str, label: str, count: int, call: Callable, note: str = "") -> Row:
        prompts = texts(setup, count)
        row = Row("memory", route, label, sum(len(prompt.ids) - 1 for prompt in prompts), latents, note=note)
        _run(row, partial(call, prompts), device)
        report(row)
        rows.append(row)
        return row

    for count in tokens:
        row = add("ours", "this book", count, partial(routes.ours, setup), "random SAE")
        if row.peak_memory_mb is not None:
            ratios.append(Ratio(f"peak memory (MB) beyond the weights, {row.tokens:,} tokens x {latents:,} latents",
                                [row.peak_memory_mb], "at most", 600.0))
    add("sae_lens_stop", "sae-lens proxy, stop_at_layer", others,
        lambda prompts: routes.sae_lens(setup, proxy, prompts, stop=True), "random SAE; a batch of latents at a time")
    add("dense_append", "dense append (the official code's scheme)", others,
        partial(routes.dense_append, setup), "random SAE; grows in proportion to the tokens")
    return rows, ratios
