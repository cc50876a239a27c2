"""A chapter's page: its run, claim cards, tables, figures under tabs, other runs, provenance; HTML, escaped."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from IPython.display import HTML, display
from matplotlib.figure import Figure

from sts.book import claims, evidence, latent_cards, tables
from sts.errors import ROOT, StsError, one_of

if TYPE_CHECKING:
    from sts.run.run import OpenRun

#: Measures of change, the finest first.
MEASURES = ("bits", "p_right", "accuracy", "accuracy_generated")
#: What is shown of a stage's provenance.
SHOWN = ("key", "settings", "inputs", "seed", "finished", "seconds", "work", "process_peak_memory_mb", "device",
         "withheld", "python", "versions", "commit")


def open_page(chapter: str, run: str = "laptop", *, banner: bool = True, **parameters: Any) -> Page:
    """Open a chapter's page on a run, a profile's name or a YAML file, and show which run it is.

    Args:
        parameters: settings to change; None leaves the profile's own.
    """
    import sts

    page = Page(chapter, sts.open_run(run, **parameters))
    if banner:
        display(page.banner())
    return page


class Page:
    """What the cells of a chapter ask for; every method's result is the last expression of its cell."""

    def __init__(self, chapter: str, run: OpenRun):
        self.chapter, self.run, self.settings = chapter, run, run.settings
        self._tabs = 0

    def __getitem__(self, stage: str) -> Any:
        return self.run.get(stage)

    def stored(self, stage: str) -> Any:
        """The stage's result, or None where it would have to be computed."""
        return self.run.get(stage) if evidence.is_stored(self.run, stage) else None

    @property
    def measures(self) -> list[str]:
        """What was evaluated, the finest first."""
        found = set(self["domain_shift"]["measure"])
        return [measure for measure in MEASURES if measure in found]

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

    def table(self, rows: Any, columns: Mapping[str, tables.Column] | None = None, fold: str | None = None) -> HTML:
        """See `tables.table`."""
        return HTML(tables.table(rows, columns, fold))

    def tabs(self, figures: Mapping[str, Figure], alt: str, caption: str = "") -> HTML:
        """Figures under tabs, for further measures of the same; the first is shown."""
        self._tabs += 1
        group, parts = f"{self.chapter}-tabs-{self._tabs}", []
        for place, (label, figure) in enumerate(figures.items()):
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=110, bbox_inches="tight")
            data, told = base64.b64encode(image.getvalue()).decode(), escape(f"{alt}: {label}")
            parts.append(f'<input type="radio" name="{group}" id="{group}-{place}"{" checked" * (place == 0)}>'
                         f'<label for="{group}-{place}">{escape(label)}</label>'
                         f'<figure><img alt="{told}" src="data:image/png;base64,{data}"></figure>')
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return HTML(f'<div class="sts-tabs">{"".join(parts)}{below}</div>')

    # --- claims

    def claims(self, *ids: str) -> HTML:
        """Cards of claims, by their ids in book/claims.yaml."""
        known = claims.read_claims()[1]
        if unknown := set(ids) - set(known):
            raise one_of("Claim", unknown.pop(), known)
        return HTML(f'<div class="sts-cards">{"".join(self._card(known[name]) for name in ids)}</div>')

    def _card(self, claim: claims.Claim) -> str:
        found, word, reason = evidence.weigh(self.run, claim)
        rows = [("the paper", escape(claim.paper))] if claim.paper else []
        details = "".join(f"<p>{escape(text)}</p>" for text in (claim.rule_text, reason) if text)
        if found:
            rows.append(("this run", _number(claim, found)))
            details += tables.table([{"what": name, "number": claim.number(one), "p": one.p}
                                     for name, one in {"judged": found, **found.against}.items()],
                                    {"": "what", "with 95% interval": "number", "p": "{p:.2g}"})
        lines = "".join(f"<tr>{tables.cells([name], 'th')}<td>{text}</td></tr>" for name, text in rows)
        return (f'<section class="sts-card">{_pill(word)}<p class="sts-says">{escape(claim.says)}</p>'
                f"<table>{lines}</table>{tables.folded('The rule and the numbers behind it', details)}</section>")

    def scorecard(self) -> HTML:
        """A row for each of the paper's results, from the records of claims and what is stored; counted at the top."""
        results, known = claims.read_claims()
        run, rows, words = evidence.Stored(self.run), [], []
        for name, result in results.items():
            own = [(claim, *evidence.weigh(run, claim)[:2]) for claim in known.values() if claim.result == name]
            words.append(claims.together([word for *_, word in own]))
            ours = "".join(f"<div>{escape(claim.label)}: {_number(claim, found)} {_pill(word, 'sts-small')}</div>"
                           for claim, found, word in own if found)
            link = f'<a href="{result["chapter"]}.html">{escape(name)}</a>' if result["chapter"] else escape(name)
            rows.append(f"<tr><td>{link}</td><td>{_pill(words[-1])}</td>"
                        f"{tables.cells((result['says'], result['paper']))}"
                        f"<td>{ours}</td>{tables.cells([self.settings.name])}</tr>")
        counts = "".join(f"<li>{_pill(word)} <strong>{words.count(word)}</strong></li>" for word in claims.WORDS)
        head = ("of the paper", "verdict", "claim", "the paper", "here, with 95% interval", "run")
        return HTML(f'<ul class="sts-counts">{counts}</ul><div class="sts-scroll">'
                    f'<table class="dataframe sts-scorecard"><thead><tr>{tables.cells(head, "th")}</tr></thead>'
                    f"<tbody>{''.join(rows)}</tbody></table></div>")

    # --- latents, other runs, texts, provenance

    def latents(self, count: int = 10) -> HTML:
        """Cards of the latents of stage `latent_examples`, with what further stages on them are stored."""
        found, note = self["latent_examples"][:count], str(self.texts_note("latent_examples").data)
        more: dict[int, dict] = {}
        for stage in ("latent_logits", "latent_strengths"):
            for row in (self.stored(stage) if note else self[stage]) or ():
                more.setdefault(row["latent"], {}).update(row)
        return HTML(note + latent_cards.cards(found, more, sae=self.settings.sae, texts=not note))

    def others(self, *stages: str) -> dict[str, OpenRun]:
        """The book's other recorded runs that have these stages; nothing of them is computed."""
        import sts

        found = {}
        for name in sorted(folder.name for folder in (ROOT / "data" / "recorded").iterdir()):
            try:
                other = sts.open_run(name).only_recorded()
            except StsError:  # a profile out of date must not stop the pages of all others
                continue
            if name != self.settings.name and all(evidence.is_stored(other, stage) for stage in stages):
                found[name] = other
        return found

    def texts_note(self, stage: str) -> HTML:
        """That the texts of a recorded result are not recorded, and how to read them; nothing where they are there."""
        from sts.run.recorded import texts_withheld

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
                shown = {name: record[name] for name in SHOWN if record.get(name) not in (None, "", {})}
                blocks.append(tables.table(
                    [{"": name, "recorded": value if isinstance(value, str) else json.dumps(value)}
                     for name, value in shown.items()], fold=stage))
        return HTML(tables.folded(f"Where the numbers come from: run {self.settings.name}, {len(blocks)} stages",
                                  "".join(blocks), "sts-provenance"))


def _number(claim: claims.Claim, found: claims.Evidence) -> str:
    """HTML: the number with its interval, n and seeds."""
    n = f"n = {found.n:,} {found.of}, " if found.n else ""
    return f"{escape(claim.number(found))} <small>{escape(n)}{found.seeds} seed{'s' * (found.seeds > 1)}</small>"


def _pill(word: str, more: str = "") -> str:
    """HTML: a verdict as a coloured word."""
    return f'<span class="sts-verdict sts-{word.replace(" ", "-")} {more}">{word}</span>'
