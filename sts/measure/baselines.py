"""Baselines beside the score: other numbers that might tell which domains move, one value a domain.

A new one is an entry of `PREDICTORS` with its function of what is known of a run (`Known`). A larger value should go
with a larger absolute change. Nothing here runs a model.

Shape suffixes: L latents (or raw dimensions), D domains, R random sets, K latents of one set, F features, P targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas
import torch

from sts.errors import StsError
from sts.measure.score import Stats, chosen_by, score_domain, score_domains
from sts.measure.sets import matched_latents, random_latents

#: What random sets of latents are matched to D_N in.
RANDOM = ("uniform", "rate", "energy")
SCORES = {"act": "sts_act", "icl": "sts_icl"}


@dataclass(frozen=True)
class Known:
    """What is known of a run with one seed."""

    shift: Stats  # sums by latent of the training questions, without and behind demonstrations
    raw_shift: Stats  # by raw dimension
    moved: Stats  # before and after fine-tuning
    domains: Mapping[str, Stats]  # the same sums of each domain's questions
    raw: Mapping[str, Stats]
    change: Mapping[str, Stats]
    scores: pandas.DataFrame  # by the paper's formulas
    texts: pandas.DataFrame  # stage `text_baselines`
    before: pandas.Series  # bits before training
    count: int  # of chosen latents
    raw_count: int  # of chosen raw dimensions

    def scored(self, on: str, score: str) -> pandas.Series:
        """A score on "all" latents, on "raw" dimensions, or on the latents that fine-tuning "moved" most."""
        shift, domains, count = {"all": (self.shift, self.domains, len(self.shift["squared_difference_L"])),
                                 "raw": (self.raw_shift, self.raw, self.raw_count),
                                 "moved": (self.moved, self.domains, self.count)}[on]
        return pandas.Series({row["domain"]: row[score] for row in score_domains("paper", shift, domains, count)})


class Predictor(NamedTuple):
    """Its label and group in tables, and its values by domain (none: see sts/stages/comparison.py)."""

    label: str
    group: str
    values: Callable[[Known], Any] | None = None


def split_domains(flat: Stats) -> dict[str, dict[str, torch.Tensor]]:
    """domain/field tensors -> domain -> field -> tensor, domains in alphabetical order."""
    domains: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        domain, _, field = name.rpartition("/")
        domains.setdefault(domain, {})[field] = tensor
    return dict(sorted(domains.items()))


def per_token(domains: Mapping[str, Stats], field: str, chosen: Any = slice(None)) -> pandas.Series:
    """One sum over tokens, such as that of squares, added up over the chosen dimensions and per token, by domain."""
    return pandas.Series({domain: (own[field][chosen].sum() / own["tokens"]).item() for domain, own in domains.items()})


def mean_vectors(domains: Mapping[str, Stats]) -> torch.Tensor:
    """Mean activation of every domain without demonstrations, D x L, in float64."""
    return torch.stack([stats["base_sum_L"].double() / stats["tokens"] for stats in domains.values()])


def cosine(domains: Mapping[str, Stats], training: Stats, *, centred: bool = False) -> pandas.Series:
    """Cosine of each domain's mean activation with the training set's; `centred` takes the mean over domains off first,
    as residual streams share one large direction, so that all plain cosines are close to 1."""
    means_DL, own_L = mean_vectors(domains), training["base_sum_L"].double() / training["tokens"]
    if centred:
        means_DL, own_L = means_DL - means_DL.mean(0), own_L - means_DL.mean(0)
    cosines_D = torch.nn.functional.cosine_similarity(means_DL, own_L[None], dim=-1)
    return pandas.Series(cosines_D.numpy(), index=list(domains))


def tfidf_similarity(domains: Mapping[str, Sequence[str]], training: Sequence[str]) -> pandas.Series:
    """Cosine of each domain's mean TF-IDF vector (scikit-learn's, over all texts) with the training set's, 0 to 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    groups = [*domains.values(), training]
    vectorizer = TfidfVectorizer().fit([text for own in groups for text in own])
    means = np.vstack([np.asarray(vectorizer.transform(own).mean(axis=0)) for own in groups])
    return pandas.Series(cosine_similarity(means)[:-1, -1], index=list(domains))


def change_cosine(domains: Mapping[str, Stats]) -> pandas.Series:
    """1 - cosine of the mean residuals before and after fine-tuning, by domain."""
    cosine = torch.nn.functional.cosine_similarity
    return pandas.Series({domain: 1 - cosine(own["base_sum_L"], own["tuned_sum_L"], dim=0).item()
                          for domain, own in domains.items()})


_SCORE, _LATENTS, _RAW, _TRAINING = "the score", "other latents", "raw dimensions", "likeness to the training set"
_DOMAIN, _PROBE = "the domain itself", "optimised probes"
#: The group of those that are not known before fine-tuning.
AFTER = "after fine-tuning"
#: Everything that has one value a domain and seed, in the order of the table.
PREDICTORS = {
    "sts_act": Predictor("STS_act", _SCORE, lambda run: run.scores["sts_act"]),
    "sts_icl": Predictor("STS_ICL", _SCORE, lambda run: run.scores["sts_icl"]),
    "all_act": Predictor("STS_act, all latents", _LATENTS, lambda run: run.scored("all", "sts_act")),
    "all_icl": Predictor("STS_ICL, all latents", _LATENTS, lambda run: run.scored("all", "sts_icl")),
    "raw_act": Predictor("STS_act, raw dimensions", _RAW, lambda run: run.scored("raw", "sts_act")),
    # Both signs would cancel in the plain sum of raw dimensions.
    "raw_square": Predictor("mean square, raw dimensions", _RAW, lambda run: per_token(
        run.raw, "base_square_sum_L", chosen_by(run.raw_shift, run.raw_count))),
    "raw_icl": Predictor("STS_ICL, raw dimensions", _RAW, lambda run: run.scored("raw", "sts_icl")),
    "cosine_raw": Predictor("cosine, mean residual", _TRAINING, lambda run: cosine(run.raw, run.raw_shift)),
    "cosine_raw_centred": Predictor("cosine, mean residual, centred", _TRAINING,
                                    lambda run: cosine(run.raw, run.raw_shift, centred=True)),
    "cosine_sae": Predictor("cosine, mean latents", _TRAINING, lambda run: cosine(run.domains, run.shift)),
    "tfidf": Predictor("TF-IDF similarity of questions", _TRAINING, lambda run: run.texts["tfidf"]),
    "base_bits": Predictor("bits per character before", _DOMAIN, lambda run: run.before),
    "question_tokens": Predictor("length of the questions", _DOMAIN, lambda run: run.texts["question_tokens"]),
    "answer_shortness": Predictor("shortness of the right answers", _DOMAIN),
    "probe_raw": Predictor("probe on raw activations", _PROBE),
    "probe_sae": Predictor("probe on SAE activations", _PROBE),
    "actual_act": Predictor("STS_act, latents training moved", AFTER, lambda run: run.scored("moved", "sts_act")),
    "actual_icl": Predictor("STS_ICL, latents training moved", AFTER, lambda run: run.scored("moved", "sts_icl")),
    "change_cosine": Predictor("1 - cosine, residual before and after", AFTER, lambda run: change_cosine(run.change)),
    "change_rms": Predictor("change of the residual, RMS", AFTER,
                            lambda run: per_token(run.change, "squared_difference_L") ** 0.5),
    "change_sae": Predictor("change of all latents, squared", AFTER,
                            lambda run: per_token(run.change, "latents_squared")),
}


def values_of(run: Known) -> pandas.DataFrame:
    """One row a domain, one column a predictor; NaN where one has no value, probes left out."""
    return pandas.DataFrame({name: own.values(run) for name, own in PREDICTORS.items() if own.values},
                            index=pandas.Index(run.domains, name="domain"), dtype=float)


def random_set_scores(kind: str, shift: Stats, domains: Mapping[str, Stats], count: int, draws: int,
                      seed: int) -> dict[str, torch.Tensor]:
    """Scores (act_RD, icl_RD) with random sets of latents in place of D_N, none of which holds a latent of D_N.

    By `kind` they imitate on the training questions its `rate` (share of tokens on which a latent fires), its `energy`
    (mean square), or nothing (`uniform`). Also matched_R (each set's mean), chosen (that of D_N), and shared
    (share of their latents that two sets have in common, mean over pairs; 1 for one set).
    """
    width, chosen = len(shift["squared_difference_L"]), chosen_by(shift, count)
    like_L = shift["base_square_sum_L" if kind == "energy" else "base_fired_L"] / shift["tokens"]
    # Seeds of one draw and the next must not meet those of another run's seed.
    seeds = [100_000 * seed + draw for draw in range(draws)]
    sets_RK = torch.stack([random_latents(width, chosen, own) if kind == "uniform"
                           else matched_latents(like_L, chosen, own) for own in seeds])
    scored = [[score_domain("paper", stats, own_K) for stats in domains.values()] for own_K in sets_RK]
    times_L = torch.bincount(sets_RK.flatten(), minlength=width).double()  # in how many sets each latent is
    shared = (times_L * (times_L - 1)).sum() / (draws * (draws - 1) * count) if draws > 1 else torch.ones(())
    return {f"{name}_RD": torch.tensor([[own[score] for own in row] for row in scored], dtype=torch.float64)
            for name, score in SCORES.items()} | {
        "matched_R": like_L[sets_RK].mean(-1), "chosen": like_L[chosen].mean()[None], "shared": shared.float()[None]}


#: Penalties that the inner cross-validation chooses from, times the number of (standardised) features.
ALPHAS = 10.0 ** np.arange(-4, 4.5, 0.5)
FEWEST_DOMAINS = 5  # with fewer, no domain can be left out twice and a line still be fitted


def held_out_predictions(features_DF: np.ndarray, targets_DP: np.ndarray, alphas: np.ndarray = ALPHAS) -> np.ndarray:
    """Ridge regression's prediction for each domain from the others, D x P: nested leave-one-domain-out.

    Scaling, penalty and weights come from the other domains; the penalty is chosen by leave-one-out within them
    (scikit-learn's `RidgeCV`), for each target by itself.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(features_DF) < FEWEST_DOMAINS:
        raise StsError(f"{len(features_DF)} domains given; a probe with nested cross-validation needs at least "
                       f"{FEWEST_DOMAINS}.")
    # PCA drops nothing here. It turns the features into as many as there are domains, which a ridge penalty does not
    # notice, and so makes many targets cheap.
    ridge = RidgeCV(alphas * features_DF.shape[1], alpha_per_target=True)
    probe = make_pipeline(StandardScaler(), PCA(svd_solver="full"), ridge)
    return np.asarray(cross_val_predict(probe, features_DF, targets_DP, cv=LeaveOneOut())).reshape(targets_DP.shape)


def out_of_sample_r_squared(actual_D: np.ndarray, predicted_D: np.ndarray) -> float:
    """1 - squared error over that of the mean of the other domains; 0 for no better than that mean, at most 1."""
    others_D = (actual_D.sum() - actual_D) / (len(actual_D) - 1)
    total = ((actual_D - others_D) ** 2).sum()
    if total == 0:
        raise StsError("The target is the same in every domain, so no share of its variance is defined.")
    return float(1 - ((actual_D - predicted_D) ** 2).sum() / total)
