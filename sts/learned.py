"""Whether fine-tuning taught the model anything; no claim is judged in a run in which it did not."""

from __future__ import annotations

import json

from sts.stages import OpenRun

RULE = ("A run **learned** if the loss on held-out problems of the training domain fell by a tenth of its starting "
        "value or more; the claims are not judged in a run that did not.")
#: See `RULE`.
SMALLEST_FALL = 0.1


def loss_fall(run: OpenRun) -> float:
    """By what share of its starting value fine-tuning lowered the loss on held-out training-domain problems."""
    log = json.loads((run.get("sft") / "training.json").read_text(encoding="utf-8"))
    return 1 - log["held_out_after"] / log["held_out_before"]


def learned(run: OpenRun) -> bool:
    """`RULE`."""
    return loss_fall(run) >= SMALLEST_FALL


def judged(run: OpenRun, verdict: str) -> str:
    """The verdict, or that none is given, as the run did not learn (`RULE`)."""
    return verdict if learned(run) else "not judged, as training taught nothing"


def learned_sentence(run: OpenRun) -> str:
    """Whether fine-tuning taught the model anything of its own domain."""
    fall = loss_fall(run)
    did = f"fell by {fall:.0%}" if fall >= 0 else f"rose by {-fall:.0%}"
    return (f"the loss on {run.settings.sft_held_out} held-out problems {did} of its starting value: the run "
            f"**{'learned' if fall >= SMALLEST_FALL else 'did not learn'}**.")
