"""The same result of the book's other recorded runs, beside the run that a page shows: other models, or more data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from sts import learned, pages_baselines, verdicts
from sts.config import ROOT
from sts.errors import StsError
from sts.pages_forecast import forecast_line
from sts.pages_measures import NAMES, measures_shown
from sts.stages import OpenRun, open_run


def other_runs(run: OpenRun) -> list[OpenRun]:
    """The book's recorded runs, those with a folder in data/recorded/, without this one; nothing of them is computed.

    A profile that can no longer be opened is left out.
    """
    found = []
    for folder in sorted(path for path in (ROOT / "data" / "recorded").glob("*") if path.is_dir()):
        if folder.name == run.settings.name:
            continue
        with contextlib.suppress(StsError):  # one profile out of date must not stop the pages of all others
            found.append(open_run(folder.name, results=run.results).recorded_alone())
    return found


def has(run: OpenRun, *stages: str, every_seed: bool = False) -> bool:
    """Whether results of these stages, and of `sft`, with `every_seed` of each seed, are there; nothing is computed."""
    seeds = [run.with_seed(seed) for seed in run.other_seeds] if every_seed else []
    try:
        return all(run.stored(name) for name in stages) and all(one.stored("sft") for one in (run, *seeds))
    except StsError:  # neither recorded nor the model and the data looked for
        return False


def beside(run: OpenRun, sentence: Callable[[OpenRun], str], *stages: str, every_seed: bool = False) -> str:
    """The sentence as it reads for each other recorded run that has these stages, as a list with their keys.

    Args:
        sentence: of a run; must need no stage but those named and `sft`.
        stages: what the sentence needs.
        every_seed: whether the sentence is about the mean over the run's seeds.

    Returns:
        Markdown: one item a run, or that no other run has recorded the result.
    """
    lines = []
    for other in other_runs(run):
        if has(other, *stages, every_seed=every_seed):
            settings = other.settings
            seeds = (settings.seed, *(other.other_seeds if every_seed else ()))
            keys = ", ".join(f"`{name}-{other.key(name)}`" for name in ("sft", *stages))
            lines.append(f"- **{settings.model}** (recorded run `{settings.name}`, layer {settings.layer}, fine-tuned "
                         f"on `{settings.sft_data}`, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}): "
                         f"{learned.learned_sentence(other, every_seed=every_seed)} {sentence(other)} *From* {keys}.")
    if not lines:
        return "No other run of this book has recorded this result."
    return "\n".join(["This book's other recorded runs differ in data and budgets, or in the model as well.\n", *lines])


def few(run: OpenRun) -> str:
    """`beside` for the chapter on what fine-tuning shifts: Figure 2b's claim, `verdicts.FEW_RULE`."""
    return beside(run, lambda other: f"In it, {verdicts.few_sentence(other)}", "sft_shift")


def foreseen(run: OpenRun) -> str:
    """`beside` for the chapter on what demonstrations foresee: Figure 2a's claim, `verdicts.FORESEEN_RULE`."""
    return beside(run, lambda other: f"In it, {verdicts.foreseen_sentence(other)}", "shift", "sft_shift",
                  "shift_by_draw", "shift_by_other_domain")


def forecast(run: OpenRun) -> str:
    """`beside` for the chapter on the score: Figure 3's claim on all domains, `pages.CORRELATION_RULE`."""
    def told(other: OpenRun) -> str:
        finest, _, accuracy = measures_shown(other.get("domain_shift"))
        shown = [measure for measure in dict.fromkeys((finest, accuracy)) if measure]
        lines = [f"{line[0].upper()}{line[1:]}" for line in (forecast_line(other, one) for one in shown)]
        if not has(other, "baseline_correlations", every_seed=True):
            lines.append("Its baselines are not recorded yet, so it is not known whether something simpler does as "
                         "well.")
        return " ".join(lines)

    return beside(run, told, "domain_shift", "correlations")


def compared(run: OpenRun) -> str:
    """`beside` for the chapter on baselines: Table 5's claim, `pages_baselines.BASELINE_RULE`, mean over seeds."""
    def told(other: OpenRun) -> str:
        measure = pages_baselines.measures(other)[0]
        return f"Change in {NAMES[measure]}: {pages_baselines.comparison_sentence(other, measure)}"

    return beside(run, told, "baseline_correlations", every_seed=True)
