"""The same result of the book's other recorded runs, beside the run that a page shows: other models, or more data."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable

from matplotlib.figure import Figure

from sts.book import learned, pages, pages_baselines, plots, verdicts
from sts.book.pages_forecast import forecast_line
from sts.book.pages_headline import headline_table
from sts.book.pages_measures import NAMES, measures_shown
from sts.errors import StsError
from sts.run.run import OpenRun, open_run
from sts.run.settings import ROOT


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
        tested = sum("undefined" not in row for row in other.get("correlations"))
        lines.append(f"These are of {tested} correlations; no p is corrected for their number.")
        if not has(other, "baseline_correlations", every_seed=True):
            lines.append("Its baselines are not recorded yet, so it is not known whether something simpler does as "
                         "well.")
        return " ".join(lines)

    return beside(run, told, "domain_shift", "correlations")


#: The stages that a row of `forecast_figure` needs.
DRAWN = ("scores", "domain_shift", "correlations")


def drawn_beside(run: OpenRun) -> list[OpenRun]:
    """This run, and each other recorded run with its finest measure: those that `forecast_figure` draws."""
    finest = measures_shown(run.get("domain_shift"))[0]
    others = (other for other in other_runs(run) if has(other, *DRAWN))
    return [run, *(other for other in others if finest in set(other.get("domain_shift")["measure"]))]


def forecast_figure(run: OpenRun) -> Figure:
    """Figure 3 for this run and the book's other recorded runs, a row of panels each; all domains."""
    return plots.score_scatters(
        [(f"{one.settings.name}: {one.settings.model}", *map(one.get, DRAWN)) for one in drawn_beside(run)],
        measures_shown(run.get("domain_shift"))[0])


def forecast_note(run: OpenRun) -> str:
    """The line under `forecast_figure`: what it shows, and run, seed and results of each row; Markdown."""
    rows = "; ".join(
        f"`{one.settings.name}`, seed {one.settings.seed}, from " + ", ".join(
            f"`{name}-{one.key(name)}`" for name in DRAWN)
        for one in drawn_beside(run))
    return ("*Figure 3 side by side: a row a run, with scales of its own. n: above each panel; one seed each; bars: "
            f"95% over questions, hollow points: they include zero; r, p: over domains.* Runs: {rows}.")


def headlines(run: OpenRun) -> str:
    """`pages_headline.headline_table` of each other recorded run that has its baselines; HTML, "" without one."""
    needed = ("baseline_correlations", "baseline_nulls", "baseline_confounds")
    return "".join(
        f"<p>Model <code>{html.escape(other.settings.model)}</code> (recorded run "
        f"<code>{html.escape(other.settings.name)}</code>):</p>{pages.show_table(headline_table(other))}"
        for other in other_runs(run) if has(other, *needed, every_seed=True))


def compared(run: OpenRun) -> str:
    """`beside` for the chapter on baselines: Table 5's claim, `pages_baselines.BASELINE_RULE`, mean over seeds."""
    def told(other: OpenRun) -> str:
        measure = pages_baselines.measures(other)[0]
        return f"Change in {NAMES[measure]}: {pages_baselines.comparison_sentence(other, measure)}"

    return beside(run, told, "baseline_correlations", every_seed=True)
