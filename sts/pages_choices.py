"""Text on how a run's settings were chosen: what was tried, on which data, before any domain was scored."""

from __future__ import annotations

import pandas

from sts.learned import SMALLEST_FALL
from sts.pages import show_table
from sts.stages import OpenRun


def rates_tried(run: OpenRun) -> list[dict]:
    """The rows of stage `sft_trials` if they are stored or recorded; nothing is computed."""
    if not run.settings.sft_lr_tried:
        return []
    run.key("scores")  # registers the stages
    key = run.key("sft_trials")
    return run.get("sft_trials") if run.store.find("sft_trials", key, "json") else []


def choice_sentence(run: OpenRun) -> str:
    """How the learning rate was chosen, or that it was not."""
    settings = run.settings
    rate = f"The learning rate, {settings.sft_lr:g},"
    if not settings.sft_lr_tried:
        return f"{rate} was fixed beforehand; this run compared no others. Nothing was chosen on the domains."
    rows = rates_tried(run)
    if not rows:
        tried = ", ".join(f"{one:g}" for one in settings.sft_lr_tried)
        return (f"{rate} is to be compared with {tried} on the training domain's held-out problems; that has not been "
                f"done here: `sts stage sft_trials --run {settings.name}` does it.")
    best = min(rows, key=lambda row: row["held_out_after"])
    said = (f"{rate} was chosen before any domain was evaluated, by the loss on {best['held_out']} held-out problems "
            f"of the training domain after training on {best['train']}. These are drawn at a seed of their own, apart "
            "from the problems of the runs reported here.")
    if settings.sft_lr != best["lr"]:
        said += f" The lowest loss was at {best['lr']:g}; this run uses another rate all the same."
    elif best["lr"] in (min(settings.sft_lr_tried), max(settings.sft_lr_tried)):
        said += " It is at an edge of the rates tried, so a rate beyond may do better still."
    if settings.sft_examples != best["train"]:
        said += f" The runs reported train on {settings.sft_examples} problems."
    return (f"{said} Layer, SAE, N and the number of epochs were fixed beforehand; no setting was chosen on a "
            "correlation.")


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
