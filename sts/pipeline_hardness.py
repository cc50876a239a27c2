"""Is it only hardness? A stage that sets a domain's bits before training, and its answers' length, beside the score."""

from __future__ import annotations

import numpy as np

from sts.errors import StsError
from sts.pipeline_baselines import SCORES
from sts.pipeline_comparison import _interval, item_differences
from sts.stages import OpenRun, stage
from sts.stats import pearson
from sts.stats_domains import correlation_rows, hierarchical_resamples, permutation_p_over_seeds


def _whole_answers(run: OpenRun, domains: list[str]) -> dict:
    """How long the scored answers are, and the correlations with the change in bits counted per answer instead.

    Bits per character of a one-sentence answer depend on its length: what is the same in every answer is divided by
    few characters in one domain and by many in another.
    """
    before, after = (run.get(f"evaluation_{when}").query("kind == 'solution'").set_index("example_id")
                     for when in ("before", "after"))
    bits, later = -before["loglikelihood"] / np.log(2), -after["loglikelihood"] / np.log(2)
    own = {domain: rows.index for domain, rows in before.groupby("domain")}
    lengths = before["characters"].groupby(before["domain"]).median()
    resamples = hierarchical_resamples([(later - bits)[own[domain]].to_numpy()[:, None] for domain in domains],
                                       resamples=run.settings.bootstrap, seed=run.settings.seed)
    scored = run.get("scores").query("variant == 'paper'").set_index("domain")
    change_N = np.array([abs((later - bits)[own[domain]].mean()) for domain in domains])
    per_answer = {}
    for name, x_N in (*((score, scored.loc[domains, score].to_numpy(float)) for score in SCORES),
                      ("bits", np.array([bits[own[domain]].mean() for domain in domains]))):
        per_answer[name] = {"pearson": pearson(x_N, change_N),
                            "pearson_interval": _interval(resamples.correlations(x_N[None]))}
    short_N = [float((1 / before["characters"][own[domain]]).mean()) for domain in domains]
    shifts = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()
    return {"characters_low": float(lengths.min()), "characters_high": float(lengths.max()),
            "shortness": pearson(short_N, shifts[domains].to_numpy()), "per_answer": per_answer}


@stage("json", version=2, uses=("bootstrap", "permutations", "seed"),
       needs=("scores", "domain_shift", "evaluation_before", "evaluation_after"))
def hardness(run: OpenRun, report) -> list[dict]:
    """Do a domain's bits before training go along with its change, and what is left of the score then? One seed alone.

    One row a measure, where bits were evaluated: n, pearson of the bits before and the absolute change, with
    pearson_interval (hierarchical bootstrap), and left (score -> its partial correlation given these bits: pearson,
    pearson_interval, p by Freedman and Lane's permutations; or `undefined`); or `undefined`. For the bits also
    `answers`: characters_low and characters_high (median length of the scored answers, shortest and longest domain),
    shortness (r of the mean of 1 / characters with the absolute change), per_answer (score, or bits -> pearson and
    pearson_interval with the absolute change in bits per whole answer); or `undefined`. Stage `baseline_confounds` has
    the partial correlations over all seeds, given the questions' length as well.
    """
    alone, settings = run.with_seeds(()), run.settings
    shifts = run.get("domain_shift")
    bits = shifts[shifts["measure"] == "bits"].set_index("domain")["before"]
    scored = run.get("scores").query("variant == 'paper'").set_index("domain")
    rows = []
    for measure, own in (item_differences(alone) if len(bits) else {}).items():
        domains = sorted(own)
        change_SN = np.abs(np.array([[own[domain].mean() for domain in domains]]))
        bits_SN, row = bits[domains].to_numpy(float)[None], {"measure": measure, "n": len(domains)}
        try:
            resamples = hierarchical_resamples([own[domain] for domain in domains], resamples=settings.bootstrap,
                                               seed=settings.seed)
            row |= {"pearson": pearson(bits_SN[0], change_SN[0]),
                    "pearson_interval": _interval(resamples.correlations(bits_SN))}
        except StsError as error:
            rows.append(row | {"undefined": str(error)})
            continue
        if row["pearson_interval"] is None:
            rows.append(row | {"undefined": "too few domains for an interval"})
            continue
        x_PSN, controls_SNK = scored.loc[domains, list(SCORES)].to_numpy(float).T[:, None], bits_SN[..., None]
        found_P = correlation_rows(x_PSN, change_SN, controls_SNK)[:, 0]
        tests = permutation_p_over_seeds(x_PSN, change_SN, controls_SNK, resamples=settings.permutations,
                                         seed=settings.seed)
        row["left"] = {}
        for score, x_SN, found, test in zip(SCORES, x_PSN, found_P, tests, strict=True):
            interval = _interval(resamples.correlations(x_SN, controls_SNK))
            defined = len(domains) >= 4 and np.isfinite(found) and interval is not None
            row["left"][score] = ({"pearson": float(found), "pearson_interval": interval, "p": test.p} if defined else
                                  {"undefined": "too few domains, or nothing left to correlate"})
        if measure == "bits":
            try:
                row["answers"] = _whole_answers(run, domains)
            except StsError as error:
                row["answers"] = {"undefined": str(error)}
        rows.append(row)
    return rows
