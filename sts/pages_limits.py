"""Why a correlation may not show: the number of domains, the size of the measured shift, and the SAE's quality."""

from __future__ import annotations

import json

from sts.errors import StsError
from sts.pages_measures import NAMES
from sts.stages import OpenRun
from sts.stats import smallest_detectable_correlation


def limits_sentence(run: OpenRun, measure: str) -> str:
    """What this run could have found at all: power, how many domains moved clearly, how faithful the SAE is."""
    shifts = run.get("domain_shift")
    own = shifts[shifts["measure"] == measure]
    clear = int(((own["low"] > 0) | (own["high"] < 0)).sum())
    said = []
    if len(own) >= 4:
        said.append(f"with {len(own)} domains, four tests of five find a correlation only if it is "
                    f"{smallest_detectable_correlation(len(own)):.2f} or more in truth")
    said.append(f"{clear} of {len(own)} domains changed in {NAMES[measure]} by more than their own interval's noise, "
                f"the median change being {own['shift'].abs().median():.3f}")
    return f"What it could have found at all: {'; '.join(said)}. {sae_fidelity(run)}"


def sae_fidelity(run: OpenRun) -> str:
    """How much the SAE keeps of what it reads, from the record of its training; says so if there is none."""
    try:
        folder = run.sae_folder
    except StsError:  # the weights are not at hand, as on a machine that renders recorded results
        folder = None
    record = folder / "training.json" if folder else None
    held_out = json.loads(record.read_text(encoding="utf-8")).get("held_out", {}) if record and record.is_file() else {}
    if "fraction_of_variance_explained" not in held_out:
        return "How faithful the SAE is, is not recorded with it."
    said = (f"On held-out text the SAE explains {held_out['fraction_of_variance_explained']:.0%} of the residual "
            "stream's variance")
    if "splice" in held_out:
        said += (f", and its reconstruction, put in the stream's place, avoids {held_out['splice']['recovered']:.0%} "
                 "of the loss that the mean in that place costs")
    return f"{said}; what it misses, a score built on it cannot see."
