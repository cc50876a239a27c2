"""The same result of the book's other recorded runs, beside the run that a page shows: other models, or more data."""

from __future__ import annotations

from collections.abc import Callable

from sts import learned, pages_baselines, verdicts
from sts.config import ROOT
from sts.errors import StsError
from sts.pages import forecast_line
from sts.pages_measures import measures_shown
from sts.stages import STAGES, OpenRun, open_run


def other_runs(run: OpenRun) -> list[OpenRun]:
    """The recorded runs of the book, without this one; recorded results are those in data/recorded/<profile>/."""
    folders = sorted(path for path in (ROOT / "data" / "recorded").glob("*") if path.is_dir())
    found = []
    for folder in folders:
        if folder.name == run.settings.name or not (ROOT / "runs" / f"{folder.name}.yaml").is_file():
            continue
        found.append(open_run(folder.name, results=run.results).recorded_alone())
    return found


def has(run: OpenRun, *stages: str) -> bool:
    """Whether results of these stages are there for a run; nothing is computed."""
    try:
        run.key("scores")  # registers the stages
        return all(run.store.find(name, run.key(name), STAGES[name].kind) for name in stages)
    except StsError:
        return False


def beside(run: OpenRun, sentence: Callable[[OpenRun], str], *stages: str) -> str:
    """The sentence as it reads for each other recorded run that has these stages, as a list with their keys.

    Args:
        sentence: of a run; must need no stage but those named and `sft`.
        stages: what the sentence needs.
    """
    lines = []
    for other in other_runs(run):
        if has(other, "sft", *stages):
            told = learned.learned_sentence(other)
            keys = ", ".join(f"`{name}-{other.key(name)}`" for name in stages)
            lines.append(f"- **{other.settings.model}** (recorded run `{other.settings.name}`, layer "
                         f"{other.settings.layer}, fine-tuned on `{other.settings.sft_data}`, seed "
                         f"{other.settings.seed}): {told} {sentence(other)} *From* {keys}.")
    if not lines:
        return "No other run of this book has recorded this result."
    return "\n".join(["This book's other recorded runs differ in data and budgets, or in the model as well.\n", *lines])


def few(run: OpenRun) -> str:
    """For the chapter on what fine-tuning shifts."""
    return beside(run, lambda other: f"In it, {verdicts.few_sentence(other)}", "sft_shift")


def foreseen(run: OpenRun) -> str:
    """For the chapter on what demonstrations foresee."""
    return beside(run, lambda other: f"In it, {verdicts.foreseen_sentence(other)}", "shift", "sft_shift",
                  "shift_by_draw", "shift_by_other_domain")


def forecast(run: OpenRun) -> str:
    """For the chapter on the score."""
    def told(other: OpenRun) -> str:
        finest, _, accuracy = measures_shown(other.get("domain_shift"))
        shown = [measure for measure in dict.fromkeys((finest, accuracy)) if measure]
        return " ".join(f"{line[0].upper()}{line[1:]}" for line in (forecast_line(other, one) for one in shown))

    return beside(run, told, "domain_shift", "correlations")


def compared(run: OpenRun) -> str:
    """For the chapter on baselines."""
    return beside(run, lambda other: pages_baselines.comparison_sentence(other, pages_baselines.measures(other)[0]),
                  "domain_shift", "baseline_correlations", "baseline_nulls")
