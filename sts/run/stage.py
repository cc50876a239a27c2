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
from typing import Any

from sts.run.settings import Run

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
