"""Whether a stage comes out again: computed afresh from its inputs as stored, and compared with the stored result.

Integers, strings and truth values must be equal. Floats are compared by their relative difference, |a - b| divided by
the larger of |a| and |b|; two NaN are equal. Of a folder, `training.json` and the safetensors files are compared; the
other files hold configuration that libraries write, with paths and lists in no fixed order.
"""

from __future__ import annotations

import json
import math
import numbers
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch

from sts.errors import StsError
from sts.run.log import environment
from sts.run.recorded import as_recorded
from sts.run.run import OpenRun
from sts.run.store import SUFFIX, Store, read

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

    def differs(self, where: str, what: str) -> None:
        """Note one entry that differs."""
        self.differing += 1
        self.first = self.first or f"{where}: {what}"

    def equal(self, where: str, stored: Any, computed: Any) -> None:
        """Compare two values that must be the same."""
        self.entries += 1
        if stored != computed:
            self.differs(where, f"stored {stored!r}, computed {computed!r}")

    def floats(self, where: Callable[[int], str], stored: numpy.ndarray, computed: numpy.ndarray) -> None:
        """Compare two float64 arrays of one length; `where` names the entry at an index."""
        self.entries += len(stored)
        relative = relative_difference(stored, computed)
        self.largest = max(self.largest, float(relative.max(initial=0.0)))
        wrong = numpy.flatnonzero(relative > self.tolerance)
        if len(wrong):
            at = int(wrong[0])
            self.differs(where(at), f"stored {stored[at]:.9g}, computed {computed[at]:.9g} (relative difference "
                                    f"{relative[at]:.2g})")
            self.differing += len(wrong) - 1


def relative_difference(first: numpy.ndarray, second: numpy.ndarray) -> numpy.ndarray:
    """|a - b| / max(|a|, |b|), entry by entry: 0 for equal values and for two NaN, infinite for one NaN or infinity."""
    same = (first == second) | (numpy.isnan(first) & numpy.isnan(second))
    with numpy.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scale = numpy.maximum(abs(first), abs(second))
        relative = abs(first / scale - second / scale)  # divided first: the difference of two huge values overflows
    return numpy.where(same, 0.0, numpy.where(numpy.isfinite(relative), relative, numpy.inf))


# --- comparing ----------------------------------------------------------------------------------------------------

def compare(stored: Any, computed: Any, kind: str, tolerance: float) -> Comparison:
    """Compare two results of a stage.

    Args:
        stored, computed: values as `store.read` gives them: plain values, frames, dicts of tensors, or folders.
        kind: json, parquet, tensors or folder.
        tolerance: relative, for floats.

    Raises:
        StsError: no such kind, or a tolerance that is negative or no number.
    """
    found = Comparison(checked(tolerance))
    if kind not in SUFFIX:
        raise StsError(f"Results of kind {kind!r} are not known. Valid: {', '.join(SUFFIX)}.")
    {"json": _values, "parquet": _frames, "tensors": _tensors, "folder": _folders}[kind](found, "", stored, computed)
    return found


def checked(tolerance: float) -> float:
    """The tolerance; raises `StsError` if it is negative, infinite or NaN."""
    if not 0 <= tolerance < math.inf:
        raise StsError(f"The tolerance is a relative difference, 0 or more, such as 1e-6; got {tolerance!r}.")
    return tolerance


def _values(found: Comparison, where: str, stored: Any, computed: Any) -> None:
    """Plain values, lists and dicts, of any depth; numpy's are taken as the plain values that they hold."""
    stored, computed = (one.tolist() if isinstance(one, numpy.ndarray | numpy.generic) else one
                        for one in (stored, computed))
    name = where or "the result"
    if isinstance(stored, Mapping) and isinstance(computed, Mapping):
        if _same_names(found, name, "keys", stored, computed):
            for key in stored:
                _values(found, f"{where}.{key}" if where else str(key), stored[key], computed[key])
    elif isinstance(stored, list | tuple) and isinstance(computed, list | tuple):
        if len(stored) != len(computed):
            found.entries += 1
            found.differs(name, f"stored {len(stored)} entries, computed {len(computed)}")
            return
        for place, (one, other) in enumerate(zip(stored, computed, strict=True)):
            _values(found, f"{where}[{place}]", one, other)
    elif _is_number(stored) and _is_number(computed) and float in (type(stored), type(computed)):
        found.floats(lambda _: name, *(numpy.array([one], dtype=float) for one in (stored, computed)))
    else:
        found.equal(name, stored, computed)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _same_names(found: Comparison, where: str, what: str, stored: Any, computed: Any) -> bool:
    """Whether two collections hold the same names, noted as one entry."""
    only = [[str(name) for name in one if name not in other] for one, other in ((stored, computed), (computed, stored))]
    found.entries += 1
    if any(only):
        found.differs(where, "; ".join(f"{what} only in the {side} result: {', '.join(names[:5])}"
                                       for side, names in zip(("stored", "computed"), only, strict=True) if names))
    return not any(only)


def _frames(found: Comparison, where: str, stored: pandas.DataFrame, computed: pandas.DataFrame) -> None:
    if not _same_names(found, "the table", "columns", stored.columns, computed.columns):
        return
    if len(stored) != len(computed):
        found.entries += 1
        found.differs("the table", f"stored {len(stored)} rows, computed {len(computed)}")
        return
    for column in stored.columns:
        one, other = stored[column], computed[column]
        if all(pandas.api.types.is_float_dtype(values) for values in (one, other)):
            found.floats(lambda row, column=column: f"row {row}, column {column!r}",
                         one.to_numpy(float, na_value=math.nan), other.to_numpy(float, na_value=math.nan))
            continue
        for row, pair in enumerate(zip(one, other, strict=True)):
            missing = [value is None or value is pandas.NA or value is pandas.NaT for value in pair]
            if all(missing):
                found.entries += 1
            else:
                _values(found, f"row {row}, column {column!r}", *pair)


def _tensors(found: Comparison, where: str, stored: dict[str, torch.Tensor], computed: dict[str, torch.Tensor]) -> None:
    if not _same_names(found, where or "the tensors", "tensors", stored, computed):
        return
    for name, one in stored.items():
        other, label = computed[name], f"{where}{name}"
        kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in (one, other)]
        if kinds[0] != kinds[1]:
            found.entries += 1
            found.differs(label, f"stored {kinds[0]}, computed {kinds[1]}")
            continue

        def at(place: int, one: torch.Tensor = one, label: str = label) -> str:
            return f"{label}[{', '.join(map(str, numpy.unravel_index(place, one.shape)))}]" if one.dim() else label

        if one.is_floating_point():
            found.floats(at, *(tensor.double().flatten().numpy() for tensor in (one, other)))
            continue
        found.entries += one.numel()
        wrong = torch.nonzero((one != other).flatten()).flatten().tolist()
        if wrong:
            found.differs(at(wrong[0]), f"stored {one.flatten()[wrong[0]].item()}, computed "
                                        f"{other.flatten()[wrong[0]].item()}")
            found.differing += len(wrong) - 1


def _folders(found: Comparison, where: str, stored: Path, computed: Path) -> None:
    files = [_results_in(folder) for folder in (stored, computed)]
    if not _same_names(found, "the folder", "files", *files):
        return
    for name, path in files[0].items():
        if path.name == "training.json":
            pair = [json.loads(one[name].read_text(encoding="utf-8")) for one in files]
            _values(found, name, *pair)
        else:
            _tensors(found, f"{name}: ", *(read(one[name], "tensors") for one in files))


def _results_in(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, of the files that are compared."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
            if path.name == "training.json" or path.suffix == ".safetensors"}


# --- recomputing --------------------------------------------------------------------------------------------------

def default_tolerance(run: OpenRun, name: str) -> float:
    """1e-6; 1e-2 for a stage that runs the model itself in less than 32 bits."""
    lower = run.settings.dtype != "float32" and "dtype" in run._spec(name).uses
    return HALF_TOLERANCE if lower else FLOAT32_TOLERANCE


def verify(run: OpenRun, name: str, tolerance: float | None = None) -> Comparison:
    """Compute a stored stage again, in a scratch place that is removed, and compare; the store is left as it is.

    Of a recorded result, what is recorded of it is compared.

    Args:
        run: the run whose stored result is checked.
        tolerance: relative, for floats; None for `default_tolerance`.

    Returns:
        What the comparison found; `surroundings` lists what differs between the machine and software of then and now.

    Raises:
        StsError: the stage, or one that it needs, is not stored under these settings.
    """
    spec, key = run._spec(name), run.key(name)
    path = run.store.find(name, key, spec.kind)
    if path is None:
        raise StsError(f"Stage {name!r} cannot be verified: run {run.settings.name!r} has no undamaged result of it "
                       f"under these settings. Compute it first, by the same command without --verify.")
    missing = [need for need in run._needs(spec) if not run.stored(need)]
    if missing:
        raise StsError(f"Stage {name!r} cannot be verified: it is computed from {', '.join(missing)}, of which run "
                       f"{run.settings.name!r} has no undamaged result. Compute that first: sts stage {missing[0]}")
    tolerance = checked(default_tolerance(run, name) if tolerance is None else tolerance)
    run.folder.mkdir(parents=True, exist_ok=True)  # what is stored may come with the book, in another folder
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=run.folder) as scratch:
        # Nothing in memory, and a store that finds what is stored and writes elsewhere.
        fresh = OpenRun(run.settings, results=run.results)
        fresh.store = Store(Path(scratch), (run.store.folder, *run.store.recorded))
        for seed in fresh.other_seeds:
            fresh.with_seed(seed).store = fresh.store
        computed = read(fresh._compute(spec, key), spec.kind)
        if path.parent in run.store.recorded:  # which leaves texts, weights and large sums out
            part = Path(scratch) / "as-recorded"
            part.mkdir()
            computed = as_recorded(name, spec.kind, computed, part)
        found = compare(read(path, spec.kind), computed, spec.kind, tolerance)
    found.surroundings = _changes(run.provenance(name), environment(run.device))
    return found


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    flat = [{**{key: one.get(key) for key in ("device", "python", "commit")}, **one.get("versions", {})}
            for one in (then, now)]
    return [f"{key} {flat[0].get(key)}, now {value}" for key, value in flat[1].items() if flat[0].get(key) != value]


def report(name: str, found: Comparison) -> str:
    """A comparison in words: the verdict, the first differing entry, the tolerance, and what else has changed."""
    verdict = ("agrees with the stored result" if found.agrees else
               f"differs from the stored result in {found.differing:,} of {found.entries:,} entries")
    lines = [f"{name}: computed again from its inputs as stored, it {verdict}."]
    if found.first:
        lines.append(f"First difference: {found.first}.")
    lines.append(f"{found.entries:,} entries compared; largest relative difference of two floats {found.largest:.2g}, "
                 f"tolerance {found.tolerance:g} (--tolerance).")
    if found.surroundings:
        lines.append(f"Changed since it was stored: {'; '.join(found.surroundings)}.")
    return "\n".join(lines)
