"""What a run reads: its model and its data, loaded when first needed and kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sts.data.load import Example, by_domain, digest, load_examples, load_mixture
from sts.engine.models import LanguageModel, bf16_is_fast, check_layer, load_model, resolve_model
from sts.errors import StsError
from sts.run.settings import Run

#: What runs that differ in their seed or in settings of the forecast have in common.
SHARED = ("lm", "loaded_sae", "identity:model", "identity:sae_text")


class Inputs:
    """The model and the data sets that a run's settings name."""

    def __init__(self, settings: Run, results: Path):
        self.settings = settings
        if settings.dtype == "auto":  # resolved here, so that keys and provenance hold what was used
            dtype = "bfloat16" if bf16_is_fast(self.device) else "float32"
            self.settings = settings.model_copy(update={"dtype": dtype})
        self.results = results
        self._memory: dict[str, Any] = {}
        #: What runs that differ in seed or training set alone share: the models in memory and the weights' digest.
        self._shared: dict[str, Any] = {}

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        memory = self._shared if name in SHARED else self._memory
        if name not in memory:
            memory[name] = compute()
        return memory[name]

    def _not_recorded_alone(self, what: str) -> None:
        if self._shared.get("recorded_alone"):
            raise StsError(f"Of run {self.settings.name!r} the recorded results alone are asked for, not its {what}.")

    def data_identity(self, what: str) -> str | None:
        """A digest of the model or of examples that the settings name; None if `what` is none of them."""
        settings = self.settings
        if what == "model":
            return resolve_model(settings.model, settings.model_revision, self.results / "models")[1]
        if what in ("sft_train", "sft_held_out"):
            return digest(self.sft_examples(what.removeprefix("sft_")))
        if what == "domain_data":
            return digest([example for group in self.domain_examples().values() for example in group])
        if what == "demonstrations":
            return digest([example for group in self.demonstration_pool().values() for example in group])
        if what == "text_data":
            return digest(self.text_examples())
        return None

    # --- model

    @cached_property
    def device(self) -> str:
        """The torch device that models run on."""
        if self.settings.device == "cuda" and not torch.cuda.is_available():
            raise StsError("Setting device 'cuda': this machine has no GPU that PyTorch can use. Use auto or cpu.")
        if self.settings.device != "auto":
            return self.settings.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def load_model(self, dtype: str = "") -> LanguageModel:
        """A fresh copy of the run's model, for stages that change it; checked to have the run's layer."""
        settings = self.settings
        self._not_recorded_alone("model")
        lm = load_model(settings.model, revision=settings.model_revision, dtype=dtype or settings.dtype,
                        device=self.device, cache=self.results / "models")
        check_layer(lm.model, settings.layer)
        return lm

    @property
    def lm(self) -> LanguageModel:
        """The run's model, loaded once and never changed."""
        return self._once("lm", self.load_model)

    # --- data

    def _data(self, name: str, load: Callable[[], Any]) -> Any:
        self._not_recorded_alone("data")
        return self._once(f"data:{name}", load)

    def sft_examples(self, part: str) -> list[Example]:
        """The fine-tuning set: `train`, or `held_out` of the same data set, never trained on."""
        settings = self.settings
        count = settings.sft_examples + settings.sft_held_out
        examples = self._data("sft", lambda: load_mixture(settings.sft_data, count, seed=settings.seed))
        cut = max(1, len(examples) - settings.sft_held_out)
        return examples[:cut] if part == "train" else examples[cut:]

    def domain_examples(self) -> dict[str, list[Example]]:
        """The questions of each domain."""
        settings = self.settings

        def load() -> dict[str, list[Example]]:
            groups = by_domain(load_examples(settings.domain_data, split=settings.domain_split),
                               tuple(settings.domains))
            if settings.domain_limit:
                # Not by the run's seed: runs that differ in it answer the same questions, and are compared by item.
                groups = {domain: random.Random(0).sample(group, min(len(group), settings.domain_limit))
                          for domain, group in groups.items()}
            return groups

        return self._data("domains", load)

    def demonstration_pool(self) -> dict[str, list[Example]]:
        """Examples set aside for demonstrations, by domain; empty if they come from the questions themselves."""
        settings = self.settings
        if not settings.demonstration_split:
            return {}
        return self._data("demonstrations", lambda: by_domain(
            load_examples(settings.domain_data, split=settings.demonstration_split), tuple(settings.domains)))

    def text_examples(self) -> list[Example]:
        """The questions and solutions that the first chapter reads the SAE on."""
        settings = self.settings
        return self._data("text", lambda: [
            example for name in settings.text_data
            for example in load_examples(name, limit=settings.text_examples, seed=settings.seed + 7)])
