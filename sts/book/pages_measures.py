"""Which measures of change a page shows, their table by domain, and what its intervals and tests are."""

from __future__ import annotations

from collections.abc import Iterable

import pandas

from sts.engine.evaluate import BINARY, tied_share
from sts.measure.items import BOOTSTRAP_FROM
from sts.run.run import OpenRun

#: measure -> how tables and sentences call it; the finest first, which resolves the smallest changes.
NAMES = {"bits": "bits per character", "p_right": "p(right option)", "accuracy": "accuracy",
         "accuracy_norm": "accuracy by option text", "accuracy_generated": "accuracy of generated answers",
         "bits_answer": "bits per answer"}
#: Column of stage scores -> how pages call it.
SCORE_NAMES = {"sts_act": "STS_act", "sts_icl": "STS_ICL"}
#: In what order pages take several measures: both kinds of bits, then accuracy, then the others.
ORDER = ("bits", "bits_answer", "accuracy")
ACCURACIES = ("accuracy", "accuracy_norm")
NOTHING_ELSE = "No further measure was evaluated in this run; the setting eval_kinds names what is."


def measures_shown(shifts: pandas.DataFrame) -> tuple[str, str, str]:
    """The measures that a page draws, of those that `domain_shifts` holds: (finest, next, accuracy).

    `accuracy` is what stands beside the paper's accuracy. "" for the last two where nothing but the finest is left.
    """
    evaluated = [measure for measure in NAMES if measure in set(shifts["measure"])]
    others = evaluated[1:]
    return (evaluated[0], others[0] if others else "",
            next((measure for measure in ACCURACIES if measure in others), ""))


def in_order(measures: Iterable[str]) -> list[str]:
    """Measures without repetition, by `ORDER`; the others behind, as they come."""
    return sorted(dict.fromkeys(measures), key=lambda measure: ORDER.index(measure) if measure in ORDER else len(ORDER))


def unit(measure: str) -> str:
    """What stands behind a change's number: nothing for bits, else percentage points."""
    return "" if measure.startswith("bits") else " percentage points"


def decimals(measure: str) -> int:
    """Decimals that changes in a measure are given with."""
    return 3 if measure == "bits" else 1


def p_value(p: float, *, digits: int = 3) -> str:
    """A p-value as text with `digits` decimals; never "0.000", which no test on a finite sample gives."""
    smallest = 10.0**-digits
    return f"<{smallest:.{digits}f}" if p < smallest else f"{p:.{digits}f}"


def shift_table(shifts: pandas.DataFrame) -> pandas.DataFrame:
    """Change with interval, one row a domain, one column a measure, with the number of questions.

    Measures that only say of an item whether it is right have McNemar's p beside them.
    """
    frame = pandas.DataFrame({"domain": sorted(shifts["domain"].unique())}).set_index("domain")
    frame["questions"] = shifts.groupby("domain")["n"].max()
    for measure, name in NAMES.items():
        own = shifts[shifts["measure"] == measure].set_index("domain").reindex(frame.index)
        if own["shift"].isna().all():
            continue
        heading = name if not unit(measure) else f"{name}, points"
        frame[heading] = [_change(row, decimals(measure)) for row in own.itertuples()]
        if measure in BINARY:
            frame[f"p (McNemar), {name}"] = ["" if pandas.isna(p) else p_value(p, digits=2) for p in own["mcnemar_p"]]
    return frame.reset_index()


def _change(row, digits: int) -> str:
    if pandas.isna(row.shift):
        return ""
    if pandas.isna(row.low):
        return f"{row.shift:+.{digits}f} (no interval)"
    return f"{row.shift:+.{digits}f} ({row.low:+.{digits}f} to {row.high:+.{digits}f})"


def mcnemar_note(shifts: pandas.DataFrame) -> str:
    """What the table's McNemar column tests; "" if it has none."""
    if shifts["mcnemar_p"].isna().all():
        return ""
    return ("McNemar's exact test asks, of the questions whose answer turned, whether as many turned from wrong to "
            "right as from right to wrong; its p is each domain's own, not corrected for the number of domains.")


def interval_note(shifts: pandas.DataFrame, resamples: int) -> str:
    """Which intervals over questions the domains' changes have, by `paired_mean_interval`'s rule."""
    kinds = shifts.drop_duplicates("domain").set_index("domain")["interval"].value_counts()
    said = {"bootstrap": f"bootstrap, {resamples:,} resamples",
            "t": f"Student's t for the {kinds.get('t', 0)} of {kinds.sum()} domains with fewer than {BOOTSTRAP_FROM}",
            "none": f"none for the {kinds.get('none', 0)} with a single question"}
    return f"95% interval over questions: {'; '.join(text for kind, text in said.items() if kind in kinds)}"


def ties_sentence(run: OpenRun) -> str:
    """In how many questions letters tie for the likeliest, before and after; "" without letters or ties."""
    shares = [tied_share(run.get(f"evaluation_{when}")) for when in ("before", "after")]
    if not any(share > 0 for share in shares):
        return ""
    return (f"In {shares[0]:.0%} of the questions before training and {shares[1]:.0%} after it, two or more letters "
            "tie for the likeliest, as a model's outputs are rounded; accuracy then takes the first of them, as "
            "lm-evaluation-harness does. The probability of the right option depends on no such choice.")
