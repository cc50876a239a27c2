"""Run profiles: one flat YAML file of settings, validated and frozen; each may be overridden."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, model_validator

from sts.data.load import is_own
from sts.data.sources import GENERATED, SOURCES
from sts.errors import ROOT, StsError, one_of


def _question_sets(names: str, info: ValidationInfo) -> str:
    if is_own(names):
        return os.path.abspath(Path((info.context or {}).get(info.field_name) or "", names))
    parts, known = names.split("+"), (*SOURCES, *GENERATED)
    if unknown := [name for name in parts if name not in known]:
        raise ValueError(one_of("data set", unknown[0], known))
    if len(set(parts)) < len(parts):
        raise ValueError(f"{names!r} names a set twice")
    return names


def _located(name: str, info: ValidationInfo) -> str:
    """The absolute path of a model, an SAE or a text that lies in the folder of its setting; else the name."""
    folder: Path | None = (info.context or {}).get(info.field_name)
    there = folder and any((folder / name / mark).is_file() for mark in ("", "config.json", "cfg.json"))
    return os.path.abspath(folder / name) if folder and there else name


def _is(meaning: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=meaning, **limits)


Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
QuestionSet = Annotated[str, AfterValidator(_question_sets)]
Located = Annotated[str, AfterValidator(_located)]
Mask = Literal["whole_prompt", "first_positions", "outliers", "none"]

#: What settings are about, by the first of each group, in the order of `Run`.
GROUPS = {"name": "the run", "model": "model", "sae": "SAE", "text_data": "texts of chapter one", "sft_data": "data",
          "question_tokens_only": "forecast", "overlap_draws": "how well demonstrations foresee training; zeroing",
          "pool": "what latents mean", "sft_examples": "fine-tuning", "rl_data": "reinforcement learning",
          "eval_limit": "evaluation", "seeds": "further runs; resampling", "sweep_seeds": "ablations",
          "selective_latents": "read-outs of chosen latents; mixtures of training data", "rival_problems": "rivals"}
#: Which of `seeds` a chapter is repeated at.
AMONG_SEEDS = ("sweep_seeds", "selective_seeds", "mixture_seeds")


class Run(BaseModel, extra="forbid", frozen=True, strict=True):
    """All settings of one run, flat. Token counts are tokens of the model's own tokenizer."""

    name: str = _is("name of the run; its executed chapters lie in results/<name>/", pattern=r"^\w[\w.-]*$")
    description: str = _is("one line for tables and provenance", "")
    published: bool = _is("whether the book's discussions are about this run", False)
    seed: Index = _is("seed of sampling, training and resampling", 0)
    device: Literal["auto", "cpu", "cuda"] = _is("where models run; auto: CUDA if there is one", "auto")
    model: Located = _is("packaged name, local folder or hub id")
    model_revision: str = _is("hub revision; empty for the default branch", "")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _is("of the model; auto: bfloat16 where fast", "auto")
    layer: Index = _is("zero-based decoder layer after which the residual stream is read")
    tokens_per_batch: int = _is("padded tokens a pass at most; in no key, though bf16 may round otherwise", 8192, ge=64)
    sae: Located = _is("folder in sae-lens format, release/sae_id of its registry, or 'train'")
    sae_dtype: Literal["float32", "bfloat16"] = _is("precision in which the SAE encodes", "float32")
    fold_norms: bool = _is("scale latents so that decoder norms are one", True)
    sae_text: dict[Located, Count] = _is("text to train on: data set, corpus or file -> tokens", {})
    sae_latents: Count = _is("width of the SAE to train", 4608)
    sae_k: Count = _is("active latents per token (TopK)", 32)
    sae_samples: Count = _is("training samples, repeats counted", 6_000_000)
    sae_lr: Rate = _is("peak learning rate of the SAE", 4e-4)
    context: int = _is("longest piece of text the SAE trains on, in tokens", 512, ge=16)
    text_data: list[QuestionSet] = _is("question sets rendered as chats, for chapter one", [])
    text_examples: Count = _is("examples of each of them at most", 300)
    small_sae_latents: Count = _is("width of the small SAE", 1152)
    small_sae_k: Count = _is("active latents per token of the small SAE", 16)
    small_sae_samples: Count = _is("training samples of the small SAE", 300_000)
    splice_tokens: int = _is("tokens on which the spliced-in loss is measured", 12_000, ge=100)
    sft_data: QuestionSet = _is("question set to fine-tune on and foresee; several in equal parts: gsm8k+math")
    domain_data: QuestionSet = _is("question set whose domains are scored and evaluated")
    domain_split: str = _is("its split; empty for the first", "")
    domains: list[str] = _is("domains to keep; empty for all", [])
    domain_limit: Index = _is("questions a domain at most, drawn once for all seeds; 0 for all", 0)
    question_tokens_only: bool = _is("leave out chat template and special tokens", True)
    drop_first_positions: Index = _is("positions at the start of a prompt to leave out", 1)
    outlier_norm: float = _is("leave out tokens above this multiple of the median norm; 0 keeps all", 10.0, ge=0)
    shift_tokens: Count = _is("question tokens for the shifted dimensions, at most", 20_000)
    shift_demonstrations: Count = _is("worked examples before an SFT question", 2)
    demonstration_split: str = _is("split that demonstrations come from; empty: some of the questions, left out", "")
    demonstrations: Count = _is("worked examples before a domain's question (m)", 5)
    demonstration_draws: Count = _is("how many different sets of them are averaged over", 2)
    score_tokens: Count = _is("question tokens a domain, at most", 10_000)
    top_n: Count = _is("how many shifted latents (N)", 100)
    official_rows: Count = _is("rows compared in the official_code variant, at most", 10_000)
    overlap_draws: Count = _is("sets of demonstrations behind which the shift is estimated one by one", 4)
    overlap_tokens: Count = _is("question tokens behind each of those sets, at most", 2_000)
    overlap_demonstrations: list[Count] = _is("numbers of demonstrations to compare", [1, 2, 4, 8], min_length=1)
    ablation_model: Literal["tuned", "base"] = _is("model whose latents are zeroed", "tuned")
    ablation_examples: Count = _is("held-out training-domain problems scored with latents zeroed", 16)
    ablation_latents: list[Count] = _is("numbers of latents to zero", [10, 100, 500], min_length=1)
    ablation_draws: int = _is("random sets of latents of each kind and number", 5, ge=2)
    pool: dict[str, list[Located]] = _is(
        "kinds of text that latents are labelled by, the training set's first, then one to compare -> texts, sets", {})
    pool_tokens: int = _is("tokens of each kind", 10_000, ge=100)
    judge_url: str = _is("OpenAI-compatible endpoint that is asked for labels too, such as http://host/v1", "")
    judge_model: str = _is("the model that it is asked for", "")
    steer_factors: list[Annotated[float, Field(ge=0)]] = _is("a latent is multiplied by these", [0.0, 1.0, 4.0, 16.0])
    sft_examples: Count = _is("training examples", 300)
    sft_held_out: Index = _is("held-out examples of the training domain", 40)
    sft_epochs: Count = _is("passes over them", 1)
    sft_lr: Rate = _is("peak learning rate", 2e-4)
    sft_lr_tried: list[float] = _is("learning rates that stage sft_trials compares on held-out problems", [])
    sft_trial_examples: Count = _is("training examples of each of these trials", 150)
    sft_batch: Count = _is("examples a step", 8)
    sft_micro_batch: Count = _is("examples in memory at once; gradients are added up to sft_batch", 4)
    sft_max_length: int = _is("tokens an example at most", 1024, ge=16)
    lora_rank: Index = _is("rank of the adapters; 0 for full fine-tuning", 32)
    lora_alpha: Count = _is("their scale", 64)
    rl_data: QuestionSet = _is("question set for it, and for the fine-tuning beside it; answers can be verified",
                               "chain_sum")
    rl_seeds: list[Index] = _is("further seeds at which it is done again", [])
    rl_steps: Index = _is("steps of GRPO; 0: no reinforcement learning in this run", 0)
    rl_lr: float = _is("learning rate of GRPO, constant", 3e-4, ge=0)
    rl_kl: Rate = _is("weight of the divergence from the untuned model in the loss", 0.01)
    rl_problems: Count = _is("problems a step", 4)
    rl_group: int = _is("answers sampled to each problem, and compared", 8, ge=2)
    rl_micro_batch: Count = _is("answers in memory at once; gradients are added up", 16)
    rl_tokens: Count = _is("tokens of an answer, at most", 16)
    eval_limit: Index = _is("questions a domain at most; 0 for all", 0)
    eval_batch: Count = _is("questions in one evaluation batch", 8)
    eval_kinds: list[Literal["letter", "text", "solution"]] = _is(
        "what log-likelihoods are taken of: options' letters, their texts (behind examples), worked solution",
        ["letter", "solution"], min_length=1)
    validation_limit: Index = _is("questions a domain at most on which letters and texts are compared; 0 for all", 0)
    eval_generate: list[Literal["mmlu_pro", "gsm8k", "math", "sft_held_out"]] = _is(
        "answered in words as well: domain_data (mmlu_pro), GSM8K, MATH, held-out problems of sft_data", [])
    eval_max_tokens: Count = _is("tokens of a generated answer, at most", 1024)
    seeds: list[Index] = _is("seeds of further runs to compare with; all but the SAE is done again for each", [])
    training_sets: list[QuestionSet] = _is("further values of sft_data; all but the SAE is done again for each", [])
    training_seeds: list[Index] = _is("further seeds at which training sets are compared, sft_data among them", [])
    bootstrap: int = _is("bootstrap resamples", 5000, ge=100)
    permutations: int = _is("Monte Carlo permutations where exact ones are too many", 100_000, ge=100)
    baseline_draws: int = _is("random sets of latents of each kind, and shuffled targets of the probes", 500, ge=19)
    sweep_seeds: list[Index] | None = _is("those of `seeds` that the ablations are repeated at; by default all", None)
    sweep_bands: Count = _is("rank bands of top_n latents each that are scored by themselves", 5)
    sweep_top_n: list[Count] = _is("other numbers N of latents, as far as the SAE has them", [10, 30, 100, 300, 1000])
    sweep_demonstrations: list[Count] = _is("other numbers of worked examples before a domain's question", [])
    sweep_shift_demonstrations: list[Count] = _is("other numbers of them before an SFT question", [])
    sweep_tokens: list[Count] = _is("other values of score_tokens", [])
    sweep_shift_tokens: list[Count] = _is("other values of shift_tokens", [])
    sweep_masks: list[Mask] = _is("masks to switch off; none: all of them", [])
    sweep_widths: list[Count] = _is("widths of SAEs to train beside sae_latents", [])
    sweep_layers: list[Index] = _is("layers to train SAEs at beside layer", [])
    sweep_k: list[Count] = _is("active latents per token of SAEs to train beside sae_k", [])
    sweep_sae_samples: Count = _is("training samples of each SAE of the sweep", 600_000)
    sweep_text_tokens: int = _is("tokens that they train on, sae_text's sources in proportion", 400_000, ge=1000)
    selective_latents: list[Count] = _is("numbers of latents a layer whose read-outs are trained; none: not done", [])
    selective_seeds: list[Index] = _is("those of `seeds` at which this is done again", [])
    selective_draws: Count = _is("random sets of latents of each kind and number", 3)
    selective_examples: Index = _is("training examples at most; 0 for all", 0)
    selective_lr: list[Rate] = _is("peak learning rates of the read-outs; of several each set takes its best", [1e-3],
                                    min_length=1)
    mixture_steps: list[Share] = _is("shares of the most that can be added of two domains; none: not done", [])
    mixture_seeds: list[Index] = _is("those of `seeds` at which this is done again", [])
    mixture_kinds: list[Literal["sts", "even"]] = _is(
        "how the two share it: in proportion to STS_ICL, or evenly", ["sts"], min_length=1)
    mixture_examples: Count = _is("examples to add, at most", 220)
    mixture_tokens: Count = _is("tokens of the untuned model's own answer to one of them, at most", 512)
    rival_problems: Count = _is("training problems that the untuned model answers itself, at most", 40)
    rival_tokens: Count = _is("tokens of such an answer, at most", 40)
    rival_questions: Count = _is("questions a domain whose right answers rivals read, at most", 10)
    rival_alpha: float = _is("the mean state of training data is added so many times", 1.0)
    example_domains: Index = _is("domains for which training problems are ranked and fifths left out; 0: none", 0)

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        own, narrowest = self.sae_latents, min(self.sweep_widths, default=self.sae_k)
        for key, k, width in (("sae_k", self.sae_k, own), ("small_sae_k", self.small_sae_k, self.small_sae_latents),
                              ("sweep_k", max(self.sweep_k, default=0), own), ("sweep_widths", self.sae_k, narrowest),
                              ("top_n", self.top_n if self.sae == "train" else 0, own)):
            if k > width:
                raise ValueError(f"{key}: {k} latents of only {width}")
        for key, values in self:
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} names a value twice")
        if self.mixture_steps and "sts" not in self.mixture_kinds:
            raise ValueError("mixture_kinds must name sts, with which other divisions are compared")
        for key in AMONG_SEEDS:
            if unknown := [seed for seed in getattr(self, key) or [] if seed not in self.seeds]:
                raise ValueError(f"{key}: {unknown} must be among the run's seeds, {self.seeds}")
        return self


class _Loader(yaml.SafeLoader):
    """YAML that reads 4e-4 as a number (YAML 1.1 alone takes it for a word), and in which no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for place, (key, _) in enumerate(node.value):
            if key.value in [before.value for before, _ in node.value[:place]]:  # PyYAML would keep the last
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands twice; keep one", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """A YAML text's value; raises `yaml.YAMLError`, also for a key that stands twice in one mapping."""
    return yaml.load(text, Loader=_Loader)


def available_runs() -> list[str]:
    """Names of the profiles in runs/."""
    return sorted(path.stem for path in (ROOT / "runs").glob("*.yaml"))


def profile_file(run: str) -> Path:
    """Where a run profile lies, or would lie: of a name in runs/, or the path of a YAML file."""
    return Path(run).expanduser() if run.endswith((".yaml", ".yml")) else ROOT / "runs" / f"{run}.yaml"


def load_run(run: str | Run = "laptop", overrides: Mapping[str, Any] | None = None) -> Run:
    """A run profile, a name in runs/ or the path of a YAML file, or a `Run`, with overrides, key -> value.

    Paths in a file are relative to it, those among the overrides to the working directory. `StsError` for no such
    profile, an unknown key, a wrong type or an impossible value; it names the key."""
    folder, changes = None, dict(overrides or {})
    if isinstance(run, Run):
        settings = run.model_dump()
    else:
        path = profile_file(run)
        if not path.is_file():
            raise one_of("Run profile or YAML file", run, available_runs())
        try:
            written = read_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StsError(f"{path.name} is not valid YAML in UTF-8: {error}") from error
        if not isinstance(written, dict):
            raise StsError(f"{path.name} must hold `key: value` lines.")
        folder, settings = path.parent, {"name": path.stem, **written}
    try:
        return Run.model_validate(settings | changes,
                                  context=dict.fromkeys(settings, folder) | dict.fromkeys(changes, Path()))
    except ValidationError as error:
        raise StsError("\n".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] in ("extra_forbidden", "invalid_key"):  # YAML reads `on:` as the key True
        return str(one_of("Setting", key, Run.model_fields))
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"Setting {message}."
    meaning = Run.model_fields[str(problem["loc"][0])].description
    if problem["type"] == "missing":
        return f"Setting {key!r} is missing: {meaning}."
    as_list = f" Write [{problem['input']}]." if problem["type"] == "list_type" else ""
    return f"Setting {key!r} ({meaning}): {message}; got {problem['input']!r}.{as_list}"
