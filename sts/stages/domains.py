"""Stages of the chapter on training domains: several training sets, the same evaluation domains (Table 1).

Every training set is a run of its own (`OpenRun.with_training`), whose stages are those of the other chapters, stored
one by one; a killed comparison goes on where it stopped. Nothing here runs a model itself.
"""

from __future__ import annotations

import numpy as np
import pandas

from sts.book.learned import loss_fall
from sts.engine.evaluate import MEASURES
from sts.errors import StsError
from sts.measure.shift import overlap, shifted_dimensions
from sts.measure.shift_stats import overlap_rows
from sts.measure.training_sets import own_list_lead, specificity
from sts.run.run import OpenRun, stage
from sts.stages.shift import DOMAIN_OF, of_kind

#: What is computed for every training set.
EVERY_SET = ("scores", "shift", "sft", "sft_shift", "domain_shift", "correlations", "text_baselines")
#: Columns of `training_matrix` that are compared with the absolute change.
FORECASTS = ("sts_act", "sts_icl", "tfidf")
#: Variant of the score -> prefix of its columns.
PREFIX = {"paper": "sts", "official_code": "official"}


def training_seeds(run: OpenRun) -> tuple[int, ...]:
    """The run's own seed and the others at which training sets are compared."""
    return tuple(dict.fromkeys((run.settings.seed, *run.settings.training_seeds)))


def training_runs(run: OpenRun) -> dict[tuple[str, int], OpenRun]:
    """(training set, seed) -> run; the run's own training set first, and of each all seeds in turn."""
    names = dict.fromkeys((run.settings.sft_data, *run.settings.training_sets))
    return {(name, seed): run.with_training(name).with_seed(seed) for name in names for seed in training_seeds(run)}


def trained_domain(run: OpenRun) -> str:
    """The evaluation domain that a run trains on, by MMLU-Pro's name; "several" if there is more than one."""
    own = {DOMAIN_OF.get(example.domain, example.domain) for example in run.sft_examples("train")}
    return own.pop() if len(own) == 1 else "several"


# --- cells --------------------------------------------------------------------------------------------------------

def _scores(run: OpenRun) -> pandas.DataFrame:
    """Both scores in both variants by domain: sts_act, sts_icl, official_act, official_icl."""
    scores, parts = run.get("scores"), []
    for variant, prefix in PREFIX.items():
        own = scores[scores["variant"] == variant].set_index("domain")
        parts.append(pandas.DataFrame({f"{prefix}_{name}": own[f"sts_{name}"] for name in ("act", "icl")}))
    return pandas.concat(parts, axis=1)


@stage("parquet", uses=("training_sets", "training_seeds", "sft_data", "top_n", "seed"), inputs=("training_sets",))
def training_matrix(run: OpenRun, report) -> pandas.DataFrame:
    """Forecast and actual change of every evaluation domain for every training set.

    One row a seed, training set, evaluation domain and measure: seed, training_set, trained_domain, domain, measure,
    sts_act, sts_icl, official_act, official_icl (scores), tfidf (likeness of the texts), shift, low, high,
    standard_error, n (change with interval over questions), overlap, overlap_n, overlap_p (latents that demonstrations
    and fine-tuning both name, of how many, and p among those that change at all), loss_fall (held-out problems of the
    training set, share of the starting value).
    """
    frames, runs = [], training_runs(run)
    for done, ((name, seed), own) in enumerate(runs.items(), 1):
        cells = own.get("domain_shift").drop(columns=["before", "after", "mcnemar_p"])
        cells = cells.merge(_scores(own), left_on="domain", right_index=True)
        cells = cells.merge(own.get("text_baselines")[["domain", "tfidf"]], on="domain")
        shared = overlap_rows(*_changes(own), [run.settings.top_n])[0]
        frames.append(cells.assign(
            seed=seed, training_set=name, trained_domain=trained_domain(own), overlap=shared["overlap"],
            overlap_n=shared["n"], overlap_p=np.nan if shared["active_p"] is None else shared["active_p"],
            loss_fall=loss_fall(own)))
        report(done / len(runs))
    return pandas.concat(frames, ignore_index=True)


@stage("json", uses=("training_sets", "training_seeds", "sft_data", "seed"), inputs=("training_sets",))
def training_correlations(run: OpenRun, report) -> list[dict]:
    """Stage `correlations` of every training set and seed, over evaluation domains (Table 1)."""
    return [{"training_set": name, "seed": seed, **row}
            for (name, seed), own in training_runs(run).items() for row in own.get("correlations")]


# --- lists of latents ---------------------------------------------------------------------------------------------

def _changes(run: OpenRun):
    """Squared change per SAE latent behind demonstrations, and by fine-tuning."""
    return run.get("shift")["squared_difference_L"], of_kind(run.get("sft_shift"), "sae")["squared_difference_L"]


@stage("json", uses=("training_sets", "training_seeds", "sft_data", "top_n", "seed"), inputs=("training_sets",))
def training_overlap(run: OpenRun, report) -> dict:
    """Latents that the lists of two training sets share: are a set's own latents foreseen, or those of any training?

    Returns:
        rows: one a seed and pair of sets, with foreseen (list estimated for `estimated`, list moved by training on
        `trained`), by_rate (list of latents that fire most on the questions of `estimated`, list moved by `trained`),
        estimates and moved (lists of the same kind); latents of N. N and width; and `lead`, by kind (foreseen,
        by_rate): `training_sets.own_list_lead` over all seeds, or `undefined`.
    """
    top_n, runs = run.settings.top_n, training_runs(run)
    names, seeds = list(dict.fromkeys(name for name, _ in runs)), training_seeds(run)
    lists = {}
    for key, own in runs.items():
        estimated_L, moved_L = _changes(own)
        lists[key] = {kind: shifted_dimensions(values_L, top_n) for kind, values_L in (
            ("estimated", estimated_L), ("moved", moved_L), ("rate", own.get("shift")["base_fired_L"].double()))}
    rows = []
    for seed in seeds:
        for first in names:
            for second in names:
                one, other = lists[first, seed], lists[second, seed]
                rows.append({"seed": seed, "estimated": first, "trained": second,
                             "foreseen": overlap(one["estimated"], other["moved"]),
                             "by_rate": overlap(one["rate"], other["moved"]),
                             "estimates": overlap(one["estimated"], other["estimated"]),
                             "moved": overlap(one["moved"], other["moved"])})
    lead = {}
    for kind in ("foreseen", "by_rate"):
        try:
            lead[kind] = own_list_lead(_shared(rows, kind), seed=run.settings.seed)
        except StsError as error:
            lead[kind] = {"undefined": str(error)}
    return {"rows": rows, "n": top_n, "width": len(estimated_L), "lead": lead}


def _shared(rows: list[dict], kind: str) -> np.ndarray:
    """One kind of the rows of `training_overlap` as seeds x estimated x trained, in the order of the rows."""
    sets = len({row["trained"] for row in rows})
    return np.array([row[kind] for row in rows], float).reshape(-1, sets, sets)


def beyond_rate(rows: list[dict]) -> dict[str, float]:
    """`own_list_lead` of what lists moved by demonstrations share more than lists by firing rate do, pair by pair.

    Args:
        rows: of stage `training_overlap`.

    Returns:
        As `own_list_lead`; lead is the difference of the two leads. Or `undefined`, with one training set.
    """
    try:
        return own_list_lead(_shared(rows, "foreseen") - _shared(rows, "by_rate"))
    except StsError as error:
        return {"undefined": str(error)}


# --- which training set moves a domain ----------------------------------------------------------------------------

def cube(cells: pandas.DataFrame, column: str) -> np.ndarray:
    """One column of `training_matrix`, of one measure, as seeds x training sets x domains (alphabetical)."""
    seeds, names = cells["seed"].unique(), cells["training_set"].unique()
    wide = cells.pivot(index=["seed", "training_set"], columns="domain", values=column)
    return np.stack([wide.loc[[(seed, name) for name in names]].to_numpy(float) for seed in seeds])


@stage("json", uses=("bootstrap", "permutations", "seed"), needs=("training_matrix",), version=2)
def training_specificity(run: OpenRun, report) -> list[dict]:
    """Does a forecast tell which training set moves a domain: `training_sets.specificity` of the absolute change.

    One row a measure and forecast (STS_act and STS_ICL by the paper's formulas; likeness of texts as a rival):
    measure, forecast, and either the fields of `Specificity` or `undefined`.
    """
    matrix, rows = run.get("training_matrix"), []
    measures = [measure for measure in MEASURES if (matrix["measure"] == measure).any()]
    for done, measure in enumerate(measures, 1):
        cells = matrix[matrix["measure"] == measure]
        for forecast in FORECASTS:
            row = {"measure": measure, "forecast": forecast}
            try:
                found = specificity(cube(cells, forecast), np.abs(cube(cells, "shift")), seed=run.settings.seed,
                                    resamples=run.settings.permutations, bootstrap=run.settings.bootstrap)
            except StsError as error:
                rows.append(row | {"undefined": str(error)})
            else:
                rows.append(row | found.to_dict())
        report(done / len(measures))
    return rows
