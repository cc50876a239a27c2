"""Data sets: the packaged ones, every reader on rows in the public columns, and what is said when data is missing."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sts.data import load as data
from sts.data import sources as data_sources
from sts.data.load import (
    by_domain,
    gsm_symbolic,
    load_examples,
    load_texts,
    shared_questions,
    split_options,
    training_split,
)
from sts.data.sources import Example, last_boxed
from sts.errors import ROOT, StsError

# MMLU-Pro's own list of categories.
CATEGORIES = {"biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
              "law", "math", "other", "philosophy", "physics", "psychology"}


@pytest.fixture(scope="module")
def exemplars():
    return load_examples("mmlu_exemplars")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A function that writes rows of a split as a user would lay them out under STS_DATA_DIR."""
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))

    def write(folder, split, *rows):
        path = tmp_path / folder / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


# --- packaged: worked MMLU examples ---

def test_exemplars_cover_57_subjects_in_the_14_categories_of_mmlu_pro(exemplars):
    domains = {}
    for example in exemplars:
        domains.setdefault(example.example_id.split("-")[1], set()).add(example.domain)
    assert len(domains) == 57
    assert all(len(found) == 1 for found in domains.values())
    assert set().union(*domains.values()) == CATEGORIES
    # A few assignments of MMLU-Pro that names alone do not give away.
    expected = {"virology": "health", "astronomy": "physics", "econometrics": "economics", "prehistory": "history",
                "formal_logic": "philosophy", "machine_learning": "computer science", "marketing": "business",
                "jurisprudence": "law", "sociology": "other", "high_school_statistics": "math"}
    assert {subject: domains[subject] for subject in expected} == {key: {value} for key, value in expected.items()}


def test_exemplars_are_complete_questions(exemplars):
    assert len({example.example_id for example in exemplars}) == len(exemplars)
    assert set(Counter(example.example_id.split("-")[1] for example in exemplars).values()) == {4, 5}
    for example in exemplars:
        assert len(example.options) >= 4 and all(option.strip() for option in example.options)
        assert example.answer == example.options[example.answer_index]
        assert example.question.strip() and "(A)" not in example.question[-5:]
        # The worked solution itself names the letter that answer_index stands for.
        letter = re.findall(r"answer is \(?([A-E])\)?", example.solution)
        assert letter[-1:] == ["ABCDE"[example.answer_index]]


def test_exemplars_carry_no_boilerplate_preamble(exemplars):
    boilerplate = re.compile(r"^A:|^Let['’]s (think|solve this( problem)?) step by step\.|^We refer to Wikipedia", re.I)
    assert [example.example_id for example in exemplars if boilerplate.search(example.solution)] == []


def test_a_limit_draws_without_replacement_and_the_seed_fixes_the_draw(exemplars):
    drawn = load_examples("mmlu_exemplars", limit=20, seed=3)
    assert drawn == load_examples("mmlu_exemplars", limit=20, seed=3)
    assert len(set(drawn)) == 20 and set(drawn) <= set(exemplars)
    assert drawn != load_examples("mmlu_exemplars", limit=20, seed=4)
    assert Counter(load_examples("mmlu_exemplars", limit=10_000)) == Counter(exemplars)


# --- packaged: generated arithmetic ---

def test_generated_problems_are_fixed_by_their_seed():
    first = gsm_symbolic(6, seed=5)
    assert first == gsm_symbolic(6, seed=5)
    assert not {example.question for example in first} & {example.question for example in gsm_symbolic(6, seed=6)}
    assert first == load_examples("gsm_symbolic", limit=6, seed=5)


def test_a_generated_solution_ends_in_the_answer():
    for example in gsm_symbolic(40, seed=1):
        assert example.answer and example.answer in re.findall(r"-?[\d.]+", example.solution.splitlines()[-1])
        assert (example.options, example.answer_index, example.domain) == ((), -1, "math")
        assert "final answer" not in example.question


def test_generated_train_and_test_splits_share_no_problem():
    train = load_examples("gsm_symbolic", limit=50)
    test = load_examples("gsm_symbolic", split="test", limit=50)
    assert not {example.question for example in train} & {example.question for example in test}


@pytest.mark.parametrize("name", data_sources.PUZZLES)
def test_puzzles_are_different_and_others_at_another_seed(name):
    found = load_examples(name, limit=30, seed=2)
    assert found == load_examples(name, limit=30, seed=2) and len({one.question for one in found}) == 30
    assert all(one.answer.lstrip("-").isdigit() and not (one.options or one.solution) for one in found)
    other = [one.question for one in load_examples(name, limit=30, seed=3)]
    # Few puzzles are this small, so that some are drawn again.
    assert len({one.question for one in found} & set(other)) < 20
    assert [one.question for one in found[1:]] != other[:-1]


def test_sums_are_right_and_run_out():
    found = load_examples("chain_sum", limit=1000)
    assert len(found) <= 200 and len(found) > 150
    for example in found:
        assert int(example.answer) == eval(re.search(r"[\d +-]+(?= =)", example.question).group())


# --- readers ---

ROWS = {
    ("mmlu_pro", "test"): (
        {"question_id": 7, "question": "Which of these is a metal?", "options": ["helium", "iron", "neon"],
         "answer": "B", "answer_index": 1, "cot_content": "A: Let's think step by step. Iron rusts. The answer is (B).",
         "category": "chemistry", "src": "own"},
        Example("mmlu_pro-7", "chemistry", "Which of these is a metal?", ("helium", "iron", "neon"), 1, "iron",
                "Iron rusts. The answer is (B).")),
    ("gsm8k", "train"): (
        {"question": "Ada has 4 cards and draws 6. How many?",
         "answer": "She holds 4+6=<<4+6=10>>10 cards, $<<10*1=10>>10 worth.\nNo more.\n#### 10"},
        Example("gsm8k-train-0", "math", "Ada has 4 cards and draws 6. How many?", (), -1, "10",
                "She holds 4+6=10 cards, $10 worth.\nNo more.\n#### 10")),
    ("math", "train"): (
        {"problem": "Halve $\\frac{2}{3}$.", "level": "Level 1", "type": "Algebra",
         "solution": "Half of it is $\\boxed{\\frac{1}{3}}$."},
        Example("math-train-0", "math", "Halve $\\frac{2}{3}$.", (), -1, "\\frac{1}{3}",
                "Half of it is $\\boxed{\\frac{1}{3}}$.")),
    ("limo", "train"): (
        {"question": "Add the first three odd numbers.", "solution": "1 + 3 + 5 is 9.", "answer": 9},
        Example("limo-train-0", "math", "Add the first three odd numbers.", (), -1, "9", "1 + 3 + 5 is 9.")),
    ("mmlu", "val"): (
        {"question": "Who drafts contracts?", "subject": "jurisprudence",
         "choices": ["bakers", "sailors", "lawyers", "actors"], "answer": 2},
        Example("mmlu-val-0", "jurisprudence", "Who drafts contracts?", ("bakers", "sailors", "lawyers", "actors"), 2,
                "lawyers", "")),
    # ARC numbers some options 1 to 4 rather than A to D.
    ("arc_easy", "test"): (
        {"id": "own-1", "question": "What melts first?", "choices": {"text": ["ice", "iron"], "label": ["1", "2"]},
         "answerKey": "1"},
        Example("arc_easy-test-0", "science", "What melts first?", ("ice", "iron"), 0, "ice", "")),
    ("arc_challenge", "train"): (
        {"id": "own-2", "question": "What floats?", "choices": {"text": ["stone", "cork"], "label": ["A", "B"]},
         "answerKey": "B"},
        Example("arc_challenge-train-0", "science", "What floats?", ("stone", "cork"), 1, "cork", "")),
    ("mbpp", "all"): (
        {"task_id": 1, "text": "Write a function that doubles.", "code": "def double(x):\r\n    return 2 * x",
         "test_list": ["assert double(2) == 4"]},
        Example("mbpp-all-0", "code", "Write a function that doubles.", (), -1, "",
                "def double(x):\n    return 2 * x")),
    ("counsel_chat", "all"): (
        {"title": "Sleep", "question": None, "answer": "Keep a steady hour."},
        Example("counsel_chat-all-0", "mental health", "Sleep", (), -1, "", "Keep a steady hour.")),
    ("pubmedqa", "labelled"): (
        {"pmid": "1", "question": "Does tea help?", "contexts": ["We asked ten people.", "Six slept well."],
         "final_decision": "maybe", "long_answer": "Perhaps it helps."},
        Example("pubmedqa-labelled-0", "medicine", "We asked ten people.\nSix slept well.\nDoes tea help?", (), -1,
                "maybe", "Perhaps it helps.")),
    ("roleplay", "all"): (
        {"instruction": "Speak as a lighthouse keeper.", "input": "", "response": "The fog is thick."},
        Example("roleplay-all-0", "roleplay", "Speak as a lighthouse keeper.", (), -1, "", "The fog is thick.")),
}


def test_every_question_set_has_a_row_here():
    assert {name for name, _ in ROWS} == set(data_sources.SOURCES)


@pytest.mark.parametrize(("name", "split"), list(ROWS))
def test_a_local_file_in_the_public_columns_is_read(local, name, split):
    row, expected = ROWS[name, split]
    local(name, split, row)
    assert load_examples(name, split=split) == [expected]


def test_rows_keep_their_order_and_blank_lines_are_passed_over(local):
    row = ROWS["limo", "train"][0]
    path = local("limo", "train", row, {**row, "question": "Second?"})
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    assert [example.question for example in load_examples("limo")] == [row["question"], "Second?"]


def test_without_a_split_the_first_one_is_read(local):
    row = ROWS["gsm8k", "train"][0]
    local("gsm8k", "test", {**row, "question": "from test"})
    local("gsm8k", "train", {**row, "question": "from train"})
    assert load_examples("gsm8k")[0].question == "from train"
    assert load_examples("gsm8k", split="test")[0].question == "from test"


def test_the_data_folder_may_be_named_from_the_home_folder(local, tmp_path, monkeypatch):
    local("limo", "train", ROWS["limo", "train"][0])
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("STS_DATA_DIR", f"~/{tmp_path.name}")
    assert len(load_examples("limo")) == 1


# --- what is said when something is wrong ---

def test_an_unknown_data_set_lists_all_there_are():
    with pytest.raises(StsError) as error:
        load_examples("mmlu_max")
    assert "'mmlu_max'" in str(error.value)
    assert all(name in str(error.value) for name in [*data_sources.SOURCES, *data_sources.GENERATED])


def test_an_unknown_split_lists_the_splits():
    with pytest.raises(StsError, match=r"Split of data set 'gsm8k' 'dev'.*test, train"):
        load_examples("gsm8k", split="dev")


@pytest.mark.parametrize("name", ["gsm_symbolic", "mmlu_exemplars"])
def test_an_unknown_split_of_a_packaged_data_set_is_no_silent_default(name):
    with pytest.raises(StsError, match=rf"'{name}' 'nosuch'.*train"):
        load_examples(name, split="nosuch", limit=2)


def test_an_unknown_domain_lists_the_domains(exemplars):
    with pytest.raises(StsError, match="Domain 'astrology' is not known.*biology.*psychology"):
        by_domain(exemplars, ("law", "astrology"))


def test_examples_are_grouped_by_domain_in_alphabetical_order(exemplars):
    groups = by_domain(exemplars)
    assert list(groups) == sorted(CATEGORIES)
    assert sum(map(len, groups.values())) == len(exemplars)
    chosen = by_domain(exemplars, ("physics", "law"))
    assert list(chosen) == ["law", "physics"]
    assert chosen["law"] == [example for example in exemplars if example.domain == "law"]


def test_a_broken_line_is_named_by_file_and_number(local):
    path = local("limo", "train", ROWS["limo", "train"][0])
    path.write_text(path.read_text(encoding="utf-8") + '{"question": \n', encoding="utf-8")
    with pytest.raises(StsError, match=r"train\.jsonl, row 2: not JSON"):
        load_examples("limo")


@pytest.mark.parametrize("row", [{"question": "no answer column"}, ["no", "columns"]])
def test_a_row_in_other_columns_is_named_by_data_set_and_what_is_missing(local, row):
    local("gsm8k", "train", row)
    with pytest.raises(StsError, match=r"gsm8k.*answer|gsm8k.*column"):
        load_examples("gsm8k")


@pytest.mark.parametrize("name", ["mmlu_pro", "gsm8k", "math", "limo"])
def test_without_a_network_the_way_out_is_said(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StsError) as error:
        load_examples(name)
    message = str(error.value)
    assert "\n" not in message
    assert "STS_DATA_DIR" in message and f"{name}/{data_sources.SOURCES[name].splits[0]}.jsonl" in message
    assert "gsm_symbolic" in message and "mmlu_exemplars" in message


def test_a_local_only_data_set_says_which_file_to_put_where():
    with pytest.raises(StsError, match=r"'mbpp'.*mbpp/all\.jsonl.*STS_DATA_DIR"):
        load_examples("mbpp")


# --- pieces of text ---

@pytest.mark.parametrize(("solution", "content"), [
    (r"So $\boxed{7}$.", "7"),
    (r"$\boxed{\frac{1}{\sqrt{2}}}$ and no more {", r"\frac{1}{\sqrt{2}}"),
    (r"First \boxed{1}, then \boxed{\{2, 3\}}", r"\{2, 3\}"),
    (r"\boxed{}", ""),
    ("nothing boxed", ""),
    (r"cut off \boxed{\frac{1}{2", ""),
])
def test_the_last_box_is_read_with_nested_braces(solution, content):
    assert last_boxed(solution) == content


def test_options_are_split_from_their_question():
    question, options = split_options("Is f(A) = (B) possible?\n\n(A) yes  (B) no\n(C) only if\n  f(x) = 1 (D) (x, y)")
    assert question == "Is f(A) = (B) possible?"
    assert options == ("yes", "no", "only if f(x) = 1", "(x, y)")


word = st.text("abcdefg 0123,.$^{}", min_size=1).map(lambda text: " ".join(text.split())).filter(bool)


@given(word, st.lists(word, min_size=1, max_size=10))
def test_any_list_of_options_comes_back(question, options):
    listed = " ".join(f"({letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))
    assert split_options(f"{question}\n\n{listed}") == (question, tuple(options))


def test_a_question_without_options_is_refused():
    with pytest.raises(StsError, match="No options.*Which one"):
        split_options("Which one is it?")


# --- plain text ---

def test_texts_come_from_files_and_corpora(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("Zeile eins\n\nzwei: ä", encoding="utf-8")
    assert load_texts(str(tmp_path / "notes.txt")) == ["Zeile eins\n\nzwei: ä"]
    lines = '{"text": "one"}\n{"text": "two\\nlines", "source": "own"}\n'
    (tmp_path / "pages.jsonl").write_text(lines, encoding="utf-8")
    assert load_texts(str(tmp_path / "pages.jsonl")) == ["one", "two\nlines"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "books.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    assert load_texts("books") == ["one", "two\nlines"]


def test_texts_that_are_not_there_say_what_would_be(tmp_path):
    with pytest.raises(StsError, match=r"corpus/web\.jsonl.*STS_DATA_DIR"):
        load_texts("web")
    with pytest.raises(StsError, match=r"nosuch\.txt' is not known. Valid: web, books, textbook"):
        load_texts(str(tmp_path / "nosuch.txt"))


def test_a_line_without_text_is_refused(tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n', encoding="utf-8")
    with pytest.raises(StsError, match=r"pages\.jsonl, row 2, column 'text': missing; the row has body"):
        load_texts(str(tmp_path / "pages.jsonl"))


def test_the_digest_changes_with_any_field_and_with_the_order():
    row = ROWS["mmlu", "val"][1]
    fields = {"question": "Who else?", "solution": "Because.", "answer_index": 1, "domain": "other"}
    others = [data.digest([Example(**{**row.__dict__, key: value})]) for key, value in fields.items()]
    assert len({data.digest([row]), *others}) == 5
    assert data.digest([row]) == data.digest([Example(**row.__dict__)])
    assert data.digest(["a", "b"]) != data.digest(["b", "a"])


def test_the_rows_that_the_book_shows_are_read(tmp_path, monkeypatch):
    page = (ROOT / "book" / "running_it.md").read_text(encoding="utf-8")
    rows = re.findall(r"```json\n(.*?)```", page, re.DOTALL)[-1]
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    for place, line in zip(("mmlu_pro/test", "gsm8k/train"), rows.splitlines(), strict=True):
        (tmp_path / place).parent.mkdir()
        (tmp_path / f"{place}.jsonl").write_text(line)
    question, problem = load_examples("mmlu_pro", split="test")[0], load_examples("gsm8k")[0]
    assert (question.domain, question.answer, question.options[question.answer_index]) == ("biology",
                                                                                         *["Carbon dioxide"] * 2)
    assert (problem.domain, problem.answer) == ("math", "5") and "2 + 3 = 5" in problem.solution


def test_an_empty_file_and_a_folder_that_is_none_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp" / "all.jsonl").write_text("\n")
    with pytest.raises(StsError, match="mbpp/all.jsonl holds no rows"):
        load_examples("mbpp")
    (tmp_path / "mbpp" / "all.jsonl").write_text('{"question": "2 + 2?"}\n')
    with pytest.raises(StsError, match=r"mbpp/all\.jsonl, row 1, column 'text': missing; the row has question"):
        load_examples("mbpp")
    (tmp_path / "mbpp" / "all.jsonl").unlink()
    with pytest.raises(StsError, match=f"now {tmp_path}, without that file"):
        load_examples("mbpp")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(StsError, match="nowhere, which is no folder"):
        load_examples("mbpp")
    monkeypatch.delenv("STS_DATA_DIR")
    with pytest.raises(StsError, match="not set now"):
        load_examples("mbpp")


# --- too few examples, and shared ones ----------------------------------------------------------------------------

def arithmetic(count, start=0):
    return [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}
            for n in range(start, start + count)]


def test_a_set_that_is_too_small_is_divided_in_proportion_with_a_warning(local, caplog):
    local("gsm8k", "train", *arithmetic(30))
    train, held_out = training_split("gsm8k", 120, 40, seed=1)
    assert (len(train), len(held_out)) == (22, 8)
    assert "of 160 asked for (120 to train on): only 22 are trained on and 8 held out" in caplog.text
    assert len({example.question for example in train + held_out}) == 30
    caplog.clear()
    whole = training_split("gsm8k", 20, 10, seed=1)
    assert [len(part) for part in whole] == [20, 10] and not caplog.text


def test_of_fewer_examples_than_parts_some_parts_have_none():
    assert len(data.load_mixture("gsm_symbolic+chain_sum", 1)) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_set_that_leaves_nothing_for_a_part_is_refused(local, count):
    local("gsm8k", "train", *arithmetic(count))
    with pytest.raises(StsError, match=f"has {count} different questions of 160 asked for .* too few"):
        training_split("gsm8k", 140, 20)


def test_questions_that_are_trained_on_and_evaluated_are_counted(local):
    local("gsm8k", "train", *arithmetic(8))
    local("gsm8k", "test", *arithmetic(6, start=5), {"question": " What is  3 + 1? ", "answer": "#### 4"})
    assert shared_questions(load_examples("gsm8k"), load_examples("gsm8k", split="test")) == 3 + 1


def test_a_data_folder_that_is_not_there_is_never_replaced_by_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path / "mistyped"))
    with pytest.raises(StsError, match="'gsm8k' is in no local folder: .*mistyped, which is no folder"):
        load_examples("gsm8k")
