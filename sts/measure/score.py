"""STS, the SAE-based transferability score, in two named variants.

`paper`: the formulas of arXiv 2603.02908, section 3: activations summed over the shifted latents and averaged over
tokens; changes taken between the same token without and behind demonstrations.

`official_code`: what the notebook of the official repository computes: squared activations averaged over tokens and
latents; changes taken between row r of two separate runs.
"""

from __future__ import annotations

import torch

from sts.errors import one_of
from sts.measure.shift import shifted_dimensions

VARIANTS = ("paper", "official_code")


def score_domain(variant: str, stats: dict[str, torch.Tensor], dimensions: torch.Tensor) -> dict[str, float]:
    """STS_act and STS_ICL of one domain.

    Args:
        variant: one of `VARIANTS`.
        stats: the domain's `PairedStats.to_tensors()`: token-paired for `paper`, row-paired for `official_code`.
        dimensions: indices of the shifted latents.

    Returns:
        {"sts_act": ..., "sts_icl": ..., "tokens": ...}; units: activation (paper's act), squared activation (others).
    """
    tokens = stats["tokens"].item()
    changed = stats["squared_difference_L"][dimensions].sum().item() / tokens
    if variant == "paper":
        active = stats["base_sum_L"][dimensions].sum().item() / tokens
        return {"sts_act": active, "sts_icl": changed, "tokens": tokens}
    if variant == "official_code":
        count = len(dimensions)
        active = stats["base_square_sum_L"][dimensions].sum().item() / tokens / count
        return {"sts_act": active, "sts_icl": changed / count, "tokens": tokens}
    raise one_of("Score variant", variant, VARIANTS)


def score_domains(variant: str, shift: dict[str, torch.Tensor], domains: dict[str, dict[str, torch.Tensor]],
                  top_n: int) -> list[dict]:
    """Scores of all domains, as rows {"variant", "domain", "sts_act", "sts_icl", "tokens"}.

    Args:
        shift: the training domain's paired statistics, of the pairing that `variant` calls for.
        domains: domain -> its paired statistics, likewise.
        top_n: N, the number of shifted latents.
    """
    dimensions = shifted_dimensions(shift["squared_difference_L"] / shift["tokens"], top_n)
    return [{"variant": variant, "domain": domain, **score_domain(variant, stats, dimensions)}
            for domain, stats in domains.items()]
