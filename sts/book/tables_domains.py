"""Rows and tables of the chapter on training domains, from stages `training_*` and the rivals."""

from __future__ import annotations

import pandas

from sts.book.pages import correlation_verdict, p_phrase, p_value
from sts.book.pages_measures import NAMES, SCORE_NAMES, decimals, in_order
from sts.book.verdicts_domains import judged_all, judged_set, sets_of, specific_verdict
from sts.measure import paper
from sts.measure.rivals_domains import RIVALS, rival_row, without_each
from sts.run.run import OpenRun

FORECAST_NAMES = SCORE_NAMES | {"tfidf": "TF-IDF similarity of questions"}
#: Domain of a training set here -> what the paper's Table 1 calls the closest (its health set is on mental health).
PAPER_DOMAINS = {"computer science": "code", "health": "health", "psychology": "health"}
#: The measure beside bits per character that does not divide by the answer's length.
WHOLE = "bits_answer"


# --- rows ---------------------------------------------------------------------------------------------------------

def training_sets(run: OpenRun) -> list[str]:
    """Names of the training sets that are compared, the run's own first."""
    return list(dict.fromkeys((run.settings.sft_data, *run.settings.training_sets)))


def measures(run: OpenRun) -> list[str]:
    """Measures that were evaluated, the finest first (`pages_measures.ORDER`)."""
    return in_order(run.get("training_matrix")["measure"])


def told_measures(run: OpenRun) -> list[str]:
    """The measures that one training set's correlations are told in: the finest, and bits per answer beside it."""
    first, *others = measures(run)
    return [first, *(measure for measure in others if measure == WHOLE)]


def specific_row(run: OpenRun, measure: str, forecast: str) -> dict:
    """The row of stage `training_specificity` for a measure and forecast."""
    return next(row for row in run.get("training_specificity")
                if (row["measure"], row["forecast"]) == (measure, forecast))


def correlation_row(run: OpenRun, name: str, seed: int, measure: str, score: str) -> dict:
    """The row of stage `training_correlations`, or that of a rival, which is worked out here."""
    if score in RIVALS:
        return rival_row(run, name, seed, measure, score)
    key = (name, seed, measure, "paper", score)
    return next((row for row in run.get("training_correlations")
                 if tuple(row[field] for field in ("training_set", "seed", "measure", "variant", "score")) == key),
                {"undefined": "not evaluated"})


# --- tables -------------------------------------------------------------------------------------------------------

def span(low: float | None, high: float | None) -> str:
    """An interval with two decimals."""
    return "no interval" if low is None or high is None else f"{two(low)} to {two(high)}"


def two(value: float | None) -> str:
    """Two decimals, and never "-0.00"."""
    return "undefined" if value is None else f"{round(value, 2) + 0.0:.2f}"


def sets_table(run: OpenRun) -> pandas.DataFrame:
    """One line a training set and seed: what was learned, and latents foreseen (Table 1)."""
    published, lines = paper.published_table(1), []
    rates = {(row["trained"], row["seed"]): row["by_rate"] for row in run.get("training_overlap")["rows"]
             if row["estimated"] == row["trained"]}
    for row in sets_of(run).itertuples():
        line = {"training set": row.training_set, "seed": row.seed, "its domain": row.trained_domain,
                "held-out loss": f"{-row.loss_fall:+.1%}",
                f"latents foreseen, of {row.overlap_n}": f"{row.overlap} (p " + (
                    "undefined)" if pandas.isna(row.overlap_p) else f"{p_phrase(row.overlap_p)})"),
                "by firing rate": rates[row.training_set, row.seed]}
        own = published[published["quantity"].str.endswith(f"domain {PAPER_DOMAINS.get(row.trained_domain)}")]
        line["paper: r of STS_ICL, latents of 100"] = ", ".join(
            f"{value:.2f}" if value_of.startswith("pearson") else f"{100 * value:.0f}"
            for value_of, value in zip(own["quantity"], own["value"], strict=True))
        lines.append(line)
    return pandas.DataFrame(lines)


def correlations_table(run: OpenRun) -> pandas.DataFrame:
    """One line a training set, seed and measure: r over domains of both scores (Table 1) and of the rivals."""
    return pandas.DataFrame([
        {"training set": row.training_set, "seed": row.seed, "change in": NAMES[measure],
         "n": len(run.get("training_matrix").query("measure == @measure")["domain"].unique())}
        | {f"r of {label}": said_of(run, row.training_set, row.seed, measure, name)
           for name, label in (SCORE_NAMES | RIVALS).items()}
        for row in sets_of(run).itertuples() for measure in told_measures(run)])


def said_of(run: OpenRun, name: str, seed: int, measure: str, score: str) -> str:
    """A score's or rival's r with one training set's change: interval, p and verdict."""
    row = correlation_row(run, name, seed, measure, score)
    if "undefined" in row:
        return "undefined"
    interval, verdict = row["pearson_interval"], judged_set(run, name, seed, correlation_verdict(row))
    return f"{two(row['pearson'])} ({span(interval['low'], interval['high'])}), p {p_phrase(row['p'])}: {verdict}"


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
            row = specific_row(run, measure, forecast)
            line = {"change in": NAMES[measure], "forecast": name}
            if "undefined" in row:
                lines.append(line | {"rank correlation within domains": "undefined"})
                continue
            lines.append(line | {
                "rank correlation within domains": two(row["within"]),
                "95% interval": span(row["low"], row["high"]), "domains": row["defined"],
                "p, shuffled in each domain": p_value(row["p_within"]),
                "p, whole sets shuffled": f"{p_value(row['p_sets'])} (other side {p_value(row['p_opposite'])}; "
                                           f"{row['orders']} orders)",
                "without one set at a time": without_text(run, measure, forecast),
                "right set named": "" if row["hits"] is None else f"{row['hits']:.0%}",
                "interaction (no test)": two(row["interaction"]),
                "verdict": judged_all(run, specific_verdict(row))})
    return pandas.DataFrame(lines).fillna("")


def without_text(run: OpenRun, measure: str, forecast: str) -> str:
    """"0.79 (`code`), 0.57 (`law`)": the mean rank correlation within domains without each training set in turn."""
    return ", ".join(f"{two(value)} (`{name}`)" for name, value in without_each(run, measure, forecast).items())


def least(p: float, orders: int) -> str:
    """That a p by counting orders could not be smaller; "" if it could."""
    return f", the smallest that {orders} orders allow" if p <= (1 + 1e-9) / orders else ""


def questions(run: OpenRun) -> str:
    """Number of questions a domain that the change is measured on: one number or a range."""
    counts = run.get("training_matrix")["n"]
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
