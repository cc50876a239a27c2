"""Stages of the chapter on ablations: the score with other values of single settings, and what they change.

`sweep_latents` works from stored sums. `sweep_settings` reads the domains again for each value, `sweep_saes` with SAEs
that `sweep_sae_training` trains on the same text; both are empty where the run lists no values.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pandas
import torch
from safetensors.torch import load_file, save_file

from sts.engine.extract import paired_stats
from sts.engine.sae_quality import reconstruction_quality
from sts.engine.sae_training import SaeTraining, collect_layers, save_sae, shard_paths, train_sae
from sts.engine.saes import SideBySide, check_fits, load_sae
from sts.errors import StsError
from sts.measure import sweeps
from sts.measure.compare import KINDS, compared
from sts.measure.shift import check_top_n
from sts.measure.shift_stats import same_fraction
from sts.run.run import OpenRun, stage
from sts.stages.comparison import item_differences
from sts.stages.forecast import DOMAIN, MASKS, SHIFT, domain_groups, masks, shift_groups, split_domains
from sts.stages.sae import MODEL, sae_documents, token_pieces

#: Seed of the sweep's text and SAEs, the same in every seed of a run.
SAE_SEED = 0
#: A file in the folder of each SAE of the sweep.
QUALITY, NORMS = "quality.json", "decoder_norms.safetensors"
COLUMNS = ("axis", "value", "own", "domain", "sts_act", "sts_icl")
SWEPT_SAES = ("sae_latents", "sae_k", "sweep_widths", "sweep_layers", "sweep_k")
SWEPT_SETTINGS = (*sweeps.SETTINGS, "sweep_masks")


def _frame(rows: list[dict], *more: str) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=[*COLUMNS, *more])


# --- from stored sums ---------------------------------------------------------------------------------------------

@stage("parquet", uses=("top_n", "sweep_bands", "sweep_top_n"), needs=("shift", "domain_stats", "scores"))
def sweep_latents(run: OpenRun, report) -> pandas.DataFrame:
    """Scores by rank band of the latents, by their number N, and by the formulas: axis, value, own, domain, scores."""
    settings, shifted, domains = run.settings, run.get("shift"), split_domains(run.get("domain_stats"))
    rows = sweeps.band_rows(shifted, domains, settings.top_n, settings.sweep_bands)
    rows += sweeps.number_rows(shifted, domains, settings.top_n, settings.sweep_top_n)
    rows += [{"axis": "variant", "value": row["variant"].replace("_", " "), "own": row["variant"] == "paper", **row}
             for row in run.get("scores").to_dict("records")]
    return _frame(rows)


# --- other settings of the forecast -------------------------------------------------------------------------------

@stage("parquet", uses=("top_n", *SHIFT, *DOMAIN, *MASKS, *SWEPT_SETTINGS), needs=("shift", "domain_stats"),
       inputs=("model", "sae", "sft_train", "domain_data", "demonstrations"))
def sweep_settings(run: OpenRun, report) -> pandas.DataFrame:
    """Scores with other demonstrations, numbers of tokens and masks; each value's sums are stages of their own."""
    rows, values = [], list(sweeps.forecast_values(run.settings))
    for done, (axis, value, changes) in enumerate(values, 1):
        own = run.with_forecast(**changes) if changes else run
        chosen = sweeps.ranking(own.get("shift"))[:run.settings.top_n]
        rows += sweeps.rows_of(axis, value, not changes, chosen, split_domains(own.get("domain_stats")))
        report(done / len(values))
    return _frame(rows)


# --- other SAEs ---------------------------------------------------------------------------------------------------

def sweep_text(run: OpenRun) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces of `sae_text` to train on and held-out ones, `sweep_text_tokens` together with sources in proportion."""
    settings, train, held_out = run.settings, [], []
    whole = sum(settings.sae_text.values())
    for name, tokens in settings.sae_text.items():
        documents = sae_documents(run, name)
        random.Random(SAE_SEED).shuffle(documents)
        cut = max(1, len(documents) // 50)
        share = max(1, round(tokens / whole * settings.sweep_text_tokens))
        held_out += token_pieces(run, documents[:cut], max(1000, share // 20))
        train += token_pieces(run, documents[cut:], share)
    if not train:
        raise StsError("sae_text holds too little text: one document is held out, and nothing is left to train on.")
    random.Random(SAE_SEED).shuffle(train)
    return train, held_out


@stage("folder", uses=(*MODEL, "sae_text", "sae_lr", "context", "sweep_sae_samples", "sweep_text_tokens", *SWEPT_SAES),
       inputs=("model", "sae_text"))
def sweep_sae_training(run: OpenRun, report) -> Path:
    """SAEs of several widths, layers and sparsities, trained on the same activations: one folder each, with quality.

    Layers are collected in one pass. A killed run goes on with the next shard or the next SAE.
    """
    settings, work = run.settings, run.scratch("sweep_sae_training")
    specs = list(dict.fromkeys(spec for own in sweeps.sae_values(settings).values() for spec in own))
    (work / "plan.json").write_text(json.dumps([spec.name for spec in specs]) + "\n", encoding="utf-8")
    if any(not (work / spec.name / QUALITY).is_file() for spec in specs):
        layers = sorted({spec.layer for spec in specs})
        for part, pieces in zip(("held_out", "train"), sweep_text(run), strict=True):
            collect_layers(run.lm, {layer: work / "activations" / part / str(layer) for layer in layers}, pieces,
                           pieces_per_shard=max(32, 512 // len(layers)), work=report.work,
                           report=lambda f, part=part: report(0.2 * f if part == "train" else 0))
    for place, spec in enumerate(specs):
        if not (work / spec.name / QUALITY).is_file():
            _train(run, spec, work, lambda f, place=place: report(0.2 + 0.8 * (place + f) / len(specs)))
    for path in (work / "activations").glob("*/*"):  # gigabytes that nothing needs any more
        for shard in shard_paths(path):
            shard.unlink()
        path.rmdir()
    for path in (*(work / "activations").glob("*"), work / "activations"):
        if path.is_dir():
            path.rmdir()
    return work


def _train(run: OpenRun, spec: sweeps.SaeSpec, work: Path, report) -> None:
    """Train one SAE of the sweep; its quality is written last, as the mark that it is finished."""
    settings, folder = run.settings, work / spec.name
    trained, _ = train_sae(
        work / "activations" / "train" / str(spec.layer),
        SaeTraining(spec.latents, spec.k, settings.sweep_sae_samples, lr=settings.sae_lr, seed=SAE_SEED),
        model_name=settings.model, layer=spec.layer, device=run.device, report=lambda fraction, row: report(fraction))
    norms_L = trained.W_dec.detach().norm(dim=-1).float().cpu()  # saving folds them
    folder.mkdir(exist_ok=True)
    save_sae(trained, folder, dtype=torch.bfloat16)
    save_file({"norms_L": norms_L}, folder / NORMS)
    quality = reconstruction_quality(load_sae(str(folder), device=run.device),
                                     work / "activations" / "held_out" / str(spec.layer))
    (folder / QUALITY).write_text(json.dumps(quality) + "\n", encoding="utf-8")


@stage("parquet", uses=("top_n", *SHIFT, *DOMAIN, *MASKS, *SWEPT_SAES), needs=("sweep_sae_training",),
       inputs=("model", "sft_train", "domain_data", "demonstrations"))
def sweep_saes(run: OpenRun, report) -> pandas.DataFrame:
    """Scores with each SAE of the sweep; also layer, latents, k, l0, explained and silent (shares, held-out text).

    The domains are read once for each layer, for all SAEs there; a killed run goes on with the next layer.
    """
    axes, folder = sweeps.sae_values(run.settings), run.scratch("sweep_saes")
    layers = list(dict.fromkeys(spec.layer for own in axes.values() for spec in own))
    found: dict[sweeps.SaeSpec, dict[str, list[dict]]] = {}
    for place, layer in enumerate(layers):
        path = folder / f"layer-{layer}.json"
        specs = list(dict.fromkeys(spec for own in axes.values() for spec in own if spec.layer == layer))
        if not path.is_file():
            rows = _layer_rows(run, layer, specs, lambda f, place=place: report((place + f) / len(layers)), report.work)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(rows), encoding="utf-8")
            partial.rename(path)
        found |= zip(specs, json.loads(path.read_text(encoding="utf-8")), strict=True)
    rows, own = [], sweeps.own_sae(run.settings)
    for axis, specs in axes.items():
        rows += [{"axis": axis, "value": f"{getattr(spec, 'latents' if axis == 'width' else axis):,}",
                  "own": spec == own, **row} for spec in specs for row in found[spec]["number"]]
    if "width" in axes:
        rows += [{"axis": "width_share", "value": f"{spec.latents:,}", "own": spec == own, **row}
                 for spec in axes["width"] for row in found[spec]["share"]]
    if axes:
        rows += [{"axis": "norms", "value": value, "own": kind == "number", **row}
                 for kind, value in (("number", "folded"), ("unfolded", "as trained")) for row in found[own][kind]]
    return _frame(rows, "layer", "latents", "k", "l0", "explained", "silent")


def _layer_rows(run: OpenRun, layer: int, specs: list[sweeps.SaeSpec], report, work) -> list[dict[str, list[dict]]]:
    """For each SAE of a layer its scores by domain, with N latents, with N in proportion, and without folded norms."""
    trained, settings = run.get("sweep_sae_training"), run.settings
    parts = {}
    for spec in specs:
        check_top_n(settings.top_n, spec.latents)
        parts[spec.name] = load_sae(str(trained / spec.name), device=run.device, dtype=settings.sae_dtype)
        check_fits(parts[spec.name], run.lm, layer)
    together, groups = SideBySide(parts), {"": shift_groups(run), **domain_groups(run)}
    sums = {}
    for place, (name, own) in enumerate(groups.items()):
        stats = paired_stats(run.lm, together, layer, own, masks(run), tokens_per_batch=settings.tokens_per_batch,
                             work=work, report=lambda f, place=place: report((place + f) / len(groups))).to_tensors()
        kept = {field: stats[field] for field in ("tokens", "base_sum_L", "squared_difference_L")}
        sums[name] = split_domains(together.split(kept))
    found = []
    for spec in specs:
        shifted, domains = sums[""][spec.name], {name: own[spec.name] for name, own in sums.items() if name}
        norms_L = load_file(trained / spec.name / NORMS)["norms_L"].double()
        quality = json.loads((trained / spec.name / QUALITY).read_text(encoding="utf-8"))
        about = {"layer": spec.layer, "latents": spec.latents, "k": spec.k, "l0": quality["l0"],
                 "explained": quality["fraction_of_variance_explained"], "silent": quality["dead"] / spec.latents}
        as_trained = {name: sweeps.unfolded(stats, norms_L) for name, stats in domains.items()}
        number, order = settings.top_n, sweeps.ranking(shifted)
        share = same_fraction(number, settings.sae_latents, spec.latents)
        scored = {"number": (order[:number], domains), "share": (order[:share], domains),
                  "unfolded": (sweeps.ranking(sweeps.unfolded(shifted, norms_L))[:number], as_trained)}
        found.append({kind: [about | {key: row[key] for key in ("domain", *sweeps.SCORES)}
                             for row in sweeps.rows_of("", "", False, *own)] for kind, own in scored.items()})
    return found


# --- what they change ---------------------------------------------------------------------------------------------

def repeated(run: OpenRun) -> OpenRun:
    """The run with the seeds that its sweeps are repeated at: setting `sweep_seeds`."""
    seeds = run.settings.sweep_seeds
    return run if seeds is None else run.with_seeds(seeds)


def swept(run: OpenRun) -> pandas.DataFrame:
    """All sweeps of a run's own seed in the order of the page; the columns that every sweep has."""
    parts = [run.get(name)[list(COLUMNS)] for name in ("sweep_latents", "sweep_saes", "sweep_settings")]
    return pandas.concat([part for part in parts if len(part)], ignore_index=True).sort_values(
        "axis", key=lambda axis: axis.map({name: place for place, name in enumerate(sweeps.AXES)}), kind="stable",
        ignore_index=True)


@stage("json", version=2, uses=("seeds", "sweep_seeds", "seed", "bootstrap", "permutations"),
       needs=("sweep_latents", "sweep_settings", "sweep_saes", "evaluation_before", "evaluation_after"),
       inputs=("seeds",))
def sweep_correlations(run: OpenRun, report) -> dict[str, list[dict]]:
    """Correlation of each value's scores with the absolute change, mean over seeds; differences; the best by chance.

    Returns:
        values: one row a measure, score, axis and value: own, n, seeds, by_seed, pearson, pearson_interval
            (hierarchical bootstrap), p (permutation); unless own also less (mean, interval, p, p_holm: r of this value
            minus r of the run's own, over the same resamples); or `undefined`.
        claims: one row a measure, score and axis whose ends the paper compares: first, last, mean, interval, p (last
            minus first).
        best: one row a measure and score: `sweeps.BestOf`, with the axis and value of the best, and less_own (mean,
            interval, p: r of the best minus r of the run's own score; None if the best is that score, or if that has
            no correlation).
        saes: one row a measure and score if the run sweeps SAEs: own and middle (r with the run's own SAE and with the
            middle one of the sweep), mean, interval, p (middle minus own).
    """
    run = repeated(run)
    frames = [swept(run.with_seed(seed)) for seed in (run.settings.seed, *run.other_seeds)]
    found: dict[str, list[dict]] = {name: [] for name in KINDS}
    changes = item_differences(run)
    for done, (measure, differences) in enumerate(changes.items(), 1):
        for name, rows in compared(measure, frames, differences, run.settings).items():
            found[name] += rows
        report(done / len(changes))
    return found
