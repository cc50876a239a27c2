"""The score with other values of single settings: from stored sums, read again for each value, and with SAEs of the
sweep's own, trained on the same text; empty where the run lists no values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

import pandas
import torch

from sts.engine.extract import paired_stats
from sts.engine.sae_quality import reconstruction_quality
from sts.engine.sae_training import collect_activations, save_sae, train_sae
from sts.engine.saes import SaeSpec, SideBySide, load_sae
from sts.measure.baselines import split_domains
from sts.measure.compare import AXES, SCORES, sweeps_compared
from sts.measure.items import item_differences
from sts.measure.score import REVISION, Stats, check_top_n, chosen_by, score_domain, sums_of
from sts.run.stage import stage, steps

#: Seed of the sweep's text and SAEs, the same in every seed of a run; files in the folder of each of these SAEs.
SAE_SEED, QUALITY = 0, "quality.json"
COLUMNS = ["axis", "value", "own", "domain", *SCORES]
#: Names in `sweep_masks` -> what a table calls it, and which settings of the masks are switched off.
MASKS_OFF = {"whole_prompt": ("template too", {"question_tokens_only": False}),
             "first_positions": ("template and first positions too",
                                 {"question_tokens_only": False, "drop_first_positions": 0}),
             "outliers": ("outlier norms too", {"outlier_norm": 0.0}),
             "none": ("all tokens", {"question_tokens_only": False, "drop_first_positions": 0, "outlier_norm": 0.0})}


def _scores(chosen: torch.Tensor, domains: Mapping[str, Stats], **about) -> list[dict]:
    """The paper's scores of every domain with chosen latents, and what they are about."""
    return [{**about, "domain": domain, **score_domain("paper", stats, chosen)} for domain, stats in domains.items()]


@stage("parquet", version=1 + REVISION)
def sweep_latents(shift, domain_stats, scores, top_n, sweep_bands, sweep_top_n):
    """Scores by rank band of the latents, by their number N, and by the formulas: axis, value, own, domain, scores."""
    width, domains = len(shift["squared_difference_L"]), split_domains(domain_stats)
    check_top_n(top_n, width)
    order, rows = chosen_by(shift, width), []
    for first in range(0, min(sweep_bands, width // top_n) * top_n, top_n):
        rows += _scores(order[first:first + top_n], domains, axis="bands", value=f"{first + 1:,}-{first + top_n:,}",
                        own=first == 0)
    for number in sorted({top_n, *sweep_top_n}):
        if number <= width:
            rows += _scores(order[:number], domains, axis="top_n", value=f"{number:,}", own=number == top_n)
    rows += [{"axis": "variant", "value": row["variant"].replace("_", " "), "own": row["variant"] == "paper", **row}
             for row in scores.to_dict("records")]
    return pandas.DataFrame(rows, columns=COLUMNS)


@stage("parquet", version=1 + REVISION, also=("shift", "domain_stats", "lm", "reader", "layer",
                                              "shift_groups", "domain_groups", "masks"))
def sweep_settings(variant, top_n, demonstrations, shift_demonstrations, score_tokens, shift_tokens,
                   sweep_demonstrations, sweep_shift_demonstrations, sweep_tokens, sweep_shift_tokens, sweep_masks,
                   report):
    """Scores with other demonstrations, numbers of tokens and masks; each value's sums are stages of their own."""
    own = {"demonstrations": demonstrations, "shift_demonstrations": shift_demonstrations,
           "score_tokens": score_tokens, "shift_tokens": shift_tokens}
    listed = (sweep_demonstrations, sweep_shift_demonstrations, sweep_tokens, sweep_shift_tokens)
    swept = [(name, f"{value:,}", {} if value == own[name] else {name: value})
             for name, values in zip(own, listed, strict=True) if values for value in sorted({own[name], *values})]
    if sweep_masks:
        swept += [("masks", *one) for one in (("as in this run", {}), *(MASKS_OFF[name] for name in sweep_masks))]
    rows = []
    for (axis, value, changes), _ in steps(swept, report):
        run = variant(**changes)
        rows += _scores(chosen_by(run.get("shift"), top_n), split_domains(run.get("domain_stats")), axis=axis,
                        value=value, own=not changes)
    return pandas.DataFrame(rows, columns=COLUMNS)


def sae_values(own: SaeSpec, widths: list[int], layers: list[int], ks: list[int]) -> dict[str, list[SaeSpec]]:
    """axis -> SAEs of the sweep, with `own` trained anew in each, for the run's own SAE may have seen more text."""
    axes = {"width": [own._replace(latents=width) for width in sorted({own.latents, *widths})],
            "layer": [own._replace(layer=layer) for layer in sorted({own.layer, *layers})],
            "k": [own._replace(k=k) for k in sorted({own.k, *ks})]}
    return {axis: specs for axis, specs in axes.items() if len(specs) > 1}


def _by_layer(axes: dict[str, list[SaeSpec]]) -> dict[int, list[SaeSpec]]:
    specs = dict.fromkeys(spec for own in axes.values() for spec in own)
    return {layer: [spec for spec in specs if spec.layer == layer] for layer in dict.fromkeys(
        spec.layer for spec in specs)}


@stage("folder")
def sweep_sae_training(lm, layer, sae_texts, sae_lr, sweep_sae_samples, sweep_text_tokens, sae_latents, sae_k,
                       sweep_widths, sweep_layers, sweep_k, report, work, scratch, device):
    """SAEs of several widths, layers and sparsities, trained on the same activations: one folder each, with quality."""
    layers = _by_layer(sae_values(SaeSpec(layer, sae_latents, sae_k), sweep_widths, sweep_layers, sweep_k))
    specs, activations = [spec for own in layers.values() for spec in own], scratch / "activations"
    (scratch / "plan.json").write_text(json.dumps([spec.name for spec in specs]) + "\n", encoding="utf-8")
    if missing := [spec for spec in specs if not (scratch / spec.name / QUALITY).is_file()]:
        train, held_out = sae_texts.pieces(sweep_text_tokens, seed=SAE_SEED)
        for part, pieces, share in (("held_out", held_out, 0.0), ("train", train, 0.2)):
            collect_activations(lm, {one: activations / part / str(one) for one in sorted(layers)}, pieces, work=work,
                                pieces_per_shard=max(32, 512 // len(layers)),
                                report=lambda f, share=share: report(share * f))
    for spec, told in steps(missing, lambda f: report(0.2 + 0.8 * f)):
        folder = scratch / spec.name
        trained, _ = train_sae(activations / "train" / str(spec.layer), spec.latents, spec.k, sweep_sae_samples,
                               lr=sae_lr, seed=SAE_SEED, model_name=lm.name, layer=spec.layer, device=device,
                               report=told)
        folder.mkdir(exist_ok=True)
        save_sae(trained, folder, dtype="bfloat16")
        quality = reconstruction_quality(load_sae(str(folder), device=device),
                                         activations / "held_out" / str(spec.layer))
        (folder / QUALITY).write_text(json.dumps(quality) + "\n", encoding="utf-8")  # last, as the mark of its end
    shutil.rmtree(activations, ignore_errors=True)  # gigabytes that nothing needs any more
    return scratch


@stage("parquet", version=2 + REVISION, also=("fold_norms",))
def sweep_saes(lm, layer, sweep_sae_training, sae_dtype, shift_groups, domain_groups, masks, top_n, sae_latents, sae_k,
               sweep_widths, sweep_layers, sweep_k, report, passes, device):
    """Scores with each SAE of the sweep; also layer, latents, k, l0, explained and silent (shares, held-out text)."""
    own = SaeSpec(layer, sae_latents, sae_k)
    axes = sae_values(own, sweep_widths, sweep_layers, sweep_k)
    sums: dict[SaeSpec, dict[str, dict]] = {spec: {} for own in axes.values() for spec in own}
    for (one, specs), told in steps(_by_layer(axes).items(), report):
        for spec in specs:
            check_top_n(top_n, spec.latents)
        codes = SideBySide({spec.name: load_sae(str(sweep_sae_training / spec.name), device=device, dtype=sae_dtype)
                            for spec in specs})
        for (name, groups), part in steps({"": shift_groups, **domain_groups}.items(), told):
            stats = paired_stats(lm, codes, one, groups, masks, report=part, **passes).to_tensors()
            by_sae = split_domains(codes.split({field: stats[field] for field in ("tokens", *sums_of("paper"))}))
            for spec in specs:
                sums[spec][name] = by_sae[spec.name]
    values = [(axis, f"{getattr(spec, 'latents' if axis == 'width' else axis):,}", spec)
              for axis, specs in axes.items() for spec in specs]
    rows = []
    for axis, value, spec in values:
        folder, domains = sweep_sae_training / spec.name, sums[spec]
        quality = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
        rows += _scores(chosen_by(domains[""], top_n), {name: stats for name, stats in domains.items() if name},
                        axis=axis, value=value, own=spec == own, **spec._asdict(), l0=quality["l0"],
                        explained=quality["fraction_of_variance_explained"], silent=quality["dead"] / spec.latents)
    return pandas.DataFrame(rows, columns=[*COLUMNS, "layer", "latents", "k", "l0", "explained", "silent"])


@stage("json", version=3, also=("sweep_latents", "sweep_settings", "sweep_saes", "evaluation_before",
                                "evaluation_after"))
def sweep_correlations(each_seed, sweep_seeds, seed, bootstrap, permutations):
    """Correlation of each value's scores with the absolute change, mean over seeds; `values`: `Comparison.rows`,
    `less` being r less that of the run's own; `claims`: last less first value of axes whose ends the paper compares;
    `best`: `compare.best_of`."""
    runs = [own for own in each_seed if sweep_seeds is None or own.settings.seed in (seed, *sweep_seeds)]
    frames = [pandas.concat([part for name in ("sweep_latents", "sweep_saes", "sweep_settings")
                             if len(part := own.get(name)[COLUMNS])]).sort_values(
        "axis", key=lambda axis: axis.map(AXES.index), kind="stable", ignore_index=True) for own in runs]
    changes = item_differences({own.settings.seed: (own.get("evaluation_before"), own.get("evaluation_after"))
                                for own in runs})
    found: dict[str, list[dict]] = {"values": [], "claims": [], "best": []}
    for measure, differences in changes.items():
        for name, rows in sweeps_compared(measure, frames, differences, bootstrap=bootstrap,
                                          permutations=permutations, seed=seed).items():
            found[name] += rows
    return found
