"""Prompts: which tokens are the question's own, and that pairs hold the same tokens."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from sts.data.groups import demonstration_draws, other_domain_sets, token_pieces
from sts.data.load import Example, by_domain, load_examples, split_options
from sts.data.prompts import (
    document_ids,
    make_group,
    make_prompt,
    paired_positions,
    question_text,
    render,
    solution_prompt,
    solution_text,
)
from sts.engine.evaluate import targets
from sts.engine.finetune import tokens_to_train_on
from sts.engine.models import load_model
from sts.errors import StsError

QUESTION = "A farmer has 12 sheep and $x^2$ goats (all white).\nHow many animals live on Île-3 now?"
SHEEP = Example("sheep", "math", "How many legs have 12 sheep?", ("24", "48"), 1, "48",
                "Each sheep has 4 legs, so 12 * 4 = 48. The answer is (B).")
WATER = Example("water", "physics", "Where does water boil at a lower temperature?", (), -1, "on a mountain",
                "The pressure is lower on a mountain.\n#### on a mountain")
PRICES = Example("prices", "economics", "What makes prices rise?", ("demand", "sand", "wind"), 0, "demand", "")
DEMONSTRATIONS = (SHEEP, WATER, PRICES)


@pytest.fixture(scope="module")
def chatml(tiny_models):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models["llama"])


@pytest.fixture(scope="module")
def plain(chatml):
    """The tokenizer of a base model: no chat template."""
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(params=["chatml", "plain"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def own_text(tokenizer, prompt):
    return tokenizer.decode(prompt.ids[slice(*prompt.question)])


# --- texts ---

word = st.text("abcdefg 0123,.$^{}", min_size=1).map(lambda text: " ".join(text.split())).filter(bool)


@given(word, st.lists(word, min_size=1, max_size=10))
def test_a_question_lists_its_options_with_letters_in_order(question, options):
    text = question_text(Example("id", "math", question, tuple(options), 0, options[0], ""))
    assert text.splitlines()[0] == question
    assert [line[:4] for line in text.splitlines()[1:]] == [f"({letter}) " for letter in "ABCDEFGHIJ"[:len(options)]]
    assert split_options(text) == (question, tuple(options))


def test_an_open_question_is_only_the_question():
    assert question_text(WATER) == "Where does water boil at a lower temperature?"


@pytest.mark.parametrize("closing", [
    "", "The answer is (B).", "the answer is (B)", "So the answer is (B).", "Therefore, the answer is B.",
    "Thus the answer is (B).\n", "Hence, the answer is (C)."])
def test_a_solution_ends_with_the_right_answer_and_says_it_once(closing):
    example = Example("id", "math", "How many?", ("24", "48"), 1, "48", f"12 * 4 is 48. {closing}")
    assert solution_text(example) == "12 * 4 is 48. The answer is (B) 48."


def test_a_solution_without_working_is_the_answer_alone():
    assert solution_text(PRICES) == "The answer is (A) demand."


def test_an_open_questions_solution_is_its_own_text_or_else_the_answer():
    assert solution_text(WATER) == WATER.solution
    assert solution_text(Example("id", "math", "1+1?", (), -1, "2", "")) == "2"


def test_every_packaged_example_ends_alike_and_says_its_answer_once():
    for example in load_examples("mmlu_exemplars"):
        text = solution_text(example)
        assert text.endswith(f"The answer is ({'ABCDE'[example.answer_index]}) {example.answer.rstrip('.')}.")
        assert len(re.findall("answer is", text)) == 1


def test_a_chat_holds_the_demonstrations_as_earlier_turns(chatml):
    assert render(chatml, "Why?", (SHEEP,)) == (
        "<|im_start|>user\nHow many legs have 12 sheep?\n(A) 24\n(B) 48<|im_end|>\n"
        "<|im_start|>assistant\nEach sheep has 4 legs, so 12 * 4 = 48. The answer is (B) 48.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert render(chatml, "Why?", answer="Because.") == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n")


def test_a_base_model_gets_questions_and_answers_as_plain_text(plain):
    assert render(plain, "Why?", (WATER,)) == (
        "Question: Where does water boil at a lower temperature?\n"
        "Answer: The pressure is lower on a mountain.\n#### on a mountain\n\nQuestion: Why?\nAnswer:")
    assert render(plain, "Why?", answer="Because.") == "Question: Why?\nAnswer: Because."


# --- the question's own tokens ---

@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_questions_tokens_decode_to_the_question(chatml, count):
    prompt = make_prompt(chatml, QUESTION, DEMONSTRATIONS[:count])
    assert own_text(chatml, prompt) == QUESTION


@pytest.mark.parametrize("count", [0, 1, 3])
def test_without_a_template_only_a_token_that_merged_with_the_space_before_it_is_missing(plain, count):
    prompt = make_prompt(plain, QUESTION, DEMONSTRATIONS[:count])
    first, text = prompt.question[0], own_text(plain, prompt)
    assert QUESTION.endswith(text)
    missing = QUESTION.removesuffix(text)
    assert missing == "" or plain.decode(prompt.ids[first - 1]) == f" {missing}"


realistic = st.text(st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=["Cc", "Cs", "Co"]),
                    min_size=20, max_size=80)


@given(realistic)
@settings(deadline=None)
def test_any_questions_tokens_decode_to_it(chatml, text):
    question = text.strip()
    if len(question) >= 12:  # shorter ones may be a piece of the template itself
        assert own_text(chatml, make_prompt(chatml, question, (SHEEP,))) == question


@pytest.mark.parametrize("question", ["user", "assistant", "a"])
def test_a_question_that_is_a_word_of_the_template_is_still_found(chatml, question):
    prompt = make_prompt(chatml, question)
    assert prompt.question[0] == make_prompt(chatml, "zebra").question[0]
    assert own_text(chatml, prompt) == question


def test_demonstrations_precede_the_question_in_order(tokenizer):
    prompt = make_prompt(tokenizer, QUESTION, DEMONSTRATIONS)
    before = tokenizer.decode(prompt.ids[:prompt.question[0]])
    places = [before.find(text) for example in DEMONSTRATIONS for text in (question_text(example),
                                                                           solution_text(example))]
    assert -1 not in places and places == sorted(places)


def test_a_beginning_of_sequence_token_is_the_models_own_and_no_part_of_the_question(plain):
    tokenizer = copy.deepcopy(plain)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    with_bos, without = make_prompt(tokenizer, QUESTION, (SHEEP,)), make_prompt(plain, QUESTION, (SHEEP,))
    assert with_bos.ids == (tokenizer.bos_token_id, *without.ids)
    assert own_text(tokenizer, with_bos) == own_text(plain, without)
    # A chat template writes it itself, so it must not come twice.
    tokenizer.chat_template = "<|im_start|>{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert make_prompt(tokenizer, QUESTION).ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_trims_its_turns_still_lets_the_question_be_found(chatml):
    # Llama 3's and Gemma's templates trim; some of MMLU-Pro's last options end in a space.
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = chatml.chat_template.replace("message['content']", "(message['content'] | trim)")
    example = Example("id", "math", "  How many? ", ("12 ", "48 "), 1, "48 ", "")
    assert own_text(tokenizer, make_prompt(tokenizer, question_text(example))).endswith("(B) 48")


def test_a_template_that_rewrites_the_question_is_refused(chatml):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = chatml.chat_template.replace("message['content']", "message['content'].upper()")
    with pytest.raises(StsError, match="template changes the question.*How many"):
        make_prompt(tokenizer, "How many?")


# --- pairs ---

@pytest.mark.parametrize("question_tokens_only", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_pairs_hold_the_same_tokens_in_step(tokenizer, count, question_tokens_only):
    base, icl = make_prompt(tokenizer, QUESTION), make_prompt(tokenizer, QUESTION, DEMONSTRATIONS[:count])
    at_base, at_icl = paired_positions(base, icl, question_tokens_only=question_tokens_only)
    assert [base.ids[position] for position in at_base] == [icl.ids[position] for position in at_icl]
    assert at_base == list(range(at_base[0], at_base[-1] + 1))
    assert {right - left for left, right in zip(at_base, at_icl, strict=True)} == {len(icl.ids) - len(base.ids)}
    own = list(range(*base.question))
    if question_tokens_only:
        assert at_base == own and at_icl == list(range(*icl.question))
    else:
        assert at_base[-1] == len(base.ids) - 1 > own[-1]  # the template after the question belongs to it
        assert set(own) < set(at_base)


@pytest.mark.parametrize("drop", [0, 1, 8])
def test_first_positions_of_the_bare_prompt_are_dropped_on_both_sides(chatml, drop):
    base, icl = make_prompt(chatml, QUESTION), make_prompt(chatml, QUESTION, (SHEEP,))
    assert base.question[0] < 8 < base.question[1]
    for question_tokens_only in (True, False):
        all_base, all_icl = paired_positions(base, icl, question_tokens_only=question_tokens_only)
        at_base, at_icl = paired_positions(base, icl, question_tokens_only=question_tokens_only,
                                           drop_first_positions=drop)
        assert at_base == [position for position in all_base if position >= drop]
        assert at_icl == all_icl[len(all_icl) - len(at_base):]


@pytest.mark.parametrize("question_tokens_only", [True, False])
@pytest.mark.parametrize("other", ["Where does water boil at a lower temperature?",
                                   "A farmer has 12 cows and $x^2$ goats (all white).\n"
                                   "How many animals live on Île-3 now?"])
def test_prompts_of_different_questions_do_not_pair(tokenizer, other, question_tokens_only):
    base, icl = make_prompt(tokenizer, QUESTION), make_prompt(tokenizer, other, (SHEEP,))
    with pytest.raises(StsError, match="different questions"):
        paired_positions(base, icl, question_tokens_only=question_tokens_only)


def test_a_group_holds_each_question_with_and_without_the_demonstrations(chatml):
    group = make_group(chatml, [WATER, PRICES], (SHEEP,))
    assert [own_text(chatml, prompt) for prompt in group.base] == [question_text(WATER), question_text(PRICES)]
    assert [own_text(chatml, prompt) for prompt in group.icl] == [question_text(WATER), question_text(PRICES)]
    assert all("sheep" in chatml.decode(prompt.ids) for prompt in group.icl)
    assert not any("sheep" in chatml.decode(prompt.ids) for prompt in group.base)


def test_a_group_stops_once_its_questions_hold_enough_tokens(chatml):
    questions = [WATER, PRICES] * 5
    lengths = [prompt.question[1] - prompt.question[0] for prompt in make_group(chatml, questions, (SHEEP,)).base]
    assert len(lengths) == 10
    for tokens, size in ((1, 1), (lengths[0], 1), (lengths[0] + 1, 2), (sum(lengths), 10), (10**6, 10)):
        group = make_group(chatml, questions, (SHEEP,), tokens=tokens)
        assert len(group.base) == len(group.icl) == size


# --- demonstrations ---

def items(count):
    return [Example(f"item-{index}", "math", f"{index}?", (), -1, "1", "") for index in range(count)]


@given(st.data())
def test_demonstrations_and_questions_are_disjoint_and_draws_differ(data):
    count = data.draw(st.integers(1, 6))
    examples = items(data.draw(st.integers(count + 1, 20)))
    draws = data.draw(st.integers(1, max(2, len(examples) // count)))
    found = demonstration_draws(examples, count, draws, seed=data.draw(st.integers(0, 5)), what="it")
    assert len(found) == draws
    for demonstrations, questions in found:
        assert len(demonstrations) == count
        assert not set(demonstrations) & set(questions)
        assert sorted([*demonstrations, *questions], key=examples.index) == examples
    assert len({frozenset(demonstrations) for demonstrations, _ in found}) == draws
    if count * draws <= len(examples):  # enough examples: no demonstration is used twice
        assert len({example for demonstrations, _ in found for example in demonstrations}) == count * draws


@given(st.data())
def test_no_question_is_read_behind_two_draws_or_behind_itself(data):
    count, draws = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    examples = items(data.draw(st.integers(draws * (count + 1), 60)))
    found = demonstration_draws(examples, count, draws, seed=data.draw(st.integers(0, 5)), what="it", apart=True)
    read = [example for _, part in found for example in part]
    assert len(found) == draws and len(set(read)) == len(read)
    assert len(read) >= len(examples) - draws * (count + 1)  # few are left unread
    for demonstrations, part in found:
        assert not set(demonstrations) & set(part)


def test_one_or_two_draws_read_every_question_or_every_other_one():
    for draws in (1, 2):
        every, apart = (demonstration_draws(items(30), 3, draws, seed=0, what="it", apart=own) for own in (False, True))
        assert apart == [(chosen, others[draw::draws]) for draw, (chosen, others) in enumerate(every)]


def test_draws_are_fixed_by_the_seed():
    first = demonstration_draws(items(30), 3, 2, seed=0, what="it")
    assert demonstration_draws(items(30), 3, 2, seed=0, what="it") == first
    assert demonstration_draws(items(30), 3, 2, seed=1, what="it") != first


@pytest.mark.parametrize("available", [3, 4])
def test_too_few_examples_are_an_error_that_names_the_domain_and_what_would_work(available):
    with pytest.raises(StsError) as error:
        demonstration_draws(items(available), 4, 2, seed=0, what="Domain 'law'")
    assert f"Domain 'law' has {available} different questions" in str(error.value)
    assert f"at most {available - 1} demonstrations" in str(error.value)
    with pytest.raises(StsError, match="Use at most 3 demonstrations"):
        demonstration_draws(items(3), 4, 1, seed=0, what="Domain 'law'", set_aside=True)


def test_other_domains_are_not_of_the_training_sets_category():
    worked = by_domain(load_examples("mmlu", split="worked"))
    train = load_examples("gsm_symbolic", limit=3)
    drawn = {one.domain for one in sum(other_domain_sets(train, worked, 2, 200, seed=0), [])}
    maths = {"abstract_algebra", "college_mathematics", "elementary_mathematics", "high_school_mathematics",
             "high_school_statistics"}
    assert drawn == worked.keys() - maths


# --- one text for reading, training and scoring -------------------------------------------------------------------

STORED = Path(trl.__file__).parent / "chat_templates"  # the publishers' own templates
TEMPLATES = {name: (STORED / f"{name}.jinja").read_text() for name in
             ("qwen2_5", "llama3", "gemma", "qwen3", "deepseek_r1_distill")} | {
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
               "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"}


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_scored_is_what_is_trained_on(chatml, name):
    tokenizer = with_template(chatml, TEMPLATES[name])
    example = Example("x", "math", "What is 2 + 3?", ("4", "5"), 1, "5", "")
    (trained,), _ = tokens_to_train_on(tokenizer, [example], 512)
    (*_, context, target), = targets(tokenizer, example, ["solution"])
    assert trained["input_ids"][:len(context) + len(target)] == [*context, *target]
    start = trained["completion_mask"].index(1)
    assert tokenizer.decode(trained["input_ids"][start:len(context) + len(target)]).strip() == "The answer is (B) 5."
    assert tokenizer.decode(target).lstrip("( ") == "B) 5."  # what all such answers open with is context
    # And the letters stand behind the same words.
    (*_, letters, letter), *_ = targets(tokenizer, example, ["letter"])
    assert tokenizer.decode(letters).rstrip("(") == tokenizer.decode(context).rstrip("(")
    assert tokenizer.decode(letters).endswith("The answer is (") and tokenizer.decode(letter) == "A"


def test_a_template_with_todays_date_gives_the_same_prompt_on_every_day(chatml):
    tokenizer = with_template(chatml, "Today: {{ strftime_now('%d %b %Y') }}" + chatml.chat_template)
    assert render(tokenizer, "How many?").startswith("Today: 26 Jul 2024<|im_start|>")


def test_the_formats_tokens_inside_a_question_are_plain_text(chatml):
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    question = "Which token ends a turn in ChatML: <|im_end|> or </s>?"
    prompt = make_prompt(chatml, question, (replace(SHEEP, question=f"{question} And why?"),))
    assert prompt.ids.count(end) == 3  # of the template's own three turns
    assert own_text(chatml, prompt) == question
    solution = solution_prompt(chatml, replace(SHEEP, solution="It is <|im_end|>."))
    assert own_text(chatml, solution) == "It is <|im_end|>. The answer is (B) 48." and solution.ids.count(end) == 2
    assert end not in document_ids(chatml, "The token <|im_end|> ends a turn.")


def test_a_tokenizer_without_offsets_is_refused_in_one_line(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(StsError, match="its tokenizer .ByT5Tokenizer. cannot say which characters"):
        load_model(str(folder))


def test_outer_blanks_of_options_are_neither_shown_nor_scored():
    """In 489 of MMLU-Pro's questions the right option, and no other, begins with a blank."""
    example = Example("x", "chemistry", "How much?", ("0.1", " 0.2", "0.3 "), 1, " 0.2", "")
    assert question_text(example) == "How much?\n(A) 0.1\n(B) 0.2\n(C) 0.3"
    assert solution_text(example) == "The answer is (B) 0.2."


def test_pieces_of_text_respect_context_and_budget(chatml):
    ids = document_ids(chatml, "one two three " * 400)
    pieces = token_pieces(chatml, ["one two three " * 400, "never read"], 300, 640)
    assert [len(piece) for piece in pieces] == [300, 300, 40] and sum(pieces, []) == ids[:640]
    assert token_pieces(chatml, ["too short", "one two three " * 400], 300, 640) == pieces
