"""Recorded benchmarks of the engine: read, checked, and shown. They are measured by `make bench`, not by a chapter."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Literal

import pandas
from pydantic import BaseModel, Field, ValidationError

from sts.errors import StsError
from sts.run.settings import ROOT

FOLDER = ROOT / "data" / "benchmarks"
#: Recorded benchmarks: file's stem -> what it was measured on.
KINDS = {"cpu": "CPU", "gpu": "GPU"}
#: What is measured -> heading; other names are shown as they are.
WORKLOADS = {"text": "Every token of a text", "demonstrations": "Questions behind long demonstrations",
             "memory": "Memory with a wide SAE", "options": "Ten options a question, no SAE",
             "precision": "Rounding, not speed",
             "shape": "A published shape, random weights"}
#: Workloads whose routes run once and without warming up, for memory or rounding alone.
UNTIMED = ("memory", "precision")
#: A distance from float32 within this factor of the one without reuse counts as the same.
NOTHING_ADDED = 1.05


class Machine(BaseModel):
    """Where it was measured."""

    processor: str
    cores: int
    device: str
    memory_gb: float


class Row(BaseModel):
    """One route on one workload; `seconds` holds one value for each repetition."""

    workload: str
    route: str
    label: str
    tokens: int = Field(gt=0)
    seconds: list[float] = Field(min_length=1)
    tokens_per_second: float = Field(gt=0)
    peak_memory_mb: float | None = None
    latents: int
    note: str = ""
    #: Where the workload was measured apart from the others: when, and the code.
    apart: str = ""


class Ratio(BaseModel):
    """A requirement, and whether the measurement held it."""

    what: str
    value: float
    low: float
    high: float
    bound: Literal["at most", "at least"]
    required: float
    held: bool


class Shape(BaseModel):
    """Throughput of a published shape; `share_of_peak` is of the accelerator's dense bf16 peak, None if not known."""

    shape: str
    tflops: float
    share_of_peak: float | None = None


class Benchmark(BaseModel):
    """A benchmark file; fields that are not listed here are left alone."""

    machine: Machine
    versions: dict[str, str]
    commit: str
    finished: str
    model: str
    layer: int
    latents: int
    rows: list[Row] = Field(min_length=1)
    ratios: list[Ratio]
    shapes: list[Shape] = []

    def workloads(self) -> dict[str, list[Row]]:
        """Rows by workload, in the file's order."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.workload, []).append(row)
        return groups


def read_benchmark(kind: str, folder: Path = FOLDER) -> Benchmark | None:
    """The benchmark recorded for "cpu" or "gpu"; None if there is none.

    Raises:
        StsError: the file is no such benchmark; names the field.
    """
    path = folder / f"{kind}.json"
    if not path.is_file():
        return None
    try:
        return Benchmark.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, UnicodeDecodeError) as error:  # pydantic's and json's errors are ValueErrors
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise StsError(f"{path} is not a benchmark ({what}). Restore it from the repository, or measure again with "
                       "make bench.") from error


def benchmark_sentence(kind: str, recorded: Benchmark | None) -> str:
    """Where and when it was measured and what was required of it, or that nothing has been measured."""
    if recorded is None:
        return (f"No {KINDS[kind]} has been measured yet: there is no `data/benchmarks/{kind}.json`. `make bench` on a "
                f"machine with a {KINDS[kind]} measures it.")
    machine, missed = recorded.machine, [ratio for ratio in recorded.ratios if not ratio.held]
    required = f" {len(recorded.ratios) - len(missed)} of {len(recorded.ratios)} requirements were held."
    apart = {WORKLOADS.get(row.workload, row.workload): row.apart for row in recorded.rows if row.apart}
    others = "".join(f" Apart from that, on the same machine, *{name}*: {when}." for name, when in apart.items())
    return (f"Measured on {machine.processor}, {machine.cores} cores, {machine.memory_gb:g} GB ({machine.device}), "
            f"{recorded.finished[:10]}, code `{recorded.commit or 'not under git'}`, torch "
            f"{recorded.versions.get('torch', '?')}. Model `{recorded.model}`, layer {recorded.layer}, SAE of "
            f"{recorded.latents:,} latents unless the table says otherwise.{others}"
            f"{required if recorded.ratios else ''}"
            f"{''.join(map(_throughput, recorded.shapes))} These numbers are recorded with the book; they are not "
            "measured when a page is built.")


def _throughput(one: Shape) -> str:
    share = "" if one.share_of_peak is None else f", {one.share_of_peak:.0%} of the dense bf16 peak"
    return f" With random weights in the shape of {one.shape}: {one.tflops:.1f} TFLOP/s{share}."


def speed_tables(recorded: Benchmark) -> dict[str, pandas.DataFrame]:
    """For each workload, by heading, one row per route: tokens, latents, seconds, tokens a second, memory, note.

    A column in which no route of the workload has anything is left out.
    """
    tables = {WORKLOADS.get(workload, workload): pandas.DataFrame([{
        "route": row.label, "tokens": f"{row.tokens:,}", "latents": f"{row.latents:,}",
        # Routes that run once, for memory or rounding: their times say nothing.
        "seconds": "" if workload in UNTIMED else _seconds(row),
        "tokens a second": "" if workload in UNTIMED else f"{row.tokens_per_second:,.0f}",
        "peak memory (MB)": "" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f}",
        "note": row.note} for row in rows]) for workload, rows in recorded.workloads().items()}
    return {heading: table.loc[:, (table != "").any()] for heading, table in tables.items()}


def precision_sentence(recorded: Benchmark) -> str:
    """What the table on rounding shows: the share that bf16 costs, and what reuse adds to it; empty if not measured."""
    rows = {row.route: row for row in recorded.workloads().get("precision", ())}
    ratio = next((one for one in recorded.ratios if one.what.startswith("distance from float32")), None)
    if ratio is None or not {"whole", "ours"} <= set(rows):
        return ""
    whole, reused = (rows[route].note.rpartition(": ")[2] for route in ("whole", "ours"))
    added = "adds nothing to that" if ratio.value <= NOTHING_ADDED else "adds to that"
    return (f"The latents' squared changes in bf16, with every prompt run whole, are {whole} away from those in 32-bit "
            f"floats (differences summed over latents, divided by the sum). That is the price of bf16, not of the five "
            "rules: it keeps eight binary digits, so every activation of every layer is rounded by up to 0.4%. A "
            "squared change is made from the difference of two nearly equal numbers, in which the rounding of "
            "both stays, and now and then another latent is among the largest. Reusing the demonstrations' keys and "
            f"values {added}: {reused}, {ratio.value:.2f} times as much.")


def _seconds(row: Row) -> str:
    """The median and, for several repetitions, their range and number."""
    middle = f"{statistics.median(row.seconds):,.2f}"
    if len(row.seconds) == 1:
        return middle
    return f"{middle} ({min(row.seconds):,.2f} to {max(row.seconds):,.2f}, n = {len(row.seconds)})"


def requirement_table(recorded: Benchmark) -> pandas.DataFrame:
    """One row per requirement: what was asked, what was measured (median and range), whether it held."""
    return pandas.DataFrame([{
        "requirement": ratio.what, "required": f"{ratio.bound} {ratio.required:g}",
        "measured, median": f"{ratio.value:.3g}", "range": f"{ratio.low:.3g} to {ratio.high:.3g}",
        "held": "yes" if ratio.held else "no"} for ratio in recorded.ratios])
