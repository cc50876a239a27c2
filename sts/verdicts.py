"""Sentences that say whether a claim of the paper held in a run, each by a rule that its page states.

A rule is fixed here, in words and in code side by side, before any number is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas

from sts import shift_results, zero_results
from sts.pages import p_phrase, p_value
from sts.paper import published_numbers
from sts.stages import OpenRun

#: The paper's share of the squared change in the top 100 latents (Figure 1a).
PAPER_SHARE = 0.25

FEW_RULE = ("*Few latents carry the change* counts as **held** if the N most shifted latents, chosen on other "
            "questions than those they are measured on, carry a quarter of it (the paper's share) or more with the "
            "whole 95% interval; as **not held** if the whole interval lies below a quarter; otherwise as "
            "**undecided**.")
EVEN_RULE = ("*Raw dimensions share it more evenly* counts as **held** if the interval of the SAE's share lies above "
             "that of the same fraction of raw dimensions, as **reversed** if it lies below, otherwise as "
             "**not shown**.")
FORESEEN_RULE = ("*Demonstrations foresee the shift* counts as **held** if the two lists of N latents share more than "
                 "random lists would with p below 0.05, drawn among the latents that change on these tokens at all; "
                 "otherwise as **not shown**.")
BETTER_RULE = ("*Better than raw dimensions* counts as **held** if the share foreseen is larger for latents than for "
               "the same fraction of raw dimensions behind every single set of demonstrations, as **reversed** if it "
               "is smaller behind every one, otherwise as **not shown**.")


# --- the rules ----------------------------------------------------------------------------------------------------

def few_verdict(share: dict[str, float]) -> str:
    """`FEW_RULE`, from the held-out share's low and high."""
    if share["low"] >= PAPER_SHARE:
        return "held"
    return "not held" if share["high"] < PAPER_SHARE else "undecided"


def even_verdict(sae: dict[str, float], raw: dict[str, float]) -> str:
    """`EVEN_RULE`, from both shares' low and high."""
    if sae["low"] > raw["high"]:
        return "held"
    return "reversed" if sae["high"] < raw["low"] else "not shown"


def foreseen_verdict(row: dict) -> str:
    """`FORESEEN_RULE`, from a row of `shift_stats.overlap_rows`; more latents than are active: not shown."""
    return "held" if row["active_p"] is not None and row["active_p"] < 0.05 else "not shown"


def better_verdict(by_draw: pandas.DataFrame) -> str:
    """`BETTER_RULE`, from `shift_results.overlap_by_draw`."""
    wide = by_draw.pivot(index="draw", columns="kind", values="share")
    if (wide["sae"] > wide["raw"]).all():
        return "held"
    return "reversed" if (wide["sae"] < wide["raw"]).all() else "not shown"


def figure_note(run: OpenRun, n: str, interval: str, *stages: str, seeds: Sequence[int] = ()) -> str:
    """The line under a figure: n, seed (and further `seeds`), what the interval is, run, and results behind it."""
    keys = ", ".join(f"`{name}-{run.key(name)}`" for name in stages)
    listed = f"seed{'s' if seeds else ''} {', '.join(map(str, (run.settings.seed, *seeds)))}"
    return f"*{n}; {listed}; {interval}; run `{run.settings.name}`; from* {keys}."


# --- the sentences ------------------------------------------------------------------------------------------------

def _percent(share: dict[str, float]) -> str:
    return f"{share['held_out']:.0%} (95% interval {share['low']:.0%} to {share['high']:.0%})"


def _tuned_on(run: OpenRun) -> str:
    return f"On `{run.settings.model}`, fine-tuned on `{run.settings.sft_data}`:"


def _listed(*sentences: str) -> str:
    """Sentences as a Markdown list, each with a capital letter."""
    return "\n".join(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in sentences)


def counted(count: int, what: str) -> str:
    """"1 set", "2 sets"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def few_sentence(run: OpenRun) -> str:
    """Whether few latents carry the change that fine-tuning causes (Figure 1a)."""
    found, count = shift_results.concentration_of(run, "sae"), run.settings.top_n
    share, tokens = found.at(count), int(run.get("sft_shift")["sae/tokens"].item())
    return (f"the {count} most shifted of {found.width:,} latents carry {_percent(share)} of the squared change "
            f"({tokens:,} question tokens in {found.folds} groups of questions; {share['share']:.0%} if chosen and "
            f"measured on the same questions). The paper reports {PAPER_SHARE:.0%} for 100 of 28,672. Few latents "
            f"carry the change: **{few_verdict(share)}**.")


def fraction_sentence(run: OpenRun) -> str:
    """The share at the paper's own fraction of latents, and how many latents change at all."""
    found, change_L = shift_results.concentration_of(run, "sae"), shift_results.actual(run, "sae")
    count, active = shift_results.paper_number(found.width), int((change_L > 0).sum())
    return (f"The paper's 100 of 28,672 latents are {shift_results.PAPER_FRACTION:.2%}. The same fraction of "
            f"{found.width:,} is {count}, and these carry {_percent(found.at(count))}. Many latents have no part in "
            f"this: {active:,} of {found.width:,} change at all on these tokens, so the {run.settings.top_n} are "
            f"{min(1, run.settings.top_n / active):.0%} of those that could have changed.")


def even_sentence(run: OpenRun) -> str:
    """Whether the change is spread more evenly over raw dimensions (Figure 2b)."""
    numbers = shift_results.equal_numbers(run)
    shares = {kind: shift_results.concentration_of(run, kind).at(numbers[kind]) for kind in numbers}
    return (f"the same fraction of raw dimensions, {numbers['raw']}, carries {_percent(shares['raw'])}. Raw dimensions "
            f"share it more evenly: **{even_verdict(shares['sae'], shares['raw'])}**.")


def zero_sentence(run: OpenRun) -> str:
    """Whether zeroing the most shifted latents hurts more than zeroing others (Figure 1b)."""
    verdict = zero_results.run_verdict(run)
    return f"{zero_results.run_sentence(run)} Zeroing the most shifted hurts more: **{verdict}**."


def shift_summary(run: OpenRun) -> str:
    """First paragraph of the chapter on what fine-tuning shifts."""
    return (f"**The answer of this run.** {_tuned_on(run)}\n\n"
            f"{_listed(few_sentence(run), even_sentence(run), zero_sentence(run))}\n\n"
            f"{FEW_RULE} {EVEN_RULE} {zero_results.ZERO_RULE} Seed {run.settings.seed}, one training run.")


def foreseen_sentence(run: OpenRun) -> str:
    """Whether the latents that demonstrations move are those that training moves (Figure 2a)."""
    row, published = shift_results.overlap_at(run, "sae"), _published_overlap()
    active = ("more than change at all, so that no test is possible" if row["active_p"] is None else
              f"by chance {row['active_chance'] * row['n']:.1f} among the {row['active']:,} that change at all, "
              f"p {p_phrase(row['active_p'])}")
    return (f"{row['overlap']} of the {row['n']} latents that demonstrations move most are among the {row['n']} that "
            f"fine-tuning moves most ({active}; by chance {row['chance'] * row['n']:.1f} among all "
            f"{round(row['n'] / row['chance']):,}, p {p_phrase(row['p'])}). The paper reports {published:.0%} for "
            f"N = 100. Demonstrations foresee the shift: **{foreseen_verdict(row)}**.")


def _published_overlap() -> float:
    numbers = published_numbers()
    return float(numbers.loc[numbers["source"].str.contains("Figure 2a"), "value"].iloc[0])


def better_sentence(run: OpenRun) -> str:
    """Whether the SAE's latents are foreseen better than raw dimensions (Figure 2a)."""
    by_draw, raw = shift_results.overlap_by_draw(run), shift_results.overlap_at(run, "raw")
    shares = by_draw.groupby("kind")["share"]
    spread = {kind: f"{own.min():.0%} to {own.max():.0%}" for kind, own in shares}
    return (f"of raw dimensions, at the same fraction, {raw['overlap']} of {raw['n']} are foreseen (p "
            f"{p_phrase(raw['p'])}). Behind single sets of demonstrations the share foreseen is {spread['sae']} for "
            f"latents and {spread['raw']} for raw dimensions ({counted(by_draw['draw'].nunique(), 'set')}). "
            f"Better than raw dimensions: **{better_verdict(by_draw)}**.")


def foreseen_summary(run: OpenRun) -> str:
    """First paragraph of the chapter on what demonstrations foresee."""
    return (f"**The answer of this run.** {_tuned_on(run)}\n\n"
            f"{_listed(foreseen_sentence(run), better_sentence(run))}\n\n"
            f"{FORESEEN_RULE} {BETTER_RULE} Seed {run.settings.seed}, one training run.")


def sensitivity_sentence(run: OpenRun) -> str:
    """How much the estimate depends on which demonstrations were drawn, and what the best possible would be."""
    pairs = shift_results.agreement_between_draws(run)
    between = (f"Two sets of demonstrations agree on {min(pairs):.0%} to {max(pairs):.0%} of their "
               f"{run.settings.top_n} latents. " if pairs else "")
    other = shift_results.overlap_at(run, "sae", "sft_shift_solutions")
    return (f"{between}The actual shift of one half of the questions agrees with that of the other half on "
            f"{shift_results.ceiling(run, 'sae'):.0%}, which says how steady the actual list is. Measured on the "
            f"worked solutions of held-out problems instead of the questions, the actual shift shares "
            f"{other['overlap']} of {other['n']} latents with the estimate.")


def demonstrations_sentence(by_number: pandas.DataFrame) -> str:
    """What more demonstrations do to the share foreseen; mean over draws."""
    means = by_number[by_number["kind"] == "sae"].groupby("demonstrations")["share"].mean()
    listed = ", ".join(f"{share:.0%} behind {number}" for number, share in means.items())
    return f"Of the actual top N of latents, demonstrations foresee, by their number: {listed} (mean over draws)."


# --- tables -------------------------------------------------------------------------------------------------------

#: Fractions of the dimensions at which the table reads the overlap off.
FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def overlap_table(curves: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Overlaps near some fractions of the latents and of the raw dimensions, with chance and p."""
    rows = []
    for kind, label in (("sae", "SAE latents"), ("raw", "raw dimensions")):
        own = curves[kind]
        places = dict.fromkeys((own["fraction"] - fraction).abs().argmin() for fraction in FRACTIONS)
        for row in own.iloc[list(places)].itertuples():
            known = pandas.notna(row.active_p)
            rows.append({"of": label, "N": row.n, "fraction": f"{row.fraction:.1%}", "in both lists": row.overlap,
                         "by chance": f"{row.chance * row.n:.1f}", "p": p_value(row.p),
                         "by chance, changing only": f"{row.active_chance * row.n:.1f}" if known else "",
                         "p, changing only": p_value(row.active_p) if known else ""})
    return pandas.DataFrame(rows)
