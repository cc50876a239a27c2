"""What the records gave before the code was rebuilt: keys of all recorded results, and numbers computed anew from them.

`frozen.json` holds, by run, of every recorded result what its key is made of (`keys`), and rows of the stages that
compare and count (`numbers`), computed by the earlier code from the same records; a table is its columns and rows.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

import sts
from sts.errors import ROOT
from sts.measure.items import MEASURES
from sts.run.log import Reporter
from sts.run.stage import STAGES, key, values

FROZEN = json.loads((Path(__file__).parent / "frozen.json").read_text(encoding="utf-8"))
#: Stages that are no more, with all their records.
DROPPED = {"openings_before", "openings_after", "answer_parts", "hardness", "forecast_sums", "variant_overlap",
           "baseline_power"}
#: Stages that say more since, under another version.
RENEWED = {"baseline_confounds", "training_specificity"}
KEYS = [(run, stage, number) for run, stages in FROZEN["keys"].items() for stage, records in stages.items()
        if stage not in DROPPED | RENEWED for number in range(len(records))]
#: Sums of floats may be added in another order; nothing else may differ.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("run, name, number", KEYS)
def test_every_record_that_stays_has_the_key_that_it_had(run, name, number):
    frozen, spec = FROZEN["keys"][run][name][number], STAGES[name]
    trained = {"sae"} if "trained:" in frozen["inputs"].get("sae", "") else set()
    assert (spec.version, spec.kind) == (frozen["version"], frozen["kind"])
    assert set(spec.uses) == set(frozen["uses"])
    assert {*spec.needs, *trained} == set(frozen["needs"])
    assert set(spec.inputs) == set(frozen["inputs"])
    assert key(spec, frozen["uses"], frozen["needs"], frozen["inputs"]) == frozen["key"]


def test_all_records_are_accounted_for():
    dropped = [stage for stages in FROZEN["keys"].values() for stage in stages if stage in DROPPED]
    records = sum(len(own) for stages in FROZEN["keys"].values() for own in stages.values())
    assert records == 172 and len(KEYS) == 150 and set(dropped) == DROPPED
    assert not DROPPED & STAGES.keys()
    for run, stages in FROZEN["keys"].items():
        folder = ROOT / "data" / "recorded" / run
        for stage in stages.keys() - DROPPED - RENEWED:
            for frozen in stages[stage]:
                found = list(folder.glob(f"{stage}-{frozen['key']}*.provenance.json"))
                assert len(found) == 1, (run, stage, frozen["key"])
        assert not [path for stage in DROPPED for path in folder.glob(f"{stage}-*")]


@cache
def opened(run):
    return sts.open_run(run)


@cache
def computed(run, name):
    """The stage's result, computed from the records that it needs and not read from its own."""
    one = opened(run)
    spec = one.spec(name)
    return spec.compute(**values(one, spec, Reporter(name, shown=False)))


def flat(row, path=""):
    """Nested dicts as one: {"less.sts_act.mean": ...}."""
    if isinstance(row, dict):
        return {place: value for name, own in row.items() for place, value in flat(own, f"{path}.{name}").items()}
    if isinstance(row, (list, tuple)):
        return {place: value for number, own in enumerate(row)
                for place, value in flat(own, f"{path}.{number}").items()}
    return {path.removeprefix("."): row.item() if hasattr(row, "item") else row}


def rows_of(result):
    """A stage's result as rows with a common set of places."""
    if hasattr(result, "to_dict"):
        result = result.to_dict(orient="records")
    if isinstance(result, dict):
        result = ([{"part": part, **row} for part, rows in result.items() for row in rows]
                  if all(isinstance(rows, list) for rows in result.values()) else [result])
    return [flat(row) for row in result]


def identity(row, about):
    return tuple(row.get(name) for name in about)


TABLES = [(run, name) for run, stages in FROZEN["numbers"].items() for name in stages
          if name not in {"baseline_power", "baseline_confounds"}]


@pytest.mark.parametrize("run, name", TABLES)
def test_numbers_computed_anew_are_what_they_were(run, name):
    table = FROZEN["numbers"][run][name]
    found = {identity(row, table["about"]): row for row in rows_of(computed(run, name))}
    assert len(found) == len(rows_of(computed(run, name)))
    missing, compared = [], 0
    for values_of_row in table["rows"]:
        frozen = dict(zip(table["columns"], values_of_row, strict=True))
        row = found.pop(identity(frozen, table["about"]), None)
        if row is None:
            missing.append(identity(frozen, table["about"]))
            continue
        for place, value in frozen.items():
            if value is None:
                assert row.get(place) is None or np.isnan(row[place]), place
            elif isinstance(value, float):
                np.testing.assert_allclose(row[place], value, **CLOSE,
                                           err_msg=f"{identity(row, table['about'])} {place}")
            else:
                assert row[place] == value, (identity(row, table["about"]), place)
            compared += value is not None
    assert not missing and not found and compared >= 3


@pytest.mark.parametrize("run", FROZEN["numbers"])
def test_confounds_are_naive_partial_correlations(run):
    """r of what is left of both after least squares on the controls, by seed, from each seed's own records."""
    from sts.run.others import seeds_of

    rows = computed(run, "baseline_confounds")
    controls = ("base_bits", "question_tokens", "base_p_right")
    assert {tuple(row["controls"]) for row in rows} == {*((name,) for name in controls), controls}
    for row in rows:
        by_seed = []
        for one in seeds_of(opened(run)):
            known, shift = one.get("baseline_values").set_index("domain"), one.get("domain_shift")
            known["base_p_right"] = shift[shift["measure"] == "p_right"].set_index("domain")["before"]
            change = shift[shift["measure"] == row["measure"]].set_index("domain")["shift"].abs()
            known = known.loc[change.index]
            design = np.column_stack([np.ones(len(known)), known[row["controls"]]])
            left = [own - design @ np.linalg.lstsq(design, own, rcond=None)[0]
                    for own in (known[row["score"]].to_numpy(float), change.to_numpy(float))]
            by_seed.append(scipy_stats.pearsonr(*left).statistic)
        np.testing.assert_allclose(row["by_seed"], by_seed, rtol=1e-7, atol=1e-9)
        assert row["pearson"] == pytest.approx(np.mean(by_seed)) and 0 < row["p"] <= 1
        assert row["pearson_interval"]["low"] < row["pearson"] < row["pearson_interval"]["high"]


def test_only_measures_that_stay_are_compared():
    for run in FROZEN["numbers"]:
        for name in ("domain_shift", "correlations", "change_quality"):
            assert {row["measure"] for row in rows_of(computed(run, name))} <= set(MEASURES)
