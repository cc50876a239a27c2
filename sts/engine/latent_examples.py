"""What a latent fires on: the texts with its largest activations, and cards that show them."""

from __future__ import annotations

import html
from pathlib import Path

import torch
from safetensors import safe_open

from sts.engine.extract import Encoder, encode_chunks
from sts.engine.latents import LatentStats
from sts.engine.sae_training import shard_paths
from sts.errors import StsError


def latent_statistics(sae, activations: Path) -> LatentStats:
    """Per-latent sums over all stored activations (see `sae_training.collect_activations`)."""
    encoder, stats = Encoder(sae), LatentStats(sae.cfg.d_sae, sae.device)
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            for (chunk,) in encoder.chunks(shard.get_tensor("activations_TD").to(sae.device)):
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


def top_contexts(sae, activations: Path, pieces: list[list[int]], tokenizer, latents: list[int], *, top: int = 4,
                 before: int = 14, after: int = 6) -> list[dict]:
    """The texts on which each latent fires most, at most one place from each text.

    Args:
        pieces: the token ids that the stored activations came from.
        before, after: tokens shown around the peak.

    Returns:
        One dict a latent: {"latent", "rate", "contexts": [{"value", "tokens": [str], "values": [float], "peak"}]}.
    """
    values: dict[int, list[tuple[float, int, int]]] = {latent: [] for latent in latents}
    dense: dict[tuple[int, int], dict[int, float]] = {}
    tokens = 0
    for path in shard_paths(activations):
        with safe_open(path, "pt") as shard:
            piece_T, position_T = shard.get_tensor("piece_T").tolist(), shard.get_tensor("position_T").tolist()
            for rows, latents_TL in encode_chunks(sae, shard.get_tensor("activations_TD")):
                chosen_TK = latents_TL[:, latents].float()
                tokens += len(chosen_TK)
                for row, column in chosen_TK.nonzero().tolist():
                    place = (piece_T[rows.start + row], position_T[rows.start + row])
                    value = chosen_TK[row, column].item()
                    values[latents[column]].append((value, *place))
                    dense.setdefault((latents[column], place[0]), {})[place[1]] = value
    cards = []
    for latent in latents:
        contexts, seen = [], set()
        for value, piece, position in sorted(values[latent], reverse=True):
            if piece in seen or len(contexts) == top:
                continue
            seen.add(piece)
            first, last = max(0, position - before), min(len(pieces[piece]), position + after + 1)
            fired = dense[latent, piece]
            contexts.append({"value": value, "peak": position - first,
                             "tokens": [tokenizer.decode([token]) for token in pieces[piece][first:last]],
                             "values": [fired.get(index, 0.0) for index in range(first, last)]})
        cards.append({"latent": latent, "rate": len(values[latent]) / tokens, "contexts": contexts})
    return cards


def cards_html(cards: list[dict]) -> str:
    """Latent cards as static HTML: each token shaded by its activation. All text is escaped."""
    blocks = []
    for card in cards:
        rows = "".join(f"<p>{_shaded(context)}</p>" for context in card["contexts"])
        blocks.append(f'<div class="sts-latent-card"><h4>Latent {card["latent"]}</h4>'
                      f'<p class="sts-rate">fires on {card["rate"]:.2%} of tokens; largest activation '
                      f'{card["contexts"][0]["value"]:.1f}</p>{rows}</div>')
    return f'<div class="sts-cards">{"".join(blocks)}</div>'


def _shaded(context: dict) -> str:
    largest = max(context["values"]) or 1.0
    spans = []
    for token, value in zip(context["tokens"], context["values"], strict=True):
        text = html.escape(token).replace("\n", "&#8629;")
        if value > 0:
            strength = 0.15 + 0.6 * value / largest
            spans.append(f'<span class="sts-tok" style="background-color: rgba(230, 159, 0, {strength:.2f})" '
                         f'title="{value:.2f}">{text}</span>')
        else:
            spans.append(text)
    return "".join(spans)
