"""Figures of the chapters on shifted latents, in the style of plots.py."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy
import pandas
from matplotlib.figure import Figure

from sts.book.plots import BLUE, GREEN, GREY, ORANGE, SCORE_NAMES, VARIANT_LABELS, _finished, _theme
from sts.engine.evaluate import MEASURES
from sts.measure.shift_stats import Concentration

#: kind -> (label, colour, line style, marker)
KIND_STYLE = {"sae": ("SAE latents", BLUE, "-", "o"), "raw": ("raw dimensions", ORANGE, "--", "s"),
              "random": ("random sparse code", GREEN, "-.", "^")}
#: baseline -> the same, see `shift_results.BASELINES`
BASELINE_STYLE = {"rate": ("by firing rate", ORANGE, "--", "v"), "energy": ("by energy", GREEN, "-.", "^"),
                  "other_domain": ("other domains' demonstrations", GREY, ":", "x")}
SET_STYLE = {"most_shifted": ("most shifted", BLUE, "-", "o"), "most_active": ("most active", GREEN, "-.", "^"),
             "matched": ("others of as much energy", ORANGE, "--", "s"),
             "like_rate": ("others that fire as often", "#CC79A7", "--", "v"), "random": ("random", GREY, ":", "D")}


def concentration_curve(found: Concentration, energy_L: numpy.ndarray, top_n: int) -> Figure:
    """Figure 1a: share of the squared change against the number of latents.

    Solid: chosen and measured on different questions, with its interval; dash-dotted: on the same ones; dotted: share
    of the squared activation in the most active latents (`energy_L`, `shift_results.energy_curve`); dashed: latents in
    random order, with the central 95% of random orders.
    """
    _theme()
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    axis.fill_between(found.counts_K, found.low_K, found.high_K, color=BLUE, alpha=0.25, linewidth=0)
    axis.plot(found.counts_K, found.held_out_K, color=BLUE, label="most shifted on other questions")
    axis.plot(found.counts_K, found.share_K, color=GREEN, linestyle="-.", label="most shifted on the same questions")
    axis.plot(found.counts_K, energy_L[found.counts_K - 1], color="black", linestyle=":",
              label="squared activation, most active")
    axis.fill_between(found.counts_K, found.random_low_K, found.random_high_K, color=GREY, alpha=0.3, linewidth=0)
    axis.plot(found.counts_K, found.counts_K / found.width, color=GREY, linestyle="--", label="random order")
    axis.axvline(top_n, color=ORANGE, linestyle=":", label=f"N = {top_n}")
    axis.set(xlabel=f"number of latents (of {found.width:,})", ylabel="share of squared change", xscale="log",
             ylim=(0, 1))
    axis.legend(loc="upper left")
    return _finished(figure)


def concentration_by_kind(found: dict[str, Concentration]) -> Figure:
    """Figure 2b: the same for SAE latents, raw dimensions and a random code, by number (left) and fraction (right)."""
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharey=True, layout="constrained")
    for axis, by_fraction in zip(axes, (False, True), strict=True):
        for kind, own in found.items():
            label, colour, style, _ = KIND_STYLE[kind]
            x = own.counts_K / (own.width if by_fraction else 1)
            axis.fill_between(x, own.low_K, own.high_K, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, own.held_out_K, color=colour, linestyle=style, label=f"{label} ({own.width:,})")
        axis.set(xscale="log", ylim=(0, 1))
    fractions = numpy.geomspace(min(1 / own.width for own in found.values()), 1, 100)
    axes[1].plot(fractions, fractions, color=GREY, linestyle=":", label="random order")
    axes[0].set(xlabel="number of dimensions", ylabel="share of squared change")
    axes[1].set(xlabel="fraction of dimensions")
    axes[1].legend(loc="upper left")
    return _finished(figure)


def zeroing(effects: pandas.DataFrame) -> Figure:
    """Figure 1b: change in bits per character with its interval, left against the number of latents zeroed, right
    against their share of all energy; kinds without a match have no point."""
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.8), sharey=True, layout="constrained")
    drawn = effects[effects["mean"].notna()].sort_values("latents")
    for place, (kind, (label, colour, style, marker)) in enumerate(SET_STYLE.items()):
        own = drawn[drawn["kind"] == kind]
        if own.empty:  # no such set could be made
            continue
        # By number, kinds stand beside each other, so that their bars can be told apart.
        for axis, x in zip(axes, (own["latents"] * 1.06 ** (place - 2), 100 * own["share"]), strict=True):
            axis.errorbar(x, own["mean"], yerr=[own["mean"] - own["low"], own["high"] - own["mean"]], color=colour,
                          linestyle=style, marker=marker, markersize=5, capsize=3, label=label)
    counts = sorted(effects["latents"].unique())
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].set(xlabel="latents zeroed", ylabel="change in bits per character\n(higher: worse)", xscale="log")
    axes[0].set_xticks(counts, [str(count) for count in counts])
    axes[0].minorticks_off()
    axes[1].set(xlabel="their share of all latents' energy (%)")
    axes[1].locator_params(axis="x", nbins=4)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)


def overlap_curves(curves: dict[str, pandas.DataFrame], baselines: dict[str, pandas.DataFrame], top_n: int) -> Figure:
    """Figure 2a: left, share of the top N foreseen against N, with chance and the lists that need no demonstration;
    right, latents, raw dimensions and a random code by fraction."""
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.9), sharey=True, layout="constrained")
    own = curves["sae"]
    label, colour, style, _ = KIND_STYLE["sae"]
    axes[0].plot(own["n"], own["share"], color=colour, linestyle=style, label="by demonstrations")
    for name, frame in baselines.items():
        text, shade, dashes, _ = BASELINE_STYLE[name]
        axes[0].plot(frame["n"], frame["share"], color=shade, linestyle=dashes, label=text)
    axes[0].fill_between(own["n"], own["chance_low"], own["chance_high"], color=GREY, alpha=0.3, linewidth=0)
    axes[0].plot(own["n"], own["active_chance"].astype(float), color="black", linestyle=":", linewidth=1,
                 label="chance, changing latents")
    axes[0].plot(own["n"], own["chance"], color=GREY, linestyle="--", linewidth=1, label="chance, all latents")
    axes[0].axvline(top_n, color=GREY, linestyle="-", linewidth=0.8)
    axes[0].annotate(f"N = {top_n}", (top_n, 0.02), fontsize=9, ha="left", xytext=(3, 0), textcoords="offset points")
    axes[0].set(xlabel="N", ylabel="share of the top N foreseen", xscale="log", ylim=(0, 1.02))
    for kind, frame in curves.items():
        label, colour, style, _ = KIND_STYLE[kind]
        axes[1].plot(frame["fraction"], frame["share"], color=colour, linestyle=style, label=label)
    axes[1].plot(own["fraction"], own["fraction"], color=GREY, linestyle=":", label="chance")
    axes[1].set(xlabel="fraction of dimensions", xscale="log")
    for axis in axes:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9, frameon=False)
    return _finished(figure)


def overlap_by_number(frame: pandas.DataFrame, baselines: dict[str, float]) -> Figure:
    """Share foreseen against the number of demonstrations: hollow, one marker a draw; lines through the means.

    Args:
        baselines: share that a list without demonstrations names, by `BASELINE_STYLE`; drawn as horizontal lines.
    """
    _theme()
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for kind, (label, colour, style, marker) in KIND_STYLE.items():
        own = frame[frame["kind"] == kind]
        axis.plot(own["demonstrations"], own["share"], marker, color=colour, markersize=6, markerfacecolor="none")
        means = own.groupby("demonstrations")["share"].mean()
        axis.plot(means.index, means, color=colour, linestyle=style, marker=marker, markersize=3, label=label)
    for name, share in baselines.items():
        text, _, dashes, _ = BASELINE_STYLE[name]
        axis.axhline(share, color="black", linestyle=dashes, linewidth=1, label=f"SAE latents {text}")
    axis.axhline(frame["chance"].iloc[0], color=GREY, linestyle=":", label="chance")
    axis.set_xticks(sorted(frame["demonstrations"].unique()))
    axis.set(xlabel="number of demonstrations", ylabel="share of the top N foreseen", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _finished(figure)


def overlap_by_set(codes: pandas.DataFrame, baselines: pandas.DataFrame, alone: dict[str, float]) -> Figure:
    """Share foreseen behind each single set of demonstrations: left, each code; right, SAE latents and baselines.

    Args:
        codes: `shift_results.overlap_by_draw`.
        baselines: `shift_results.baselines_by_draw`.
        alone: `shift_results.activity_shares`, drawn as one dashed line a code.
    """
    _theme()
    figure, axes = plt.subplots(1, 2, figsize=(7, 4), sharey=True, layout="constrained")
    for kind, (label, colour, _, marker) in KIND_STYLE.items():
        own = codes[codes["kind"] == kind]
        axes[0].plot(own["draw"], own["share"], marker, color=colour, markersize=6, label=label)
        axes[0].axhline(alone[kind], color=colour, linestyle="--", linewidth=1.2)
    axes[0].plot([], [], color=GREY, linestyle="--", linewidth=1.2, label="activity alone, same colour")
    axes[0].axhline(codes["chance"].iloc[0], color=GREY, linestyle=":", label="chance")
    own = codes[codes["kind"] == "sae"]
    axes[1].plot(own["draw"], own["share"], "o", color=BLUE, markersize=6, label="by this set")
    for name, (label, colour, _, marker) in BASELINE_STYLE.items():
        own = baselines[baselines["baseline"] == name]
        axes[1].plot(own["draw"], own["share"], marker, color=colour, markersize=6, label=label)
    for axis, title in zip(axes, ("foreseen in each code", "SAE latents, by what list"), strict=True):
        axis.set_xticks(sorted(codes["draw"].unique()))
        axis.set(xlabel="set of demonstrations", ylim=(0, 1.02))
        axis.set_title(title, fontsize=10)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=9, frameon=False)
    axes[0].set(ylabel="share of the top N foreseen")
    return _finished(figure)


def figure3(scores: pandas.DataFrame, shifts: pandas.DataFrame, everything: list[dict], extremes: list[dict],
            measure: str) -> Figure:
    """Figure 3 for both scores (columns) in both variants (rows): absolute change against score.

    Filled: the domains of largest and smallest change, with their line (solid); hollow: the others; dashed: the line
    through all domains.
    """
    _theme()
    figure, axes = plt.subplots(len(VARIANT_LABELS), len(SCORE_NAMES), figsize=(7, 6), sharey=True,
                                layout="constrained")
    actual = shifts[shifts["measure"] == measure].set_index("domain")["shift"].abs()
    for row, variant in zip(axes, VARIANT_LABELS, strict=True):
        own = scores[scores["variant"] == variant].set_index("domain").loc[actual.index]
        for axis, score in zip(row, SCORE_NAMES, strict=True):
            every, kept = (next(result for result in rows if (result["measure"], result["variant"], result["score"])
                                == (measure, variant, score)) for rows in (everything, extremes))
            chosen = [domain for domain in actual.index if domain in kept.get("domains", ())]
            others = [domain for domain in actual.index if domain not in chosen]
            axis.plot(own.loc[others, score], actual[others], "o", color=BLUE, markerfacecolor="none")
            axis.plot(own.loc[chosen, score], actual[chosen], "s", color=ORANGE)
            for result, domains, style, colour in ((every, list(actual.index), "--", BLUE),
                                                   (kept, chosen, "-", ORANGE)):
                if "undefined" not in result:
                    ends = numpy.array([own.loc[domains, score].min(), own.loc[domains, score].max()])
                    axis.plot(ends, result["line"]["intercept"] + result["line"]["slope"] * ends, style, color=colour)
            said = ["undefined" if "undefined" in result else f"{result['pearson']:.2f}" for result in (every, kept)]
            axis.set_title(f"r = {said[0]} (all), {said[1]} (extremes)")
            axis.set(xlabel=f"{SCORE_NAMES[score]} ({VARIANT_LABELS[variant]})")
            axis.locator_params(axis="x", nbins=4)
            axis.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
    figure.supylabel(f"absolute change in {MEASURES[measure]}", fontsize=10)
    axes[0, 0].plot([], [], "s-", color=ORANGE, label="four largest and four smallest changes")
    axes[0, 0].plot([], [], "o--", color=BLUE, markerfacecolor="none", label="the other domains; line: all")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)


def correlations_compared(everything: list[dict], extremes: list[dict], measure: str) -> Figure:
    """Pearson's r of each variant and score with its interval: all domains, and the eight most extreme."""
    _theme()
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    labels = []
    for variant in VARIANT_LABELS:
        for score, score_label in SCORE_NAMES.items():
            for offset, rows, colour, marker in ((0.15, everything, BLUE, "o"), (-0.15, extremes, ORANGE, "s")):
                row = next(row for row in rows if (row["measure"], row["variant"], row["score"])
                           == (measure, variant, score))
                if "undefined" not in row:
                    interval = row["pearson_interval"]
                    axis.plot([interval["low"], interval["high"]], [len(labels) + offset] * 2, color=colour)
                    axis.plot(row["pearson"], len(labels) + offset, marker, color=colour)
            labels.append(f"{score_label},\n{VARIANT_LABELS[variant]}")
    for rows, colour, marker, name in ((everything, BLUE, "o", "all domains"),
                                       (extremes, ORANGE, "s", "four largest and four smallest changes")):
        count = next((row["n"] for row in rows if row["measure"] == measure and "undefined" not in row), None)
        axis.plot([], [], marker, color=colour, label=name + (f" (n = {count})" if count else ": undefined"))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel=f"Pearson's r with the absolute change in\n{MEASURES[measure]}", xlim=(-1.02, 1.02),
             ylim=(-0.5, len(labels) - 0.5))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)


def correlations_of_seeds(rows: list[dict], measure: str) -> Figure:
    """Pearson's r of every seed: one column a score and variant, filled for all domains, hollow for the extremes."""
    _theme()
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    frame = pandas.DataFrame(rows)
    own = frame[(frame["measure"] == measure) & frame["pearson"].notna()]
    places = [(variant, score) for variant in VARIANT_LABELS for score in SCORE_NAMES]
    for domains, offset, colour, marker, label in (("all", -0.12, BLUE, "o", "all domains"),
                                                   ("extremes", 0.12, ORANGE, "s", "eight extremes")):
        part = own[own["domains"] == domains]
        x = [places.index((row.variant, row.score)) + offset for row in part.itertuples()]
        axis.plot(x, part["pearson"].astype(float), marker, color=colour, markerfacecolor="none", label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(places)), [f"{SCORE_NAMES[score]},\n{VARIANT_LABELS[variant]}"
                                         for variant, score in places])
    axis.set(ylabel="Pearson's r", ylim=(-1.05, 1.05), xlim=(-0.6, len(places) - 0.4))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _finished(figure)
