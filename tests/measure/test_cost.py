"""Costs: formulas against torch's own counter and published sizes, plans by hand, pages that say what was recorded."""

import json
import math
from dataclasses import fields, replace

import pandas
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sts
from sts.book import pages_cost, pages_plan, pages_speed, plots_cost
from sts.data.prompts import Prompt, PromptGroup
from sts.engine.models import residual_stream
from sts.errors import StsError
from sts.measure import cost

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")


def shape_of(lm, layer=0, latents=96):
    return cost.architecture_of(lm.model.config, name=lm.name, sae_layer=layer, sae_latents=latents)


# --- one token, against torch's counter ---

def counted(lm, run):
    """FLOPs that torch counts, by module; with eager attention, whose products it sees on every device."""
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        lm.model.set_attn_implementation(before)
    totals = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    # Rotary angles are made by a small product, which the formulas leave out.
    rotary = sum(total for name, total in totals.items() if name.endswith("rotary_emb"))
    return totals["Global"] - rotary, totals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 24)])
def test_flops_are_those_that_torch_counts(lm_of, family, rows, length):
    lm = lm_of(family)
    shape = shape_of(lm)
    ids = torch.zeros(rows, length, dtype=torch.long)
    total, by_module = counted(lm, lambda: lm.model(input_ids=ids, use_cache=False))
    # torch counts every query with every key, masked or not.
    assert total == rows * length * (shape.flops(keys=length) + shape.head_flops)
    layers = [value for name, value in by_module.items() if name.rpartition(".")[2].isdigit()]
    assert layers == [rows * length * shape.flops(keys=length, layers=1)] * shape.layers
    # The linear layers alone, without attention.
    linear = sum(value for name, value in by_module.items()
                 if name.rpartition(".")[2].endswith("_proj"))
    assert linear == rows * length * shape.flops(keys=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_early_costs_the_layers_that_are_run(lm_of, family):
    lm = lm_of(family)
    ids = torch.zeros(2, 10, dtype=torch.long)

    def run():
        with torch.inference_mode(False):
            residual_stream(lm.model, 0, ids, use_cache=False)

    total, _ = counted(lm, run)
    shape = shape_of(lm, layer=0)
    assert shape.layers_read == 1
    assert total == 20 * shape.flops(keys=10, layers=shape.layers_read)


def test_the_encoder_costs_one_matrix_product():
    encoder = torch.nn.Linear(64, 96)
    with FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(5, 64))
    shape = cost.Architecture("x", 2, 64, 4, 2, 16, 128, 100, 512, sae_layer=0, sae_latents=96)
    assert counter.get_total_flops() == 5 * shape.sae_flops


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own(lm_of, family):
    lm = lm_of(family)
    matrices = sum(p.numel() for name, p in lm.model.named_parameters()
                   if ".layers." in name and name.endswith("_proj.weight"))
    assert shape_of(lm).layer_weights * shape_of(lm).layers == matrices


@pytest.mark.parametrize(("key", "published", "norms"), [
    # Gemma 2's report: 8,324,201,984 non-embedding parameters, four norms a layer and one at the end among them.
    ("gemma2-9b-it", 8_324_201_984, (4 * 42 + 1) * 3584),
    # Llama 3 8B: 8,030,261,248 parameters, two embeddings of 128,256 x 4,096 and two norms a layer among them.
    ("llama3-8b-instruct", 8_030_261_248 - 2 * 128_256 * 4096, (2 * 32 + 1) * 4096)])
def test_the_papers_models_have_their_published_size(key, published, norms):
    shape = cost.ARCHITECTURES[key]
    assert shape.layers * shape.layer_weights + norms == published


def test_qwen_has_its_published_size():
    shape = cost.ARCHITECTURES["qwen2.5-7b-instruct"]
    assert shape.layers * shape.layer_weights == pytest.approx(6.53e9, abs=0.01e9)  # its model card: 6.53B


def test_a_family_that_the_formulas_do_not_describe_is_refused():
    from transformers import GPT2Config

    with pytest.raises(StsError, match="'gpt2'.*Valid: llama"):
        cost.architecture_of(GPT2Config(), name="x", sae_layer=0, sae_latents=8)


# --- a plan, by hand ---

#: Four layers, two of them read, one weight-like number everywhere, so that costs can be worked out on paper.
TOY = cost.Architecture("toy", 4, 1, 1, 1, 1, 1, 10, 1000, sae_layer=1, sae_latents=7)
SMALL = cost.Settings(shift_tokens=100, shift_demonstrations=2, domains=3, score_tokens=40, demonstrations=5,
                      sft_examples=6, sft_epochs=2, sft_max_length=50, passes_per_trained_token=3,
                      evaluated_questions=30)
ASSUMED = cost.Assumptions(sft_question_tokens=10, sft_solution_tokens=30, question_tokens=20, demonstration_tokens=8,
                           generated_tokens=5, demonstration_sets=2, evaluation_prefix_cached=True)


def test_the_forecasts_tokens_by_hand():
    # Training questions: 100 twice, and two sets of 2 x 40; each of 3 domains: 40 twice, and two sets of 5 x 8.
    shared = cost.forecast_cost(TOY, SMALL, ASSUMED)
    assert shared.tokens == (200 + 2 * 80) + 3 * (80 + 2 * 40)
    assert shared.passes == shared.tokens / 2  # two of four layers
    # Not shared: 10 training questions and 2 questions a domain each run their own.
    assert cost.forecast_cost(TOY, SMALL, ASSUMED, cached=False).tokens == (200 + 10 * 80) + 3 * (80 + 2 * 40)


def test_the_forecasts_flops_by_hand():
    # 4 attention weights + 3 MLP weights a layer, so 14 FLOPs and 4 a key; two layers; 2 x 7 in the encoder.
    def flops(tokens, keys):
        return tokens * 2 * (14 + 4 * keys)

    questions = flops(100, 5.5) + flops(100, 80 + 5.5) + flops(160, 40.5)
    domain = flops(40, 10.5) + flops(40, 40 + 10.5) + flops(80, 20.5)
    assert cost.forecast_cost(TOY, SMALL, ASSUMED).flops == pytest.approx(
        questions + 3 * domain + (200 + 3 * 80) * 14)


def test_training_and_evaluation_by_hand():
    trained = cost.training_cost(TOY, SMALL, ASSUMED)
    assert trained.tokens == 6 * 2 * 40 and trained.passes == 3 * trained.tokens
    assert trained.flops == 3 * 480 * (4 * (14 + 4 * 20.5) + 20)
    tested = cost.evaluation_cost(TOY, SMALL, ASSUMED)
    assert tested.tokens == tested.passes == 2 * (3 * 40 + 30 * 25)
    again = cost.evaluation_cost(TOY, SMALL, replace(ASSUMED, evaluation_prefix_cached=False))
    assert again.tokens == 2 * (30 * 40 + 30 * 25)
    assert cost.ratio(TOY, SMALL, ASSUMED) == (3 * 480 + 2 * 870) / (840 / 2)


def test_long_solutions_are_cut_to_the_training_length_and_demonstrations_to_the_context():
    long = replace(ASSUMED, sft_solution_tokens=900)
    assert cost.training_cost(TOY, SMALL, long).tokens == 6 * 2 * 50
    narrow = replace(TOY, context=60)  # two demonstrations of 50 leave no room for 10; 50 fit
    assert cost.forecast_cost(narrow, SMALL, long).tokens == (200 + 2 * 50) + 3 * (80 + 2 * 40)


def test_sharing_demonstrations_never_costs_more():
    few = replace(ASSUMED, demonstration_sets=50)
    assert cost.forecast_cost(TOY, SMALL, few).tokens == cost.forecast_cost(TOY, SMALL, few, cached=False).tokens


@pytest.mark.parametrize("name", [field.name for field in fields(cost.Assumptions) if field.type == "int"])
@pytest.mark.parametrize("value", [0, -1, 10**10, math.nan])
def test_an_impossible_assumption_is_refused(name, value):
    with pytest.raises(StsError, match=f"'{name}' must be a number from 1 to 1,000,000,000; got {value}"):
        cost.Assumptions(**{name: value})


@pytest.mark.parametrize("factor", [0, -2.0, 0.5, 1e4, math.nan, math.inf])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(StsError, match="'off_by' is how far .* from 1 .*; got"):
        cost.check_factor(factor)
    with pytest.raises(StsError, match="'factor' is how far"):
        cost.sensitivity(SMALL, ASSUMED, factor=factor, architectures=[TOY])


def test_the_largest_values_that_are_accepted_give_finite_numbers():
    largest = cost.Assumptions(*[cost.LARGEST] * 6)
    varied = cost.sensitivity(cost.Settings(), largest, factor=cost.LARGEST_FACTOR)
    assert varied[["ratio", "low", "high"]].map(math.isfinite).all(axis=None)
    assert (varied["low"] <= varied["ratio"]).all() and (varied["ratio"] <= varied["high"]).all()


def test_sensitivity_holds_the_plan_and_all_at_once_is_widest():
    varied = cost.sensitivity(SMALL, ASSUMED, architectures=[TOY])
    assert set(varied["ratio"]) == {cost.ratio(TOY, SMALL, ASSUMED)}
    assert (varied["low"] <= varied["ratio"]).all() and (varied["ratio"] <= varied["high"]).all()
    by_name = varied.set_index("assumption")
    ends = {cost.ratio(TOY, SMALL, replace(ASSUMED, generated_tokens=tokens)) for tokens in (2, 5, 10)}
    assert (by_name.loc["generated_tokens", "low"], by_name.loc["generated_tokens", "high"]) == (min(ends), max(ends))
    others = by_name.drop("all")
    assert by_name.loc["all", "low"] <= others["low"].min() and by_name.loc["all", "high"] >= others["high"].max()
    same = cost.sensitivity(SMALL, ASSUMED, factor=1.0, architectures=[TOY]).set_index("assumption")
    assert same.loc["sft_solution_tokens", "low"] == same.loc["sft_solution_tokens", "high"]


def test_every_number_of_the_plan_is_on_the_page_with_its_origin():
    table = pages_plan.given_table(cost.Settings(), cost.Assumptions(generated_tokens=123)).set_index("parameter")
    assert table.loc["generated_tokens", "value"] == "123" and table.loc["generated_tokens", "from"] == "our assumption"
    assert table.loc["sft_examples", "value"] == "817" and table.loc["sft_examples", "from"] == "the paper"
    assert table.loc["evaluation_prefix_cached", "value"] == "yes"
    assert len(table) == len(fields(cost.Settings)) + len(fields(cost.Assumptions))


def test_the_plans_table_divides_by_each_way_to_forecast():
    table = pages_plan.plan_table(cost.plan(SMALL, ASSUMED, [TOY])).set_index("")
    assert table.loc["forecast", "finding out / this, passes"] == "7.6"  # (1440 + 1740) / 420 = 7.57
    assert table.loc["fine-tuning", "finding out / this, passes"] == ""


def test_prompts_are_counted_whole():
    group = PromptGroup((Prompt((1, 2, 3), (1, 3)),), (Prompt((1, 9, 9, 2, 3), (3, 5)),))
    assert cost.prompt_tokens([group, group]) == {"prompts": 4, "tokens": 16}


# --- measured ---

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sts.open_run("smoke", results=tmp_path_factory.mktemp("cost"))


def costs(forecast=(10.0, 100.0), training=(20.0, 150.0), evaluation=(30.0, 250.0)):
    rows = [{"group": group, "counted": True, "seconds": seconds, "tokens": passes, "passes": passes, "uncounted": "",
             "notes": ""} for group, (seconds, passes) in zip(
                 pages_cost.GROUPS, (forecast, training, evaluation), strict=True)]
    return pandas.DataFrame([*rows, {"group": "Extra", "counted": False, "seconds": 5.0, "tokens": 7.0, "passes": 6.0,
                                     "uncounted": "", "notes": ""}])


@pytest.mark.parametrize(("forecast", "verdict"), [
    ((10.0, 100.0), "cheaper"),          # 5 times in seconds, 4 times in passes
    ((45.0, 100.0), "about as costly"),  # 1.1 times in seconds
    ((100.0, 100.0), "about as costly"),  # dearer in seconds, cheaper in passes
    ((100.0, 900.0), "dearer"),
    ((10.0, math.nan), "not counted")])
def test_the_verdict_follows_its_rule(forecast, verdict):
    assert pages_cost.cost_verdict(costs(forecast)) == verdict


def test_the_cost_table_adds_up_and_leaves_the_extra_row_out():
    table = pages_cost.cost_table(costs()).set_index("")
    assert list(table["share of time"])[:4] == ["17%", "33%", "50%", "83%"]
    assert list(table["share of passes"])[:4] == ["20%", "30%", "50%", "80%"]
    assert table.loc["Finding out, divided by forecast", "time"] == "5.0"
    assert table.loc["Finding out, divided by forecast", "token-forward-passes"] == "4.0"
    assert table.loc["Extra", "share of time"] == "" and table.loc["Extra", "time"] == "5.0 s"


def test_the_first_paragraph_has_the_numbers_and_the_rule(run):
    run.get("shift")
    varied = cost.sensitivity(SMALL, ASSUMED, architectures=[TOY])
    text = pages_cost.cost_summary(run, costs(), varied, 2.0)
    assert "took 10 s and 100 token-forward-passes. Fine-tuning and evaluating took 50 s and 400: 5.0 times" in text
    assert "4.0 times the passes" in text and "**cheaper**" in text and pages_cost.COST_RULE in text
    # 4,000 tokens through one of two layers; 400 - 100 passes are saved each time; 2,000 / 300 = 6.7.
    assert "would pay from forecast number 7 on" in text
    dear = pages_cost.cost_summary(run, costs((99.0, 600.0)), varied, 2.0)
    assert "forecasting never pays here" in dear and "**dearer**" in dear


def test_measured_costs_are_those_of_the_provenance(run):
    table = pages_cost.measured(run).set_index("group")
    records = {name: run.provenance(name) for name in ("shift", "domain_stats", "evaluation_before", "evaluation_after",
                                                       "sft", "shift_rows", "domain_rows")}
    forecast = table.loc["Forecast"]
    assert forecast["seconds"] == records["shift"]["seconds"] + records["domain_stats"]["seconds"]
    assert forecast["passes"] == records["shift"]["work"]["passes"] + records["domain_stats"]["work"]["passes"]
    # One of two layers is read in the smoke run.
    padded = sum(records[name]["work"]["padded_tokens"] for name in ("shift", "domain_stats"))
    assert forecast["passes"] == padded / 2
    tested = table.loc["Evaluation, before and after"]
    assert tested["tokens"] == 2 * records["evaluation_before"]["work"]["tokens"]
    assert tested["passes"] == 2 * records["evaluation_before"]["work"]["padded_tokens"]
    assert list(table["counted"]) == [True, True, True, False]


def test_savings_compare_with_whole_prompts_through_all_layers(run):
    from sts.stages.forecast import domain_groups, shift_groups

    saved = pages_cost.savings(run)
    prompts = [prompt for group in shift_groups(run) for prompt in (*group.base, *group.icl)]
    assert saved.loc["shifted dimensions", "whole_tokens"] == sum(len(prompt.ids) for prompt in prompts)
    behind = [prompt for own in domain_groups(run).values() for group in own for prompt in (*group.base, *group.icl)]
    assert saved.loc["domains", "whole_tokens"] == sum(len(prompt.ids) for prompt in behind)
    assert saved.loc["together", "tokens"] == saved["tokens"].iloc[:2].sum() < saved.loc["together", "whole_tokens"]
    assert saved.loc["together", "depth"] == 0.5
    tokens = run.get("shift")["tokens"].item()
    assert saved.loc["shifted dimensions", "matrices_mb"] == pytest.approx(2 * tokens * 128 * 4 / 1e6)
    assert saved.loc["shifted dimensions", "sums_mb"] == pytest.approx((10 * 128 + 1) * 8 / 1e6)
    assert "leaving early a factor of 2.00" in pages_cost.savings_sentence(saved)


def test_the_forecasts_sums_are_counted_from_the_stored_tensors(run):
    for name in ("shift", "domain_stats"):
        tensors, own = run.get(name), run.get("forecast_sums")[name]
        groups = {field.rpartition("/")[0] for field in tensors}  # "" for shift, the domains for domain_stats
        assert own["tokens"] == sum(int(tensors[f"{group}/tokens".lstrip("/")]) for group in groups)
        assert own["latents"] == 128  # the smoke run's SAE
        assert own["bytes"] == sum(len(tensor.numpy().tobytes()) for tensor in tensors.values())


def test_a_result_recorded_without_its_data_counts_as_computed(tmp_path, monkeypatch):
    from sts.run.recorded import record

    source = sts.open_run("smoke", results=tmp_path / "source", seeds=[])
    source.get("sae")
    record(source, tmp_path / "recorded")
    assert not list((tmp_path / "recorded").glob("sae-*/*.safetensors"))  # its weights stay behind
    other = sts.open_run("smoke", results=tmp_path / "other", seeds=[])
    monkeypatch.setattr(other.store, "recorded", (tmp_path / "recorded",))
    assert other.computed("sae") == other.provenance("sae") and other.computed("sae")["key"] == source.key("sae")
    assert "sae" in other.used and not list((tmp_path / "other").glob("**/sae-*"))  # shown, and not computed again
    tokens = other.computed("forecast_tokens")  # not recorded, so it is computed
    assert tokens["key"] == source.key("forecast_tokens") and other.stored("forecast_tokens")
    with pytest.raises(StsError, match="recorded without its weights. To train it here: sts stage sae --again"):
        other.get("shift")
    other.compute("sae")
    assert sts.open_run("smoke", results=tmp_path / "other", seeds=[]).get("shift")["tokens"] > 0


def test_a_stage_stored_without_its_work_is_named_and_nothing_stops(run, monkeypatch):
    whole = run.provenance

    def without(name):
        record = whole(name)
        return {key: value for key, value in record.items() if key != "work"} if name == "domain_stats" else record

    monkeypatch.setattr(run, "provenance", without)
    table = pages_cost.measured(run)
    assert math.isnan(table.loc[0, "passes"]) and table.loc[0, "seconds"] > 0
    assert pages_cost.cost_verdict(table) == "not counted"
    assert pages_cost.cost_table(table).loc[0, "token-forward-passes"] == "not recorded"
    assert "**Not recorded:** the work of domain_stats." in pages_cost.cost_notes(run, table)
    varied = cost.sensitivity(SMALL, ASSUMED, architectures=[TOY])
    assert "**not counted**" in pages_cost.cost_summary(run, table, varied, 2.0)
    assert "cannot be told" in pages_cost.savings_sentence(pages_cost.savings(run))
    assert "is not recorded" in pages_cost.sae_cost_sentence(run, table)
    pages_cost.savings_table(pages_cost.savings(run))
    plots_cost.measured_costs(table)


def test_the_saes_cost_is_counted_in_forecasts(run):
    table = pages_cost.measured(run)
    tokens = json.loads((run.sae_folder / "training.json").read_text())["tokens"]
    text = pages_cost.sae_cost_sentence(run, table)
    assert f"{tokens / 2:,.0f} token-forward-passes" in text
    assert f"as much as {tokens / 2 / table.loc[0, 'passes']:.1f} forecasts" in text


def test_the_runs_own_model_is_described_without_loading_it(run):
    shape = pages_plan.run_architecture(sts.open_run(run.settings, results=run.results))
    assert (shape.layers, shape.width, shape.layers_read, shape.sae_latents) == (2, 64, 1, 128)
    table = pages_plan.architecture_table([shape], keys=10)
    assert table.loc[0, "all layers"] == pages_plan.si(shape.flops(10))


@pytest.mark.parametrize(("value", "text"), [(14_482_932_000, "14.5 G"), (999_600, "1 M"), (132_000, "132 k"), (7, "7"),
                                             (2.483e18, "2.48 E")])
def test_large_counts_have_three_digits_and_a_prefix(value, text):
    assert pages_plan.si(value) == text


# --- recorded benchmarks: the numbers of this one are made up ---

MADE_UP = {
    "machine": {"processor": "Made-up processor", "cores": 2, "device": "CPU, 2 threads", "memory_gb": 8},
    "versions": {"torch": "0.0"}, "commit": "abc", "finished": "2026-01-02T03:04:05Z", "model": "made-up", "layer": 3,
    "latents": 64, "seed": 0,
    "rows": [
        {"workload": "text", "route": "ours", "label": "this book", "tokens": 100, "seconds": [2.0, 1.0, 4.0],
         "tokens_per_second": 50.0, "peak_memory_mb": None, "latents": 64, "note": ""},
        {"workload": "memory", "route": "ours", "label": "this book", "tokens": 500, "seconds": [3.0],
         "tokens_per_second": 166.7, "peak_memory_mb": 12.5, "latents": 64, "note": "random SAE"}],
    "ratios": [
        {"what": "ours / other", "value": 1.1, "low": 1.0, "high": 1.2, "bound": "at most", "required": 1.15,
         "held": True},
        {"what": "other / ours", "value": 1.2, "low": 1.1, "high": 1.3, "bound": "at least", "required": 1.5,
         "held": False}]}


def recorded(folder, content=None, kind="cpu"):
    (folder / f"{kind}.json").write_text(json.dumps(MADE_UP if content is None else content), encoding="utf-8")
    return pages_speed.read_benchmark(kind, folder)


def test_a_benchmark_is_shown_as_recorded(tmp_path):
    one = recorded(tmp_path)
    text = pages_speed.benchmark_sentence("cpu", one)
    assert "Made-up processor, 2 cores" in text and "1 of 2 requirements were held" in text and "2026-01-02" in text
    tables = pages_speed.speed_tables(one)
    assert list(tables) == ["Every token of a text", "Memory with a wide SAE"]
    by_text, by_memory = (table.loc[0] for table in tables.values())
    assert by_text["seconds"] == "2.00 (1.00 to 4.00, n = 3)" and by_memory["peak memory (MB)"] == "12"
    # A column with nothing in it is left out: memory was not measured with the text, time means nothing for memory.
    assert list(by_text.index) == ["route", "tokens", "latents", "seconds", "tokens a second"]
    assert list(by_memory.index) == ["route", "tokens", "latents", "peak memory (MB)", "note"]
    assert list(pages_speed.requirement_table(one)["held"]) == ["yes", "no"]
    assert "TFLOP" not in text
    shaped = {**MADE_UP, "shapes": [{"shape": "made-up", "tflops": 12.34, "share_of_peak": 0.5}]}
    text = pages_speed.benchmark_sentence("cpu", recorded(tmp_path, shaped))
    assert "made-up: 12.3 TFLOP/s, 50% of the dense bf16 peak." in text
    figure = plots_cost.speed(recorded(tmp_path, {**MADE_UP, "rows": [
        *MADE_UP["rows"], {**MADE_UP["rows"][0], "workload": "precision"}]}))
    assert [axis.patches[0].get_width() for axis in figure.axes] == [50.0, 12.5]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "."][0]
    assert sorted(points.get_xdata()) == [25.0, 50.0, 100.0]


@pytest.mark.parametrize(("ratio", "said"), [(0.99, "adds nothing to that: 6.50%"), (1.4, "adds to that: 6.50%")])
def test_rounding_is_said_with_its_numbers(tmp_path, ratio, said):
    distance = "sum over latents of |difference from float32| / sum"
    rows = [{**MADE_UP["rows"][1], "workload": "precision", "route": route, "note": f"{distance}: {value}"}
            for route, value in (("float32", "0.00%"), ("whole", "7.25%"), ("ours", "6.50%"))]
    ratios = [{**MADE_UP["ratios"][0], "what": "distance from float32, cache reused / whole prompts", "value": ratio}]
    text = pages_speed.precision_sentence(recorded(tmp_path, {**MADE_UP, "rows": rows, "ratios": ratios}))
    assert "are 7.25% away" in text and said in text and f"{ratio:.2f} times" in text
    assert pages_speed.precision_sentence(recorded(tmp_path)) == ""


def test_a_missing_benchmark_is_one_sentence(tmp_path):
    assert pages_speed.read_benchmark("gpu", tmp_path) is None
    text = pages_speed.benchmark_sentence("gpu", None)
    assert "No GPU has been measured yet" in text and "make bench" in text


@pytest.mark.parametrize(("change", "named"), [
    ({"rows": []}, "rows"),
    ({"machine": {"processor": "x"}}, "machine.cores"),
    ({"rows": [{**MADE_UP["rows"][0], "seconds": []}]}, "rows.0.seconds"),
    ({"ratios": [{**MADE_UP["ratios"][0], "bound": "about"}]}, "ratios.0.bound")])
def test_a_damaged_benchmark_names_its_field(tmp_path, change, named):
    with pytest.raises(StsError, match=rf"cpu\.json is not a benchmark \({named}: "):
        recorded(tmp_path, {**MADE_UP, **change})


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_file_that_is_no_benchmark_is_refused(tmp_path, text):
    (tmp_path / "cpu.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StsError, match="make bench"):
        pages_speed.read_benchmark("cpu", tmp_path)


# --- figures ---

def test_bars_show_the_costs_and_hatch_what_is_not_counted():
    figure = plots_cost.measured_costs(costs())
    assert [[bar.get_width() for bar in axis.patches] for axis in figure.axes] == [[10, 20, 30, 5], [100, 150, 250, 6]]
    assert [bool(bar.get_hatch()) for bar in figure.axes[0].patches] == [False, False, False, True]


def test_every_figure_fits_a_phone_and_is_closed(tmp_path):
    import matplotlib.pyplot as plt

    varied = cost.sensitivity(cost.Settings(), cost.Assumptions())
    planned = cost.plan(cost.Settings(), cost.Assumptions())
    figures = [plots_cost.measured_costs(costs()), plots_cost.planned_costs(planned), plots_cost.sensitivity(varied),
               plots_cost.speed(recorded(tmp_path))]
    assert all(figure.get_figwidth() <= 7.5 for figure in figures)
    assert plt.get_fignums() == []
