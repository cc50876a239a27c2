"""Whether fine-tuning taught the model anything; no claim is judged in a run in which it did not.

A page about one seed looks at that seed alone, so that it trains no other. Where seeds are averaged or compared,
`every_seed` asks it of each of them.
"""

from __future__ import annotations

import json

from sts.run.run import OpenRun

RULE = ("A run **learned** if the loss on held-out problems of the training domain fell by a tenth of its starting "
        "value or more; the claims are not judged in a run that did not.")
EVERY_SEED_RULE = "What is averaged over seeds is judged only if the run learned with every one of them."
#: See `RULE`.
SMALLEST_FALL = 0.1


def training_log(run: OpenRun) -> dict:
    """What `finetune.fine_tune` returned for the run."""
    return json.loads((run.get("sft") / "training.json").read_text(encoding="utf-8"))


def loss_fall(run: OpenRun) -> float:
    """By what share of its starting value fine-tuning lowered the loss on held-out training-domain problems."""
    log = training_log(run)
    return 1 - log["held_out_after"] / log["held_out_before"]


def loss_falls(run: OpenRun) -> dict[int, float]:
    """`loss_fall` with the run's own seed and with its others, by seed."""
    return {run.settings.seed: loss_fall(run)} | {seed: loss_fall(run.with_seed(seed)) for seed in run.other_seeds}


def _falls(run: OpenRun, every_seed: bool) -> dict[int, float]:
    return loss_falls(run) if every_seed else {run.settings.seed: loss_fall(run)}


def learned(run: OpenRun, *, every_seed: bool = False) -> bool:
    """`RULE`, for the run's own seed; for all of its seeds with `every_seed`."""
    return all(fall >= SMALLEST_FALL for fall in _falls(run, every_seed).values())


def judged(run: OpenRun, verdict: str, *, every_seed: bool = False) -> str:
    """The verdict, or that none is given, as the run did not learn (`RULE`; `EVERY_SEED_RULE` with `every_seed`)."""
    falls = _falls(run, every_seed)
    idle = [str(seed) for seed, fall in falls.items() if fall < SMALLEST_FALL]
    if not idle:
        return verdict
    if len(idle) == len(falls):
        return "not judged, as training taught nothing"
    return f"not judged, as training taught nothing with seed{'s' * (len(idle) > 1)} {', '.join(idle)}"


def learned_sentence(run: OpenRun, *, every_seed: bool = False) -> str:
    """Whether fine-tuning taught the model anything of its own domain; with `every_seed`, seed by seed."""
    falls = _falls(run, every_seed)
    did = [f"fell by {fall:.0%}" if fall >= 0 else f"rose by {-fall:.0%}" for fall in falls.values()]
    told, count = f"{did[0]} of its starting value", sum(fall >= SMALLEST_FALL for fall in falls.values())
    if len(did) > 1:
        each = ", ".join(f"{one} with seed {seed}" for seed, one in zip(falls, did, strict=True))
        told = f"{each} (of its starting value)"
    verdict = {0: "did not learn", len(falls): "learned"}.get(count, f"learned with {count} of {len(falls)} seeds only")
    counts = sorted({training_log(run if seed == run.settings.seed else run.with_seed(seed))["held_out"]
                     for seed in falls})
    problems = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"the loss on {problems} held-out problems {told}: the run **{verdict}**."
