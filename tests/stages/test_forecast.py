"""The stages joined up, on the smoke run: each result recomputed from its inputs by other means."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy
import pandas
import pytest
import scipy.stats
import torch

import sts
from sts.data.groups import token_pieces
from sts.data.load import load_examples
from sts.engine.extract import Masks, paired_stats
from sts.errors import ROOT, StsError
from sts.measure.baselines import split_domains
from sts.run import resources


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("pipeline"))


def test_scores_are_sums_over_the_most_shifted_latents(run):
    change = run.get("shift")["squared_difference_L"].numpy()
    top = numpy.argsort(-change, kind="stable")[:run.settings.top_n]
    rows = run.get("shift_rows")["squared_difference_L"].numpy()
    top_rows = numpy.argsort(-rows, kind="stable")[:run.settings.top_n]
    scores = run.get("scores").set_index(["variant", "domain"])
    paired, by_row = (split_domains(run.get(name)) for name in ("domain_stats", "domain_rows"))
    assert len(paired) == 14
    for domain in paired:
        stats, row_stats = paired[domain], by_row[domain]
        tokens, count = stats["tokens"].item(), row_stats["tokens"].item()
        expected = {
            ("paper", "sts_act"): stats["base_sum_L"].numpy()[top].sum() / tokens,
            ("paper", "sts_icl"): stats["squared_difference_L"].numpy()[top].sum() / tokens,
            ("official_code", "sts_act"): row_stats["base_square_sum_L"].numpy()[top_rows].mean() / count,
            ("official_code", "sts_icl"): row_stats["squared_difference_L"].numpy()[top_rows].mean() / count}
        for (variant, score), value in expected.items():
            assert scores.loc[(variant, domain), score] == pytest.approx(value, rel=1e-9)


def test_masks_of_the_run_reach_the_extraction(run):
    settings = run.settings
    groups = resources.domain_groups(run)["law"]
    masks = Masks(settings.question_tokens_only, settings.drop_first_positions, settings.outlier_norm)
    own = paired_stats(resources.lm(run), resources.reader(run), settings.layer, groups, masks)
    stored = split_domains(run.get("domain_stats"))["law"]
    torch.testing.assert_close(own.squared_difference_L, stored["squared_difference_L"], rtol=1e-4, atol=1e-9)
    other = sts.open_run("smoke", results=run.results, question_tokens_only=False)
    assert split_domains(other.get("domain_stats"))["law"]["tokens"] > stored["tokens"]


def test_demonstrations_never_stand_in_their_own_question(run):
    domains = resources.domain_groups(run).values()
    for group in [*resources.shift_groups(run), *(group for own in domains for group in own)]:
        for base, icl in zip(group.base, group.icl, strict=True):
            question = resources.lm(run).tokenizer.decode(base.ids[base.question[0]:base.question[1]])
            assert resources.lm(run).tokenizer.decode(icl.ids).count(question) == 1


@pytest.mark.parametrize(("draws", "demonstrations"), [(3, 2), (4, 3)])
def test_every_draw_of_demonstrations_has_questions_of_its_own(run, draws, demonstrations):
    many = sts.open_run("smoke", results=run.results, demonstration_draws=draws, shift_demonstrations=demonstrations,
                        shift_tokens=100_000)
    tokenizer = resources.lm(run).tokenizer
    examples = {tokenizer.decode(tokenizer(example.question)["input_ids"]): example.example_id
                for example in resources.train(many)}
    groups = resources.shift_groups(many)
    assert len(groups) == draws
    read = []
    for group in groups:
        for base, icl in zip(group.base, group.icl, strict=True):
            question = resources.lm(many).tokenizer.decode(base.ids[base.question[0]:base.question[1]])
            assert resources.lm(many).tokenizer.decode(icl.ids).count(question) == 1  # not its own demonstration
            read.append(examples[question])
    assert len(read) == len(set(read)) > len(examples) / 2


def test_too_few_examples_for_the_draws_are_said(run):
    few = sts.open_run("smoke", results=run.results, demonstration_draws=4, shift_demonstrations=3, sft_examples=4)
    with pytest.raises(StsError, match="has 4 different questions, too few.*Use fewer demonstration_draws"):
        resources.shift_groups(few)


def test_held_out_problems_are_not_trained_on(run):
    train, held_out = ({example.question for example in part(run)} for part in (resources.train, resources.held_out))
    assert not train & held_out
    assert len(resources.train(run)) == 16 and len(resources.held_out(run)) == 8


def test_the_tuned_model_is_what_is_evaluated_after(run):
    before, after = run.get("evaluation_before"), run.get("evaluation_after")
    assert (before["example_id"] == after["example_id"]).all()
    assert not numpy.allclose(before["loglikelihood"], after["loglikelihood"], atol=1e-3)
    log = json.loads((run.get("sft") / "training.json").read_text())
    assert log["held_out_after"] < log["held_out_before"]


def test_domain_shift_is_after_minus_before(run):
    before, after = run.get("evaluation_before"), run.get("evaluation_after")
    law = (before["domain"] == "law") & (before["kind"] == "solution")
    change = (-(after[law]["loglikelihood"] - before[law]["loglikelihood"]) / numpy.log(2)
              / before[law]["characters"]).mean()
    shifts = run.get("domain_shift").set_index(["domain", "measure"])
    assert shifts.loc[("law", "bits"), "shift"] == pytest.approx(change)
    assert set(shifts.index.get_level_values("measure")) == {"bits", "accuracy", "p_right"}


def test_correlations_are_those_of_the_absolute_shift(run):
    scores, shifts = run.get("scores"), run.get("domain_shift")
    found = {(row["measure"], row["variant"], row["score"]): row for row in run.get("correlations")}
    assert len(found) == 12
    for variant in ("paper", "official_code"):
        for score in ("sts_act", "sts_icl"):
            x = scores[scores["variant"] == variant].set_index("domain")[score]
            y = shifts[shifts["measure"] == "bits"].set_index("domain")["shift"].abs().loc[x.index]
            assert found["bits", variant, score]["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)


def test_keys_follow_what_a_stage_reads_and_nothing_else(run):
    def keys(**changed):
        other = sts.open_run("smoke", results=run.results, **changed)
        names = ("sae", "shift", "domain_stats", "scores", "sft", "evaluation_before", "evaluation_after",
                 "correlations", "sae_quality", "small_sae")
        return {name for name in names if other.key(name) != run.key(name)}

    assert keys(top_n=8) == {"scores", "correlations"}
    assert keys(sft_lr=1e-3) == {"sft", "evaluation_after", "correlations"}
    assert keys(demonstrations=2) == {"domain_stats", "scores", "correlations"}
    assert keys(small_sae_k=8) == {"small_sae"}
    assert keys(eval_batch=4) == {"evaluation_before", "evaluation_after", "correlations"}
    assert "sae" in keys(sae_k=4) and "shift" in keys(sae_k=4)
    assert "sae" in keys(splice_tokens=500)
    # Which problems are trained on depends on how many are held out.
    assert "sft" in keys(sft_held_out=4)


def test_text_to_train_on_is_part_of_the_saes_key(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 500 + " one")
    first = sts.open_run("smoke", results=tmp_path, sae_text={str(text): 100}).key("sae")
    text.write_text("a" * 500 + " two")
    assert sts.open_run("smoke", results=tmp_path, sae_text={str(text): 100}).key("sae") != first


def test_demonstrations_may_come_from_a_split_of_their_own(tmp_path, monkeypatch):
    folder = tmp_path / "mmlu_pro"
    folder.mkdir()
    for split, count in (("test", 3), ("validation", 2)):
        rows = [{"question_id": f"{split}{i}", "question": f"Question {split} {i}, which is it?", "category": "law",
                 "options": ["one", "two"], "answer": "A", "answer_index": 0,
                 "cot_content": f"Worked {i}." if split == "validation" else ""} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("STS_DATA_DIR", str(tmp_path))
    run = sts.open_run("smoke", results=tmp_path / "results", domain_data="mmlu_pro", demonstrations=2,
                       demonstration_split="validation")
    group, = resources.domain_groups(run)["law"]
    assert len(group.base) == 3  # every question is scored
    text = resources.lm(run).tokenizer.decode(group.icl[0].ids)
    assert "Worked 0." in text and "Worked 1." in text and "Question test" in text


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "sts.cli", "stage", "correlations", "--run", "smoke"]
    environment = {**os.environ, "STS_RESULTS": str(tmp_path)}
    stages = tmp_path / "stages"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    # As soon as the first stages are stored, the process is killed without warning.
    while not list(stages.glob("domain_stats-*.provenance.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in stages.glob("*.provenance.json")}
    assert not list(stages.glob("correlations-*"))
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert list(stages.glob("correlations-*.json"))
    assert all((stages / name).stat().st_mtime_ns == when for name, when in finished.items())


# Gemma2: soft-capped logits, sliding windows, its own layout of layers. Gemma3: a base model, without chat template.
@pytest.mark.parametrize("model", ["random-gemma2", "random-gemma3"])
def test_other_families_run_through_all_stages(tmp_path, model):
    run = sts.open_run("smoke", results=tmp_path, model=model, domains=["law", "math", "physics"],
                       sft_examples=8, domain_limit=4)
    rows = pandas.DataFrame(run.get("correlations"))
    assert len(rows) == 12
    assert run.get("domain_shift")["shift"].abs().max() > 0


def test_every_piece_of_text_begins_with_bos_where_the_model_expects_it(tmp_path):
    texts = {}
    for model in ("random-llama", "random-gemma3"):
        run = sts.open_run("smoke", results=tmp_path, model=model, context=40, text_examples=4)
        tokenizer = resources.lm(run).tokenizer
        bos, pieces = tokenizer.bos_token_id, token_pieces(tokenizer, resources.texts(run), run.settings.context, 10**9)
        start = 1 if model == "random-gemma3" else 0
        assert len(pieces) > 8 and max(map(len, pieces)) == 40
        assert not start or all(piece[0] == bos and bos not in piece[1:] for piece in pieces)
        texts[model] = resources.lm(run).tokenizer.decode([token for piece in pieces for token in piece[start:]])
    # Llama's pieces hold its chat template, in which the same token opens every turn; cut pieces do not begin with it.
    assert "<|im_start|>user" in texts["random-llama"] and "Question: " in texts["random-gemma3"]


def test_unknown_domain_lists_the_valid_ones(tmp_path):
    with pytest.raises(sts.StsError, match="astrology.*biology.*psychology"):
        sts.open_run("smoke", results=tmp_path, domains=["astrology"]).get("domain_stats")


def test_too_few_examples_name_the_domain(tmp_path):
    with pytest.raises(sts.StsError, match="Domain 'engineering' has 5 different questions, too few"):
        sts.open_run("smoke", results=tmp_path, domains=["engineering"], demonstrations=5).get("domain_stats")


def test_layer_out_of_range_and_wrong_site(tmp_path, run):
    with pytest.raises(sts.StsError, match="Layer 7 was asked for; the model has layers 0 to 1"):
        sts.open_run("smoke", results=tmp_path, layer=7).get("shift")
    sae = resources.reader(run)
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    folder = str(run.get("sae"))
    with pytest.raises(sts.StsError, match="after layer 0 .* layer 1 was asked for"):
        sts.open_run("smoke", results=tmp_path, sae=folder, layer=1).get("shift")


def test_questions_of_the_default_run_are_all_there():
    assert len(load_examples("mmlu_exemplars")) == 282


def test_a_wrong_sae_is_said_before_anything_is_computed(tmp_path):
    with pytest.raises(sts.StsError, match="data/sae/nosuch.* is not known.*cfg.json"):
        sts.open_run("laptop", results=tmp_path, sae="data/sae/nosuch")
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_gpu_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(sts.StsError, match="no GPU"):
        sts.open_run("smoke", results=tmp_path, device="cuda").get("shift")
