"""Run profiles: one flat YAML file of settings, validated and frozen.

Every setting is one line with its meaning beside it (below), and every one may be overridden from a notebook, from
`sts run CHAPTER -p KEY VALUE` or from Python. An unknown key, a wrong type or an impossible value is an error that
names the key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sts.data.sources import CORPORA, GENERATED, SOURCES
from sts.errors import StsError, did_you_mean

#: The repository's root: runs/, data/ and notebooks/ lie beside the package.
ROOT = Path(__file__).resolve().parent.parent.parent


class Run(BaseModel):
    """All settings of one run. Token counts are tokens of the model's own tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^\w[\w.-]*$", description="name of the run; its results lie in results/<name>/")
    description: str = Field("", description="one line for tables and provenance")
    seed: int = Field(0, ge=0, description="seed of sampling, training and resampling")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run; auto: CUDA if there is one")

    # The model and its SAE
    model: str = Field(description="packaged name, local folder or hub id")
    model_revision: str = Field("", description="hub revision; empty for the default branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the model; auto: bfloat16 where the hardware computes in it, else float32")
    layer: int = Field(ge=0, description="zero-based decoder layer after which the residual stream is read")
    sae: str = Field(description="folder in sae-lens format, release/sae_id of its registry, or 'train'")
    sae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision in which the SAE encodes")
    fold_norms: bool = Field(True, description="scale latents so that decoder norms are one")

    # Training an SAE (sae: train, and `sts stage sae`)
    sae_text: dict[str, int] = Field(default_factory=dict,
                                     description="text to train on: data set, corpus or file -> tokens")
    sae_latents: int = Field(4608, ge=1, description="width of the SAE to train")
    sae_k: int = Field(32, ge=1, description="active latents per token (TopK)")
    sae_samples: int = Field(6_000_000, ge=1, description="training samples, repeats counted")
    sae_lr: float = Field(4e-4, gt=0, description="peak learning rate of the SAE")
    context: int = Field(512, ge=16, description="longest piece of text the SAE trains on, in tokens")

    # The small SAE that the first chapter trains live, and the texts it is read on
    text_data: list[str] = Field(default_factory=list, description="question sets rendered as chats, for chapter one")
    text_examples: int = Field(300, ge=1, description="examples of each of them at most")
    small_sae_latents: int = Field(1152, ge=1, description="width of the small SAE")
    small_sae_k: int = Field(16, ge=1, description="active latents per token of the small SAE")
    small_sae_samples: int = Field(300_000, ge=1, description="training samples of the small SAE")
    splice_tokens: int = Field(12_000, ge=100, description="tokens on which the spliced-in loss is measured")

    # Data
    sft_data: str = Field(description="question set to fine-tune on, and whose shift is estimated; several in equal "
                                      "parts: gsm8k+math")
    domain_data: str = Field(description="question set whose domains are scored and evaluated")
    domain_split: str = Field("", description="its split; empty for the first")
    domains: list[str] = Field(default_factory=list, description="domains to keep; empty for all")
    domain_limit: int = Field(0, ge=0, description="questions a domain at most, drawn once for all seeds; 0 for all")

    # Which tokens count
    question_tokens_only: bool = Field(True, description="leave out chat template and special tokens")
    drop_first_positions: int = Field(1, ge=0, description="positions at the start of a prompt to leave out")
    outlier_norm: float = Field(10.0, ge=0, description="leave out tokens above this multiple of the median residual "
                                                        "norm; 0 keeps all")

    # The forecast
    shift_tokens: int = Field(20_000, ge=1, description="question tokens for the shifted dimensions, at most")
    shift_demonstrations: int = Field(2, ge=1, description="worked examples before an SFT question")
    demonstration_split: str = Field("", description="split of domain_data that demonstrations come from; empty: from "
                                                     "the questions themselves, which are then left out")
    demonstrations: int = Field(5, ge=1, description="worked examples before a domain's question (m)")
    demonstration_draws: int = Field(2, ge=1, description="how many different sets of them are averaged over")
    score_tokens: int = Field(10_000, ge=1, description="question tokens a domain, at most")
    top_n: int = Field(100, ge=1, description="how many shifted latents (N)")
    official_rows: int = Field(10_000, ge=1, description="rows compared in the official_code variant, at most")
    tokens_per_batch: int = Field(8192, ge=64, description="padded tokens in one forward pass, at most")

    # The actual shift, and how it compares with the forecast
    overlap_draws: int = Field(4, ge=1, description="sets of demonstrations behind which the shift is estimated one by "
                                                    "one, to see how much depends on them")
    overlap_tokens: int = Field(2_000, ge=1, description="question tokens behind each of those sets, at most")
    overlap_demonstrations: list[int] = Field(default_factory=lambda: [1, 2, 4, 8],
                                              description="numbers of demonstrations to compare")
    ablation_model: Literal["tuned", "base"] = Field("tuned", description="model whose latents are zeroed")
    ablation_examples: int = Field(16, ge=1, description="held-out training-domain problems scored with latents zeroed")
    ablation_latents: list[int] = Field(default_factory=lambda: [10, 100, 500],
                                        description="numbers of latents to zero")
    ablation_draws: int = Field(5, ge=2, description="random sets of latents of each kind and number; at least two, to "
                                                     "see how much they differ")

    # Fine-tuning
    sft_examples: int = Field(300, ge=1, description="training examples")
    sft_held_out: int = Field(40, ge=1, description="held-out examples of the training domain")
    sft_epochs: int = Field(1, ge=1, description="passes over them")
    sft_lr: float = Field(2e-4, gt=0, description="peak learning rate")
    sft_lr_tried: list[float] = Field(default_factory=list, description="learning rates that stage sft_trials compares "
                                                                        "on held-out training-domain problems")
    sft_trial_examples: int = Field(150, ge=1, description="training examples of each of these trials")
    sft_batch: int = Field(8, ge=1, description="examples a step")
    sft_micro_batch: int = Field(4, ge=1, description="examples in memory at once; gradients are added up to sft_batch")
    sft_max_length: int = Field(1024, ge=16, description="tokens an example at most")
    lora_rank: int = Field(32, ge=0, description="rank of the adapters; 0 for full fine-tuning")
    lora_alpha: int = Field(64, ge=1, description="their scale")

    # Evaluation and statistics
    eval_limit: int = Field(0, ge=0, description="questions a domain at most; 0 for all")
    eval_batch: int = Field(8, ge=1, description="questions in one evaluation batch")
    eval_kinds: list[Literal["letter", "option", "solution"]] = Field(
        default_factory=lambda: ["letter", "solution"], min_length=1,
        description="what log-likelihoods are taken of: the options' letters, their texts, the worked solution")
    opening_questions: int = Field(50, ge=0, description="questions a domain whose answer's opening words, 'The "
                                                         "answer is (', are scored by themselves; 0 for none")
    eval_generate: list[Literal["mmlu_pro", "gsm8k", "math", "sft_held_out"]] = Field(
        default_factory=list, description="what is answered in words as well: domain_data's questions by chain of "
                                          "thought (mmlu_pro), GSM8K, MATH, or the held-out problems of sft_data")
    eval_max_tokens: int = Field(1024, ge=1, description="tokens of a generated answer, at most")
    eval_backend: Literal["hf", "vllm"] = Field("hf", description="what generates answers: transformers, or vLLM")
    eval_tensor_parallel: int = Field(1, ge=1, description="GPUs that vLLM splits one copy of the model over")
    seeds: list[int] = Field(default_factory=list, description="seeds of further runs to compare with: demonstrations, "
                                                               "fine-tuning and evaluation are done again for each")
    training_sets: list[str] = Field(default_factory=list, description="further values of sft_data, to compare "
                                                                       "training domains: forecast, fine-tuning and "
                                                                       "evaluation are done again for each")
    training_seeds: list[int] = Field(default_factory=list, description="further seeds at which training sets are "
                                                                        "compared, sft_data among them")
    bootstrap: int = Field(5000, ge=100, description="bootstrap resamples")
    permutations: int = Field(100_000, ge=100, description="Monte Carlo permutations where exact ones are too many")
    baseline_draws: int = Field(500, ge=19, description="random sets of latents of each kind, and shuffled targets of "
                                                        "the probes, that baselines are compared with")

    # Ablations: other values of single settings, beside the run's own. An empty list leaves a sweep out.
    sweep_seeds: list[int] | None = Field(None, description="those of `seeds` that the ablations are repeated at; an "
                                                            "empty list for none of them, by default all")
    sweep_bands: int = Field(5, ge=1, description="rank bands of top_n latents each that are scored by themselves")
    sweep_top_n: list[int] = Field(default_factory=lambda: [10, 30, 100, 300, 1000],
                                   description="other numbers of latents N; those beyond the SAE's are left out")
    sweep_demonstrations: list[int] = Field(default_factory=list, description="other numbers of worked examples "
                                                                              "before a domain's question")
    sweep_shift_demonstrations: list[int] = Field(default_factory=list, description="other numbers of them before an "
                                                                                    "SFT question")
    sweep_tokens: list[int] = Field(default_factory=list, description="other values of score_tokens")
    sweep_shift_tokens: list[int] = Field(default_factory=list, description="other values of shift_tokens")
    sweep_masks: list[Literal["whole_prompt", "first_positions", "outliers", "none"]] = Field(
        default_factory=list, description="masks to switch off: count the whole prompt; that and its first positions; "
                                          "tokens of outlier norm; everything")
    sweep_widths: list[int] = Field(default_factory=list, description="widths of SAEs to train beside sae_latents")
    sweep_layers: list[int] = Field(default_factory=list, description="layers to train SAEs at beside layer")
    sweep_k: list[int] = Field(default_factory=list, description="active latents per token of SAEs to train beside "
                                                                 "sae_k")
    sweep_sae_samples: int = Field(600_000, ge=1, description="training samples of each SAE of the sweep")
    sweep_text_tokens: int = Field(400_000, ge=1000, description="tokens of sae_text that they all train on, its "
                                                                 "sources in proportion")

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        questions = {*SOURCES, *GENERATED}
        training = [("training_sets", mixture.split("+")) for mixture in self.training_sets]
        for key, names in (("sft_data", self.sft_data.split("+")), ("domain_data", [self.domain_data]), *training):
            for name in names:
                if name not in questions:
                    raise ValueError(f"{key}: data set {name!r} is not known; valid: {', '.join(sorted(questions))}")
            if len(set(names)) < len(names):
                raise ValueError(f"{key}: {'+'.join(names)!r} names a data set twice")
        if len(set(self.training_sets)) < len(self.training_sets):
            raise ValueError(f"training_sets: {self.training_sets} must be different training sets")
        for name in self.text_data:
            if name not in questions:
                raise ValueError(f"text_data: data set {name!r} is not known; valid: {', '.join(sorted(questions))}")
        for name, tokens in self.sae_text.items():
            base = name.partition(":")[0]
            if base not in questions | set(CORPORA) and not base.endswith((".txt", ".jsonl")):
                raise ValueError(f"sae_text: {name!r} is no corpus ({', '.join(CORPORA)}), question set or text file")
            if tokens < 1:
                raise ValueError(f"sae_text: {name!r} asks for {tokens} tokens")
        for key in ("overlap_demonstrations", "ablation_latents"):
            numbers = getattr(self, key)
            if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
                raise ValueError(f"{key}: {numbers} must be different numbers of at least 1")
        for key in ("seeds", "training_seeds"):
            numbers = getattr(self, key)
            if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
                raise ValueError(f"{key}: {numbers} must be different numbers of at least 0")
        if self.sae == "train" and not self.sae_text:
            raise ValueError("sae: 'train' needs sae_text, the text to train on")
        for k, width in (("sae_k", "sae_latents"), ("small_sae_k", "small_sae_latents")):
            if getattr(self, k) > getattr(self, width):
                raise ValueError(f"{k}: {getattr(self, k)} active latents of only {getattr(self, width)}")
        self._check_sweeps()
        return self

    def _check_sweeps(self) -> None:
        if unknown := [seed for seed in self.sweep_seeds or [] if seed not in self.seeds]:
            raise ValueError(f"sweep_seeds: {unknown} must be among the run's seeds, {self.seeds}")
        for key in (name for name in type(self).model_fields if name.startswith("sweep_")):
            values = getattr(self, key)
            if not isinstance(values, list):
                continue
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} names a value twice")
            least = 0 if key in ("sweep_layers", "sweep_seeds") else 1
            if any(isinstance(value, int) and value < least for value in values):
                raise ValueError(f"{key}: {values} must be numbers of at least {least}")
        if (self.sweep_widths or self.sweep_layers or self.sweep_k) and not self.sae_text:
            raise ValueError("sweep_widths, sweep_layers and sweep_k train SAEs, and sae_text names no text for that")
        for key, k, width in (("sweep_k", max(self.sweep_k, default=0), self.sae_latents),
                              ("sweep_widths", self.sae_k, min(self.sweep_widths, default=self.sae_k))):
            if k > width:
                raise ValueError(f"{key}: {k} active latents of only {width}")


class _Loader(yaml.SafeLoader):
    """YAML that reads 4e-4 as a number (YAML 1.1 alone takes it for a word), and in which no key stands twice."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        """PyYAML keeps the last of two equal keys and says nothing, though YAML forbids them."""
        first: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} stands twice, on lines {first[key]} and {line}; keep one of them")
            first[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """A YAML text's value; raises `yaml.YAMLError`, also for a key that stands twice in one mapping."""
    return yaml.load(text, Loader=_Loader)


def available_runs() -> list[str]:
    """Names of the profiles in runs/."""
    return sorted(path.stem for path in (ROOT / "runs").glob("*.yaml"))


def load_run(run: str | Run = "laptop", overrides: Mapping[str, Any] | None = None) -> Run:
    """Read a run profile and apply overrides.

    Args:
        run: a name in runs/, the path of a YAML file, or a `Run`.
        overrides: key -> value; None values are left out (the profile's own value stays).

    Raises:
        StsError: no such profile, an unknown key, a wrong type or an impossible value; names the key.
    """
    if isinstance(run, Run):
        settings = run.model_dump()
    else:
        path = Path(run) if run.endswith((".yaml", ".yml")) else ROOT / "runs" / f"{run}.yaml"
        if not path.is_file() and path.parent != ROOT / "runs":
            raise StsError(f"Run profile {run!r}: there is no such file. By name: {', '.join(available_runs())}.")
        if not path.is_file():
            raise StsError(f"Run profile {run!r} is not known. Valid: {', '.join(available_runs())}, "
                           "or the path of a YAML file.")
        try:
            settings = read_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StsError(f"{path.name} is not valid YAML in UTF-8: {error}") from error
        if not isinstance(settings, dict):
            raise StsError(f"{path.name} must hold `key: value` lines.")
        settings = {"name": path.stem, **settings}
    settings.update({key: value for key, value in (overrides or {}).items() if value is not None})
    try:
        return Run.model_validate(settings)
    except ValidationError as error:
        raise StsError("\n".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: dict) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "invalid_key"):  # YAML reads `on:` as the key True
        return (f"Setting {key!r} is not known. Valid: {', '.join(sorted(Run.model_fields))}."
                f"{did_you_mean(key, Run.model_fields)}")
    if problem["type"] == "missing":
        return f"Setting {key!r} is missing: {Run.model_fields[key].description}."
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"Setting {message}."
    meaning = Run.model_fields[key.split(".")[0]].description
    as_list = f" Write [{problem['input']}]." if problem["type"] == "list_type" else ""
    return f"Setting {key!r} ({meaning}): {message}; got {problem['input']!r}.{as_list}"
