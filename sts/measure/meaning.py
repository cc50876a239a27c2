"""Which kind of text a latent is of: labels by a rule that needs no judge, and how many latents of a list have one.

Shape suffixes: D documents, K kinds of text, L latents, B shuffles or resamples (of labels and values the first row is
what was observed). Sums by document are kind_D (the place of its kind), tokens_D, and by latent sum_DL and fired_DL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from statsmodels.stats.multitest import multipletests

from sts.measure.correlation import ALPHA, percentile_interval, plain, random_orders

#: Share of a latent's activation that must lie in one kind of text for it to be of that kind.
SHARE = 0.5
#: Labels of latents of no one kind, and of those that never fire.
SEVERAL, SILENT = "several", "silent"
#: Shuffles and resamples at most, and how many are computed at once.
SHUFFLES, RESAMPLES, AT_ONCE = 10_000, 2_000, 100


def shares(sums: Mapping[str, Any], members_BKD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean activation per token in each kind, B x K x L, by how often each document counts in each kind; and what share
    of their sum lies in each, as if there were as many tokens of each: 0 for a silent latent."""
    flat, sum_DL, tokens_D = np.concatenate(members_BKD), *(np.asarray(sums[name], float) for name in (
        "sum_DL", "tokens_D"))
    mean_BKL = (flat @ sum_DL / (flat @ tokens_D)[:, None]).reshape(*members_BKD.shape[:2], -1)
    return mean_BKL, mean_BKL / np.maximum(mean_BKL.sum(1, keepdims=True), np.finfo(float).tiny)


def label_latents(sums: Mapping[str, Any], kinds: Sequence[str], *, permutations: int, seed: int) -> pandas.DataFrame:
    """The rule's labels, one row a latent: latent, label, kind (of its largest share), share, p (documents shuffled
    among kinds give as large a share), p_adjusted (Benjamini and Hochberg's, over latents that fire), rate (share of
    tokens on which it fires) and, "in" each kind, its mean activation. It is labelled as its kind where share reaches
    `SHARE` and p_adjusted is below 0.05."""
    members_KD = (np.asarray(sums["kind_D"]) == np.arange(len(kinds))[:, None]).astype(float)
    (mean_KL,), (share_KL,) = shares(sums, members_KD[None])
    fires_L, reached_L, generator = mean_KL.any(0), 1, np.random.default_rng(seed)
    rounds = min(permutations, SHUFFLES) // AT_ONCE
    for _ in range(rounds):
        shuffled_BKD = members_KD[:, random_orders(members_KD.shape[1], AT_ONCE, generator)].swapaxes(0, 1)
        reached_L = reached_L + (shares(sums, shuffled_BKD)[1].max(1) >= share_KL.max(0) - 1e-12).sum(0)
    found = pandas.DataFrame({
        "latent": np.arange(len(fires_L)), "label": SILENT, "kind": np.array(kinds)[share_KL.argmax(0)],
        "share": share_KL.max(0), "p": np.where(fires_L, reached_L / (1 + rounds * AT_ONCE), np.nan),
        "p_adjusted": np.nan, "rate": np.asarray(sums["fired_DL"], float).sum(0) / float(sum(sums["tokens_D"])),
        **{f"in {kind}": mean_L for kind, mean_L in zip(kinds, mean_KL, strict=True)}})
    found.loc[fires_L, "p_adjusted"] = multipletests(found["p"][fires_L], method="fdr_bh")[1]
    clear = (found["share"] >= SHARE) & (found["p_adjusted"] < ALPHA)
    found.loc[fires_L, "label"] = found["kind"].where(clear, SEVERAL)
    return found


def resampled_labels(sums: Mapping[str, Any], labels: pandas.DataFrame, kinds: Sequence[str], *, resamples: int,
                     seed: int) -> np.ndarray:
    """Places of labels in `kinds`, -1 for none, (1 + B) x L: as observed, and with each kind's documents drawn with
    replacement, where what was significant with all of them is taken for that."""
    members_KD = (np.asarray(sums["kind_D"]) == np.arange(len(kinds))[:, None]).astype(float)
    tested_L, generator, rows = labels["p_adjusted"].to_numpy() < ALPHA, np.random.default_rng(seed), []
    for size in (1, *[AT_ONCE] * (min(resamples, RESAMPLES) // AT_ONCE)):
        drawn_BKD = members_KD[None] if size == 1 else np.stack([generator.multinomial(
            int(own_D.sum()), own_D / own_D.sum(), size) for own_D in members_KD], axis=1)
        _, share_BKL = shares(sums, drawn_BKD)
        rows.append(np.where(tested_L & (share_BKL.max(1) >= SHARE), share_BKL.argmax(1), -1).astype(np.int8))
    return np.concatenate(rows)


def compared(values: Mapping[str, np.ndarray], **about: Any) -> list[dict[str, Any]]:
    """A row a list, from its value as observed and in every resample: value with its interval, and the same of what the
    first list has more (`less`)."""
    def known(values_B: np.ndarray) -> dict[str, Any]:
        return {"value": float(values_B[0]), "interval": percentile_interval(values_B[1:])}
    first, *_ = values.values()
    return plain([{"list": name, **about, **known(own_B), "less": known(first - own_B)}
                  for name, own_B in values.items()])


def agreement(first: Sequence[str], second: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Cohen's kappa of two lists of labels (`value`), with its interval over latents; None for one label throughout."""
    from sklearn.metrics import cohen_kappa_score

    labels_2N, n = np.array([first, second]), len(first)
    drawn_BN = [np.arange(n), *np.random.default_rng(seed).integers(0, n, (min(resamples, RESAMPLES), n))]
    kappa_B = np.array([cohen_kappa_score(*own_2N) if len(np.unique(own_2N)) > 1 else np.nan
                        for own_2N in (labels_2N[:, drawn_N] for drawn_N in drawn_BN)])
    return compared({"": kappa_B}, n=n)[0]
