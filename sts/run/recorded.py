"""Recorded results: small files in data/recorded/<run>/ from which pages render without model, data or hours.

`record` copies what runs have stored. Texts of data sets, weights and large sums are left out; the provenance of what
is left out is recorded all the same, as keys rest on it. `recorded_key` finds a stage's key by that provenance where
the model or the data are missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts.errors import StsError
from sts.run.resources import MADE_OF_KEYS, drawn, seeds_of, trainings_of
from sts.run.stage import STAGES
from sts.run.store import PROVENANCE, Store, read

if TYPE_CHECKING:
    from sts.run.run import OpenRun
    from sts.run.stage import Stage

#: What stands for a token, and for a text, that is not recorded.
BLANK, NO_TEXT = "□", "(texts of data sets are not recorded; compute this stage to read it)"
#: Most a recorded run may take up, in bytes.
LIMIT = 10_000_000
#: Of a folder, this file alone is recorded: weights are large.
KEPT_OF_FOLDERS = "training.json"


def _without_tokens(cards: list[dict]) -> list[dict]:
    def blank(context: dict) -> dict:
        return context | {"tokens": [BLANK] * len(context["tokens"])}

    return [card | {name: [blank(context) for context in card[name]]
                    for name in ("contexts", "middling") if name in card} for card in cards]


def _without_answers(written: dict) -> dict:
    return written | {"question": NO_TEXT, "answer": NO_TEXT,
                      "answers": [one | {"answer": NO_TEXT} for one in written["answers"]]}


def texts_withheld(value: list[dict] | dict) -> bool:
    """Whether the result of stage `latent_examples` or `ablated_answers` was recorded, without its texts."""
    if isinstance(value, dict):
        return value["question"] == NO_TEXT
    tokens = {token for card in value for context in card["contexts"] for token in context["tokens"]}
    return tokens == {BLANK}


def _sums(variant: str) -> Callable[[Mapping], dict]:
    """Of sums by domain ("law/tokens"), those that a variant's scores are made of, and the numbers of tokens."""
    def kept(sums: Mapping) -> dict:
        from sts.measure.score import sums_of

        return {field: value for field, value in sums.items()
                if field.rpartition("/")[2] in ("tokens", *sums_of(variant))}
    return kept


_SCORED = "size; the sums that scores are made of are recorded"
_VALUES, _NULLS = (f"size; stage baseline_{name} holds what is made of it" for name in ("values", "nulls"))
#: Stage -> (why it is not recorded as it is, what is recorded instead: a function of the result, or None for nothing).
CHANGED: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "latent_examples": ("texts", _without_tokens), "ablated_answers": ("texts", _without_answers),
    "text_activations": ("size", None), "latent_strengths": ("texts", None),
    "domain_stats": (_SCORED, _sums("paper")),
    "domain_rows": (_SCORED, _sums("official_code")),
    "domain_raw_stats": (_VALUES, None), "domain_model_change": (_VALUES, None), "random_latent_scores": (_NULLS, None)}
#: Recorded of the run's own seed alone; of others, stage scores holds what is made of them.
OWN_SEED = ("domain_stats", "domain_rows")


def _reduced(name: str, kind: str, run: OpenRun, own: OpenRun, folder: Path) -> tuple[str, Callable | None]:
    """Why a result is not recorded as it is ("" if it is), and what is recorded instead."""
    if own.settings.sft_data != run.settings.sft_data:
        return "size; stage training_matrix holds what is made of it", None
    if name in OWN_SEED and own.settings.seed != run.settings.seed:
        return f"size; recorded for seed {run.settings.seed} alone", None
    why, change = CHANGED.get(name, ("", lambda value: value))
    if kind != "folder" or why:
        return why, change
    if (folder / KEPT_OF_FOLDERS).exists():
        return f"weights; of the folder {KEPT_OF_FOLDERS} is recorded", change
    return "weights; the stages that need them hold what was measured on them", None


def record(run: OpenRun, target: Path) -> list[str]:
    """Copy the run's stored results to `target`, those of its further seeds as well; sums of tensors as 32-bit floats.

    Of the further training sets, provenance alone is recorded; stage `training_matrix` holds what is made of them.
    Results in `target` that the run no longer asks for, or of stages that are no more, are removed.

    Returns:
        The names with keys of what was recorded, sorted.

    Raises:
        StsError: nothing is stored, or the folder would take up more than `LIMIT`.
    """
    others = trainings_of(run)
    known = [one for one in others if one is run or one.known("sft_train")]
    runs, own, found = [*seeds_of(run), *known], Store(run.store.folder), {}
    for one in runs:
        for name, spec in STAGES.items():
            if own.find(name, one.key(name), spec.kind):
                found.setdefault(f"{name}-{one.key(name)}", (name, one.key(name), spec.kind, one))
    if not found:
        raise StsError(f"Run {run.settings.name!r} has no results in {run.store.folder}; compute some first.")
    target.mkdir(parents=True, exist_ok=True)
    copy = Store(target)
    for name, key, kind, one in found.values():
        stored = own.path(name, key, kind)
        provenance = {field: value for field, value in own.provenance(name, key, kind).items() if field != "checksum"}
        provenance["drawn"] = drawn(one.settings, STAGES[name].inputs)
        why, change = _reduced(name, kind, run, one, stored)
        if why:
            provenance["withheld"] = why
        if change is not None:
            value = as_recorded(name, kind, read(stored, kind), copy.scratch(name, key))
            copy.write(name, key, kind, value, provenance)
            continue
        path = copy.path(name, key, kind)
        if path.exists():  # recorded whole before
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.with_name(path.name + PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(target / "unfinished", ignore_errors=True)
    if len(known) == len(others):  # else what a further training set asks for is not known
        _drop_stale(target, runs)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > LIMIT:
        raise StsError(f"{target} takes up {size / 1e6:.1f} MB; at most {LIMIT / 1e6:.0f} MB are recorded. Leave "
                       "stages out in sts.run.recorded.CHANGED.")
    return sorted(found)


def _drop_stale(target: Path, runs: Sequence[OpenRun]) -> None:
    """Remove what these runs no longer ask for: of stages that are gone or were raised, of settings that changed."""
    asked: dict[str, set[str] | None] = {}
    for path in sorted(target.iterdir()):
        name, _, rest = path.name.rpartition("-")
        if name not in asked:
            try:
                asked[name] = {one.key(name) for one in runs} if name in STAGES else set()
            except StsError:  # what cannot be known here is left alone
                asked[name] = None
        keys = asked[name]
        if keys is not None and rest.partition(".")[0] not in keys:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def as_recorded(name: str, kind: str, value: Any, scratch: Path) -> Any:
    """What is recorded of a stage's result: without texts and large sums, tensors as 32-bit floats.

    Args:
        value: as `store.read` gives it.
        scratch: a folder that exists; of a folder, the file that is kept is copied there.
    """
    if kind == "folder":
        shutil.copy2(value / KEPT_OF_FOLDERS, scratch / KEPT_OF_FOLDERS)
        return scratch
    _, change = CHANGED.get(name, ("", None))
    value = change(value) if change else value
    if kind == "tensors":
        return {field: tensor.float() if str(tensor.dtype) == "torch.float64" else tensor
                for field, tensor in value.items()}
    return value


def provenances(folders: Sequence[Path], name: str) -> Iterator[dict[str, Any]]:
    """The provenance of every recorded result of a stage."""
    for folder in folders:
        for path in sorted(folder.glob(f"{name}-*{PROVENANCE}")):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["stage"] == name:
                yield found


def recorded_key(records: Iterable[Mapping[str, Any]], spec: Stage, uses: Mapping[str, Any], needs: Mapping[str, str],
                 inputs: Mapping[str, str | None], drawn: Mapping[str, Any]) -> str | None:
    """The key of a recorded result with these settings and needs; None if there is none.

    For where an input's own digest cannot be worked out (None), as model or data are not here. Then the settings that
    decide it must be those of the record (`resources.drawn`); what is known must be equal, and what is made of other
    stages' keys must be known.
    """
    for found in records:
        same = (found["version"], found["settings"], found["needs"]) == (spec.version, uses, needs)
        if same and found.get("drawn", {}) == drawn and found["inputs"].keys() == inputs.keys() and all(
                inputs[what] == value or (inputs[what] is None and what not in MADE_OF_KEYS)
                for what, value in found["inputs"].items()):
            return found["key"]
    return None
