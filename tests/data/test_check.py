"""What comes from outside is read where it can be meant one way only, and refused in one line else."""

import json
import re

import pytest

from sts.data.load import load_examples, load_texts
from sts.errors import StsError

MMLU_PRO = {"question_id": 1, "category": "biology", "question": "Which gas do plants take in?",
            "options": ["Oxygen", " Carbon dioxide", "Neon"], "answer_index": 1, "answer": "B", "cot_content": ""}
GSM8K = {"question": "Zoë has 2 apples – how many?", "answer": "2\n#### 2"}
ARC = {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
FIRST = {"mmlu_pro": "test", "gsm8k": "train", "mmlu": "test", "arc_easy": "train", "math": "train", "limo": "train"}
MISSING = object()


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function that reads rows as the first split of a set."""
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))

    def of(name, *rows, encoding="utf-8", end="\n"):
        path = tmp_path / name / f"{FIRST[name]}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode(encoding))
        return load_examples(name)

    return of


def changed(row, **columns):
    return {name: value for name, value in {**row, **columns}.items() if value is not MISSING}


# --- files --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\n"), ("utf-8-sig", "\n"), ("utf-8", "\r\n")])
def test_utf8_is_read_with_and_without_byte_order_mark(read, encoding, end):
    example, = read("gsm8k", GSM8K, encoding=encoding, end=end)
    assert example.question == GSM8K["question"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_other_encodings_are_refused_with_the_row(read, encoding):
    with pytest.raises(StsError, match=r"train\.jsonl, row [12]: not UTF-8 .* Save the file as UTF-8"):
        read("gsm8k", {"question": "plain", "answer": "#### 1"}, GSM8K, encoding=encoding)


def test_a_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "text.txt").write_bytes("one\n déjà vu".encode("cp1252"))
    with pytest.raises(StsError, match=r"text\.txt, row 2: not UTF-8"):
        load_texts(str(tmp_path / "text.txt"))
    (tmp_path / "text.txt").write_bytes("déjà\r\nvu".encode("utf-8-sig"))
    assert load_texts(str(tmp_path / "text.txt")) == ["déjà\nvu"]


@pytest.mark.parametrize("line", ["not json", '{"question": ', "[1, 2]", "7", "null"])
def test_lines_that_are_no_objects_are_refused(tmp_path, monkeypatch, line):
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps(GSM8K) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(StsError, match=r"train\.jsonl, row 3: .*one (JSON )?object a line"):
        load_examples("gsm8k")


# --- rows ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("columns", [
    {}, {"answer_index": "1"}, {"answer_index": 1.0}, {"answer": MISSING}, {"answer": "Carbon dioxide "},
    {"question_id": "1"}, {"cot_content": None}, {"options": ["Oxygen", " Carbon dioxide", "Neon"]}])
def test_what_can_be_meant_one_way_only_is_read_so(read, columns):
    example, = read("mmlu_pro", changed(MMLU_PRO, **columns))
    assert (example.example_id, example.answer_index, example.answer) == ("mmlu_pro-1", 1, " Carbon dioxide")


def test_numbers_are_read_as_text_and_letters_as_indices(read):
    example, = read("mmlu_pro", changed(MMLU_PRO, options=[4, 5.5, "6"], answer_index=1, answer="B"))
    assert example.options == ("4", "5.5", "6")
    example, = read("mmlu", {"subject": "virology", "question": "Which?", "choices": ["a", "b"], "answer": "B"})
    assert example.answer == "b"
    example, = read("limo", {"question": "2 + 3?", "solution": "We add.", "answer": 5})
    assert example.answer == "5"


@pytest.mark.parametrize(("name", "row", "columns", "said"), [
    ("mmlu_pro", MMLU_PRO, {"answer_index": -1}, "'answer_index': -1 of 3 options. Write 0 to 2; where labels are hid"),
    ("mmlu_pro", MMLU_PRO, {"answer_index": 3}, "'answer_index': 3 of 3 options"),
    ("mmlu_pro", MMLU_PRO, {"answer_index": 1.9}, "'answer_index': 1.9 is no index"),
    ("mmlu_pro", MMLU_PRO, {"answer_index": True}, "'answer_index': True is no index"),
    ("mmlu_pro", MMLU_PRO, {"answer_index": None}, "'answer_index': None is no index"),
    ("mmlu_pro", MMLU_PRO, {"answer_index": 0}, "'answer': says 'B', while the index says (A) 'Oxygen'. Correct one"),
    ("mmlu_pro", MMLU_PRO, {"options": "['Oxygen', 'Neon']"}, "'options': \"['Oxygen', 'Neon']\" is no list of texts"),
    ("mmlu_pro", MMLU_PRO, {"options": []}, "'options': 0 options. A question needs 2 to 26"),
    ("mmlu_pro", MMLU_PRO, {"options": ["a"]}, "'options': 1 options"),
    ("mmlu_pro", MMLU_PRO, {"options": ["a", " ", "c"]}, "'options': empty"),
    ("mmlu_pro", MMLU_PRO, {"options": ["a", None, "c"]}, "'options': 'None' is no text"),
    ("mmlu_pro", MMLU_PRO, {"options": {"A": "a"}}, "'options': "),
    ("mmlu_pro", MMLU_PRO, {"question": " "}, "'question': empty"),
    ("mmlu_pro", MMLU_PRO, {"question": MISSING}, "'question': missing; the row has question_id, category"),
    ("mmlu_pro", MMLU_PRO, {"category": float("nan")}, "'category': 'nan' is no text"),
    ("mmlu_pro", MMLU_PRO, {"question_id": MISSING}, "'question_id': missing"),
    ("gsm8k", GSM8K, {"answer": "2 + 3 = 5. The answer is 5."}, "'answer': no final answer. End the solution with"),
    ("gsm8k", GSM8K, {"answer": "2 + 3 = 5.\n#### "}, "'answer': no final answer"),
    ("gsm8k", GSM8K, {"question": ["a"]}, "'question': \"['a']\" is no text"),
    ("arc_easy", ARC, {"answerKey": "C"}, "'answerKey': value 'C' is not known. Valid: A, B"),
    ("arc_easy", ARC, {"choices": ["one", "two"]}, "'choices': "),
    ("math", {"problem": "2?", "solution": "\\boxed{2}"}, {"solution": "It is 2."}, "'solution': no final answer. Put"),
    ("mmlu", {"subject": "virologie", "question": "?", "choices": ["a", "b"], "answer": 0}, {},
     "'subject': value 'virologie' is not known"),
])
def test_what_cannot_be_meant_is_one_line_with_file_row_and_column(read, name, row, columns, said):
    others = [changed(row, question_id=7)] if name == "mmlu_pro" else [row] if columns else []
    place = rf"{FIRST[name]}\.jsonl, row {len(others) + 1}, column "
    with pytest.raises(StsError, match=place + re.escape(said)) as told:
        read(name, *others, changed(row, **columns))
    assert "\n" not in str(told.value)


def test_half_a_character_is_no_text(read, tmp_path, monkeypatch):
    read("gsm8k", GSM8K)
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "\\ud83d", "answer": "#### 1"}\n', encoding="utf-8")
    with pytest.raises(StsError, match="column 'question': .* is no text") as told:
        load_examples("gsm8k")
    str(told.value).encode()


def test_two_questions_of_one_id_are_refused(read):
    with pytest.raises(StsError, match=r"row 2: a second question with the id 'mmlu_pro-1'"):
        read("mmlu_pro", MMLU_PRO, changed(MMLU_PRO, question="Another?"))
