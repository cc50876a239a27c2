"""The smoke book, from notebooks to a browser: every chapter runs, the strict build is clean, pages work."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml

import sts
from sts.book.chapters import CHAPTERS, chapter_source, quick_page, run_chapter
from sts.errors import ROOT, StsError
from sts.run.recorded import record
from sts.run.run import results_folder
from sts.run.settings import load_run
from sts.run.store import Store


@pytest.fixture(scope="module")
def book(built):
    return built("smoke")


def text_of(notebook) -> str:
    return "\n".join(
        str(output.get("text", "")) + "".join(str(part) for part in output.get("data", {}).values())
        for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)


def test_every_chapter_is_executed_to_its_end_without_errors_or_chatter(book):
    for chapter in CHAPTERS:
        notebook = nbformat.read(results_folder() / "smoke" / "notebooks" / f"{chapter}.ipynb", 4)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert outputs
        assert not [output for output in outputs if output.output_type == "error"]
        # Anything on stderr is a library's warning or a progress bar: neither belongs on a page.
        assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
        # An empty Markdown or HTML object would stand on the page by its Python name.
        assert not [output.data for output in outputs if list(output.get("data", {})) == ["text/plain"]
                    and "IPython.core.display" in output.data["text/plain"]]


def test_numbers_on_the_page_are_the_stages_numbers(book):
    run = sts.open_run("smoke")
    page = text_of(nbformat.read(results_folder() / "smoke" / "notebooks" / "transferability_score.ipynb", 4))
    row = next(row for row in run.get("score_checks") if (row["measure"], row["score"]) == ("bits", "sts_icl"))
    interval = row["pearson_interval"]
    assert f"{row['pearson']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})" in page
    assert run.key("shift") in page  # provenance names the very stage


def test_the_scorecard_is_the_second_page_and_is_executed_last(book):
    listed = yaml.safe_load((ROOT / "_toc.yml").read_text())
    assert listed["parts"][0]["chapters"][0]["file"] == "notebooks/scorecard"
    folder = results_folder() / "smoke" / "notebooks"
    notebooks = {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.ipynb")}
    assert max(CHAPTERS, key=notebooks.get) == "scorecard"
    page = text_of(nbformat.read(folder / "scorecard.ipynb", 4))
    assert page.count("run smoke, with 95% interval") == 2  # of the paper, and beyond it


def test_chapters_leave_the_environment_as_it_was(book):
    before = dict(os.environ)
    run_chapter("scorecard", "smoke")
    assert dict(os.environ) == before


def test_another_parameter_recomputes_only_what_depends_on_it(book):
    stages = results_folder() / "stages"

    def times():  # but of the folder of unfinished work, in which leases come and go
        return {path.name: path.stat().st_mtime_ns for path in stages.iterdir() if path.name != "unfinished"}

    before = times()
    run_chapter("transferability_score", "smoke", {"top_n": 7})
    after = times()
    assert all(after[name] == before[name] for name in before)
    new = {name.split("-")[0] for name in set(after) - set(before)}
    assert {"scores", "correlations"} <= new
    assert new <= {"scores", "correlations", "extreme_correlations", "correlations_by_seed", "baseline_values",
                   "baseline_correlations", "change_quality", "score_checks"}


def test_a_changed_parameter_has_a_notebook_and_a_page_of_its_own(book):
    target = run_chapter("transferability_score", "smoke", {"top_n": 5})
    assert target.name == "transferability_score-top_n=5.ipynb"
    page = quick_page(target).read_text(encoding="utf-8")
    assert "Changed from the profile: top_n = 5." in page and "data:image/png" in page and "{term}" not in page
    assert (target.parent / "_build" / "_page" / target.stem / "html" / "_static" / "sts.css").is_file()


def test_a_page_lies_where_it_is_said_to_below_the_repository_too(book):
    # Where Jupyter Book finds the repository's configuration above a notebook, it takes that for the book's root.
    with tempfile.TemporaryDirectory(dir=ROOT / "tests") as folder:
        target = Path(folder) / "the_papers_numbers.ipynb"
        shutil.copy2(results_folder() / "smoke" / "notebooks" / target.name, target)
        assert quick_page(target).is_file()


def test_a_failing_chapter_is_one_error_and_keeps_finished_stages(book):
    finished = set((results_folder() / "stages").iterdir())
    with pytest.raises(StsError, match="(?s)cell .*'question_tokens' must be a number.*stay stored"):
        run_chapter("what_a_forecast_costs", "smoke", {"question_tokens": 0})
    assert finished <= set((results_folder() / "stages").iterdir())


def test_sources_are_stripped_of_outputs():
    for chapter in CHAPTERS:
        notebook = nbformat.read(chapter_source(chapter), 4)
        assert all(not cell.outputs and cell.execution_count is None
                   for cell in notebook.cells if cell.cell_type == "code")


def test_parameters_declared_by_notebooks_default_to_the_runs_own():
    import papermill

    for chapter in CHAPTERS:
        for name, item in papermill.inspect_notebook(str(chapter_source(chapter))).items():
            setting = name in type(load_run("laptop")).model_fields
            # Three chapters have parameters of their own, which no run has.
            assert name == "run" or setting or chapter in ("what_a_forecast_costs", "the_papers_numbers",
                                                           "forecast_your_own")
            assert not setting or item["default"] == "None" or chapter == "the_papers_numbers"
            assert name != "run" or item["default"] == '"laptop"'


def test_importing_sts_is_quick_because_heavy_libraries_wait():
    code = ("import sys, sts, sts.book, sts.run.run, sts.stages; "
            "print([name for name in ('sae_lens', 'trl', 'lm_eval', 'peft') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


# --- in a browser -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded(book, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    record(sts.open_run("smoke"), folder)
    return folder


# What is one's own is never recorded.
@pytest.mark.parametrize("chapter", [name for name in CHAPTERS if name != "forecast_your_own"])
def test_a_chapter_runs_on_recorded_results_without_model_sae_and_data(recorded, tmp_path, monkeypatch, chapter):
    def gone(*args, **kwargs):
        raise StsError("not here")

    for module in [module for name, module in sys.modules.items() if name.startswith("sts.")]:
        for name in ("resolve_model", "load_model", "load_examples", "load_mixture", "load_texts", "load_sae"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, gone)
    elsewhere = sts.open_run("smoke", results=tmp_path)
    elsewhere.store = Store(tmp_path / "stages", (recorded,))
    monkeypatch.setattr(sts, "open_run", lambda run, **parameters: elsewhere)
    names = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    plt.close("all")


@pytest.fixture(scope="module")
def browser():
    import shutil

    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"])
        yield instance
        instance.close()


PAGES = ["book/introduction", *(page["file"] for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
                                for page in part["chapters"])]


@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_page_works_offline_at_this_width(book, browser, page, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    failed = []
    tab.on("requestfailed", lambda request: failed.append(request.url))
    # The theme declares this constant twice on every page; nothing depends on it.
    tab.on("pageerror", lambda error: "THEBE_JS_URL" in str(error) or failed.append(str(error)))
    tab.goto((book.parent / f"{page}.html").as_uri())
    # The page itself never scrolls sideways; wide tables scroll inside their own boxes.
    assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1
    assert tab.locator("article h1").count() == 1
    body = tab.locator("body").inner_text()
    assert "Traceback" not in body and "Error:" not in body
    if page.startswith("notebooks/"):
        images = tab.locator("article img, main img")
        assert images.count() >= (page != "notebooks/scorecard")
        assert all(images.nth(index).evaluate("image => image.naturalWidth > 100") for index in range(images.count()))
        assert "Run smoke" in body.replace("\n", " ") or page.endswith("the_papers_numbers")
        assert tab.locator(".sts-verdict").count() >= 1
    assert failed == []
    context.close()


def test_formulas_are_typeset_without_a_network(book, browser):
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto((book.parent / "book/method.html").as_uri())
    tab.wait_for_selector("mjx-container", timeout=20_000)
    assert tab.locator("mjx-container").count() >= 5
    assert tab.locator("mjx-merror").count() == 0
    context.close()


def test_a_glossary_term_leads_to_its_definition(book, browser):
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto((book.parent / "notebooks/transferability_score.html").as_uri())
    tab.locator("a[href*='glossary.html#term']").first.click()
    assert "glossary" in tab.url
    tab.wait_for_load_state()
    word = tab.evaluate("document.getElementById(location.hash.slice(1)).innerText")
    assert word.strip().lower() in tab.url.lower().replace("-", " ").replace("_", " ")
    context.close()


@pytest.mark.parametrize(("width", "hinted"), [(1280, False), (375, True)])
def test_headers_stand_over_their_cells_and_wide_figures_have_a_hint_on_a_phone(book, browser, width, hinted):
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    tab.goto((book.parent / "notebooks/what_a_forecast_costs.html").as_uri())
    sides = tab.evaluate("[...document.querySelectorAll('.sts-scroll :is(th, td)')].map("
                         "cell => getComputedStyle(cell).textAlign)")
    assert set(sides) == {"left"}
    figures = tab.evaluate("[...document.querySelectorAll('.cell_output figure')].map(figure => "
                           "[figure.scrollWidth > figure.clientWidth, "
                           "getComputedStyle(figure, '::before').content.includes('swipe')])")
    assert len(figures) >= 3 and all(figure == [hinted, hinted] for figure in figures)
    context.close()
