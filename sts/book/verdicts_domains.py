"""The rules by which the chapter on training domains judges its claims, and which training sets are judged at all.

The rules were made harder before more than one training set was compared in the published run. `SPECIFIC_RULE` once
took an interaction, tested by shuffling domains, in place of the shuffle of whole sets, and asked less of a reversal.
In 3,000 simulations of four training sets, whose forecast and change were unrelated but each had a strong effect of the
set on nine of the 14 domains, it then said "held" in 14% and "reversed" in 22%; as it stands, in 4% each. With weaker
effects of that kind, or effects on all domains, it says either in 5% or less of 800 simulations.
"""

from __future__ import annotations

import pandas

from sts.book.learned import SMALLEST_FALL
from sts.run.run import OpenRun

SPECIFIC_RULE = ("*The score tells which training set moves a domain* counts as **held** if the mean rank correlation "
                 "within domains has its whole 95% interval over domains above zero, with p below 0.05 when training "
                 "sets are shuffled in each domain, *and* with one-sided p below 0.05 when whole training sets are "
                 "shuffled, which takes four sets or more. It counts as **in step only** if all but the last holds: "
                 "a few training sets that differ in strength, or on one kind of domain, agree with many a score by "
                 "chance. As **reversed** if the interval lies below zero and both p, the one-sided for the other "
                 "side, are below 0.05; otherwise as **not shown**. The interaction is a description and decides "
                 "nothing.")
LEARNED_RULE = ("A training set was **learned** if the loss on its held-out problems fell by a tenth of its starting "
                "value or more. What a set that was not learned shows is not judged, and neither is what compares it "
                "with others. The rule is strict on free text, which has a loss that no training can lower: there a "
                "smaller fall may still move domains.")
OWN_LIST_RULE = ("*Demonstrations name the latents of their own training set* counts as **held** if the lists share "
                 "more with their own set's fine-tuning than with the others', *and* this lead is larger than that of "
                 "the lists by firing rate, each with p below 0.05 over orders of the training sets; otherwise as "
                 "**not shown**.")


def specific_verdict(row: dict) -> str:
    """`SPECIFIC_RULE`, from a row of stage `training_specificity`."""
    if "undefined" in row or row["low"] is None:
        return "undefined"
    if row["p_within"] < 0.05 and row["low"] > 0:
        return "held" if row["p_sets"] < 0.05 else "in step only"
    if row["p_within"] < 0.05 and row["high"] < 0 and row["p_opposite"] < 0.05:
        return "reversed"
    return "not shown"


def own_list_verdict(lead: dict, beyond: dict) -> str:
    """`OWN_LIST_RULE`, from the lead of lists that demonstrations move and from `pipeline_domains.beyond_rate`."""
    if "undefined" in lead:
        return "undefined"
    return "held" if all(one["lead"] > 0 and one["p"] < 0.05 for one in (lead, beyond)) else "not shown"


# --- what is judged -----------------------------------------------------------------------------------------------

def sets_of(run: OpenRun) -> pandas.DataFrame:
    """What `training_matrix` holds of a training set as a whole, one row a set and seed."""
    columns = ["training_set", "seed", "trained_domain", "loss_fall", "overlap", "overlap_n", "overlap_p"]
    return run.get("training_matrix")[columns].drop_duplicates(["training_set", "seed"])


def idle_seeds(run: OpenRun) -> dict[str, list[int]]:
    """Training sets that were not learned (`LEARNED_RULE`), each with the seeds at which they were not."""
    sets = sets_of(run)
    idle = sets[~(sets["loss_fall"] >= SMALLEST_FALL)]
    return {name: own["seed"].tolist() for name, own in idle.groupby("training_set", sort=False)}


def judged_set(run: OpenRun, name: str, seed: int, verdict: str) -> str:
    """The verdict on one training set at one seed, or that none is given, as it was not learned."""
    return "not judged, as it was not learned" if seed in idle_seeds(run).get(name, []) else verdict


def judged_all(run: OpenRun, verdict: str) -> str:
    """The verdict on a comparison of training sets, or that none is given, and because of which sets."""
    idle = idle_seeds(run)
    if not idle:
        return verdict
    several = run.get("training_matrix")["seed"].nunique() > 1
    names = (f"`{name}`" + (f" (seed {', '.join(map(str, seeds))})" if several else "") for name, seeds in idle.items())
    return f"not judged, as {', '.join(names)} {'was' if len(idle) == 1 else 'were'} not learned"
