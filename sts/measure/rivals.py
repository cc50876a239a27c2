"""Rivals of the score: forecasts that read the training answers, take a gradient or act on the model, one value a
domain. Most have a sign: whether a domain's right answers become likelier. And forecasts with an interval.

Shape suffixes: E training examples, D domains, L latents (or raw dimensions), N points, M new points.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from sts.errors import StsError
from sts.measure.items import paired_mean_interval
from sts.measure.score import shifted_dimensions

#: Every rival: 1 if a larger value says that right answers become likelier, -1 if less likely, 0 if it has no sign; the
#: last two are the score's own latents with a direction. Fixed before any result was seen.
RIVALS = {"pd_raw": 1, "pd_sae": 1, "pd_chosen": 1, "injection_bits": -1, "injection_p_right": 1, "influence": -1,
          "closeness": 0, "logme": 0, "sts_split": 1, "icl_dot": 1}
LABELS = {"pd_raw": "projection, residual", "pd_sae": "projection, latents", "pd_chosen": "projection, D_N",
          "injection_bits": "injected, bits", "injection_p_right": "injected, p(right)", "influence": "gradients",
          "closeness": "closeness", "logme": "LogME", "sts_split": "risen less fallen", "icl_dot": "dot product"}
#: Which way each measure goes as right answers become likelier.
UP = {"accuracy": 1, "p_right": 1, "bits": -1, "accuracy_generated": 1}


def projection_difference(training_EL: torch.Tensor, own_EL: torch.Tensor, answers_DL: torch.Tensor,
                          chosen: Any = slice(None)) -> torch.Tensor:
    """How far each training answer leads from the untuned model's own answer to the same problem towards each domain's
    answers, E x D in float64; the mean over examples is the training set's. A persona vector with a domain in the place
    of a trait (Chen et al. 2025, arXiv 2507.21509): v_d is a domain's mean less that of all domains, at unit length.

    Args:
        training_EL, own_EL: mean state over each training answer's tokens, and over those of the model's own answer.
        answers_DL: mean state over the tokens of each domain's right answers.
        chosen: indices of dimensions, such as D_N; all of them by default.
    """
    directions_DL = (answers_DL - answers_DL.mean(0)).double()[:, chosen]
    return (training_EL - own_EL).double()[:, chosen] @ torch.nn.functional.normalize(directions_DL, dim=1).T


def closeness(rise_L: torch.Tensor, answers_DL: torch.Tensor, decoder_LD: torch.Tensor, count: int) -> torch.Tensor:
    """Mean cosine of the decoder directions of the `count` latents that rise most in the training answers and of as
    many that are most active in each domain's (Minegishi et al. 2026, arXiv 2605.00842)."""
    rows_LD = torch.nn.functional.normalize(decoder_LD.double(), dim=1)
    risen_D = rows_LD[shifted_dimensions(rise_L, count)].mean(0)
    return torch.stack([rows_LD[shifted_dimensions(own_L, count)].mean(0) @ risen_D for own_L in answers_DL])


def logme(features_NL: np.ndarray, labels_N: np.ndarray) -> float:
    """LogME (You et al. 2021, arXiv 2102.11005): the largest log evidence a point of a Bayesian linear model of a label
    (1 or 0), over the precisions of its prior and its noise, mean over labels."""
    from sklearn.linear_model import BayesianRidge

    flat = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    return float(np.mean([BayesianRidge(fit_intercept=False, compute_score=True, **flat).fit(
        features_NL, labels_N == label).scores_[-1] for label in np.unique(labels_N)]) / len(labels_N))


def exact_share(right_N: np.ndarray) -> dict[str, Any]:
    """n, share of truths, and its exact 95% interval of Clopper and Pearson."""
    ends = scipy_stats.binomtest(int(right_N.sum()), len(right_N)).proportion_ci(method="exact")
    return {"n": len(right_N), "share": float(right_N.mean()), "low": float(ends.low), "high": float(ends.high)}


def signs(forecast_N: np.ndarray, change_N: np.ndarray, blind: float = 1.0) -> dict[str, Any]:
    """How often a forecast's sign is that of a change other than zero: n, share with the exact interval of Clopper and
    Pearson (low, high), table, [[both up, forecast up alone], [change up alone, neither up]], and lead (mean, low,
    high): share right more than if all had the sign `blind`. `StsError` where nothing moved."""
    said_N, true_N = (np.sign(own[change_N != 0]) for own in (forecast_N, change_N))
    if not len(true_N):
        raise StsError("No domain moved, so no sign can be right; use a measure that did.")
    table = [[int((((said_N > 0) == up) & ((true_N > 0) == risen)).sum()) for risen in (True, False)]
             for up in (True, False)]
    lead = paired_mean_interval((said_N == true_N) - 1.0 * (true_N == np.sign(blind)))
    return exact_share(said_N == true_N) | {"table": table, "lead": lead._asdict()}


def jackknife_plus(x_N: np.ndarray, y_N: np.ndarray, x_M: np.ndarray, level: float, degree: int = 1) -> np.ndarray:
    """Lower and upper ends, 2 x M, of an interval for y at each new x, from the lines (of `degree` 0: means) without
    one point each and these points' residuals: the jackknife+ (Barber, Candès, Ramdas and Tibshirani 2021). Among
    exchangeable points it holds y at least 2 * level - 1 of the time, mostly `level`. `StsError` for too few points."""
    rank = math.ceil(level * (len(x_N) + 1) - 1e-9)
    if rank > len(x_N):
        raise StsError(f"An interval of level {level:g} takes {math.ceil(level / (1 - level) - 1e-9)} points; there "
                       f"are {len(x_N)}.")
    degree = degree if np.ptp(x_N) else 0  # a constant score says nothing
    lines = [np.polyfit(x_N[kept], y_N[kept], degree) for kept in ~np.eye(len(x_N), dtype=bool)]
    residual_N = np.array([abs(y - np.polyval(line, x)) for line, x, y in zip(lines, x_N, y_N, strict=True)])
    fitted_NM = np.array([np.polyval(line, x_M) for line in lines])
    low_NM, high_NM = (np.sort(fitted_NM + sign * residual_N[:, None], axis=0) for sign in (-1, 1))
    return np.stack([low_NM[len(x_N) - rank], high_NM[rank - 1]])


def coverage(cases: list[tuple[np.ndarray, ...]], level: float) -> dict[str, Any]:
    """How often intervals from known scores and changes hold new changes; a case is (score_N, change_N, score_M,
    change_M). n, share with its exact interval (low, high), mean width, that without a score (blind), that of the
    changes' central `level` (spread), and narrower: 1 - width / blind, mean."""
    (low_M, high_M), blind = (np.concatenate([jackknife_plus(x_N, y_N, x_M, level, degree)
                                              for x_N, y_N, x_M, _ in cases], axis=1) for degree in (1, 0))
    y_M, width_M, blind_M = np.concatenate([case[3] for case in cases]), high_M - low_M, blind[1] - blind[0]
    return exact_share((low_M <= y_M) & (y_M <= high_M)) | {
        "width": float(width_M.mean()), "blind": float(blind_M.mean()),
        "spread": float(np.ptp(np.quantile(y_M, [(1 - level) / 2, (1 + level) / 2]))),
        "narrower": float((1 - width_M / blind_M).mean())}
