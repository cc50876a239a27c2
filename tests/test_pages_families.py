"""What other recorded runs found stands beside a page's own run, and nothing is computed for it."""

import pytest

import sts
from sts import pages, pages_families, verdicts
from sts.recorded import record
from sts.stages import OpenRun
from sts.store import Store

PAGES = (pages_families.few, pages_families.foreseen, pages_families.forecast, pages_families.compared)
NEEDED = ("sft_shift", "shift", "shift_by_draw", "shift_by_other_domain", "domain_shift", "correlations",
          "baseline_correlations", "baseline_nulls")


@pytest.fixture(scope="module")
def run():
    return sts.open_run("smoke")


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """A run whose results are recorded, and whose own store is empty."""
    for name in NEEDED:
        run.get(name)
    folder = tmp_path_factory.mktemp("families")
    record(run, folder / "recorded")
    found = sts.open_run("smoke", results=folder).recorded_alone()
    found.store = Store(found.store.folder, (folder / "recorded",))
    return found


def test_every_page_tells_what_the_other_run_found(run, other, monkeypatch):
    monkeypatch.setattr(pages_families, "other_runs", lambda run: [other])

    def computed(self, name):
        raise AssertionError(f"{name} is computed for a page that shows another run")

    monkeypatch.setattr(OpenRun, "compute", computed)
    said = {page: page(run) for page in PAGES}
    for text in said.values():
        assert text.count("- **") == 1 and f"recorded run `{other.settings.name}`" in text
    assert verdicts.few_sentence(run) in said[pages_families.few]
    assert verdicts.foreseen_sentence(run) in said[pages_families.foreseen]
    line = pages.forecast_line(run, "bits")
    assert line[1:] in said[pages_families.forecast]
    assert f"`correlations-{run.key('correlations')}`" in said[pages_families.forecast]


def test_a_run_without_the_result_is_left_out_and_not_computed(run, tmp_path, monkeypatch):
    empty = sts.open_run("smoke", results=tmp_path, seed=77).recorded_alone()
    monkeypatch.setattr(pages_families, "other_runs", lambda run: [empty])
    assert all("No other run" in page(run) for page in PAGES)
    assert not list(tmp_path.rglob("*.json"))  # no model was made either


def test_other_runs_are_recorded_profiles_and_never_the_own_one(run, tmp_path, monkeypatch):
    for name in ("smoke", "laptop", "no_such_profile"):
        (tmp_path / "data" / "recorded" / name).mkdir(parents=True)
        if name != "no_such_profile":
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs" / f"{name}.yaml").touch()
    monkeypatch.setattr(pages_families, "ROOT", tmp_path)
    assert [one.settings.name for one in pages_families.other_runs(run)] == ["laptop"]
