"""How the values of all sweeps compare: their correlations, differences from the run's own, the ends, the best.

What stage `sweep_correlations` stores, from tables of scores and differences of items.
"""

from __future__ import annotations

import numpy as np
import pandas

from sts.errors import StsError
from sts.measure import sweeps
from sts.measure.correlation import pearson
from sts.measure.resampling import hierarchical_resamples, permutation_p_over_seeds
from sts.run.settings import Run
from sts.stages.comparison import _interval

#: What is found for a measure; see stage `sweep_correlations`.
KINDS = ("values", "claims", "best", "saes")
Place = tuple[str, str]  # axis and value


def compared(measure: str, frames: list[pandas.DataFrame], differences: dict[str, np.ndarray],
             settings: Run) -> dict[str, list[dict]]:
    """The rows of stage `sweep_correlations` for one measure.

    Args:
        frames: for each seed the scores of every axis, value and domain, in the same order.
        differences: domain -> after minus before of its questions, items x seeds.
    """
    domains = sorted(differences)
    change_SN = np.abs(np.stack([differences[domain].mean(0) for domain in domains], axis=1))
    places = frames[0][["axis", "value", "own"]].drop_duplicates().itertuples(index=False)
    values = {(axis, value): own for axis, value, own in places}
    tables = [frame.set_index(["axis", "value", "domain"]).sort_index() for frame in frames]
    resamples = None
    found: dict[str, list[dict]] = {name: [] for name in KINDS}
    for score in sweeps.SCORES:
        x, by_seed, rows, about = {}, {}, {}, {"measure": measure, "score": score}
        for axis, value in values:
            x_SN = np.stack([table.loc[(axis, value)].loc[domains, score].to_numpy(float) for table in tables])
            rows[axis, value] = {**about, "axis": axis, "value": value, "own": bool(values[axis, value]),
                                 "n": len(domains), "seeds": len(frames)}
            try:
                by_seed[axis, value] = [pearson(*pair) for pair in zip(x_SN, change_SN, strict=True)]
                x[axis, value] = x_SN
            except StsError as error:
                rows[axis, value]["undefined"] = str(error)
        found["values"] += rows.values()
        if not x:
            continue
        if resamples is None:
            resamples = hierarchical_resamples([differences[domain] for domain in domains],
                                               resamples=settings.bootstrap, seed=settings.seed)
        drawn = {place: resamples.correlations(x_SN) for place, x_SN in x.items()}
        tests = permutation_p_over_seeds(np.stack(list(x.values())), change_SN, resamples=settings.permutations,
                                         seed=settings.seed)
        for place, test in zip(x, tests, strict=True):
            rows[place] |= {"by_seed": by_seed[place], "pearson": float(np.mean(by_seed[place])),
                            "pearson_interval": _interval(drawn[place]), "p": test.p}
        pairs, ends, (own, middle), (best, place) = _pairs(values, x), _ends(values, x), _owns(values, x), _best(
            x, change_SN, settings)
        # A score that is the run's own under another name is not compared with itself.
        picked = [(place, own)] if own and not np.array_equal(x[place], x[own]) else []
        saes = [(middle, own)] if own and middle else []
        every = list(dict.fromkeys([*pairs.items(), *ends.values(), *picked, *saes]))
        less = dict(zip(every, _differences(every, x, drawn, change_SN, settings), strict=True))
        for pair in pairs.items():
            rows[pair[0]]["less"] = dict(less[pair])
        found["claims"] += [{**about, "axis": axis, "first": first[1], "last": last[1], **less[last, first]}
                            for axis, (last, first) in ends.items()]
        found["best"].append({**about, "axis": place[0], "value": place[1], **vars(best),
                              "less_own": less[picked[0]] if picked else None})
        found["saes"] += [{**about, "own": rows[own]["pearson"], "middle": rows[middle]["pearson"], **less[pair]}
                          for pair in saes]
    correct([row["less"] for row in found["values"] if "less" in row])
    return found


def _pairs(values: dict[Place, bool], x: dict[Place, np.ndarray]) -> dict[Place, Place]:
    """Each other value -> the run's own one on the same axis; where both have a correlation."""
    owns = {place[0]: place for place, own in values.items() if own}
    return {place: owns[place[0]] for place in x if not values[place] and owns[place[0]] in x}


def _ends(values: dict[Place, bool], x: dict[Place, np.ndarray]) -> dict[str, tuple[Place, Place]]:
    """axis -> (last, first) value, for axes whose ends the paper's claim compares; where both have a correlation."""
    ends = {}
    for axis in (name for name, own in sweeps.AXES.items() if own.ends):
        own = [place for place in values if place[0] == axis]
        if len(own) > 1 and own[0] in x and own[-1] in x:
            ends[axis] = (own[-1], own[0])
    return ends


def _owns(values: dict[Place, bool], x: dict[Place, np.ndarray]) -> tuple[Place | None, Place | None]:
    """A place of the run's own score, and one of the middle SAE's; None without, or without a correlation."""
    owns = [place for place, own in values.items() if own and place in x]
    return (next((place for place in owns if place[0] not in sweeps.SAE_AXES), None),
            next((place for place in owns if place[0] in sweeps.SAE_AXES), None))


def _best(x: dict[Place, np.ndarray], change_SN: np.ndarray, settings: Run) -> tuple[sweeps.BestOf, Place]:
    tried = sweeps.different(x)
    best = sweeps.best_of(np.stack(list(tried.values())), change_SN, seed=settings.seed,
                          orders=min(settings.permutations, 20_000))
    return best, list(tried)[best.index]


def _differences(pairs: list[tuple[Place, Place]], x: dict[Place, np.ndarray], drawn: dict[Place, np.ndarray],
                 change_SN: np.ndarray, settings: Run) -> list[dict]:
    """For each pair of scores, r of the first minus r of the second: mean, interval, p."""
    if not pairs:
        return []
    tests = sweeps.swap_tests(np.stack([x[one] for one, _ in pairs]), np.stack([x[two] for _, two in pairs]), change_SN,
                              seed=settings.seed)
    means = {place: float(np.mean([pearson(*pair) for pair in zip(x[place], change_SN, strict=True)]))
             for place in {place for pair in pairs for place in pair}}
    return [{"mean": means[one] - means[two], "interval": _interval(drawn[one] - drawn[two]), "p": test.p}
            for (one, two), test in zip(pairs, tests, strict=True)]


def correct(differences: list[dict]) -> None:
    """Add p_holm to differences: p corrected by Holm's method for all of them together."""
    from statsmodels.stats.multitest import multipletests

    if differences:
        for one, p in zip(differences, multipletests([one["p"] for one in differences], method="holm")[1], strict=True):
            one["p_holm"] = float(p)
