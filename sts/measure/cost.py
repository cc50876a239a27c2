"""What a forecast costs on paper: the passes of a plan, in a unit that does not depend on a machine.

A *token-forward-pass* is one token through all decoder layers once: a token that leaves after k of n layers counts
k / n, a backward pass once for the gradient of activations and once for that of weights, as in Kaplan et al. (2020),
"Scaling Laws for Neural Language Models", section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sts.data.prompts import PromptGroup
from sts.errors import StsError


@dataclass(frozen=True)
class Architecture:
    """What of a decoder, and of the SAE that reads its residual stream, decides the number of passes."""

    name: str
    layers: int
    context: int  # longest prompt, in tokens
    sae_layer: int  # zero-based; the SAE reads after it
    sae_latents: int


#: Published configurations of the paper's models, with the paper's SAE sites and widths (data/paper, "Settings").
ARCHITECTURES = {"llama3-8b-instruct": Architecture("Llama3-8B-Instruct", 32, 8192, 25, 16_384),
                 "qwen2.5-7b-instruct": Architecture("Qwen2.5-7B-Instruct", 28, 32_768, 25, 28_672),
                 "gemma2-9b-it": Architecture("Gemma2-9B-Instruct", 42, 8192, 31, 131_072)}
LARGEST = 1_000_000_000  # assumption: every product is finite


@dataclass(frozen=True)
class Settings:
    """What the paper says about its experiment (`data/paper`, "Settings"); tokens are question tokens."""

    shift_tokens: int = 20_000
    shift_demonstrations: int = 2
    domains: int = 14
    score_tokens: int = 10_000
    demonstrations: int = 5
    sft_examples: int = 817
    sft_epochs: int = 10
    sft_max_length: int = 8192
    passes_per_trained_token: int = 3
    evaluated_questions: int = 12_032


@dataclass(frozen=True)
class Assumptions:
    """What the paper does not say and its cost depends on; lengths are means in tokens, with the chat template."""

    sft_question_tokens: int = 100
    sft_solution_tokens: int = 6_000  # before it is cut to the maximum length
    question_tokens: int = 200  # of a domain's question with its options
    demonstration_tokens: int = 250  # of a worked example of a domain
    generated_tokens: int = 400  # of an answer, before and after training alike
    demonstration_sets: int = 2  # drawn by the forecast for each question set
    evaluation_prefix_cached: bool = True  # whether the evaluation runs a domain's demonstrations once

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not 1 <= value <= LARGEST:
                raise StsError(f"Assumption {name!r} must be a number from 1 to {LARGEST:,}; got {value!r}.")


def forecast_cost(one: Architecture, settings: Settings, assumed: Assumptions, *, cached: bool = True) -> float:
    """Passes of the forecast: the training set's questions and every domain's, each without and behind demonstrations.

    `cached` runs each set of demonstrations once, not for every question; what does not fit the context is cut.
    """
    solved = min(assumed.sft_question_tokens + assumed.sft_solution_tokens, settings.sft_max_length)
    run = 0.0
    for times, tokens, length, prefix in (
            (1, settings.shift_tokens, assumed.sft_question_tokens, settings.shift_demonstrations * solved),
            (settings.domains, settings.score_tokens, assumed.question_tokens,
             settings.demonstrations * assumed.demonstration_tokens)):
        questions = tokens / length
        prefixes = min(assumed.demonstration_sets, questions) if cached else questions
        run += times * (2 * tokens + prefixes * max(0, min(prefix, one.context - length)))
    return run * (one.sae_layer + 1) / one.layers


def training_cost(settings: Settings, assumed: Assumptions) -> float:
    """Passes of fine-tuning: forward and backward, nothing recomputed; the optimiser's own work left out."""
    length = min(assumed.sft_question_tokens + assumed.sft_solution_tokens, settings.sft_max_length)
    return settings.passes_per_trained_token * settings.sft_examples * settings.sft_epochs * length


def evaluation_cost(settings: Settings, assumed: Assumptions) -> float:
    """Passes of evaluating before and after: questions behind demonstrations, answers written token by token."""
    prefixes = settings.domains if assumed.evaluation_prefix_cached else settings.evaluated_questions
    answered = settings.evaluated_questions * (assumed.question_tokens + assumed.generated_tokens)
    return 2 * (prefixes * settings.demonstrations * assumed.demonstration_tokens + answered)


def ratio(one: Architecture, settings: Settings, assumed: Assumptions) -> float:
    """How many forecasts finding out by fine-tuning and evaluating costs, in token-forward-passes."""
    found_out = training_cost(settings, assumed) + evaluation_cost(settings, assumed)
    return found_out / forecast_cost(one, settings, assumed)


def prompt_tokens(groups: Sequence[PromptGroup]) -> dict[str, int]:
    """Prompts of these groups and the tokens they hold, each prompt counted whole."""
    prompts = [prompt for group in groups for prompt in (*group.base, *group.icl)]
    return {"prompts": len(prompts), "tokens": sum(len(prompt.ids) for prompt in prompts)}
