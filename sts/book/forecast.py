"""A forecast of one's own data by the chapters' stages, and its report, the template book/_static/forecast.html."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pandas

from sts.book import figures
from sts.book.page import Page
from sts.data.load import by_domain, own_examples, shared_questions
from sts.errors import ROOT, StsError
from sts.measure.baselines import SCORES
from sts.measure.items import paired_mean_interval


class Forecast(Page):
    """Which domains (a folder with a .jsonl file for each) move in training on a .jsonl file of problems (`own_row`).

    A profile, `run`, has all settings but those named; without `layer`, `sae` says itself what it reads. `scores`: a
    row a domain and score, highest STS_act first, with 95% intervals over questions. `path`: of the report in `out`.
    """

    def __init__(self, train: str | Path, domains: str | Path, /, out: str | Path = "", run="forecast", **settings):
        self.problems, asked = own_examples(Path(train)), by_domain(own_examples(Path(domains)))
        if (folder := Path(train).is_dir()) or len(asked) < 2:
            raise StsError(f"{train if folder else domains} {'is a folder' if folder else 'has one domain'}. Name a "
                           ".jsonl file of problems to train on, and a folder with one for each of several domains.")
        if settings.get("sae") and settings.get("layer") is None:
            from sts.engine.saes import layer_of, load_sae

            settings["layer"] = layer_of(load_sae(settings["sae"]).cfg.metadata.hook_name)
        super().__init__("forecast_your_own", run, **{
            "sft_data": str(Path(train).absolute()), "sft_examples": len(self.problems), "sft_held_out": 0,
            "domain_data": str(Path(domains).absolute()), "domain_split": "", "domains": [], "domain_limit": 0,
            "demonstration_split": "", **settings})
        sums, rows = self["question_sums"].groupby(["domain", "example_id"])[["tokens", *SCORES]].sum(), []
        scores = self["scores"].query("variant == 'paper'").sort_values("sts_act", ascending=False).set_index("domain")
        for domain, stored in scores.iterrows():
            own = sums.loc[domain]
            for part, score in SCORES.items():  # of a ratio of two means, the interval is that of its linear part
                left = (own[part] - stored[score] * own["tokens"]) / own["tokens"].mean()
                rows.append({"domain": domain, "score": score, **paired_mean_interval(
                    stored[score] + left, resamples=self.settings.bootstrap, seed=self.settings.seed)._asdict()})
        self.scores, self.largest = pandas.DataFrame(rows), sums.loc[""]["icl"].sort_values(ascending=False)
        self.shared = shared_questions(self.problems, [one for own in asked.values() for one in own])
        self.figure = figures.intervals(rows, "domain", "mean", panel="score", names={
            domain: domain.replace("$", r"\$") for domain in asked})
        self.path = self._report(Path(out).expanduser().absolute()) if out else Path()

    def _report(self, folder: Path) -> Path:
        """Each file under another name first, so that none is left half written."""
        loader = jinja2.FileSystemLoader(ROOT / "book" / "_static")
        html = jinja2.Environment(loader=loader, autoescape=True).get_template("forecast.html").render(page=self)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in {"scores.csv": self.scores.to_csv(index=False), "scores.json": self.scores.to_json(
                    orient="records"), "run.yaml": self.settings.model_dump_json(), "report.html": html}.items():
                (new := folder / f".{name}.new").write_text(str(text), encoding="utf-8")
                new.replace(folder / name)
        except OSError as error:
            raise StsError(f"The report cannot be written to {folder}: {error}.") from error
        return folder / "report.html"
