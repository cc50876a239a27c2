"""What else goes along with a domain's change, and how much of a result hangs on one training set.

The rivals know nothing of the training set: how hard a domain's answers are before training, and how short they are.
All is worked out from stages `training_matrix` and `evaluation_before`, which is the same for every training set and
seed; nothing here runs a model.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations

import numpy as np
import pandas
from scipy import stats as scipy_stats

from sts.engine.evaluate import item_measures
from sts.errors import StsError
from sts.measure.correlation import correlate, pearson
from sts.measure.training_sets import within_domains
from sts.run.run import OpenRun
from sts.stages.baselines import answer_shortness
from sts.stages.comparison import hardness_of
from sts.stages.domains import cube

#: Rival -> as tables and sentences call it. Hardness is in the unit of the change (`pipeline_comparison.hardness_of`).
RIVALS = {"hardness": "bits before training", "answer_shortness": "1 / length of the answers"}
#: Bits before training by domain -> the measure of an item that they are the mean of.
BEFORE = {"base_bits": "bits", "base_bits_answer": "bits_answer"}


def _cells(run: OpenRun, measure: str) -> pandas.DataFrame:
    matrix = run.get("training_matrix")
    return matrix[matrix["measure"] == measure]


# --- rivals -------------------------------------------------------------------------------------------------------

def rival_values(run: OpenRun) -> pandas.DataFrame:
    """By domain: base_bits and base_bits_answer (mean over questions before training), answer_shortness.

    NaN where no solutions were evaluated.
    """
    rows = run.get("evaluation_before")
    means = item_measures(rows).groupby("domain")[list(BEFORE.values())].mean()
    return means.set_axis(list(BEFORE), axis=1).assign(answer_shortness=answer_shortness(rows))


def rival_row(run: OpenRun, name: str, seed: int, measure: str, rival: str) -> dict:
    """A row like those of stage `correlations`, of a rival with one training set's absolute change over domains.

    Args:
        rival: of `RIVALS`.

    Returns:
        The fields of `stats.Correlation`, by the same bootstrap and permutations as the score's; or `undefined`.
    """
    cells = _cells(run, measure)
    own = cells[(cells["training_set"] == name) & (cells["seed"] == seed)]
    column = hardness_of(measure) if rival == "hardness" else rival
    values = rival_values(run)[column].reindex(own["domain"])
    try:
        return correlate(values.to_numpy(float), own["shift"].abs().to_numpy(), list(own["domain"]), seed=seed,
                         permutations=run.settings.permutations, resamples=run.settings.bootstrap).to_dict()
    except StsError as error:
        return {"undefined": str(error)}


def likeness(run: OpenRun, names: list[str], seed: int, measure: str) -> dict[tuple[str, str], float]:
    """r over domains of the absolute changes of every two training sets; pairs without a correlation are left out."""
    cells = _cells(run, measure)
    own = cells[cells["seed"] == seed].pivot(index="domain", columns="training_set", values="shift").abs()
    found = {}
    for pair in combinations(names, 2):
        with suppress(StsError):
            found[pair] = pearson(*(own[name].to_numpy() for name in pair))
    return found


# --- what hangs on one training set -------------------------------------------------------------------------------

def without_each(run: OpenRun, measure: str, forecast: str) -> dict[str, float]:
    """Mean rank correlation within domains with one training set left out -> that set; empty with fewer than three."""
    cells = _cells(run, measure)
    names, found = list(cells["training_set"].unique()), {}
    if len(names) < 3:
        return found
    values = [cube(cells, forecast), np.abs(cube(cells, "shift"))]
    for place, name in enumerate(names):
        try:
            by_domain_D = within_domains(*(np.delete(one_STD, place, axis=1) for one_STD in values))
        except StsError:  # too few domains
            continue
        if np.isfinite(by_domain_D).any():
            found[name] = float(np.nanmean(by_domain_D))
    return found


def moved_most(run: OpenRun, measure: str) -> tuple[str, int, int]:
    """The training set that moves the most domains farthest (mean over seeds), how many, and of how many."""
    cells = _cells(run, measure)
    change_TD = np.abs(cube(cells, "shift")).mean(0)
    names, counts = list(cells["training_set"].unique()), np.bincount(change_TD.argmax(0), minlength=len(change_TD))
    return names[counts.argmax()], int(counts.max()), change_TD.shape[1]


def same_ranks(run: OpenRun, one: str, other: str) -> tuple[int, int]:
    """In how many domains, of how many, the training sets rank alike by their change in two measures, in all seeds."""
    ranks = [scipy_stats.rankdata(np.abs(cube(_cells(run, measure), "shift")), axis=1) for measure in (one, other)]
    alike_D = (ranks[0] == ranks[1]).all((0, 1))
    return int(alike_D.sum()), len(alike_D)
