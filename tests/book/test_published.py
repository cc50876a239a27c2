"""What is written about the published run says what its records say: every number is read from its place there."""

import json
import re
from pathlib import Path

import nbformat
import pandas
import pytest
import yaml

import sts
from sts.book import claims, evidence
from sts.book.chapters import CHAPTERS, chapter_source
from sts.book.claims import HELD, IN_PART, NOT_DONE, NOT_HELD, NOT_TESTABLE
from sts.errors import ROOT

NUMERAL = re.compile(r"(?<![\w.])[-+±−]?\d[\d,]*(?:\.\d+)?%?(?!\w)")
CELLS = [
    (chapter, place, cell)
    for chapter in CHAPTERS
    for place, cell in enumerate(nbformat.read(chapter_source(chapter), 4).cells)
    if "published" in cell.metadata.get("tags", [])
]


@pytest.fixture(scope="module")
def run():
    return sts.open_run("full")


def numerals(text):
    """The numbers that a reader sees: not those in code, formulas, addresses, roles and numbered lists."""
    for gone in (
        r"`[^`]*`",
        r"\$[^$]*\$",
        r"\]\([^)]*\)",
        r"(?m)^\s*\d+\.",
        r"(?:Figures?|Tables?) [\d]+[a-e]?(?:(?:,| to| and) \d+)*",
    ):
        text = re.sub(gone, " ", text)
    return NUMERAL.findall(text)


def read(run, selector):
    """What a selector names: a stage with [field=value, ...], [place] or .field; claim:id.field; settings.name."""
    if selector.startswith("settings."):
        return getattr(run.settings, selector.removeprefix("settings."))
    if selector.startswith("claim:"):
        name, _, rest = selector.removeprefix("claim:").partition(".")
        value = vars(evidence.weigh(run, claims.read_claims()[1][name])[0])
    else:
        stage, rest = re.match(r"(\w+)(.*)", selector).groups()
        value = run.get(stage)
        value = json.loads((value / "training.json").read_text()) if isinstance(value, Path) else value
    for where, field in re.findall(r"\[([^]]*)\]|\.?([^.[]+)", rest):
        value = value.to_dict("records") if isinstance(value, pandas.DataFrame) else value
        value = vars(value) if hasattr(value, "__dataclass_fields__") else value
        if where and not re.fullmatch(r"-?\d+", where):
            wanted = dict(pair.split("=") for pair in where.split(", "))
            [value] = [row for row in value if all(str(row[name]) == text for name, text in wanted.items())]
        else:
            value = value[int(where)] if where else value[field]
    return value.item() if hasattr(value, "item") else value


def agrees(text, value):
    """Whether a number as written is the value, rounded as it is written."""
    plain = text.replace(",", "").replace("−", "-").lstrip("+±").rstrip("%")
    scale = 100 if text.endswith("%") else 1
    decimals = len(plain.partition(".")[2])
    return abs(float(plain) - scale * float(value)) <= 0.5 * 10**-decimals + 1e-9


def test_a_number_agrees_only_with_its_own_rounding():
    assert agrees("0.60", 0.6027) and agrees("57%", 0.57) and agrees("−0.4", -0.4018) and agrees("1,200", 1200)
    assert not agrees("0.60", 0.61) and not agrees("0.4", -0.4) and not agrees("58%", 0.57)
    assert numerals("r = 0.60 in `top_n=100` of 14 ([1](a/2.md)), Tables 2 to 4, $N=3$, 57%") == [
        "0.60",
        "14",
        "1",
        "57%",
    ]


def test_selectors_reach_rows_and_claims(run):
    row = next(
        row
        for row in run.get("correlations")
        if (row["measure"], row["variant"], row["score"]) == ("accuracy", "paper", "sts_act")
    )
    assert (
        read(run, "correlations[measure=accuracy, variant=paper, score=sts_act].pearson_interval.low")
        == (row["pearson_interval"]["low"])
    )
    assert read(run, "claim:accuracy-act.value") == row["pearson"] and read(run, "settings.top_n") == run.settings.top_n
    assert read(run, "sft_trials[0].train") == run.get("sft_trials")[0]["train"]
    assert read(run, "sft.held_out_before") > 0


@pytest.mark.parametrize(("chapter", "place", "cell"), CELLS, ids=[f"{chapter}-{place}" for chapter, place, _ in CELLS])
def test_every_number_in_prose_is_read_from_the_records(run, chapter, place, cell):
    facts = cell.metadata.get("facts", {})
    assert set(numerals(cell.source)) == set(facts)
    records = yaml.safe_load((ROOT / "book" / "claims.yaml").read_text(encoding="utf-8"))
    papers = " ".join(row.get("paper", "") for row in (*records["results"], *records["claims"]))
    published = papers + (ROOT / "data" / "paper" / "published_numbers.csv").read_text(encoding="utf-8").replace(
        ",", " "
    )
    for text, selector in facts.items():
        if selector == "paper":
            assert any(
                agrees(text, float(one.rstrip("%").replace(",", "")) / (100 if one.endswith("%") else 1))
                for one in NUMERAL.findall(published)
            ), text
        else:
            assert agrees(text, read(run, selector)), f"{text} is {read(run, selector)} by {selector}"


def test_there_is_something_to_check():
    assert len(CELLS) >= 5


# --- verdicts ------------------------------------------------------------------------------------------------------

#: Claim -> its verdict in the published run: a changed rule, bound or record shows here.
VERDICTS = {
    "reconstructs": HELD,
    "splice-harmless": HELD,
    "few-latents": NOT_HELD,
    "beyond-activity": NOT_HELD,
    "raw-more-even": HELD,
    "zeroing-hurts": IN_PART,
    "foreseen": IN_PART,
    "latents-better-than-raw": NOT_HELD,
    "more-demonstrations": NOT_HELD,
    "maths-latents": NOT_HELD,
    "more-maths": NOT_HELD,
    "maths-not-code": IN_PART,
    "judge-agrees": NOT_DONE,
    "score-act": HELD,
    "score-icl": NOT_HELD,
    "accuracy-act": NOT_TESTABLE,
    "larger-act": NOT_HELD,
    "larger-icl": NOT_HELD,
    "extremes": NOT_HELD,
    "tables-2-4": NOT_TESTABLE,
    "beats-raw": NOT_HELD,
    "choice-matters": NOT_TESTABLE,
    "probe": NOT_HELD,
    "beyond-hardness": NOT_HELD,
    "width": NOT_TESTABLE,
    "layers": NOT_HELD,
    "sparsity": HELD,
    "rank": NOT_TESTABLE,
    "code": NOT_HELD,
    "health": NOT_HELD,
    "specific": NOT_HELD,
    "own-list": NOT_HELD,
    "reward-rises": HELD,
    "rl-overlap": IN_PART,
    "rl-actual": NOT_HELD,
    "own-answers": NOT_HELD,
    "read-outs-learn": NOT_HELD,
    "read-outs-specific": NOT_HELD,
    "mixture-keeps": NOT_TESTABLE,
    "mixture-gain": HELD,
    "mixture-proportion": NOT_HELD,
    "beats-rivals": NOT_HELD,
    "sign-beyond-one": NOT_HELD,
    "intervals-hold": NOT_HELD,
    "examples-move": NOT_HELD,
    "cheaper": HELD,
    "cheaper-on-paper": HELD,
    "paper-fig3": NOT_HELD,
}


def test_the_published_run_has_these_verdicts(run):
    recorded = run.only_stored(reading=False)
    found = {claim.id: evidence.weigh(recorded, claim)[1] for claim in claims.read_claims()[1].values()}
    assert found == VERDICTS


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_results_in_the_readme_are_those_of_the_records(run):
    said = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").split("\n") if line.startswith("- **")]
    wanted = [
        read(run, f"baseline_correlations[measure=bits, predictor={predictor}].{field}")
        for predictor in ("sts_act", "sts_icl", "base_bits")
        for field in ("pearson", "pearson_interval.low", "pearson_interval.high")
    ]
    wanted += [read(run, "claim:larger-icl.against.whatever it was before.value"), read(run, "claim:larger-icl.value")]
    numbers = numerals(" ".join(said))
    assert len(numbers) == len(wanted)
    assert all(agrees(text, value) for text, value in zip(numbers, wanted, strict=True)), (numbers, wanted)
