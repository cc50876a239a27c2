"""Recorded results: small files in data/recorded/<run>/ from which pages render without model, data or hours.

`record` copies what a run has stored. Texts of data sets, weights and large sums are left out; the provenance of what
is left out is recorded all the same, as keys rest on it. `recorded_key` finds a stage's key by that provenance where
the model or the data are missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sts.errors import StsError
from sts.run.store import PROVENANCE, Store, read

if TYPE_CHECKING:
    from sts.run.run import OpenRun, Stage

#: What stands for a token, and for a text, that is not recorded.
BLANK, NO_TEXT = "□", "(texts of data sets are not recorded; compute this stage to read it)"
#: Most a recorded run may take up, in bytes.
LIMIT = 10_000_000


def _without_tokens(cards: list[dict]) -> list[dict]:
    def blank(context: dict) -> dict:
        return context | {"tokens": [BLANK] * len(context["tokens"])}

    return [card | {"contexts": [blank(context) for context in card["contexts"]]} for card in cards]


def _without_answers(written: dict) -> dict:
    return written | {"question": NO_TEXT, "answer": NO_TEXT,
                      "answers": [one | {"answer": NO_TEXT} for one in written["answers"]]}


def texts_withheld(value: list[dict] | dict) -> bool:
    """Whether the result of stage `latent_examples` or `ablated_answers` was recorded, without its texts."""
    if isinstance(value, dict):
        return value["question"] == NO_TEXT
    tokens = {token for card in value for context in card["contexts"] for token in context["tokens"]}
    return tokens == {BLANK}


def _sums(*kept: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Of sums by domain ("law/tokens"), those named `kept` and the numbers of tokens."""
    return lambda sums: {field: value for field, value in sums.items()
                         if field.rpartition("/")[2] in ("tokens", *kept)}


#: Stage -> (why it is not recorded as it is, what is recorded instead: a function of the result, or None for nothing).
CHANGED: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "latent_examples": ("texts", _without_tokens),
    "ablated_answers": ("texts", _without_answers),
    "text_activations": ("size", None),
    "domain_stats": ("size; the sums that scores are made of are recorded", _sums("base_sum_L",
                                                                                   "squared_difference_L")),
    "domain_rows": ("size; the sums that scores are made of are recorded", _sums("base_square_sum_L",
                                                                                  "squared_difference_L")),
    "domain_raw_stats": ("size; stage baseline_values holds what is made of it", None),
    "domain_model_change": ("size; stage baseline_values holds what is made of it", None),
    "random_latent_scores": ("size; stage baseline_nulls holds what is made of it", None),
}
#: Recorded of the run's own seed alone; of others, stage scores holds what is made of them.
OWN_SEED = ("domain_stats", "domain_rows")
_TRAINING = ("sft_data", "sft_examples", "sft_held_out", "seed")
_DOMAINS = ("domain_data", "domain_split", "domains", "domain_limit")
#: Input of a stage (`OpenRun.identity`) -> the settings that decide what it is; the stage itself need not use them.
DECIDED_BY = {"sft_train": _TRAINING, "sft_held_out": _TRAINING, "domain_data": _DOMAINS,
              "demonstrations": ("domain_data", "demonstration_split", "domains"),
              "generation_data": (*_TRAINING, *_DOMAINS, "demonstration_split")}
#: Of a folder, this file alone is recorded: weights are large.
KEPT_OF_FOLDERS = "training.json"


def drawn(run: OpenRun, spec: Stage) -> dict[str, Any]:
    """The settings that decide what a stage's inputs are: name and value (`DECIDED_BY`)."""
    return {setting: getattr(run.settings, setting)
            for what in spec.inputs for setting in DECIDED_BY.get(what, ())}


def record(run: OpenRun, target: Path) -> list[str]:
    """Copy the run's stored results to `target`, those of its further seeds as well; sums of tensors as 32-bit floats.

    Of the further training sets, provenance alone is recorded; stage `training_matrix` holds what is made of them.
    Results in `target` that the run no longer asks for are removed.

    Returns:
        The names with keys of what was recorded, sorted.

    Raises:
        StsError: nothing is stored, or the folder would take up more than `LIMIT`.
    """
    from sts.run.run import registered

    own = Store(run.store.folder)
    found, runs = {}, (run, *(run.with_seed(seed) for seed in run.other_seeds), *_training_runs(run))
    for one in runs:
        for name, spec in registered().items():
            if own.find(name, one.key(name), spec.kind):
                found.setdefault(f"{name}-{one.key(name)}", (name, one.key(name), spec.kind, one))
    if not found:
        raise StsError(f"Run {run.settings.name!r} has no results in {run.store.folder}; compute some first.")
    target.mkdir(parents=True, exist_ok=True)
    copy = Store(target)
    for name, key, kind, one in found.values():
        provenance = {field: value for field, value in own.provenance(name, key, kind).items() if field != "checksum"}
        provenance["drawn"] = drawn(one, registered()[name])
        why, change = CHANGED.get(name, ("", lambda value: value))
        if one.settings.sft_data != run.settings.sft_data:
            why, change = "size; stage training_matrix holds what is made of it", None
        if name in OWN_SEED and one.settings.seed != run.settings.seed:
            why, change = f"size; recorded for seed {run.settings.seed} alone", None
        if kind == "folder" and not why:
            if (own.path(name, key, kind) / KEPT_OF_FOLDERS).exists():
                why = f"weights; of the folder {KEPT_OF_FOLDERS} is recorded"
            else:
                why, change = "weights; the stages that need them hold what was measured on them", None
        if why:
            provenance["withheld"] = why
        if change is None:
            path = copy.path(name, key, kind)
            path.with_name(path.name + PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
            continue
        value = as_recorded(name, kind, read(own.path(name, key, kind), kind), copy.scratch(name, key))
        copy.write(name, key, kind, value, provenance)
    shutil.rmtree(target / "unfinished", ignore_errors=True)
    _drop_stale(target, runs)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > LIMIT:
        raise StsError(f"{target} takes up {size / 1e6:.1f} MB; at most {LIMIT / 1e6:.0f} MB are recorded. Leave "
                       "stages out in sts.run.recorded.CHANGED.")
    return sorted(found)


def _drop_stale(target: Path, runs: tuple[OpenRun, ...]) -> None:
    """Remove results that these runs no longer ask for: of stages that were raised, or of settings that changed.

    Nothing is removed where a further training set cannot be read: what it asks for is not known then.
    """
    from sts.run.run import registered
    from sts.stages.domains import training_runs

    asked_for = {one.settings.sft_data for one in training_runs(runs[0]).values()}
    if asked_for > {one.settings.sft_data for one in runs}:
        return
    for name in registered():
        try:
            asked = {f"{name}-{one.key(name)}" for one in runs}
        except StsError:  # what cannot be known here is left alone
            continue
        for path in target.glob(f"{name}-*"):
            if path.name.partition(".")[0] not in asked:
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
        value = {field: tensor.float() if tensor.dtype == torch.float64 else tensor for field, tensor in value.items()}
    return value


def _training_runs(run: OpenRun) -> list[OpenRun]:
    """One run for each further training set that can be read here, and seed."""
    from sts.stages.domains import training_runs

    return [one for (name, _), one in training_runs(run).items()
            if name != run.settings.sft_data and one.known_identity("sft_train") is not None]


def provenances(folders: tuple[Path, ...], name: str) -> Iterator[dict[str, Any]]:
    """The provenance of every recorded result of a stage."""
    for folder in folders:
        for path in sorted(folder.glob(f"{name}-*{PROVENANCE}")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["stage"] == name:
                yield record


def recorded_key(run: OpenRun, spec: Stage, uses: dict[str, Any], needs: dict[str, str]) -> str | None:
    """The key of a recorded result with these settings and needs; None if there is none.

    For where an input's own digest cannot be worked out. Then the settings that decide it must be those of the recorded
    result (`DECIDED_BY`); inputs whose digest can be worked out must be equal as well.
    """
    for record in provenances(run.store.recorded, spec.name):
        same = (record["version"], record["settings"], record["needs"]) == (spec.version, uses, needs)
        if same and record.get("drawn") == drawn(run, spec) and all(
                run.known_identity(what) in (None, value) for what, value in record["inputs"].items()):
            return record["key"]
    return None
