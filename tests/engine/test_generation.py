"""Generated answers: prompts, answers read from text, and scores."""

import hashlib
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sts.data.check import LETTERS
from sts.data.load import load_examples
from sts.data.prompts import make_prompt
from sts.data.sources import Example
from sts.engine.generation import (
    extract_letter,
    generate_and_score,
    is_same_answer,
    open_engine,
    own_answers,
    prompt_text,
)
from sts.engine.models import load_model
from sts.errors import StsError

# --- answers read from text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "letter"), [
    ("Hence $k=0$ and $n=0$. The answer is (A).", "A"),
    ("We find that the answer is C, not D.", "C"),
    ("The answer is (B). Question: the answer is (D)", "B"),  # the first, as in the official script
    ("So we get 12.\nAnswer: F", "F"),
    ("answer:\n\n  J because", "J"),
    ("It is either B or C; I choose\nG.", "G"),  # the last letter that stands alone, on any line
    ("The answer is (K).", ""),
    ("Apples and Bananas", ""),
    ("", ""),
])
def test_letters_are_read_as_the_official_script_reads_them(text, letter):
    assert extract_letter(text) == letter


@pytest.mark.parametrize(("right", "text", "same"), [
    ("\\frac{1}{2}", "so we get $\\boxed{0.5}$", True),
    ("\\frac12", "It is $\\dfrac{1}{2}$.", True),
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
    ("p - q", "\\boxed{-q+p}", True),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True),
    ("x \\in [-2,7]", "the solution is \\boxed{[-2,7]}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
    ("1,450", "In all it costs \\boxed{1450} dollars.", True),
    ("18", "12 + 6 = 18\n#### 18", True),
    ("4", "She has 3, then 5. Therefore, Tom has 4 apples", True),
    ("18", "\\boxed{19}", False),
    ("\\frac{14}{3}", "\\boxed{\\frac{13}{3}}", False),
    ("(1, 2)", "\\boxed{(2, 1)}", False),
    ("3", "", False),
])
def test_answers_are_compared_as_mathematics(right, text, same):
    assert is_same_answer(right, text) is same


# --- prompts ------------------------------------------------------------------------------------------------------

def mmlu_pro_rows(split, each, domains):
    return [{"question_id": f"{split}{number}{domain}", "question": f"Question {number} of {domain}?",
             "category": domain, "options": [f"{domain} one ", "two", f"three {number}"], "answer": LETTERS[number % 3],
             "answer_index": number % 3, "src": "",
             "cot_content": f"A: Let's think step by step. We refer to Wikipedia articles on {domain} for help. Work "
                            f"{number}. The answer is ({LETTERS[number % 3]})." if split == "validation" else ""}
            for domain in domains for number in range(each)]


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Questions and worked examples of computer science, from files in the layout of MMLU-Pro's release."""
    (tmp_path / "mmlu_pro").mkdir()
    for split, each in (("test", 2), ("validation", 5)):
        (tmp_path / "mmlu_pro" / f"{split}.jsonl").write_text(
            "\n".join(map(json.dumps, mmlu_pro_rows(split, each, ["computer science"]))), encoding="utf-8")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    return load_examples("mmlu_pro"), load_examples("mmlu_pro", split="validation")


def test_the_five_shot_prompt_is_that_of_the_official_script(official, lm_of):
    examples, worked = official
    # generate_cot_prompt of the official evaluate_from_local.py, written out; the words that open every published
    # solution ("We refer to Wikipedia articles on ... for help.") are left out when the data are read.
    expected = ("The following are multiple choice questions (with answers) about computer science. Think step by step "
                'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n')
    for number in range(5):
        expected += (f"Question:\nQuestion {number} of computer science?\nOptions:\nA. computer science one\nB. two\n"
                     f"C. three {number}\nAnswer: Let's think step by step. Work {number}. The answer is "
                     f"({LETTERS[number % 3]}).\n\n")
    expected += ("Question:\nQuestion 1 of computer science?\nOptions:\nA. computer science one\nB. two\nC. three 1\n"
                 "Answer: Let's think step by step.")
    assert prompt_text(lm_of("llama").tokenizer, "mmlu_pro", examples[1], worked) == expected


# --- the beginning of the sequence --------------------------------------------------------------------------------

OPEN = [Example(f"open-{n}", "math", f"What is {n} plus 3?", (), -1, str(n + 3), f"{n} + 3 = {n + 3}")
        for n in range(5)]


def with_bos(tiny_models, *, written: bool):
    """A model whose tokenizer puts <s> before plain text and whose chat template writes it itself, or does not."""
    lm = load_model(str(tiny_models["llama"]))
    lm.tokenizer.add_special_tokens({"bos_token": "<s>"})
    lm.model.resize_token_embeddings(len(lm.tokenizer))
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", lm.tokenizer.bos_token_id)])
    if written:
        lm.tokenizer.chat_template = "{{ bos_token }}" + lm.tokenizer.chat_template
    assert lm.tokenizer("text")["input_ids"][0] == lm.tokenizer.bos_token_id
    return lm


@pytest.mark.parametrize("written", [True, False], ids=["template with BOS", "template without"])
def test_every_prompt_begins_with_bos_once_if_at_all(tiny_models, monkeypatch, written):
    lm, run = with_bos(tiny_models, written=written), []
    bos = lm.tokenizer.bos_token_id
    engine = open_engine(lm, batch=2)
    monkeypatch.setattr(engine, "_model_generate", lambda context, **how: run.extend(
        [token for token in row.tolist() if token != engine.tokenizer.pad_token_id] for row in context) or context)
    questions = [Example(f"law-{n}", "law", f"Which is it, {n}?", ("one", "two"), 0, "one", "So it is.")
                 for n in range(3)]
    # Plain text: MMLU-Pro's chain of thought, and then problems in the chat template, and plain text again.
    for benchmark, examples, worked in (("mmlu_pro", questions[1:], questions[:1]), ("gsm8k", OPEN[:2], ()),
                                        ("mmlu_pro", questions[1:], questions[:1])):
        run.clear()
        generate_and_score(engine, benchmark, examples, worked, max_tokens=4)
        assert len(run) == 2
        for ids in run:
            expected = 1 if benchmark == "mmlu_pro" or written else 0
            assert ids.count(bos) == expected and (ids[0] == bos) == bool(expected)


# --- generating ---------------------------------------------------------------------------------------------------


def test_answers_are_what_the_model_generates(lm_of):
    lm = lm_of("llama")
    engine = open_engine(lm, batch=2)
    rows = generate_and_score(engine, "gsm8k", OPEN, max_tokens=12)
    assert rows["example_id"].tolist() == [example.example_id for example in OPEN]
    for example, row in zip(OPEN, rows.itertuples(), strict=True):
        prompt = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{example.question}\nPlease reason step by step, and put your final answer "
                                         "within \\boxed{}."}], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            whole = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                      pad_token_id=lm.tokenizer.pad_token_id)
        text = lm.tokenizer.decode(whole[0, ids.shape[1]:], skip_special_tokens=True)
        assert row.sha256 == hashlib.sha256(text.encode()).hexdigest()[:12] and row.characters == len(text)
        assert row.answer == example.answer and row.domain == "math"


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # a chat template, and plain text behind BOS
def test_own_answers_are_asked_for_as_they_are_trained_on(lm_of, monkeypatch, family):
    lm, run = lm_of(family), []
    engine = open_engine(lm, batch=1)
    generate = engine._model_generate
    monkeypatch.setattr(engine, "_model_generate", lambda context, **how: run.append(context[0].tolist()) or generate(
        context=context, **how))
    found = own_answers(engine, OPEN[:3], 6)
    assert sorted(map(tuple, run)) == sorted(make_prompt(lm.tokenizer, example.question).ids for example in OPEN[:3])
    for text, whole in found:
        assert text == text.strip() and whole == (len(engine.tok_encode(text)) < 6)


def test_right_answers_are_counted(lm_of, monkeypatch):
    engine = open_engine(lm_of("llama"), batch=2)
    monkeypatch.setattr(type(engine), "generate_until", lambda self, requests, **how: [
        f"so \\boxed{{{n + 3 if n % 2 else n}.0}}" for n in range(5)])
    rows = generate_and_score(engine, "gsm8k", OPEN)
    assert rows["correct"].tolist() == [False, True, False, True, False]


def test_letters_are_scored_behind_demonstrations_of_the_same_domain(lm_of, monkeypatch):
    examples = [example for example in load_examples("mmlu_exemplars") if example.domain in ("law", "biology")]
    worked = [example for example in examples if example.example_id.endswith(("-0", "-1"))]
    questions = [example for example in reversed(examples) if example not in worked]
    engine, asked = open_engine(lm_of("llama"), batch=2), []

    def answer(self, requests, **how):
        asked.extend(request.args[0] for request in requests)
        return ["The answer is (A)."] * len(requests)

    monkeypatch.setattr(type(engine), "generate_until", answer)
    rows = generate_and_score(engine, "mmlu_pro", questions, worked, shots=2, max_tokens=5)
    assert rows["example_id"].tolist() == [example.example_id for example in questions]
    assert rows["correct"].tolist() == [example.answer_index == 0 for example in questions]
    assert all(prompt.count("Let's think step by step.") == 3 for prompt in asked)
    law = [example for example in worked if example.domain == "law"][:2]
    assert sum(all(example.question in prompt for example in law) for prompt in asked) == sum(
        example.domain == "law" for example in questions)


def test_a_letter_of_a_question_without_options_cannot_be_asked(lm_of):
    with pytest.raises(StsError, match="asks for a letter; open-0 has no options"):
        generate_and_score(open_engine(lm_of("llama"), batch=2), "mmlu_pro", OPEN)


def test_a_prompt_that_leaves_no_room_is_named(lm_of):
    with pytest.raises(StsError, match="item open-0 has .* tokens, and the model's context leaves 12 beside"):
        generate_and_score(open_engine(lm_of("llama"), batch=2), "gsm8k", OPEN, max_tokens=8180)
