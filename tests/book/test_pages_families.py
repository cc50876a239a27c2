"""What other recorded runs found stands beside a page's own run, and nothing is computed for it."""

import pytest

import sts
from sts.book import pages_baselines, pages_families, pages_forecast, pages_headline, verdicts
from sts.errors import StsError
from sts.run.recorded import record
from sts.run.run import OpenRun
from sts.run.store import Store

PAGES = (pages_families.few, pages_families.foreseen, pages_families.forecast, pages_families.compared)
NEEDED = ("scores", "sft_shift", "shift", "shift_by_draw", "shift_by_other_domain", "domain_shift", "correlations",
          "baseline_correlations", "baseline_nulls", "baseline_confounds")


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
    line = pages_forecast.forecast_line(run, "bits")
    assert line[1:] in said[pages_families.forecast] and "simpler" not in said[pages_families.forecast]
    assert f"`correlations-{run.key('correlations')}`" in said[pages_families.forecast]
    compared = pages_baselines.comparison_sentence(run, pages_baselines.measures(run)[0])
    assert compared in said[pages_families.compared]
    seeds = ", ".join(map(str, (run.settings.seed, *run.other_seeds)))
    assert f"seeds {seeds}" in said[pages_families.compared]
    assert f"seed {run.settings.seed})" in said[pages_families.few]


def test_the_runs_stand_side_by_side_with_their_own_numbers(run, other, monkeypatch):
    assert len(pages_families.forecast_figure(run).axes) == 2 * len(pages_families.drawn_beside(run))
    monkeypatch.setattr(pages_families, "other_runs", lambda run: [other])
    axes = pages_families.forecast_figure(run).axes
    correlations = {row["score"]: row for row in run.get("correlations")
                    if (row["measure"], row["variant"]) == ("bits", "paper")}
    scores = run.get("scores").query("variant == 'paper'").set_index("domain")
    changes = run.get("domain_shift").query("measure == 'bits'").set_index("domain")["shift"].abs()
    assert len(axes) == 4
    for axis, score in zip(axes, ["sts_act", "sts_icl"] * 2, strict=True):
        assert f"r = {correlations[score]['pearson']:.2f}" in axis.get_title()
        points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"}
        assert points == {(scores.loc[name, f"{score}"], change) for name, change in changes.items()}
    note = pages_families.forecast_note(run)
    assert note.count(f"`scores-{run.key('scores')}`") == 2 and "a row a run" in note
    table = pages_families.headlines(run)
    said = pages_headline.headline_table(run)
    assert f"<code>{other.settings.name}</code>" in table and all(value in table for value in said.iloc[:, 1])


def test_a_run_that_lacks_one_seeds_training_is_left_out(run, other, monkeypatch):
    monkeypatch.setattr(pages_families, "other_runs", lambda run: [other])
    seed = other.with_seed(other.other_seeds[0])
    folder = other.store.recorded[0] / f"sft-{seed.key('sft')}"
    assert folder.is_dir()
    away = folder.rename(folder.with_name("away"))
    try:
        assert "No other run" in pages_families.compared(run) and "No other run" not in pages_families.few(run)
        assert "whether something simpler does as well" in pages_families.forecast(run)
    finally:
        away.rename(folder)


def test_recorded_alone_computes_and_reads_nothing(tmp_path):
    alone = sts.open_run("smoke", results=tmp_path).recorded_alone()
    for ask in (lambda: alone.get("sft"), lambda: alone.compute("sae"), lambda: alone.lm,
                lambda: alone.sft_examples("train"), alone.domain_examples, alone.text_examples,
                lambda: alone.with_seed(5).lm):
        with pytest.raises(StsError, match="recorded results alone"):
            ask()
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_without_the_result_is_left_out_and_not_computed(run, tmp_path, monkeypatch):
    empty = sts.open_run("smoke", results=tmp_path, seed=77).recorded_alone()
    monkeypatch.setattr(pages_families, "other_runs", lambda run: [empty])
    assert all("No other run" in page(run) for page in PAGES)
    assert not list(tmp_path.rglob("*.json"))  # no model was made either


def test_other_runs_are_recorded_profiles_and_never_the_own_one(run, tmp_path, monkeypatch):
    for name in ("smoke", "laptop", "no_such_profile"):
        (tmp_path / "data" / "recorded" / name).mkdir(parents=True)
    monkeypatch.setattr(pages_families, "ROOT", tmp_path)
    found = pages_families.other_runs(run)
    assert [one.settings.name for one in found] == ["laptop"]
    with pytest.raises(StsError, match="recorded results alone"):
        found[0].sft_examples("train")
