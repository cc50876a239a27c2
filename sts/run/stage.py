"""A stage is a function whose signature is its declaration.

Its parameters name other stages (whose results it takes), settings of the run, or resources (run/resources.py: models,
texts, masks). From them the decorator derives what the stage's key is made of, so that nothing is declared twice.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts.run.settings import Run

if TYPE_CHECKING:
    from sts.run.log import Reporter
    from sts.run.run import OpenRun

#: Handed to whoever asks, and part of no key: they change how a result is computed, not what it means.
NEVER = frozenset({"report", "work", "scratch", "device", "tokens_per_batch", "variant"})


@dataclass(frozen=True)
class Resource:
    """Something a stage is handed that is neither stage nor setting: its value, of an open run, and what it brings into
    the key: settings, digests of what is read, stages."""

    make: Callable[[Any], Any]
    uses: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A named result: how to compute it, and what it depends on."""

    name: str
    compute: Callable[..., Any]
    kind: str
    parameters: tuple[str, ...]
    uses: tuple[str, ...]
    needs: tuple[str, ...]
    inputs: tuple[str, ...]
    version: int = 1
    parallel: bool = False
    summary: str = ""


STAGES: dict[str, Stage] = {}
RESOURCES: dict[str, Resource] = {}


def stage(kind: str, *, version: int = 1, also: tuple[str, ...] = (), inputs_without: tuple[str, ...] = (),
          parallel: bool = False) -> Callable:
    """Register a function as a stage of its own name.

    Args:
        kind: how the result is stored: json, parquet, tensors or folder.
        version: raise it when the meaning of the result changes.
        also, inputs_without: names to add to what the signature says, inputs to leave out of it, for keys recorded
            before signatures were declarations, and for stages that are read of other seeds alone.
        parallel: whether all processes of an `accelerate launch` compute it together; the main one's is stored.
    """
    def register(function: Callable) -> Callable:
        parameters = tuple(inspect.signature(function).parameters)
        uses, needs, inputs = set(), set(), set()
        for name in {*parameters, *also} - NEVER:
            if name in RESOURCES:
                own = RESOURCES[name]
                uses, needs, inputs = uses | {*own.uses}, needs | {*own.needs}, inputs | {*own.inputs}
            else:
                (uses if name in Run.model_fields and name != "sae" else needs).add(name)
        STAGES[function.__name__] = Stage(
            function.__name__, function, kind, parameters, tuple(sorted(uses)), tuple(sorted(needs)),
            tuple(sorted(inputs - {*inputs_without})), version, parallel, (function.__doc__ or "").partition("\n")[0])
        return function
    return register


def key(spec: Stage, uses: Mapping[str, Any], needs: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits of what a result depends on."""
    content = {"stage": spec.name, "version": spec.version, "kind": spec.kind, "uses": uses, "needs": needs,
               "inputs": inputs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class View:
    """A run as stages over several seeds, training sets or settings see it: its results by stage."""

    def __init__(self, run: OpenRun):
        self.get, self.seed, self.training_set, self._run = run.get, run.settings.seed, run.settings.sft_data, run

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    @property
    def trained_domain(self) -> str:
        """The evaluation domain that the training set is of; "several" if there is more than one."""
        from sts.data.groups import trained_domains

        own = trained_domains(RESOURCES["train"].make(self._run))
        return own.pop() if len(own) == 1 else "several"


def values(run: OpenRun, spec: Stage, report: Reporter) -> dict[str, Any]:
    """The values of a stage's parameters."""
    own = {"report": lambda: report, "work": lambda: report.work, "device": lambda: run.device,
           "scratch": lambda: run.store.scratch(spec.name, run.key(spec.name)),
           "tokens_per_batch": lambda: run.settings.tokens_per_batch,
           "variant": lambda: lambda **changes: View(run.variant(**changes))}

    def value(name: str) -> Any:
        if name in own:
            return own[name]()
        if name in RESOURCES:
            return RESOURCES[name].make(run)
        return getattr(run.settings, name) if name in spec.uses else run.get(name)
    return {name: value(name) for name in spec.parameters}
