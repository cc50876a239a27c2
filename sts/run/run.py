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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sts.errors import ROOT, MissingData, StsError, one_of
from sts.run import resources
from sts.run.log import Reporter, environment, peak_memory_mb
from sts.run.recorded import provenances, recorded_key
from sts.run.settings import Run, load_run
from sts.run.stage import STAGES, Stage, values
from sts.run.stage import key as key_of
from sts.run.store import Store, read


def results_folder() -> Path:
    """Where generated things go: STS_RESULTS, or results/ in the repository."""
    return Path(os.environ.get("STS_RESULTS") or ROOT / "results").expanduser().resolve()


class OpenRun:
    """A run profile with its store, models and data, loaded when first needed.

    Args:
        changed: settings that differ from the profile's own, for the page to say so.
        parent: the run that this is a variant of: store, models, data and results in memory are shared.
        recorded_alone: whether nothing is computed, and no model or data read.
    """

    def __init__(self, settings: Run, *, results: Path | None = None, changed: Mapping[str, Any] | None = None,
                 store: Store | None = None, parent: OpenRun | None = None, recorded_alone: bool = False):
        self.results = Path(results) if results else results_folder()
        self.changed, self.recorded_alone, self.settings = dict(changed or {}), recorded_alone, settings
        if settings.dtype == "auto":  # resolved here, so that keys and provenance hold what was used
            from sts.engine.models import bf16_is_fast

            dtype = "bfloat16" if bf16_is_fast(self.device) else "float32"
            self.settings = settings.model_copy(update={"dtype": dtype})
        self.folder = self.results / settings.name
        self.store = store or Store(self.folder / "stages", (ROOT / "data" / "recorded" / settings.name,))
        #: Everything read, loaded or computed, by what decides it.
        self._memory: dict[tuple, Any] = parent._memory if parent else {}
        self._variants: dict[str, OpenRun] = {}
        #: Whose trained SAE it reads: runs that differ in seed or training set have one SAE.
        self._trainer = self
        self._keys: dict[str, str] = {}
        self._used: list[str] = []

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

    def once(self, what: str, decided_by: tuple[str, ...], make: Callable[[], Any], *more: Any) -> Any:
        """Something read or loaded once for all variants whose settings `decided_by` are equal."""
        place = (what, *(repr(getattr(self.settings, name)) for name in decided_by), *more)
        if place not in self._memory:
            self._refuse(what)
            self._memory[place] = make()
        return self._memory[place]

    def _refuse(self, what: str) -> None:
        if self.recorded_alone:
            raise StsError(f"Of run {self.settings.name!r} the recorded results alone are asked for, not its {what}.")

    # --- variants

    def variant(self, **changes: Any) -> OpenRun:
        """The same run with other settings, sharing the store, and models, SAE, data and results where they are equal.

        Raises:
            StsError: an unknown setting, or a value that it does not take.
        """
        changes = {name: value for name, value in changes.items() if value != getattr(self.settings, name, ...)}
        if not changes:
            return self
        if (place := repr(sorted(changes.items()))) not in self._variants:
            other = OpenRun(load_run(self.settings, changes, allow_none=True), results=self.results,
                            changed=self.changed | changes, store=self.store, parent=self,
                            recorded_alone=self.recorded_alone)
            if "sae" in STAGES and not (changes.keys() - {"seed"}) & set(STAGES["sae"].uses):
                other._trainer = self._trainer
            self._variants[place] = other
        return self._variants[place]

    @property
    def other_seeds(self) -> tuple[int, ...]:
        """The seeds of setting `seeds` that are not this run's own."""
        return tuple(seed for seed in self.settings.seeds if seed != self.settings.seed)

    def only_recorded(self) -> OpenRun:
        """The same run with nothing but what is there of it: no stage is computed, no model or data read."""
        return OpenRun(self.settings, results=self.results, changed=self.changed, store=self.store, recorded_alone=True)

    # --- stages

    def spec(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            StsError: there is none.
        """
        if name not in STAGES:
            raise one_of("Stage", name, STAGES)
        return STAGES[name]

    def needs(self, name: str) -> tuple[str, ...]:
        """The stages that a stage is computed from."""
        spec = self.spec(name)
        trained = ("sae",) if "sae" in spec.inputs and self.settings.sae == "train" else ()
        return (*trained, *spec.needs)

    def key(self, name: str) -> str:
        """The stage's key under the present settings: twelve hexadecimal digits."""
        if name == "sae" and self._trainer is not self:
            return self._trainer.key(name)
        if name not in self._keys:
            self._keys[name] = self._key(self.spec(name))
        return self._keys[name]

    def _key(self, spec: Stage) -> str:
        from sts.data.load import without_hub

        uses = {setting: getattr(self.settings, setting) for setting in spec.uses}
        needs = {need: self.key(need) for need in self.needs(spec.name)}
        with without_hub():  # recorded results need neither the model nor the data
            known = {what: self.known(what) for what in spec.inputs}
            found = recorded_key(provenances(self.store.recorded, spec.name), spec, uses, needs, known, resources.drawn(
                self.settings, spec.inputs)) if None in known.values() else None
        if found is not None:
            return found
        try:
            return key_of(spec, uses, needs, {what: self.identity(what) for what in spec.inputs})
        except StsError as error:
            raise self._beyond_recorded(spec.name, error) from error

    def identity(self, what: str) -> str:
        """A digest of what a stage reads from outside (`resources.identity`).

        Raises:
            StsError: it is not here.
        """
        if what in resources.MADE_OF_KEYS:
            return resources.identity(self, what)
        return self.once(f"digest of {what}", resources.DECIDED_BY[what], lambda: resources.identity(self, what))

    def known(self, what: str) -> str | None:
        """`identity`, or None where it is not here."""
        try:
            return self.identity(what)
        except StsError:
            return None

    def find(self, name: str) -> Path | None:
        """Where the stage's result lies, if it is there, undamaged, under the present settings."""
        return self.store.find(name, self.key(name), self.spec(name).kind)

    def stored(self, name: str) -> bool:
        """Whether the stage's result is there under the present settings."""
        return self.find(name) is not None

    def provenance(self, name: str) -> dict[str, Any]:
        """What is recorded about the stage's stored result; empty if there is none."""
        return self.store.provenance(name, self.key(name), self.spec(name).kind)

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the stages asked for so far and of all that they rest on, each after what it needs."""
        ordered: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in ordered:
                for need in self.needs(name):
                    visit(need)
                ordered[name] = None

        for name in self._used:
            visit(name)
        return tuple(ordered)

    def get(self, name: str) -> Any:
        """The stage's result: from memory, from the store, or computed now and stored."""
        spec, place = self.spec(name), ("result", name, self.key(name))
        if name not in self._used:
            self._used.append(name)
        if place not in self._memory:
            try:
                path = self.find(name) or self.compute(name, again=False)
            except MissingData as error:
                raise self._beyond_recorded(name, error) from error
            self._memory[place] = read(path, spec.kind)
        return self._memory[place]

    def compute(self, name: str, *, again: bool = True) -> Path:
        """Compute the stage, and first what it needs and is not there; the path of the result, which is stored.

        Of two processes at one stage the second waits for the first, and takes its result unless told to compute it
        `again`.

        Raises:
            StsError: several processes were launched for a stage that one computes.
        """
        from sts.engine import work as processes

        if name == "sae" and self._trainer is not self:
            return self._trainer.compute(name, again=again)
        self._refuse(f"stage {name} anew")
        spec, key = self.spec(name), self.key(name)
        if processes.count() > 1 and not spec.parallel:
            together = ", ".join(one.name for one in STAGES.values() if one.parallel)
            raise StsError(f"Stage {name!r} runs in one process and {processes.count()} were launched. Start it "
                           f"without accelerate launch; several processes compute these stages: {together}.")
        for need in self.needs(name):
            if not self.stored(need):
                self.get(need)
        together = processes.join(cpu=self.device == "cpu")
        with self.store.lease(name, key) if processes.is_main() else nullcontext():
            if together:
                together.wait_for_everyone()
            if not again and (found := self.find(name)):
                return found  # computed by another process while this one waited
            report = Reporter(name, shown=processes.is_main())
            with warnings.catch_warnings():
                # Libraries' notes to their own developers would end up on the pages.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                value = spec.compute(**values(self, spec, report))
            seconds = report.done()
            if processes.is_main():
                self._write(spec, key, value, seconds, report)
            if together:
                together.wait_for_everyone()
        self._memory.pop(("result", name, key), None)
        if not (found := self.find(name)):
            raise StsError(f"Stage {name!r} was computed and is not in {self.store.folder}. Machines that compute "
                           "together must share the folder for results (STS_RESULTS).")
        return found

    def _write(self, spec: Stage, key: str, value: Any, seconds: float, report: Reporter) -> None:
        self.store.write(spec.name, key, spec.kind, value, {
            "stage": spec.name, "key": key, "version": spec.version, "run": self.settings.name,
            "settings": {setting: getattr(self.settings, setting) for setting in spec.uses},
            "needs": {need: self.key(need) for need in self.needs(spec.name)},
            "inputs": {what: self.identity(what) for what in spec.inputs},
            "seed": self.settings.seed, "seconds": round(seconds, 2), "work": report.work.to_dict(),
            "process_peak_memory_mb": peak_memory_mb(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment(self.device)})

    def _beyond_recorded(self, name: str, error: StsError) -> StsError:
        """The error, with the reason that model or data are asked for where the run is shown from recorded results."""
        if "is not recorded" in str(error) or not any(folder.is_dir() for folder in self.store.recorded):
            return error
        shown = ", ".join(f"{key} = {value}" for key, value in self.changed.items() if value not in ([], None))
        changed = f" with {shown}" if shown else ""
        return StsError(f"Of run {self.settings.name!r}, the result of stage {name!r}{changed} is not recorded, or not "
                        f"whole; computing it needs the model and the data. {error}")


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
    resources.check_sae(settings)  # a wrong name is said now, not after minutes of work
    changed = {name: value for name in overrides if (value := getattr(settings, name)) != getattr(profile, name)}
    return OpenRun(settings, results=results, changed=changed)
