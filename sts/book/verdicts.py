"""Sentences that say whether a claim of the paper held in a run, each by a rule that its page states.

Words and code of a rule stand side by side. Rules were changed once after a run was seen, towards harder tests: the
chapters say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas

from sts.book import learned, zero_results
from sts.book.learned import judged, learned_sentence
from sts.book.pages import p_phrase, p_value
from sts.book.pages_limits import shift_limits_sentence
from sts.measure import shift_results
from sts.measure.items import MeanInterval, paired_mean_interval
from sts.measure.paper import published_numbers
from sts.run.run import OpenRun

#: The paper's share of the squared change in the top 100 latents (Figure 1a).
PAPER_SHARE = 0.25

FEW_RULE = ("*Few latents carry the change* counts as **held** if the paper's fraction of latents, chosen on other "
            "questions than those they are measured on, carries a quarter of it (the paper's share) or more with the "
            "whole 95% interval; as **not held** if the whole interval lies below a quarter; otherwise as "
            "**undecided**.")
BEYOND_RULE = ("*More concentrated than the activity* counts as **held** if the interval of the share of the change "
               "in the N most shifted lies above the share of the squared activation in the N most active latents, as "
               "**reversed** if it lies below, otherwise as **not shown**.")
EVEN_RULE = ("*Raw dimensions share it more evenly* counts as **held** if the interval of the SAE's share lies above "
             "that of the same fraction of raw dimensions *and* of a random code as sparse as the SAE; as **held "
             "against raw dimensions only** if above the first alone; as **reversed** if it lies below that of raw "
             "dimensions; otherwise as **not shown**. It compares the codes as they are: a code whose activity is "
             "concentrated has a concentrated change if training merely scales what is there, so read it beside the "
             "shares of the activity.")
FORESEEN_RULE = ("*Demonstrations foresee the shift* counts as **held** if the sets of demonstrations name more of the "
                 "actual top N than each of three lists that need none from the training domain (the latents that "
                 "fire most often on the same questions, those of largest energy, those that demonstrations of other "
                 "domains move), each difference with its whole 95% interval over sets above zero; as **beyond chance "
                 "only** if not, but the two lists share more than random ones drawn among the latents that change at "
                 "all, with p below 0.05; otherwise as **not shown**.")
BETTER_RULE = ("*Better than raw dimensions* counts as **held** if demonstrations add more to what activity alone "
               "tells for latents than for the same fraction of raw dimensions *and* than for a random code as sparse "
               "as the SAE, both 95% intervals of the difference over sets above zero. What activity alone tells is "
               "the larger share of the actual top N in a code's own lists by firing rate and by energy. As **held "
               "against raw dimensions only** if only the first is; as **reversed** if the first lies below zero; "
               "otherwise as **not shown**.")
MORE_RULE = ("*More demonstrations foresee more* counts as **held** if the share foreseen behind the largest number "
             "less that behind the smallest has its whole 95% interval over draws above zero, as **reversed** if "
             "below, otherwise as **not shown**; a single draw is not judged.")


# --- the rules ----------------------------------------------------------------------------------------------------

def few_verdict(share: dict[str, float]) -> str:
    """`FEW_RULE`, from the held-out share's low and high at the paper's fraction."""
    if share["low"] >= PAPER_SHARE:
        return "held"
    return "not held" if share["high"] < PAPER_SHARE else "undecided"


def beyond_verdict(share: dict[str, float], energy: float) -> str:
    """`BEYOND_RULE`, from the held-out share's low and high and the energy's share at the same N."""
    if share["low"] > energy:
        return "held"
    return "reversed" if share["high"] < energy else "not shown"


def even_verdict(sae: dict[str, float], raw: dict[str, float], random: dict[str, float]) -> str:
    """`EVEN_RULE`, from the three shares' low and high."""
    if sae["low"] > raw["high"]:
        return "held" if sae["low"] > random["high"] else "held against raw dimensions only"
    return "reversed" if sae["high"] < raw["low"] else "not shown"


def foreseen_verdict(row: dict, lead: dict[str, MeanInterval]) -> str:
    """`FORESEEN_RULE`, from a row of `shift_stats.overlap_rows` and `shift_results.leads`."""
    if all(lead[name].low > 0 for name in shift_results.BASELINES):  # NaN, of a single set, is not above zero
        return "held"
    return "beyond chance only" if row["active_p"] is not None and row["active_p"] < 0.05 else "not shown"


def better_verdict(lead: dict[str, MeanInterval]) -> str:
    """`BETTER_RULE`, from `shift_results.leads`."""
    if lead["raw"].low > 0:
        return "held" if lead["random"].low > 0 else "held against raw dimensions only"
    return "reversed" if lead["raw"].high < 0 else "not shown"


def more_verdict(gain: MeanInterval) -> str:
    """`MORE_RULE`, from the gain of the largest number over the smallest."""
    if math.isnan(gain.low):
        return "not judged, as there is a single draw"
    if gain.low > 0:
        return "held"
    return "reversed" if gain.high < 0 else "not shown"


def span(numbers: Iterable[int]) -> str:
    """The least and the largest of some numbers, "4 to 7", or the one that they all are."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def figure_note(run: OpenRun, n: str, interval: str, *stages: str, seeds: Sequence[int] = ()) -> str:
    """The line under a figure: n, seed (and further `seeds`), what the interval is, run, and results behind it."""
    keys = ", ".join(f"`{name}-{run.key(name)}`" for name in stages)
    listed = f"seed{'s' if seeds else ''} {', '.join(map(str, (run.settings.seed, *seeds)))}"
    return f"*{n}; {listed}; {interval}; run `{run.settings.name}`; from* {keys}."


# --- the sentences ------------------------------------------------------------------------------------------------

def _percent(share: dict[str, float]) -> str:
    """A share with its interval, with a digit more where the interval is narrow."""
    digits = 1 if share["high"] - share["low"] < 0.02 else 0
    held_out, low, high = (f"{share[name]:.{digits}%}" for name in ("held_out", "low", "high"))
    return f"{held_out} (95% interval {low} to {high})"


def _points(lead: MeanInterval) -> str:
    """A difference of shares in percentage points, with its interval."""
    interval = "" if math.isnan(lead.low) else f" ({100 * lead.low:+.0f} to {100 * lead.high:+.0f})"
    return f"{100 * lead.mean:+.0f}{interval}"


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
    found, change_L = shift_results.concentration_of(run, "sae"), shift_results.actual(run, "sae")
    count, tokens = shift_results.paper_number(found.width), int(run.get("sft_shift")["sae/tokens"].item())
    share, active = found.at(count), int((change_L > 0).sum())
    return (f"the paper's 100 of 28,672 latents are {shift_results.PAPER_FRACTION:.2%}. The same fraction of "
            f"{found.width:,} is {count}, and these carry {_percent(share)} of the squared change ({tokens:,} question "
            f"tokens in {found.folds} groups of questions; {active:,} latents change at all). The paper reports "
            f"{PAPER_SHARE:.0%}. Few latents carry the change: **{judged(run, few_verdict(share))}**.")


def beyond_sentence(run: OpenRun) -> str:
    """Whether the change is more concentrated than the activity was before training."""
    found, count = shift_results.concentration_of(run, "sae"), run.settings.top_n
    share, energy = found.at(count), float(shift_results.energy_curve(run)[count - 1])
    return (f"the {count} most shifted latents carry {_percent(share)} of the change ({share['share']:.0%} if chosen "
            f"and measured on the same questions); the {count} most active ones carry {energy:.0%} of the squared "
            f"activation on these tokens, before any training. More concentrated than the activity: "
            f"**{judged(run, beyond_verdict(share, energy))}**.")


def even_sentence(run: OpenRun) -> str:
    """Whether the change is spread more evenly over raw dimensions (Figure 2b)."""
    numbers = shift_results.equal_numbers(run)
    shares = {kind: shift_results.concentration_of(run, kind).at(numbers[kind]) for kind in numbers}
    active = {kind: float(shift_results.energy_curve(run, kind)[numbers[kind] - 1]) for kind in numbers}
    return (f"the {numbers['sae']} most shifted latents carry {_percent(shares['sae'])}, the same fraction of raw "
            f"dimensions, {numbers['raw']}, carries {_percent(shares['raw'])}, and {numbers['random']} latents of a "
            f"random code as sparse as the SAE carry {_percent(shares['random'])}. As many of the most active carry, "
            f"of the squared activation before training, {active['sae']:.0%}, {active['raw']:.0%} and "
            f"{active['random']:.0%}. Raw dimensions share it more "
            f"evenly: **{judged(run, even_verdict(shares['sae'], shares['raw'], shares['random']))}**.")


def zero_sentence(run: OpenRun) -> str:
    """Whether zeroing the most shifted latents hurts more than zeroing others (Figure 1b)."""
    verdict = judged(run, zero_results.run_verdict(run))
    return f"{zero_results.run_sentence(run)} Zeroing the most shifted hurts more: **{verdict}**."


def shift_summary(run: OpenRun) -> str:
    """First paragraph of the chapter on what fine-tuning shifts."""
    told = (few_sentence, beyond_sentence, even_sentence, zero_sentence)
    return (f"**The answer of this run.** {_tuned_on(run)}\n\n"
            f"{_listed(*(sentence(run) for sentence in (learned_sentence, *told, shift_limits_sentence)))}\n\n"
            f"Seed {run.settings.seed}, one training run. The rules:\n\n"
            f"{_listed(learned.RULE, FEW_RULE, BEYOND_RULE, EVEN_RULE, zero_results.ZERO_RULE)}")


def foreseen_sentence(run: OpenRun) -> str:
    """Whether the latents that demonstrations move are those that training moves (Figure 2a)."""
    row, lead, published = shift_results.overlap_at(run, "sae"), shift_results.leads(run), _published_overlap()
    active = ("more than change at all, so that no test is possible" if row["active_p"] is None else
              f"by chance {row['active_chance'] * row['n']:.1f} among the {row['active']:,} that change at all, "
              f"p {p_phrase(row['active_p'])}")
    listed = "; ".join(f"{_points(lead[name])} than {what}" for name, what in shift_results.BASELINES.items())
    return (f"{row['overlap']} of the {row['n']} latents that demonstrations move most are among the {row['n']} that "
            f"fine-tuning moves most ({active}). The paper reports {published:.0%} for N = 100. Single sets of "
            f"demonstrations name, in percentage points of N more (95% interval over "
            f"{counted(lead['rate'].n, 'set')}): {listed}. Demonstrations foresee the shift: "
            f"**{judged(run, foreseen_verdict(row, lead))}**.")


def _published_overlap() -> float:
    numbers = published_numbers()
    return float(numbers.loc[numbers["source"].str.contains("Figure 2a"), "value"].iloc[0])


def better_sentence(run: OpenRun) -> str:
    """Whether the SAE's latents are foreseen better than raw dimensions (Figure 2a)."""
    means = shift_results.overlap_by_draw(run).groupby("kind")["share"].mean()
    lead, alone = shift_results.leads(run), shift_results.activity_shares(run)
    return (f"single sets of demonstrations foresee {means['sae']:.0%} of the top latents on average, "
            f"{means['raw']:.0%} of the same fraction of raw dimensions and {means['random']:.0%} of a random code's "
            f"latents; activity alone tells {alone['sae']:.0%}, {alone['raw']:.0%} and {alone['random']:.0%}. What "
            f"demonstrations add to that for latents, less what they add for raw dimensions, is {_points(lead['raw'])} "
            f"percentage points, and less what they add for the random code {_points(lead['random'])} (95% interval "
            f"over {counted(lead['raw'].n, 'set')}). Better than raw dimensions: "
            f"**{judged(run, better_verdict(lead))}**.")


def foreseen_summary(run: OpenRun) -> str:
    """First paragraph of the chapter on what demonstrations foresee."""
    told = (learned_sentence, foreseen_sentence, better_sentence, shift_limits_sentence)
    return (f"**The answer of this run.** {_tuned_on(run)}\n\n"
            f"{_listed(*(sentence(run) for sentence in told))}\n\n"
            f"Seed {run.settings.seed}, one training run. The rules:\n\n"
            f"{_listed(learned.RULE, FORESEEN_RULE, BETTER_RULE)}")


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


def demonstrations_sentence(run: OpenRun, by_number: pandas.DataFrame) -> str:
    """What more demonstrations do to the share foreseen."""
    wide = by_number[by_number["kind"] == "sae"].pivot(index="draw", columns="demonstrations", values="share")
    listed = ", ".join(f"{share:.0%} behind {number}" for number, share in wide.mean().items())
    few, many = wide.columns.min(), wide.columns.max()
    gain = paired_mean_interval((wide[many] - wide[few]).to_numpy(), seed=run.settings.seed)
    return (f"of the actual top N of latents, demonstrations foresee, by their number: {listed} (mean over "
            f"{counted(len(wide), 'draw')}). From {few} to {many} that is {_points(gain)} percentage points. More "
            f"demonstrations foresee more: **{judged(run, more_verdict(gain))}**. {MORE_RULE}")


# --- tables -------------------------------------------------------------------------------------------------------

#: What lists of latents are called in tables.
LISTS = {"sae": "SAE latents, demonstrations", "rate": "SAE latents, by firing rate",
         "energy": "SAE latents, by energy", "random": "random code, demonstrations",
         "raw": "raw dimensions, demonstrations"}
#: Fractions of the dimensions at which the table reads the overlap off.
FRACTIONS = (0.005, 0.02, 0.05, 0.2)


def overlap_table(curves: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Overlaps near some fractions of the latents and of the raw dimensions, with chance and p."""
    rows = []
    for kind, own in curves.items():
        label = LISTS[kind]
        places = dict.fromkeys((own["fraction"] - fraction).abs().argmin() for fraction in FRACTIONS)
        for row in own.iloc[list(places)].itertuples():
            known = pandas.notna(row.active_p)
            rows.append({"of": label, "N": row.n, "fraction": f"{row.fraction:.1%}", "in both lists": row.overlap,
                         "by chance": f"{row.chance * row.n:.1f}", "p": p_value(row.p),
                         "by chance, changing only": f"{row.active_chance * row.n:.1f}" if known else "",
                         "p, changing only": p_value(row.active_p) if known else ""})
    return pandas.DataFrame(rows)
