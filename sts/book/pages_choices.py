"""Text on how a run's settings were chosen: what was tried, on which data, before any domain was scored."""

from __future__ import annotations

import pandas

from sts.book.learned import SMALLEST_FALL
from sts.book.pages import show_table
from sts.errors import StsError
from sts.run.run import OpenRun


def rates_tried(run: OpenRun) -> list[dict]:
    """The rows of stage `sft_trials` (which says what they hold) if they are there; nothing is computed."""
    try:
        there = bool(run.settings.sft_lr_tried) and run.stored("sft_trials")
    except StsError:  # neither the data nor a recorded result is here
        there = False
    return run.get("sft_trials") if there else []


def choice_sentence(run: OpenRun) -> str:
    """Which learning rates were compared, on what, and whether the run uses the best of them.

    What cannot be read off the results, such as why a layer was taken, is left to the profile's own comments.
    """
    settings = run.settings
    if not settings.sft_lr_tried:
        return f"This run's profile names no learning rates to compare; {settings.sft_lr:g} was taken as given."
    rows = rates_tried(run)
    if not rows:
        tried = ", ".join(f"{one:g}" for one in settings.sft_lr_tried)
        return (f"The profile names learning rates to compare on the training domain's held-out problems ({tried}); "
                f"that has not been done here: `sts stage sft_trials --run {settings.name}` does it. The run uses "
                f"{settings.sft_lr:g}.")
    best = min(rows, key=lambda row: row["held_out_after"])
    said = (f"Learning rates were compared by the loss on {best['held_out']} held-out problems of the training domain, "
            f"after training on {best['train']}; no domain's questions, and no correlation, enter into that. The "
            f"problems are drawn with another seed than the run's, so that few of them are the same. The lowest loss "
            f"was at {best['lr']:g}")
    if settings.sft_lr != best["lr"]:
        return f"{said}. **This run uses another rate, {settings.sft_lr:g}.**"
    said += ", which this run uses"
    if best["lr"] in (min(settings.sft_lr_tried), max(settings.sft_lr_tried)):
        said += "; it is at an edge of the rates tried, so a rate beyond may do better still"
    if settings.sft_examples != best["train"]:
        said += f". The run itself trains on {settings.sft_examples} problems"
    return f"{said}."


def choice_table(run: OpenRun) -> str:
    """The rates that were tried as an HTML table; empty without any."""
    rows = rates_tried(run)
    if not rows:
        return ""
    enough = f"falls by {SMALLEST_FALL:.0%} or more"

    def line(row: dict) -> dict[str, str]:
        fall = 1 - row["held_out_after"] / row["held_out_before"]
        return {"learning rate": f"{row['lr']:g}", "held-out loss before": f"{row['held_out_before']:.3f}",
                "after": f"{row['held_out_after']:.3f}", "change": f"{-fall:+.1%}",
                enough: "yes" if fall >= SMALLEST_FALL else "no"}

    return show_table(pandas.DataFrame([line(row) for row in rows]))
