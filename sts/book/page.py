"""A chapter's page: its run, claim cards, tables, tabs of figures, other runs and provenance, as HTML with all text escaped."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from IPython.display import HTML, display
from matplotlib.figure import Figure

from sts.book import claims, evidence, latent_cards, tables
from sts.errors import ROOT, StsError

if TYPE_CHECKING:
    from sts.run.run import OpenRun

#: Measures of change, the finest first.
MEASURES = ("bits", "p_right", "accuracy", "accuracy_generated")


def open_page(chapter: str, run: str = "laptop", *, banner: bool = True, **parameters: Any) -> Page:
    """Open a chapter's page on a run and show which run it is.

    Args:
        run: a profile in runs/, or a YAML file.
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
        told = f" <strong>Changed from the profile: {html.escape(changed)}.</strong>" if changed else ""
        return HTML(f'<div class="sts-run">Run <code>{html.escape(own.name)}</code>: {html.escape(own.description)}. '
                    f"Model <code>{html.escape(own.model)}</code>, layer {own.layer}, seed {own.seed}.{told}</div>")

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
            data = base64.b64encode(image.getvalue()).decode()
            parts.append(
                f'<input type="radio" name="{group}" id="{group}-{place}"{" checked" * (place == 0)}>'
                f'<label for="{group}-{place}">{html.escape(label)}</label><figure>'
                f'<img alt="{html.escape(f"{alt}: {label}")}" src="data:image/png;base64,{data}"></figure>')
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return HTML(f'<div class="sts-tabs">{"".join(parts)}{below}</div>')

    # --- claims

    def claims(self, *ids: str) -> HTML:
        """Cards of claims, by their ids in book/claims.yaml."""
        known = claims.read_claims()[1]
        for one in ids:
            if one not in known:
                raise claims.one_of("Claim", one, known)
        return HTML(f'<div class="sts-cards">{"".join(self._card(known[one]) for one in ids)}</div>')

    def _card(self, claim: claims.Claim) -> str:
        found, word, reason = evidence.weigh(self.run, claim)
        rows = [("the paper", html.escape(claim.paper))] if claim.paper else []
        details = f"<p>{html.escape(claims.rule_text(claim))}</p>"
        if found:
            rows.append(("this run", _numbers(found, claim.form)))
            details += tables.table(
                [{"what": name, "number": claims.shown(one, claim.form), "p": one.p}
                 for name, one in (("the number judged", found), *found.against.items())],
                {"": "what", "with 95% interval": "number", "p": "{p:.2g}"})
        details += f"<p>{html.escape(reason)}</p>" if reason else ""
        lines = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
        return (f'<section class="sts-card">{_pill(word)}<p class="sts-says">{html.escape(claim.says)}</p>'
                f"<table>{lines}</table>{tables.folded('The rule and the numbers behind it', details)}</section>")

    def scorecard(self) -> HTML:
        """One row for each of the paper's results, from the records of claims and what this run has stored; counted."""
        results, known = claims.read_claims()
        run, rows, words = evidence.Stored(self.run), [], []
        for result in results.values():
            own = [(claim, *evidence.weigh(run, claim)) for claim in known.values() if claim.result == result.name]
            word = claims.together([found[2] for found in own])
            ours = "".join(f"<div>{html.escape(claim.label)}: {_numbers(found, claim.form)} {_pill(verdict, small=True)}</div>"
                           for claim, found, verdict, _ in own if found)
            link = f'<a href="{result.chapter}.html">{_title(result.chapter)}</a>' if result.chapter else ""
            rows.append(f"<tr><td>{html.escape(result.name)}</td><td>{html.escape(result.says)}</td>"
                        f"<td>{html.escape(result.paper)}</td><td>{ours}</td>"
                        f"<td><code>{html.escape(self.settings.name)}</code></td><td>{_pill(word)}</td><td>{link}</td></tr>")
            words.append(word)
        counts = "".join(f"<li>{_pill(word)} <strong>{words.count(word)}</strong></li>" for word in claims.WORDS)
        heads = ("of the paper", "claim", "the paper", "this run, with 95% interval", "run", "verdict", "chapter")
        return HTML(f'<ul class="sts-counts">{counts}</ul><div class="sts-scroll"><table class="dataframe sts-scorecard">'
                    f'<thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
                    f'<tbody>{"".join(rows)}</tbody></table></div>')

    # --- latents, other runs, texts, provenance

    def latents(self, count: int = 10) -> HTML:
        """Cards of the latents of stage `latent_examples`, with what further stages on them are stored."""
        from sts.run.recorded import texts_withheld

        found = self["latent_examples"][:count]
        logits, activity = ({row["latent"]: row for row in self.stored(stage) or ()}
                            for stage in ("latent_logits", "latent_activity"))
        return HTML(self.texts_note("latent_examples").data + latent_cards.cards(
            found, logits, activity, sae=self.settings.sae, texts=not texts_withheld(found)))

    def others(self, *stages: str) -> dict[str, OpenRun]:
        """The book's other recorded runs that have these stages; nothing of them is computed."""
        import sts

        found = {}
        for folder in sorted((ROOT / "data" / "recorded").iterdir()):
            if folder.name == self.settings.name:
                continue
            try:
                other = sts.open_run(folder.name)
            except StsError:  # a profile out of date must not stop the pages of all others
                continue
            if all(evidence.is_stored(other, stage) for stage in stages):
                found[folder.name] = other
        return found

    def texts_note(self, stage: str) -> HTML:
        """That the texts of a recorded result are not recorded, and how to read them; nothing where they are there."""
        from sts.run.recorded import texts_withheld

        if not texts_withheld(self[stage]):
            return HTML("")
        name = html.escape(self.settings.name)
        return HTML("<p><strong>The texts are not here.</strong> Recorded results hold no texts of data sets. With the "
                    f"model and the data: <code>sts stage {stage} --run {name} --again</code>, then <code>sts run "
                    f"{self.chapter} --run {name}</code>. Runs computed where they are read show theirs.</p>")

    def provenance(self) -> HTML:
        """A folded box: of each stage that the page rests on its key, data, weights, settings, software and time."""
        blocks = []
        for stage in self.run.used:
            if record := self.run.provenance(stage):
                rows = {"key": record["key"], "settings": json.dumps(record["settings"]),
                        "inputs": json.dumps(record["inputs"]), "seed": record["seed"],
                        "computed": f"{record['finished']}, {record['seconds']:,.1f} s, "
                                    f"{record['process_peak_memory_mb']} MB, {record['device']}",
                        "work": json.dumps(record.get("work", {})), "not recorded": record.get("withheld", ""),
                        "software": f"Python {record['python']}, " + ", ".join(
                            f"{package} {version}" for package, version in record["versions"].items()),
                        "code": record["commit"] or "not under git"}
                lines = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
                                for key, value in rows.items() if value != "")
                blocks.append(tables.folded(stage, f"<table>{lines}</table>"))
        return HTML(f'<div class="sts-provenance"><p>Run <code>{html.escape(self.settings.name)}</code>, '
                    f"{len(blocks)} stages.</p>{''.join(blocks)}</div>")


def _numbers(found: claims.Evidence, form: str) -> str:
    """HTML: the number with its interval, n and seeds."""
    n = f"n = {found.n:,} {found.of}" if found.n else ""
    seeds = f"{found.seeds} seeds" if found.seeds > 1 else "1 seed"
    return f"{html.escape(claims.shown(found, form))} <small>{html.escape(', '.join(filter(None, (n, seeds))))}</small>"


def _pill(word: str, *, small: bool = False) -> str:
    """HTML: a verdict as a coloured word."""
    return f'<span class="sts-verdict sts-{word.replace(" ", "-")}{" sts-small" * small}">{word}</span>'


def _title(chapter: str) -> str:
    return html.escape(chapter.replace("_", " ").capitalize())
