"""Which part of a scored answer changed: its opening words, the letter, or the option's text after it.

Where a data set has no worked solutions, the answer that `bits` and `bits_answer` score is one sentence, "The answer
is (C) <option>.", which opens alike everywhere. A model that learns to begin with a worked solution finds these
words less likely, whatever it knows of the domain.
"""

from __future__ import annotations

import math

import numpy as np
import pandas

from sts.engine.evaluate import openings
from sts.engine.finetune import load_tuned
from sts.errors import StsError
from sts.measure.correlation import pearson
from sts.measure.resampling import Resamples, hierarchical_resamples, permutation_p_over_seeds
from sts.run.run import OpenRun, stage
from sts.run.settings import Run
from sts.stages.baselines import SCORES, answer_shortness
from sts.stages.comparison import _interval, controls_of, partial_rows

#: Part of an answer -> how pages call it.
PARTS = {"opening": "the opening words", "letter": "the right letter, given the opening",
         "text": "the option's text, given the letter"}
#: What the scores stand beside: bits per character before training, and one over the length of the answers.
RIVALS = ("base_bits", "answer_shortness")
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
    """Bits of each part, of the whole and of the wrong letters (mean over them); the items whose opening was scored."""
    opening = run.get(f"openings_{when}").set_index("example_id")
    rows = run.get(f"evaluation_{when}")
    right = rows[rows["is_right"]]
    letter, whole = (right[right["kind"] == kind].set_index("example_id")["loglikelihood"].reindex(opening.index)
                     for kind in ("letter", "solution"))
    letters = rows[~rows["is_right"] & (rows["kind"] == "letter")]
    wrong = letters.groupby("example_id")["loglikelihood"].mean().reindex(opening.index)
    frame = pandas.DataFrame({"opening": opening["loglikelihood"], "letter": letter,
                              "text": whole - letter - opening["loglikelihood"], "whole": whole,
                              "wrong_letters": wrong}) / -math.log(2)
    return frame.assign(domain=opening["domain"]).dropna()


@stage("json", version=3, uses=("seeds", "seed", "bootstrap", "permutations"), inputs=("seeds",),
       needs=("scores", "domain_shift", "text_baselines", "openings_before", "openings_after", "evaluation_before",
              "evaluation_after"))
def answer_parts(run: OpenRun, report) -> list[dict]:
    """Change in bits of each part of the answer, and what correlates with it over domains; mean over seeds.

    One row a part (`PARTS`, and whole), empty where no opening was scored: part, n (domains), questions (most of a
    domain), seeds, before and change (mean over domains and seeds, bits an answer), rose (domains in which the mean
    over seeds rose), share (of the variance over domains of the whole change, the part's covariance with it; parts add
    up to 1; None where the whole does not vary), wrong (letter alone: change and rose of the wrong letters, mean over
    an item's), scores and rivals (`RIVALS`): name -> pearson with the absolute change, pearson_interval (hierarchical
    bootstrap), p (permutation); left: score -> `partial_rows` given the controls of bits per character
    (`controls_of`); or `undefined`.
    """
    runs = [run.with_seed(seed) for seed in (run.settings.seed, *run.other_seeds)]
    before, after = ([_bits(own, when) for own in runs] for when in ("before", "after"))
    if before[0].empty:
        return []
    domains, rows = sorted(before[0]["domain"].unique()), []
    known_SNP = np.stack([_predictors(own, domains).to_numpy(float) for own in runs])
    names = list(_predictors(run, domains))
    controls_SNK = known_SNP[..., [names.index(name) for name in controls_of("bits")]]

    def whole_variance(change_SN: np.ndarray) -> float | None:
        """Covariance with the whole change over domains, as a share of its variance; of the mean over seeds."""
        whole_N = np.stack([values.mean(0) for values in changes("whole")], axis=1).mean(0)
        return float(np.cov(change_SN.mean(0), whole_N)[0, 1] / whole_N.var(ddof=1)) if whole_N.std() > 0 else None

    def changes(part: str) -> list[np.ndarray]:
        return [np.stack([(late.loc[items, part] - early.loc[items, part]).to_numpy()
                          for early, late in zip(before, after, strict=True)], axis=1)
                for _, items in sorted(before[0].groupby("domain").groups.items())]

    for part in (*PARTS, "whole"):
        own = changes(part)
        change_SN = np.stack([values.mean(0) for values in own], axis=1)
        row = {"part": part, "n": len(domains), "questions": max(map(len, own)), "seeds": len(runs),
               "before": float(np.mean([frame.groupby("domain")[part].mean().mean() for frame in before])),
               "change": float(change_SN.mean()), "rose": int((change_SN.mean(0) > 0).sum()),
               "share": whole_variance(change_SN)}
        if part == "letter":
            wrong_SN = np.stack([values.mean(0) for values in changes("wrong_letters")], axis=1)
            row["wrong"] = {"change": float(wrong_SN.mean()), "rose": int((wrong_SN.mean(0) > 0).sum())}
        try:
            resamples = hierarchical_resamples(own, seed=run.settings.seed, resamples=run.settings.bootstrap)
        except StsError as error:  # too few domains or questions
            resamples, reason = None, str(error)
        found = {name: _correlation(known_SNP[..., place], np.abs(change_SN), resamples, run.settings)
                 if resamples else {"undefined": reason} for place, name in enumerate(names)}
        left = partial_rows(np.stack([known_SNP[..., names.index(score)] for score in SCORES]), np.abs(change_SN),
                            controls_SNK, resamples, run.settings)
        rows.append(row | {"scores": {name: found[name] for name in SCORES},
                           "rivals": {name: found[name] for name in RIVALS},
                           "left": dict(zip(SCORES, left, strict=True))})
        report(len(rows) / (1 + len(PARTS)))
    return rows


def _predictors(run: OpenRun, domains: list[str]) -> pandas.DataFrame:
    """The scores (paper's formulas), and what they are compared with and corrected for; one row a domain."""
    before = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["before"]
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")
    return pandas.DataFrame({
        **{score: scores[score] for score in SCORES}, "base_bits": before,
        "question_tokens": run.get("text_baselines").set_index("domain")["question_tokens"],
        "answer_shortness": answer_shortness(run.get("evaluation_before"))}).loc[domains]


def _correlation(x_SN: np.ndarray, change_SN: np.ndarray, resamples: Resamples, settings: Run) -> dict:
    try:
        found = [pearson(x_N, y_N) for x_N, y_N in zip(x_SN, change_SN, strict=True)]
    except StsError as error:
        return {"undefined": str(error)}
    test, = permutation_p_over_seeds(x_SN[None], change_SN, resamples=settings.permutations, seed=settings.seed)
    return {"pearson": float(np.mean(found)), "p": test.p, "pearson_interval": _interval(resamples.correlations(x_SN))}
