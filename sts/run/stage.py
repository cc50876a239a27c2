"""A stage is a function whose signature is its declaration.

Its parameters name other stages (whose results it takes), settings of the run, or resources (run/resources.py: models,
texts, masks). From them the decorator derives what the stage's key is made of, so that nothing is declared twice.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts.run.settings import Run

if TYPE_CHECKING:
    from sts.run.log import Reporter
    from sts.run.run import OpenRun

#: Handed to whoever asks, and part of no key: they change how a result is computed, not what it means.
NEVER = frozenset({"report", "work", "passes", "scratch", "device", "variant"})


@dataclass(frozen=True)
class Resource:
    """What a stage is handed that is neither stage nor setting, and what that brings into a key."""

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


STAGES: dict[str, Stage] = {}
RESOURCES: dict[str, Resource] = {}


def stage(kind: str, *, version: int = 1, also: tuple[str, ...] = (), inputs_without: tuple[str, ...] = (),
          parallel: bool = False) -> Callable:
    """Register a function as a stage of its own name, whose result is stored as `kind`: json, parquet, tensors, folder.

    Args:
        version: raise it when the meaning of the result changes.
        also, inputs_without: names to add to what the signature says, inputs to leave out of it.
        parallel: whether all processes of an `accelerate launch` compute it together; the main one's is stored.
    """
    def register(function: Callable) -> Callable:
        parameters = tuple(inspect.signature(function).parameters)
        uses, needs, inputs = set(), set(), set()
        for name in {*parameters, *also} - NEVER:
            if own := RESOURCES.get(name):
                uses, needs, inputs = uses | {*own.uses}, needs | {*own.needs}, inputs | {*own.inputs}
            else:
                (uses if name in Run.model_fields and name != "sae" else needs).add(name)
        uses, needs, inputs = (tuple(sorted(own)) for own in (uses, needs, inputs - {*inputs_without}))
        STAGES[function.__name__] = Stage(function.__name__, function, kind, parameters, uses, needs, inputs, version,
                                          parallel)
        return function
    return register


def key(spec: Stage, uses: Mapping[str, Any], needs: Mapping[str, str], inputs: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits of what a result depends on."""
    content = {"stage": spec.name, "version": spec.version, "kind": spec.kind, "uses": uses, "needs": needs,
               "inputs": inputs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def steps(items: Iterable, report: Callable[[float], None]) -> Iterator[tuple[Any, Callable[[float], None]]]:
    """Each item, with the report of its own share of the progress."""
    together = list(items)
    for done, item in enumerate(together):
        yield item, lambda fraction, done=done: report((done + fraction) / len(together))
        report((done + 1) / len(together))


def values(run: OpenRun, spec: Stage, report: Reporter) -> dict[str, Any]:
    """The values of a stage's parameters."""
    own = {"report": report, "work": report.work, "device": run.device, "variant": run.variant,
           "scratch": run.store.scratch(spec.name, run.key(spec.name)),
           "passes": {"tokens_per_batch": run.settings.tokens_per_batch, "work": report.work}}

    def value(name: str) -> Any:
        if name in own:
            return own[name]
        if name in RESOURCES:
            return RESOURCES[name].make(run)
        return getattr(run.settings, name) if name in spec.uses else run.get(name)
    return {name: value(name) for name in spec.parameters}
