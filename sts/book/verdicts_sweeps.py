"""Rules of the chapter on ablations, and the verdicts by them. Words and code of a rule stand side by side."""

from __future__ import annotations

from sts.book.pages_baselines import _verdict
from sts.measure.sweeps import SAE_AXES

#: Values whose r differ by no more than this, over the whole interval, are the same: rounding in other batches does it.
SAME_WITHIN = 0.001

FIXED_RULE = ("These rules were fixed before the book's recorded run was looked at, but for what follows. What is said "
              "of values that give the same score, of the best less the run's own, of the run's own SAE beside the "
              "sweep's, and of bits per answer was added after that; and the rule on the paper's claims was made "
              "harder then.")
SETTING_RULE = ("A value of a setting is compared with the run's own by the 95% interval of its r minus r of the run's "
                "own, both taken from the same resamples. It is **the same** if that interval lies within "
                f"{SAME_WITHIN} of zero, by definition (STS_act is measured without the demonstrations before a "
                "domain's questions) or in fact. Else it is **better** (or **worse**) if the interval lies above (or "
                "below) zero, and otherwise **not told apart**. A setting **matters** if any of its other values is "
                "better or worse. As many values are compared, each p (by swapping the two scores within domains) is "
                "also corrected by Holm's method, over all values and both scores of a measure together.")
CLAIM_RULE = ("The paper's claims about rank, width and sparsity are judged at the two ends of the sweep, named "
              "beforehand: **held** if the 95% interval of r of the last value minus r of the first lies below zero "
              "*and* p, by swapping the two scores within domains, is below 0.05; **reversed** if it lies above with p "
              "below 0.05; otherwise **not shown**. *All layers predict* counts as **held** if the claim of positive "
              "correlation is held at every layer, otherwise as **not shown**. Where the values are SAEs that were "
              "trained one by one (width, sparsity, layer), a claim is held or reversed **for these SAEs, one a "
              "value**: another training of the same SAE may change r by as much, and where two SAEs of one shape are "
              "at hand, their difference is told beside it. No p is corrected for the number of claims. That p must "
              "be below 0.05, and that a verdict is on these SAEs alone, was added after the results were seen: it "
              "made the rule harder.")
#: What stands behind a verdict on values that are an SAE each.
ONE_A_VALUE = "for these SAEs, one a value"
BEST_RULE = ("The best of all values is **no more than chance** unless at most 5% of shuffled orders of the domains "
             "give a best value as high, with the pick of the best made anew in every order. This asks whether any "
             "value correlates at all, not whether the best is better than the run's own.")


def value_verdict(less: dict | None) -> str:
    """`SETTING_RULE` for one value, from its row's `less`."""
    if not less or less["interval"] is None:
        return "undefined"
    if max(abs(less["interval"][end]) for end in ("low", "high")) <= SAME_WITHIN:
        return "the same"
    if less["interval"]["low"] > 0:
        return "better"
    return "worse" if less["interval"]["high"] < 0 else "not told apart"


def ends_verdict(claim: dict) -> str:
    """`CLAIM_RULE`, from a row of the `claims` of stage `sweep_correlations`."""
    verdict = {"worse": "held", "better": "reversed", "undefined": "undefined"}.get(value_verdict(claim), "not shown")
    if verdict in ("held", "reversed") and not claim["p"] < 0.05:
        return "not shown"
    return _of_saes(verdict) if claim["axis"] in SAE_AXES else verdict


def _of_saes(verdict: str) -> str:
    return f"{verdict} {ONE_A_VALUE}" if verdict in ("held", "reversed") else verdict


def layers_verdict(rows: list[dict]) -> str:
    """`CLAIM_RULE` for the layers, from their rows for one measure and score."""
    verdicts = [_verdict(row) for row in rows]
    if "undefined" in verdicts:
        return "undefined"
    return _of_saes("held" if set(verdicts) == {"held"} else "not shown")


def best_verdict(best: dict) -> str:
    """`BEST_RULE`, from a row of the `best` of stage `sweep_correlations`."""
    return "more than chance" if best["p"] <= 0.05 else "no more than chance"
