"""Stages that compare forecasts over domains and seeds: the score, the baselines, chance, confounds and power."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas

from sts.data.prompts import question_text
from sts.data.sources import MMLU_PRO_CATEGORY
from sts.errors import StsError
from sts.measure import baselines, items
from sts.measure.baselines import split_domains
from sts.measure.compare import SCORES, Comparison, null
from sts.measure.correlation import cluster_interval, correlate, correlation_rows, plain, power_of_design, random_orders
from sts.measure.items import MEASURES, item_differences, item_measures
from sts.measure.paper import extremes, spread_ratio, with_selection
from sts.measure.score import REVISION, VARIANTS, same_fraction
from sts.run.stage import stage

#: What the score is corrected for: how hard a domain is, and how long its questions are; beside them the category of a
#: subject and, where they are known, p(right) before training and how short right answers are.
CONTROLS = ("base_bits", "question_tokens")
#: Below this reliability a correlation corrected for noise would be a guess.
SMALLEST_SHARE = 0.1
PROBES = {"probe_raw": "raw", "probe_sae": "sae"}
#: Stages that the ones over all seeds read of every seed.
EVALUATED = ("evaluation_before", "evaluation_after")
EVERY_SEED = ("baseline_values", *EVALUATED)


def _changes(domain_shift):
    """Each measure with its rows, one a domain, and abs_shift_pct, the absolute change."""
    for measure in MEASURES:
        own = domain_shift[domain_shift["measure"] == measure].set_index("domain", drop=False).rename_axis(None)
        if len(own):
            yield measure, own.assign(abs_shift_pct=own["shift"].abs())


def _correlated(scores, domain_shift, extreme: bool, **numbers: int) -> list[dict]:
    """r of every score with the absolute change in every measure, over all domains or over those at either end."""
    rows = []
    for measure, own in _changes(domain_shift):
        change = own["abs_shift_pct"]
        for variant, score in product(VARIANTS, SCORES):
            row = {"measure": measure, "variant": variant, "score": score}
            forecast = scores[scores["variant"] == variant].set_index("domain")[score]
            try:
                kept = change[extremes(own)["domain"]] if extreme else change
                row |= plain(correlate(forecast[kept.index], kept, kept.index, **numbers))
                if extreme:
                    ratio = spread_ratio(change)
                    row |= {"domains": list(kept.index), "spread_ratio": ratio,
                            "all_domains": with_selection(row["pearson"], 1 / ratio)}
            except StsError as error:  # e.g. no domain's accuracy moved: a fact to report, not a crash
                row["undefined"] = str(error)
            rows.append(row)
    return rows


@stage("json")
def correlations(scores, domain_shift, bootstrap, permutations, seed):
    """Correlation of each score with the absolute shift in each measure, over all domains."""
    return _correlated(scores, domain_shift, False, resamples=bootstrap, permutations=permutations, seed=seed)


@stage("json", version=2)
def extreme_correlations(scores, domain_shift, bootstrap, permutations, seed):
    """The same on the four domains of largest and of smallest absolute shift, as in Figure 3; also `domains`,
    `spread_ratio` (of the shifts, extremes over all), and `all_domains`: r without the selection, by Thorndike."""
    return _correlated(scores, domain_shift, True, resamples=bootstrap, permutations=permutations, seed=seed)


@stage("json", also=("correlations", "extreme_correlations"))
def correlations_by_seed(each_seed):
    """Correlations of this seed and of the others in `seeds`, over all domains and over the extremes."""
    kept = ("measure", "variant", "score", "n", "pearson", "p", "r_squared", "undefined")
    return [{"seed": own.settings.seed, "domains": which, **{name: row.get(name) for name in kept}}
            for own in each_seed for which, stored in (("all", "correlations"), ("extremes", "extreme_correlations"))
            for row in own.get(stored)]


@stage("parquet")
def text_baselines(tokenizer, train, questions):
    """What the texts alone say: columns domain, questions, question_tokens (mean), tfidf (to the training set)."""
    texts = {domain: [question_text(example) for example in own] for domain, own in questions.items()}
    similar = baselines.tfidf_similarity(texts, [question_text(example) for example in train])
    return pandas.DataFrame([{
        "domain": domain, "questions": len(own), "tfidf": similar[domain],
        "question_tokens": np.mean([len(ids) for ids in tokenizer(own, add_special_tokens=False)["input_ids"]])}
        for domain, own in texts.items()])


@stage("parquet", version=2 + REVISION, also=("evaluation_before",))
def baseline_values(scores, shift, shift_controls, sft_shift, domain_stats, domain_raw_stats, domain_model_change,
                    text_baselines, domain_shift, top_n):
    """Every baseline that is the same for all measures, for this seed: column domain, and one column a predictor."""
    raw_shift = split_domains(shift_controls)["raw"]
    widths = [len(own["squared_difference_L"]) for own in (shift, raw_shift)]
    return baselines.values_of(baselines.Known(
        shift, raw_shift, split_domains(sft_shift)["sae"], split_domains(domain_stats),
        split_domains(domain_raw_stats), split_domains(domain_model_change),
        scores[scores["variant"] == "paper"].set_index("domain"), text_baselines.set_index("domain"),
        domain_shift[domain_shift["measure"] == "bits"].set_index("domain")["before"], top_n,
        same_fraction(top_n, *widths))).reset_index()


@stage("tensors", version=2 + REVISION)
def random_latent_scores(shift, domain_stats, top_n, baseline_draws, seed):
    """`baselines.random_set_scores` with `baseline_draws` sets of latents of each kind, named kind/act_RD and so on."""
    domains = split_domains(domain_stats)
    return {f"{kind}/{name}": tensor.float() for kind in baselines.RANDOM for name, tensor in
            baselines.random_set_scores(kind, shift, domains, top_n, baseline_draws, seed).items()}


@stage("json")
def probe_predictions(domain_stats, domain_raw_stats, domain_shift, baseline_draws):
    """Held-out predictions of ridge probes on mean activations, by measure and features; r with shuffled targets."""
    rows, features = [], {"raw": split_domains(domain_raw_stats), "sae": split_domains(domain_stats)}
    for measure, own in _changes(domain_shift):
        actual = own["abs_shift_pct"].sort_index()
        # Orders are the same for every seed of a run, so that seeds can be averaged order by order.
        targets_DP = np.column_stack([actual, actual.to_numpy()[random_orders(len(actual), baseline_draws, 0)].T])
        for kind, stats in features.items():
            row = {"measure": measure, "features": kind, "domains": list(actual.index), "actual": actual.tolist()}
            means_DF = baselines.mean_vectors({domain: stats[domain] for domain in actual.index}).numpy()
            try:
                predicted_DP = baselines.held_out_predictions(means_DF, targets_DP)
                row |= {"r_squared": baselines.out_of_sample_r_squared(actual.to_numpy(), predicted_DP[:, 0]),
                        "predicted": predicted_DP[:, 0].tolist(),
                        "shuffled": correlation_rows(predicted_DP.T[1:], targets_DP.T[1:]).tolist()}
            except StsError as error:
                row["undefined"] = str(error)
            rows.append(row)
    return plain(rows)


def _differences(each_seed):
    """Each measure with its questions' differences, by domain."""
    return item_differences({own.settings.seed: tuple(own.get(name) for name in EVALUATED)
                             for own in each_seed}).items()


def _measured(each_seed, names):
    """The same and, seeds x domains, the values of predictors (NaN of one that is newer than the stored values)."""
    short = _before(each_seed)["answer_shortness"]
    tables = [own.get("baseline_values").set_index("domain").assign(answer_shortness=short).reindex(
        columns=list(names)) for own in each_seed]
    for measure, differences in _differences(each_seed):
        frames = [table.reindex(sorted(differences)) for table in tables]
        yield measure, differences, {name: np.stack([frame[name].to_numpy(float) for frame in frames])
                                     for name in names}


def _probes(each_seed, measure: str, probe: str) -> list[dict]:
    """Each seed's row of stage `probe_predictions`."""
    return [row for own in each_seed for row in own.get("probe_predictions")
            if (row["measure"], row["features"]) == (measure, PROBES[probe])]


@stage("json", version=3, also=(*EVERY_SEED, "probe_predictions"))
def baseline_correlations(each_seed, bootstrap, permutations, seed):
    """Correlation of every predictor with the absolute change, mean over seeds; and how far the score exceeds it: rows
    of `compare.Comparison`. Leaving a domain out pulls r of probes down, so that only `baseline_nulls` judges it."""
    rows = []
    for measure, differences, values in _measured(each_seed, baselines.PREDICTORS):
        reasons = {}
        for name in PROBES:
            own = _probes(each_seed, measure, name)
            values[name] = np.array([row.get("predicted", [np.nan] * len(differences)) for row in own], float)
            reasons[name] = next((row["undefined"] for row in own if "undefined" in row), "")
        compared = Comparison(differences, values, bootstrap=bootstrap, permutations=permutations, seed=seed,
                              reasons=reasons)
        rows += [{"measure": measure, "predictor": name, **row}
                 for name, row in compared.rows(against=SCORES, untested=list(PROBES)).items()]
    return rows


@stage("json", also=(*EVERY_SEED, "probe_predictions", "random_latent_scores"))
def baseline_nulls(baseline_correlations, each_seed):
    """What chance gives: random sets of latents against the score's, shuffled targets against the probes'. Rows of
    `compare.null`; of random sets also matched and chosen (mean rate or energy of the sets and of D_N) and shared
    (share of latents that two sets have in common), of probes r_squared (out of sample)."""
    observed = {(row["measure"], row["predictor"]): row.get("pearson") for row in baseline_correlations}
    sets, rows = [own.get("random_latent_scores") for own in each_seed], []
    names = list(each_seed[0].get("baseline_values")["domain"])

    def row(kind, name, found_SR, **about):
        found = null(np.mean(found_SR, axis=0), observed[measure, name])
        rows.append({"measure": measure, "null": kind, "predictor": name, **found, **about})

    for measure, differences in _differences(each_seed):
        domains = sorted(differences)
        change_SN = np.abs(np.stack([differences[domain].mean(0) for domain in domains], axis=1))
        places = [names.index(domain) for domain in domains]
        for kind in baselines.RANDOM:
            about = {name: float(np.mean([own[f"{kind}/{field}"].mean() for own in sets])) for name, field in (
                ("matched", "matched_R"), ("chosen", "chosen"), ("shared", "shared"))}
            for score, name in baselines.SCORES.items():
                row(kind, name, [correlation_rows(own[f"{kind}/{score}_RD"].double().numpy()[:, places], y_N)
                                 for own, y_N in zip(sets, change_SN, strict=True)], **about)
        for name in PROBES:
            own = _probes(each_seed, measure, name)
            if all("shuffled" in one for one in own):
                row("shuffled", name, np.array([one["shuffled"] for one in own], float),
                    r_squared=float(np.mean([one["r_squared"] for one in own])))
    return rows


def _before(each_seed) -> Any:
    """Means over each domain's questions before training, and of one over the characters that bits are divided by."""
    rows = each_seed[0].get("evaluation_before")
    divided = rows[(rows["kind"] == "solution") | (rows["kind"] == "text") & rows["is_right"]]
    short = (1 / divided["characters"]).groupby(divided["domain"]).mean()
    return item_measures(rows).groupby("domain")[list(MEASURES)].agg("mean").assign(answer_shortness=short)


def _categories(domains) -> list[str]:
    """The category of each domain, of those that hold several; empty where none does."""
    own = [MMLU_PRO_CATEGORY.get(domain, domain) for domain in domains]
    return own if 1 < len(set(own)) < len(own) else []


@stage("json", version=5, also=EVERY_SEED)
def baseline_confounds(each_seed, bootstrap, permutations, seed):
    """The score's partial correlation with the absolute change given each control, and all of them (`all`)."""
    rows, before = [], _before(each_seed)
    for measure, differences, values in _measured(each_seed, (*SCORES, *CONTROLS)):
        domains, seeds = sorted(differences), len(each_seed)
        categories = np.array(_categories(domains))
        controls = {name: [name] for name in CONTROLS if np.isfinite(values[name]).all()}
        for name in ("p_right", "answer_shortness"):
            if before.loc[domains, name].notna().all():
                controls[name], values[name] = [name], np.tile(before.loc[domains, name], (seeds, 1))
        members = {f"category {name}": np.tile(categories == name, (seeds, 1)).astype(float)
                   for name in sorted(set(categories))[1:]}
        values |= members
        controls |= {"category": list(members)} if members else {}
        compared = Comparison(differences, values, bootstrap=bootstrap, permutations=permutations, seed=seed)
        for own in (*([name] for name in controls), list(controls)):
            taken = [column for name in own for column in controls[name]]
            rows += [{"measure": measure, "score": score, "controls": own, "all": len(own) == len(controls), **row}
                     for score, row in zip(SCORES, compared.partial(SCORES, taken), strict=True)]
    return rows


@stage("json", version=3, also=EVALUATED)
def change_quality(each_seed, seed):
    """How well each measure's changes are known (`items.change_quality`) and what so many domains can find
    (`power_of_design`); before: mean of the domains' values before training."""
    rows, before = [], _before(each_seed)
    for measure, differences in _differences(each_seed):
        row = {"measure": measure, "n": len(differences), "seeds": len(each_seed), "before": before[measure].mean()}
        try:
            row |= power_of_design(len(differences)) | items.change_quality(differences, seed=seed)
        except StsError as error:
            row["undefined"] = str(error)
        rows.append(row)
    return plain(rows)


@stage("json", version=4, also=("scores", *EVALUATED))
def score_checks(change_quality, each_seed, bootstrap, permutations, seed):
    """r of each score as in `baseline_correlations`; category_interval: with whole categories of subjects drawn, if any
    are there; given_before: partial r given the measure before training, as in `baseline_confounds`; corrected: divided
    by the root of the change's reliability, which noise lowers it by, if it has some."""
    rows, before = [], _before(each_seed)
    known = {row["measure"]: row.get("reliability") for row in change_quality}
    tables = [own.get("scores").query("variant == 'paper'").set_index("domain") for own in each_seed]
    for measure, differences in _differences(each_seed):
        domains, share = sorted(differences), known[measure] or 0.0
        categories = _categories(domains)
        values = {score: np.stack([own.loc[domains, score] for own in tables]) for score in SCORES}
        values["before"] = np.tile(before.loc[domains, measure], (len(tables), 1))
        compared = Comparison(differences, values, bootstrap=bootstrap, permutations=permutations, seed=seed)
        given = dict(zip(SCORES, compared.partial(SCORES, ["before"]), strict=True))
        found: dict[str, Any] = compared.rows(untested=["before"])
        rows += [{"measure": measure, "score": score, "pearson": row["pearson"], "p": row["p"],
                  "pearson_interval": row["pearson_interval"], "given_before": given[score],
                  "category_interval": cluster_interval(compared.values[score], compared.change_SN, categories,
                                                        bootstrap, seed) if categories else None,
                  "corrected": row["pearson"] / share**0.5 if share > SMALLEST_SHARE else None}
                 for score, row in found.items() if score in SCORES and "pearson" in row]
    return rows
