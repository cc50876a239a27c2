"""How good an SAE is, and what its latents stand for: the texts they fire on, and the tokens they promote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sts.engine.evaluate import loglikelihoods
from sts.engine.latents import LatentStats, encode_chunks
from sts.engine.models import LanguageModel
from sts.engine.residuals import OUTLIER_NORM, Extractor
from sts.engine.sae_training import count_activations, shard_paths
from sts.engine.zeroing import changed, lower_layers_once
from sts.errors import StsError

#: Bars of a latent's histogram.
BARS = 12


def _encoded(sae, activations: Path) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Stored activations with their places, and their latents T x L, chunk after chunk."""
    for shard in map(load_file, shard_paths(activations)):
        for rows, (latents_TL,) in encode_chunks(sae, shard["activations_TD"]):
            yield {name: tensor[rows] for name, tensor in shard.items()}, latents_TL


def activation_mean(activations: Path) -> torch.Tensor:
    """Mean of all stored activation vectors."""
    sums = [load_file(path)["activations_TD"].double().sum(0) for path in shard_paths(activations)]
    return (torch.stack(sums).sum(0) / count_activations(activations)).float()


def reconstruction_quality(sae, activations: Path) -> dict[str, Any]:
    """How well an SAE reconstructs stored activations: {"tokens", "fraction_of_variance_explained" (1 - sum
    ||x - x_hat||^2 / sum ||x - mean||^2), "l0" (mean active latents a token), "dead" (latents that never fire),
    "latents"}."""
    stats, mean_D, error, total = LatentStats(sae.cfg.d_sae, sae.device), activation_mean(activations), 0.0, 0.0
    for part, latents_TL in _encoded(sae, activations):
        x_TD = part["activations_TD"].float()
        with torch.inference_mode():
            error += (x_TD - sae.decode(latents_TL).float().cpu()).double().square().sum().item()
        total += (x_TD - mean_D).double().square().sum().item()
        stats.add(latents_TL)
    return {"tokens": stats.tokens, "fraction_of_variance_explained": 1 - error / total,
            "l0": stats.fired_L.sum().item() / stats.tokens, "dead": int((stats.fired_L == 0).sum()),
            "latents": sae.cfg.d_sae}


def spliced_loss(lm: LanguageModel, sae, layer: int, pieces: list[list[int]], *, mean_D: torch.Tensor, tokens: int,
                 tokens_per_batch: int = 1024, report: Callable[[float], None] = lambda fraction: None) -> dict:
    """The model's next-token loss with the residual stream as it is, reconstructed by the SAE, and set to its mean, on
    about so many tokens; `tokens_per_batch` at once, as the logits of 1,024 take 3 GB with a vocabulary of 262,144.

    Only content is replaced: not the first token of a piece, nor attention sinks (`Extractor.sink_norms`).

    Returns:
        {"tokens", "clean", "spliced", "mean_ablated"} in nats a token, and "recovered", the share of the damage of
        mean ablation that the reconstruction avoids.
    """
    chosen, total = [], 0
    for piece in pieces:
        if total < tokens:
            chosen.append(piece)
            total += len(piece) - 1
    sides = [(piece, (1, len(piece))) for piece in chosen]
    limit, = Extractor(lm, layer, tokens_per_batch).sink_norms(sides, OUTLIER_NORM)
    changes = {"clean": lambda x_TD: x_TD, "spliced": lambda x_TD: sae(x_TD.to(sae.dtype)),
               "mean_ablated": lambda x_TD: mean_D.to(x_TD).expand(len(x_TD), -1)}
    losses: dict[str, float] = {}
    with lower_layers_once(lm, layer):
        for done, (name, change) in enumerate(changes.items()):
            with changed(lm, layer, change, norm_limit=limit):
                losses[name] = -sum(loglikelihoods(
                    lm, [(piece[:1], piece[1:]) for piece in chosen],
                    batch=max(1, tokens_per_batch // max(map(len, chosen))),
                    report=lambda fraction, done=done: report((done + fraction) / len(changes)))) / total
    harm = losses["mean_ablated"] - losses["clean"]
    return {"tokens": total, **losses,
            "recovered": (losses["mean_ablated"] - losses["spliced"]) / harm if harm else math.nan}


def latent_statistics(sae, activations: Path) -> LatentStats:
    """Per-latent sums over all stored activations (see `sae_training.collect_activations`)."""
    stats = LatentStats(sae.cfg.d_sae, sae.device)
    for _, latents_TL in _encoded(sae, activations):
        stats.add(latents_TL)
    return stats


def document_sums(sae, activations: Path, documents: int) -> dict[str, torch.Tensor]:
    """Sums over the stored activations of each of so many pieces: tokens_D, and by latent sum_DL and fired_DL."""
    sums = {"tokens_D": torch.zeros(documents), **{name: torch.zeros(documents, sae.cfg.d_sae)
                                                   for name in ("sum_DL", "fired_DL")}}
    for part, latents_TL in _encoded(sae, activations):
        for name, values in (("tokens_D", torch.ones(len(latents_TL))), ("sum_DL", latents_TL),
                             ("fired_DL", latents_TL > 0)):
            sums[name].index_add_(0, part["piece_T"].long(), values.float().cpu())
    return sums


def spread_by_rate(stats: LatentStats, count: int, *, lowest: float = 0.0005, highest: float = 0.05) -> list[int]:
    """Latents at evenly spaced ranks of firing rate between `lowest` and `highest`: a rule, not a choice. `StsError`
    where fewer than `count` latents fire that often."""
    rate_L = stats.fired_L / stats.tokens
    eligible = [index for index in torch.argsort(rate_L, stable=True).tolist() if lowest <= rate_L[index] <= highest]
    if len(eligible) < count:
        raise StsError(f"{count} latents were asked for; only {len(eligible)} fire on {lowest:.2%} to {highest:.0%} of "
                       f"{stats.tokens} tokens. Use more text, or another SAE.")
    ranks = [round((step + 0.5) * len(eligible) / count - 0.5) for step in range(count)]
    return [eligible[rank] for rank in ranks]


class Firings:
    """Where chosen latents fire in stored activations, which came from the token ids `pieces` (of `kinds` of text, if
    given), and how strongly."""

    def __init__(self, sae, activations: Path, pieces: Sequence[list[int]], tokenizer, latents: list[int],
                 kinds: Sequence[str] = ()):
        self.pieces, self.tokenizer, self.latents, self.tokens, self.kinds = pieces, tokenizer, latents, 0, kinds
        #: latent -> {(piece, position): value}
        self.fired: dict[int, dict[tuple[int, int], float]] = {latent: {} for latent in latents}
        for part, latents_TL in _encoded(sae, activations):
            places = list(zip(part["piece_T"].tolist(), part["position_T"].tolist(), strict=True))
            self.tokens += len(places)
            chosen_TK = latents_TL[:, latents].float()
            for row, column in chosen_TK.nonzero().tolist():
                self.fired[latents[column]][places[row]] = chosen_TK[row, column].item()

    def _nearest(self, latent: int, near: float) -> dict[int, int]:
        """Of each piece the position at which a latent's value is nearest to `near`, the nearest first."""
        fired, found = self.fired[latent], {}
        for piece, position in sorted(fired, reverse=True, key=lambda place: (
                fired[place] if near == math.inf else -abs(fired[place] - near), place)):
            found.setdefault(piece, position)
        return found

    def contexts(self, latent: int, near: float = math.inf, *, top: int = 4, shown: int = 0, before: int = 14,
                 after: int = 6) -> list[dict[str, Any]]:
        """The texts on which a latent's value is nearest to `near`, one place from each, the nearest first, without
        those `shown` as the strongest: [{"value", "tokens": [str], "values": [float], "peak"}], with so many tokens
        `before` and `after` the peak."""
        fired, strongest, found = self.fired[latent], [*self._nearest(latent, math.inf)][:shown], []
        for piece, position in self._nearest(latent, near).items():
            if piece not in strongest and len(found) < top:
                places = range(max(0, position - before), min(len(self.pieces[piece]), position + after + 1))
                found.append({"value": fired[piece, position], "peak": position - places.start,
                              "tokens": [self.tokenizer.decode([self.pieces[piece][place]]) for place in places],
                              "values": [fired.get((piece, place), 0.0) for place in places],
                              **({"kind": self.kinds[piece]} if self.kinds else {})})
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
                     "middling": firings.contexts(latent, largest / 2, top=2, shown=4)})
    return rows


def promoted_tokens(lm: LanguageModel, sae, latents: list[int], top: int = 8) -> list[dict[str, Any]]:
    """The tokens whose logits a latent raises and lowers most if nothing above its layer changes: its decoder direction
    through the final norm's weights and the unembedding. {"latent", "promoted", "demoted"} (tokens as text)."""
    decoder, head = lm.model.get_decoder(), lm.model.get_output_embeddings()
    rows = []
    with torch.inference_mode():
        scale_D = decoder.norm(torch.ones_like(decoder.norm.weight)[None])[0]  # of a vector whose norm is one
        weight_VD = head.weight.float()
        for latent in latents:
            logits_V = weight_VD @ (scale_D * sae.W_dec[latent].to(scale_D)).float()
            rows.append({"latent": latent} | {
                name: [lm.tokenizer.decode([token]) for token in (sign * logits_V).topk(top).indices.tolist()]
                for name, sign in (("promoted", 1), ("demoted", -1))})
    return rows
