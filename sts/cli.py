"""The command line: `sts book`, `run`, `stage`, `forecast`, `plan`, `settings`, `record` and `doctor`."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import sts
from sts.errors import ROOT, StsError, one_of
from sts.run.log import PACKAGES
from sts.run.settings import GROUPS, Run, available_runs, load_run, profile_file, read_yaml

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Forecast which domains of a language model move when it is fine-tuned.")
RunOption = Annotated[str, typer.Option("--run", help="run profile: a name in runs/, or a YAML file")]
ParameterOption = Annotated[list[str] | None, typer.Option("-p", "--parameter", metavar="NAME VALUE",
                                                           help="a setting to change; may be repeated")]


def _values(parameters: list[str] | None, known: Collection[str] = Run.model_fields) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is read as YAML, so 50 is a number and {a.txt: 100} a mapping."""
    try:
        found = {name: read_yaml(value) for name, _, value in (pair.partition("=") for pair in parameters or [])}
    except yaml.YAMLError as error:
        raise StsError(f"A value after -p could not be read: {' '.join(str(error).split())}") from error
    for name, value in found.items():
        if known and name not in known:
            raise one_of("Setting", name, known)
        if value is None:
            raise StsError(f"-p {name} has no value. Write for example: -p {name} 1")
    return found


@app.command()
def book(run: RunOption = "laptop") -> None:
    """Execute all chapters and render the book."""
    from sts.book.chapters import build_book

    print(f"\nThe book is ready. Open it with a browser:\n  {build_book(run).as_uri()}")


@app.command("run")
def run_one(chapter: str, run: RunOption = "laptop", parameter: ParameterOption = None) -> None:
    """Execute one CHAPTER, with other parameters if you like; only what depends on them is computed again."""
    from sts.book.chapters import quick_page, run_chapter

    target = run_chapter(chapter, run, _values(parameter, ()))  # chapters have parameters of their own
    print(f"\nExecuted notebook: {target}\nTo look at it, open with a browser:\n  {quick_page(target).as_uri()}")


@app.command()
def stage(name: str, run: RunOption = "laptop", parameter: ParameterOption = None,
          verify: Annotated[bool, typer.Option("--verify", help="compare; exit status 0 or 1")] = False,
          tolerance: Annotated[float | None, typer.Option(min=0, help="largest relative difference")] = None,
          again: Annotated[bool, typer.Option("--again", help="compute it anew")] = False) -> None:
    """Compute (or load) the stage NAME and say where its result lies, or compare the stored one with a new one."""
    from sts.engine import work as processes

    values = _values(parameter)
    opened = sts.open_run(run, **values)
    if verify or tolerance is not None:
        from sts.run import verify as verification

        found = verification.verify(opened, name, tolerance)
        print(f"{name}: computed again from its inputs as stored, it {'differs from' if found else 'agrees with'} the "
              f"stored result{':' if found else '.'}", *found[:20], sep="\n  ")
        raise typer.Exit(1 if found else 0)
    if again:
        opened.compute(name)
    opened.get(name)
    processes.leave()
    if processes.is_main():
        record, arguments = opened.provenance(name), "".join(f", {key}={value!r}" for key, value in values.items())
        print(f"{name} [{opened.key(name)}], computed {record['finished']} in {record['seconds']} s")
        print(f"In Python: import sts; {name} = sts.open_run({run!r}{arguments}).get({name!r})")
        print(opened.find(name))


@app.command()
def forecast(model: Annotated[str, typer.Option()], sae: Annotated[str, typer.Option(help="folder or release/sae_id")],
             train: Annotated[str, typer.Option(metavar="FILE", help="problems to train on, one JSON object a line")],
             domains: Annotated[str, typer.Option(metavar="DIR", help="folder of such files, one a domain")],
             layer: Annotated[int | None, typer.Option(help="by default the one that the SAE names")] = None,
             out: Annotated[Path, typer.Option(metavar="DIR")] = Path("forecast"), parameter: ParameterOption = None):
    """Forecast which of your own domains move in training on your own problems, and write a report."""
    values = _values(parameter, (*Run.model_fields, "run"))
    found = sts.forecast(train, domains, **dict(model=model, sae=sae, layer=layer, out=out) | values)
    shown = found.scores[["domain", "score", "mean", "low", "high", "n"]].to_string(index=False, float_format="%.4g")
    print(f"{shown}\n\nOpen it with a browser:\n  {found.path.as_uri()}")


@app.command()
def plan(stages: Annotated[list[str] | None, typer.Argument(help="by default all that the chapters show")] = None,
         run: RunOption = "laptop", parameter: ParameterOption = None,
         snakemake: Annotated[bool, typer.Option("--snakemake", help="write workflow/Snakefile")] = False) -> None:
    """Say what STAGES of a run take, or write them as a workflow of Snakemake; no model is loaded."""
    from sts.run import estimate
    from sts.run.plan import asked_for, jobs, left, snakefile
    from sts.run.run import results_folder

    opened, here = sts.open_run(run, **_values(parameter)), Path.cwd()
    asked = stages or asked_for(opened)
    todo = left(found := jobs(opened, asked), asked)
    known = estimate.costs(found, todo)
    if not snakemake:
        print(estimate.summary(opened, found, todo, known))
        return
    profile, markers, profiles = (str(path.relative_to(here) if path.is_relative_to(here) else path) for path in (
        profile_file(run), results_folder() / "jobs" / opened.settings.name, ROOT / "workflow" / "profiles"))
    for label in todo:  # marked as done and not stored: the stage has changed since, or its result is gone
        Path(markers, f"{label}.done").unlink(missing_ok=True)
    name, memory = (run if run in available_runs() else str(profile_file(run).absolute())), {
        label: own.memory for label, own in known.items()}
    command, target = f"snakemake -c2 --profile {profiles}/local", Path("workflow", "Snakefile")
    target.parent.mkdir(exist_ok=True)
    target.write_text(f"# Made by: sts {shlex.join(sys.argv[1:])}\n# To run it in this folder, and to go on if it was "
                      f"killed: {command}\n\n\n{snakefile(todo, name, profile, markers, memory)}", encoding="utf-8")
    print(f"{len(todo)} of {len(found)} jobs are left to run. They are in {target.absolute()}. Here, on two cores:\n"
          f"  {command}")


@app.command()
def record(run: RunOption = "full") -> None:
    """Copy the run's results to data/recorded/, from which pages render without model and data."""
    from sts.run.recorded import record as record_results

    target = ROOT / "data" / "recorded" / load_run(run).name
    print(f"{len(record_results(sts.open_run(run), target))} results recorded in {target}")


@app.command()
def settings(run: RunOption = "laptop") -> None:
    """List all settings, by what they are about, with the run's values and what they mean."""
    values = load_run(run)
    for name, field in Run.model_fields.items():
        if name in GROUPS:
            print(f"\n{GROUPS[name]}\n{'-' * len(GROUPS[name])}")
        print(f"{name} = {getattr(values, name)!r}\n    {field.description}")


@app.command()
def doctor() -> None:
    """Say what is installed and found, what is missing, and how to get it."""
    import torch

    from sts.data.load import local_file, without_hub
    from sts.data.sources import CORPORA, GENERATED, SOURCES
    from sts.engine.packaged import PACKAGED, packaged_files
    from sts.run.run import results_folder

    def row(state: str, what: str, detail: str) -> None:
        print(f"  {state:<7}  {what:<24} {detail}")

    print(f"sts {sts.__version__}, Python {sys.version.split()[0]}")
    for package in (*PACKAGES, "papermill", "jupyter-book", "snakemake"):
        try:
            row("ok", package, version(package))
        except PackageNotFoundError:
            row("missing", package, "pip install -c constraints.txt -e '.[book,test,workflow]'")
    gpu = torch.cuda.is_available()
    row("ok" if gpu else "-", "GPU", torch.cuda.get_device_name() if gpu else f"none; {os.cpu_count()} CPUs")
    for name, packaged in PACKAGED.items():
        try:
            with without_hub():
                row("ok", name, f"{sum(path.stat().st_size for path in packaged_files(name)) / 1e6:.0f} MB")
        except StsError as error:
            row("-" if packaged.optional else "missing", name, f"{'optional. ' * packaged.optional}{error}")
    for name in GENERATED:
        row("ok", name, "from an installed package")
    for name, source in (SOURCES | dict.fromkeys(CORPORA)).items():
        folder, splits = (name, source.splits) if source else ("corpus", (name,))
        hub = f"hub {source.hub}" if source and source.hub else f"put {folder}/{splits[0]}.jsonl in STS_DATA_DIR"
        found = ", ".join(split for split in splits if local_file(folder, split))
        row("ok" if found else "-", name, found or hub)
    data = os.environ.get("STS_DATA_DIR", "")
    row("ok" if data and Path(data).expanduser().is_dir() else "-", "STS_DATA_DIR", data or "not set: the hub is asked")
    row("-", "results", str(results_folder()))


def main() -> None:
    """Entry point: `-p NAME VALUE`, papermill's form, is -p NAME=VALUE; an `StsError` is one message, no traceback, as
    is what the machine refuses (permission, a full disk, too long a name)."""
    arguments = sys.argv[1:]
    for place, option in enumerate(arguments, 1):
        if option in ("-p", "--parameter") and "=" not in "".join(arguments[place:place + 1]):
            arguments[place:place + 2] = ["=".join(arguments[place:place + 2])]
    try:
        app(arguments)
    except (StsError, OSError) as error:
        if getattr(error, "errno", 0) not in (0, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSPC):
            raise
        print(f"sts: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
