"""An open run: a profile with its results, each a stage computed once and found again.

`run.get("scores")` loads the stage if it is stored, else computes it, and first whatever it needs. A stage's key is
made of the settings it uses, the keys of the stages it needs, the digests of its data and weights, and a version
that its author raises when its meaning changes; so a changed setting recomputes what depends on it and nothing else.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sts.errors import ROOT, MissingData, StsError, one_of
from sts.run import resources
from sts.run.log import Reporter, environment, peak_memory_mb
from sts.run.recorded import recorded_key
from sts.run.settings import Run, load_run
from sts.run.stage import STAGES, Stage
from sts.run.stage import key as key_of
from sts.run.store import Store, read


def registered() -> dict[str, Stage]:
    """All stages by name; whoever opens a run has imported `sts.stages`, which registers them."""
    if not STAGES:
        raise StsError("No stages are registered: import sts.stages first (sts.open_run does).")
    return STAGES


def results_folder() -> Path:
    """Where generated things go: STS_RESULTS, or results/ in the repository."""
    return Path(os.environ.get("STS_RESULTS") or ROOT / "results").expanduser().resolve()


class OpenRun:
    """A run profile with its store, models and data, loaded when first needed."""

    def __init__(self, settings: Run, *, results: Path | None = None, changed: Mapping[str, Any] | None = None):
        self.results = Path(results) if results else results_folder()
        #: Settings that differ from the profile's own, for the page to say so.
        self.changed = dict(changed or {})
        self.settings = settings
        #: What variants of one run share: everything read or loaded, by the settings that decide it; and the first one,
        #: whose trained SAE they all read.
        self._memory: dict[tuple, Any] = {}
        self._first = self
        self._keys: dict[str, str] = {}
        self._used: list[str] = []
        self.recorded_alone = False
        if settings.dtype == "auto":  # resolved here, so that keys and provenance hold what was used
            from sts.engine.models import bf16_is_fast

            dtype = "bfloat16" if bf16_is_fast(self.device) else "float32"
            self.settings = settings.model_copy(update={"dtype": dtype})
        self.folder = self.results / settings.name
        self.store = Store(self.folder / "stages", (ROOT / "data" / "recorded" / settings.name,))

    def once(self, what: str, decided_by: tuple[str, ...], make: Callable[[], Any], *more: Any) -> Any:
        """Something loaded or read once for all variants whose settings `decided_by` are equal."""
        place = (what, *(repr(getattr(self.settings, name)) for name in decided_by), *more)
        if place not in self._memory:
            if self.recorded_alone:
                raise StsError(f"Of run {self.settings.name!r} the recorded results alone are asked for, not its {what}.")
            self._memory[place] = make()
        return self._memory[place]

    @property
    def device(self) -> str:
        """The torch device that models run on."""
        wanted = self.settings.device
        if wanted == "cpu":
            return wanted
        import torch

        if wanted == "cuda" and not torch.cuda.is_available():
            raise StsError("Setting device 'cuda': this machine has no GPU that PyTorch can use. Use auto or cpu.")
        return "cuda" if torch.cuda.is_available() else "cpu"

    # --- variants

    def variant(self, **changes: Any) -> OpenRun:
        """The same run with other settings, sharing the store, the SAE, and what is loaded where it is the same.

        Raises:
            StsError: an unknown setting, or a value that it does not take.
        """
        other = OpenRun(load_run(self.settings, changes, allow_none=True), results=self.results,
                        changed={**self.changed, **changes})
        other.store, other._memory, other._first = self.store, self._memory, self._first
        other.recorded_alone = self.recorded_alone
        return other

    def results_of(self, **changes: Any) -> Mapping[str, Any]:
        """Results of the run with other settings, by stage, each computed when it is asked for."""
        class Results(dict):
            def __missing__(self, name: str, other: OpenRun = self.variant(**changes)) -> Any:
                return other.get(name)
        return Results()

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """The seeds of setting `seeds` that are not this run's own."""
        return tuple(seed for seed in self.settings.seeds if seed != self.settings.seed)

    def only_recorded(self) -> OpenRun:
        """The same run with nothing but what is there of it: no stage is computed, no model or data read."""
        other = OpenRun(self.settings, results=self.results, changed=self.changed)
        other.recorded_alone = True
        return other

    # --- stages

    def spec(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            StsError: there is none.
        """
        if name not in registered():
            raise one_of("Stage", name, registered())
        return STAGES[name]

    def needs(self, name: str) -> tuple[str, ...]:
        """The stages that a stage is computed from."""
        spec = self.spec(name)
        trained = ("sae",) if "sae" in spec.inputs and self.settings.sae == "train" else ()
        return (*trained, *spec.needs)

    def key(self, name: str) -> str:
        """The stage's key under the present settings: twelve hexadecimal digits."""
        if name == "sae" and self._first is not self:
            return self._first.key(name)
        if name not in self._keys:
            self._keys[name] = self._key(self.spec(name))
        return self._keys[name]

    def _key(self, spec: Stage) -> str:
        from sts.data.load import without_hub

        uses = {setting: getattr(self.settings, setting) for setting in spec.uses}
        needs = {need: self.key(need) for need in self.needs(spec.name)}
        try:
            with without_hub():
                return key_of(spec, uses, needs, {what: self.identity(what) for what in spec.inputs})
        except StsError:  # the model or the data are not here; recorded results do not need them
            with without_hub():
                recorded = recorded_key(self, spec, uses, needs)
            if recorded is not None:
                return recorded
        try:
            return key_of(spec, uses, needs, {what: self.identity(what) for what in spec.inputs})
        except MissingData as error:
            raise self._beyond_recorded(spec, error) from error

    def identity(self, what: str) -> str:
        """A digest of what a stage reads from outside (`resources.identity`)."""
        if what in ("sae", "seeds", "training_sets"):
            return resources.identity(self, what)
        return self.once(f"digest of {what}", resources.DECIDED_BY[what], lambda: resources.identity(self, what))

    def known(self, what: str) -> str | None:
        """`identity`, or None where what it is worked out from is not here."""
        try:
            return self.identity(what)
        except StsError:
            return None

    def get(self, name: str) -> Any:
        """The stage's result: from memory, from the store, or computed now and stored."""
        if name == "sae" and self._first is not self:
            return self._first.get(name)
        spec, key = self.spec(name), self.key(name)
        if name not in self._used:
            self._used.append(name)
        if (place := ("result", name, key)) not in self._memory:
            try:
                path = self.store.find(name, key, spec.kind) or self.compute(name)
            except MissingData as error:
                raise self._beyond_recorded(spec, error) from error
            self._memory[place] = read(path, spec.kind)
        return self._memory[place]

    def stored(self, name: str) -> bool:
        """Whether the stage's result is there under the present settings."""
        return self.store.find(name, self.key(name), self.spec(name).kind) is not None

    def scratch(self, name: str) -> Path:
        """The stage's folder for unfinished work; a stage of kind `folder` returns it as its result."""
        return self.store.scratch(name, self.key(name))

    def provenance(self, name: str) -> dict[str, Any]:
        """What is recorded about the stage's stored result."""
        return self.store.provenance(name, self.key(name), self.spec(name).kind)

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the stages asked for so far and of all that they rest on, each after what it needs."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            if name not in ordered:
                for need in self.needs(name):
                    visit(need)
                ordered.append(name)

        for name in self._used:
            visit(name)
        return tuple(ordered)

    def compute(self, name: str) -> Path:
        """Compute the stage, and first what it needs and is not there; the path of the result, which is stored.

        Of two processes at one stage the second waits for the first and takes its result.

        Raises:
            StsError: several processes were launched for a stage that one computes.
        """
        from sts.engine import processes

        if self.recorded_alone:
            raise StsError(f"Of run {self.settings.name!r} the recorded results alone are asked for, not stage {name!r} anew.")
        spec, key = self.spec(name), self.key(name)
        if processes.count() > 1 and not spec.parallel:
            together = ", ".join(one.name for one in STAGES.values() if one.parallel)
            raise StsError(f"Stage {name!r} runs in one process and {processes.count()} were launched. Start it "
                           f"without accelerate launch; several processes compute these stages: {together}.")
        for need in self.needs(name):
            if not self.stored(need):
                self.get(need)
        began = time.time()
        with self.store.lease(name, key, shared=spec.parallel):
            found = self.store.find(name, key, spec.kind)
            if found and found.with_name(found.name + ".provenance.json").stat().st_mtime >= began:
                return found  # another process computed it while this one waited
            return self._compute(spec, key)

    def _compute(self, spec: Stage, key: str) -> Path:
        from sts.engine import processes

        together = processes.join(cpu=self.device == "cpu") if spec.parallel else None
        report = Reporter(spec.name, shown=processes.is_main())
        with warnings.catch_warnings():
            # Libraries' notes to their own developers would end up on the pages.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            value = spec.compute(**resources.stage_values(self, spec, report))
        seconds = report.done()
        if together is None or together.is_main_process:
            path = self._write(spec, key, value, seconds, report)
        if together is not None:
            together.wait_for_everyone()
            path = self.store.find(spec.name, key, spec.kind)
            if path is None:
                raise StsError(f"Stage {spec.name!r} was computed and is not in {self.store.folder}. Machines that "
                               "compute together must share the folder for results (STS_RESULTS).")
        return path

    def _write(self, spec: Stage, key: str, value: Any, seconds: float, report: Reporter) -> Path:
        return self.store.write(spec.name, key, spec.kind, value, {
            "stage": spec.name, "key": key, "version": spec.version, "run": self.settings.name,
            "settings": {setting: getattr(self.settings, setting) for setting in spec.uses},
            "needs": {need: self.key(need) for need in self.needs(spec.name)},
            "inputs": {what: self.identity(what) for what in spec.inputs},
            "seed": self.settings.seed, "seconds": round(seconds, 2), "work": report.work.to_dict(),
            "process_peak_memory_mb": peak_memory_mb(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment(self.device)})

    def _beyond_recorded(self, spec: Stage, error: StsError) -> StsError:
        """The error, with the reason that data are asked for at all where the run is shown from recorded results."""
        if not any(folder.is_dir() for folder in self.store.recorded):
            return error
        changed = f" with {', '.join(f'{name} = {value}' for name, value in self.changed.items())}" * bool(self.changed)
        return StsError(f"Of run {self.settings.name!r}, the result of stage {spec.name!r}{changed} is not recorded, "
                        f"or not whole; computing it needs the model and the data. {error}")

    # --- the SAE

    @property
    def sae_folder(self) -> Path | None:
        """The folder of the run's SAE; None if it comes from sae-lens' registry, or is not trained yet."""
        from sts.engine.saes import sae_folder

        if self.settings.sae == "train":
            return self.get("sae") if self.stored("sae") else None
        return sae_folder(self.settings.sae)

    def sae_name(self) -> str:
        """What `engine.saes.load_sae` takes; trains the SAE first where the run says so.

        Raises:
            StsError: it was recorded without its weights.
        """
        if self.settings.sae != "train":
            return str(self.sae_folder or self.settings.sae)
        folder = self.get("sae")
        if not (folder / "cfg.json").is_file():
            raise StsError(f"{folder.name} was recorded without its weights. To train it here: sts stage sae --again, "
                           "with the same run and parameters.")
        return str(folder)


def open_run(run: str | Run = "laptop", *, results: Path | None = None, **overrides: Any) -> OpenRun:
    """Open a run profile.

    Args:
        run: a name in runs/, the path of a YAML file, or a validated `Run`.
        results: folder for results; STS_RESULTS or results/ by default.
        overrides: settings to change; None leaves the profile's own value.

    Raises:
        StsError: wrong settings, an unknown SAE, or a top_n beyond the SAE's width if that is known.
    """
    from sts.engine.saes import known_width, sae_identity
    from sts.measure.shift import check_top_n

    settings, profile = load_run(run, overrides), load_run(run)
    if settings.sae != "train" and not (ROOT / settings.sae / "cfg.json").is_file():
        sae_identity(settings.sae)  # a wrong name is said now, not after minutes of work
    width = settings.sae_latents if settings.sae == "train" else known_width(settings.sae)
    if width:
        check_top_n(settings.top_n, width)
    changed = {name: value for name in overrides if (value := getattr(settings, name)) != getattr(profile, name)}
    return OpenRun(settings, results=results, changed=changed)
