"""What zeroing latents does to a model, with the rule by which its page judges it, stated before any number is known.

Shape suffixes: D sets of latents (draws), P problems.
"""

from __future__ import annotations

import html

import pandas

from sts.measure.crossed import crossed_mean_interval
from sts.measure.sets import FEWEST, TOLERANCE
from sts.measure.shift import overlap, shifted_dimensions
from sts.run.run import OpenRun
from sts.stages.zeroing import activity, change_by_latent

#: What the most shifted are compared with.
OTHERS = ("most_active", "random", "matched", "like_rate")
#: With fewer problems an interval rests on its assumption more than on the data.
FEW_PROBLEMS = 16

ZERO_RULE = ("*Zeroing the most shifted hurts more* counts as **held** if it costs more bits than zeroing as many "
             "random latents, *and* more than sets of as many others that hold as much energy, *and* more than such "
             "that fire as often, each with the whole 95% interval of the difference above zero; as **held against "
             "random latents only** if that is so for random latents and not for all of the others; otherwise as "
             f"**not shown**. Sets of either kind can be made if at least {FEWEST} of those drawn come within "
             f"{TOLERANCE:.0%} of the most shifted latents' energy, or firing rate; where none can be made that hold "
             "as much energy, the most active latents take their place.")


# --- numbers ------------------------------------------------------------------------------------------------------

def zero_effects(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Change in bits per character that zeroing causes, with a 95% interval over problems and over sets of latents.

    Args:
        rows: stage `ablation`.

    Returns:
        One row per kind and number, and per difference of the most shifted from another kind: kind (also
        "most_shifted - random" and so on), latents, mean, low, high (bits per character), n (problems), draws (sets),
        rate, energy and share (means over the sets), per_percent (mean per percent of all latents' energy). Where no
        set matches, the row of "matched" has no mean and no draws, the energy is that of the nearest, and there is no
        difference.
    """
    none_P = rows[rows["kind"] == "none"].set_index("example_id")["bits"]
    found = []
    for count, of_count in rows[rows["kind"] != "none"].groupby("latents"):
        tables, facts = {}, {}
        goal = of_count.loc[of_count["kind"] == "most_shifted", "energy"].iloc[0]
        for kind in ("most_shifted", *OTHERS):
            own = of_count[of_count["kind"] == kind]
            if own.empty:
                continue
            used = own[own["bits"].notna()]
            sets = (own if used.empty else used).groupby("draw")[["rate", "energy", "share"]].first()
            if used.empty:
                sets = sets.loc[[(sets["energy"] - goal).abs().idxmin()]]
            else:
                tables[kind] = used.pivot(index="draw", columns="example_id", values="bits")[none_P.index] - none_P
            facts[kind] = {"draws": len(sets) if kind in tables else 0, **sets.mean().to_dict()}
        tables |= {f"most_shifted - {kind}": tables["most_shifted"].iloc[0] - tables[kind]
                   for kind in OTHERS if kind in tables}
        for kind in [*facts, *(name for name in tables if name not in facts)]:
            row = {"kind": kind, "latents": int(count), "n": len(none_P), **facts.get(kind, {})}
            if kind in tables:
                # The most shifted are one set, whose own luck counts beside that of the sets drawn.
                interval = crossed_mean_interval(tables[kind].to_numpy(), against_one=kind not in facts)
                row |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
            found.append(row)
    frame = pandas.DataFrame(found)
    return frame.assign(per_percent=frame["mean"] / (100 * frame["share"].where(frame["share"] > 0)))


def run_effects(run: OpenRun) -> pandas.DataFrame:
    """`zero_effects` of a run's stage `ablation`."""
    return zero_effects(run.get("ablation"))


def zeroed_number(run: OpenRun) -> int:
    """The number of latents in `ablation_latents` nearest to the run's N; the smaller of two as near."""
    return min(sorted(run.settings.ablation_latents), key=lambda count: abs(count - run.settings.top_n))


def shared_number(run: OpenRun, count: int) -> int:
    """How many latents the most shifted and the most active share."""
    return overlap(shifted_dimensions(change_by_latent(run), count), shifted_dimensions(activity(run).energy_L, count))


# --- the rule and the sentences -----------------------------------------------------------------------------------

def zero_verdict(effects: pandas.DataFrame, count: int) -> str:
    """`ZERO_RULE`, from `zero_effects` at one number of latents."""
    low = effects[effects["latents"] == count].set_index("kind")["low"]
    if not low["most_shifted - random"] > 0:
        return "not shown"
    others = ["matched" if "most_shifted - matched" in low else "most_active", "like_rate"]
    decides = low[low.index.isin([f"most_shifted - {kind}" for kind in others])]
    return "held" if (decides > 0).all() else "held against random latents only"


def run_verdict(run: OpenRun) -> str:
    """`zero_verdict` of a run at `zeroed_number`."""
    return zero_verdict(run_effects(run), zeroed_number(run))


def run_sentence(run: OpenRun) -> str:
    """`effects_sentence` of a run at `zeroed_number`."""
    count = zeroed_number(run)
    return effects_sentence(run_effects(run), count, shared_number(run, count), run.settings.ablation_model)


def effects_sentence(effects: pandas.DataFrame, count: int, shared: int, model: str) -> str:
    """The costs of zeroing at one number of latents, and what the sets hold.

    Args:
        effects: of `zero_effects`.
        shared: latents that the most shifted and the most active share.
        model: tuned or base.
    """
    own = effects[effects["latents"] == count].set_index("kind")

    def cost(kind: str) -> str:
        row = own.loc[kind]
        return f"{row['mean']:+.2g} ({row['low']:+.2g} to {row['high']:+.2g})"

    def energy(kind: str) -> str:
        return f"{own.loc[kind, 'share']:.1%}"

    def drawn(kind: str, what: str) -> str:
        if own.loc[kind, "draws"]:
            return (f"{what} by {cost(kind)}: the most shifted cost {cost(f'most_shifted - {kind}')} more "
                    f"({own.loc[kind, 'draws']:.0f} sets)")
        return f"{what}: no such set can be made (the nearest holds {energy(kind)} of all energy)"

    kinds = {"random": "random ones", "matched": "others of as much energy", "like_rate": "others that fire as often"}
    compared = "; ".join(drawn(kind, what) for kind, what in kinds.items() if kind in own.index)
    return (f"zeroing the {count} most shifted latents in the {model} model changes the bits per character of "
            f"{int(own['n'].iloc[0])} held-out solutions by {cost('most_shifted')}. Zeroing as many others changes "
            f"them: {compared}. The {count} most active latents cost {cost('most_active')}, but they hold "
            f"{energy('most_active')} of all latents' energy and the most shifted {energy('most_shifted')} (random "
            f"ones {energy('random')}): per percent of the energy that is {own.loc['most_active', 'per_percent']:.2g} "
            f"against {own.loc['most_shifted', 'per_percent']:.2g} bits. The two have {shared} of {count} latents in "
            "common.")


def interval_note(effects: pandas.DataFrame) -> str:
    """What the intervals cover, for the line under the figure."""
    few = int(effects["n"].max())
    note = "95% interval (Student's t) over problems and over random sets"
    if few < FEW_PROBLEMS:
        note += f"; with only {few} problems it holds if their changes are about normally distributed"
    return note


# --- for the page -------------------------------------------------------------------------------------------------

ZEROED = {"none": "nothing", "most_shifted": "most shifted", "most_active": "most active", "random": "random",
          "matched": "others of as much energy", "like_rate": "others that fire as often",
          "most_shifted - most_active": "difference: most shifted less most active",
          "most_shifted - random": "difference: most shifted less random",
          "most_shifted - matched": "difference: most shifted less others of as much energy",
          "most_shifted - like_rate": "difference: most shifted less others that fire as often"}


def effects_table(effects: pandas.DataFrame) -> pandas.DataFrame:
    """`zero_effects` for a page."""
    def known(value: float, form: str) -> str:
        return "" if pandas.isna(value) else format(value, form)

    return pandas.DataFrame([{
        "latents zeroed": row.latents, "which": ZEROED[row.kind],
        "change in bits per character": ("no match possible" if row.draws == 0 else
                                         f"{row.mean:+.2g} ({row.low:+.2g} to {row.high:+.2g})"),
        "problems": row.n, "sets": known(row.draws, ".0f"), "energy": known(row.energy, ",.4g"),
        "of all energy": known(row.share, ".1%"), "bits per 1% of all energy": known(row.per_percent, "+.2g"),
        "mean firing rate": known(row.rate, ".2%")}
        for row in effects.itertuples()])


def answers_html(written: dict) -> str:
    """Stage `ablated_answers` as HTML: the problem and each model's answer, escaped."""
    blocks = "".join(f"<dt>Zeroed: {html.escape(ZEROED[one['zeroed']])} ({one['latents']} latents)</dt>"
                     f"<dd><em>{html.escape(one['answer']) or 'nothing written'}</em></dd>"
                     for one in written["answers"])
    return (f"<p>{html.escape(written['question'])} (Right answer: {html.escape(written['answer'])})</p>"
            f"<dl>{blocks}</dl>")
