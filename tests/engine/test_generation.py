"""The harness's task files: prompts, data, answers read from text, and scores."""

import ast
import hashlib
import json
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from sts.data.load import load_examples
from sts.data.prompts import make_prompt
from sts.data.sources import DOMAINS, LETTERS, Example
from sts.engine import generation
from sts.engine.evaluate import evaluate
from sts.engine.generation import TASKS, benchmark_examples, build_tasks, generate_and_score, open_vllm
from sts.engine.harness import SharedContextLM, open_harness
from sts.engine.tasks.utils import extract_answer, extract_letter, is_same_answer
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


def test_answers_are_compared_outside_the_main_thread_too():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_same_answer, "0.5", "\\boxed{\\frac{1}{2}}").result()


@pytest.mark.parametrize(("text", "answer"), [
    ("first \\boxed{1}, then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("3 and 4.\n#### 70", "70"), ("none", ""),
    ("", "")])
def test_final_answers(text, answer):
    assert extract_answer(text) == answer


# --- prompts and data ---------------------------------------------------------------------------------------------

def mmlu_pro_rows(split, each, domains=DOMAINS):
    return [{"question_id": f"{split}{number}{domain}", "question": f"Question {number} of {domain}?",
             "category": domain, "options": [f"{domain} one ", "two", f"three {number}"], "answer": LETTERS[number % 3],
             "answer_index": number % 3, "src": "",
             "cot_content": f"A: Let's think step by step. We refer to Wikipedia articles on {domain} for help. Work "
                            f"{number}. The answer is ({LETTERS[number % 3]})." if split == "validation" else ""}
            for domain in domains for number in range(each)]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """MMLU-Pro, GSM8K and MATH as files in the layout of their public releases."""
    rows = {("mmlu_pro", "test"): mmlu_pro_rows("test", 2), ("mmlu_pro", "validation"): mmlu_pro_rows("validation", 5),
            ("gsm8k", "test"): [{"question": f"What is {n} plus 2?", "answer": f"{n}+2=<<{n}+2={n + 2}>>{n + 2}\n#### "
                                 f"{n + 2}"} for n in range(3)],
            ("math", "test"): [{"problem": "Halve $x$.", "level": "Level 1", "type": "Algebra",
                                "solution": "It is $\\boxed{\\frac{x}{2}}$."}]}
    for (folder, split), own in rows.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))


def prompts(task, **how):
    task.build_all_requests(**how)
    return [instance.args[0] for instance in task.instances]


def test_the_five_shot_prompt_is_that_of_the_official_script(local):
    task = build_tasks("mmlu_pro", *benchmark_examples("mmlu_pro"))["sts_mmlu_pro_cot_computer_science"]
    # generate_cot_prompt of the official evaluate_from_local.py, written out.
    expected = ("The following are multiple choice questions (with answers) about computer science. Think step by step "
                'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n')
    for number in range(5):
        expected += (f"Question:\nQuestion {number} of computer science?\nOptions:\nA. computer science one\nB. two\n"
                     f"C. three {number}\nAnswer: Let's think step by step. We refer to Wikipedia articles on computer "
                     f"science for help. Work {number}. The answer is ({LETTERS[number % 3]}).\n\n")
    expected += ("Question:\nQuestion 1 of computer science?\nOptions:\nA. computer science one\nB. two\nC. three 1\n"
                 "Answer: Let's think step by step.")
    assert prompts(task)[1] == expected
    assert task.config.generation_kwargs == {"until": ["Question:"], "max_gen_toks": 2048, "do_sample": False,
                                             "temperature": 0.0}


def test_the_layout_is_that_of_the_harness_own_task_as_well(local):
    from lm_eval.tasks.mmlu_pro.utils import format_cot_example

    task = build_tasks("mmlu_pro", *benchmark_examples("mmlu_pro"))["sts_mmlu_pro_cot_law"]
    worked, questions = mmlu_pro_rows("validation", 5, ["law"]), mmlu_pro_rows("test", 2, ["law"])
    ending = "".join(format_cot_example(row) for row in worked)
    for row, prompt in zip(questions, prompts(task), strict=True):
        assert prompt.endswith("choice.\n" + ending + format_cot_example(row, including_answer=False))


def test_the_task_files_load_by_name_and_read_the_books_data(local, lm_of):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    loaded = manager.load(["sts_mmlu_pro_cot", "sts_mmlu_pro_letters", "sts_gsm8k", "sts_math"])["tasks"]
    by_name = {name.rpartition("::")[2]: task for name, task in loaded.items()}
    wanted = {f"sts_mmlu_pro_{kind}_{domain.replace(' ', '_')}" for kind in ("cot", "letters") for domain in DOMAINS}
    assert set(by_name) == wanted | {"sts_gsm8k", "sts_math"}
    for kind in ("cot", "letters"):
        ids = [doc["example_id"] for domain in DOMAINS
               for doc in by_name[f"sts_mmlu_pro_{kind}_{domain.replace(' ', '_')}"].eval_docs]
        assert sorted(ids) == sorted(example.example_id for example in load_examples("mmlu_pro"))
    # The same prompts as through Python.
    for name, task in build_tasks("mmlu_pro", *benchmark_examples("mmlu_pro")).items():
        assert prompts(by_name[name]) == prompts(task)
    assert prompts(by_name["sts_gsm8k"])[1] == ("What is 1 plus 2?\nPlease reason step by step, and put your final "
                                                "answer within \\boxed{}.")
    assert [doc["answer"] for doc in by_name["sts_math"].eval_docs] == ["\\frac{x}{2}"]


def test_letters_by_the_task_file_are_those_of_evaluate(local, tiny_models):
    from sts.engine.models import load_model

    lm = load_model(str(tiny_models["llama"]))
    lm.tokenizer.chat_template = None
    task = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(model=open_harness(lm, batch=4), tasks=["sts_mmlu_pro_letters"], task_manager=task,
                              bootstrap_iters=0)
    rows = evaluate(lm, load_examples("mmlu_pro"), kinds=("letter",)).set_index(["example_id", "option"])
    samples = [sample for own in results["samples"].values() for sample in own]
    assert len(samples) == 2 * len(DOMAINS)
    for sample in samples:
        for option, (value, _) in enumerate(sample["filtered_resps"]):
            assert value == pytest.approx(rows.loc[(sample["doc"]["example_id"], option), "loglikelihood"], abs=1e-4)


def test_a_limit_is_a_domain_and_drawn_by_seed(local):
    for seed in (0, 1):
        examples, demonstrations = benchmark_examples("mmlu_pro", limit=1, seed=seed)
        assert [example.domain for example in examples] == list(DOMAINS) and len(demonstrations) == 5 * len(DOMAINS)
    assert len(benchmark_examples("gsm8k")[0]) == 3


# --- the beginning of the sequence --------------------------------------------------------------------------------

OPEN = [Example(f"open-{n}", "math", f"What is {n} plus 3?", (), -1, str(n + 3), f"{n} + 3 = {n + 3}")
        for n in range(5)]


def with_bos(tiny_models, *, written: bool):
    """A model whose tokenizer puts <s> before plain text and whose chat template writes it itself, or does not."""
    from sts.engine.models import load_model

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
    engine = open_harness(lm, batch=2)
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


@pytest.mark.parametrize("written", [True, False], ids=["template with BOS", "template without"])
def test_what_is_evaluated_begins_as_the_books_own_prompts_do(tiny_models, monkeypatch, written):
    lm, run = with_bos(tiny_models, written=written), []
    bos = lm.tokenizer.bos_token_id
    score = SharedContextLM._loglikelihood_tokens
    monkeypatch.setattr(SharedContextLM, "_loglikelihood_tokens", lambda self, requests, **how: run.extend(
        [*context, *target] for _, context, target in requests) or score(self, requests, **how))
    for plain in (False, True):
        if plain:
            lm.tokenizer.chat_template = None
        run.clear()
        evaluate(lm, OPEN[:2])
        begins = make_prompt(lm.tokenizer, OPEN[0].question).ids[0]
        assert len(run) == 2
        for ids in run:
            assert ids[0] == begins and ids.count(bos) == int(plain or written)


# --- generating ---------------------------------------------------------------------------------------------------


def test_answers_are_what_the_model_generates(lm_of, monkeypatch):
    lm, texts = lm_of("llama"), []
    seen = []
    engine = open_harness(lm, batch=2, report=seen.append)
    monkeypatch.setattr(generation, "extract_answer", lambda text: texts.append(text) or extract_answer(text))
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
    assert seen[-1] == 1.0
    assert engine.work.tokens > 5 * 12 and engine.work.padded_tokens >= engine.work.tokens


def test_right_answers_are_counted(lm_of, monkeypatch):
    engine = open_harness(lm_of("llama"), batch=2)
    monkeypatch.setattr(type(engine), "generate_until", lambda self, requests, **how: [
        f"so \\boxed{{{n + 3 if n % 2 else n}.0}}" for n in range(5)])
    rows = generate_and_score(engine, "gsm8k", OPEN)
    assert rows["correct"].tolist() == [False, True, False, True, False]
    assert rows["extracted"].tolist() == ["0.0", "4.0", "2.0", "6.0", "4.0"]


def test_letters_are_scored_behind_demonstrations_of_the_same_domain(lm_of, monkeypatch):
    examples = [example for example in load_examples("mmlu_exemplars") if example.domain in ("law", "biology")]
    worked = [example for example in examples if example.example_id.endswith(("-0", "-1"))]
    questions = [example for example in reversed(examples) if example not in worked]
    engine, asked = open_harness(lm_of("llama"), batch=2), []

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


@pytest.mark.parametrize(("benchmark", "examples", "message"), [
    ("mmlu", OPEN, "Benchmark 'mmlu' is not known. Valid: gsm8k, math, mmlu_pro"),
    ("gsm8k", [], "given no questions"),
    ("mmlu_pro", OPEN, "domain 'math' has questions without options"),
    ("mmlu_pro", [Example("a", "law", "Which?", ("x", "y"), 0, "x", "")], "no worked example of domain 'law'"),
])
def test_what_cannot_be_asked_is_one_line(lm_of, benchmark, examples, message):
    with pytest.raises(StsError, match=message):
        generate_and_score(open_harness(lm_of("llama"), batch=2), benchmark, examples)


def test_a_prompt_that_leaves_no_room_is_named(lm_of):
    with pytest.raises(StsError, match="item open-0 has .* tokens, and the model's context leaves 12 beside"):
        generate_and_score(open_harness(lm_of("llama"), batch=2), "gsm8k", OPEN, max_tokens=8180)


def test_vllm_is_asked_for_by_its_install_command(monkeypatch):
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StsError, match=r"vLLM is not installed.*pip install 'lm-eval\[vllm\]'"):
        open_vllm("some/model")


def test_vllm_gets_what_the_run_says(monkeypatch, tmp_path):
    """The harness's vLLM class takes these options; vLLM itself needs a GPU."""
    from lm_eval.api import registry

    calls = []
    source = ast.parse((Path(lm_eval.__file__).parent / "models" / "vllm_causallms.py").read_text(encoding="utf-8"))

    class Recorder:
        @classmethod
        def create_from_arg_obj(cls, options):
            calls.append(options)

    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(registry, "get_model", lambda name: {"vllm": Recorder}[name])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    open_vllm("org/model", revision="abc", dtype="bfloat16", tensor_parallel=2, context_length=4096,
              adapter=tmp_path / "lora", lora_rank=32)
    open_vllm("org/model", revision="abc", adapter=tmp_path)
    first, second = calls
    assert first == {"pretrained": "org/model", "revision": "abc", "tokenizer_revision": "abc", "dtype": "bfloat16",
                     "tensor_parallel_size": 2, "max_model_len": 4096, "lora_local_path": str(tmp_path / "lora"),
                     "max_lora_rank": 32, "batch_size": "auto", "seed": 0, "enable_prefix_caching": True}
    assert (second["pretrained"], second["tokenizer"], second["tokenizer_revision"]) == (
        str(tmp_path), "org/model", "abc")
    assert "revision" not in second
    vllm, = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    init, = (node for node in vllm.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    # What is no parameter of the harness' class goes on to vLLM's own.
    assert set(first) - {argument.arg for argument in init.args.args} == {"enable_prefix_caching"}
