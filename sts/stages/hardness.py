"""Is it only hardness? A stage that sets a domain's bits before training, and its answers' length, beside the score."""

from __future__ import annotations

import numpy as np
import pandas

from sts.errors import StsError
from sts.measure.correlation import pearson
from sts.measure.resampling import hierarchical_resamples
from sts.run.run import OpenRun, stage
from sts.stages.baselines import SCORES, answer_shortness
from sts.stages.comparison import _interval, item_differences, partial_rows


def _answers(before: pandas.DataFrame, domains: list[str], change_N: np.ndarray) -> dict:
    lengths = before.query("kind == 'solution'").groupby("domain")["characters"].median()
    try:
        shortness = pearson(answer_shortness(before)[domains].to_numpy(), change_N)
    except StsError:  # answers of one length everywhere
        shortness = None
    return {"characters_low": float(lengths.min()), "characters_high": float(lengths.max()), "shortness": shortness}


@stage("json", version=4, uses=("bootstrap", "permutations", "seed"),
       needs=("scores", "domain_shift", "evaluation_before", "evaluation_after"))
def hardness(run: OpenRun, report) -> list[dict]:
    """Do a domain's bits before training go along with its change as the score does? One seed alone.

    One row a measure of `bits` and `bits_answer`, where they were evaluated: measure, n, seed, pearson of the same bits
    before training and the absolute change, with pearson_interval (hierarchical bootstrap), and
    scores: score -> pearson, pearson_interval, less (its pearson minus that of the bits before: mean, and interval
    from the same resamples), left (`partial_rows` given these bits); or `undefined`. For the measure `bits` also
    answers: characters_low and characters_high (median length of the scored answers, shortest and longest domain),
    shortness (pearson of the mean of 1 / characters, or None). Stage `baseline_confounds` has all seeds and more
    controls.
    """
    settings, shifts, before = run.settings, run.get("domain_shift"), run.get("evaluation_before")
    scored, rows = run.get("scores").query("variant == 'paper'").set_index("domain"), []
    differences = item_differences(run.with_seeds(()))
    for measure in (measure for measure in ("bits", "bits_answer") if measure in differences):
        own = differences[measure]
        domains = sorted(own)
        change_N = np.abs([own[domain].mean() for domain in domains])
        bits_N = shifts[shifts["measure"] == measure].set_index("domain")["before"].loc[domains].to_numpy(float)
        row = {"measure": measure, "n": len(domains), "seed": settings.seed}
        x_PSN = scored.loc[domains, list(SCORES)].to_numpy(float).T[:, None]
        try:
            resamples = hierarchical_resamples([own[domain] for domain in domains], resamples=settings.bootstrap,
                                               seed=settings.seed)
            drawn_B = resamples.correlations(bits_N[None])
            row |= {"pearson": pearson(bits_N, change_N), "pearson_interval": _interval(drawn_B), "scores": {}}
            found = [pearson(x_N, change_N) for x_N in x_PSN[:, 0]]
        except StsError as error:
            rows.append(row | {"undefined": str(error)})
            continue
        left = partial_rows(x_PSN, change_N[None], bits_N[None, :, None], resamples, settings)
        for score, x_SN, r, rest in zip(SCORES, x_PSN, found, left, strict=True):
            own_B = resamples.correlations(x_SN)
            row["scores"][score] = {"pearson": r, "pearson_interval": _interval(own_B), "left": rest,
                                    "less": {"mean": r - row["pearson"], "interval": _interval(own_B - drawn_B)}}
        if row["pearson_interval"] is None:
            row["undefined"] = "too few domains for an interval"
        elif measure == "bits":
            row["answers"] = _answers(before, domains, change_N)
        rows.append(row)
    return rows
