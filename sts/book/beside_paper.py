"""The run's numbers beside the paper's: Tables 2 to 4, 6 and 9, the choice of eight domains, and other seeds."""

from __future__ import annotations

import pandas

from sts.book.learned import judged, learned_sentence
from sts.book.pages import correlation_verdict, p_phrase
from sts.book.pages_measures import ACCURACIES, NAMES, NOTHING_ELSE
from sts.measure import paper
from sts.measure.correlation import spearman
from sts.measure.score import VARIANTS
from sts.run.run import OpenRun
from sts.stages.shift import EXTREMES

SCORES = {"sts_act": "STS_act", "sts_icl": "STS_ICL"}


def _find(rows: list[dict], measure: str, score: str, variant: str = "paper") -> dict:
    return next(row for row in rows if (row["measure"], row["variant"], row["score"]) == (measure, variant, score))


def shifts_beside(run: OpenRun) -> pandas.DataFrame:
    """Tables 2 to 4 beside the run: signed change by domain, accuracy in percentage points, the run's also in bits.

    Of the run, what was evaluated: accuracy by the options' letters (else by their texts), bits, or both.

    Domains in the order of the paper's mean absolute change; blank where one side does not have the domain.
    """
    published = paper.accuracy_shifts()
    wide = published.pivot(index="domain", columns="model", values="shift_pct").rename(columns=paper.MODELS)
    wide = wide[[name for name in paper.MODELS.values() if name in wide.columns]]
    own = run.get("domain_shift").pivot(index="domain", columns="measure", values="shift")
    frame = pandas.DataFrame(index=wide.index.union(own.index))
    for measure, digits, label in ((_accuracy(own.columns), 1, ""), ("bits", 3, "bits")):
        if measure in own.columns:
            frame[f"this run, {label or NAMES[measure]}"] = [_signed(value, digits)
                                                             for value in own[measure].reindex(frame.index)]
    for name in wide.columns:
        frame[f"paper, {name}"] = [_signed(value, 2) for value in wide[name].reindex(frame.index)]
    order = published.groupby("domain")["abs_shift_pct"].mean().reindex(frame.index).sort_values(ascending=False)
    return frame.loc[order.index].rename_axis("domain").reset_index()


def _accuracy(evaluated) -> str:
    """The accuracy that stands beside the paper's, of the measures that were evaluated; "" if none was."""
    return next((measure for measure in ACCURACIES if measure in set(evaluated)), "")


def accuracy_sentence(run: OpenRun) -> str:
    """How accuracy is measured here and in the paper (its section on the setting of the evaluation)."""
    ours = {"accuracy": "the right option's letter is the likeliest of the letters",
            "accuracy_norm": "the right option's text is the likeliest by character", "": ""}[
        _accuracy(run.get("domain_shift")["measure"])]
    paper_way = ("the paper's counts answers that the model generates behind five worked examples, with a chain of "
                 "thought (5-shot, MMLU-Pro's official script)")
    if not ours:
        return f"Accuracy was not evaluated here; {paper_way}."
    return (f"The two accuracies are not the same measure: ours is zero-shot and generates nothing, it counts "
            f"questions where {ours}; {paper_way}.")


def _signed(value: float, digits: int) -> str:
    return "" if pandas.isna(value) else f"{value:+.{digits}f}"


def correlations_beside(run: OpenRun, statistic: str) -> pandas.DataFrame:
    """Table 6 ("pearson") or 9 ("r_squared") beside the run: on all its domains and on its eight extremes.

    The run's by the paper's formulas (variant `paper`), in every measure; the paper's with its spread over repetitions.
    """
    rows = []
    measured = {row["measure"] for row in run.get("correlations")}
    for measure, name in NAMES.items():
        if measure not in measured:
            continue
        for which, stage in (("all domains", "correlations"),
                             (f"{2 * EXTREMES} extremes", "extreme_correlations")):
            row = {"source": f"this run, {name}", "domains": which}
            for score, label in SCORES.items():
                result = _find(run.get(stage), measure, score)
                row[label] = "undefined" if "undefined" in result else f"{result[statistic]:.2f}"
                row["n"] = result.get("n", row.get("n", ""))
            rows.append(row)
    published = paper.published_correlations()
    for model in paper.MODELS:
        by_metric = published[published["model"] == model].set_index("metric")
        rows.append({"source": f"paper, {paper.MODELS[model]}", "domains": "8 extremes", "n": 8} | {
            label: f"{by_metric.loc[metric, statistic]:.2f} ± {by_metric.loc[metric, f'{statistic}_std']:.2f}"
            for metric, label in paper.METRICS.items()})
    return pandas.DataFrame(rows)[["source", "domains", "n", *SCORES.values()]]


def shifts_sentence(run: OpenRun) -> str:
    """How the run's changes of accuracy compare with the paper's: how many are losses, and which domains move."""
    published, own = paper.accuracy_shifts(), run.get("domain_shift")
    measure = _accuracy(own["measure"])
    own = own[own["measure"] == measure].set_index("domain")["shift"]
    losses = ", ".join(f"{(part['shift_pct'] < 0).sum()} of {len(part)} with {paper.MODELS[model]}"
                       for model, part in published.groupby("model", sort=False))
    mean = published.groupby("domain")["abs_shift_pct"].mean()
    shared = own.index.intersection(mean.index)
    here = f"{(own < 0).sum()} of {len(own)} here ({NAMES[measure]})" if measure else "not evaluated here"
    sentence = f"Domains that lost accuracy: {here}; in the paper {losses}."
    if len(shared) > 2 and own.loc[shared].abs().nunique() > 1:
        sentence += (f" The rank correlation of the absolute changes here with the paper's mean over its models is "
                     f"{spearman(own.loc[shared].abs(), mean.loc[shared]):.2f} (n = {len(shared)}).")
    return sentence


def extremes_sentence(run: OpenRun, measure: str) -> str:
    """What keeping only the extremes does to the correlation in this run, and what is expected of it."""
    if not measure:
        return NOTHING_ELSE
    parts = []
    for score, label in SCORES.items():
        every, kept = (_find(run.get(stage), measure, score) for stage in ("correlations", "extreme_correlations"))
        if "undefined" in every or "undefined" in kept:
            parts.append(f"{label}: undefined ({(every.get('undefined') or kept['undefined']).rstrip('.')})")
            continue
        of_every, of_kept = (judged(run, correlation_verdict(row)) for row in (every, kept))
        parts.append(f"{label}: r = {every['pearson']:.2f} on all {every['n']} domains ({of_every}), "
                     f"{kept['pearson']:.2f} on the {kept['n']} extremes ({of_kept}, exact p {p_phrase(kept['p'])}), "
                     f"where the absolute change has {kept['spread_ratio']:.2f} times the "
                     f"standard deviation; undoing that by Thorndike's formula gives {kept['all_domains']:.2f}")
    return f"Change in {NAMES[measure]}. " + ". ".join(parts) + "."


def claim_sentence(run: OpenRun, measure: str) -> str:
    """Whether the paper's claim of Figure 3 held on all domains of this run, for either score in either variant."""
    if not measure:
        return NOTHING_ELSE
    rows = run.get("correlations")
    verdicts = [f"{label} ({variant}) **{judged(run, correlation_verdict(_find(rows, measure, score, variant)))}**"
                for variant in VARIANTS for score, label in SCORES.items()]
    return (f"The paper's claim, a positive correlation with the absolute change, here in {NAMES[measure]} on all "
            f"domains: {', '.join(verdicts)}.")


def seeds_table(run: OpenRun) -> pandas.DataFrame:
    """Pearson's r of every seed, one row a measure, variant and score; all domains and the extremes."""
    frame = pandas.DataFrame(run.get("correlations_by_seed"))
    frame["r"] = [f"{value:.2f}" if pandas.notna(value) else "undefined" for value in frame["pearson"]]
    frame["column"] = [f"seed {row.seed}, {'all' if row.domains == 'all' else 'extremes'}"
                       for row in frame.itertuples()]
    wide = frame.pivot(index=["measure", "variant", "score"], columns="column", values="r")
    return wide[list(dict.fromkeys(frame["column"]))].rename_axis(columns=None).reset_index()


def seeds_sentence(run: OpenRun) -> str:
    """How far the correlations agree over seeds, and whether each learned; says so if the run has one alone."""
    seeds = [run.settings.seed, *run.other_seeds]
    if len(seeds) == 1:
        return (f"This run has one seed, {seeds[0]}, so it says nothing about how much of this is luck of the draw. "
                "`seeds` in a profile adds others: demonstrations, fine-tuning and evaluation are then done again for "
                "each.")
    frame = pandas.DataFrame(run.get("correlations_by_seed"))
    own = frame[(frame["variant"] == "paper") & (frame["domains"] == "all") & frame["pearson"].notna()]
    parts = [f"{SCORES[score]} with the change in {NAMES[measure]} {part['pearson'].min():.2f} to "
             f"{part['pearson'].max():.2f} ("
             + judged(run, f"{(part['p'] < 0.05).sum()} of {len(part)} with p below 0.05", every_seed=True) + ")"
             for (measure, score), part in own.groupby(["measure", "score"])]
    told = learned_sentence(run, every_seed=True)
    return (f"{told[0].upper()}{told[1:]} Over {len(seeds)} seeds ({', '.join(map(str, seeds))}), r on all domains is: "
            f"{'; '.join(parts)}.")
