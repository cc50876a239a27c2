"""Ablations: the score with one setting changed, and how to compare many such scores over the same few domains.

A sweep changes one setting (an `Axis`) and leaves the others. What was forecast, the absolute change of each domain,
stays the same, so that two values of a setting are compared on the same domains, questions and seeds. Nothing here runs
a model.

Shape suffixes: L latents, N domains, S seeds, P pairs of scores, K scores, B resamples or orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sts.errors import StsError
from sts.measure.correlation import PermutationTest, _random_orders
from sts.measure.resampling import _basis, _residual_units, correlation_rows
from sts.measure.score import score_domain
from sts.measure.shift import shifted_dimensions

Stats = dict[str, torch.Tensor]
SCORES = ("sts_act", "sts_icl")


@dataclass(frozen=True)
class Axis:
    """One setting that is varied.

    Attributes:
        label: as tables and figures call it.
        figure: where the paper varies it; "" if it does not.
        claim: what the paper says of it; "" if nothing.
        ends: whether the claim compares the axis's first value with its last, and says that the last predicts worse.
    """

    label: str
    figure: str = ""
    claim: str = ""
    ends: bool = False


#: Every axis, in the order of the page.
AXES = {
    "bands": Axis("ranks of the latents", "Figure 4d", "Lower-ranked latents predict worse", True),
    "top_n": Axis("number of latents, N"),
    "variant": Axis("formulas"),
    "width": Axis("SAE width", "Figure 4a", "A wider SAE predicts worse", True),
    "width_share": Axis("SAE width, N in proportion"),
    "layer": Axis("layer", "Figure 4b", "All layers predict"),
    "k": Axis("active latents a token, k", "Figure 4c, Table 12", "A less sparse SAE predicts worse", True),
    "norms": Axis("decoder norms"),
    "demonstrations": Axis("demonstrations, domain (m)"),
    "shift_demonstrations": Axis("demonstrations, training set"),
    "score_tokens": Axis("tokens a domain"),
    "shift_tokens": Axis("tokens, training set"),
    "masks": Axis("tokens that count"),
}
#: Those whose values are SAEs of the sweep; the run's own SAE has no place in them.
SAE_AXES = ("width", "width_share", "layer", "k", "norms")
#: Setting that lists the other values of a setting of the forecast -> that setting.
SETTINGS = {"sweep_demonstrations": "demonstrations", "sweep_shift_demonstrations": "shift_demonstrations",
            "sweep_tokens": "score_tokens", "sweep_shift_tokens": "shift_tokens"}
#: Names in `sweep_masks` -> what a table calls it, and what of `activations.Masks` is switched off.
MASKS_OFF = {"whole_prompt": ("template too", {"question_tokens_only": False}),
             "first_positions": ("template and first positions too",
                                 {"question_tokens_only": False, "drop_first_positions": 0}),
             "outliers": ("outlier norms too", {"outlier_norm": 0.0}),
             "none": ("all tokens", {"question_tokens_only": False, "drop_first_positions": 0, "outlier_norm": 0.0})}


# --- which values -------------------------------------------------------------------------------------------------

def forecast_values(settings) -> Iterator[tuple[str, str, dict]]:
    """Values of settings of the forecast that a run sweeps: axis, what a table calls the value, settings to change.

    Args:
        settings: `config.Run`. An axis whose list is empty is left out; the run's own value changes nothing and stands
            in its place in the order.
    """
    for listed, name in SETTINGS.items():
        own, values = getattr(settings, name), getattr(settings, listed)
        for value in sorted({own, *values}) if values else ():
            yield name, f"{value:,}", {} if value == own else {name: value}
    if settings.sweep_masks:
        yield "masks", "as in this run", {}
        for name in settings.sweep_masks:
            yield "masks", *MASKS_OFF[name]


@dataclass(frozen=True)
class SaeSpec:
    """An SAE of the sweep: its site and size."""

    layer: int
    latents: int
    k: int

    @property
    def name(self) -> str:
        return f"layer{self.layer}-latents{self.latents}-k{self.k}"


def sae_values(settings) -> dict[str, list[SaeSpec]]:
    """axis -> SAEs of the sweep in the order of its values; empty if the run sweeps none.

    The SAE in the middle, `own_sae`, stands in every axis. It is trained as the others are: the run's own SAE may have
    seen more text, and would not be comparable.
    """
    own = own_sae(settings)
    axes = {"width": [SaeSpec(own.layer, width, own.k) for width in sorted({own.latents, *settings.sweep_widths})],
            "layer": [SaeSpec(layer, own.latents, own.k) for layer in sorted({own.layer, *settings.sweep_layers})],
            "k": [SaeSpec(own.layer, own.latents, k) for k in sorted({own.k, *settings.sweep_k})]}
    return {axis: specs for axis, specs in axes.items() if len(specs) > 1}


def own_sae(settings) -> SaeSpec:
    """The SAE in the middle of the sweep: the run's layer, sae_latents and sae_k."""
    return SaeSpec(settings.layer, settings.sae_latents, settings.sae_k)


# --- scores -------------------------------------------------------------------------------------------------------

def ranking(shift: Stats) -> torch.Tensor:
    """All latents, most shifted first."""
    return shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], len(shift["squared_difference_L"]))


def rows_of(axis: str, value: str, own: bool, chosen: torch.Tensor, domains: Mapping[str, Stats]) -> list[dict]:
    """The paper's scores of every domain with chosen latents: axis, value, own, domain, sts_act, sts_icl."""
    found = {domain: score_domain("paper", stats, chosen) for domain, stats in domains.items()}
    return [{"axis": axis, "value": value, "own": own, "domain": domain, **{name: row[name] for name in SCORES}}
            for domain, row in found.items()]


def band_rows(shift: Stats, domains: Mapping[str, Stats], size: int, count: int) -> list[dict]:
    """Scores with ranks 1 to `size`, then the next as many, and so on: `count` bands, or as many as there are whole.

    Raises:
        StsError: not even one band fits.
    """
    order = ranking(shift)
    if size > len(order):
        raise StsError(f"A band of {size} ranks was asked for; the SAE has {len(order)} latents. Set top_n lower.")
    firsts = range(0, min(count, len(order) // size) * size, size)
    return [row for first in firsts for row in rows_of("bands", f"{first + 1:,}-{first + size:,}", first == 0,
                                                       order[first:first + size], domains)]


def number_rows(shift: Stats, domains: Mapping[str, Stats], own: int, others: Sequence[int]) -> list[dict]:
    """Scores with the `own` number of latents and with others; those beyond the SAE's width are left out."""
    order = ranking(shift)
    return [row for number in sorted({own, *others}) if number <= len(order)
            for row in rows_of("top_n", f"{number:,}", number == own, order[:number], domains)]


def unfolded(stats: Stats, norms_L: torch.Tensor) -> Stats:
    """The sums that latents would have without decoder norms folded in.

    Args:
        stats: sums of latents after folding, each of which is the latent before times its decoder norm.
        norms_L: decoder norms before folding, up to one common factor, which no correlation notices.
    """
    return stats | {"base_sum_L": stats["base_sum_L"] / norms_L,
                    "squared_difference_L": stats["squared_difference_L"] / norms_L**2}


# --- comparing ----------------------------------------------------------------------------------------------------

def swap_tests(first_PSN: np.ndarray, second_PSN: np.ndarray, change_SN: np.ndarray, *, exact_up_to: int = 14,
               resamples: int = 16_384, seed: int = 0) -> list[PermutationTest]:
    """Two-sided p of the difference of two scores' correlations with the same changes, mean over seeds.

    Each score is standardised over domains. If the two are interchangeable, swapping them within a domain changes
    nothing but chance, so the difference is set beside those after every swapping of some domains' values, the same
    domains in all seeds. Up to `exact_up_to` domains all 2^N swappings are counted.

    Args:
        first_PSN, second_PSN: the two scores of each pair, for each seed and domain.
        change_SN: what both predict.

    Returns:
        One test a pair; p is 1 for equal scores and NaN where a score or the change is constant.
    """
    first_PSN, second_PSN, change_SN = (np.asarray(one, float) for one in (first_PSN, second_PSN, change_SN))
    pairs, _, n = first_PSN.shape
    basis = _basis(None, (n,))
    one_PSN, two_PSN = (_residual_units(values, basis) for values in (first_PSN, second_PSN))
    goal_SN = _residual_units(change_SN, basis)
    exact = n <= exact_up_to
    if exact:
        swaps_BN = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    else:
        swaps_BN = np.random.default_rng(seed).integers(0, 2, (resamples, n)).astype(float)
    found_BP = np.zeros((len(swaps_BN), pairs))
    observed_P = np.zeros(pairs)
    for one_PN, two_PN, goal_N in zip(one_PSN.swapaxes(0, 1), two_PSN.swapaxes(0, 1), goal_SN, strict=True):
        observed_P += one_PN @ goal_N - two_PN @ goal_N
        # Sum, square sum and product with the goal after a swapping are linear in which domains are swapped.
        gain_BP, square_BP, product_BP = (swaps_BN @ (new - old).T for new, old in (
            (two_PN, one_PN), (two_PN**2, one_PN**2), (two_PN * goal_N, one_PN * goal_N)))
        for sign, own_PN in ((1, one_PN), (-1, two_PN)):
            # The units sum to zero and have length one before anything is swapped.
            spread_BP = np.maximum(1 + sign * square_BP - (sign * gain_BP) ** 2 / n, 0)
            with np.errstate(invalid="ignore", divide="ignore"):
                found_BP += sign * (own_PN @ goal_N + sign * product_BP) / np.sqrt(spread_BP)
    # Where a swapped score is constant the difference does not exist; counted as extreme, to be on the safe side.
    extreme_BP = ~(np.abs(found_BP) < np.abs(observed_P) - 1e-12)
    counts_P, total = extreme_BP.sum(0), len(swaps_BN)
    p_P = counts_P / total if exact else (counts_P + 1) / (total + 1)
    return [PermutationTest(float(p) if np.isfinite(observed) else float("nan"), exact, total)
            for p, observed in zip(p_P, observed_P, strict=True)]


@dataclass(frozen=True)
class BestOf:
    """The largest of several correlations, and how large the largest is by chance.

    Attributes:
        index: which score it is.
        pearson: its r, mean over seeds.
        scores: how many scores were tried, K.
        chance_mean: mean over orders of the largest of K correlations.
        chance_high: what it exceeds in 5% of orders.
        single_high: the same for one score that was fixed beforehand (mean over the K scores).
        p: share of orders whose largest reaches the observed one, which counts as one of them.
        orders: how many random orders.
    """

    index: int
    pearson: float
    scores: int
    chance_mean: float
    chance_high: float
    single_high: float
    p: float
    orders: int


def best_of(scores_KSN: np.ndarray, change_SN: np.ndarray, *, orders: int = 10_000, seed: int = 0) -> BestOf:
    """What picking the best of K scores gives by chance: the largest r over scores when domains are shuffled.

    Domains are shuffled in the same order for all scores and seeds, so that scores that are alike count as alike
    (the maximum statistic of Westfall and Young 1993). Large positive values count, as in the paper's claim.

    Raises:
        StsError: a score or change is constant.
    """
    scores_KSN, change_SN = np.asarray(scores_KSN, float), np.asarray(change_SN, float)
    observed_K = correlation_rows(scores_KSN, change_SN[None]).mean(-1)
    if not np.isfinite(observed_K).all():
        raise StsError("A score or the change is the same in every domain, so that no correlation is defined; leave "
                       "it out first.")
    seeds, n = change_SN.shape
    basis = _basis(None, (n,))
    flat_KM = _residual_units(scores_KSN, basis).reshape(len(scores_KSN), -1) / seeds
    goal_SN = _residual_units(change_SN, basis)
    found_BK = np.concatenate([goal_SN[:, order_BN].swapaxes(0, 1).reshape(len(order_BN), -1) @ flat_KM.T
                               for order_BN in _random_orders(n, orders, np.random.default_rng(seed))])
    largest_B = found_BK.max(1)
    best = int(observed_K.argmax())
    reached = int((largest_B >= observed_K[best] - 1e-12).sum())
    return BestOf(best, float(observed_K[best]), len(scores_KSN), float(largest_B.mean()),
                  float(np.quantile(largest_B, 0.95)), float(np.quantile(found_BK, 0.95, axis=0).mean()),
                  (reached + 1) / (orders + 1), orders)


def different(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores without those that equal an earlier one: a run's own value stands in several sweeps."""
    seen: dict[bytes, str] = {}
    for name, values in scores.items():
        seen.setdefault(np.ascontiguousarray(values, float).tobytes(), name)
    return {name: scores[name] for name in seen.values()}
