"""Baselines beside the score: other numbers that might tell which domains move, one value a domain.

Each function takes sums, texts or features and returns values; nothing here runs a model. Every baseline is oriented so
that, if it forecasts at all, a larger value should go with a larger absolute change.

Shape suffixes: L latents (or raw dimensions), D domains, R random sets, K latents of one set, F features, P targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas
import torch

from sts.errors import StsError, one_of
from sts.measure.score import score_domain
from sts.measure.sets import matched_latents, random_latents
from sts.measure.shift import shifted_dimensions

Stats = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Predictor:
    """One row of the chapter's table.

    Attributes:
        label: as tables and figures call it.
        group: heading it stands under.
        forecast: whether it is known before fine-tuning; the others need the tuned model.
    """

    label: str
    group: str
    forecast: bool = True


_SCORE, _LATENTS, _RAW, _TRAINING = "the score", "other latents", "raw dimensions", "likeness to the training set"
_DOMAIN, _PROBE, _AFTER = "the domain itself", "optimised probes", "after fine-tuning"

#: Everything that has one value a domain and seed, in the order of the table.
PREDICTORS = {
    "sts_act": Predictor("STS_act", _SCORE),
    "sts_icl": Predictor("STS_ICL", _SCORE),
    "all_act": Predictor("STS_act, all latents", _LATENTS),
    "all_icl": Predictor("STS_ICL, all latents", _LATENTS),
    "raw_act": Predictor("STS_act, raw dimensions", _RAW),
    "raw_square": Predictor("mean square, raw dimensions", _RAW),
    "raw_icl": Predictor("STS_ICL, raw dimensions", _RAW),
    "cosine_raw": Predictor("cosine, mean residual", _TRAINING),
    "cosine_raw_centred": Predictor("cosine, mean residual, centred", _TRAINING),
    "cosine_sae": Predictor("cosine, mean latents", _TRAINING),
    "tfidf": Predictor("TF-IDF similarity of questions", _TRAINING),
    "base_bits": Predictor("bits per character before", _DOMAIN),
    "base_bits_answer": Predictor("bits per answer before", _DOMAIN),
    "question_tokens": Predictor("length of the questions", _DOMAIN),
    "answer_shortness": Predictor("1 / length of the answers", _DOMAIN),
    "probe_raw": Predictor("probe on raw activations", _PROBE),
    "probe_sae": Predictor("probe on SAE activations", _PROBE),
    "actual_act": Predictor("STS_act, latents training moved", _AFTER, forecast=False),
    "actual_icl": Predictor("STS_ICL, latents training moved", _AFTER, forecast=False),
    "change_cosine": Predictor("1 - cosine, residual before and after", _AFTER, forecast=False),
    "change_rms": Predictor("change of the residual, RMS", _AFTER, forecast=False),
    "change_sae": Predictor("change of all latents, squared", _AFTER, forecast=False),
}
#: What random sets of latents are matched to D_N in.
RANDOM = {"uniform": "random latents", "rate": "random, like firing rates", "energy": "random, like energy"}
SCORES = {"act": "sts_act", "icl": "sts_icl"}


# --- scores on other dimensions -----------------------------------------------------------------------------------

def dimension_scores(shift: Stats, domains: Mapping[str, Stats], count: int) -> pandas.DataFrame:
    """The paper's scores on the `count` dimensions that `shift` moves most: columns act, icl, by domain.

    Args:
        shift: `PairedStats.to_tensors()` of latents or of raw dimensions; `count` may be their whole number.

    Raises:
        StsError: more dimensions than there are.
    """
    chosen = shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], count)
    rows = {domain: score_domain("paper", stats, chosen) for domain, stats in domains.items()}
    return pandas.DataFrame({name: {domain: row[score] for domain, row in rows.items()}
                             for name, score in SCORES.items()})


def mean_square(shift: Stats, domains: Mapping[str, Stats], count: int) -> pandas.Series:
    """Squared values of the `count` most shifted dimensions, summed and averaged over tokens, by domain.

    The score for dimensions with both signs, whose plain sum would cancel.
    """
    chosen = shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], count)
    return pandas.Series({domain: (stats["base_square_sum_L"][chosen].sum() / stats["tokens"]).item()
                          for domain, stats in domains.items()})


def mean_vectors(domains: Mapping[str, Stats]) -> torch.Tensor:
    """Mean activation of every domain without demonstrations, D x L, in float64."""
    return torch.stack([stats["base_sum_L"].double() / stats["tokens"] for stats in domains.values()])


# --- likeness -----------------------------------------------------------------------------------------------------

def training_cosine(domains: Mapping[str, Stats], training: Stats, *, centred: bool = False) -> pandas.Series:
    """Cosine of each domain's mean activation with the training set's, -1 to 1.

    Args:
        centred: take the mean over domains off both first. Residual streams share one large direction, so that all
            plain cosines are close to 1.
    """
    means_DL, own_L = mean_vectors(domains), training["base_sum_L"].double() / training["tokens"]
    if centred:
        means_DL, own_L = means_DL - means_DL.mean(0), own_L - means_DL.mean(0)
    cosines_D = torch.nn.functional.cosine_similarity(means_DL, own_L[None], dim=-1)
    return pandas.Series(cosines_D.numpy(), index=list(domains))


def tfidf_similarity(domains: Mapping[str, Sequence[str]], training: Sequence[str]) -> pandas.Series:
    """Cosine of each domain's mean TF-IDF vector with the training set's, 0 to 1.

    Every text is one document (scikit-learn's `TfidfVectorizer`, its own defaults); document frequencies are counted
    over all texts together.

    Raises:
        StsError: no text at all, or texts without a word of two letters.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    names, texts = list(domains), [text for own in domains.values() for text in own]
    try:
        weights = TfidfVectorizer().fit_transform([*texts, *training])
    except ValueError as error:
        raise StsError(f"TF-IDF of {len(texts) + len(training)} texts: {error}. Texts with words of two letters or "
                       "more work.") from error
    ends = np.cumsum([len(domains[name]) for name in names])
    parts = [*np.split(np.arange(len(texts)), ends[:-1]), np.arange(len(texts), weights.shape[0])]
    means = normalize(np.vstack([np.asarray(weights[rows].mean(axis=0)) for rows in parts]))
    return pandas.Series(means[:-1] @ means[-1], index=names)


def model_change(domains: Mapping[str, Stats]) -> pandas.DataFrame:
    """How far fine-tuning moved the residual stream on each domain's questions: no forecast.

    Args:
        domains: domain -> base_sum_L and tuned_sum_L, squared_difference_L (raw dimensions), latents_squared (of all
            SAE latents together) and tokens.

    Returns:
        By domain: change_cosine (1 - cosine of the two mean vectors), change_rms (root mean square length of a token's
        change, in units of the residual stream), change_sae (squared change of the latents a token).
    """
    rows = {}
    for domain, stats in domains.items():
        cosine = torch.nn.functional.cosine_similarity(stats["base_sum_L"], stats["tuned_sum_L"], dim=0)
        rows[domain] = {"change_cosine": 1 - cosine.item(),
                        "change_rms": (stats["squared_difference_L"].sum() / stats["tokens"]).sqrt().item(),
                        "change_sae": (stats["latents_squared"] / stats["tokens"]).item()}
    return pandas.DataFrame(rows).T


# --- random latents -----------------------------------------------------------------------------------------------

def random_set_scores(kind: str, shift: Stats, domains: Mapping[str, Stats], count: int, draws: int,
                      seed: int) -> dict[str, torch.Tensor]:
    """Scores with random sets of latents in place of D_N.

    Args:
        kind: `uniform`, or what the sets imitate of D_N on the training questions: `rate` (share of tokens on which a
            latent fires) or `energy` (mean square).
        draws: number of sets, none of which holds a latent of D_N.

    Returns:
        act_RD and icl_RD (scores), matched_R (mean rate or energy of each set), chosen (that of D_N, one value), shared
        (`shared_share` of the sets, one value).

    Raises:
        StsError: an unknown kind, or fewer latents left than chosen.
    """
    if kind not in RANDOM:
        raise one_of("Kind of random latents", kind, RANDOM)
    width = len(shift["squared_difference_L"])
    if 2 * count > width:
        raise StsError(f"Random sets of {count} latents beside the {count} chosen ones were asked of {width} latents. "
                       f"Set top_n to at most {width // 2}.")
    chosen = shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], count)
    like_L = shift["base_square_sum_L" if kind == "energy" else "base_fired_L"] / shift["tokens"]
    # Seeds of one draw and the next must not meet those of another run's seed.
    seeds = [100_000 * seed + draw for draw in range(draws)]
    sets_RK = torch.stack([random_latents(width, chosen, count, own) if kind == "uniform"
                           else matched_latents(like_L, chosen, own) for own in seeds])
    sums = {"act": mean_vectors(domains),
            "icl": torch.stack([stats["squared_difference_L"] / stats["tokens"] for stats in domains.values()])}
    return {f"{name}_RD": torch.stack([values_L[sets_RK].sum(-1) for values_L in values_DL], dim=1)
            for name, values_DL in sums.items()} | {
        "matched_R": like_L[sets_RK].mean(-1), "chosen": like_L[chosen].mean()[None],
        "shared": torch.tensor([shared_share(sets_RK, width)])}


def shared_share(sets_RK: torch.Tensor, width: int) -> float:
    """Share of their latents that two of R sets have in common, mean over all pairs; 1 if there is but one set.

    Sets that share most of their latents are one comparison, and not R.
    """
    draws, count = sets_RK.shape
    if draws < 2:
        return 1.0
    times_L = torch.bincount(sets_RK.flatten(), minlength=width).double()  # in how many sets each latent is
    return (times_L * (times_L - 1)).sum().item() / (draws * (draws - 1) * count)


# --- probes -------------------------------------------------------------------------------------------------------

#: Penalties that the inner cross-validation chooses from, for features scaled to a mean square length of one.
ALPHAS = 10.0 ** np.arange(-4, 4.5, 0.5)
#: With fewer domains, no domain can be left out twice and a line still be fitted.
FEWEST_DOMAINS = 5


def held_out_predictions(features_DF: np.ndarray, targets_DP: np.ndarray,
                         alphas: Sequence[float] = ALPHAS) -> np.ndarray:
    """Ridge regression's prediction for each domain from the others: nested leave-one-domain-out.

    Outer loop: a domain is left out; scaling, penalty and weights come from the others. Inner loop: the penalty is
    chosen by leave-one-out within them (scikit-learn's `RidgeCV`), for each target by itself.

    Args:
        features_DF: a row of features a domain; there may be far more features than domains.
        targets_DP: one or more targets, predicted independently.

    Returns:
        Predictions, D x P, each made without the domain's own target.

    Raises:
        StsError: fewer than five domains, or values that are not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    features_DF, targets_DP = np.asarray(features_DF, float), np.asarray(targets_DP, float)
    if len(features_DF) < FEWEST_DOMAINS:
        raise StsError(f"{len(features_DF)} domains given; a probe with nested cross-validation needs at least "
                       f"{FEWEST_DOMAINS}.")
    if not (np.isfinite(features_DF).all() and np.isfinite(targets_DP).all()):
        raise StsError("Features or targets hold NaN or infinite values; leave those domains out first.")
    scale = FunctionTransformer(lambda values_DF: values_DF / np.sqrt(values_DF.shape[1]))
    # PCA drops nothing here. It turns the features into as many as there are domains, which a ridge penalty does not
    # notice, and so makes many targets cheap.
    probe = make_pipeline(StandardScaler(), scale, PCA(svd_solver="full"), RidgeCV(alphas, alpha_per_target=True))
    predictions_DP = np.empty_like(targets_DP)
    for left in range(len(features_DF)):
        others = np.arange(len(features_DF)) != left
        probe.fit(features_DF[others], targets_DP[others])
        predictions_DP[left] = probe.predict(features_DF[left:left + 1])
    return predictions_DP


def out_of_sample_r_squared(actual_D: np.ndarray, predicted_D: np.ndarray) -> float:
    """1 - squared error over that of the mean of the other domains; 0 for no better than that mean, at most 1.

    Unlike a correlation it is not biased by leaving one out: the mean of the others scores exactly 0.

    Raises:
        StsError: a constant target.
    """
    actual_D = np.asarray(actual_D, float)
    others_D = (actual_D.sum() - actual_D) / (len(actual_D) - 1)
    total = ((actual_D - others_D) ** 2).sum()
    if total == 0:
        raise StsError("The target is the same in every domain, so no share of its variance is defined.")
    return float(1 - ((actual_D - predicted_D) ** 2).sum() / total)
