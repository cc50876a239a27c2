"""What is recorded of a run, and pages' results from it without model and data."""

import contextlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import sts
from sts.book import pages
from sts.book.pages import correlation_verdict
from sts.book.pages_baselines import comparison_verdict, confound_verdict, correlations_of
from sts.book.pages_headline import headline_markdown
from sts.errors import MissingData, StsError
from sts.run import resources as inputs
from sts.run.recorded import BLANK, NO_TEXT, drawn, record
from sts.run.run import STAGES, registered
from sts.run.settings import ROOT
from sts.run.store import Store
from sts.run.verify import verify

NAMES = ("scores", "latent_examples", "small_sae_quality", "sft_shift", "ablated_answers", "domain_shift",
         "text_baselines", "sweep_latents", "forecast_sums")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    opened = sts.open_run("smoke", results=tmp_path_factory.mktemp("recorded-run"), seeds=[])
    for name in NAMES:
        opened.get(name)
    return opened


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("recorded")
    record(run, target)
    return target


@pytest.fixture
def elsewhere(run, folder, tmp_path, monkeypatch):
    """The same run where neither model nor data can be had."""
    def missing(*args, **kwargs):
        raise StsError("not here")

    monkeypatch.setattr(inputs, "resolve_model", missing)
    for name in ("load_examples", "load_mixture"):
        monkeypatch.setattr(inputs, name, missing)
    opened = sts.open_run("smoke", results=tmp_path, seeds=[])
    opened.store = Store(opened.store.folder, (folder,))
    return opened


def test_results_come_back_without_model_and_data(run, elsewhere):
    for name in ("scores", "domain_shift"):
        assert elsewhere.key(name) == run.key(name)
        assert elsewhere.get(name).equals(run.get(name))
    for name, tensor in run.get("sft_shift").items():
        found = elsewhere.get("sft_shift")[name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), tensor.double(), rtol=1e-6, atol=0)
    assert elsewhere.provenance("text_activations")["withheld"].startswith("size")


def test_texts_and_weights_are_not_recorded(run, elsewhere, folder):
    written = run.get("ablated_answers")
    cards = run.get("latent_examples")
    content = "".join(path.read_text() for path in folder.glob("*.json"))
    assert written["question"] not in content and NO_TEXT in content
    found = elsewhere.get("latent_examples")
    assert {token for card in found for context in card["contexts"] for token in context["tokens"]} == {BLANK}
    assert [card["contexts"][0]["values"] for card in found] == [card["contexts"][0]["values"] for card in cards]
    assert [path.name for path in elsewhere.get("sft").iterdir()] == ["training.json"]
    assert not list(folder.glob("text_activations-*.safetensors")) and list(folder.glob("shift-*.safetensors"))
    assert all(load_file(path) for path in folder.glob("*.safetensors"))


def test_what_is_not_recorded_says_what_is_missing(elsewhere):
    with pytest.raises(StsError, match="not here"):
        elsewhere.get("text_activations")
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], score_tokens=100)
    other.store = elsewhere.store
    with pytest.raises(StsError, match="not here"):  # other settings: recorded results are not taken for these
        other.get("scores")


def test_scores_with_other_numbers_of_latents_are_computed_from_what_is_recorded(run, elsewhere):
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], top_n=3)
    other.store = Store(other.store.folder, elsewhere.store.recorded)
    found = other.get("scores").set_index(["variant", "domain"])
    for variant, shift, domains, summed, scale in (
            ("paper", "shift", "domain_stats", "base_sum_L", 1),
            ("official_code", "shift_rows", "domain_rows", "base_square_sum_L", 3)):
        chosen = run.get(shift)["squared_difference_L"].argsort(descending=True)[:3]
        sums = run.get(domains)
        act = (sums[f"law/{summed}"][chosen].sum() / sums["law/tokens"] / scale).item()
        assert found.loc[(variant, "law"), "sts_act"] == pytest.approx(act, rel=1e-5)
    assert other.get("sweep_latents")["value"].nunique() > 1
    with pytest.raises(StsError, match="domain_stats' was recorded without base_fired_L.*sts stage domain_stats"):
        other.compute("forecast_sums")


@pytest.mark.parametrize("stage", ["scores", "domain_shift", "sweep_latents"])
def test_recorded_results_are_verified_from_recorded_ones(run, folder, elsewhere, stage):
    assert verify(elsewhere, stage).agrees


@pytest.mark.parametrize("stage", ["latent_examples", "domain_stats", "sae"])
def test_what_is_recorded_in_part_is_verified_in_that_part(run, folder, tmp_path, stage):
    opened = sts.open_run("smoke", results=tmp_path, seeds=[])
    for need in opened._needs(STAGES[stage]):  # what it is computed from, such as the SAE's weights, is here
        opened.compute(need)
    opened.store = Store(opened.store.folder, (folder,))
    found = verify(opened, stage)
    assert found.agrees and found.entries > 10


def test_further_seeds_record_their_scores_without_the_sums(run, tmp_path):
    opened = sts.open_run("smoke", results=run.results, seeds=[1])
    opened.with_seed(1).get("scores")
    record(opened, tmp_path / "recorded")
    assert len(list((tmp_path / "recorded").glob("scores-*.parquet"))) == 2
    own, = (tmp_path / "recorded").glob("domain_stats-*.safetensors")
    assert opened.key("domain_stats") in own.name
    note = tmp_path / "recorded" / (f"domain_stats-{opened.with_seed(1).key('domain_stats')}"
                                       ".safetensors.provenance.json")
    assert json.loads(note.read_text())["withheld"] == "size; recorded for seed 0 alone"


def test_an_input_that_is_here_and_differs_is_not_passed_over(elsewhere, monkeypatch):
    assert elsewhere.key("sft")
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[])
    other.store = elsewhere.store
    monkeypatch.setattr(inputs, "load_mixture", lambda *args, **kwargs: sts.data.load.gsm_symbolic(24, seed=99))
    with pytest.raises(StsError, match="not here"):
        other.key("sft")


def test_the_hub_is_asked_only_for_what_is_not_recorded(run, tmp_path, monkeypatch):
    """Pages must render in a minute where the hub cannot be reached, and not download where it can."""
    rows, asked = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)], []

    def hub(name, *args, **kwargs):
        asked.append(name)
        return rows

    monkeypatch.delenv("STS_DATA_DIR", raising=False)
    monkeypatch.setattr("datasets.load_dataset", hub)

    def opened(results):
        return sts.open_run("smoke", results=tmp_path / results, seeds=[], sft_data="gsm8k")

    first = opened("first")
    key = first.key("sft")
    assert asked
    spec = STAGES["sft"]
    provenance = {"stage": "sft", "key": key, "version": spec.version, "needs": {}, "drawn": drawn(first, spec),
                  "settings": {name: getattr(first.settings, name) for name in spec.uses},
                  "inputs": {what: first.identity(what) for what in spec.inputs}}
    folder = tmp_path / "recorded"
    folder.mkdir()
    (folder / f"sft-{key}.provenance.json").write_text(json.dumps(provenance))
    asked.clear()
    second = opened("second")
    second.store = Store(second.store.folder, (folder,))
    assert second.key("sft") == key and not asked
    assert second.key("shift") and asked  # not recorded


@pytest.mark.parametrize(("stage", "changed"), [
    ("sft", {"sft_examples": 4}), ("sft", {"sft_held_out": 2}), ("sft", {"seed": 1}), ("sft", {"sft_data": "gsm8k"}),
    ("evaluation_before", {"domain_limit": 3}), ("evaluation_before", {"domains": ["law", "math"]}),
    ("evaluation_before", {"domain_data": "mmlu_pro"}), ("evaluation_before", {"domain_split": "test"}),
    ("text_baselines", {"sft_examples": 4}), ("text_baselines", {"domain_limit": 3}),
    ("domain_stats", {"demonstration_split": "validation"})], ids=str)
def test_a_result_of_other_data_is_not_handed_out(run, elsewhere, stage, changed):
    assert elsewhere.key(stage) == run.key(stage)
    other = sts.open_run("smoke", results=elsewhere.results, **{"seeds": []} | changed)
    other.store = elsewhere.store
    with pytest.raises(StsError, match="not here"):
        other.key(stage)


def test_a_folder_without_settings_of_its_own_is_recorded_by_its_provenance_alone(run, tmp_path):
    opened = sts.open_run("smoke", results=run.results, seeds=[])
    opened.get("sweep_sae_training")
    record(opened, tmp_path / "recorded")
    name = f"sweep_sae_training-{opened.key('sweep_sae_training')}"
    assert not (tmp_path / "recorded" / name).exists()
    assert "weights" in json.loads((tmp_path / "recorded" / f"{name}.provenance.json").read_text())["withheld"]


def test_weights_are_computed_again_where_they_are_needed(run, folder):
    from sts.engine.finetune import load_tuned

    opened = sts.open_run("smoke", results=run.results, seeds=[])
    opened.store = Store(opened.store.folder.parent / "fresh", (folder,))
    with pytest.raises(StsError, match="sts stage sft --again"):
        load_tuned(opened.lm, opened.get("sft"))


def test_recording_removes_what_the_run_no_longer_asks_for(run, tmp_path):
    first = sts.open_run("smoke", results=run.results, seeds=[])
    record(first, tmp_path / "recorded")
    second = sts.open_run("smoke", results=run.results, seeds=[], top_n=3)
    second.get("scores")
    record(second, tmp_path / "recorded")
    kept = {path.name.partition(".")[0] for path in (tmp_path / "recorded").iterdir()}
    assert f"scores-{second.key('scores')}" in kept and f"scores-{first.key('scores')}" not in kept
    assert {f"shift-{first.key('shift')}", f"sft-{first.key('sft')}"} <= kept  # they do not depend on N


def test_recording_removes_nothing_while_a_training_set_cannot_be_read(run, tmp_path, monkeypatch):
    first = sts.open_run("smoke", results=run.results, seeds=[])
    record(first, tmp_path / "recorded")
    before = {path.name for path in (tmp_path / "recorded").iterdir()}
    second = sts.open_run("smoke", results=run.results, seeds=[], top_n=3, training_sets=["mmlu_exemplars"])
    monkeypatch.setattr("sts.run.recorded._training_runs", lambda run: [])  # as if mmlu_exemplars could not be read
    record(second, tmp_path / "recorded")
    assert before <= {path.name for path in (tmp_path / "recorded").iterdir()}


def test_texts_that_are_not_recorded_are_announced_with_the_way_to_read_them(run, folder, elsewhere):
    assert pages.texts_note(run, "ablated_answers", "fine_tuning_moves_few_latents") == ""
    assert pages.texts_note(run, "latent_examples", "what_an_sae_sees") == ""
    for stage in ("ablated_answers", "latent_examples"):
        assert f"sts stage {stage} --run smoke --again" in pages.texts_note(elsewhere, stage, "x")


def test_a_changed_setting_of_a_recorded_run_says_why_data_are_needed(elsewhere, monkeypatch):
    other = sts.open_run("smoke", results=elsewhere.results, seeds=[], domain_data="mmlu_pro")
    other.store = elsewhere.store

    def missing(*args, **kwargs):
        raise MissingData("no data")

    for name in ("resolve_model", "load_examples"):
        monkeypatch.setattr(inputs, name, missing)
    with pytest.raises(StsError, match="'evaluation_before' with .*domain_data = mmlu_pro is not recorded.*no data"):
        other.get("evaluation_before")


def test_recording_nothing_or_too_much_is_an_error(run, tmp_path, monkeypatch):
    with pytest.raises(StsError, match="no results"):
        record(sts.open_run("smoke", results=tmp_path, seeds=[]), tmp_path / "none")
    monkeypatch.setattr("sts.run.recorded.LIMIT", 1000)
    with pytest.raises(StsError, match="at most"):
        record(run, tmp_path / "much")


def test_provenance_keeps_where_and_when_it_was_computed(run, folder):
    noted = json.loads((folder / f"scores-{run.key('scores')}.parquet.provenance.json").read_text())
    own = run.provenance("scores")
    assert (noted["finished"], noted["seconds"], noted["device"]) == (own["finished"], own["seconds"], own["device"])


@pytest.mark.parametrize("folder", sorted(path for path in (ROOT / "data" / "recorded").iterdir() if path.is_dir()),
                         ids=lambda path: path.name)
def test_every_result_in_the_repository_is_one_that_its_run_asks_for(folder):
    """A raised version, or a changed profile, leaves results behind that no page would find."""
    run = sts.open_run(folder.name).recorded_alone()
    asked = set()
    for name in (run.settings.sft_data, *run.settings.training_sets):
        for seed in (run.settings.seed, *run.other_seeds):
            one = run.with_training(name).with_seed(seed)
            for stage in registered():
                with contextlib.suppress(StsError):  # not recorded
                    asked.add(f"{stage}-{one.key(stage)}")
    found = {re.match(r"\w+-[0-9a-f]{12}", path.name)[0] for path in folder.glob("*.provenance.json")}
    assert found and found - asked == set()


@pytest.fixture(scope="module")
def full():
    return sts.open_run("full").recorded_alone()


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def said(row):
    """A correlation with its interval, as the README has it."""
    low, high = (f"{row['pearson_interval'][end] + 0.005:.2f}" if abs(row['pearson_interval'][end]) < 0.005 else
                 f"{row['pearson_interval'][end]:.2f}" for end in ("low", "high"))
    return f"{row['pearson']:.2f} ({low} to {high})"


def row_of(rows, **wanted):
    found, = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return found


def test_the_readme_quotes_the_recorded_run(full, readme):
    plain = " ".join(readme.split())
    assert headline_markdown(full) in readme
    seeds, shifts = 1 + len(full.other_seeds), full.get("domain_shift").query("measure == 'bits'")
    assert f"Over {('one', 'two', 'three', 'four', 'five')[seeds - 1]} seeds" in plain
    assert len(shifts) == 14 and (shifts["shift"] > 0).all() and "became less likely in all 14 domains" in plain
    answers = next(row["answers"] for row in full.get("hardness") if row["measure"] == "bits")
    assert f"{answers['characters_low']:.0f} to {answers['characters_high']:.0f} characters, median" in plain


def test_the_readme_quotes_the_parts_of_answers(full, readme):
    plain, parts = " ".join(readme.split()), {row["part"]: row for row in full.get("answer_parts")}
    letter, opening = parts["letter"], parts["opening"]
    assert (f"mean change of {parts['whole']['change']:+.2f} bits an answer, the opening words *The answer is (* make "
            f"{opening['change']:+.2f}, the right letter {letter['change']:+.2f} (it became more likely in "
            f"{14 - letter['rose']} of 14 domains, and the wrong letters in {14 - letter['wrong']['rose']}: "
            f"{letter['wrong']['change']:+.2f}), the option's text {parts['text']['change']:+.2f}.") in plain
    found = {part: said(parts[part]["scores"]["sts_act"]) for part in parts}
    assert (f"opening words, r = {found['opening']}, beside {said(opening['rivals']['base_bits'])} of the bits per "
            f"character before; it is there that these domains differ ({opening['share']:.0%} of the variance of the "
            "whole change over domains, without interval; the other parts pull the other way). With that of the letter "
            f"STS_act has {found['letter']}, with that of the text {found['text']}. ({parts['whole']['questions']} "
            "questions a domain, three seeds.)") in plain
    assert correlation_verdict(opening["scores"]["sts_act"]) == "held"
    assert opening["scores"]["sts_act"]["pearson"] > opening["rivals"]["base_bits"]["pearson"]


def test_the_readme_says_what_other_training_does(full, readme):
    plain, rows = " ".join(readme.split()), full.get("training_correlations")
    code, health = ([row_of(rows, training_set=name, measure=measure, variant="paper", score="sts_act")
                     for measure in ("bits", "bits_answer")] for name in ("mbpp", "pubmedqa"))
    assert f"STS_act has {said(code[0])} in bits per character and {said(code[1])} per answer" in plain
    assert f"with PubMedQA {said(health[0])} and {said(health[1])}." in plain
    assert [correlation_verdict(row) for row in code] == ["not shown"] * 2  # "does not hold, or not in both measures"
    assert [correlation_verdict(row) for row in health] == ["reversed", "held"]


def test_the_readme_names_rivals_and_what_is_left(full, readme):
    plain, found = " ".join(readme.split()), correlations_of(full, "bits")
    for name in ("base_bits", "answer_shortness"):  # "are not told apart from STS_act"
        assert comparison_verdict(found[name]["less"]["sts_act"]) == "not told apart"
    act, icl = (row_of(full.get("baseline_nulls"), measure="bits", null="energy", predictor=name)
                for name in ("sts_act", "sts_icl"))
    assert (f"({round(act['p'] * (act['draws'] + 1)) - 1} of {act['draws']} sets reach it; two sets share "
            f"{act['shared']:.0%} of their latents), and {icl['p']:.0%} of them reach STS_ICL") in plain

    def left(measure, *controls):
        return row_of(full.get("baseline_confounds"), measure=measure, score="sts_act", controls=list(controls))

    every = left("bits", "base_bits", "question_tokens", "answer_shortness")
    assert f"(STS_act: p = {every['p']:.2f})" in plain and confound_verdict(every) == "not shown"
    assert f"Given the bits before alone, STS_act has {said(left('bits', 'base_bits'))}." in plain
    first, answer = left("bits", "base_bits", "question_tokens"), left("bits_answer", "base_bits_answer",
                                                                      "question_tokens")
    assert f"without it STS_act has {said(first)[:-1]}, p = {first['p']:.3f}), and per answer {said(answer)}." in plain
    rows = full.get("sweep_correlations")["values"]
    own, other = ({score: row_of(source, measure="bits", score=score, **wanted)["pearson"]
                   for score in ("sts_act", "sts_icl")} for source, wanted in (
                       (full.get("correlations"), {"variant": "paper"}), (rows, {"axis": "k", "own": True})))
    icl, act = (row_of(full.get("sweep_correlations")["saes"], measure="bits", score=score)
                for score in ("sts_icl", "sts_act"))
    assert (f"STS_ICL has {own['sts_icl']:.2f} with our SAE, and {other['sts_icl']:.2f} with another one of the same "
            f"shape, trained on less text (difference {icl['mean']:+.2f}, {icl['interval']['low']:.2f} to "
            f"{icl['interval']['high']:.2f}, p = {icl['p']:.3f}); STS_act {own['sts_act']:.2f} and "
            f"{other['sts_act']:.2f} ({act['mean']:+.2f}, {act['interval']['low']:.2f} to "
            f"{act['interval']['high']:.2f}).") in plain


def test_the_readme_quotes_the_second_family(readme):
    plain, other = " ".join(readme.split()), sts.open_run("full-gemma3-270m").recorded_alone()
    found = {measure: correlations_of(other, measure) for measure in ("bits", "bits_answer")}
    left = row_of(other.get("baseline_confounds"), measure="bits", score="sts_act",
                  controls=["base_bits", "question_tokens", "answer_shortness"])
    assert (f"r = {said(found['bits']['sts_act'])} in bits per character and {said(found['bits_answer']['sts_act'])} "
            f"per answer, above the bits per character before, {said(found['bits']['base_bits'])}; given these and "
            f"both lengths it has {said(left)[:-1]}, p = {left['p']:.3f}). STS_ICL has "
            f"{said(found['bits']['sts_icl'])}.") in plain
    assert comparison_verdict(found["bits"]["base_bits"]["less"]["sts_act"]) == "better"
    assert confound_verdict(left) == "held" and correlation_verdict(found["bits"]["sts_icl"]) == "not shown"
    null = row_of(other.get("baseline_nulls"), measure="bits", null="energy", predictor="sts_act")
    reach = round(null["p"] * (null["draws"] + 1)) - 1
    assert f"({null['mean']:.2f} on average, {reach} of {null['draws']} sets reach it)" in plain
    opening = row_of(other.get("answer_parts"), part="opening")
    assert (f"changed by {opening['change']:+.2f} bits on average, up in some domains and down in others, and make "
            f"{opening['share']:.0%} of the variance") in plain and 0 < opening["rose"] < opening["n"]
    accuracy = other.get("domain_shift").query("measure == 'accuracy'")["before"].mean()
    assert f"Accuracy is at chance there too ({accuracy:.0f}%)" in plain


def test_the_introduction_quotes_the_recorded_runs(full):
    plain = " ".join((ROOT / "book" / "introduction.md").read_text(encoding="utf-8").split())
    found = correlations_of(full, "bits")
    start, rest = said(found["sts_act"]).split(" (")
    assert f"STS_act r = {start} (95% interval {rest}, STS_ICL {said(found['sts_icl'])}" in plain
    assert f"takes *before* training, {said(found['base_bits'])}, not told apart" in plain
    other = correlations_of(sts.open_run("full-gemma3-270m").recorded_alone(), "bits")
    assert (f"STS_act has r = {said(other['sts_act'])}, above the bits per character before, "
            f"{said(other['base_bits'])}") in plain
    assert f"not shown there ({said(other['sts_icl']).replace(' (', ', ')}" in plain
