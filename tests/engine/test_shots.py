"""Questions behind examples of their domain: against lm-evaluation-harness' own tasks, and resumed by domain."""

import json
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness
from lm_eval.models.huggingface import HFLM

from sts.data.load import by_domain, load_examples
from sts.engine.evaluate import evaluate
from sts.engine.work import Work
from sts.measure.items import item_measures

WORKED = by_domain(load_examples("mmlu", split="worked"))
FOUR = [one for own in WORKED.values() for one in own if len(one.options) == 4]
SHOTS = {subject: WORKED[subject] for subject in ("anatomy", "college_physics")}
#: Questions of other subjects, 25 called anatomy and 25 called physics.
QUESTIONS = [replace(one, domain=list(SHOTS)[place % 2]) for place, one in enumerate(
    [one for one in FOUR if one.domain not in SHOTS][:50])]


def harness_task(folder: Path, kind: str, subject: str) -> ConfigurableTask:
    """lm-evaluation-harness' own task of a subject, on our questions and examples."""
    tasks = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / {"letter": "default", "text": "continuation"}[kind]
    own = yaml.safe_load((tasks / f"mmlu_{subject}.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load((tasks / own.pop("include")).read_text(encoding="utf-8")) | own
    files = {}
    for split, examples in (("test", [one for one in QUESTIONS if one.domain == subject]), ("dev", SHOTS[subject])):
        files[split] = str(folder / f"{subject}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps({
            "question": one.question, "choices": one.options, "answer": one.answer_index}) + "\n" for one in examples))
    return ConfigurableTask(config=config | {
        "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": 5})


@pytest.mark.parametrize("kind", ["letter", "text"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_fifty_questions_are_scored_as_by_the_harness_own_tasks(lm_of, family, kind, tmp_path):
    lm = lm_of(family)
    ours = evaluate(lm, QUESTIONS, kinds=[kind], shots=SHOTS)
    measured = item_measures(ours)
    for subject in SHOTS:
        found = harness(lm=HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=4, max_length=8192,
                                add_bos_token=family == "gemma3"),
                        task_dict={"own": harness_task(tmp_path, kind, subject)}, bootstrap_iters=0, log_samples=True)
        theirs = [value for sample in sorted(found["samples"]["own"], key=lambda one: one["doc_id"])
                  for value, _ in sample["filtered_resps"]]
        assert ours[ours["domain"] == subject]["loglikelihood"].tolist() == pytest.approx(theirs, abs=2e-3)
        assert measured[measured["domain"] == subject]["accuracy"].mean() == pytest.approx(
            100 * found["results"]["own"]["acc,none"], abs=1e-6)


def test_a_domains_examples_are_run_once(lm_of):
    lm, work, alone = lm_of("llama"), Work(), Work()
    evaluate(lm, QUESTIONS[::2], kinds=["letter"], shots=SHOTS, work=work)
    for question in QUESTIONS[::2]:
        evaluate(lm, [question], kinds=["letter"], shots=SHOTS, work=alone)
    assert work.tokens < alone.tokens / 3


def test_a_finished_domain_is_not_computed_again(lm_of, tmp_path, monkeypatch):
    lm, calls, work, again = lm_of("llama"), [], Work(), Work()
    forward = lm.model.forward
    whole = evaluate(lm, QUESTIONS, kinds=["text"], shots=SHOTS)

    def dies(*args, **inputs):
        calls.append(1)
        if (tmp_path / "anatomy.parquet").exists():
            raise KeyboardInterrupt
        return forward(*args, **inputs)

    monkeypatch.setattr(lm.model, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, QUESTIONS, kinds=["text"], shots=SHOTS, scratch=tmp_path, work=work)
    before = len(calls)
    monkeypatch.setattr(lm.model, "forward", lambda *args, **inputs: calls.append(1) or forward(*args, **inputs))
    resumed = evaluate(lm, QUESTIONS, kinds=["text"], shots=SHOTS, scratch=tmp_path, work=again)
    assert resumed.equals(whole)
    assert len(calls) - before < before  # the first domain's passes are not among them
    assert again.tokens > 1.5 * work.tokens - 1  # but its work is counted
