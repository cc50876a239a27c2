"""A forecast of one's own data by the chapters' stages, and its report, whose prose is book/_static/forecast.html."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template

import pandas

from sts.book import figures
from sts.book.page import Page
from sts.data.load import by_domain, own_examples, shared_questions
from sts.errors import ROOT, StsError
from sts.measure.baselines import SCORES
from sts.measure.items import paired_mean_interval


class Forecast(Page):
    """Which domains (one .jsonl file each in a folder) move in training on a .jsonl file of problems; see `own_row`.

    A profile, `run`, has all settings but those named; without `layer`, `sae` says itself what it reads. `scores`: a
    row a domain, with 95% intervals over its questions, and `shared`, how many of them are in the file as well.
    """

    def __init__(self, train: str | Path, domains: str | Path, run: str = "forecast", **settings):
        if not Path(train).is_file():
            raise StsError(f"{train} is no file. Name a .jsonl file of problems to train on.")
        self.problems, asked = own_examples(Path(train)), by_domain(own_examples(Path(domains)))
        if len(asked) < 2:
            raise StsError(f"{domains} holds one domain, {[*asked][0]!r}; a forecast compares several. Name a folder "
                           "with a .jsonl file for each.")
        if settings.get("sae") and settings.get("layer") is None:
            from sts.engine.saes import layer_of, load_sae

            settings["layer"] = layer_of(load_sae(settings["sae"]).cfg.metadata.hook_name)
            if settings["layer"] is None:
                raise StsError(f"SAE {settings['sae']!r} does not say after which layer it reads. Name the layer.")
        super().__init__("forecast_your_own", run, **{
            "sft_data": str(Path(train).absolute()), "sft_examples": len(self.problems), "sft_held_out": 0,
            "domain_data": str(Path(domains).absolute()), "domain_split": "", "domains": [], "domain_limit": 0,
            "demonstration_split": "", **settings})
        sums, rows, marks = self["question_sums"].groupby(["domain", "example_id"])[["tokens", *SCORES]].sum(), [], []
        scores = self["scores"].query("variant == 'paper'").sort_values("sts_act", ascending=False)
        for stored in scores.to_dict("records"):
            own, shared = sums.loc[stored["domain"]], shared_questions(self.problems, asked[stored["domain"]])
            rows.append({"domain": stored["domain"], "questions": len(own), "shared": shared})
            for part, score in SCORES.items():  # of a ratio of two means, the interval is that of its linear part
                found = paired_mean_interval(
                    stored[score] + (own[part] - stored[score] * own["tokens"]) / own["tokens"].mean(),
                    resamples=self.settings.bootstrap, seed=self.settings.seed)
                rows[-1] |= {score: stored[score], f"{score}_low": found.low, f"{score}_high": found.high}
                marks.append({"domain": stored["domain"], "score": score, **found._asdict()})
        self.scores, self.largest = pandas.DataFrame(rows), sums.loc[""]["icl"].sort_values(ascending=False)
        self.figure = figures.intervals(marks, "domain", "mean", panel="score", names={
            domain: domain.replace("$", r"\$") for domain in asked})

    def report(self, out: str | Path) -> Path:
        """Write scores.csv, scores.json, run.yaml (for `sts stage`) and report.html, which is returned, to a folder;
        each under another name first, so that none is left half written."""
        folder, static = Path(out).expanduser().absolute(), ROOT / "book" / "_static"
        begins = {one.example_id: one.question[:300] for one in self.problems}
        parts = {
            "style": (static / "sts.css").read_text(encoding="utf-8"), "run": self.banner(),
            "scores": self.table(self.scores), "figure": self.tabs({"STS": self.figure}, "STS", ""),
            "problems": self.table([{"problem": name, "begins": begins[name], "%": 100 * icl / self.largest.sum()}
                                    for name, icl in self.largest[:10].items()]),
            "latents": self.latents(stages=("difference_latents",), about={
                one["latent"]: [f"{domain}: {act:.3g}" for domain, act in one["act"].items()]
                for one in self["difference_latents"]}),
            "cost": self.table([{"stage": stage, "tokens": note["work"]["tokens"], "seconds": note["seconds"]}
                                for stage in self.run.used if (note := self.run.provenance(stage))]),
            "provenance": self.provenance()}
        files = {"scores.csv": self.scores.to_csv(index=False), "scores.json": self.scores.to_json(orient="records"),
                 "run.yaml": self.settings.model_dump_json(indent=1), "report.html": Template(
                     (static / "forecast.html").read_text(encoding="utf-8")).substitute(
                     {name: str(getattr(part, "data", part)) for name, part in parts.items()})}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (new := folder / f".{name}.{os.getpid()}").write_text(text, encoding="utf-8")
                os.replace(new, folder / name)
        except OSError as error:
            raise StsError(f"The report cannot be written to {folder}: {error}.") from error
        return folder / "report.html"
