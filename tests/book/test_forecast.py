"""A forecast of one's own data: on the smoke model, from files that the tests write."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

import sts
from sts import cli
from sts.data.check import Row
from sts.data.load import gsm_symbolic, load_examples, mmlu_exemplars, own_examples
from sts.data.sources import own_row
from sts.errors import StsError
from sts.measure.items import paired_mean_interval
from sts.run import resources
from sts.run.run import OpenRun

SMALL = {"run": "smoke", "demonstrations": 1, "demonstration_draws": 2, "shift_tokens": 2000, "score_tokens": 4000}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The chapters' own data in the columns of one's own, with HTML in a question of either file."""
    folder = tmp_path_factory.mktemp("own")
    problems = [{"question": one.question, "solution": one.solution} for one in gsm_symbolic(14, seed=0)]
    problems[0]["question"] = "<script>alert('p')</script> " + problems[0]["question"]
    write(folder / "train.jsonl", problems)
    for domain in ("law", "health", "<b>$x_$&"):
        own = [one for one in mmlu_exemplars() if one.domain == domain.replace("<b>$x_$&", "physics")][:8]
        write(folder / "domains" / f"{domain}.jsonl", [{
            "question": f"{one.question} <img src=x onerror=alert(1)>", "options": list(one.options),
            "answer": one.answer, "solution": one.solution} for one in own])
    return folder


@pytest.fixture(scope="module")
def found(data):
    return sts.forecast(data / "train.jsonl", data / "domains", out=data / "out", **SMALL)


# --- the numbers --------------------------------------------------------------------------------------------------


def test_on_a_chapters_own_data_the_scores_are_the_chapters(data, tmp_path, monkeypatch):
    own = load_examples(str(data / "domains"))
    write(tmp_path / "gsm8k" / "train.jsonl", [
        {"question": one.question, "answer": f"{one.solution}\n#### {one.answer}"} for one in gsm_symbolic(12, seed=3)])
    write(tmp_path / "mmlu_pro" / "test.jsonl", [
        {"question_id": place, "category": one.domain, "question": one.question, "options": list(one.options),
         "answer_index": one.answer_index, "cot_content": one.solution} for place, one in enumerate(own)])
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    chapter = sts.open_run("smoke", sft_data="gsm8k", domain_data="mmlu_pro", sft_examples=12, sft_held_out=0,
                           domain_limit=0, **{name: value for name, value in SMALL.items() if name != "run"})
    theirs = chapter.get("scores").query("variant == 'paper'").set_index("domain")
    ours = sts.forecast(tmp_path / "gsm8k" / "train.jsonl", data / "domains", **SMALL).scores
    assert len(ours) == 9
    for row in ours[ours["score"] != "signed"].itertuples():
        assert row.mean == pytest.approx(theirs.loc[row.domain, row.score], rel=1e-5)
    assert list(ours["domain"][:6:2]) == list(theirs["sts_act"].sort_values(ascending=False).index)


def test_a_score_is_what_its_questions_add_up_to(found):
    sums = found["question_sums"]
    for row in found.scores[found.scores["score"] != "signed"].itertuples():
        own = sums[sums["domain"] == row.domain]
        part = {"sts_act": "act", "sts_icl": "icl"}[row.score]
        assert own[part].sum() / own["tokens"].sum() == pytest.approx(row.mean, rel=1e-4)
        assert row.n == own["example_id"].nunique() == 8 and row.kind == "t" and row.low < row.mean < row.high
    shift = found["shift"]["squared_difference_L"]
    top = np.argsort(-shift.numpy(), kind="stable")[:found.settings.top_n]
    assert found.largest.sum() == pytest.approx(shift.numpy()[top].sum(), rel=1e-4)


def test_the_interval_is_the_ratios_by_the_delta_method(found):
    row = found.scores.iloc[0]
    own = found["question_sums"].query("domain == @row.domain").groupby("example_id")[["tokens", "act"]].sum()
    y, x = own["act"].to_numpy(), own["tokens"].to_numpy()
    n, ratio = len(y), y.sum() / x.sum()
    cov = np.cov(y, x)
    error = np.sqrt((cov[0, 0] - 2 * ratio * cov[0, 1] + ratio**2 * cov[1, 1]) / n) / x.mean()
    assert row["standard_error"] == pytest.approx(error, rel=1e-3)
    half = paired_mean_interval(np.arange(n)).high - (n - 1) / 2  # Student's t for so few
    factor = half / np.std(np.arange(n), ddof=1) * n**0.5
    assert (row["high"] - row["low"]) / 2 == pytest.approx(factor * error, rel=1e-3)


def test_the_signed_column_is_the_projection_difference_in_d_n(found):
    chosen = np.argsort(-found["shift"]["squared_difference_L"].numpy(), kind="stable")[:found.settings.top_n]
    states, answers = found["training_answer_states"], found["domain_answer_states"]
    led = (states["training_sae_EL"] - states["own_sae_EL"]).double().numpy()[:, chosen]
    domains = sorted({name.rpartition("/")[0] for name in answers})
    means = np.stack([answers[f"{domain}/sae_L"].double().numpy() for domain in domains])
    rows = found.scores[found.scores["score"] == "signed"].set_index("domain")
    for place, domain in enumerate(domains):
        towards = (means[place] - means.mean(0))[chosen]
        each = led @ towards / np.linalg.norm(towards)
        assert rows.loc[domain, "mean"] == pytest.approx(each.mean(), rel=1e-5)
        assert rows.loc[domain, "standard_error"] == pytest.approx(each.std(ddof=1) / len(each) ** 0.5, rel=1e-5)


def test_cards_are_of_the_latents_that_set_the_ends_apart(found):
    cards = found["difference_latents"]
    first, last = found.scores["domain"].iloc[0], found.scores["domain"].iloc[5]
    apart = [abs(card["act"][first] - card["act"][last]) for card in cards]
    assert len(cards) == 10 and apart == sorted(apart, reverse=True) and apart[0] > 0
    kinds = {context["kind"] for card in cards for context in card["contexts"]}
    assert kinds <= {"training set", "law", "health", "<b>$x_$&"} and len(kinds) > 1


# --- the report ---------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.said = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said += data


def test_the_report_stands_by_itself_and_shows_html_as_text(found):
    page = Tags(found.path.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.found if tag in ("script", "link", "iframe", "object")]
    images = [own for tag, own in page.found if tag == "img"]
    assert len(images) == 1 and images[0]["src"].startswith("data:image/png;base64,")
    assert not [name for _, own in page.found for name in own if name.startswith("on")]
    assert "<script>alert('p')</script>" in page.said and "train.jsonl, row 1" in page.said
    for domain in ("law", "health", "<b>$x_$&"):
        assert domain in page.said
    for stage in ("shift", "domain_stats", "question_sums"):
        assert f"{found.run.provenance(stage)['work']['tokens']:,}" in page.said
    assert "{{" not in page.said and "{%" not in page.said


def test_its_numbers_are_there_as_files_and_its_run_can_be_opened(found):
    folder = found.path.parent
    assert {path.name for path in folder.iterdir()} == {"report.html", "scores.csv", "scores.json", "run.yaml"}
    pandas.testing.assert_frame_equal(pandas.read_csv(folder / "scores.csv"), found.scores)
    assert [row["domain"] for row in json.loads((folder / "scores.json").read_text())] == list(found.scores["domain"])
    again = sts.open_run(str(folder / "run.yaml"))
    assert again.key("scores") == found.run.key("scores")
    assert len(resources.train(again)) == 14 and again.settings.sft_held_out == 0


def test_questions_that_are_trained_on_are_counted(data, tmp_path):
    problems = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    write(tmp_path / "domains" / "same.jsonl", problems[:7])
    write(tmp_path / "domains" / "other.jsonl", [{"question": f"What is {n} + 1, all in all?", "answer": n + 1}
                                                 for n in range(6)])
    own = sts.forecast(data / "train.jsonl", tmp_path / "domains", out=tmp_path / "out", **SMALL)
    assert own.shared == 7 and "7 of the domains&#39; questions are" in own.path.read_text().replace("'", "&#39;")


# --- rows of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "expected"), [
    ({"question": "How?", "solution": "So.", "answer": "7"}, ((), -1, "So.")),
    ({"question": "How?", "answer": 7}, ((), -1, "7")),
    ({"question": "How?", "answer": "6 + 1 = <<6+1=7>>7\n#### 7"}, ((), -1, "6 + 1 = 7\n#### 7")),
    ({"question": "Which?", "options": ["a", "b"], "answer_index": 1}, (("a", "b"), 1, "")),
    ({"question": "Which?", "options": ["a", "b"], "answer": "B"}, (("a", "b"), 1, "")),
    ({"question": "Which?", "options": ["a", " b"], "answer": "b "}, (("a", " b"), 1, "")),
    ({"question": "How?", "options": None, "answer_index": None, "answer": "7", "solution": None}, ((), -1, "7")),
    ({"question": "Which?", "options": ["B", "A"], "answer": "A"}, (("B", "A"), 1, "")),  # a text before a letter
    ({"question": "Which?", "options": ["a", "b"], "answer": "b", "solution": "Why."}, (("a", "b"), 1, "Why."))])
def test_a_row_is_read_as_it_can_be_meant(values, expected):
    one = own_row(Row(values, "law.jsonl", 3), "law")
    assert (one.options, one.answer_index, one.solution) == expected
    assert one.domain == "law" and one.question == values["question"]


def test_rows_that_ask_the_same_count_once_in_each_domain(tmp_path):
    for domain in ("a", "b"):
        write(tmp_path / f"{domain}.jsonl", [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2"},
                                             {"question": " One? ", "answer": "other"}])
    (tmp_path / "._a.jsonl").write_bytes(b"\x00")  # what some file systems leave beside a file
    assert [(one.domain, one.answer or one.solution) for one in own_examples(tmp_path)] == [
        ("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]


GOOD = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]


@pytest.mark.parametrize(("train", "domains", "message"), [
    ("", {}, r"train\.jsonl holds no problems"),
    ("{\n", {}, r"train\.jsonl, row 1: not JSON"),
    ('{"question": "a", "answer": "b"}\n{"question": \n', {}, r"train\.jsonl, row 2: not JSON"),
    ("[" * 200_000, {}, r"train\.jsonl, row 1: not JSON"),
    ('{"question": "a"}\n', {}, r"train\.jsonl, row 1, column 'answer': missing; the row has question"),
    ('\n{"answer": "a"}\n', {}, r"train\.jsonl, row 2, column 'question': missing"),
    (json.dumps({"question": "x" * 10_000_000, "answer": "b"}), {}, r"row 1, column 'question': more than 200,000"),
    (None, {"b": []}, r"b\.jsonl holds no problems"),
    (None, {"b": None}, r"domains has one domain\. Name"),
    (None, {"a": None, "b": None}, r"domains is not there\. Name"),
    (None, {"b": GOOD[:2]}, r"Domain 'b' has 2 different questions, too few.*Use at most 1 demonstrations"),
    (None, {"b": [{"question": "a", "options": "no list", "answer": "A"}]}, r"b\.jsonl, row 1, column 'options'"),
    (None, {"b": [{"question": "a", "options": ["a", "b"], "answer": "C"}]}, r"b\.jsonl, row 1.*value 'C'.*: A, B"),
    (None, {"b\udce9": GOOD}, r"File name .*b\\udce9\.jsonl' is no text in UTF-8"),
    (None, {"b": None, "b.jsonl/c": GOOD}, r"domains/b\.jsonl cannot be read: Is a directory"),
    (None, {"b": [*GOOD, {"question": "end", "answer": "so " * 9000}]}, r"not fit the model's context.*'.*so so so")])
def test_wrong_data_is_one_line_and_no_report(tmp_path, monkeypatch, capsys, train, domains, message):
    write(tmp_path / "train.jsonl", GOOD)
    if train is not None:
        (tmp_path / "train.jsonl").write_text(train)
    for domain, rows in ({"a": GOOD, "b": GOOD} | domains).items():
        if rows is not None:
            write(tmp_path / "domains" / f"{domain}.jsonl", rows)
    monkeypatch.setattr("sys.argv", [
        "sts", "forecast", "--model", "random-llama", "--sae", "train", "--layer", "0", "--train",
        str(tmp_path / "train.jsonl"), "--domains", str(tmp_path / "domains"), "--out", str(tmp_path / "out"),
        "-p", "run=smoke", "-p", "demonstrations=2"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    error = capsys.readouterr().err.splitlines()
    said = [line for line in error if line.startswith("sts: ")]
    assert leaving.value.code == 2 and len(said) == 1 and "Traceback" not in error
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_in_place_of_the_file_and_a_file_in_place_of_the_report_are_said(data, tmp_path, monkeypatch):
    with pytest.raises(StsError, match="domains is a folder. Name a .jsonl file"):
        sts.forecast(data / "domains", data / "domains", **SMALL)
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(OpenRun, "get", None)  # said before anything is computed
    with pytest.raises(StsError, match="cannot be written to .*out"):
        sts.forecast(data / "train.jsonl", data / "domains", out=tmp_path / "out", **SMALL)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_report_that_cannot_take_its_place_leaves_the_folder_as_it_was(found, data, tmp_path):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    with pytest.raises(StsError, match="cannot be written to .*out: .*Is a directory"):
        sts.forecast(data / "train.jsonl", data / "domains", out=tmp_path / "out", **SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_what_the_machine_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sts", "forecast", "--model", "random-llama", "--sae", "s", "--train", "x" * 300,
                                     "--domains", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("sts: [Errno 36] File name too long")


def test_the_layer_is_the_one_that_the_sae_names(found, data):
    own = sts.forecast(data / "train.jsonl", data / "domains", sae=str(found["sae"]), model="random-llama", top_n=16,
                       **SMALL | {"run": "forecast"})
    assert sts.open_run("forecast").settings.layer == 22 and own.settings.layer == 0


@pytest.mark.parametrize("hook", [None, "blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"])
def test_an_sae_that_names_no_layer_is_not_read_at_the_profiles(found, data, tmp_path, hook):
    shutil.copytree(found["sae"], tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    cfg = json.loads(file.read_text())
    cfg["metadata"]["hook_name"] = hook
    file.write_text(json.dumps(cfg))
    with pytest.raises(StsError, match=f"sae' says that it reads {hook!r}.*name the layer"):
        sts.forecast(data / "train.jsonl", data / "domains", sae=str(tmp_path / "sae"), **SMALL)
