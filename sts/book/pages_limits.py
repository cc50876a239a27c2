"""Why a claim may not show: the number of domains, the size of the shift, and the SAE's quality."""

from __future__ import annotations

import json

import pandas

from sts.book.learned import training_log
from sts.book.pages_measures import NAMES, unit
from sts.errors import StsError
from sts.measure.correlation import smallest_detectable_correlation
from sts.run.run import OpenRun


def power_sentence(domains: int) -> str:
    """What a correlation over so many domains can find; from four domains on (`smallest_detectable_correlation`).

    Source: Fisher's z, for a two-sided test at the 5% level with a power of 0.8.
    """
    detectable = smallest_detectable_correlation(domains)
    return (f"With {domains} domains, only a correlation with the measured change of about {detectable:.2f} or more "
            "would be found in four runs of five at the 5% level; noise in the measured changes makes the correlation "
            "with them smaller than the one with the true changes")


def clear_domains(shifts: pandas.DataFrame, measure: str) -> pandas.DataFrame:
    """The domains whose change's 95% interval leaves zero out; one without an interval is not among them.

    Args:
        shifts: stage `domain_shift`.
        measure: one of its measures (`pages_measures.NAMES`).
    """
    own = shifts[shifts["measure"] == measure]
    return own[(own["low"] > 0) | (own["high"] < 0)]


def limits_sentence(run: OpenRun, *measures: str) -> str:
    """Why a correlation may not show: the number of domains, the size of the changes, and what the SAE keeps.

    Args:
        measures: of stage `domain_shift`, those to tell about; changes are in the unit that they have there.
    """
    shifts, told = run.get("domain_shift"), []
    for measure in measures:
        own = shifts[shifts["measure"] == measure]
        median = f"{own['shift'].abs().median():.2g}{unit(measure)}"
        told.append(f"{len(clear_domains(shifts, measure))} of {len(own)} domains changed in {NAMES[measure]} by more "
                    f"than their interval's noise (median absolute change: {median})")
    power = f"{power_sentence(len(own))}. " if len(own) >= 4 else ""
    return f"What limits this run: {'; '.join(told)}. {power}{sae_fidelity(run)}"


def shift_limits_sentence(run: OpenRun) -> str:
    """What a claim about shifted latents rests on: how long training was, how far it moved, and the SAE."""
    log, moved = training_log(run), run.get("sft_shift")
    size = (moved["raw/squared_difference_L"].sum() / moved["raw/base_square_sum_L"].sum()).sqrt().item()
    return (f"what limits this run: {log['steps']} training steps on {log['train']} problems moved the residual stream "
            f"at these tokens by {size:.0%} of its size (root mean square of the change over that of the stream); the "
            f"SAE has {len(moved['sae/base_sum_L']):,} latents, where the SAE that the paper's figure is about has "
            f"28,672. {sae_fidelity(run)}")


def sae_fidelity(run: OpenRun) -> str:
    """How much the SAE keeps of what it reads, from the record of its training; says so if there is none.

    The record (`sae_quality`) leaves first positions and outlier norms out; `recovered` is the loss with the mean in
    place of the residual stream minus the loss with the reconstruction, over the former minus the loss as it is.
    """
    try:
        folder = run.sae_folder if run.settings.sae != "train" or run.stored("sae") else None
    except StsError:  # the weights are not at hand, as on a machine that renders recorded results
        folder = None
    record = folder / "training.json" if folder else None
    held_out = json.loads(record.read_text(encoding="utf-8")).get("held_out", {}) if record and record.is_file() else {}
    if "fraction_of_variance_explained" not in held_out:
        return "How faithful the SAE is, is not recorded with it."
    said = (f"On held-out text the SAE explains {held_out['fraction_of_variance_explained']:.0%} of the residual "
            "stream's variance (attention sinks left out)")
    if "splice" in held_out:
        said += (f", and its reconstruction, put in the stream's place, avoids {held_out['splice']['recovered']:.0%} "
                 "of the loss that the mean in that place costs")
    return f"{said}; what it misses, a score built on it cannot see."
