"""How good an SAE is: variance explained, latents that never fire, and the loss with its reconstruction spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from sts.engine.models import LanguageModel, decoder_layers, resid_post
from sts.engine.residuals import batches
from sts.engine.sae_training import OUTLIER_NORM, shard_paths


def reconstruction_quality(sae, activations: Path) -> dict:
    """How well an SAE reconstructs stored activations.

    Returns:
        {"tokens", "fraction_of_variance_explained", "l0", "dead", "latents"}: explained variance is
        1 - sum ||x - x_hat||^2 / sum ||x - mean||^2; l0 the mean number of active latents a token; dead the number
        of latents that fire on none of the tokens.
    """
    count, l0 = 0, 0.0
    error = total = 0.0
    fired_L = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mean_D = activation_mean(activations)
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            activations_TD = shard.get_tensor("activations_TD").float()
        for x_TD in activations_TD.split(2048):
            with torch.inference_mode():
                latents_TL = sae.encode(x_TD.to(sae.device, sae.dtype))
                error += (x_TD - sae.decode(latents_TL).float().cpu()).double().square().sum().item()
            total += (x_TD - mean_D).double().square().sum().item()
            active_TL = (latents_TL > 0).cpu()
            fired_L |= active_TL.any(0)
            l0 += active_TL.sum().item()
            count += len(x_TD)
    return {"tokens": count, "fraction_of_variance_explained": 1 - error / total, "l0": l0 / count,
            "dead": int((~fired_L).sum()), "latents": sae.cfg.d_sae}


def activation_mean(activations: Path) -> torch.Tensor:
    """Mean of all stored activation vectors."""
    total, count = 0, 0
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            activations_TD = shard.get_tensor("activations_TD")
        total, count = total + activations_TD.double().sum(0), count + len(activations_TD)
    return (total / count).float()


def spliced_loss(lm: LanguageModel, sae, layer: int, pieces: list[list[int]], *, mean_D: torch.Tensor, tokens: int,
                 tokens_per_batch: int = 1024, report: Callable[[float], None] = lambda fraction: None) -> dict:
    """The model's next-token loss with the residual stream as it is, reconstructed by the SAE, and set to its mean.

    Args:
        mean_D: the mean activation (see `activation_mean`).
        tokens: about how many tokens to measure on.
        tokens_per_batch: tokens at once; the logits of 1,024 and their copies take 3 GB with a vocabulary of 262,144.

    Only content positions are replaced (see `content_mask`); attention sinks stay as they are.

    Returns:
        {"tokens", "clean", "spliced", "mean_ablated"} in nats a token, and "recovered", the share of the damage of
        mean ablation that the reconstruction avoids.
    """
    chosen, total = [], 0
    for piece in pieces:
        if total >= tokens:
            break
        chosen.append(piece)
        total += len(piece) - 1
    parts = list(batches([len(piece) for piece in chosen], tokens_per_batch))
    layer_module = decoder_layers(lm.model)[layer]
    replacements = {"clean": None, "spliced": lambda x_TD: sae(x_TD),
                    "mean_ablated": lambda x_TD: mean_D.to(x_TD.device, x_TD.dtype).expand_as(x_TD)}
    sums = dict.fromkeys(replacements, 0.0)
    for done, batch in enumerate(parts, 1):
        ids_BP, mask_BP = pad([chosen[index] for index in batch], lm.device)
        for name, replace in replacements.items():
            handle = layer_module.register_forward_hook(_splice(sae, replace, mask_BP)) if replace else None
            try:
                with torch.inference_mode():
                    logits_BPV = lm.model(input_ids=ids_BP, attention_mask=mask_BP.long(), use_cache=False).logits
            finally:
                if handle:
                    handle.remove()
            kept_BP = mask_BP[:, 1:]
            sums[name] += torch.nn.functional.cross_entropy(
                logits_BPV[:, :-1][kept_BP].float(), ids_BP[:, 1:][kept_BP], reduction="sum").item()
        report(done / len(parts))
    losses = {name: value / total for name, value in sums.items()}
    harm = losses["mean_ablated"] - losses["clean"]
    return {"tokens": total, **losses,
            "recovered": (losses["mean_ablated"] - losses["spliced"]) / harm if harm else math.nan}


def pad(pieces: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right and the mask of real tokens, both batch x positions."""
    longest = max(map(len, pieces))
    ids_BP = torch.zeros(len(pieces), longest, dtype=torch.long)
    mask_BP = torch.zeros(len(pieces), longest, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        ids_BP[row, :len(piece)] = torch.tensor(piece)
        mask_BP[row, :len(piece)] = True
    return ids_BP.to(device), mask_BP.to(device)


def content_mask(residual_BPD: torch.Tensor, mask_BP: torch.Tensor) -> torch.Tensor:
    """Which positions an SAE is for: real tokens, not the first of a text, without an outlier norm."""
    keep_BP = mask_BP.clone()
    keep_BP[:, 0] = False
    norms_BP = residual_BPD.float().norm(dim=-1)
    return keep_BP & (norms_BP <= OUTLIER_NORM * norms_BP[keep_BP].median())


def _splice(sae, replace: Callable[[torch.Tensor], torch.Tensor], mask_BP: torch.Tensor):
    def hook(module, args, output):
        residual_BPD = resid_post(output).clone()
        keep_BP = content_mask(residual_BPD, mask_BP)
        residual_BPD[keep_BP] = replace(residual_BPD[keep_BP].to(sae.dtype)).to(residual_BPD.dtype)
        return residual_BPD if isinstance(output, torch.Tensor) else (residual_BPD, *output[1:])
    return hook
