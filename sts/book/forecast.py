"""A forecast of one's own data by the chapters' stages, and its report, the template book/_static/forecast.html."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import pandas
import torch

from sts.book import figures
from sts.book.page import Page
from sts.data.load import own_examples, shared_questions
from sts.engine.saes import layer_of, load_sae
from sts.errors import ROOT, StsError
from sts.measure.baselines import SCORES, split_domains
from sts.measure.items import paired_mean_interval
from sts.measure.rivals import projection_difference
from sts.measure.score import chosen_by


class Forecast(Page):
    """Which domains (a folder with a .jsonl file for each) move in training on a .jsonl file of problems (`own_row`).

    A profile, `run`, has all settings but those named; without `layer`, `sae` says itself what it reads. `scores`: rows
    with 95% intervals over a domain's questions, of signed ones over training problems. `path`: the report in `out`."""

    def __init__(self, train: str | Path, domains: str | Path, /, out: str | Path = "", run="forecast", **settings):
        self.problems, asked = own_examples(Path(train)), own_examples(Path(domains))
        if (folder := Path(train).is_dir()) or len({one.domain for one in asked}) < 2:
            raise StsError(f"{train if folder else domains} {'is a folder' if folder else 'has one domain'}. Name a "
                           ".jsonl file of problems to train on, and a folder with one for each of several domains.")
        target = Path(os.path.abspath(os.path.expanduser(str(out))))
        if out and not os.access(next(filter(os.path.exists, (target, *target.parents))), os.W_OK | os.X_OK):
            raise StsError(f"The report cannot be written to {target}, which takes no files. Name another folder.")
        if settings.get("sae") and settings.get("layer") is None:
            settings["layer"] = layer_of(hook := load_sae(settings["sae"]).cfg.metadata.hook_name)
            if settings["layer"] in (None, -1):
                raise StsError(f"SAE {settings['sae']!r} says that it reads {hook!r}, not the stream after a layer. "
                               "Choose one that does; where its file only leaves it out, name the layer.")
        super().__init__("forecast_your_own", str(run), **dict(
            sft_data=str(Path(train).absolute()), sft_examples=len(self.problems), sft_held_out=0, domain_split="",
            domain_data=str(Path(domains).absolute()), demonstration_split="", domains=[], domain_limit=0) | settings)
        sums = self["question_sums"].groupby(["domain", "example_id"])[["tokens", *SCORES]].sum()
        scores = self["scores"].query("variant == 'paper'").sort_values("sts_act", ascending=False).set_index("domain")
        # Of a ratio of two means, the interval is that of its linear part.
        values = {(domain, score): row[score] + (own[part] - row[score] * own["tokens"]) / own["tokens"].mean()
                  for domain, row in scores.iterrows() for own in (sums.loc[domain],) for part, score in SCORES.items()}
        states, answers = self["training_answer_states"], split_domains(self["domain_answer_states"])
        apart_ED = projection_difference(
            states["training_sae_EL"], states["own_sae_EL"], torch.stack([own["sae_L"] for own in answers.values()]),
            chosen_by(self["shift"], self.settings.top_n))
        values |= {(domain, "signed"): apart_ED[:, place].numpy() for place, domain in enumerate(answers)}
        self.scores = pandas.DataFrame([{"domain": domain, "score": score, **paired_mean_interval(
            own, resamples=self.settings.bootstrap, seed=self.settings.seed)._asdict()}
            for (domain, score), own in values.items()])
        self.shared, self.largest = shared_questions(self.problems, asked), sums.loc[""]["icl"].sort_values()[::-1]
        self.figure = figures.intervals(self.scores, "domain", "mean", panel="score", names={
            one.domain: one.domain.replace("$", r"\$") for one in asked})
        self.path = self._report(target) if out else Path()

    def _report(self, folder: Path) -> Path:
        """All files elsewhere first, so that none is left half written."""
        loader = jinja2.FileSystemLoader(ROOT / "book" / "_static")
        html = jinja2.Environment(loader=loader, autoescape=True).get_template("forecast.html").render(page=self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as apart:
                for name, text in {"report.html": html, "run.yaml": self.settings.model_dump_json(),
                                   "scores.csv": self.scores.to_csv(index=False),
                                   "scores.json": self.scores.to_json(orient="records")}.items():
                    Path(apart, name).write_text(str(text), encoding="utf-8")
                for new in sorted(Path(apart).iterdir()):
                    new.replace(folder / new.name)
        except OSError as error:
            raise StsError(f"The report cannot be written to {folder}: {error}.") from error
        return folder / "report.html"
