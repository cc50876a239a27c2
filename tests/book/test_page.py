"""Cards, tables, tabs and the scorecard show what is stored, escaped; a changed result changes them."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas
import pytest
from bs4 import BeautifulSoup

from sts.book import claims, figures
from sts.book.page import Page
from sts.errors import ROOT, StsError
from sts.run.recorded import BLANK


def soup(shown):
    return BeautifulSoup(shown if isinstance(shown, str) else shown.data, "html.parser")


def texts(nodes):
    return [" ".join(node.get_text(" ").split()) for node in nodes]


# --- tables -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str
    r: float | None


def test_a_table_has_the_columns_it_is_asked_for():
    rows = [
        {"measure": "bits", "pearson": 0.5, "interval": {"low": -0.001, "high": 1234.5}, "n": 1400},
        {"measure": "<b>", "pearson": None, "interval": None, "n": 3},
    ]
    found = soup(
        figures.table(
            rows,
            {
                "in": "measure",
                "r": "{pearson:+.2f}",
                "interval": "{interval[low]:.2f} to {interval[high]:.0f}",
                "high": "interval.high",
                "twice": lambda row: 2 * row["n"],
                "n": "n",
            },
        )
    )
    assert texts(found.select("th")) == ["in", "r", "interval", "high", "twice", "n"]
    assert texts(found.select("td")) == [
        "bits",
        "+0.50",
        "0.00 to 1234",
        "1,234",
        "2,800",
        "1,400",
        "<b>",
        "",
        "",
        "",
        "6",
        "3",
    ]
    assert not found.select("td b") and found.select("div.sts-scroll > table")


def test_a_table_takes_frames_and_dataclasses_and_folds():
    frame = pandas.DataFrame({"domain": ["law"], "shift": [float("nan")], "right": [True]})
    assert texts(soup(figures.table(frame)).select("td")) == ["law", "", "yes"]
    found = soup(figures.table([Row("a", 0.12345), Row("b", None)], fold="All <rows>"))
    assert texts(found.select("td")) == ["a", "0.123", "b", ""] and found.summary.get_text() == "All <rows>"
    assert "open" not in found.details.attrs


# --- verdicts as coloured words -----------------------------------------------------------------------------------


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return sum(
        weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


@pytest.mark.parametrize("word", claims.WORDS)
def test_every_verdict_is_a_word_that_can_be_read_on_its_colour(word):
    style = (ROOT / "book" / "_static" / "sts.css").read_text()
    own = re.search(rf"\.sts-{word.replace(' ', '-')} {{(.*?)}}", style, re.DOTALL).group(1)
    colours = {"color": "#ffffff"} | dict(re.findall(r"(background|color): (#\w+)", own))
    full = {
        name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
        for name, value in colours.items()
    }
    low, high = sorted(luminance(full[name]) for name in ("color", "background"))
    assert (high + 0.05) / (low + 0.05) >= 4.5


# --- a page on a run ----------------------------------------------------------------------------------------------


class Run:
    """A run with given results, of which it computes nothing."""

    def __init__(self, folder, **results):
        (folder / "training.json").write_text(json.dumps({"held_out_before": 2.0, "held_out_after": 1.0}))
        self.results = {"sft": folder} | results
        self.settings = SimpleNamespace(
            name="stub", seed=0, seeds=[], description="a <run>", model="tiny", layer=1, top_n=2, sae="train",
            selective_latents=[2], mixture_steps=[1.0], published=False,
        )
        self.changed, self.used = {"top_n": 2}, ("sft",)

    def alone(self, seed):
        return self

    def get(self, stage):
        if stage not in self.results:
            raise StsError(f"{stage} would have to be computed")
        return self.results[stage]

    def stored(self, stage):
        return stage in self.results

    def only_stored(self):
        return self

    def provenance(self, stage):
        return {}


def correlations(r=0.6):
    return [
        {
            "measure": "bits",
            "variant": "paper",
            "score": score,
            "n": 14,
            "pearson": r,
            "p": 0.01,
            "pearson_interval": {"low": r - 0.3, "high": r + 0.2},
        }
        for score in ("sts_act", "sts_icl")
    ]


def test_a_card_says_claim_numbers_verdict_and_folds_the_rule(tmp_path):
    page = Page("transferability_score", Run(tmp_path, score_checks=correlations()))
    card = soup(page.claims("score-icl")).select_one(".sts-card")
    claim = claims.read_claims()[1]["score-icl"]
    assert texts(card.select(".sts-verdict")) == ["held"] and texts(card.select(".sts-says")) == [claim.says]
    outside = " ".join(text for text in card.find_all(string=True) if not text.find_parent("details"))
    assert "0.60 (0.30 to 0.80)" in outside and "n = 14 domains, 1 seed" in outside and claim.paper in outside
    assert claim.rule_text in " ".join(card.details.get_text(" ").split()) and "95%" not in outside


def counts_and_rows(board, part):
    """Of the scorecard's first or second part."""
    listed, table = (soup(board).select(kind)[part] for kind in (".sts-counts", ".sts-scorecard"))
    counts = {text.rsplit(" ", 1)[0]: int(text.rsplit(" ", 1)[1]) for text in texts(listed.select("li"))}
    return counts, {cells[0]: cells for cells in (texts(row.select("td")) for row in table.select("tbody tr"))}


def rival_results(less=0.2, lead=0.1, held=0.9, helped=0.2):
    """Stored results of the chapter on rivals, of which the forecast named best leads one sign for all."""
    rivals = [{"measure": "bits", "kind": "rival", "predictor": name, "n": 14, "pearson": 0.4,
               "less": {"sts_act": {"mean": own, "interval": {"low": own - 0.1, "high": own + 0.1}}}}
              for name, own in (("influence", less), ("pd_raw", 0.5))]
    signs = [{"measure": "bits", "part": "others", "forecast": name, "n": 40, "share": 0.8, "low": 0.7, "high": 0.9,
              "lead": {"mean": lead, "low": lead - 0.08, "high": lead + 0.1}, "best": name == "influence"}
             for name in ("pd_raw", "influence")]
    coverage = [{"measure": "bits", "score": "sts_act", "part": part, "n": 14, "share": held,
                 "narrower": 0.3} for part in ("own", "others")]
    matrix = pandas.DataFrame({"training_set": ["a", "b"], "loss_fall": [0.5, 0.5]})
    examples = [{"measure": "bits", "ranking": name, "mean": own, "low": own - 0.1, "high": own + 0.1, "p": 0.02}
                for name, own in (("overlap", 0.3), ("projection", helped), ("influence", 0.2))]
    return {"rival_correlations": rivals, "rival_tests": {"signs": signs, "coverage": coverage},
            "training_matrix": matrix, "change_quality": [], "example_effects": examples}


def test_what_goes_beyond_the_paper_has_cards_and_a_part_of_the_scorecard_of_its_own(tmp_path):
    ids = ("beats-rivals", "sign-beyond-one", "intervals-hold", "examples-move")

    def shown(**changed):
        page = Page("rivals", Run(tmp_path, **rival_results(**changed)))
        words = texts(soup(page.claims(*ids)).select(".sts-card > .sts-verdict"))
        return words, *counts_and_rows(page.scorecard(), 1)

    words, counts, rows = shown()
    assert words == ["held"] * 4 and counts["held"] == 4 == sum(counts.values())
    assert [*rows] == ["Rivals", "The sign", "Intervals", "Single examples"]
    assert {cells[3] for cells in rows.values()} == {""}
    assert "0.20 (0.10 to 0.30)" in rows["Rivals"][4] and "10% (2% to 20%)" in rows["The sign"][4]
    words, counts, rows = shown(less=0.05)
    assert words[0] == "not held" == rows["Rivals"][1] and (counts["held"], counts["not held"]) == (3, 1)
    words, counts, rows = shown(lead=-0.05)
    assert words[1] == "not held" == rows["The sign"][1] and counts["not held"] == 1
    words, counts, rows = shown(held=0.7)
    assert words[2] == "not held" == rows["Intervals"][1] and "70%" in rows["Intervals"][4]
    words, counts, rows = shown(helped=0.05)
    assert words[3] == "not held" == rows["Single examples"][1] and counts["not held"] == 1
    page = Page("scorecard", Run(tmp_path))
    assert counts_and_rows(page.scorecard(), 1)[0]["not done yet"] == 4
    assert sum(counts_and_rows(page.scorecard(), 0)[0].values()) == 17


def test_a_changed_result_changes_card_row_and_count(tmp_path):
    def shown(**results):
        page = Page("scorecard", Run(tmp_path, **results))
        card = texts(soup(page.claims("score-icl")).select(".sts-card > .sts-verdict"))[0]
        counts, rows = counts_and_rows(page.scorecard(), 0)
        return card, counts, rows

    card, counts, rows = shown(score_checks=correlations())
    assert len(rows) == 17 and sum(counts.values()) == 17
    row = rows["Figure 3, Tables 6 and 9"]
    # The claims in accuracy are missing, and what is missing never counts as held.
    assert (card, counts["held"], counts["in part"], row[1]) == ("held", 0, 1, "in part")
    assert "0.60 (0.30 to 0.80)" in row[4]
    other, changed, moved = shown(score_checks=correlations(0.2))
    assert (other, changed["in part"], changed["not held"]) == ("not held", 0, counts["not held"] + 1)
    assert (
        moved["Figure 3, Tables 6 and 9"][1] == "not held"
        and "0.20 (-0.10 to 0.40)" in moved["Figure 3, Tables 6 and 9"][4]
    )
    card, counts, rows = shown()
    assert card == "not done yet" and counts["not done yet"] == 17 and counts["held"] == 0
    assert rows["Figure 3, Tables 6 and 9"][1] == rows["Figure 6"][1] == "not done yet"


def test_every_row_of_the_scorecard_leads_to_its_chapter(tmp_path):
    board = soup(Page("scorecard", Run(tmp_path)).scorecard())
    linked = {link["href"].removesuffix(".html") for link in board.select("tbody a")}
    assert linked and all((ROOT / "notebooks" / f"{name}.ipynb").is_file() for name in linked)


def test_the_banner_names_run_and_changes_escaped(tmp_path):
    said = soup(Page("x", Run(tmp_path)).banner()).get_text()
    assert "a <run>" in said and "Changed from the profile: top_n = 2." in said


def test_tabs_hold_a_figure_each_and_show_the_first(tmp_path):
    page = Page("x", Run(tmp_path))
    figure, _ = plt.subplots()
    plt.close(figure)
    found, again = (
        soup(page.tabs({"bits": figure, "acc<uracy": figure}, alt="A plot", caption="What it is")) for _ in range(2)
    )
    assert [tab.has_attr("checked") for tab in found.select("input")] == [True, False]
    assert texts(found.select("label")) == ["bits", "acc<uracy"] and texts(found.select("figcaption")) == ["What it is"]
    assert [image["alt"] for image in found.select("figure > img")] == ["A plot: bits", "A plot: acc<uracy"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.select("img"))
    assert found.input["name"] != again.input["name"]  # two sets of tabs on a page do not switch each other


def test_measures_have_an_order(tmp_path):
    page = Page("x", Run(tmp_path, domain_shift=pandas.DataFrame({"measure": ["accuracy", "bits", "bits", "p_right"]})))
    assert page.measures == ["bits", "p_right", "accuracy"] and page.primary == "bits"


# --- latent cards -------------------------------------------------------------------------------------------------


def context(*tokens, peak, value=3.0):
    return {
        "value": value,
        "peak": peak,
        "tokens": list(tokens),
        "values": [value if place == peak else 0.0 for place in range(len(tokens))],
    }


def test_cards_show_text_and_no_template(tmp_path):
    card = {
        "latent": 7,
        "rate": 0.0123,
        "contexts": [
            context("<|im_start|>", "user", "\n", "What", " is", " <b>", "?", "<|im_end|>", "\n", peak=4),
            context("<|im_start|>", "us", "er", "\n", "Why", "?", peak=4),
            context("no", "<|im_start|>", "assistant", peak=1),
        ],
    }
    logits = {
        "latent": 7,
        "promoted": [" maths", "<|im_end|>", "\n"],
        "demoted": ["<i>"],
    }
    strengths = {
        "latent": 7,
        "histogram": [100, 10, 0, 1],
        "middling": [context("a", " mid", peak=1)],
    }
    run = Run(tmp_path, latent_examples=[card], latent_logits=[logits, {"latent": 8}], latent_strengths=[strengths])
    found = soup(Page("x", run).latents())
    said = texts(found.select("blockquote"))
    assert "What is <b>?" in said and "a mid" in said and not any("<|" in text or "user" in text for text in said)
    assert texts(found.select("code")) == ["maths", "'\\n'", "<i>"] and not found.select("b, i, a")
    assert texts(found.select(".sts-tok")) == ["is", "Why", "mid"]
    heights = [
        float(bar["style"].removeprefix("height: ").removesuffix("%")) for bar in found.select(".sts-histogram span")
    ]
    assert heights == [100, 52, 0, 15]  # logarithms of one more
    blank = card | {"contexts": [context(BLANK, peak=0)]}  # as recorded: without texts, and not every stage
    hidden = soup(Page("x", Run(tmp_path, latent_examples=[blank], latent_logits=[logits])).latents())
    assert not hidden.select("blockquote") and "fires on 1.23% of tokens, at most 3.0" in hidden.get_text()
    assert "The texts are not here." in hidden.get_text() and texts(hidden.select("code"))[-1] == "<i>"


def card(latent, text="a text", **more):
    return {"latent": latent, "rate": 0.1, "contexts": [context(text, peak=0) | {"kind": "code <of> kinds"}]} | more


def test_cards_to_be_searched_are_folded_and_everything_in_them_is_escaped(tmp_path):
    evil = "</details><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = Run(tmp_path, shifted_examples=[card(7, evil, promoted=[evil], histogram=[1, 2]), card(8)])
    found = soup(Page("x", run).latents(1, ["shifted_examples"], {7: [f"rank 1 & {evil}"]}, fold=f"All {evil}"))
    box = found.select_one("details.sts-search")
    assert len(box.select(".sts-latent-card")) == 1 and not found.select("script, img, [onerror]")
    assert texts(box.select("blockquote")) == [f"{evil} code <of> kinds"] and texts(box.select("code")) == [evil]
    assert f"rank 1 & {evil}" in box.get_text() and f"All {evil}" in box.summary.get_text()


def test_as_many_cards_stand_on_a_page_as_fit(tmp_path):
    many = [card(number, "many words & more " * 400) for number in range(400)]
    shown = Page("x", Run(tmp_path, shifted_examples=many)).latents(400, ["shifted_examples"], fold="cards").data
    assert 1_900_000 < len(shown.encode()) <= 2_000_500
    latents = [heading.get_text() for heading in soup(shown).select("h4")]
    assert latents == [f"Latent {number}" for number in range(len(latents))]  # the first ones, none cut


def test_a_latent_that_fires_on_no_text_has_a_card(tmp_path):
    silent = {"latent": 3, "rate": 0.0, "contexts": [], "middling": []}
    found = soup(Page("x", Run(tmp_path, shifted_examples=[card(1), silent])).latents(2, ["shifted_examples"]))
    assert "fires on 0.00% of tokens, at most 0.0" in found.get_text()


@pytest.mark.parametrize(
    ("sae", "address"),
    [
        ("data/sae/ours", None),
        ("train", None),
        ("no-such-release/layer", None),
        ("llama-3-8b-it-res-jh/blocks.25.hook_resid_post", "https://www.neuronpedia.org/llama3-8b-it/25-"),
    ],
)
def test_public_saes_have_a_link_to_neuronpedia(tmp_path, sae, address):
    card = {"latent": 7, "rate": 0.0123, "contexts": [context("a", peak=0)]}
    run = Run(tmp_path, latent_examples=[card], latent_logits=[], latent_strengths=[])
    run.settings.sae = sae
    links = soup(Page("x", run).latents()).select("a")
    assert [link["href"].startswith(address) for link in links] == [True] * bool(address)
