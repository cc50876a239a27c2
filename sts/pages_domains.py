"""What the chapter on training domains says: its tables, and sentences with verdicts by rules fixed beforehand."""

from __future__ import annotations

import pandas

from sts import paper
from sts.errors import StsError
from sts.pages import CORRELATION_RULE, correlation_verdict, p_phrase, p_value
from sts.pages_measures import NAMES, decimals, in_order
from sts.pipeline_domains import beyond_rate, training_seeds
from sts.stages import OpenRun
from sts.verdicts import counted
from sts.verdicts_domains import (
    LEARNED_RULE,
    OWN_LIST_RULE,
    SPECIFIC_RULE,
    idle_seeds,
    judged_all,
    judged_set,
    own_list_verdict,
    sets_of,
    specific_verdict,
)

SCORE_NAMES = {"sts_act": "STS_act", "sts_icl": "STS_ICL"}
FORECAST_NAMES = SCORE_NAMES | {"tfidf": "TF-IDF similarity of questions"}
#: Domain of a training set here -> what the paper's Table 1 calls the closest (its health set is on mental health).
PAPER_DOMAINS = {"computer science": "code", "health": "health", "psychology": "health"}
#: Measures that the summary judges besides the first -> what is said of them. Bits per character divide by the answer's
#: length, bits per answer do not; both count words that many answers share, and the letter's probability does not.
ALSO = {"bits_answer": "", "p_right": ", where no wording of the answer counts"}


# --- what is there ------------------------------------------------------------------------------------------------

def present(run: OpenRun) -> tuple[OpenRun, dict[str, str]]:
    """The run with those `training_sets` whose data can be read, and why the others cannot (name -> message)."""
    missing: dict[str, str] = {}
    try:
        if run.stored("training_matrix"):  # recorded results need no data
            return run, missing
    except StsError:
        pass
    for name in run.settings.training_sets:
        try:
            run.with_training(name).identity("sft_train")
        except StsError as error:
            missing[name] = str(error)
    if not missing:
        return run, missing
    return run.with_training_sets([name for name in run.settings.training_sets if name not in missing]), missing


def training_sets(run: OpenRun) -> list[str]:
    """Names of the training sets that are compared, the run's own first."""
    return list(dict.fromkeys((run.settings.sft_data, *run.settings.training_sets)))


def missing_note(run: OpenRun, missing: dict[str, str]) -> str:
    """Which training sets are left out and why, and what a run with one alone cannot say; "" if nothing is amiss."""
    lines = [f"- **`{name}` is left out.** {message}" for name, message in missing.items()]
    if len(training_sets(run)) == 1:
        lines.append(
            f"- **This run has one training set, `{run.settings.sft_data}`**, so the page shows its row of the matrix, "
            "and everything that compares training sets is undefined. The setting `training_sets` names further ones, "
            "such as code (MBPP) and health (CounselChat, PubMedQA). With these in `STS_DATA_DIR`: "
            "`sts run training_domains -p training_sets \"[mbpp, counsel_chat, pubmedqa]\"`. Each costs a fine-tuning "
            "and an evaluation.")
    trained_on = [name for name in training_sets(run) if run.settings.domain_data in name.split("+")]
    if trained_on:
        lines.append(f"- Training on {_code(trained_on)} means training on questions that are evaluated as well: "
                     "what changes there is memory, not transfer.")
    return "\n".join(lines)


def _code(names: list[str]) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


# --- rows ---------------------------------------------------------------------------------------------------------

def measures(run: OpenRun) -> list[str]:
    """Measures that were evaluated, the finest first (`pages_measures.ORDER`)."""
    return in_order(run.get("training_matrix")["measure"])


def _specific(run: OpenRun, measure: str, forecast: str) -> dict:
    return next(row for row in run.get("training_specificity")
                if (row["measure"], row["forecast"]) == (measure, forecast))


def _correlation(run: OpenRun, name: str, seed: int, measure: str, score: str) -> dict:
    key = (name, seed, measure, "paper", score)
    return next((row for row in run.get("training_correlations")
                 if tuple(row[field] for field in ("training_set", "seed", "measure", "variant", "score")) == key),
                {"undefined": "not evaluated"})


# --- tables -------------------------------------------------------------------------------------------------------

def _interval(low: float | None, high: float | None) -> str:
    return "no interval" if low is None or high is None else f"{_two(low)} to {_two(high)}"


def _two(value: float | None) -> str:
    """Two decimals, and never "-0.00"."""
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.2f}"


def sets_table(run: OpenRun) -> pandas.DataFrame:
    """One line a training set and seed: what was learned, latents foreseen, correlation over domains (Table 1)."""
    published = paper.published_table(1)
    lines, first = [], measures(run)[0]
    rates = {(row["trained"], row["seed"]): row["by_rate"] for row in run.get("training_overlap")["rows"]
             if row["estimated"] == row["trained"]}
    for row in sets_of(run).itertuples():
        line = {"training set": row.training_set, "seed": row.seed, "its domain": row.trained_domain,
                "held-out loss": f"{-row.loss_fall:+.1%}",
                f"latents foreseen, of {row.overlap_n}": f"{row.overlap} (p " + (
                    "undefined)" if pandas.isna(row.overlap_p) else f"{p_phrase(row.overlap_p)})"),
                "by firing rate": rates[row.training_set, row.seed]}
        for score, name in SCORE_NAMES.items():
            line[f"r of {name}, {NAMES[first]}"] = _said(run, row.training_set, row.seed, first, score)
        own = published[published["quantity"].str.endswith(f"domain {PAPER_DOMAINS.get(row.trained_domain)}")]
        line["paper: r of STS_ICL, latents of 100"] = ", ".join(
            f"{value:.2f}" if value_of.startswith("pearson") else f"{100 * value:.0f}"
            for value_of, value in zip(own["quantity"], own["value"], strict=True))
        lines.append(line)
    return pandas.DataFrame(lines)


def _said(run: OpenRun, name: str, seed: int, measure: str, score: str) -> str:
    row = _correlation(run, name, seed, measure, score)
    if "undefined" in row:
        return "undefined"
    interval, verdict = row["pearson_interval"], judged_set(run, name, seed, correlation_verdict(row))
    return f"{_two(row['pearson'])} ({_interval(interval['low'], interval['high'])}), p {p_phrase(row['p'])}: {verdict}"


def cells_table(run: OpenRun, measure: str) -> pandas.DataFrame:
    """One line an evaluation domain: for every training set both scores, and the change with its interval."""
    cells = run.get("training_matrix")
    own = cells[(cells["measure"] == measure) & (cells["seed"] == run.settings.seed)]
    frame = pandas.DataFrame({"domain": sorted(own["domain"].unique())}).set_index("domain")
    for name in training_sets(run):
        part = own[own["training_set"] == name].set_index("domain").loc[frame.index]
        for score, label in SCORE_NAMES.items():
            frame[f"{name}: {label}"] = [f"{value:.3g}" for value in part[score]]
        frame[f"{name}: change"] = ["{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*values, d=decimals(measure))
                                    for values in part[["shift", "low", "high"]].itertuples(index=False)]
    return frame.reset_index()


def specificity_table(run: OpenRun) -> pandas.DataFrame:
    """Which training set moves a domain: every measure and forecast, with the tests in turn."""
    lines = []
    for measure in measures(run):
        for forecast, name in FORECAST_NAMES.items():
            row = _specific(run, measure, forecast)
            line = {"change in": NAMES[measure], "forecast": name}
            if "undefined" in row:
                lines.append(line | {"rank correlation within domains": "undefined"})
                continue
            lines.append(line | {
                "rank correlation within domains": _two(row["within"]),
                "95% interval": _interval(row["low"], row["high"]), "domains": row["defined"],
                "p, shuffled in each domain": p_value(row["p_within"]),
                "p, whole sets shuffled": f"{p_value(row['p_sets'])} (other side {p_value(row['p_opposite'])}; "
                                           f"{row['orders']} orders)",
                "right set named": "" if row["hits"] is None else f"{row['hits']:.0%}",
                "interaction (no test)": _two(row["interaction"]),
                "verdict": judged_all(run, specific_verdict(row))})
    return pandas.DataFrame(lines).fillna("")


def questions(run: OpenRun) -> str:
    """Number of questions a domain that the change is measured on: one number or a range."""
    counts = run.get("training_matrix")["n"]
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


# --- sentences ----------------------------------------------------------------------------------------------------

def learned_sentence(run: OpenRun) -> str:
    """What fine-tuning on each set did to the loss on its own held-out problems, and how many domains it moved."""
    parts, first = [], measures(run)[0]
    cells = run.get("training_matrix").query("measure == @first")
    clear, idle = ((cells["low"] > 0) | (cells["high"] < 0)).groupby(cells["training_set"]).mean(), idle_seeds(run)
    for name, own in sets_of(run).groupby("training_set", sort=False):
        falls = ", ".join(f"{-fall:+.1%}" for fall in own["loss_fall"])
        verdict = "not learned" if name in idle else "learned"
        parts.append(f"`{name}` {falls}, **{verdict}**, {clear[name]:.0%} of the domains moved")
    return (f"Loss on held-out problems of the training set, and share of domains whose change in {NAMES[first]} has "
            f"a 95% interval without zero: {'; '.join(parts)}.")


def correlation_sentence(run: OpenRun, measure: str) -> str:
    """Score against absolute change over domains, for each training set by itself (Table 1)."""
    parts, seed = [], run.settings.seed
    for name in training_sets(run):
        said = [f"{label} {_said(run, name, seed, measure, score)}" for score, label in SCORE_NAMES.items()]
        parts.append(f"`{name}`: {'; '.join(said)}")
    return (f"Which domains does one training set move? In {NAMES[measure]}, r over domains. {'. '.join(parts)}. "
            f"{counted(len(parts) * len(SCORE_NAMES), 'test')} stand here; no p is corrected for their number.")


def own_list_sentence(run: OpenRun) -> str:
    """Whether each training set's demonstrations name the latents that its own fine-tuning moves."""
    found = run.get("training_overlap")
    lead, rate, beyond = found["lead"]["foreseen"], found["lead"]["by_rate"], beyond_rate(found["rows"])
    if "undefined" in lead:
        return "Do demonstrations name their own training set's latents? Undefined with one training set."
    verdict = judged_all(run, own_list_verdict(lead, beyond))
    return (f"Do demonstrations name their own training set's latents? Of {found['n']}, a list shares "
            f"{lead['own']:.1f} with its own set's fine-tuning and {lead['other']:.1f} with the others' (lead "
            f"{lead['lead']:+.1f}, p {p_phrase(lead['p'])}). The latents that fire most on the questions share "
            f"{rate['own']:.1f} and {rate['other']:.1f}; the first lead exceeds theirs by "
            f"{beyond['lead']:+.1f} (p {p_phrase(beyond['p'])}): **{verdict}**.")


def specific_sentence(run: OpenRun, measure: str) -> str:
    """Whether the score tells which training set moves a domain."""
    parts = []
    for score, name in SCORE_NAMES.items():
        row = _specific(run, measure, score)
        if specific_verdict(row) == "undefined":
            parts.append(f"{name} undefined")
            continue
        parts.append(f"{name} has a mean rank correlation within domains of {_two(row['within'])} (95% interval "
                     f"{_interval(row['low'], row['high'])}, n = {row['defined']} domains of {row['training_sets']} "
                     f"training sets; shuffled in each domain p {p_phrase(row['p_within'])}, whole sets shuffled p "
                     f"{p_phrase(row['p_sets'])}): **{judged_all(run, specific_verdict(row))}**")
    return f"Which training set moves a domain? In {NAMES[measure]}: {'; '.join(parts)}."


def also_sentence(run: OpenRun, measure: str) -> str:
    """`specific_sentence` in few words, for the measures that stand behind the first."""
    parts, what = [], NAMES[measure] + ALSO[measure]
    for score, name in SCORE_NAMES.items():
        row = _specific(run, measure, score)
        verdict = specific_verdict(row)
        parts.append(f"{name} undefined" if verdict == "undefined" else
                     f"{name} {_two(row['within'])} ({_interval(row['low'], row['high'])}), whole sets p "
                     f"{p_phrase(row['p_sets'])}: **{judged_all(run, verdict)}**")
    return f"The same in {what}: {'; '.join(parts)}."


def rival_sentence(run: OpenRun, measure: str) -> str:
    """The same for the likeness of texts, which needs no model."""
    row = _specific(run, measure, "tfidf")
    if specific_verdict(row) == "undefined":
        return f"The likeness of the questions' words (TF-IDF), in {NAMES[measure]}: undefined."
    return (f"For comparison, the likeness of the questions' words (TF-IDF), which needs no model, in "
            f"{NAMES[measure]}: {_two(row['within'])} ({_interval(row['low'], row['high'])}): "
            f"**{judged_all(run, specific_verdict(row))}**.")


def power_sentence(run: OpenRun) -> str:
    """What so few training sets can show."""
    sets = len(training_sets(run))
    if sets < 2:
        return "With one training set nothing can be said about which training set moves a domain."
    orders = max((row.get("orders", 0) for row in run.get("training_specificity")), default=0)
    limit = f"{orders} orders, so its p is at least {p_value(1 / orders)}" if orders else "no order to count"
    return (f"{counted(sets, 'training set')} have {limit}. Within one domain a rank correlation of {sets} values "
            f"is almost all noise; only the mean over domains says something, and the domains share the same "
            f"{counted(sets * len(training_seeds(run)), 'training run')}. The interval over domains leaves out that "
            "other training sets might have been chosen.")


def summary(run: OpenRun) -> str:
    """First paragraph of the chapter."""
    first, settings = measures(run)[0], run.settings
    told = [learned_sentence(run), correlation_sentence(run, first), own_list_sentence(run),
            specific_sentence(run, first),
            *(also_sentence(run, measure) for measure in measures(run)[1:] if measure in ALSO),
            rival_sentence(run, first)]
    listed = "\n".join(f"- {sentence}" for sentence in told)
    return (f"**The answer of this run.** `{settings.model}`, fine-tuned on {_code(training_sets(run))}, each tested "
            f"on `{settings.domain_data}`:\n\n{listed}\n\n{LEARNED_RULE} {CORRELATION_RULE} {OWN_LIST_RULE} "
            f"{SPECIFIC_RULE} Seed{'s' if len(training_seeds(run)) > 1 else ''} "
            f"{', '.join(map(str, training_seeds(run)))}.")
