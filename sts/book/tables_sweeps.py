"""Rows and tables of the chapter on ablations, from stage `sweep_correlations`."""

from __future__ import annotations

import json

import pandas

from sts.book import learned
from sts.book.pages import p_value
from sts.book.pages_baselines import SCORE_NAMES, _range, _two, _verdict
from sts.book.pages_measures import NAMES, in_order
from sts.book.verdicts_sweeps import best_verdict, ends_verdict, layers_verdict, value_verdict
from sts.errors import StsError
from sts.measure import paper
from sts.measure.sweeps import AXES, SAE_AXES
from sts.run.run import OpenRun

#: Column of `claims_table`: what the training of an SAE alone changes.
ALIKE = "r, two SAEs of one shape, difference"

# --- rows ---------------------------------------------------------------------------------------------------------

def measures(run: OpenRun) -> list[str]:
    """Measures that were evaluated, the finest first (`pages_measures.ORDER`)."""
    return in_order(row["measure"] for row in run.get("sweep_correlations")["values"])


def rows_of(run: OpenRun, measure: str, **wanted) -> list[dict]:
    """Rows of the sweeps for a measure, of a score or axis if asked."""
    return [row for row in run.get("sweep_correlations")["values"]
            if row["measure"] == measure and all(row[name] == value for name, value in wanted.items())]


def axes_of(run: OpenRun) -> list[str]:
    """Settings that this run varies, in the order of the page."""
    found = {row["axis"] for row in run.get("sweep_correlations")["values"]}
    return [axis for axis in AXES if axis in found]


def varied(run: OpenRun) -> list[str]:
    """Those of `axes_of` that have another value than the run's own."""
    others = {row["axis"] for row in run.get("sweep_correlations")["values"] if not row["own"]}
    return [axis for axis in axes_of(run) if axis in others]


def title_of(axis: str) -> str:
    """What a figure calls a setting, with the paper's own figure."""
    return AXES[axis].label + (f" ({AXES[axis].figure})" if AXES[axis].figure else "")


def panels(run: OpenRun, measure: str) -> dict[str, list[dict]]:
    """What `plots_sweeps.sweeps` draws: for each setting the correlations of all values and both scores."""
    def line(row: dict) -> dict:
        interval = row.get("pearson_interval") or {}
        return {"score": row["score"], "value": row["value"], "own": row["own"], "r": row.get("pearson"),
                "low": interval.get("low"), "high": interval.get("high")}

    return {title_of(axis): [line(row) for row in rows_of(run, measure, axis=axis)] for axis in axes_of(run)}


def difference_lines(run: OpenRun, measure: str) -> list[dict]:
    """What `plots_sweeps.differences` draws: every value but the run's own."""
    lines = []
    for axis in axes_of(run):
        rows = [row for value in values_of(run, axis) for row in rows_of(run, measure, axis=axis, value=value)]
        for row in (row for row in rows if not row["own"]):
            less = row.get("less") or {"mean": None, "interval": None}
            interval = less["interval"] or {}
            lines.append({"group": AXES[axis].label, "value": row["value"], "score": row["score"], "mean": less["mean"],
                          "low": interval.get("low"), "high": interval.get("high"),
                          "verdict": value_verdict(row.get("less"))})
    return lines


def values_of(run: OpenRun, axis: str) -> list[str]:
    """Values of a setting, in order."""
    return list(dict.fromkeys(row["value"] for row in run.get("sweep_correlations")["values"] if row["axis"] == axis))


# --- the run's own SAE and the sweep's -----------------------------------------------------------------------------

def own_training(run: OpenRun) -> dict:
    """What is recorded of the training of the run's own SAE: latents, k, tokens, samples, explained; or nothing."""
    settings = run.settings
    try:
        folder = run.sae_folder if settings.sae != "train" or run.stored("sae") else None
    except StsError:  # the weights are not at hand, as where recorded results are rendered
        folder = None
    record = folder / "training.json" if folder else None
    if record is None or not record.is_file():
        return {}
    training = json.loads(record.read_text(encoding="utf-8"))
    size = ({"d_sae": settings.sae_latents, "k": settings.sae_k, "layer": settings.layer,
             "samples": settings.sae_samples} if settings.sae == "train" else training.get("settings", {}))
    return {"latents": size.get("d_sae"), "k": size.get("k"), "layer": size.get("layer"),
            "samples": size.get("samples"), "tokens": training.get("tokens"),
            "explained": training.get("held_out", {}).get("fraction_of_variance_explained")}


def same_shape(run: OpenRun) -> bool:
    """Whether the run's own SAE and the one in the middle of the sweep are alike in layer, width and k."""
    own, settings = own_training(run), run.settings
    return (own.get("latents"), own.get("k"), own.get("layer")) == (
        settings.sae_latents, settings.sae_k, settings.layer)


def _alike(run: OpenRun, measure: str, score: str) -> str:
    """How far r differs between two SAEs of one shape; "" without two such."""
    found = [row["mean"] for row in run.get("sweep_correlations")["saes"]
             if (row["measure"], row["score"]) == (measure, score)]
    return signed(found[0]) if found and not run.get("sweep_saes").empty and same_shape(run) else ""


# --- tables -------------------------------------------------------------------------------------------------------

def values_table(run: OpenRun, measure: str) -> pandas.DataFrame:
    """One line a setting and value: for both scores r with interval, p, and what it changes against the run's own."""
    lines = []
    for axis in axes_of(run):
        for value in values_of(run, axis):
            own = {row["score"]: row for row in rows_of(run, measure, axis=axis, value=value)}
            mark = " (own)" if own["sts_act"]["own"] else ""
            line = {"setting": AXES[axis].label, "value": value + mark}
            for score, name in SCORE_NAMES.items():
                line |= _columns(name, own[score])
            lines.append(line)
    return pandas.DataFrame(lines)


def _columns(name: str, row: dict) -> dict[str, str]:
    if row.get("pearson") is None:
        return {f"{name}: r (95% interval)": "undefined", f"{name}: p": "", f"{name}: less own": "",
                f"{name}: p, Holm": "", f"{name}: verdict": ""}
    less = row.get("less")
    return {f"{name}: r (95% interval)": f"{_two(row['pearson'])} ({_range(row['pearson_interval'])})",
            f"{name}: p": p_value(row["p"]),
            f"{name}: less own": f"{signed(less['mean'])} ({_range(less['interval'])})" if less else "",
            f"{name}: p, Holm": p_value(less["p_holm"]) if less else "",
            f"{name}: verdict": value_verdict(less) if less else ""}


def signed(value: float) -> str:
    """Two decimals with their sign, and never "-0.00"."""
    return f"{round(value, 2) + 0.0:+.2f}"


def claims_table(run: OpenRun) -> pandas.DataFrame:
    """The paper's claims of Figure 4a to d: the ends compared, by measure and score, with verdicts."""
    lines, claims = [], run.get("sweep_correlations")["claims"]
    for axis in (name for name in axes_of(run) if AXES[name].claim):
        for measure in measures(run):
            for score, name in SCORE_NAMES.items():
                line = {"the paper's claim": AXES[axis].claim, "in": AXES[axis].figure, "change in": NAMES[measure],
                        "score": name}
                own = [row for row in claims if (row["axis"], row["measure"], row["score"]) == (axis, measure, score)]
                if AXES[axis].ends and own:
                    claim = own[0]
                    line |= {"compared": f"{claim['last']} less {claim['first']}",
                             "r, difference": signed(claim['mean']), "95% interval": _range(claim["interval"]),
                             "p": p_value(claim["p"]), "r of the values in turn": _in_turn(run, measure, axis, score),
                             "verdict": learned.judged(run, ends_verdict(claim))}
                elif AXES[axis].ends:
                    line |= {"compared": "ends", "r, difference": "undefined", "verdict": "undefined"}
                else:
                    rows = rows_of(run, measure, axis=axis, score=score)
                    held = [row["value"] for row in rows if _verdict(row) == "held"]
                    line |= {"compared": f"held at {len(held)} of {len(rows)}" + (
                        f": {', '.join(held)}" if held else ""), "verdict": learned.judged(run, layers_verdict(rows))}
                if axis in SAE_AXES:
                    line[ALIKE] = _alike(run, measure, score)
                lines.append(line)
    frame = pandas.DataFrame(lines).fillna("")
    return frame[sorted(frame, key=lambda column: column == "verdict")]  # the verdict last


def _in_turn(run: OpenRun, measure: str, axis: str, score: str) -> str:
    rows = rows_of(run, measure, axis=axis, score=score)
    return ", ".join("undefined" if row.get("pearson") is None else _two(row["pearson"]) for row in rows)


def best_table(run: OpenRun) -> pandas.DataFrame:
    """The largest correlation of all values beside the largest that chance gives, by measure and score."""
    return pandas.DataFrame([{
        "change in": NAMES[best["measure"]], "score": SCORE_NAMES[best["score"]], "values tried": best["scores"],
        "best": f"{AXES[best['axis']].label}: {best['value']}", "its r": _two(best["pearson"]),
        "less the run's own": (f"{signed(best['less_own']['mean'])} ({_range(best['less_own']['interval'])})"
                               if best["less_own"] else ""),
        "best by chance, mean": _two(best["chance_mean"]), "best by chance, top 5%": _two(best["chance_high"]),
        "a single value, top 5%": _two(best["single_high"]), "p": p_value(best["p"]), "verdict": best_verdict(best),
    } for measure in measures(run) for best in run.get("sweep_correlations")["best"] if best["measure"] == measure])


def sae_table(run: OpenRun) -> pandas.DataFrame | None:
    """The sweep's SAEs: width, layer, sparsity and quality on held-out text; None if this run trains none."""
    frame = run.get("sweep_saes")
    if frame.empty:
        return None
    frame = frame[frame["axis"].isin(("width", "layer", "k"))].drop_duplicates(["layer", "latents", "k"])
    return pandas.DataFrame({
        "layer": frame["layer"], "latents": frame["latents"].map("{:,}".format), "k": frame["k"],
        "L0 (active latents a token)": frame["l0"].map("{:.1f}".format),
        "fraction of variance explained": frame["explained"].map("{:.3f}".format),
        "silent latents": frame["silent"].map("{:.1%}".format)})


def sparsity_table(run: OpenRun) -> pandas.DataFrame | None:
    """The paper's Table 12 beside this run: L0 and r of each SAE; None if this run does not vary k."""
    if "k" not in axes_of(run):
        return None
    published = paper.published_table(12)
    lines = [{"SAE": "the paper's, Gemma-2-9B-it", "L0": row["quantity"].rsplit(" ", 1)[1],
              "STS": f"{row['value']:.2f}"} for row in published.to_dict("records") if " L0 " in row["quantity"]]
    l0 = run.get("sweep_saes").query("axis == 'k'").groupby("value")["l0"].first()
    for value in values_of(run, "k"):
        line = {"SAE": f"this run's, k = {value}", "L0": f"{l0[value]:.1f}"}
        for measure in measures(run):
            for row in rows_of(run, measure, axis="k", value=value):
                line[f"{SCORE_NAMES[row['score']]}, {NAMES[measure]}"] = (
                    "undefined" if row.get("pearson") is None else _two(row["pearson"]))
        lines.append(line)
    return pandas.DataFrame(lines).fillna("")


def own_sae_table(run: OpenRun) -> pandas.DataFrame | None:
    """r with the run's own SAE beside r with the middle one of the sweep, by measure and score; None without these."""
    if run.get("sweep_saes").empty:
        return None
    return pandas.DataFrame([{
        "change in": NAMES[row["measure"]], "score": SCORE_NAMES[row["score"]],
        "r, the run's own SAE": _two(row["own"]), "r, the sweep's middle SAE": _two(row["middle"]),
        "difference (95% interval)": f"{signed(row['mean'])} ({_range(row['interval'])})", "p": p_value(row["p"]),
        "verdict on the sweep's": value_verdict(row),
    } for measure in measures(run) for row in run.get("sweep_correlations")["saes"] if row["measure"] == measure])
