"""Whether a stage comes out again: computed afresh from its inputs as stored, and compared with the stored result.

Integers, strings and truth values must be equal, floats within a relative tolerance; two NaN are equal. Of a folder,
`training.json` and the safetensors files are compared; the rest is libraries' configuration, in no fixed order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from sts.errors import StsError
from sts.run.log import environment
from sts.run.recorded import as_recorded
from sts.run.run import OpenRun
from sts.run.store import Store, read


def flat(value: Any, name: str = "") -> Iterator[tuple[str, numpy.ndarray]]:
    """The names and arrays of a result: plain values, a frame, tensors or a folder."""
    if isinstance(value, Path):
        for path in sorted((*value.rglob("training.json"), *value.rglob("*.safetensors"))):
            own = read(path, "json" if path.suffix == ".json" else "tensors")
            yield from flat(own, path.relative_to(value).as_posix())
    elif hasattr(value, "columns"):
        yield from flat(value.astype(object).where(value.notna(), None).to_dict("list"))
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from flat(own, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, own in enumerate(value):
            yield from flat(own, f"{name}[{place}]")
    elif hasattr(value, "is_floating_point"):
        yield name, (value.double() if value.is_floating_point() else value).numpy()
    else:
        yield name, numpy.asarray(value)


def differences(stored: Any, computed: Any, tolerance: float) -> list[str]:
    """How two results of a stage, as `store.read` gives them, differ: of every array that does, its first difference;
    floats a and b are equal if |a - b| is at most `tolerance` times |b|."""
    found, nothing, (before, after) = [], numpy.empty(0, object), (dict(flat(one)) for one in (stored, computed))
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name, nothing), after.get(name, nothing)
        if (one.shape, one.dtype.kind) != (other.shape, other.dtype.kind):
            was, now = ("nothing" if own is nothing else f"{own.dtype} {own.shape}" if own.ndim else repr(own.item())
                        for own in (one, other))
            found.append(f"{name}: stored {was}, computed {now}")
            continue
        same = one == other
        if one.dtype.kind == "f":
            same = numpy.isclose(one, other, rtol=tolerance, atol=0, equal_nan=True)
        if not numpy.all(same):
            at = numpy.argwhere(~same)[0].tolist()
            found.append(f"{name}{at or ''}: stored {one.item(*at)!r}, computed {other.item(*at)!r}")
    return found


def verify(run: OpenRun, name: str, tolerance: float | None = None) -> list[str]:
    """Compute a stored stage again, in a scratch place that is removed: its `differences`, and if there are any those
    of machine and software. `StsError` if the stage, or one that it needs, is not stored under these settings.

    Tolerance is 1e-6, as 32-bit floats hold seven digits, or 1e-2 where the model runs in fewer (they round by 0.4%).
    """
    if tolerance is None:
        tolerance = 1e-2 if run.settings.dtype != "float32" and "dtype" in run.spec(name).uses else 1e-6
    if missing := [own for own in (*run.needs(name), name) if not run.stored(own)]:
        raise StsError(f"Stage {name!r} cannot be verified: run {run.settings.name!r} has no undamaged result of "
                       f"{', '.join(missing)} under these settings. Compute that first: sts stage {missing[0]}")
    kind, path = run.spec(name).kind, run.find(name) or Path()
    run.results.mkdir(parents=True, exist_ok=True)  # what is stored may come with the book, in another folder
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=run.results) as scratch:
        # Nothing in memory, and a store that finds what is stored and writes elsewhere.
        store = Store(Path(scratch), (run.store.folder, *run.store.recorded))
        afresh = OpenRun(run.settings, results=run.results, store=store, sae_seed=run.sae_seed)
        computed = read(afresh.compute(name), kind)
        if path.parent in run.store.recorded:  # which leaves texts, weights and large sums out
            computed = as_recorded(name, kind, computed, store.scratch(name, "as-recorded"))
        found = differences(read(path, kind), computed, tolerance)
    then, now = ({**one, **one.get("versions", {})} for one in (run.provenance(name), environment(run.device)))
    return found + [f"{key}: then {then.get(key)}, now {now[key]}" for key in now if found and key not in (
        "versions", "process_peak_memory_mb") and then.get(key) != now[key]]
