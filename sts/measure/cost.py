"""What a forecast costs on paper: operations of one token in a decoder, and the tokens that a plan needs.

Nothing here runs a model. Two units, neither of which depends on a machine:

- a *token-forward-pass*: one token through all decoder layers once. A token that leaves after `k` of `n` layers counts
  k / n; a backward pass counts as one more for the activations' gradient and one more for the weights';
- a *FLOP*: one multiplication or addition in a matrix product. Norms, activation functions and rotary positions are
  left out, as in Kaplan et al. (2020), "Scaling Laws for Neural Language Models", section 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pandas

from sts.data.prompts import PromptGroup
from sts.errors import StsError

#: Families whose layer is grouped-query attention and a gated MLP of three matrices, which the formulas assume.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


# --- one token ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder with gated MLPs, and of the SAE that reads its residual stream.

    Attributes:
        layers: decoder layers.
        width: of the residual stream.
        heads, kv_heads, head_width: query heads, key-value heads, width of one head.
        mlp_width: of the MLP's hidden layer.
        vocabulary: rows of the LM head.
        context: longest prompt, in tokens.
        sae_layer: zero-based layer after which the SAE reads, so `sae_layer` + 1 layers are run.
        sae_latents: width of the SAE.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    context: int
    sae_layer: int
    sae_latents: int

    @property
    def layers_read(self) -> int:
        """Decoder layers that the forecast runs."""
        return self.sae_layer + 1

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer: query, key, value, output; gate, up, down."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.mlp_width

    @property
    def head_flops(self) -> float:
        """FLOPs of the LM head for one token."""
        return 2.0 * self.width * self.vocabulary

    @property
    def sae_flops(self) -> float:
        """FLOPs of the SAE's encoder for one token."""
        return 2.0 * self.width * self.sae_latents

    def flops(self, keys: float, layers: int | None = None) -> float:
        """FLOPs of one token in a forward pass through `layers` layers (all by default), without the LM head.

        Two for each weight, and in each layer four times heads x head width for each of the `keys` tokens attended to:
        two for the score, two for the weighted sum of values. Windows of sliding attention are not applied, so for
        prompts longer than the window this is an upper bound.
        """
        attention = 4.0 * self.heads * self.head_width * keys
        return (self.layers if layers is None else layers) * (2.0 * self.layer_weights + attention)


#: Published configurations of the paper's models, with the paper's SAE sites and widths (data/paper, "Settings").
ARCHITECTURES = {
    "llama3-8b-instruct": Architecture("Llama3-8B-Instruct", 32, 4096, 32, 8, 128, 14336, 128_256, 8192, 25, 16_384),
    "qwen2.5-7b-instruct": Architecture("Qwen2.5-7B-Instruct", 28, 3584, 28, 4, 128, 18944, 152_064, 32_768, 25,
                                        28_672),
    "gemma2-9b-it": Architecture("Gemma2-9B-Instruct", 42, 3584, 16, 8, 256, 14336, 256_000, 8192, 31, 131_072),
}


def architecture_of(config, *, name: str, sae_layer: int, sae_latents: int) -> Architecture:
    """The shape of a model from its transformers configuration.

    Raises:
        StsError: a family whose layers the formulas do not describe.
    """
    text = config.get_text_config()
    if text.model_type not in FAMILIES:
        raise StsError(f"FLOPs are not known for models of type {text.model_type!r}. Valid: {', '.join(FAMILIES)}.")
    heads = text.num_attention_heads
    return Architecture(
        name=name, layers=text.num_hidden_layers, width=text.hidden_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads, mlp_width=text.intermediate_size,
        vocabulary=text.vocab_size, context=text.max_position_embeddings, sae_layer=sae_layer, sae_latents=sae_latents)


# --- a plan -------------------------------------------------------------------------------------------------------

#: Largest number that an assumption may be, and largest factor that it may be off by: far beyond any experiment, and
#: small enough for every product to be a finite number.
LARGEST, LARGEST_FACTOR = 1_000_000_000, 1000


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
    """What the paper does not say and its cost depends on. Lengths are means in tokens.

    Attributes:
        sft_question_tokens: a training question with its chat template.
        sft_solution_tokens: a training solution, before it is cut to the maximum length.
        question_tokens: a domain's question with its options and chat template.
        demonstration_tokens: a worked example of a domain.
        generated_tokens: the answer written to an evaluated question, before and after training alike.
        demonstration_sets: different sets of demonstrations that the forecast draws, for each question set.
        evaluation_prefix_cached: whether the evaluation runs a domain's demonstrations once, not for each question.

    Raises:
        StsError: a value below one or above `LARGEST`.
    """

    sft_question_tokens: int = 100
    sft_solution_tokens: int = 6_000
    question_tokens: int = 200
    demonstration_tokens: int = 250
    generated_tokens: int = 400
    demonstration_sets: int = 2
    evaluation_prefix_cached: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not 1 <= value <= LARGEST:
                raise StsError(f"Assumption {field.name!r} must be a number from 1 to {LARGEST:,}; got {value!r}.")


def check_factor(factor: float, name: str = "off_by") -> float:
    """The factor by which assumptions may be off, if it is one.

    Raises:
        StsError: below 1, above `LARGEST_FACTOR`, or NaN; named as the parameter `name`.
    """
    if not 1 <= factor <= LARGEST_FACTOR:
        raise StsError(f"Parameter {name!r} is how far every assumption may be off, as a factor: a number from 1 (not "
                       f"at all) to {LARGEST_FACTOR:,}; got {factor!r}.")
    return factor


@dataclass(frozen=True)
class Cost:
    """Tokens run, token-forward-passes and FLOPs."""

    tokens: float = 0.0
    passes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.passes + other.passes, self.flops + other.flops)

    def times(self, factor: float) -> Cost:
        return Cost(factor * self.tokens, factor * self.passes, factor * self.flops)


def forward_cost(architecture: Architecture, tokens: float, length: float, *, behind: float = 0,
                 layers: int | None = None) -> Cost:
    """Cost of `tokens` tokens in causal texts of `length` tokens each, behind `behind` cached tokens."""
    run = architecture.layers if layers is None else layers
    keys = behind + (length + 1) / 2
    return Cost(tokens, tokens * run / architecture.layers, tokens * architecture.flops(keys, run))


def forecast_cost(architecture: Architecture, settings: Settings, assumed: Assumptions, *, cached: bool = True) -> Cost:
    """The forecast: the training set's questions and every domain's, each without and behind demonstrations.

    Args:
        cached: run each set of demonstrations once; else again for every question. Demonstrations that do not fit the
            model's context with a question are cut to what does.
    """
    solved = min(assumed.sft_question_tokens + assumed.sft_solution_tokens, settings.sft_max_length)
    parts = [(1, settings.shift_tokens, assumed.sft_question_tokens, settings.shift_demonstrations * solved),
             (settings.domains, settings.score_tokens, assumed.question_tokens,
              settings.demonstrations * assumed.demonstration_tokens)]
    total, layers = Cost(), architecture.layers_read
    for times, tokens, length, prefix in parts:
        prefix = max(0, min(prefix, architecture.context - length))
        questions = tokens / length
        runs = min(assumed.demonstration_sets, questions) if cached else questions
        one = forward_cost(architecture, tokens, length, layers=layers)
        one += forward_cost(architecture, runs * prefix, prefix, layers=layers)
        one += forward_cost(architecture, tokens, length, behind=prefix, layers=layers)
        one += Cost(flops=2 * tokens * architecture.sae_flops)
        total += one.times(times)
    return total


def training_cost(architecture: Architecture, settings: Settings, assumed: Assumptions) -> Cost:
    """Fine-tuning: forward and backward, LM head included, nothing recomputed; the optimiser's own work left out."""
    length = min(assumed.sft_question_tokens + assumed.sft_solution_tokens, settings.sft_max_length)
    tokens = settings.sft_examples * settings.sft_epochs * length
    once = forward_cost(architecture, tokens, length) + Cost(flops=tokens * architecture.head_flops)
    return replace(once.times(settings.passes_per_trained_token), tokens=tokens)


def evaluation_cost(architecture: Architecture, settings: Settings, assumed: Assumptions) -> Cost:
    """Evaluation before and after: questions behind demonstrations, answers written token by token."""
    prefix = settings.demonstrations * assumed.demonstration_tokens
    length = assumed.question_tokens + assumed.generated_tokens
    runs = settings.domains if assumed.evaluation_prefix_cached else settings.evaluated_questions
    once = forward_cost(architecture, runs * prefix, prefix)
    once += forward_cost(architecture, settings.evaluated_questions * length, length, behind=prefix)
    once += Cost(flops=settings.evaluated_questions * assumed.generated_tokens * architecture.head_flops)
    return once.times(2)


def ratio(architecture: Architecture, settings: Settings, assumed: Assumptions, *, cached: bool = True,
          unit: str = "passes") -> float:
    """How many forecasts finding out by fine-tuning and evaluating costs; `unit` is "passes" or "flops"."""
    found_out = training_cost(architecture, settings, assumed) + evaluation_cost(architecture, settings, assumed)
    return getattr(found_out, unit) / getattr(forecast_cost(architecture, settings, assumed, cached=cached), unit)


def plan(settings: Settings, assumed: Assumptions, architectures: Sequence[Architecture] = tuple(ARCHITECTURES.values())
         ) -> pandas.DataFrame:
    """Every model's costs: model, what (forecast, forecast_uncached, training, evaluation), tokens, passes, flops."""
    rows = []
    for one in architectures:
        costs = {"forecast": forecast_cost(one, settings, assumed),
                 "forecast_uncached": forecast_cost(one, settings, assumed, cached=False),
                 "training": training_cost(one, settings, assumed),
                 "evaluation": evaluation_cost(one, settings, assumed)}
        rows += [{"model": one.name, "what": what, "tokens": cost.tokens, "passes": cost.passes, "flops": cost.flops}
                 for what, cost in costs.items()]
    return pandas.DataFrame(rows)


def _varied(assumed: Assumptions, name: str, factor: float) -> list[Assumptions]:
    """The assumption divided and multiplied by `factor`; the other value, if it is a yes or no."""
    value = getattr(assumed, name)
    values = [not value] if isinstance(value, bool) else [max(1, round(value / factor)),
                                                          min(LARGEST, round(value * factor))]
    return [replace(assumed, **{name: one}) for one in values]


def sensitivity(settings: Settings, assumed: Assumptions, *, factor: float = 2.0, cached: bool = True,
                unit: str = "passes", architectures: Sequence[Architecture] = tuple(ARCHITECTURES.values())
                ) -> pandas.DataFrame:
    """The ratio when an assumption is off by `factor` either way, one at a time, and all at once.

    Returns:
        One row per model and assumption, and one named "all": model, assumption, ratio (as assumed), low, high.

    Raises:
        StsError: see `check_factor`.
    """
    check_factor(factor, "factor")
    names, rows = [field.name for field in fields(Assumptions)], []
    for one in architectures:
        def of(case: Assumptions, one: Architecture = one) -> float:
            return ratio(one, settings, case, cached=cached, unit=unit)

        cases = {name: [assumed, *_varied(assumed, name, factor)] for name in names}
        cases["all"] = [Assumptions(**dict(zip(names, values, strict=True))) for values in itertools.product(
            *({getattr(case, name) for case in cases[name]} for name in names))]
        for name, own in cases.items():
            ratios = [of(case) for case in own]
            rows.append({"model": one.name, "assumption": name, "ratio": of(assumed), "low": min(ratios),
                         "high": max(ratios)})
    return pandas.DataFrame(rows)


# --- prompts as they stand ----------------------------------------------------------------------------------------

def prompt_tokens(groups: Sequence[PromptGroup]) -> dict[str, int]:
    """Prompts of these groups and the tokens they hold, each prompt counted whole."""
    prompts = [prompt for group in groups for prompt in (*group.base, *group.icl)]
    return {"prompts": len(prompts), "tokens": sum(len(prompt.ids) for prompt in prompts)}
