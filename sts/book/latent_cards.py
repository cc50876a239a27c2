"""Cards of latents: the texts they fire on, the tokens they promote and demote, and how strongly they fire. HTML, escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Tokens of chat templates, and the role that follows one of them.
TEMPLATE = re.compile(r"<\|[\w-]+\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")
ROLES = ("system", "user", "assistant", "model")


def cards(latents: Sequence[Mapping], logits: Mapping[int, Mapping], activity: Mapping[int, Mapping], *, sae: str = "",
          texts: bool = True) -> str:
    """A card a latent.

    Args:
        latents: stage `latent_examples`.
        logits, activity: by latent, rows of stages `latent_logits` and `latent_activity`, as far as they are there.
        sae: the run's SAE by name, for links to Neuronpedia.
        texts: whether texts are there to be shown.
    """
    page, blocks = neuronpedia(sae), []
    for card in latents:
        number, more = card["latent"], activity.get(card["latent"], {})
        title = f'<a href="{html.escape(page)}/{number}">Latent {number}</a>' if page else f"Latent {number}"
        parts = [f'<h4>{title}</h4><p class="sts-rate">fires on {card["rate"]:.2%} of tokens, at most '
                 f'{card["contexts"][0]["value"]:.1f}</p>', _histogram(more.get("histogram", ()))]
        for name in ("promoted", "demoted"):
            if tokens := logits.get(number, {}).get(name):
                listed = " ".join(f"<code>{html.escape(token.strip() or repr(token))}</code>" for token in tokens)
                parts.append(f'<p class="sts-rate">{name}: {listed}</p>')
        for name, contexts in (("strongest", card["contexts"]), ("of middling strength", more.get("middling", ()))):
            shown = [_shaded(context) for context in contexts if texts and _is_text(context)]
            if shown:
                parts.append(f'<p class="sts-rate">{name}</p>' + "".join(f"<p>{text}</p>" for text in shown))
        blocks.append(f'<div class="sts-latent-card">{"".join(parts)}</div>')
    return f'<div class="sts-cards">{"".join(blocks)}</div>'


def neuronpedia(sae: str) -> str:
    """The address under which Neuronpedia shows an SAE's latents, "" where sae-lens' registry names none."""
    release, _, name = sae.partition("/")
    if not name or Path(sae).exists() or release in (".", "data"):
        return ""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    place = known.neuronpedia_id.get(name) if known else None
    return f"https://www.neuronpedia.org/{place}" if place else ""


def _spans(context: Mapping) -> range:
    """The tokens around the peak up to the next template token on either side, without a role's name and blanks."""
    tokens, peak = context["tokens"], context["peak"]
    stops = [place for place, token in enumerate(tokens) if TEMPLATE.search(token)]
    first = max((place + 1 for place in stops if place <= peak), default=0)
    last = min((place for place in stops if place >= peak), default=len(tokens))
    if first and first < last and tokens[first].strip() in ROLES:
        first += 1
    while first < last and not tokens[first].strip():
        first += 1
    return range(first, last)


def _is_text(context: Mapping) -> bool:
    return context["peak"] in _spans(context)


def _shaded(context: Mapping) -> str:
    largest, spans = max(context["values"]) or 1.0, []
    for place in _spans(context):
        text, value = html.escape(context["tokens"][place]).replace("\n", "&#8629;"), context["values"][place]
        spans.append(text if value <= 0 else f'<span class="sts-tok" style="background-color: rgba(230, 159, 0, '
                     f'{0.15 + 0.6 * value / largest:.2f})" title="{value:.2f}">{text}</span>')
    return "".join(spans)


def _histogram(counts: Sequence[int]) -> str:
    """Bars of a histogram of activations, from weak to strong, on a logarithmic scale."""
    if not counts:
        return ""
    tallest = max(len(str(count)) for count in counts)
    bars = "".join(f'<span style="height: {100 * len(str(count)) / tallest if count else 0:.0f}%"></span>'
                   for count in counts)
    return (f'<div class="sts-histogram" role="img" aria-label="Tokens by strength, from weak to strong: '
            f'{", ".join(map(str, counts))}">{bars}</div>')
