"""Cards of latents: texts they fire on, tokens they promote and demote, how strongly they fire; HTML, escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

#: Tokens of chat templates, and the roles that follow one of them.
TEMPLATE = re.compile(r"<\|[\w-]+\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")
ROLES = ("system", "user", "assistant", "model")


def cards(latents: Sequence[Mapping], more: Mapping[int, Mapping], *, sae: str, texts: bool) -> str:
    """A card a latent.

    Args:
        latents: stage `latent_examples`; their texts are shown only with `texts`.
        more: what else is known of a latent: promoted and demoted (tokens), histogram (numbers of tokens from weak to
            strong), middling (contexts like those of the latents).
        sae: the run's SAE, for links to Neuronpedia.
    """
    address, blocks = neuronpedia(sae), []
    for card in latents:
        title, found = f"Latent {card['latent']}", more.get(card["latent"], {})
        title = f'<a href="{escape(address)}/{card["latent"]}">{title}</a>' if address else title
        lines = [f"fires on {card['rate']:.2%} of tokens, at most {card['contexts'][0]['value']:.1f}"]
        for name in [name for name in ("promoted", "demoted") if found.get(name)]:
            tokens = (escape(token.strip() or repr(token)) for token in found[name] if not TEMPLATE.search(token))
            lines.append(f"{name}: " + " ".join(f"<code>{token}</code>" for token in tokens))
        parts = [f'<p class="sts-rate">{line}</p>' for line in lines] + [_histogram(found.get("histogram", ()))]
        for name, contexts in (("strongest", card["contexts"]), ("of middling strength", found.get("middling", ()))):
            shown = [_shaded(context) for context in contexts if texts and context["peak"] in text_span(context)]
            parts += [f'<p class="sts-rate">{name}</p>' * bool(shown)]
            parts += [f"<blockquote>{text}</blockquote>" for text in shown]
        blocks.append(f'<div class="sts-latent-card"><h4>{title}</h4>{"".join(parts)}</div>')
    return f'<div class="sts-cards">{"".join(blocks)}</div>'


def neuronpedia(sae: str) -> str:
    """The address under which Neuronpedia shows an SAE's latents; "" where sae-lens' registry names none."""
    release, _, name = sae.partition("/")
    if not name or release in (".", "..", "~", "", "data"):  # a folder, which needs no registry
        return ""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    place = known.neuronpedia_id.get(name) if known else None
    return f"https://www.neuronpedia.org/{place}" if place else ""


def text_span(context: Mapping) -> range:
    """Places of the tokens around the peak up to the next template token on either side, without a role's name."""
    tokens, peak = context["tokens"], context["peak"]
    marks = [place for place, token in enumerate(tokens) if TEMPLATE.search(token)]
    first = max((place + 1 for place in marks if place <= peak), default=0)
    last = min((place for place in marks if place >= peak), default=len(tokens))
    while first < last and (not tokens[first].strip() or (first - 1 in marks and tokens[first].strip() in ROLES)):
        first += 1
    return range(first, last)


def _shaded(context: Mapping) -> str:
    largest, spans = max(context["values"]) or 1.0, []
    for place in text_span(context):
        text, value = escape(context["tokens"][place]).replace("\n", "&#8629;"), context["values"][place]
        colour = f"rgba(230, 159, 0, {0.15 + 0.6 * value / largest:.2f})"
        spans.append(f'<span class="sts-tok" style="background-color: {colour}" title="{value:.2f}">{text}</span>'
                     if value > 0 else text)
    return "".join(spans)


def _histogram(counts: Sequence[int]) -> str:
    """Bars whose height is the number of digits."""
    bars = "".join(f'<span style="height: {100 * len(str(count)) / len(str(max(counts))) if count else 0:.0f}%"></span>'
                   for count in counts)
    label = f"Tokens by strength, from weak to strong: {', '.join(map(str, counts))}"
    return f'<div class="sts-histogram" role="img" aria-label="{label}">{bars}</div>' if counts else ""
