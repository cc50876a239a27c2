"""Stages that compare forecasts over domains and seeds: the score, the baselines, chance, confounds and power.

Two run the model, `domain_raw_stats` and `domain_model_change`; all others work from what is stored.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas

from sts.data.prompts import question_text
from sts.engine.extract import model_paired_folds, paired_stats
from sts.engine.saes import SideBySide, identity_sae
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.compare import SCORES, Comparison, null
from sts.measure.correlation import correlation_rows, plain
from sts.measure.items import MEASURES, item_differences, reliability
from sts.measure.overlap import same_fraction
from sts.measure.paper import extremes, spread_ratio, with_selection
from sts.measure.resampling import correlate, power_of_design
from sts.measure.score import REVISION, VARIANTS
from sts.run.stage import stage

#: Domains at either end that the paper's Figure 3 keeps.
EXTREMES = 4
#: What the score is corrected for: how hard a domain is, and how long its questions are.
CONTROLS = ("base_bits", "question_tokens")
PROBES = ("probe_raw", "probe_sae")
#: Stages that the ones over all seeds read of every seed.
EVERY_SEED = ("baseline_values", "evaluation_before", "evaluation_after")


def _correlated(scores, domain_shift, extreme: bool, **numbers: int) -> list[dict]:
    """r of every score with the absolute change in every measure, over all domains or over those at either end."""
    rows = []
    for measure in (measure for measure in MEASURES if (domain_shift["measure"] == measure).any()):
        own = domain_shift[domain_shift["measure"] == measure].assign(abs_shift_pct=lambda row: row["shift"].abs())
        change = own.set_index("domain")["abs_shift_pct"]
        for variant, score in product(VARIANTS, SCORES):
            row = {"measure": measure, "variant": variant, "score": score}
            forecast = scores[scores["variant"] == variant].set_index("domain")[score]
            try:
                kept = change[extremes(own, EXTREMES)["domain"]] if extreme else change
                found = correlate(forecast[kept.index], kept, kept.index, **numbers)
            except StsError as error:  # e.g. no domain's accuracy moved: a fact to report, not a crash
                rows.append(row | {"undefined": str(error)})
                continue
            row |= plain(found)
            if extreme:
                ratio = spread_ratio(change, EXTREMES)
                row |= {"domains": list(kept.index), "spread_ratio": ratio,
                        "all_domains": with_selection(found.pearson, 1 / ratio)}
            rows.append(row)
    return rows


@stage("json")
def correlations(scores, domain_shift, bootstrap, permutations, seed):
    """Correlation of each score with the absolute shift in each measure, over all domains."""
    return _correlated(scores, domain_shift, False, resamples=bootstrap, permutations=permutations, seed=seed)


@stage("json", version=2)
def extreme_correlations(scores, domain_shift, bootstrap, permutations, seed):
    """The same on the four domains of largest and the four of smallest absolute shift, as in Figure 3.

    Also `domains`, `spread_ratio` (of the absolute shift, extremes over all) and `all_domains`, what Thorndike's
    formula makes of the correlation without the selection.
    """
    return _correlated(scores, domain_shift, True, resamples=bootstrap, permutations=permutations, seed=seed)


@stage("json", also=("correlations", "extreme_correlations"))
def correlations_by_seed(each_seed):
    """Correlations of this seed and of the others in `seeds`, over all domains and over the extremes."""
    return [{"seed": own.seed, "domains": which, **{name: row.get(name) for name in (
                "measure", "variant", "score", "n", "pearson", "p", "r_squared", "undefined")}}
            for own in each_seed for which, stored in (("all", "correlations"), ("extremes", "extreme_correlations"))
            for row in own.get(stored)]


@stage("tensors")
def domain_raw_stats(lm, layer, domain_groups, masks, tokens_per_batch, report, work):
    """Stage `domain_stats` on the residual stream's own dimensions, behind the first draw of demonstrations alone."""
    flat = {}
    for done, (domain, groups) in enumerate(domain_groups.items()):
        stats = paired_stats(lm, identity_sae(lm), layer, groups[:1], masks, tokens_per_batch=tokens_per_batch,
                             work=work, report=lambda f, done=done: report((done + f) / len(domain_groups)))
        own = stats.to_tensors()
        flat |= {f"{domain}/{name}": own[name] for name in ("tokens", "base_sum_L", "base_square_sum_L",
                                                            "squared_difference_L")}
    return flat


@stage("tensors")
def domain_model_change(lm, tuned, reader, layer, domain_groups, masks, tokens_per_batch, report, work):
    """The same questions, without demonstrations, in the untuned and the tuned model; also all latents' change."""
    codes, flat = SideBySide({"sae": reader, "raw": identity_sae(lm)}), {}
    for done, (domain, groups) in enumerate(domain_groups.items()):
        stats, = model_paired_folds(
            lm, tuned, codes, layer, list(groups[0].base), masks, work=work, tokens_per_batch=tokens_per_batch,
            report=lambda f, done=done: report((done + f) / len(domain_groups)))
        own = codes.split(stats.to_tensors())
        flat |= {f"{domain}/{name}": tensor for name, tensor in (
            ("tokens", own["raw/tokens"]), ("base_sum_L", own["raw/base_sum_L"]),
            ("tuned_sum_L", own["raw/icl_sum_L"]), ("squared_difference_L", own["raw/squared_difference_L"]),
            ("latents_squared", own["sae/squared_difference_L"].sum()[None]))}
    return flat


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
    split, raw_shift = baselines.split_domains, baselines.split_domains(shift_controls)["raw"]
    bits = domain_shift[domain_shift["measure"] == "bits"].set_index("domain")["before"]
    widths = [len(own["squared_difference_L"]) for own in (shift, raw_shift)]
    return baselines.values_of(baselines.Known(
        shift, raw_shift, split(sft_shift)["sae"], split(domain_stats), split(domain_raw_stats),
        split(domain_model_change),
        scores[scores["variant"] == "paper"].set_index("domain"), text_baselines.set_index("domain"), bits,
        top_n, same_fraction(top_n, *widths))).reset_index()


@stage("tensors", version=2 + REVISION)
def random_latent_scores(shift, domain_stats, top_n, baseline_draws, seed, report):
    """`baselines.random_set_scores` with `baseline_draws` sets of latents of each kind, named kind/act_RD and so on."""
    flat, domains = {}, baselines.split_domains(domain_stats)
    for done, kind in enumerate(baselines.RANDOM, 1):
        own = baselines.random_set_scores(kind, shift, domains, top_n, baseline_draws, seed)
        flat |= {f"{kind}/{name}": tensor.float() for name, tensor in own.items()}
        report(done / len(baselines.RANDOM))
    return flat


@stage("json")
def probe_predictions(domain_stats, domain_raw_stats, domain_shift, baseline_draws, report):
    """Held-out predictions of ridge probes on mean activations, by measure and features; r with shuffled targets."""
    rows, features = [], {"raw": baselines.split_domains(domain_raw_stats),
                          "sae": baselines.split_domains(domain_stats)}
    measures = [measure for measure in MEASURES if (domain_shift["measure"] == measure).any()]
    for done, measure in enumerate(measures, 1):
        actual = domain_shift[domain_shift["measure"] == measure].set_index("domain")["shift"].abs().sort_index()
        # Orders are the same for every seed of a run, so that seeds can be averaged order by order.
        orders_BN = np.random.default_rng(0).permuted(np.tile(np.arange(len(actual)), (baseline_draws, 1)), axis=1)
        targets_DP = np.column_stack([actual, actual.to_numpy()[orders_BN].T])
        for kind, stats in features.items():
            row = {"measure": measure, "features": kind, "domains": list(actual.index), "actual": actual.tolist()}
            own = baselines.mean_vectors({domain: stats[domain] for domain in actual.index}).numpy()
            try:
                predicted_DP = baselines.held_out_predictions(own, targets_DP)
                r_squared = baselines.out_of_sample_r_squared(actual.to_numpy(), predicted_DP[:, 0])
            except StsError as error:
                rows.append(row | {"undefined": str(error)})
                continue
            rows.append(row | {"r_squared": r_squared, "predicted": predicted_DP[:, 0].tolist(),
                               "shuffled": correlation_rows(predicted_DP.T[1:], targets_DP.T[1:]).tolist()})
        report(done / len(measures))
    return plain(rows)


def _differences(each_seed) -> dict[str, dict[str, np.ndarray]]:
    return item_differences({own.seed: (own.get("evaluation_before"), own.get("evaluation_after"))
                             for own in each_seed})


def _probes(each_seed, measure: str, features: str) -> list[dict]:
    """Each seed's row of stage `probe_predictions`."""
    return [row for own in each_seed for row in own.get("probe_predictions")
            if (row["measure"], row["features"]) == (measure, features)]


def _predictors(each_seed, names, domains: list[str]) -> dict[str, np.ndarray]:
    """Name -> seeds x domains; NaN for one that is newer than the stored values."""
    frames = [own.get("baseline_values").set_index("domain").reindex(index=domains, columns=names) for own in each_seed]
    return {name: np.stack([frame[name].to_numpy(float) for frame in frames]) for name in names}


@stage("json", version=2, also=(*EVERY_SEED, "probe_predictions"))
def baseline_correlations(each_seed, bootstrap, permutations, seed, report):
    """Correlation of every predictor with the absolute change, mean over seeds; and how far the score exceeds it.

    Rows of `compare.Correlated`. Leaving a domain out pulls r of probes down, so that only `baseline_nulls` judges it.
    """
    rows, changes = [], _differences(each_seed)
    for done, (measure, differences) in enumerate(changes.items(), 1):
        domains, reasons = sorted(differences), {}
        values = _predictors(each_seed, list(baselines.PREDICTORS), domains)
        for name in PROBES:
            own = _probes(each_seed, measure, name.removeprefix("probe_"))
            values[name] = np.array([row.get("predicted", [np.nan] * len(domains)) for row in own], float)
            reasons[name] = next((row["undefined"] for row in own if "undefined" in row), "")
        compared = Comparison(differences, values, bootstrap=bootstrap, permutations=permutations, seed=seed,
                              reasons=reasons)
        rows += [{"measure": measure, "predictor": name, **plain(row)}
                 for name, row in compared.rows(against=SCORES, untested=PROBES).items()]
        report(done / len(changes))
    return rows


@stage("json", also=(*EVERY_SEED, "probe_predictions", "random_latent_scores"))
def baseline_nulls(baseline_correlations, each_seed):
    """What chance gives: random sets of latents against the score's, shuffled targets against the probes'.

    Rows of `compare.Null`; of random sets also matched and chosen (mean rate or energy of the sets and of D_N) and
    shared (share of latents that two sets have in common), of probes r_squared (out of sample).
    """
    observed = {(row["measure"], row["predictor"]): row.get("pearson") for row in baseline_correlations}
    sets, rows = [own.get("random_latent_scores") for own in each_seed], []
    names = list(each_seed[0].get("baseline_values")["domain"])
    for measure, differences in _differences(each_seed).items():
        domains = sorted(differences)
        change_SN = np.abs(np.stack([differences[domain].mean(0) for domain in domains], axis=1))
        places = [names.index(domain) for domain in domains]
        for kind in baselines.RANDOM:
            about = {name: float(np.mean([own[f"{kind}/{field}"].mean() for own in sets])) for name, field in (
                ("matched", "matched_R"), ("chosen", "chosen"), ("shared", "shared"))}
            for score, name in baselines.SCORES.items():
                found_SR = [correlation_rows(own[f"{kind}/{score}_RD"].double().numpy()[:, places], y_N)
                            for own, y_N in zip(sets, change_SN, strict=True)]
                rows.append({"measure": measure, "null": kind, "predictor": name,
                             **plain(null(np.mean(found_SR, axis=0), observed[measure, name])), **about})
        for features in ("raw", "sae"):
            own = _probes(each_seed, measure, features)
            if all("shuffled" in row for row in own):
                found_R = np.mean([np.array(row["shuffled"], float) for row in own], axis=0)
                rows.append({"measure": measure, "null": "shuffled", "predictor": f"probe_{features}",
                             **plain(null(found_R, observed[measure, f"probe_{features}"])),
                             "r_squared": float(np.mean([row["r_squared"] for row in own]))})
    return rows


@stage("json", version=3, also=EVERY_SEED)
def baseline_confounds(each_seed, bootstrap, permutations, seed):
    """The score's partial correlation with the absolute change given each of `CONTROLS`, and both."""
    rows = []
    for measure, differences in _differences(each_seed).items():
        compared = Comparison(differences, _predictors(each_seed, [*SCORES, *CONTROLS], sorted(differences)),
                              bootstrap=bootstrap, permutations=permutations, seed=seed)
        for controls in (*((name,) for name in CONTROLS), CONTROLS):
            rows += [{"measure": measure, "score": score, "controls": list(controls), **plain(row)}
                     for score, row in zip(SCORES, compared.partial(SCORES, controls), strict=True)]
    return rows


@stage("json")
def baseline_power(domain_shift):
    """What this design could have found (`resampling.Power`), and the reliability of absolute changes, by measure."""
    rows = []
    for measure, own in domain_shift.groupby("measure"):
        try:
            rows.append({"measure": measure, **vars(power_of_design(len(own))),
                         "reliability": reliability(own["shift"].abs(), own["standard_error"])})
        except StsError as error:
            rows.append({"measure": measure, "undefined": str(error)})
    return rows
