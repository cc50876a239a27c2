"""What the chapter on training domains says: sentences with verdicts by rules fixed beforehand."""

from __future__ import annotations

import math

from sts.book.pages import CORRELATION_RULE, correlation_verdict, folded_rules, p_phrase, p_value
from sts.book.pages_measures import NAMES
from sts.book.tables_domains import (
    SCORE_NAMES,
    correlation_row,
    least,
    measures,
    said_of,
    span,
    specific_row,
    told_measures,
    training_sets,
    two,
    without_text,
)
from sts.book.verdicts import counted
from sts.book.verdicts_domains import (
    LEARNED_RULE,
    OWN_LIST_RULE,
    SPECIFIC_RULE,
    idle_seeds,
    judged_all,
    own_list_verdict,
    sets_of,
    specific_verdict,
)
from sts.errors import StsError
from sts.measure.rivals_domains import RIVALS, likeness, moved_most, rival_row, same_ranks
from sts.run.recorded import provenances
from sts.run.run import OpenRun
from sts.stages.domains import beyond_rate, training_runs, training_seeds

#: Measures that the summary judges besides the first -> what is said of them. Both kinds of bits count words that many
#: answers share, the letter's probability does not.
ALSO = {"p_right": ", where no wording of the answer counts"}


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


def correlation_sentence(run: OpenRun) -> str:
    """Score against absolute change over domains, for each training set by itself, in both kinds of bits (Table 1)."""
    told, seed, names = told_measures(run), run.settings.seed, training_sets(run)
    lines = []
    for name in names:
        said = (f"in {NAMES[measure]} " + ", ".join(f"{label} {said_of(run, name, seed, measure, score)}"
                                                    for score, label in SCORE_NAMES.items()) for measure in told)
        lines.append(f"\n  - `{name}`: {'; '.join(said)}.")
    domains = run.get("training_matrix")["domain"].nunique()
    return (f"Which domains does one training set move? r over n = {domains} domains, seed {seed}. "
            f"{counted(len(names) * len(told) * len(SCORE_NAMES), 'test')} stand here; no p is corrected for their "
            f"number.{''.join(lines)}")


def short_sentence(run: OpenRun) -> str:
    """The answer in words alone: after which training sets STS_act forecasts the change, and what is not judged."""
    told, seed, parts = told_measures(run), run.settings.seed, []
    for name in _judged_sets(run):
        held = [measure for measure in told
                if correlation_verdict(correlation_row(run, name, seed, measure, "sts_act")) == "held"]
        where = ("in none of the measures told below" if not held else "in each measure told below"
                 if len(held) == len(told) else f"in {NAMES[held[0]]} alone")
        parts.append(f"after `{name}` {where}")
    idle = [name for name in training_sets(run) if name not in _judged_sets(run)]
    left = f" On {_code(idle)} too little was learned to judge by, and no comparison with it is judged." if idle else ""
    return f"**In short:** STS_act forecasts which domains move {'; '.join(parts)}.{left}" if parts else (
        f"**In short:** nothing can be judged.{left}")


def measure_sentence(run: OpenRun) -> str:
    """For which training sets the verdict on a score is another in bits per answer; "" with a single measure."""
    told, seed, parts = told_measures(run), run.settings.seed, []
    if len(told) < 2:
        return ""
    for name in _judged_sets(run):
        for score, label in SCORE_NAMES.items():
            verdicts = [correlation_verdict(correlation_row(run, name, seed, measure, score)) for measure in told]
            if verdicts[0] != verdicts[1] and "undefined" not in verdicts:
                parts.append(f"for `{name}` the verdict on {label} depends on the measure: **{verdicts[0]}** in "
                             f"{NAMES[told[0]]}, **{verdicts[1]}** in {NAMES[told[1]]}{_length(run, name, verdicts)}")
    if not parts:
        return f"{_both(told)} agree on the verdict for every training set that is judged."
    return f"{_both(told)} disagree: {'; '.join(parts)}. Rely on what holds in both."


def _both(told: list[str]) -> str:
    return " and ".join(NAMES[measure] for measure in told).capitalize()


def _judged_sets(run: OpenRun) -> list[str]:
    """Training sets that were learned with the run's own seed."""
    return [name for name in training_sets(run) if run.settings.seed not in idle_seeds(run).get(name, [])]


def _length(run: OpenRun, name: str, verdicts: list[str]) -> str:
    """What the length of the answers alone has to do with a change whose verdict depends on the measure."""
    told = told_measures(run)
    rows = [rival_row(run, name, run.settings.seed, measure, "answer_shortness") for measure in told]
    if any("undefined" in row for row in rows):
        return ""
    values = [row["pearson"] for row in rows]
    turned = set(verdicts) == {"held", "reversed"} and values[0] * values[1] < 0
    return (f" ({RIVALS['answer_shortness']} alone has r {two(values[0])} with the one change and {two(values[1])} "
            f"with the other{', so the sign may well come from dividing by the length' if turned else ''})")


def hardness_sentence(run: OpenRun) -> str:
    """What forecasts as much without score or training set, and how alike the training sets' changes are."""
    names, seed, parts = _judged_sets(run), run.settings.seed, []
    if not names:
        return "Does anything simpler forecast as much? Not judged, as no training set was learned."
    for measure in told_measures(run):
        found = {forecast: [correlation_row(run, name, seed, measure, forecast).get("pearson") for name in names]
                 for forecast in SCORE_NAMES | RIVALS}
        said = "; ".join(f"{label} {', '.join(map(two, found[forecast]))}"
                         for forecast, label in (SCORE_NAMES | RIVALS).items())
        pairs = [pair for pair in zip(found["sts_act"], found["hardness"], strict=True) if None not in pair]
        above = sum(score > rival for score, rival in pairs)
        parts.append(f"In {NAMES[measure]}: {said}. STS_act lies above {RIVALS['hardness']} for {above} of "
                     f"{len(pairs)} (no test){_alike(run, names, measure)}.")
    return (f"Does anything simpler forecast as much? r over domains for {_code(names)}, in turn; intervals and p "
            f"stand in the table. {RIVALS['hardness'].capitalize()} and {RIVALS['answer_shortness']} know nothing of "
            f"the training set. {' '.join(parts)} Where the changes of all sets are much alike, a forecast of which "
            "domains move need not know the training set.")


def _alike(run: OpenRun, names: list[str], measure: str) -> str:
    found = likeness(run, names, run.settings.seed, measure)
    said = ", ".join(f"{two(value)} (`{one}`, `{other}`)" for (one, other), value in found.items())
    return f"; the changes of two sets correlate at {said}" if said else ""


def own_list_sentence(run: OpenRun) -> str:
    """Whether each training set's demonstrations name the latents that its own fine-tuning moves."""
    found = run.get("training_overlap")
    lead, rate, beyond = found["lead"]["foreseen"], found["lead"]["by_rate"], beyond_rate(found["rows"])
    if "undefined" in lead:
        return "Do demonstrations name their own training set's latents? Undefined with one training set."
    verdict = judged_all(run, own_list_verdict(lead, beyond))
    lowest = least(lead["p"], math.factorial(len(training_sets(run))))
    return (f"Do demonstrations name their own training set's latents? Of {found['n']}, a list shares "
            f"{lead['own']:.1f} with its own set's fine-tuning and {lead['other']:.1f} with the others' (lead "
            f"{lead['lead']:+.1f}, p {p_phrase(lead['p'])}{lowest}). The latents that fire most on the questions share "
            f"{rate['own']:.1f} and {rate['other']:.1f}; the first lead exceeds theirs by "
            f"{beyond['lead']:+.1f} (p {p_phrase(beyond['p'])}): **{verdict}**.")


def specific_sentence(run: OpenRun, measure: str) -> str:
    """Whether the score tells which training set moves a domain, and what is left of it without each set."""
    parts, most = [], ""
    for score, name in SCORE_NAMES.items():
        row = specific_row(run, measure, score)
        if specific_verdict(row) == "undefined":
            parts.append(f"{name} undefined")
            continue
        without, (leader, count, domains) = without_text(run, measure, score), moved_most(run, measure)
        most = f" `{leader}` moves {count} of {domains} domains most."
        parts.append(f"{name} has a mean rank correlation within domains of {two(row['within'])} (95% interval "
                     f"{span(row['low'], row['high'])}, n = {row['defined']} domains of {row['training_sets']} "
                     f"training sets; shuffled in each domain p {p_phrase(row['p_within'])}, whole sets shuffled p "
                     f"{p_phrase(row['p_sets'])}{least(row['p_sets'], row['orders'])}"
                     + (f"; without one training set at a time {without}" if without else "")
                     + f"): **{judged_all(run, specific_verdict(row))}**")
    return f"Which training set moves a domain? In {NAMES[measure]}: {'; '.join(parts)}.{most}"


def same_ranks_sentence(run: OpenRun) -> str:
    """That bits per answer are no second test of which training set moves a domain; "" with a single measure."""
    told = told_measures(run)
    if len(told) < 2 or len(training_sets(run)) < 2:
        return ""
    alike, domains = same_ranks(run, *told)
    return (f"{NAMES[told[1]].capitalize()} are no second test of this: within a domain all training sets are measured "
            "on the same answers, so that each answer's length is the same for all, and dividing by it changes no more "
            "than how much each question counts. By the two measures the training sets rank alike in "
            f"{alike} of {domains} domains.")


def also_sentence(run: OpenRun, measure: str) -> str:
    """`specific_sentence` in few words, for the measures that stand behind the first."""
    parts, what = [], NAMES[measure] + ALSO[measure]
    for score, name in SCORE_NAMES.items():
        row = specific_row(run, measure, score)
        verdict = specific_verdict(row)
        parts.append(f"{name} undefined" if verdict == "undefined" else
                     f"{name} {two(row['within'])} ({span(row['low'], row['high'])}), whole sets p "
                     f"{p_phrase(row['p_sets'])}: **{judged_all(run, verdict)}**")
    return f"The same in {what}: {'; '.join(parts)}."


def rival_sentence(run: OpenRun, measure: str) -> str:
    """The same for the likeness of texts, which needs no model."""
    row = specific_row(run, measure, "tfidf")
    if specific_verdict(row) == "undefined":
        return f"The likeness of the questions' words (TF-IDF), in {NAMES[measure]}: undefined."
    return (f"For comparison, the likeness of the questions' words (TF-IDF), which needs no model, in "
            f"{NAMES[measure]}: {two(row['within'])} ({span(row['low'], row['high'])}): "
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
    told = [learned_sentence(run), correlation_sentence(run), measure_sentence(run), hardness_sentence(run),
            own_list_sentence(run), specific_sentence(run, first), same_ranks_sentence(run),
            *(also_sentence(run, measure) for measure in measures(run)[1:] if measure in ALSO),
            rival_sentence(run, first)]
    listed = "\n".join(f"- {sentence}" for sentence in told if sentence)
    return (f"**The answer of this run.** `{settings.model}`, fine-tuned on {_code(training_sets(run))}, each tested "
            f"on `{settings.domain_data}`. {short_sentence(run)}\n\n{listed}\n\n"
            f"Seed{'s' if len(training_seeds(run)) > 1 else ''} {', '.join(map(str, training_seeds(run)))}.\n\n"
            f"{folded_rules(LEARNED_RULE, CORRELATION_RULE, OWN_LIST_RULE, SPECIFIC_RULE)}")


def recorded_note(run: OpenRun) -> str:
    """Which training sets' answers to single questions are not among the recorded results; "" if none is missing."""
    names = list(dict.fromkeys(name for (name, _), own in training_runs(run).items()
                               if _withheld(own, "evaluation_after")))
    if not names:
        return ""
    return (f"*Not recorded.* Of {_code(names)} what the tuned model makes of each question (stage "
            "`evaluation_after`) is recorded by its provenance alone, for its size. Stage `training_matrix` holds the "
            "change of every domain with its interval; what needs single questions takes the training again.")


def _withheld(run: OpenRun, name: str) -> bool:
    """Whether a stage's result is recorded without its data."""
    try:
        key = run.key(name)
    except StsError:  # what it is computed from is not here
        return False
    return any("withheld" in record and record["key"] == key for record in provenances(run.store.recorded, name))
