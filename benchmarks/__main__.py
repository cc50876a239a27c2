"""Run the benchmarks in one process and write one JSON file; what was measured for the book is in data/benchmarks/."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.options import options_workload
from benchmarks.routes import Setup
from benchmarks.shapes import SHAPES, compile_layers, shape_workload
from benchmarks.workloads import demonstrations_workload, memory_workload, precision_workload, text_workload
from sts.engine.models import resolve_model
from sts.errors import StsError
from sts.run import resources
from sts.run.log import environment
from sts.run.run import OpenRun, open_run

WORKLOADS = ("memory", "text", "demonstrations", "options", "precision", "shape")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--run", default="laptop", help="run profile whose model, SAE and layer are measured")
    parser.add_argument("--out", help="file to write; by default results/benchmarks/cpu.json or gpu.json")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all; shape on a GPU only")
    parser.add_argument("--tokens", type=_positive, default=8_000, help="tokens of the text workload")
    parser.add_argument("--questions", type=_positive, default=48, help="questions behind long demonstrations")
    parser.add_argument("--demonstration-tokens", type=_positive, default=1_000,
                        help="tokens of each of the two demonstrations before them")
    parser.add_argument("--option-questions", type=_positive, default=8, help="questions with ten options")
    parser.add_argument("--memory-tokens", type=_positive, nargs="+", default=[40_000, 400_000])
    parser.add_argument("--memory-latents", type=_positive, default=65_536)
    parser.add_argument("--other-tokens", type=_positive, default=4_000, help="tokens of the other routes' memory")
    parser.add_argument("--repetitions", type=_positive, default=3)
    parser.add_argument("--tokens-per-batch", type=_positive, default=4_096)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--shape-tokens", type=_positive, default=131_072)
    parser.add_argument("--compiled", action="store_true", help="measure compiled layers as well")
    options = parser.parse_args(arguments)
    try:
        return _measure(options)
    except StsError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _measure(options: argparse.Namespace) -> int:
    run = open_run(options.run)
    on_gpu = run.device.startswith("cuda")
    chosen = options.workloads or [name for name in WORKLOADS if on_gpu or name != "shape"]
    out = Path(options.out) if options.out else run.results / "benchmarks" / ("gpu.json" if on_gpu else "cpu.json")
    try:  # now, rather than after half an hour
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StsError(f"--out {str(out)!r} cannot be written ({error.strerror}); name a file in a folder of "
                       "yours.") from error
    if "shape" in chosen and not on_gpu and options.shape != "tiny":
        raise StsError(f"--workloads shape: the shape {options.shape!r} needs a GPU. On a CPU use --shape tiny.")
    setup = Setup(resources.lm(run), resources.reader(run), run.settings.layer, options.tokens_per_batch)
    proxies = _proxies(run) if {"memory", "text"} & set(chosen) else {}
    rows, ratios, shapes = [], [], []

    def report(row: Row) -> None:
        memory = "" if row.peak_memory_mb is None else f", {row.peak_memory_mb:.0f} MB"
        print(f"{row.workload:15} {row.label:50} {row.tokens:7,} tokens {row.seconds[-1]:8.2f} s{memory}", flush=True)

    # Memory first: what other workloads leave behind in the process would be taken for its own.
    for name in sorted(chosen, key=WORKLOADS.index):
        if name == "memory":
            new = memory_workload(setup, proxies["same"], options.memory_latents, tuple(options.memory_tokens),
                                  options.other_tokens, report)
        elif name == "text":
            compiled = None
            if options.compiled:
                lm = resources.fresh_lm(run)()
                compile_layers(lm.model)
                compiled = dataclasses.replace(setup, lm=lm)
            new = text_workload(setup, proxies, options.tokens, options.repetitions, report, compiled)
        elif name == "demonstrations":
            new = demonstrations_workload(setup, options.questions, options.repetitions, report,
                                          options.demonstration_tokens)
        elif name == "precision":
            exact = dataclasses.replace(setup, lm=resources.fresh_lm(run)(dtype="float32"))
            new = precision_workload(setup, exact, min(16, options.questions), report)
        elif name == "options":
            new = options_workload(setup, options.option_questions, options.repetitions, report)
        else:
            shape_rows, summary = shape_workload(
                options.shape, run.device, tokens=options.shape_tokens, length=512, repetitions=options.repetitions,
                tokens_per_batch=max(options.tokens_per_batch, 16_384), compiled=options.compiled, report=report)
            new = (shape_rows, [])
            shapes.append(summary)
        rows, ratios = rows + new[0], ratios + new[1]
    result = {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "device": environment(run.device)["device"],
                    "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)},
        "versions": environment(run.device)["versions"], "commit": environment(run.device)["commit"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": run.settings.model, "dtype": run.settings.dtype, "layer": run.settings.layer,
        "latents": setup.sae.cfg.d_sae, "seed": 0, "rows": [row.to_dict() for row in rows],
        "ratios": [ratio.to_dict() for ratio in ratios], "shapes": shapes,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for ratio in result["ratios"]:
        print(f"{'held  ' if ratio['held'] else 'MISSED'} {ratio['what']}: {ratio['value']:.2f} "
              f"({ratio['low']:.2f} to {ratio['high']:.2f}), required {ratio['bound']} {ratio['required']:g}")
    for shape in shapes:
        share = "peak not known" if shape["share_of_peak"] is None else f"{shape['share_of_peak']:.0%} of the bf16 peak"
        print(f"shape {shape['shape']}: {shape['tflops']:.1f} TFLOP/s, {share}")
    print(f"Wrote {out}")
    return 0


def _proxies(run: OpenRun) -> dict[str, object]:
    """The run's model as sae-lens loads it: in the run's precision, and by default."""
    from sae_lens.load_model import load_model

    location, _ = resolve_model(run.settings.model, run.settings.model_revision, run.results / "models")
    same = {"dtype": run.settings.dtype}
    return {"same": load_model("AutoModelForCausalLM", location, device=run.device, model_from_pretrained_kwargs=same),
            "default": load_model("AutoModelForCausalLM", location, device=run.device)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
