"""Recorded results: small files in data/recorded/<run>/ from which pages render without model, data or hours.

Texts of data sets, weights and large sums are left out; of these the provenance is recorded, as keys rest on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts.errors import StsError
from sts.run.others import rl_runs_of, seeds_of, trainings_of
from sts.run.resources import DRAWN, INPUTS
from sts.run.settings import Run
from sts.run.stage import STAGES, Stage
from sts.run.store import PROVENANCE, Store, read

if TYPE_CHECKING:
    from sts.run.run import OpenRun

#: What stands for a token, and for a text, that is not recorded.
BLANK, NO_TEXT = "□", "(texts of data sets are not recorded; compute this stage to read it)"
#: Of a folder, this file alone is recorded: weights are large.
KEPT_OF_FOLDERS = "training.json"


def _without_tokens(cards: list[dict]) -> list[dict]:
    return [card | {name: [one | {"tokens": [BLANK] * len(one["tokens"])} for one in card[name]]
                    for name in ("contexts", "middling") if name in card} for card in cards]


def _without_answers(written: dict) -> dict:
    return written | {"question": NO_TEXT, "answer": NO_TEXT,
                      "answers": [one | {"answer": NO_TEXT} for one in written["answers"]]}


def _without_prompts(judged: dict) -> dict:
    return judged | {"rows": [row | {"prompt": NO_TEXT, "answer": NO_TEXT} for row in judged["rows"]]}


def texts_withheld(value: list[dict] | dict) -> bool:
    """Whether a result with cards of latents or answers of the model was recorded, without its texts."""
    if isinstance(value, dict):
        return value["question"] == NO_TEXT
    return all(token == BLANK for card in value for context in card["contexts"] for token in context["tokens"])


def _sums(sums: Mapping) -> dict:
    """Of sums by domain ("law/tokens"), those that the paper's scores are made of, and the numbers of tokens."""
    from sts.measure.score import sums_of

    return {name: own for name, own in sums.items() if name.rpartition("/")[2] in ("tokens", *sums_of("paper"))}


def _means(states: Mapping) -> dict:
    """Of states by example their means, as one example; of domains the residual stream's alone."""
    return {name: own.mean(0, keepdim=True) if name[-3:] in ("_ED", "_EL") else own for name, own in states.items()
            if not name.endswith("/sae_L")}


#: Stage -> what is recorded of its result instead of all: a function of it, or None for nothing.
CHANGED: dict[str, Callable[[Any], Any] | None] = {
    "latent_examples": _without_tokens, "ablated_answers": _without_answers, "shifted_examples": _without_tokens,
    "judge_labels": _without_prompts, "domain_stats": _sums,
    "training_answer_states": _means, "domain_answer_states": _means, **dict.fromkeys((
        "pool_activations", "pool_activity", "domain_rows", "text_activations", "latent_strengths", "domain_raw_stats",
        "domain_model_change", "random_latent_scores", "rollouts", "mixture_answers", "greedy_answers"))}


def as_recorded(name: str, kind: str, value: Any, scratch: Path) -> Any:
    """What is recorded of a result, as `store.read` gives it: tensors as 32-bit floats, of a folder one file, copied to
    the folder `scratch`; None for nothing."""
    if name in CHANGED:
        change = CHANGED[name]
        value = change(value) if change else None
    if kind == "folder" and value:
        kept = value / KEPT_OF_FOLDERS
        return Path(shutil.copy2(kept, scratch)).parent if kept.exists() else None
    if kind == "tensors" and value:
        return {field: tensor.float() if tensor.is_floating_point() else tensor for field, tensor in value.items()}
    return value


def record(run: OpenRun, target: Path) -> list[str]:
    """Copy the run's stored results to `target`, those of its further seeds as well; the names with keys, sorted.

    Of further training sets, and of the tensors of further seeds, provenance alone is recorded. What the run no longer
    asks for is removed from `target`. `StsError` where nothing is stored, or a key is not known.
    """
    own, copy = Store(run.store.folder), Store(target)
    others = [one for runs_of in (seeds_of, trainings_of, rl_runs_of) for one in runs_of(run)]
    asked = {f"{name}-{one.key(name)}": ((name, one.key(name), spec.kind), one)
             for one in reversed(others) for name, spec in STAGES.items()}
    found = {label: each for label, each in asked.items() if own.find(*each[0])}
    if not found:
        raise StsError(f"Run {run.settings.name!r} has no results in {own.folder}; compute some first.")
    for path in target.iterdir() if target.is_dir() else ():
        if (label := path.name.partition(".")[0]) in found or label not in asked:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for (name, key, kind), one in found.values():
        drawn = {setting: getattr(one.settings, setting) for what in STAGES[name].inputs if what in DRAWN
                 for setting in INPUTS[what][0]}
        provenance = own.provenance(name, key, kind) | {"drawn": drawn}
        value, scratch = None, copy.scratch(name, key)
        if (one.settings.sft_data == run.settings.sft_data
                and (kind != "tensors" or one.settings.seed == run.settings.seed)):
            value = as_recorded(name, kind, read(own.paths(name, key, kind)[0], kind), scratch)
        if value is None or name in CHANGED or kind == "folder":
            provenance["withheld"] = "all of it" if value is None else "texts, weights or sums"
        copy.write(name, key, kind, value, provenance)
    shutil.rmtree(target / "unfinished")
    return sorted(found)


def recorded_key(folders: Sequence[Path], settings: Run, spec: Stage, needs: Mapping[str, str],
                 known: Mapping[str, str | None]) -> str | None:
    """The key of a recorded result; None if there is none.

    All settings of the record must be the run's, among them those that decide its data, and its digests those that are
    `known`. Of what is read from outside a digest may be unknown (None); what is made of other stages' keys may not.
    """
    for path in (path for folder in folders for path in sorted(folder.glob(f"{spec.name}-*{PROVENANCE}"))):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "drawn" not in found:  # not recorded, but a result of another run
            continue
        decided = found["settings"] | found["drawn"]
        if (found["version"], found["settings"].keys(), found["needs"], found["inputs"].keys()) == (
                spec.version, {*spec.uses}, needs, known.keys()) and all(
                getattr(settings, name, ...) == value for name, value in decided.items()) and all(
                known[what] == value or (known[what] is None and what in INPUTS)
                for what, value in found["inputs"].items()):
            return found["key"]
    return None
