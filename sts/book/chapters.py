"""Executing chapters with papermill and rendering them with Jupyter Book. The chapters are those of _toc.yml."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from sts.errors import ROOT, StsError, one_of
from sts.run.log import Follower
from sts.run.run import results_folder
from sts.run.settings import Run, load_run

#: Names of the chapters, notebooks/<name>.ipynb, in the order of _toc.yml.
CHAPTERS = tuple(page["file"].removeprefix("notebooks/")
                 for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
                 for page in part["chapters"] if page["file"].startswith("notebooks/"))
#: Built from what the other chapters stored, so executed after them, wherever it stands.
LAST = "scorecard"
#: Tag of Markdown cells that discuss the published run (setting `published`); no other run shows them.
PUBLISHED = "published"
#: glibc gives large blocks back to the system and fetches them again, page by page, for every tensor; keeping them
#: makes training on a CPU faster. Read when a process starts, so it is set for the notebooks' kernels.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33),
               "MALLOC_TOP_PAD_": str(2**28)}
#: What MyST adds to Markdown and a page outside the book cannot resolve -> what stands there instead.
OUTSIDE_THE_BOOK = {
    r"(?ms)^(`{3,})\{exercise\} ([^\n]*)\n:label: [^\n]*\n(.*?)^\1$": r"**Exercise: \2**\n\3",
    r"(?m)^\([\w-]+\)=\n": "", r"\{(?:term|ref)\}`([^`<]*?)(?: <[^`]*>)?`": r"\1",
    r"\{cite(?::\w+)?\}`([^`]*)`": r"(\1)", r"\{numref\}`[^`]*`": "the figure", r"\{eq\}`[^`]*`": "the equation",
    r"\[([^]]*)\]\((?!\w+:)[^)#]*\.(?:md|ipynb)[^)]*\)": r"\1"}


def chapter_source(chapter: str) -> Path:
    """The notebook file of a chapter; `StsError` without one."""
    name = Path(chapter).stem
    if name not in CHAPTERS:
        raise one_of("Chapter", chapter, CHAPTERS)
    return ROOT / "notebooks" / f"{name}.ipynb"


def chapter_parameters(chapter: str) -> dict[str, Any]:
    """The parameters that a chapter's notebook declares: name -> papermill's description (type, default, help)."""
    import papermill

    return dict(papermill.inspect_notebook(str(chapter_source(chapter))))


def check_parameters(chapter: str, run: str, parameters: Mapping[str, Any]) -> Run:
    """The run with these parameters; `StsError` where the notebook declares none of that name or type."""
    declared = {name: str(item["inferred_type_name"]) for name, item in chapter_parameters(chapter).items()
                if name != "run"}
    valid = ", ".join(f"{name} ({kind})" for name, kind in declared.items())
    for name, value in parameters.items():
        if name not in declared:
            raise StsError(f"Chapter {Path(chapter).stem!r} has no parameter {name!r}. Valid: {valid}.")
        if type(value).__name__ != declared[name] and (declared[name], type(value)) != ("float", int):
            raise StsError(f"Parameter {name!r} must be of type {declared[name]}; got {value!r}. Valid: {valid}.")
    return load_run(run, {name: value for name, value in parameters.items() if name in Run.model_fields})


@contextlib.contextmanager
def _environment(progress: Path) -> Iterator[None]:
    """What a chapter's kernel, which runs in another folder, needs in its environment; put back afterwards."""
    before = dict(os.environ)
    own = {name: str(Path(before[name]).expanduser().resolve()) for name in ("STS_RESULTS", "STS_DATA_DIR")
           if before.get(name)}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before.get("PYTHONPATH")]))
    os.environ.update(KEEP_MEMORY | before | own | {"STS_PROGRESS": str(progress)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_chapter(chapter: str, run: str = "laptop", parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a chapter; results/<run>/notebooks/<chapter>[-<parameter>=<value>...].ipynb.

    Raises:
        StsError: wrong parameters, or the chapter failed; what it had computed stays stored.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    source, given = chapter_source(chapter), dict(sorted((parameters or {}).items()))
    run = str(Path(run).resolve()) if run.endswith((".yaml", ".yml")) else run
    settings = check_parameters(chapter, run, given)
    folder = results_folder() / settings.name
    # Other parameters go to a file of their own, so that two settings can be compared.
    name = source.stem + "".join(f"-{name}={value}" for name, value in given.items())
    target = folder / "notebooks" / (re.sub(r"[^\w.=-]", "_", name) + ".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"{source.stem} (run {settings.name})", flush=True)
    try:
        with _environment(folder / "progress.jsonl"), Follower(folder / "progress.jsonl"):
            papermill.execute_notebook(  # the kernel's own log would tell about transport encryption on localhost
                str(source), str(target), parameters={"run": run, **given}, kernel_name="python3", progress_bar=False,
                extra_arguments=["--log-level=40"])
    except DeadKernelError as error:
        raise StsError(f"The kernel of chapter {source.stem!r} died, most likely for lack of memory. Finished stages "
                       "stay stored. Smaller tokens_per_batch, eval_batch or sft_batch need less.") from error
    except papermill.PapermillExecutionError as error:
        raise StsError(f"Chapter {source.stem!r} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                       f"Finished stages stay stored; the notebook so far: {target}") from error
    if given or not settings.published:
        content = nbformat.read(target, as_version=4)
        content.cells = [cell for cell in content.cells if PUBLISHED not in cell.metadata.get("tags", [])]
        nbformat.write(content, target)
    return target


def without_roles(text: str) -> str:
    """Markdown without MyST's roles, labels and directives, and without links to pages of the book."""
    for pattern, instead in OUTSIDE_THE_BOOK.items():
        text = re.sub(pattern, instead, text)
    return text


def quick_page(notebook: Path) -> Path:
    """One executed notebook as a plain HTML page beside it, for a look without building the book."""
    import nbformat
    from nbconvert import HTMLExporter

    content, page = nbformat.read(notebook, as_version=4), notebook.with_suffix(".html")
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = without_roles(cell.source)
    style = f"<style>{(ROOT / 'book' / '_static' / 'sts.css').read_text(encoding='utf-8')}</style></head>"
    text = HTMLExporter().from_notebook_node(content, {"metadata": {"name": notebook.stem}})[0]
    page.write_text(text.replace("</head>", style, 1), encoding="utf-8")
    return page


def build_book(run: str = "laptop") -> Path:
    """Execute every chapter and render the book, warnings as errors (-W, -n); its index.html."""
    name, chapters = load_run(run).name, [chapter for chapter in CHAPTERS if chapter != LAST]
    if (ROOT / "data" / "recorded" / name).is_dir():  # only read, and so two chapters side by side
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            executed = [*pool.map(functools.partial(run_chapter, run=run), chapters)]
    else:  # what is computed uses all processors by itself
        executed = [run_chapter(chapter, run) for chapter in chapters]
    executed.append(run_chapter(LAST, run))
    source = executed[0].parent.parent / "book-source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "book", source / "book", ignore=shutil.ignore_patterns("_build"))
    for path in (ROOT / "_config.yml", ROOT / "_toc.yml", *executed):
        target = source / ("notebooks" if path.suffix == ".ipynb" else "") / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(path, target)
    builder, log = Path(sys.executable).with_name("jupyter-book"), source.parent / "book-build.log"
    result = subprocess.run([str(builder), "build", str(source), "-W", "-n", "--keep-going"],
                            capture_output=True, text=True)
    log.write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        problems = [line for line in log.read_text(encoding="utf-8").splitlines() if re.search("WARNING|ERROR", line)]
        raise StsError(f"Jupyter Book stopped ({len(problems)} problems; all in {log}):\n" + "\n".join(problems[:10]))
    built = ROOT / "book" / "_build" / name
    shutil.rmtree(built, ignore_errors=True)
    shutil.copytree(source / "_build" / "html", built)
    return built / "index.html"
