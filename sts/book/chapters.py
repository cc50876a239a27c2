"""Executing chapters with papermill and rendering them with Jupyter Book."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sts.errors import StsError, one_of
from sts.run.progress import Follower
from sts.run.run import results_folder
from sts.run.settings import ROOT, Run, load_run

#: Chapters in the order of the book: notebook files in notebooks/.
CHAPTERS = ("what_an_sae_sees", "fine_tuning_moves_few_latents", "icl_foresees_fine_tuning", "transferability_score",
            "baselines", "ablations", "training_domains", "what_a_forecast_costs", "the_papers_numbers")
#: glibc gives large blocks back to the system and fetches them again, page by page, for every tensor; keeping them
#: makes training on a CPU faster. Read when a process starts, so it is set for the notebooks' kernels.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33),
               "MALLOC_TOP_PAD_": str(2**28)}
PYTHON_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list}


def chapter_source(chapter: str) -> Path:
    """The notebook file of a chapter.

    Raises:
        StsError: no such chapter.
    """
    name = Path(chapter).stem
    if name not in CHAPTERS:
        raise one_of("Chapter", chapter, CHAPTERS)
    return ROOT / "notebooks" / f"{name}.ipynb"


def chapter_parameters(chapter: str) -> dict[str, Any]:
    """The parameters that a chapter's notebook declares: name -> papermill's description (type, default, help)."""
    import papermill

    return dict(papermill.inspect_notebook(str(chapter_source(chapter))))


def check_parameters(chapter: str, run: str, parameters: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Check parameters against the notebook's declarations and the run profile, before anything is computed.

    Returns:
        (the run with them applied, the parameters to hand to papermill).

    Raises:
        StsError: an unknown name or a wrong type; lists the valid ones.
    """
    declared = chapter_parameters(chapter)
    valid = ", ".join(f"{name} ({item['inferred_type_name']})" for name, item in declared.items() if name != "run")
    for name, value in parameters.items():
        if name not in declared or name == "run":
            raise StsError(f"Chapter {Path(chapter).stem!r} has no parameter {name!r}. Valid: {valid}.")
        expected = PYTHON_TYPES.get(str(declared[name]["inferred_type_name"]), object)
        ok = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        if not ok and not (expected is float and type(value) is int):
            raise StsError(f"Parameter {name!r} must be of type {expected.__name__}; got {value!r}. Valid: {valid}.")
    settings = {name: value for name, value in parameters.items() if name in Run.model_fields}
    return load_run(run, settings), {"run": run, **parameters}


def run_chapter(chapter: str, run: str = "laptop", parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a chapter's notebook.

    Returns:
        The executed notebook, results/<run>/notebooks/<chapter>[-<parameter>=<value>...].ipynb.

    Raises:
        StsError: wrong parameters, or the chapter failed; what it had computed stays stored.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    source = chapter_source(chapter)
    if run.endswith((".yaml", ".yml")):
        run = str(Path(run).resolve())  # the kernel runs in another folder
    settings, values = check_parameters(chapter, run, parameters or {})
    folder = results_folder() / settings.name
    # Other parameters go to a file of their own, so that two settings can be compared.
    changes = "".join(f"-{name}={value}" for name, value in sorted((parameters or {}).items()))
    target = folder / "notebooks" / (re.sub(r"[^\w.=-]", "_", source.stem + changes) + ".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.jsonl"
    os.environ["STS_PROGRESS"] = str(progress)
    # The kernel imports this very package, wherever the notebook's copy lies.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in ("STS_RESULTS", "STS_DATA_DIR"):
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    print(f"{source.stem} (run {settings.name})", flush=True)
    try:
        with Follower(progress):
            papermill.execute_notebook(str(source), str(target), parameters=values, kernel_name="python3",
                                       progress_bar=False,
                                       # The kernel's own log would tell about transport encryption on localhost.
                                       extra_arguments=["--log-level=40"])
    except DeadKernelError as error:
        raise StsError(f"The kernel of chapter {source.stem!r} died, most likely for lack of memory. Stages that were "
                       "finished stay stored. Smaller tokens_per_batch, eval_batch or sft_batch need less.") from error
    except papermill.PapermillExecutionError as error:
        raise StsError(f"Chapter {source.stem!r} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                       f"Stages that were finished stay stored; the notebook so far: {target}") from error
    finally:
        os.environ.pop("STS_PROGRESS", None)
    return target


#: What MyST adds to Markdown and a page outside the book cannot resolve -> what stands there instead.
OUTSIDE_THE_BOOK = (
    (re.compile(r"^(`{3,})\{exercise\} ([^\n]*)\n:label: [^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL),
     r"**Exercise: \2**\n\3"),
    (re.compile(r"^\([\w-]+\)=\n", re.MULTILINE), ""),
    (re.compile(r"\{(?:term|ref)\}`([^`<]*?)(?: <[^`]*>)?`"), r"\1"),
    (re.compile(r"\{cite(?::\w+)?\}`([^`]*)`"), r"(\1)"),
    (re.compile(r"\{numref\}`[^`]*`"), "the figure"),
    (re.compile(r"\{eq\}`[^`]*`"), "the equation"),
    (re.compile(r"\[([^]]*)\]\((?!\w+:)[^)#]*\.(?:md|ipynb)[^)]*\)"), r"\1"))


def without_roles(text: str) -> str:
    """Markdown without MyST's roles, labels and directives, and without links to pages of the book."""
    for pattern, instead in OUTSIDE_THE_BOOK:
        text = pattern.sub(instead, text)
    return text


def quick_page(notebook: Path) -> Path:
    """One executed notebook as a plain HTML page beside it, for a look without building the book."""
    import nbformat
    from nbconvert import HTMLExporter

    content, page = nbformat.read(notebook, as_version=4), notebook.with_suffix(".html")
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = without_roles(cell.source)
    page.write_text(HTMLExporter().from_notebook_node(content, {"metadata": {"name": notebook.stem}})[0],
                    encoding="utf-8")
    return page


def build_book(run: str = "laptop") -> Path:
    """Execute every chapter and render the book, warnings as errors.

    Returns:
        The book's index.html.

    Raises:
        StsError: a chapter failed, or Jupyter Book found something to warn about.
    """
    settings = load_run(run)
    executed = [run_chapter(chapter, run) for chapter in CHAPTERS]
    source = assemble(results_folder() / settings.name / "book-source", executed)
    # Rendering is Jupyter Book's own: strict (-W), nitpicky (-n), and all warnings shown at once.
    builder = Path(sys.executable).with_name("jupyter-book")
    result = subprocess.run([str(builder), "build", str(source), "-W", "-n", "--keep-going"],
                            capture_output=True, text=True)
    log = source.parent / "book-build.log"
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        problems = [line for line in lines if "WARNING" in line or "ERROR" in line]
        raise StsError(f"Jupyter Book stopped ({len(problems)} problems; all in {log}):\n" + "\n".join(problems[:10]))
    target = ROOT / "book" / "_build" / settings.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "_build" / "html", target)
    return target / "index.html"


def assemble(folder: Path, executed: list[Path]) -> Path:
    """Gather configuration, prose and executed notebooks in one folder for Jupyter Book."""
    if folder.exists():
        for item in folder.iterdir():  # the build cache stays: unchanged pages are not rendered again
            if item.name != "_build":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        shutil.rmtree(folder / "_build" / "html", ignore_errors=True)  # pages taken out must not linger
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("_build"))
    (folder / "notebooks").mkdir()
    for path in executed:
        shutil.copy2(path, folder / "notebooks" / path.name)
    return folder
