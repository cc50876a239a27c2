"""Which part of a scored answer changed: its opening words, the letter, or the option's text after it.

Where a data set has no worked solutions, the answer that `bits` and `bits_answer` score is one sentence, "The answer
is (C) <option>.", which opens alike everywhere. A model that learns to begin with a worked solution finds these
words less likely, whatever it knows of the domain.
"""

from __future__ import annotations

import math

import numpy as np
import pandas

from sts.errors import StsError
from sts.evaluate import openings
from sts.finetune import load_tuned
from sts.pipeline_baselines import SCORES
from sts.pipeline_comparison import _interval
from sts.stages import OpenRun, stage
from sts.stats import pearson
from sts.stats_domains import hierarchical_resamples, permutation_p_over_seeds

#: Part of an answer -> how pages call it.
PARTS = {"opening": "the opening words", "letter": "the right letter, given the opening",
         "text": "the option's text, given the letter"}
OPENINGS = ("model", "model_revision", "dtype", "eval_limit", "eval_batch", "opening_questions")


def _openings(run: OpenRun, lm, report) -> pandas.DataFrame:
    settings = run.settings
    limit = min(settings.opening_questions, settings.eval_limit or settings.opening_questions)
    examples = [example for group in run.domain_examples().values() for example in group[:limit]]
    return openings(lm, examples, batch=settings.eval_batch, report=report, work=report.work)


@stage("parquet", uses=OPENINGS, inputs=("model", "domain_data"))
def openings_before(run: OpenRun, report) -> pandas.DataFrame:
    """Log-likelihoods of the answers' opening words under the untuned model; empty where answers have none."""
    return _openings(run, run.lm, report)


@stage("parquet", uses=OPENINGS, needs=("sft",), inputs=("model", "domain_data"))
def openings_after(run: OpenRun, report) -> pandas.DataFrame:
    """The same under the tuned model."""
    return _openings(run, load_tuned(run.load_model(), run.get("sft")), report)


def _bits(run: OpenRun, when: str) -> pandas.DataFrame:
    """Bits of each part and of the whole, by item; the items whose opening was scored."""
    opening = run.get(f"openings_{when}").set_index("example_id")
    rows = run.get(f"evaluation_{when}")
    right = rows[rows["is_right"]]
    letter, whole = (right[right["kind"] == kind].set_index("example_id")["loglikelihood"].reindex(opening.index)
                     for kind in ("letter", "solution"))
    frame = pandas.DataFrame({"opening": opening["loglikelihood"], "letter": letter,
                              "text": whole - letter - opening["loglikelihood"], "whole": whole}) / -math.log(2)
    return frame.assign(domain=opening["domain"]).dropna()


@stage("json", uses=("seeds", "seed", "bootstrap", "permutations"), inputs=("seeds",),
       needs=("scores", "openings_before", "openings_after", "evaluation_before", "evaluation_after"))
def answer_parts(run: OpenRun, report) -> list[dict]:
    """Change in bits of each part of the answer, and its correlation with the scores over domains; mean over seeds.

    One row a part (`PARTS`, and whole), empty where no opening was scored: part, n (domains), questions (most of a
    domain), seeds, before and change (mean over domains and seeds, bits an answer), rose (domains in which the mean
    over seeds rose), scores: score -> pearson with the absolute change, pearson_interval (hierarchical bootstrap), p
    (permutation); or `undefined`.
    """
    runs = [run.with_seed(seed) for seed in (run.settings.seed, *run.other_seeds)]
    before, after = ([_bits(own, when) for own in runs] for when in ("before", "after"))
    if before[0].empty:
        return []
    scored = [own.get("scores").query("variant == 'paper'").set_index("domain") for own in runs]
    domains, rows = sorted(before[0]["domain"].unique()), []
    for part in (*PARTS, "whole"):
        own = {domain: np.stack([(late.loc[items, part] - early.loc[items, part]).to_numpy()
                                 for early, late in zip(before, after, strict=True)], axis=1)
               for domain, items in before[0].groupby("domain").groups.items()}
        change_SN = np.stack([own[domain].mean(0) for domain in domains], axis=1)
        row = {"part": part, "n": len(domains), "questions": max(map(len, own.values())), "seeds": len(runs),
               "before": float(np.mean([frame.groupby("domain")[part].mean().mean() for frame in before])),
               "change": float(change_SN.mean()), "rose": int((change_SN.mean(0) > 0).sum()), "scores": {}}
        for score in SCORES:
            x_SN = np.stack([frame.loc[domains, score].to_numpy(float) for frame in scored])
            try:
                found = [pearson(x_N, y_N) for x_N, y_N in zip(x_SN, np.abs(change_SN), strict=True)]
                resamples = hierarchical_resamples([own[domain] for domain in domains], seed=run.settings.seed,
                                                   resamples=run.settings.bootstrap)
            except StsError as error:
                row["scores"][score] = {"undefined": str(error)}
                continue
            test, = permutation_p_over_seeds(x_SN[None], np.abs(change_SN), resamples=run.settings.permutations,
                                             seed=run.settings.seed)
            row["scores"][score] = {"pearson": float(np.mean(found)), "p": test.p,
                                    "pearson_interval": _interval(resamples.correlations(x_SN))}
        rows.append(row)
        report(len(rows) / (1 + len(PARTS)))
    return rows
