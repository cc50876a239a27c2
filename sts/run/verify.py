"""Whether a stage comes out again: computed afresh from its inputs as stored, and compared with the stored result.

Both results are laid out flat, as names with their arrays. Integers, strings and truth values must be equal. Floats are
compared by their relative difference, |a - b| divided by the larger of |a| and |b|; two NaN are equal. Of a folder,
`training.json` and the safetensors files are compared; the rest is libraries' configuration, in no fixed order.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass
class Comparison:
    """What a comparison found.

    Attributes:
        tolerance: largest relative difference of two floats that counts as equal.
        entries: how many single values were compared.
        differing: how many of them differ, floats by more than the tolerance.
        largest: the largest relative difference of two floats; infinite for NaN beside a number.
        first: where the first differing entry stands and what its two values are; empty if none differs.
    """

    tolerance: float
    entries: int = 0
    differing: int = 0
    largest: float = 0.0
    first: str = ""
    surroundings: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return not self.differing


def flat(value: Any, name: str = "") -> Iterator[tuple[str, numpy.ndarray]]:
    """The names and arrays of a result: plain values, a frame, tensors or a folder; columns without gaps stay whole."""
    if isinstance(value, Path):
        for path in sorted(value.rglob("*")):
            inside = path.relative_to(value).as_posix()
            if path.name == "training.json":
                yield from flat(json.loads(path.read_text(encoding="utf-8")), inside)
            elif path.suffix == ".safetensors":
                yield from flat(read(path, "tensors"), inside)
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from flat(own, f"{name}.{key}" if name else str(key))
    elif hasattr(value, "columns"):
        for column in value.columns:
            own = value[column].to_numpy()
            yield from flat(own.tolist() if own.dtype == object else own, str(column))
    elif isinstance(value, list | tuple):
        for place, own in enumerate(value):
            yield from flat(own, f"{name}[{place}]")
    elif hasattr(value, "is_floating_point"):
        yield f"type of {name}", numpy.array(str(value.dtype).removeprefix("torch."))
        yield name, (value.double() if value.is_floating_point() else value).numpy()
    elif isinstance(value, numpy.ndarray) and value.dtype == object:
        yield from flat(value.tolist(), name)
    elif value is None or type(value).__name__ in ("NAType", "NaTType"):
        yield name, numpy.array(None)
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
    found, sides = Comparison(tolerance), [dict(flat(one)) for one in (stored, computed)]
    only = [[name for name in one if name not in other] for one, other in (sides, sides[::-1])]
    if any(only):
        found.entries = found.differing = 1
        found.first = "; ".join(f"only in the {side} result: {', '.join(names[:5])}"
                                for side, names in zip(("stored", "computed"), only, strict=True) if names)
        return found
    for name, one in sides[0].items():
        other, relative = sides[1][name], None
        kinds = {one.dtype.kind, other.dtype.kind}
        if one.shape != other.shape:
            found.entries, found.differing = found.entries + 1, found.differing + 1
            found.first = found.first or f"{name}: stored {one.shape}, computed {other.shape}"
            continue
        if "f" in kinds and kinds <= set("fiu"):
            relative = relative_difference(one.astype(float), other.astype(float))
            found.largest = max(found.largest, float(relative.max(initial=0.0)))
        wrong = ((one != other) | (len(kinds) > 1)) if relative is None else relative > tolerance
        found.entries, found.differing = found.entries + one.size, found.differing + int(numpy.sum(wrong))
        if numpy.any(wrong) and not found.first:
            at = tuple(int(place) for place in numpy.argwhere(wrong)[0]) if one.ndim else ()
            was, now = (f"{own:.9g}" if isinstance(own, float) else repr(own)
                        for own in (one.item(*at), other.item(*at)))
            found.first = (f"{name}{list(at) if at else ''}: stored {was}, computed {now}"
                           + (f" (relative difference {relative[at]:.2g})" if relative is not None else ""))
    return found


def default_tolerance(run: OpenRun, name: str) -> float:
    """1e-6; 1e-2 for a stage that runs the model itself in less than 32 bits."""
    lower = run.settings.dtype != "float32" and "dtype" in run.spec(name).uses
    return HALF_TOLERANCE if lower else FLOAT32_TOLERANCE


def verify(run: OpenRun, name: str, tolerance: float | None = None) -> Comparison:
    """Compute a stored stage again, in a scratch place that is removed, and compare; the store is left as it is.

    Of a recorded result, what is recorded of it is compared.

    Args:
        tolerance: relative, for floats; None for `default_tolerance`.

    Returns:
        What the comparison found; `surroundings` lists what differs between the machine and software of then and now.

    Raises:
        StsError: the stage, or one that it needs, is not stored under these settings.
    """
    spec, path = run.spec(name), run.find(name)
    if path is None:
        raise StsError(f"Stage {name!r} cannot be verified: run {run.settings.name!r} has no undamaged result of it "
                       f"under these settings. Compute it first, by the same command without --verify.")
    if missing := [need for need in run.needs(name) if not run.stored(need)]:
        raise StsError(f"Stage {name!r} cannot be verified: it is computed from {', '.join(missing)}, of which run "
                       f"{run.settings.name!r} has no undamaged result. Compute that first: sts stage {missing[0]}")
    tolerance = default_tolerance(run, name) if tolerance is None else tolerance
    run.folder.mkdir(parents=True, exist_ok=True)  # what is stored may come with the book, in another folder
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=run.folder) as scratch:
        # Nothing in memory, and a store that finds what is stored and writes elsewhere.
        store = Store(Path(scratch), (run.store.folder, *run.store.recorded))
        computed = read(OpenRun(run.settings, results=run.results, store=store).compute(name), spec.kind)
        if path.parent in run.store.recorded:  # which leaves texts, weights and large sums out
            part = Path(scratch) / "as-recorded"
            part.mkdir()
            computed = as_recorded(name, spec.kind, computed, part)
        found = compare(read(path, spec.kind), computed, tolerance)
    then, now = ({**one, **one.get("versions", {})} for one in (run.provenance(name), environment(run.device)))
    found.surroundings = [f"{key} {then.get(key)}, now {value}" for key, value in now.items()
                          if key != "versions" and then.get(key) != value]
    return found


def report(name: str, found: Comparison) -> str:
    """A comparison in words: the verdict, the first differing entry, the tolerance, and what else has changed."""
    lines = [f"{name}: computed again from its inputs as stored, it " + (
        "agrees with the stored result." if found.agrees else
        f"differs from the stored result in {found.differing:,} of {found.entries:,} entries.")]
    if found.first:
        lines.append(f"First difference: {found.first}.")
    lines.append(f"{found.entries:,} entries compared; largest relative difference of two floats {found.largest:.2g}, "
                 f"tolerance {found.tolerance:g} (--tolerance).")
    if found.surroundings:
        lines.append(f"Changed since it was stored: {'; '.join(found.surroundings)}.")
    return "\n".join(lines)
