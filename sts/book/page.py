"""A chapter's page: its run, claim cards, tables, tabs of figures, latents, other runs, provenance; HTML, escaped."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from IPython.core.pylabtools import print_figure
from IPython.display import HTML
from matplotlib.figure import Figure

import sts
from sts.book import claims, evidence, figures
from sts.errors import ROOT, StsError
from sts.run.recorded import texts_withheld
from sts.run.run import OpenRun

#: Measures of change, the finest first.
MEASURES = ("bits", "p_right", "accuracy", "accuracy_generated")
#: Tokens of chat templates, and the roles that follow one of them, of one token or several, up to a blank.
TEMPLATE = re.compile(r"<\|[\w-]+\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")
ROLES = ("system", "user", "assistant", "model")


class Page:
    """What the cells of a chapter ask for; every method's result is the last expression of its cell. The run is a
    profile's name, a YAML file or open; parameters are settings to change, where None leaves the profile's own."""

    def __init__(self, chapter: str, /, run: str | OpenRun = "laptop", **parameters: Any):
        self.run = sts.open_run(run, **parameters) if isinstance(run, str) else run
        self.chapter, self.settings, self._tabs = chapter, self.run.settings, 0
        if isinstance(self.run, OpenRun) and any(one.is_dir() for one in self.run.store.recorded):  # trains nothing
            logging.getLogger("sts").setLevel(logging.ERROR)

    def __getitem__(self, stage: str) -> Any:
        return self.run.get(stage)

    @property
    def measures(self) -> list[str]:
        """What was evaluated, the finest first."""
        return sorted(set(self["domain_shift"]["measure"]), key=MEASURES.index)

    @property
    def primary(self) -> str:
        """The finest measure that was evaluated."""
        return self.measures[0]

    def banner(self) -> HTML:
        """One line: which run the page shows, and what was changed from its profile."""
        own = self.settings
        changed = ", ".join(f"{name} = {value}" for name, value in self.run.changed.items())
        told = f" <strong>Changed from the profile: {escape(changed)}.</strong>" if changed else ""
        return HTML(f'<div class="sts-run">Run <code>{escape(own.name)}</code>: {escape(own.description)}. Model '
                    f"<code>{escape(own.model)}</code>, layer {own.layer}, seed {own.seed}.{told}</div>")

    table = staticmethod(figures.table)

    def tabs(self, drawn: Mapping[str, Figure], alt: str, caption: str) -> HTML:
        """Figures under tabs, for further measures of the same; the first is shown."""
        self._tabs += 1
        group, parts = f"{self.chapter}-tabs-{self._tabs}", []
        for place, (label, figure) in enumerate(drawn.items()):
            data, told = print_figure(figure, base64=True, dpi=110), escape(f"{alt}: {label}")
            parts.append(f'<input type="radio" name="{group}" id="{group}-{place}"{" checked" * (place == 0)}>'
                         f'<label for="{group}-{place}">{escape(label)}</label>'
                         f'<figure><img alt="{told}" src="data:image/png;base64,{data}"></figure>')
        return HTML(f'<div class="sts-tabs">{"".join(parts)}<figcaption>{escape(caption)}</figcaption></div>')

    def claims(self, *ids: str) -> HTML:
        """Cards of claims, by their ids in book/claims.yaml."""
        known = claims.read_claims()[1]
        return HTML(f'<div class="sts-cards">{"".join(self._card(known[name]) for name in ids)}</div>')

    def _card(self, claim: claims.Claim) -> str:
        found, word, reason = evidence.weigh(self.run, claim)
        lines = f"<tr><th>the paper</th><td>{escape(claim.paper)}</td></tr>" if claim.paper else ""
        details = "".join(f"<p>{escape(text)}</p>" for text in (claim.rule_text, reason) if text)
        if found:
            lines += (f"<tr><th>{escape(claim.run or 'this run')}</th><td>{escape(claim.label)}: "
                      f"{self._number(claim, found)}</td></tr>")
            numbers = [{"": name, "with 95% interval": claim.number(one), "p": figures.shown("{p:.2g}", p=one.p)}
                       for name, one in {"judged": found, **found.against}.items()]
            details += str(figures.table(numbers).data)
        return (f'<section class="sts-card">{_pill(word)}<p class="sts-says">{escape(claim.says)}</p>'
                f"<table>{lines}</table>{figures.folded('The rule and the numbers behind it', details)}</section>")

    def _number(self, claim: claims.Claim, found: claims.Evidence) -> str:
        if found.value is None:
            return ""
        about = (f"n = {found.n:,} {found.of}" if found.n else "",
                 f"{found.seeds} seed{'s' * (found.seeds > 1)}" if found.seeds and claim.learned != "no" else "")
        return f"{escape(claim.number(found))} <small>{escape(', '.join(filter(None, about)))}</small>"

    def scorecard(self) -> HTML:
        """A row for each of the paper's results, from the records of claims and what is stored; counted at the top; and
        the same for what the book asks beyond the paper."""
        (results, known), parts = claims.read_claims(), []
        self.run = self.run.only_stored()
        for head, beyond in (("of the paper", False), ("beyond the paper", True)):
            rows, words = [], []
            for name, result in ((name, one) for name, one in results.items() if one.get("beyond", False) == beyond):
                own = [(claim, *evidence.weigh(self.run, claim)[:2]) for claim in known.values()
                       if claim.result == name and (self.settings.published or not claim.run)]
                words.append(claims.together([word for *_, word in own]))
                ours = "".join(f"<div>{escape(claim.label)}: {self._number(claim, found)} {_pill(word, 'sts-small')}"
                               "</div>" for claim, found, word in own if found)
                link = f'<a href="{result["chapter"]}.html">{escape(name)}</a>' if "chapter" in result else escape(name)
                rows.append({head: HTML(link), "verdict": HTML(_pill(words[-1])), "claim": result["says"],
                             "the paper": result["paper"], f"run {self.settings.name}, with 95% interval": HTML(ours)})
            counts = "".join(f"<li>{_pill(word)} <strong>{words.count(word)}</strong></li>" for word in claims.WORDS)
            parts.append('<h3>Beyond the paper</h3>' * beyond + f'<ul class="sts-counts">{counts}</ul>'
                         f'<div class="sts-scorecard">{figures.table(rows).data}</div>')
        return HTML("".join(parts))

    def latents(self, count: int = 10, stages: Sequence[str] = ("latent_examples", "latent_logits", "latent_strengths"),
                about: Mapping[int, Sequence[str]] = {}, fold: str = "") -> HTML:
        """Cards of the latents of a stage: texts they fire on, tokens they promote and demote, how strongly they fire;
        and lines `about` them. Where texts are withheld, of further stages only what is stored. Folded under a title,
        they can be searched. As many as fit in two megabytes."""
        note = str(self.texts_note(stages[0]).data)
        found = {card["latent"]: card for card in self[stages[0]][:count]}
        for stage in stages[1:]:
            for row in self[stage] if not note or self.run.stored(stage) else ():
                if row["latent"] in found:
                    found[row["latent"]] = row | found[row["latent"]]
        address, cards = _neuronpedia(self.settings.sae), ""
        for card in found.values():
            own = _latent_card(card, address, about.get(card["latent"], ()), texts=not note)
            if len((cards + own).encode()) > 2e6:
                break
            cards += own
        cards = f'<div class="sts-cards">{cards}</div>'
        return HTML(note + (figures.folded(fold, cards, "sts-search") if fold else cards))

    def others(self, *stages: str) -> dict[str, OpenRun]:
        """The book's other recorded runs that have these stages; nothing of them is computed."""
        found = {}
        for name in sorted(folder.name for folder in (ROOT / "data" / "recorded").iterdir()):
            with contextlib.suppress(StsError):  # a profile out of date must not stop the pages of all others
                other = sts.open_run(name).only_stored(reading=False)
                if name != self.settings.name and all(other.stored(stage) for stage in stages):
                    found[name] = other
        return found

    def texts_note(self, stage: str) -> HTML:
        """That the texts of a recorded result are not recorded, and how to read them; nothing where they are there."""
        name = escape(self.settings.name)
        return HTML("" if not texts_withheld(self[stage]) else
                    "<p><strong>The texts are not here.</strong> Recorded results hold no texts of data sets. With the "
                    f"model and the data: <code>sts stage {stage} --run {name} --again</code>, then <code>sts run "
                    f"{self.chapter} --run {name}</code>.</p>")

    def provenance(self) -> HTML:
        """A folded box: of each stage that the page rests on its key, data, weights, settings, software and time."""
        blocks = []
        for stage in self.run.used:
            if record := self.run.provenance(stage):
                blocks.append(str(figures.table(
                    [{"": name, "recorded": value if isinstance(value, str) else json.dumps(value)}
                     for name, value in record.items()], fold=stage).data))
        return HTML(figures.folded(f"Where the numbers come from: run {self.settings.name}, {len(blocks)} stages",
                                  "".join(blocks), "sts-provenance"))


def _pill(word: str, more: str = "") -> str:
    return f'<span class="sts-verdict sts-{word.replace(" ", "-")} {more}">{word}</span>'


def _latent_card(card: Mapping, address: str, about: Sequence[str] = (), *, texts: bool) -> str:
    title = f"Latent {card['latent']}"
    title = f'<a href="{escape(address)}/{card["latent"]}">{title}</a>' if address else title
    strongest = max((one["value"] for one in card["contexts"]), default=0.0)
    lines = [*map(escape, about), f"fires on {card['rate']:.2%} of tokens, at most {strongest:.1f}"]
    for name in ("promoted", "demoted"):
        tokens = [escape(token.strip() or repr(token)) for token in card.get(name, ()) if not TEMPLATE.search(token)]
        lines += [f"{name}: " + " ".join(f"<code>{token}</code>" for token in tokens)] * bool(tokens)
    parts = [f'<p class="sts-rate">{line}</p>' for line in lines] + [_histogram(card.get("histogram", ()))]
    for name, contexts in (("strongest", card["contexts"]), ("of middling strength", card.get("middling", ()))):
        quotes = [f'<blockquote>{text} <small>{escape(one.get("kind", ""))}</small></blockquote>' for one in contexts
                  if texts and "sts-tok" in (text := _shaded(one))]
        parts += [f'<p class="sts-rate">{name}</p>' * bool(quotes), *quotes]
    return f'<div class="sts-latent-card"><h4>{title}</h4>{"".join(parts)}</div>'


def _neuronpedia(sae: str) -> str:
    """The address under which Neuronpedia shows an SAE's latents; "" where sae-lens' registry names none."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, name = sae.partition("/")
    known = get_pretrained_saes_directory().get(release)
    place = known.neuronpedia_id.get(name) if known else None
    return f"https://www.neuronpedia.org/{place}" if place else ""


def _shaded(context: Mapping) -> str:
    """A text, shaded by strength, from one token of the chat template to the next, without the name of its role."""
    tokens, peak, spans, said = context["tokens"], context["peak"], [], ""
    for place, (token, value) in enumerate(zip(tokens, context["values"], strict=True)):
        if TEMPLATE.search(token):
            if place >= peak:
                break
            spans, said = [], ""
        elif said and token.isspace() and any(role.endswith(said) for role in ROLES):
            spans, said = [], ""
        elif spans or token.strip():
            said += token
            text, share = escape(token).replace("\n", "&#8629;"), value / (max(context["values"]) or 1)
            colour = f"rgba(230, 159, 0, {0.15 + 0.6 * share:.2f})"
            spans.append(f'<span class="sts-tok" style="background-color: {colour}" title="{value:.2f}">{text}</span>'
                         if value > 0 else text)
    return "".join(spans)


def _histogram(counts: Sequence[int]) -> str:
    """Bars whose height is the logarithm of a count."""
    bars = "".join(f'<span style="height: {100 * math.log1p(count) / math.log1p(max(counts)):.0f}%"></span>'
                   for count in counts)
    label = f"Tokens by strength, from weak to strong: {', '.join(map(str, counts))}"
    return f'<div class="sts-histogram" role="img" aria-label="{label}">{bars}</div>' if counts else ""
