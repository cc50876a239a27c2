"""Stages: every result of the book by name, computed once and remembered.

`run.get("scores")` loads the stage if it is stored, else computes it, and first whatever it needs. A stage's key is
made of the settings it uses, the keys of the stages it needs, the digests of its data and weights, and a version
that its author raises when its meaning changes; so a changed setting recomputes what depends on it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sts.data.load import digest, without_hub
from sts.engine import processes
from sts.engine.saes import check_fits, known_width, load_sae, sae_folder, sae_identity
from sts.errors import MissingData, StsError, one_of
from sts.measure.shift import check_top_n
from sts.run.progress import Reporter
from sts.run.provenance import environment, peak_memory_mb
from sts.run.recorded import recorded_key
from sts.run.resources import Inputs
from sts.run.settings import ROOT, Run, load_run
from sts.run.store import Store, read

#: Settings of the forecast that leave the model, the SAE and the data as they are.
FORECAST = ("top_n", "shift_tokens", "shift_demonstrations", "score_tokens", "demonstrations", "question_tokens_only",
            "drop_first_positions", "outlier_norm")


@dataclass(frozen=True)
class Stage:
    """A named result: how to compute it, and what it depends on."""

    name: str
    compute: Callable[[OpenRun, Reporter], Any]
    kind: str
    uses: tuple[str, ...]
    needs: tuple[str, ...]
    inputs: tuple[str, ...]
    version: int
    parallel: bool
    summary: str


STAGES: dict[str, Stage] = {}
#: What is read, of `OpenRun.identity`, without a model and without data sets.
WITHIN = ("sae", "seeds", "training_sets")


def stage(kind: str, *, uses: tuple[str, ...] = (), needs: tuple[str, ...] = (), inputs: tuple[str, ...] = (),
          version: int = 1, parallel: bool = False) -> Callable:
    """Register a function `(run, report) -> result` as a stage of its own name.

    Args:
        kind: how the result is stored: json, parquet, tensors or folder.
        uses: settings of `config.Run` that it reads.
        needs: stages that it calls for through `run.get`.
        inputs: what it reads from outside: see `OpenRun.identity`.
        version: raise it when the meaning of the result changes.
        parallel: whether all processes of an `accelerate launch` compute it together. The main one's result is stored.
    """
    def register(function: Callable) -> Callable:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        STAGES[function.__name__] = Stage(function.__name__, function, kind, uses, needs, inputs, version, parallel,
                                          summary)
        return function
    return register


def registered() -> dict[str, Stage]:
    """All stages by name; the modules that define them register them when they are imported."""
    from sts.stages import answers as pipeline_answers  # noqa: F401
    from sts.stages import baselines as pipeline_baselines  # noqa: F401
    from sts.stages import choices as pipeline_choices  # noqa: F401
    from sts.stages import comparison as pipeline_comparison  # noqa: F401
    from sts.stages import domains as pipeline_domains  # noqa: F401
    from sts.stages import forecast as pipeline  # noqa: F401
    from sts.stages import generation as pipeline_generation  # noqa: F401
    from sts.stages import hardness as pipeline_hardness  # noqa: F401
    from sts.stages import sae as pipeline_sae  # noqa: F401
    from sts.stages import shift as pipeline_shift  # noqa: F401
    from sts.stages import sweeps as pipeline_sweeps  # noqa: F401
    from sts.stages import zeroing as pipeline_zero  # noqa: F401

    return STAGES


def results_folder() -> Path:
    """Where generated things go: STS_RESULTS, or results/ in the repository."""
    return Path(os.environ.get("STS_RESULTS") or ROOT / "results").expanduser().resolve()


class OpenRun(Inputs):
    """A run profile with its store, models and data, loaded when first needed."""

    def __init__(self, settings: Run, *, results: Path | None = None, changed: Mapping[str, Any] | None = None):
        super().__init__(settings, Path(results) if results else results_folder())
        #: Settings that differ from the profile's own, for the page to say so.
        self.changed = dict(changed or {})
        self.folder = self.results / settings.name
        self.store = Store(self.folder / "stages", (ROOT / "data" / "recorded" / settings.name,))
        #: Whose SAE it is, if the run trains one: of several seeds or training sets, the first one's.
        self._first = self
        self._used: list[str] = []

    # --- stages

    def key(self, name: str) -> str:
        """The stage's key under the present settings: twelve hexadecimal digits."""
        if name == "sae" and self._first is not self:
            return self._first.key(name)
        return self._once(f"key:{name}", lambda: self._key(self._spec(name)))

    def _key(self, spec: Stage) -> str:
        uses = {setting: getattr(self.settings, setting) for setting in spec.uses}
        needs = {need: self.key(need) for need in self._needs(spec)}
        try:
            with without_hub():
                inputs = {what: self.identity(what) for what in spec.inputs}
        except StsError:  # the model or the data are not here; recorded results do not need them
            with without_hub():
                recorded = recorded_key(self, spec, uses, needs)
            if recorded is not None:
                return recorded
            try:
                inputs = {what: self.identity(what) for what in spec.inputs}
            except MissingData as error:
                raise self._beyond_recorded(spec, error) from error
        content = {"stage": spec.name, "version": spec.version, "kind": spec.kind, "uses": uses, "needs": needs,
                   "inputs": inputs}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def get(self, name: str) -> Any:
        """The stage's result: from memory, from the store, or computed now and stored."""
        if name == "sae" and self._first is not self:
            return self._first.get(name)
        spec, key = self._spec(name), self.key(name)
        if name not in self._used:
            self._used.append(name)
        if f"{name}-{key}" in self._memory:
            return self._memory[f"{name}-{key}"]
        try:
            path = self.store.find(name, key, spec.kind) or self.compute(name)
        except MissingData as error:
            raise self._beyond_recorded(spec, error) from error
        self._memory[f"{name}-{key}"] = result = read(path, spec.kind)
        return result

    def compute(self, name: str) -> Path:
        """Compute the stage, and first what it needs and is not there; the path of the result, which is stored.

        Raises:
            StsError: several processes were launched for a stage that one computes.
        """
        self._not_recorded_alone(f"stage {name} anew")
        spec, key = self._spec(name), self.key(name)
        if processes.count() > 1 and not spec.parallel:
            together = ", ".join(name for name, one in STAGES.items() if one.parallel)
            raise StsError(f"Stage {name!r} runs in one process and {processes.count()} were launched. Start it "
                           f"without accelerate launch; several processes compute these stages: {together}.")
        for need in self._needs(spec):
            self.get(need)
        return self._compute(spec, key)

    def stored(self, name: str) -> bool:
        """Whether the stage's result is there under the present settings."""
        return self.store.find(name, self.key(name), self._spec(name).kind) is not None

    def scratch(self, name: str) -> Path:
        """The stage's folder for unfinished work; a stage of kind `folder` returns it as its result."""
        return self.store.scratch(name, self.key(name))

    def provenance(self, name: str) -> dict[str, Any]:
        """What is recorded about the stage's stored result."""
        return self.store.provenance(name, self.key(name), self._spec(name).kind)

    def computed(self, name: str) -> dict[str, Any]:
        """The provenance of the stage's result, which is computed if no record of it is there.

        Unlike `get`, it is satisfied with a result that was recorded without its data.
        """
        if name not in self._used:
            self._used.append(name)
        if not self.provenance(name):
            self.get(name)
        return self.provenance(name)

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the stages asked for so far and of all that they rest on, each after what it needs."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            if name not in ordered:
                for need in self._needs(self._spec(name)):
                    visit(need)
                ordered.append(name)

        for name in self._used:
            visit(name)
        return tuple(ordered)

    def _beyond_recorded(self, spec: Stage, error: MissingData) -> StsError:
        """The error, with the reason that data are asked for at all where the run is shown from recorded results."""
        if not any(folder.is_dir() for folder in self.store.recorded):
            return error
        changed = f" with {', '.join(f'{name} = {value}' for name, value in self.changed.items())}" * bool(self.changed)
        return StsError(f"Of run {self.settings.name!r}, the result of stage {spec.name!r}{changed} is not recorded, "
                        f"or not whole; computing it needs the model and the data. {error}")

    def _spec(self, name: str) -> Stage:
        known = registered()
        if name not in known:
            raise one_of("Stage", name, known)
        return known[name]

    def _needs(self, spec: Stage) -> tuple[str, ...]:
        trained = ("sae",) if "sae" in spec.inputs and self.settings.sae == "train" else ()
        return (*trained, *spec.needs)

    def _compute(self, spec: Stage, key: str) -> Path:
        together = processes.join(cpu=self.device == "cpu")
        report = Reporter(spec.name, shown=processes.is_main())
        with warnings.catch_warnings():
            # Libraries' notes to their own developers would end up on the pages.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            value = spec.compute(self, report)
        seconds = report.done()
        if together is None:
            return self._write(spec, key, value, seconds, report)
        if together.is_main_process:
            self._write(spec, key, value, seconds, report)
        together.wait_for_everyone()
        path = self.store.find(spec.name, key, spec.kind)
        if path is None:
            raise StsError(f"Stage {spec.name!r} was computed and is not in {self.store.folder}. Machines that compute "
                           "together must share the folder for results (STS_RESULTS).")
        return path

    def _write(self, spec: Stage, key: str, value: Any, seconds: float, report: Reporter) -> Path:
        return self.store.write(spec.name, key, spec.kind, value, {
            "stage": spec.name, "key": key, "version": spec.version, "run": self.settings.name,
            "settings": {setting: getattr(self.settings, setting) for setting in spec.uses},
            "needs": {need: self.key(need) for need in self._needs(spec)},
            "inputs": {what: self.identity(what) for what in spec.inputs},
            "seed": self.settings.seed, "seconds": round(seconds, 2),
            "work": report.work.to_dict(),
            "process_peak_memory_mb": peak_memory_mb(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment(self.device)})

    # --- inputs

    def identity(self, what: str) -> str:
        """A digest of something a stage reads: model, sae, or the data sets named by a setting."""
        return self._once(f"identity:{what}", lambda: self._identity(what))

    def known_identity(self, what: str) -> str | None:
        """`identity`, or None where what it is worked out from is not here."""
        try:
            return self.identity(what)
        except StsError:
            return None

    def _identity(self, what: str) -> str:
        settings = self.settings
        if what not in WITHIN:
            self._not_recorded_alone(what)
        if (found := self.data_identity(what)) is not None:
            return found
        if what == "sae":
            return f"trained:{self.key('sae')}" if settings.sae == "train" else sae_identity(self._sae_name)
        if what == "seeds":
            keys = [self.with_seed(seed).key(name) for seed in self.other_seeds
                    for name in ("correlations", "extreme_correlations")]
            return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
        if what == "training_sets":
            from sts.stages.domains import EVERY_SET, training_runs

            keys = [own.key(name) for own in training_runs(self).values() for name in EVERY_SET]
            return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
        if what == "sae_text":
            from sts.stages.sae import sae_documents

            return digest([text for name in settings.sae_text for text in sae_documents(self, name)])
        if what == "trial_problems":
            from sts.stages.choices import trial_run

            trial = trial_run(self)
            return digest([*trial.sft_examples("train"), *trial.sft_examples("held_out")])
        if what == "generation_data":
            from sts.stages.generation import generation_questions

            return digest([example for _, *parts in generation_questions(self).values() for part in parts
                           for example in part])
        raise one_of("Input", what, ("model", "sae", "sft_train", "sft_held_out", "domain_data", "demonstrations",
                                     "text_data", "sae_text", "generation_data", "trial_problems", "seeds",
                                     "training_sets"))

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """The seeds of setting `seeds` that are not this run's own."""
        return tuple(seed for seed in self.settings.seeds if seed != self.settings.seed)

    def with_seed(self, seed: int) -> OpenRun:
        """The same run with another seed, sharing the store and the models in memory; the SAE stays the same one."""
        if seed == self.settings.seed:
            return self
        return self._sibling(f"seed:{seed}", seed=seed, seeds=[], sweep_seeds=None)

    def with_seeds(self, seeds: Sequence[int]) -> OpenRun:
        """The same run with other `seeds` to compare with, sharing the store, the models in memory and the SAE."""
        return self._sibling(f"seeds:{list(seeds)}", seeds=list(seeds), sweep_seeds=None)

    def recorded_alone(self) -> OpenRun:
        """The same run with nothing but what is there of it: no stage is computed, no model or data fetched or read.

        What would need them raises StsError.
        """
        other = OpenRun(self.settings, results=self.results, changed=self.changed)
        other._shared["recorded_alone"] = True
        return other

    def with_training(self, name: str) -> OpenRun:
        """The same run fine-tuned on another training set, sharing the store, the models in memory and the SAE.

        Raises:
            StsError: no such data set.
        """
        if name == self.settings.sft_data:
            return self
        load_run(self.settings, {"sft_data": name})  # a wrong name is said here
        return self._sibling(f"training:{name}", sft_data=name, seeds=[], sweep_seeds=None)

    def with_training_sets(self, names: list[str]) -> OpenRun:
        """The same run with other `training_sets` to compare, sharing the store, the models in memory and the SAE."""
        return self._sibling(f"training_sets:{names}", training_sets=names)

    def _sibling(self, name: str, **changes: Any) -> OpenRun:
        if name not in self._memory:
            other = OpenRun(self.settings.model_copy(update=changes), results=self.results, changed=self.changed)
            other.store, other._shared, other._first = self.store, self._shared, self._first
            self._memory[name] = other
        return self._memory[name]

    def with_forecast(self, **changes: Any) -> OpenRun:
        """The same run with other settings of the forecast (`FORECAST`), sharing store, models, SAE and data.

        Raises:
            StsError: a value that the setting does not take.
        """
        if unknown := changes.keys() - set(FORECAST):
            raise ValueError(f"{sorted(unknown)} would change more than the forecast")
        other = OpenRun(load_run(self.settings, changes), results=self.results, changed=self.changed | changes)
        other._shared, other._first = self._shared, self._first
        keys_of_forecasts = ("identity:seeds", "identity:training_sets")
        other._memory = {name: value for name, value in self._memory.items()
                         if name.startswith(("data:", "identity:")) and name not in keys_of_forecasts}
        return other

    @property
    def sae_folder(self) -> Path | None:
        """The folder of the run's SAE; None if it comes from sae-lens' registry."""
        if self.settings.sae == "train":
            return self.get("sae")
        return sae_folder(self.settings.sae)

    @property
    def _sae_name(self) -> str:
        folder = self.sae_folder
        if folder and self.settings.sae == "train" and not (folder / "cfg.json").is_file():
            raise StsError(f"{folder.name} was recorded without its weights. To train it here: sts stage sae --again, "
                           "with the same run and parameters.")
        return str(folder or self.settings.sae)

    def sae(self):
        """The run's SAE, checked to fit the model and the layer.

        Raises:
            StsError: it was recorded without its weights, or it does not fit.
        """
        sae = self._once("loaded_sae", lambda: load_sae(self._sae_name, device=self.device,
                                                        dtype=self.settings.sae_dtype,
                                                        fold_norms=self.settings.fold_norms))
        check_fits(sae, self.lm, self.settings.layer)
        check_top_n(self.settings.top_n, sae.cfg.d_sae)
        return sae

def open_run(run: str | Run = "laptop", *, results: Path | None = None, **overrides: Any) -> OpenRun:
    """Open a run profile.

    Args:
        run: a name in runs/, the path of a YAML file, or a validated `Run`.
        results: folder for results; STS_RESULTS or results/ by default.
        overrides: settings to change; None leaves the profile's own value.

    Raises:
        StsError: wrong settings, an unknown SAE, or a top_n beyond the SAE's width if that is known.
    """
    settings, profile = load_run(run, overrides), load_run(run)
    if settings.sae != "train" and not (ROOT / settings.sae / "cfg.json").is_file():
        sae_identity(settings.sae)  # a wrong name is said now, not after minutes of work
    width = settings.sae_latents if settings.sae == "train" else known_width(settings.sae)
    if width:
        check_top_n(settings.top_n, width)
    changed = {name: value for name in overrides if (value := getattr(settings, name)) != getattr(profile, name)}
    return OpenRun(settings, results=results, changed=changed)
