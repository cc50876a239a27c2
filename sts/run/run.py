"""An open run: a profile with its results, each a stage computed once and found again by its key, which is made of the
settings that it uses, the keys of the stages it needs, digests of its data and weights, and its version."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from sts.errors import ROOT, MissingData, NotRecorded, StsError, one_of
from sts.run import resources
from sts.run.log import Reporter, environment
from sts.run.recorded import recorded_key
from sts.run.settings import AMONG_SEEDS, Run, load_run
from sts.run.stage import STAGES, Stage, values
from sts.run.stage import key as key_of
from sts.run.store import Store, read


def results_folder() -> Path:
    """Where generated things go: STS_RESULTS, or results/ in the repository."""
    return Path(os.environ.get("STS_RESULTS") or ROOT / "results").expanduser().resolve()


class OpenRun:
    """A run profile with its store, models and data, loaded when first needed. `changed` holds settings that differ
    from the profile's own; `used` names the stages asked for and all that they rest on, each after what it needs."""

    def __init__(self, settings: Run, *, results: Path | None = None, store: Store | None = None,
                 sae_seed: int | None = None):
        self.settings, self.results = settings, Path(results) if results else results_folder()
        if settings.dtype == "auto":  # resolved here, so that keys and provenance hold what was used
            from sts.engine.models import bf16_is_fast

            dtype = "bfloat16" if bf16_is_fast(self.device) else "float32"
            self.settings = settings.model_copy(update={"dtype": dtype})
        self.store = store or Store(self.results / "stages", (ROOT / "data" / "recorded" / settings.name,))
        self.changed: dict[str, Any] = {}
        self.used: dict[str, None] = {}
        self._computes, self._reads = True, True
        self.sae_seed = settings.seed if sae_seed is None else sae_seed
        #: Everything read, loaded or computed, by what decides it.
        self._memory: dict[tuple, Any] = {}
        self._variants: dict[str, OpenRun] = {}
        self._keys: dict[str, str] = {}

    @property
    def device(self) -> str:
        """The torch device that models run on."""
        import torch

        found = torch.cuda.is_available()
        if self.settings.device == "cuda" and not found:
            raise StsError("Setting device 'cuda': this machine has no GPU that PyTorch can use. Use auto or cpu.")
        return "cuda" if found and self.settings.device != "cpu" else "cpu"

    def once(self, what: str, decided_by: tuple[str, ...], make: Callable[[], Any], *more: Any) -> Any:
        """Something read or loaded once for all variants whose settings `decided_by` are equal."""
        place = (what, *(repr(getattr(self.settings, name)) for name in decided_by), *more)
        if place not in self._memory:
            if not self._reads:
                raise MissingData(f"Of run {self.settings.name!r} recorded results alone are asked for, no {what}.")
            self._memory[place] = make()
        return self._memory[place]

    # --- variants

    def _like(self, **own: Any) -> OpenRun:
        other = copy.copy(self)
        vars(other).update(own, used={}, _variants={}, _keys={})
        return other

    def variant(self, **changes: Any) -> OpenRun:
        """The same run with other settings, sharing the store, and models, data and results where they are equal."""
        changes = {name: value for name, value in changes.items() if value != getattr(self.settings, name, ...)}
        if changes and (place := repr(sorted(changes.items()))) not in self._variants:
            self._variants[place] = self._like(settings=load_run(self.settings, changes),
                                               changed=self.changed | changes)
        return self._variants[place] if changes else self

    def alone(self, **changes: Any) -> OpenRun:
        """The run with another seed or training set, which has no others of its own."""
        other = self.variant(**changes)
        return self if other is self else other.variant(seeds=[], **dict.fromkeys(AMONG_SEEDS, []))

    def only_stored(self, *, reading: bool = True) -> OpenRun:
        """The same run, of which no stage is computed; nor is any model or data read unless `reading`."""
        return self._like(_computes=False, _reads=reading)

    def _owner(self, name: str) -> OpenRun:
        """The run that computes a stage: of a trained SAE that of the profile's seed, whatever the seed of this one."""
        return self.variant(seed=self.sae_seed) if name == "sae" else self

    # --- stages

    def spec(self, name: str) -> Stage:
        """The stage of that name; `StsError` if there is none."""
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
        own = self._owner(name)
        if name not in own._keys:
            own._keys[name] = own._key(self.spec(name))
        return own._keys[name]

    def _key(self, spec: Stage) -> str:
        from sts.data.load import without_hub

        uses, needs = self._about(spec)
        known: dict[str, str | None] = dict.fromkeys(spec.inputs)
        with without_hub():  # recorded results need neither the model nor the data
            for what in spec.inputs:
                with suppress(StsError):
                    known[what] = resources.identity(self, what)
        if None in known.values() and (found := recorded_key(self.store.recorded, self.settings, spec, needs, known)):
            return found
        return key_of(spec, uses, needs, {what: resources.identity(self, what) for what in spec.inputs})

    def _about(self, spec: Stage) -> tuple[dict[str, Any], dict[str, str]]:
        """The settings that a stage uses, and the keys of those that it needs."""
        return ({setting: getattr(self.settings, setting) for setting in spec.uses},
                {need: self.key(need) for need in self.needs(spec.name)})

    def find(self, name: str) -> Path | None:
        """Where the stage's result lies, if it is there, undamaged, under the present settings."""
        return self.store.find(name, self.key(name), self.spec(name).kind)

    def stored(self, name: str) -> bool:
        """Whether the stage's result is there under the present settings."""
        with suppress(StsError):  # what decides its key is neither recorded nor at hand
            return self.find(name) is not None
        return False

    def provenance(self, name: str) -> dict[str, Any]:
        """What is recorded about the stage's stored result; empty if there is none."""
        from sts.data.load import without_hub

        with suppress(StsError), without_hub():  # as in `stored`; nothing is fetched to say that there is none
            return self.store.provenance(name, self.key(name), self.spec(name).kind)
        return {}

    def _use(self, name: str) -> None:
        for need in self.needs(name) if name not in self.used else ():
            self._use(need)
        self.used[name] = None

    def get(self, name: str) -> Any:
        """The stage's result: from memory, from the store, or computed now and stored."""
        self._use(name)
        try:
            place = ("result", name, self.key(name))
            if place not in self._memory:
                self._memory[place] = read(self.find(name) or self.compute(name, again=False), self.spec(name).kind)
            return self._memory[place]
        except MissingData as error:  # why are model or data asked for, where the run is shown from recorded results?
            if not any(folder.is_dir() for folder in self.store.recorded):
                raise
            shown = ", ".join(f"{key} = {value}" for key, value in self.changed.items() if value not in ([], None))
            raise NotRecorded(f"Of run {self.settings.name!r}, the result of stage {name!r}{' with ' * bool(shown)}"
                              f"{shown} is not recorded, or not whole; computing it needs the model and the data. "
                              f"{error}") from error

    def compute(self, name: str, *, again: bool = True) -> Path:
        """Compute the stage, first what it needs and is not there, and store it; its path. Of two processes the second
        waits for the first, and takes its result unless told to compute it `again`."""
        from sts.engine import work as processes

        if (owner := self._owner(name)) is not self:
            return owner.compute(name, again=again)
        spec, key = self.spec(name), self.key(name)
        if not self._computes:
            raise StsError(f"Stage {name!r} of run {self.settings.name!r} is not there.")
        if processes.count() > 1 and not spec.parallel:
            raise StsError(f"Stage {name!r} runs in one process and {processes.count()} were launched. Several compute "
                           f"these stages: {', '.join(one.name for one in STAGES.values() if one.parallel)}.")
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
            try:
                value = spec.compute(**values(self, spec, report))
            except KeyError as error:
                if not (parts := [need for need in self.needs(name) if self.provenance(need).get("withheld")]):
                    raise
                raise StsError(f"Stage {name!r} does not find {error} in what is recorded of {', '.join(parts)}; "
                               "compute these first: sts stage NAME --again, with the same run.") from error
            seconds, (uses, needs) = report.done(), self._about(spec)
            if processes.is_main():
                self.store.write(name, key, spec.kind, value, {
                    "stage": name, "key": key, "version": spec.version, "run": self.settings.name, "settings": uses,
                    "needs": needs, "inputs": {what: resources.identity(self, what) for what in spec.inputs},
                    "seed": self.settings.seed, "seconds": round(seconds, 2), "work": report.work.to_dict(),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment(self.device)})
            if together:
                together.wait_for_everyone()
        self._memory.pop(("result", name, key), None)
        return self.store.paths(name, key, spec.kind)[0]  # of several machines, which share the store


def open_run(run: str | Run = "laptop", *, results: Path | None = None, **overrides: Any) -> OpenRun:
    """Open a run profile (see `load_run`), its results in folder `results` (by default `results_folder()`).

    `overrides` are settings to change; None leaves the profile's own. `StsError` for wrong ones, or an unknown SAE."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    profile = load_run(run)
    opened = OpenRun(load_run(run, overrides), results=results, sae_seed=profile.seed)  # one SAE for all seeds
    opened.changed = {name: own for name in overrides
                      if (own := getattr(opened.settings, name)) != getattr(profile, name)}
    if opened.settings.sae != "train":
        resources.identity(opened, "sae")  # a wrong name is said now, not after minutes of work
    return opened
