"""How good an SAE is, and what its latents stand for: the texts they fire on, and the tokens they promote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open

from sts.engine.latents import Encoder, LatentStats, encode_chunks
from sts.engine.models import LanguageModel, decoder_layers, logits_at, resid_post
from sts.engine.residuals import OUTLIER_NORM, SINK_SAMPLE, batches, sink_norms
from sts.engine.sae_training import shard_paths
from sts.engine.zeroing import lower_layers_once, replaced
from sts.errors import StsError

#: By model: what a second SAE spliced into the same texts need not compute again.
_KEPT: WeakKeyDictionary[torch.nn.Module, dict] = WeakKeyDictionary()
#: Bars of a latent's histogram.
BARS = 12


# --- quality ------------------------------------------------------------------------------------------------------

def reconstruction_quality(sae, activations: Path) -> dict[str, Any]:
    """How well an SAE reconstructs stored activations: {"tokens", "fraction_of_variance_explained" (1 - sum
    ||x - x_hat||^2 / sum ||x - mean||^2), "l0" (mean active latents a token), "dead" (latents that never fire),
    "latents"}."""
    count, l0, error, total = 0, 0, 0.0, 0.0
    fired_L = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mean_D = activation_mean(activations)
    for shard in _shards(activations):
        for x_TD in torch.split(shard["activations_TD"].float(), 2048):
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


def _shards(activations: Path) -> Iterator[dict[str, torch.Tensor]]:
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            yield {name: shard.get_tensor(name) for name in ("activations_TD", "piece_T", "position_T")}


def activation_mean(activations: Path) -> torch.Tensor:
    """Mean of all stored activation vectors."""
    total: torch.Tensor = torch.zeros(1, dtype=torch.float64)
    count = 0
    for shard in _shards(activations):
        total, count = total + shard["activations_TD"].double().sum(0), count + len(shard["piece_T"])
    return (total / count).float()


def spliced_loss(lm: LanguageModel, sae, layer: int, pieces: list[list[int]], *, mean_D: torch.Tensor, tokens: int,
                 tokens_per_batch: int = 1024, report: Callable[[float], None] = lambda fraction: None) -> dict:
    """The model's next-token loss with the residual stream as it is, reconstructed by the SAE, and set to its mean.

    Only content is replaced: not the first token of a piece, nor attention sinks (`residuals.sink_norms`). The layers
    below run once, and for a second SAE on the same texts not at all.

    Args:
        mean_D: the mean activation (see `activation_mean`).
        tokens: about how many tokens to measure on.
        tokens_per_batch: tokens at once; the logits of 1,024 and their copies take 3 GB with a vocabulary of 262,144.

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
    texts = (layer, tuple(map(tuple, chosen)), tokens_per_batch)
    kept = _KEPT.setdefault(lm.model, {})
    if texts not in kept:  # of one set of texts at a time
        kept.clear()
        kept[texts] = {"layers": {}}
    known = kept[texts]
    parts = list(batches([len(piece) for piece in chosen], tokens_per_batch))
    mean, done = ("mean_ablated", mean_D.numpy().tobytes()), 0

    def loss(change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> float:
        nonlocal done
        whole = 0.0
        for batch in parts:
            whole += _loss(lm, layer, [chosen[index] for index in batch], known, change)
            done += 1
            report(min(1.0, done / (3 * len(parts))))
        return whole / total

    with lower_layers_once(lm, layer, kept=known["layers"]):
        if "clean" not in known:
            rows = {}
            handle = decoder_layers(lm.model)[layer].register_forward_hook(
                lambda module, args, output: rows.update({len(rows): resid_post(output)}))
            try:
                known["clean"] = loss()
            finally:
                handle.remove()
            first = [rows[number][row, 1:len(chosen[index])] for number, batch in enumerate(parts)
                     for row, index in enumerate(batch) if index < SINK_SAMPLE]
            known["limit"], = sink_norms(first, OUTLIER_NORM)
        losses = {"clean": known["clean"], "spliced": loss(lambda x_TD: sae(x_TD.to(sae.dtype)))}
        if mean not in known:
            known[mean] = loss(lambda x_TD: mean_D.to(x_TD.device).expand(len(x_TD), -1))
    losses["mean_ablated"] = known[mean]
    report(1.0)
    harm = losses["mean_ablated"] - losses["clean"]
    return {"tokens": total, **losses,
            "recovered": (losses["mean_ablated"] - losses["spliced"]) / harm if harm else math.nan}


def _loss(lm: LanguageModel, layer: int, pieces: list[list[int]], known: dict,
          change: Callable[[torch.Tensor], torch.Tensor] | None) -> float:
    """Summed next-token loss of texts in nats, the layer's output changed where it is content."""
    lengths_B = torch.tensor([len(piece) for piece in pieces])
    position_P = torch.arange(int(lengths_B.max()))
    ids_BP = torch.nn.utils.rnn.pad_sequence([torch.tensor(piece) for piece in pieces], batch_first=True)
    content_BP = ((position_P < lengths_B[:, None]) & (position_P > 0)).to(lm.device)

    def hook(module, args, output):
        kept_BP = content_BP & (resid_post(output).float().norm(dim=-1) <= known["limit"])
        return replaced(output, kept_BP, lambda x_TD: change(x_TD).to(x_TD.dtype) if change else x_TD)

    handle = decoder_layers(lm.model)[layer].register_forward_hook(hook) if change else None
    predicting_T = (position_P < lengths_B[:, None] - 1).flatten().nonzero().flatten().to(lm.device)
    try:
        # Padding on the right needs no mask: causal attention never looks at it, and its logits are not taken.
        with torch.inference_mode(), logits_at(lm.model, predicting_T):
            logits_TV = lm.model(input_ids=ids_BP.to(lm.device), use_cache=False).logits[0]
            return torch.nn.functional.cross_entropy(
                logits_TV.float(), ids_BP.flatten().to(lm.device)[predicting_T + 1], reduction="sum").item()
    finally:
        if handle:
            handle.remove()


# --- latents ------------------------------------------------------------------------------------------------------

def latent_statistics(sae, activations: Path) -> LatentStats:
    """Per-latent sums over all stored activations (see `sae_training.collect_activations`)."""
    encoder, stats = Encoder(sae), LatentStats(sae.cfg.d_sae, sae.device)
    for shard in _shards(activations):
        for (chunk,) in encoder.chunks(shard["activations_TD"].to(sae.device)):
            stats.add(chunk)
    return stats


def spread_by_rate(stats: LatentStats, count: int, *, lowest: float = 0.0005, highest: float = 0.05) -> list[int]:
    """Latents at evenly spaced ranks of firing rate between `lowest` and `highest`: a rule, not a choice.

    Raises:
        StsError: fewer than `count` latents fire that often.
    """
    rate_L = stats.fired_L / stats.tokens
    eligible = [index for index in torch.argsort(rate_L, stable=True).tolist() if lowest <= rate_L[index] <= highest]
    if len(eligible) < count:
        raise StsError(f"{count} latents were asked for; only {len(eligible)} fire on {lowest:.2%} to {highest:.0%} of "
                       f"{stats.tokens} tokens. Use more text, or another SAE.")
    ranks = [round((step + 0.5) * len(eligible) / count - 0.5) for step in range(count)]
    return [eligible[rank] for rank in ranks]


class Firings:
    """Where chosen latents fire in stored activations, and how strongly.

    Args:
        pieces: the token ids that the stored activations came from.
    """

    def __init__(self, sae, activations: Path, pieces: list[list[int]], tokenizer, latents: list[int]):
        self.pieces, self.tokenizer, self.latents, self.tokens = pieces, tokenizer, latents, 0
        #: latent -> {(piece, position): value}
        self.fired: dict[int, dict[tuple[int, int], float]] = {latent: {} for latent in latents}
        for shard in _shards(activations):
            piece_T, position_T = shard["piece_T"].tolist(), shard["position_T"].tolist()
            for rows, latents_TL in encode_chunks(sae, shard["activations_TD"]):
                chosen_TK = latents_TL[:, latents].float()
                self.tokens += len(chosen_TK)
                for row, column in chosen_TK.nonzero().tolist():
                    place = (piece_T[rows.start + row], position_T[rows.start + row])
                    self.fired[latents[column]][place] = chosen_TK[row, column].item()

    def contexts(self, latent: int, near: float = math.inf, *, top: int = 4, before: int = 14,
                 after: int = 6) -> list[dict[str, Any]]:
        """The texts on which a latent's value is nearest to `near`, at most one place from each.

        Args:
            before, after: tokens shown around the peak.

        Returns:
            [{"value", "tokens": [str], "values": [float], "peak"}], the nearest first.
        """
        fired = self.fired[latent]
        found, seen = [], set()
        for piece, position in sorted(fired, reverse=True, key=lambda place: (
                fired[place] if near == math.inf else -abs(fired[place] - near), place)):
            if piece not in seen and len(found) < top:
                seen.add(piece)
                places = range(max(0, position - before), min(len(self.pieces[piece]), position + after + 1))
                found.append({"value": fired[piece, position], "peak": position - places.start,
                              "tokens": [self.tokenizer.decode([self.pieces[piece][place]]) for place in places],
                              "values": [fired.get((piece, place), 0.0) for place in places]})
        return found


def top_contexts(firings: Firings) -> list[dict[str, Any]]:
    """One dict a latent: {"latent", "rate" (share of tokens on which it fires), "contexts" (the strongest)}."""
    return [{"latent": latent, "rate": len(firings.fired[latent]) / firings.tokens,
             "contexts": firings.contexts(latent)} for latent in firings.latents]


def strengths(firings: Firings) -> list[dict[str, Any]]:
    """How strongly latents fire: {"latent", "histogram" (tokens in `BARS` equal steps up to the largest value),
    "middling" (contexts at about half of it)}."""
    rows = []
    for latent in firings.latents:
        values_N = torch.tensor(list(firings.fired[latent].values()) or [0.0])
        largest = values_N.max().item() or 1.0
        rows.append({"latent": latent, "histogram": values_N.histc(BARS, 0, largest).int().tolist(),
                     "middling": firings.contexts(latent, largest / 2, top=2)})
    return rows


def promoted_tokens(lm: LanguageModel, sae, latents: list[int], top: int = 8) -> list[dict[str, Any]]:
    """The tokens whose logits a latent raises and lowers most if nothing above its layer changes: its decoder direction
    through the final norm's weights and the unembedding. {"latent", "promoted", "demoted"} (tokens as text)."""
    decoder, head = lm.model.get_decoder(), lm.model.get_output_embeddings()
    rows = []
    with torch.inference_mode():
        scale_D = decoder.norm(torch.ones_like(decoder.norm.weight)[None])[0]  # of a vector whose norm is one
        for latent in latents:
            logits_V = head.weight.float() @ (scale_D * sae.W_dec[latent].to(scale_D)).float()
            rows.append({"latent": latent} | {
                name: [lm.tokenizer.decode([token]) for token in (sign * logits_V).topk(top).indices.tolist()]
                for name, sign in (("promoted", 1), ("demoted", -1))})
    return rows
