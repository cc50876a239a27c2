"""Rivals of the score: forecasts that read the training answers, take a gradient or act on the model, one value a domain.

Most have a sign: they say whether a domain's right answers become likelier. Nothing here runs a model.

Shape suffixes: E training examples, D domains, L latents (or raw dimensions).
"""

from __future__ import annotations

from typing import Any

import torch


def directions(answers_DL: torch.Tensor, chosen: Any = slice(None)) -> torch.Tensor:
    """v_d of each domain: its mean answer state less the mean over domains, at unit length within the chosen
    dimensions; a persona vector with a domain in the place of a trait (Chen et al. 2025, arXiv 2507.21509)."""
    return torch.nn.functional.normalize((answers_DL - answers_DL.mean(0))[:, chosen].double(), dim=1)


def projection_difference(training_EL: torch.Tensor, own_EL: torch.Tensor, answers_DL: torch.Tensor,
                          chosen: Any = slice(None)) -> torch.Tensor:
    """How far each training answer leads from the untuned model's own answer to the same problem towards each domain's
    answers, E x D in float64; the mean over examples is the training set's (arXiv 2507.21509, section 6).

    Args:
        training_EL, own_EL: mean state over each training answer's tokens, and over those of the model's own answer.
        answers_DL: mean state over the tokens of each domain's right answers.
        chosen: indices of dimensions, such as D_N; all of them by default.
    """
    return (training_EL - own_EL).double()[:, chosen] @ directions(answers_DL, chosen).T
