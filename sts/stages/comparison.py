"""Stages that compare forecasts over domains and seeds: correlations with intervals, chance, confounds and power.

Nothing here runs a model. Every seed of a run gives its own values (pipeline_baselines.py); what is reported is the
mean over seeds.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas

from sts.engine.evaluate import MEASURES, item_measures
from sts.errors import StsError
from sts.measure import baselines
from sts.measure.correlation import pearson, spearman
from sts.measure.resampling import (
    Resamples,
    correlation_rows,
    hierarchical_resamples,
    percentile_interval,
    permutation_p_over_seeds,
    power_of_design,
    reliability,
)
from sts.run.run import OpenRun, stage
from sts.run.settings import Run
from sts.stages.baselines import SCORES
from sts.stages.forecast import split_domains

#: What the score is corrected for besides hardness.
LENGTHS = ("question_tokens", "answer_shortness")
#: What the stages below need of every seed: predictors that are no probes, and what they predict.
EVERY_SEED = ("baseline_values", "evaluation_before", "evaluation_after")


def item_differences(run: OpenRun) -> dict[str, dict[str, np.ndarray]]:
    """measure -> domain -> after minus before of its questions in every seed, items x seeds; what was evaluated."""
    changes, domains = {}, {}
    for seed in (run.settings.seed, *run.other_seeds):
        own = run.with_seed(seed)
        before, after = (item_measures(own.get(f"evaluation_{when}")) for when in ("before", "after"))
        changes[seed] = after.loc[before.index, list(MEASURES)] - before[list(MEASURES)]
        domains |= before["domain"].to_dict()
    found = {}
    for measure in MEASURES:
        frame = pandas.DataFrame({seed: change[measure] for seed, change in changes.items()}).dropna()
        if len(frame):
            found[measure] = {str(domain): rows.to_numpy()
                              for domain, rows in frame.groupby(frame.index.map(domains))}
    return found


class _Experiment:
    """Predictors and changes of one measure in all seeds of a run; domains in alphabetical order."""

    def __init__(self, run: OpenRun, measure: str, differences: dict[str, np.ndarray]):
        self.measure, self.domains, self._differences = measure, sorted(differences), differences
        self._settings = run.settings
        self.runs = [run.with_seed(seed) for seed in (run.settings.seed, *run.other_seeds)]
        self.values = [own.get("baseline_values").set_index("domain") for own in self.runs]
        self.change_SN = np.abs(np.stack([differences[domain].mean(0) for domain in self.domains], axis=1))

    @cached_property
    def resamples(self) -> Resamples:
        return hierarchical_resamples([self._differences[domain] for domain in self.domains],
                                      resamples=self._settings.bootstrap, seed=self._settings.seed)

    def predictor(self, name: str) -> np.ndarray:
        """S x N; NaN where it has no value."""
        if name.startswith("probe_"):
            rows = [probe_row(own, self.measure, name.removeprefix("probe_")) for own in self.runs]
            return np.array([row.get("predicted", [np.nan] * len(self.domains)) for row in rows])
        return np.stack([own.loc[self.domains, name].to_numpy(float) for own in self.values])

    def why_undefined(self, name: str) -> str:
        """The reason that a probe's own stage gives; "" if it gives none."""
        if not name.startswith("probe_"):
            return ""
        rows = (probe_row(own, self.measure, name.removeprefix("probe_")) for own in self.runs)
        return next((row["undefined"] for row in rows if "undefined" in row), "")


def probe_row(run: OpenRun, measure: str, features: str) -> dict:
    """The row of stage `probe_predictions` for a measure and kind of features."""
    return next(row for row in run.get("probe_predictions") if (row["measure"], row["features"]) == (measure, features))


def _experiments(run: OpenRun) -> list[_Experiment]:
    return [_Experiment(run, measure, own) for measure, own in item_differences(run).items()]


def _interval(values_B: np.ndarray) -> dict | None:
    found = percentile_interval(values_B)
    return None if found is None else {"low": found.low, "high": found.high, "resamples": found.resamples}


# --- correlations -------------------------------------------------------------------------------------------------

@stage("json", version=2, uses=("seeds", "seed", "bootstrap", "permutations"),
       needs=(*EVERY_SEED, "probe_predictions"), inputs=("seeds",))
def baseline_correlations(run: OpenRun, report) -> list[dict]:
    """Correlation of every predictor with the absolute change, mean over seeds; and how far the score exceeds it.

    One row a measure and predictor: n, seeds, by_seed (r of each), pearson (their mean), pearson_interval
    (hierarchical bootstrap), p (permutation), spearman, less (score -> r of the score minus this one's, with interval
    from the same resamples); or `undefined`. Of probes neither p nor less: leaving a domain out pulls their r down, so
    that only `baseline_nulls` can judge it.
    """
    rows, experiments = [], _experiments(run)
    for done, one in enumerate(experiments, 1):
        x = {name: one.predictor(name) for name in baselines.PREDICTORS}
        defined, reasons = {}, {}
        for name, x_SN in x.items():
            try:
                defined[name] = [pearson(x_N, y_N) for x_N, y_N in zip(x_SN, one.change_SN, strict=True)]
            except StsError as error:
                reasons[name] = one.why_undefined(name) or str(error)
        drawn = {name: one.resamples.correlations(x[name]) for name in defined}
        tests = dict(zip(defined, permutation_p_over_seeds(
            np.stack([x[name] for name in defined]), one.change_SN, resamples=run.settings.permutations,
            seed=run.settings.seed) if defined else (), strict=True))
        for name in baselines.PREDICTORS:
            base = {"measure": one.measure, "predictor": name, "n": len(one.domains), "seeds": len(one.runs)}
            if name in reasons:
                rows.append(base | {"undefined": reasons[name]})
                continue
            row = base | {"by_seed": defined[name], "pearson": float(np.mean(defined[name])),
                          "pearson_interval": _interval(drawn[name]), "spearman": float(np.mean([
                              spearman(*pair) for pair in zip(x[name], one.change_SN, strict=True)]))}
            if not name.startswith("probe_"):
                less = {score: {"mean": float(np.mean(defined[score]) - np.mean(defined[name])),
                                "interval": _interval(drawn[score] - drawn[name])}
                        for score in SCORES if score in defined and score != name}
                row |= {"p": tests[name].p, "exact": tests[name].exact, "permutations": tests[name].resamples,
                        "less": less}
            rows.append(row)
        report(done / len(experiments))
    return rows


# --- chance -------------------------------------------------------------------------------------------------------

def _share_at_least(values: np.ndarray, observed: float) -> float:
    """One-sided Monte Carlo p: the observed value counts as one of the draws, so that it is never zero."""
    return float((1 + (values >= observed - 1e-12).sum()) / (1 + len(values)))


@stage("json", uses=("seeds", "seed"), inputs=("seeds",),
       needs=(*EVERY_SEED, "probe_predictions", "random_latent_scores", "baseline_correlations"))
def baseline_nulls(run: OpenRun, report) -> list[dict]:
    """What chance gives: random sets of latents against the score's, shuffled targets against the probes'.

    One row a measure and null: null (kind of random latents, or `shuffled`), predictor (that it is to be compared
    with), draws, mean, low, high (central 95% of r, mean over seeds), observed, p (share of draws with at least the
    observed r, one-sided); of random sets also matched and chosen (mean firing rate or energy of the sets and of D_N)
    and shared (share of latents that two sets have in common), of probes r_squared (out of sample, mean over seeds).
    """
    rows = []
    observed = {(row["measure"], row["predictor"]): row.get("pearson") for row in run.get("baseline_correlations")}
    for one in _experiments(run):
        for kind in baselines.RANDOM:
            sets = [own.get("random_latent_scores") for own in one.runs]
            names = list(split_domains(run.get("domain_stats")))
            places = [names.index(domain) for domain in one.domains]
            for score, name in baselines.SCORES.items():
                found_SR = [correlation_rows(own[f"{kind}/{score}_RD"].double().numpy()[:, places], y_N[None])
                            for own, y_N in zip(sets, one.change_SN, strict=True)]
                rows.append(_null(one.measure, kind, name, np.mean(found_SR, axis=0), observed) | {
                    "matched": float(np.mean([own[f"{kind}/matched_R"].mean() for own in sets])),
                    "chosen": float(np.mean([own[f"{kind}/chosen"].mean() for own in sets])),
                    "shared": float(np.mean([own[f"{kind}/shared"].mean() for own in sets]))})
        for features in ("raw", "sae"):
            own = [probe_row(seed, one.measure, features) for seed in one.runs]
            if all("shuffled" in row for row in own):
                null = np.mean([np.array(row["shuffled"], float) for row in own], axis=0)
                rows.append(_null(one.measure, "shuffled", f"probe_{features}", null, observed) | {
                    "r_squared": float(np.mean([row["r_squared"] for row in own]))})
    return rows


def _null(measure: str, null: str, name: str, values_R: np.ndarray, observed: dict) -> dict:
    kept_R, own = values_R[np.isfinite(values_R)], observed[measure, name]
    row = {"measure": measure, "null": null, "predictor": name, "draws": len(kept_R), "observed": own}
    if own is None or not len(kept_R):
        return row | {"undefined": "no correlation is defined"}
    low, high = np.quantile(kept_R, [0.025, 0.975])
    return row | {"mean": float(kept_R.mean()), "low": float(low), "high": float(high),
                  "p": _share_at_least(kept_R, own)}


# --- confounds and power ------------------------------------------------------------------------------------------

def hardness_of(measure: str) -> str:
    """The predictor that says how hard a domain is before training, in the unit of a measure if it is one of bits."""
    return "base_bits_answer" if measure == "bits_answer" else "base_bits"


def controls_of(measure: str) -> tuple[str, ...]:
    """Everything that the score is corrected for at once: hardness, and both lengths."""
    return hardness_of(measure), *LENGTHS


def first_controls_of(measure: str) -> tuple[str, ...]:
    """What the score was to be corrected for before the length of the answers was seen to matter."""
    return hardness_of(measure), "question_tokens"


def partial_rows(x_PSN: np.ndarray, change_SN: np.ndarray, controls_SNK: np.ndarray,
                 resamples: Resamples | None, settings: Run) -> list[dict]:
    """Partial correlations with the absolute change given controls, mean over seeds; one row a predictor.

    Args:
        resamples: of the experiment; None with fewer than three domains, for which nothing is defined.

    Returns:
        pearson, by_seed, pearson_interval (hierarchical bootstrap; the controls keep their measured values), p
        (Freedman and Lane's permutations); or `undefined` alone.
    """
    reason = {"undefined": "too few domains, bits that were not evaluated, or nothing left to correlate"}
    if controls_SNK.shape[1] < controls_SNK.shape[2] + 3 or not np.isfinite(controls_SNK).all():
        return [reason for _ in x_PSN]
    found_PS = correlation_rows(x_PSN, change_SN, controls_SNK)
    tests = permutation_p_over_seeds(x_PSN, change_SN, controls_SNK, resamples=settings.permutations,
                                     seed=settings.seed)
    rows = []
    for x_SN, found_S, test in zip(x_PSN, found_PS, tests, strict=True):
        interval = _interval(resamples.correlations(x_SN, controls_SNK)) if np.isfinite(found_S).all() else None
        rows.append({"pearson": float(found_S.mean()), "by_seed": found_S.tolist(), "pearson_interval": interval,
                     "p": test.p} if interval else reason)
    return rows


@stage("json", version=3, uses=("seeds", "seed", "bootstrap", "permutations"), needs=EVERY_SEED, inputs=("seeds",))
def baseline_confounds(run: OpenRun, report) -> list[dict]:
    """The score's partial correlation with the absolute change given hardness, each length, and several of them.

    One row a measure, score and list of controls (each of `controls_of`, `first_controls_of`, all): measure, score,
    controls, n, seeds and the fields of `partial_rows`.
    """
    rows = []
    for one in _experiments(run):
        every, resamples = controls_of(one.measure), one.resamples if len(one.domains) >= 3 else None
        for controls in (*((name,) for name in every), first_controls_of(one.measure), every):
            controls_SNK = np.stack([one.predictor(name) for name in controls], axis=-1)
            x_PSN = np.stack([one.predictor(score) for score in SCORES])
            found = partial_rows(x_PSN, one.change_SN, controls_SNK, resamples, run.settings)
            rows += [{"measure": one.measure, "score": score, "controls": list(controls), "n": len(one.domains),
                      "seeds": len(one.runs)} | row for score, row in zip(SCORES, found, strict=True)]
    return rows


@stage("json", needs=("domain_shift",))
def baseline_power(run: OpenRun, report) -> list[dict]:
    """What this design could have found: one row a measure, `stats_domains.Power` and the changes' reliability.

    The reliability is that of absolute changes, as they are what is forecast; where a change is not clearly apart from
    zero, its noise is a little smaller than assumed.
    """
    shifts, rows = run.get("domain_shift"), []
    for measure, own in shifts.groupby("measure"):
        try:
            rows.append({"measure": measure, **vars(power_of_design(len(own))),
                         "reliability": reliability(own["shift"].abs(), own["standard_error"])})
        except StsError as error:
            rows.append({"measure": measure, "undefined": str(error)})
    return rows
