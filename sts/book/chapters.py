"""Executing chapters with papermill and rendering them with Jupyter Book. The chapters are those of _toc.yml."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.execute import ERROR_MARKER_TAG

from sts.errors import ROOT, StsError, one_of
from sts.run.run import results_folder
from sts.run.settings import Run, load_run

#: Names of the chapters, notebooks/<name>.ipynb, in the order of _toc.yml.
CHAPTERS = tuple(page["file"].removeprefix("notebooks/")
                 for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
                 for page in part["chapters"] if page["file"].startswith("notebooks/"))
#: Built from what the other chapters stored, so executed after them, wherever it stands.
LAST = "scorecard"
#: glibc gives large blocks back to the system and fetches them again, page by page, for every tensor; keeping them
#: makes training on a CPU faster. Read when a process starts, so it is set for the notebooks' kernels.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33),
               "MALLOC_TOP_PAD_": str(2**28)}


def chapter_source(chapter: str) -> Path:
    """The notebook file of a chapter; `StsError` without one."""
    name = Path(chapter).stem
    if name not in CHAPTERS:
        raise one_of("Chapter", chapter, CHAPTERS)
    return ROOT / "notebooks" / f"{name}.ipynb"


def check_parameters(chapter: str, run: str, parameters: Mapping[str, Any]) -> Run:
    """The run with these parameters; `StsError` where the notebook declares none of that name or type."""
    declared = {name: str(item["inferred_type_name"]) for name, item in papermill.inspect_notebook(
        str(chapter_source(chapter))).items() if name != "run"}
    valid = ", ".join(f"{name} ({kind})" for name, kind in declared.items())
    for name, value in parameters.items():
        if name not in declared:
            raise StsError(f"Chapter {Path(chapter).stem!r} has no parameter {name!r}. Valid: {valid}.")
        if type(value).__name__ != declared[name] and (declared[name], type(value)) != ("float", int):
            raise StsError(f"Parameter {name!r} must be of type {declared[name]}; got {value!r}. Valid: {valid}.")
    return load_run(run, {name: value for name, value in parameters.items() if name in Run.model_fields})


def run_chapter(chapter: str, run: str = "laptop", parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a chapter; results/<run>/notebooks/<chapter>[-<parameter>=<value>...].ipynb. `StsError` for wrong
    parameters, or where the chapter fails; what it had computed stays stored."""
    source, given = chapter_source(chapter), dict(sorted((parameters or {}).items()))
    settings = check_parameters(chapter, run, given)
    # Other parameters go to a file of their own, so that two settings can be compared.
    name = source.stem + "".join(f"-{name}={value}" for name, value in given.items())
    target = results_folder() / settings.name / "notebooks" / (re.sub(r"[^\w.=-]", "_", name) + ".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"{source.stem} (run {settings.name})", flush=True)
    # The pages of a recorded run show what is recorded, and fetch nothing to compute the rest.
    local = {"HF_HUB_OFFLINE": "1"} if (ROOT / "data" / "recorded" / settings.name).is_dir() and not given else {}
    try:  # the kernel inherits the environment; its own log would tell about transport encryption on localhost
        with patch.dict(os.environ, KEEP_MEMORY | os.environ | local):
            papermill.execute_notebook(
                str(source), str(target), parameters={"run": run, **given}, kernel_name="python3", progress_bar=False,
                extra_arguments=["--log-level=40"])
    except DeadKernelError as error:
        raise StsError(f"The kernel of chapter {source.stem!r} died, most likely for lack of memory. Finished stages "
                       "stay stored. Smaller tokens_per_batch, eval_batch or sft_batch need less.") from error
    except papermill.PapermillExecutionError as error:
        if error.ename == "NotRecorded":  # what else the book tells of this run is there
            return _without_results(target, error.cell_index)
        raise StsError(f"Chapter {source.stem!r} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                       f"Finished stages stay stored; the notebook so far: {target}") from error
    if given or not settings.published:  # cells of that tag discuss the published run
        content = nbformat.read(target, as_version=4)
        content.cells = [cell for cell in content.cells if "published" not in cell.metadata.get("tags", [])]
        nbformat.write(content, target)
    return target


def _without_results(target: Path, stopped: int) -> Path:
    """A chapter up to the cell that asked for a result which is not recorded, and its prose from the takeaways on."""
    content = nbformat.read(target, as_version=4)
    cells = [cell for cell in content.cells if ERROR_MARKER_TAG not in cell.metadata.get("tags", [])]
    end = [cell.source.partition("\n")[0] for cell in cells].index("## Takeaways")
    nothing = nbformat.v4.new_markdown_cell("**Not recorded**: see run `laptop`.")
    content.cells = [*cells[:stopped], nothing, *(cell for cell in cells[end:-2] if cell.cell_type == "markdown")]
    nbformat.write(content, target)
    return target


def _render(source: Path, *options: str) -> None:
    """Have Jupyter Book render a folder or a notebook, with the prose pages beside it; book-build.log is its log."""
    prose = (source if source.is_dir() else source.parent) / "book"
    shutil.copytree(ROOT / "book", prose, ignore=shutil.ignore_patterns("_build"), dirs_exist_ok=True)
    builder, log = Path(sys.executable).with_name("jupyter-book"), source.parent / "book-build.log"
    result = subprocess.run([str(builder), "build", str(source), *options], capture_output=True, text=True)
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        problems = re.findall(".*(?:WARNING|ERROR).*", result.stdout + result.stderr)
        raise StsError(f"Jupyter Book stopped ({len(problems)} problems; all in {log}):\n" + "\n".join(problems[:10]))


def quick_page(notebook: Path) -> Path:
    """One executed notebook as a page of its own that looks as in the book; its links to other pages lead nowhere."""
    # Where to is said, as the repository's own configuration would otherwise draw the page to its root.
    _render(notebook, "--config", str(ROOT / "_config.yml"), "--path-output", str(notebook.parent))
    return notebook.parent / "_build" / "_page" / notebook.stem / "html" / f"{notebook.stem}.html"


def build_book(run: str = "laptop") -> Path:
    """Execute every chapter and render the book, warnings as errors (-W, -n); its index.html."""
    name = load_run(run).name
    execute, chapters = functools.partial(run_chapter, run=run), [one for one in CHAPTERS if one != LAST]
    if (ROOT / "data" / "recorded" / name).is_dir():  # only read, and so two chapters side by side
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            executed = [*pool.map(execute, chapters)]
    else:  # what is computed uses all processors by itself
        executed = [*map(execute, chapters)]
    executed.append(run_chapter(LAST, run))
    source, built = results_folder() / name / "book-source", ROOT / "book" / "_build" / name
    shutil.rmtree(source, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for path in (ROOT / "_config.yml", ROOT / "_toc.yml", *executed):
        shutil.copy2(path, source / ("notebooks" if path in executed else ""))
    _render(source, "-W", "-n", "--keep-going")
    shutil.rmtree(built, ignore_errors=True)
    shutil.copytree(source / "_build" / "html", built)
    return built / "index.html"
