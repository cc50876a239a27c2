"""Whether a stage comes out again: computed afresh from its inputs as stored, and compared with the stored result.

Both results are laid out flat, as names with their arrays. Integers, strings and truth values must be equal. Floats are
compared by their relative difference, |a - b| divided by the larger of |a| and |b|; two NaN are equal. Of a folder,
`training.json` and the safetensors files are compared; the rest is libraries' configuration, in no fixed order.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from sts.errors import StsError
from sts.run.log import environment
from sts.run.recorded import as_recorded
from sts.run.run import OpenRun
from sts.run.store import Store, read

#: Default tolerances, as relative differences. 32-bit floats hold seven digits. bf16 rounds by up to 0.4% each time.
FLOAT32_TOLERANCE, HALF_TOLERANCE = 1e-6, 1e-2
#: What stands for a name that a result does not have.
NOTHING = numpy.empty(0, object)


@dataclass
class Comparison:
    """How many single values were compared and how many differ, floats by more than the tolerance; the largest relative
    difference of two floats; what differs first; and what else has changed since the result was stored."""

    tolerance: float
    entries: int = 0
    differing: int = 0
    largest: float = 0.0
    first: str = ""
    surroundings: str = ""


def flat(value: Any, name: str = "") -> Iterator[tuple[str, numpy.ndarray]]:
    """The names and arrays of a result: plain values, a frame, tensors or a folder."""
    if isinstance(value, Path):
        for path in sorted(value.rglob("*")):
            if path.name == "training.json" or path.suffix == ".safetensors":
                kind = "tensors" if path.suffix == ".safetensors" else "json"
                yield from flat(read(path, kind), path.relative_to(value).as_posix())
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


def relative_difference(first: numpy.ndarray, second: numpy.ndarray) -> numpy.ndarray:
    """|a - b| / max(|a|, |b|), entry by entry: 0 for equal values and for two NaN, infinite for one NaN or infinity."""
    same = (first == second) | (numpy.isnan(first) & numpy.isnan(second))
    with numpy.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = numpy.maximum(abs(first), abs(second))
        relative = abs(first / scale - second / scale)  # divided first: the difference of two huge values overflows
    return numpy.where(same, 0.0, numpy.where(numpy.isfinite(relative), relative, numpy.inf))


def compare(stored: Any, computed: Any, tolerance: float) -> Comparison:
    """Compare two results of a stage, as `store.read` gives them; the tolerance is relative, for floats.

    Raises:
        StsError: a tolerance that is negative or no number.
    """
    if not 0 <= tolerance < math.inf:
        raise StsError(f"The tolerance is a relative difference, 0 or more, such as 1e-6; got {tolerance!r}.")
    found, (before, after) = Comparison(tolerance), (dict(flat(one)) for one in (stored, computed))
    for name in dict.fromkeys((*before, *after)):
        one, other, at = before.get(name, NOTHING), after.get(name, NOTHING), []
        if like := (one.shape, one.dtype.kind) == (other.shape, other.dtype.kind):
            relative = relative_difference(one, other) if one.dtype.kind == "f" else numpy.zeros(1)
            found.largest = max(found.largest, float(relative.max(initial=0.0)))
            wrong = relative > tolerance if one.dtype.kind == "f" else one != other
            at = numpy.argwhere(wrong)[:1].ravel().tolist()
            found.entries, found.differing = found.entries + one.size, found.differing + int(numpy.sum(wrong))
        else:
            found.entries, found.differing = found.entries + 1, found.differing + 1
        if found.differing and not found.first:
            was, now = ("nothing" if own is NOTHING else repr(own.item(*at)) if like or not own.ndim else
                        f"{own.dtype} {own.shape}" for own in (one, other))
            found.first = f"{name}{at or ''}: stored {was}, computed {now}"
    return found


def default_tolerance(run: OpenRun, name: str) -> float:
    """1e-6; 1e-2 for a stage that runs the model itself in less than 32 bits."""
    lower = run.settings.dtype != "float32" and "dtype" in run.spec(name).uses
    return HALF_TOLERANCE if lower else FLOAT32_TOLERANCE


def verify(run: OpenRun, name: str, tolerance: float | None = None) -> Comparison:
    """Compute a stored stage again, in a scratch place that is removed, and compare; the store is left as it is.

    Of a recorded result, what is recorded of it is compared.

    Raises:
        StsError: the stage, or one that it needs, is not stored under these settings.
    """
    path = run.find(name)
    missing = [need for need in run.needs(name) if not run.stored(need)]
    if path is None or missing:
        raise StsError(f"Stage {name!r} cannot be verified: run {run.settings.name!r} has no undamaged result of "
                       f"{', '.join(missing) or 'it'} under these settings. Compute that first: sts stage "
                       f"{missing[0] if missing else name}")
    kind = run.spec(name).kind
    run.folder.mkdir(parents=True, exist_ok=True)  # what is stored may come with the book, in another folder
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=run.folder) as scratch:
        # Nothing in memory, and a store that finds what is stored and writes elsewhere.
        store = Store(Path(scratch), (run.store.folder, *run.store.recorded))
        computed = read(OpenRun(run.settings, results=run.results, store=store).compute(name), kind)
        if path.parent in run.store.recorded:  # which leaves texts, weights and large sums out
            computed = as_recorded(name, kind, computed, store.scratch(name, "as-recorded"))
        found = compare(read(path, kind), computed, default_tolerance(run, name) if tolerance is None else tolerance)
    then, now = ({**one, **one.get("versions", {})} for one in (run.provenance(name), environment(run.device)))
    found.surroundings = ", ".join(f"{key} {then.get(key)}, now {now[key]}" for key in now
                                   if key not in ("versions", "process_peak_memory_mb") and then.get(key) != now[key])
    return found


def report(name: str, found: Comparison) -> str:
    """A comparison in words: the verdict, the first differing entry, the tolerance, and what else has changed."""
    verdict = f"differs in {found.differing:,} entries from" if found.differing else "agrees with"
    return "\n".join(filter(None, (
        f"{name}: computed again from its inputs as stored, it {verdict} the stored result.",
        found.first and f"First difference: {found.first}.",
        f"{found.entries:,} entries compared; largest relative difference of two floats {found.largest:.2g}, tolerance "
        f"{found.tolerance:g} (--tolerance).",
        found.surroundings and f"Changed since it was stored: {found.surroundings}.")))
