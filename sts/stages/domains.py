"""Stages of the chapter on training domains: several training sets, the same evaluation domains (Table 1).

Every training set is a run of its own, whose stages are those of the other chapters, stored one by one; a killed
comparison goes on where it stopped.
"""

from __future__ import annotations

import json

import numpy as np
import pandas

from sts.errors import StsError
from sts.measure.correlation import plain
from sts.measure.items import MEASURES
from sts.measure.overlap import overlap_rows
from sts.measure.score import overlap, shifted_dimensions
from sts.measure.training_sets import cube, list_lead, specificity
from sts.run.stage import stage

#: Columns of `training_matrix` that are compared with the absolute change.
FORECASTS = ("sts_act", "sts_icl", "tfidf")
#: Variant of the score -> prefix of its columns.
PREFIX = {"paper": "sts", "official_code": "official"}


def _lists(own) -> dict:
    """Squared change per SAE latent behind demonstrations and by fine-tuning, and how often each fires."""
    shift = own.get("shift")
    return {"estimated": shift["squared_difference_L"], "moved": own.get("sft_shift")["sae/squared_difference_L"],
            "rate": shift["base_fired_L"].double()}


@stage("parquet")
def training_matrix(each_training, top_n, report):
    """Forecast and actual change of every evaluation domain for every training set, seed and measure.

    Also overlap, overlap_n, overlap_p (latents that demonstrations and fine-tuning both name, of how many, and p among
    those that change at all) and loss_fall (held-out problems of the training set, share of the starting value).
    """
    frames = []
    for done, own in enumerate(each_training, 1):
        cells, scores = own.get("domain_shift").drop(columns=["before", "after", "mcnemar_p"]), own.get("scores")
        for variant, prefix in PREFIX.items():
            columns = scores[scores["variant"] == variant].set_index("domain")[["sts_act", "sts_icl"]]
            cells = cells.join(columns.set_axis([f"{prefix}_act", f"{prefix}_icl"], axis=1), "domain")
        cells = cells.merge(own.get("text_baselines")[["domain", "tfidf"]], on="domain")
        lists, log = _lists(own), json.loads((own.get("sft") / "training.json").read_text(encoding="utf-8"))
        shared = overlap_rows(lists["estimated"], lists["moved"], [top_n])[0]
        frames.append(cells.assign(
            seed=own.seed, training_set=own.training_set, trained_domain=own.trained_domain,
            overlap=shared["overlap"], overlap_n=shared["n"],
            overlap_p=np.nan if shared["active_p"] is None else shared["active_p"],
            loss_fall=1 - log["held_out_after"] / log["held_out_before"]))
        report(done / len(each_training))
    return pandas.concat(frames, ignore_index=True)


@stage("json")
def training_correlations(each_training):
    """Stage `correlations` of every training set and seed, over evaluation domains (Table 1)."""
    return [{"training_set": own.training_set, "seed": own.seed, **row}
            for own in each_training for row in own.get("correlations")]


@stage("json")
def training_overlap(each_training, top_n, seed):
    """Latents that the lists of two training sets share: are a set's own latents foreseen, or those of any training?

    foreseen: the list estimated for `estimated` and the one moved by training on `trained`; by_rate: the list of
    latents that fire most instead of the estimated one; estimates and moved: lists of the same kind.
    """
    lists, width = {}, 0
    for own in each_training:
        values = _lists(own)
        width = len(values["estimated"])
        lists[own.seed, own.training_set] = {kind: shifted_dimensions(values_L, top_n)
                                             for kind, values_L in values.items()}
    seeds, names = (list(dict.fromkeys(key[place] for key in lists)) for place in (0, 1))
    kinds = {"foreseen": ("estimated", "moved"), "by_rate": ("rate", "moved"), "estimates": ("estimated", "estimated"),
             "moved": ("moved", "moved")}
    rows = [{"seed": one, "estimated": first, "trained": second,
             **{kind: overlap(lists[one, first][of], lists[one, second][beside])
                for kind, (of, beside) in kinds.items()}} for one in seeds for first in names for second in names]
    return {"rows": rows, "n": top_n, "width": width,
            "lead": {kind: list_lead(rows, kind, seed=seed) for kind in ("foreseen", "by_rate")}}


@stage("json", version=2)
def training_specificity(training_matrix, bootstrap, permutations, seed, report):
    """Does a forecast tell which training set moves a domain: `training_sets.specificity` of the absolute change."""
    rows, measures = [], [measure for measure in MEASURES if (training_matrix["measure"] == measure).any()]
    for done, measure in enumerate(measures, 1):
        cells = training_matrix[training_matrix["measure"] == measure]
        for forecast in FORECASTS:
            row = {"measure": measure, "forecast": forecast}
            try:
                found = specificity(cube(cells, forecast), np.abs(cube(cells, "shift")), seed=seed,
                                    resamples=permutations, bootstrap=bootstrap)
                rows.append(row | plain(found))
            except StsError as error:
                rows.append(row | {"undefined": str(error)})
        report(done / len(measures))
    return rows
