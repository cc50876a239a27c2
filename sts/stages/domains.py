"""Several training sets, the same evaluation domains (Table 1); every training set is a run of its own."""

from __future__ import annotations

import numpy as np
import pandas

from sts.data.groups import trained_domains
from sts.errors import StsError
from sts.measure.correlation import plain
from sts.measure.items import MEASURES
from sts.measure.score import overlap, overlap_rows, shifted_dimensions
from sts.measure.training_sets import cube, list_lead, loss_fall, specificity
from sts.run.resources import train
from sts.run.stage import stage
from sts.run.store import read

#: Columns of `training_matrix` that are compared with the absolute change.
FORECASTS = ("sts_act", "sts_icl", "tfidf")


def _lists(own) -> dict:
    """Squared change per SAE latent behind demonstrations and by fine-tuning, and how often each fires."""
    shift = own.get("shift")
    return {"estimated": shift["squared_difference_L"], "moved": own.get("sft_shift")["sae/squared_difference_L"],
            "rate": shift["base_fired_L"].double()}


@stage("parquet")
def training_matrix(each_training, top_n):
    """Forecast and actual change of every evaluation domain for every training set, seed and measure; also overlap,
    overlap_n, overlap_p (latents that demonstrations and fine-tuning both name, of how many, p among those that change
    at all) and loss_fall (held-out problems of the training set, share of the starting value)."""
    frames = []
    for own in each_training:
        cells = own.get("domain_shift").drop(columns=["before", "after", "mcnemar_p"])
        scores = own.get("scores").pivot(index="domain", columns="variant", values=["sts_act", "sts_icl"])
        for variant, prefix in (("paper", "sts"), ("official_code", "official")):
            for score in ("act", "icl"):
                cells[f"{prefix}_{score}"] = cells["domain"].map(scores[f"sts_{score}", variant])
        cells = cells.merge(own.get("text_baselines")[["domain", "tfidf"]], on="domain")
        lists = _lists(own)
        trained = trained_domains(train(own))
        shared, = overlap_rows(lists["estimated"], lists["moved"], [top_n])
        frames.append(cells.assign(
            seed=own.settings.seed, training_set=own.settings.sft_data,
            trained_domain=trained.pop() if len(trained) == 1 else "several",
            overlap=shared["overlap"], overlap_n=shared["n"],
            overlap_p=np.nan if shared["active_p"] is None else shared["active_p"],
            loss_fall=loss_fall(read(own.get("sft") / "training.json", "json"))))
    return pandas.concat(frames, ignore_index=True)


@stage("json")
def training_correlations(each_training):
    """Stage `correlations` of every training set and seed, over evaluation domains (Table 1)."""
    return [{"training_set": own.settings.sft_data, "seed": own.settings.seed, **row}
            for own in each_training for row in own.get("correlations")]


@stage("json")
def training_overlap(each_training, top_n, seed):
    """Latents that the lists of two training sets share: are a set's own foreseen, or those of any training? foreseen:
    the list estimated for `estimated` and the one moved by training on `trained`; by_rate: of latents that fire most
    in place of the estimated one; estimates, moved: lists of the same kind."""
    lists = {(own.settings.seed, own.settings.sft_data): {
        kind: shifted_dimensions(values_L, top_n) for kind, values_L in _lists(own).items()} for own in each_training}
    kinds = {"foreseen": ("estimated", "moved"), "by_rate": ("rate", "moved"), "estimates": ("estimated", "estimated"),
             "moved": ("moved", "moved")}
    rows = [{"seed": one, "estimated": first, "trained": second,
             **{kind: overlap(lists[one, first][left], lists[one, second][right])
                for kind, (left, right) in kinds.items()}}
            for one in dict.fromkeys(key[0] for key in lists) for first in dict.fromkeys(key[1] for key in lists)
            for second in dict.fromkeys(key[1] for key in lists)]
    return {"rows": rows, "n": top_n, "width": len(_lists(each_training[0])["rate"]),
            "lead": {kind: list_lead(rows, kind, seed=seed) for kind in ("foreseen", "by_rate")}}


@stage("json", version=3)
def training_specificity(training_matrix, bootstrap, permutations, seed):
    """Does a forecast tell which training set moves a domain: `training_sets.specificity` of the absolute change."""
    rows = []
    for measure in (measure for measure in MEASURES if (training_matrix["measure"] == measure).any()):
        cells = training_matrix[training_matrix["measure"] == measure]
        for forecast in FORECASTS:
            row = {"measure": measure, "forecast": forecast}
            try:
                row |= plain(specificity(cube(cells, forecast), np.abs(cube(cells, "shift")), seed=seed,
                                         resamples=permutations, bootstrap=bootstrap))
            except StsError as error:
                row["undefined"] = str(error)
            rows.append(row)
    return rows
