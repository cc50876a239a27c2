"""A chapter whose results are not recorded for a run: what is there is shown, with the reason for the rest."""

import nbformat
import papermill
import pytest

import sts
from sts.book.chapters import run_chapter
from sts.errors import MissingData, NotRecorded, StsError
from sts.run.store import Store


def test_a_run_with_records_says_which_of_its_results_is_missing(tmp_path):
    run = sts.open_run("smoke", results=tmp_path, seeds=[], pool={})
    with pytest.raises(MissingData):
        run.get("pool_activations")
    (tmp_path / "recorded").mkdir()
    run.store = Store(run.store.folder, (tmp_path / "recorded",))
    with pytest.raises(NotRecorded, match="'pool_activations' .*is not recorded.*Setting pool"):
        run.get("pool_activations")


def stopping(name):
    """An execution that stops in the third code cell, as papermill does, with an error of this name."""
    def execute(source, target, **how):
        notebook = nbformat.read(source, 4)
        place = [place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"][3]
        error = papermill.PapermillExecutionError(place, 3, notebook.cells[place].source, name, "no <results>", [])
        notebook.cells[place].outputs = [nbformat.v4.new_output("error", ename=name, evalue="no", traceback=["tb"])]
        for at in (place, 0):
            notebook.cells.insert(at, nbformat.v4.new_markdown_cell("An exception", metadata={
                "tags": [papermill.execute.ERROR_MARKER_TAG]}))
        nbformat.write(notebook, target)
        raise error
    return execute


def test_its_page_ends_with_where_to_look_and_what_needs_no_results(tmp_path, monkeypatch):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    monkeypatch.setattr(papermill, "execute_notebook", stopping("NotRecorded"))
    cells = nbformat.read(run_chapter("what_the_shifted_latents_mean", "smoke"), 4).cells
    sources = [cell.source for cell in cells]
    assert sources[0].startswith("# What the shifted latents mean")
    assert [source for source in sources if source.startswith("**Not recorded**: see run")]
    assert [cell for cell in cells if cell.get("outputs")] == [] and "An exception" not in sources
    assert sum(cell.cell_type == "code" for cell in cells) == 3
    assert any(":label: ex-mean-3" in source for source in sources) and "## Provenance" not in sources


def test_any_other_error_stops_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STS_RESULTS", str(tmp_path))
    monkeypatch.setattr(papermill, "execute_notebook", stopping("StsError"))
    with pytest.raises(StsError, match="stopped in cell 3: StsError: no <results>"):
        run_chapter("what_the_shifted_latents_mean", "smoke")
