"""The benchmarks' routes must do the same job, or their times could not be compared."""

import json

import pytest
import torch
from helpers import topk_sae

from benchmarks import routes
from benchmarks.__main__ import main
from benchmarks.measure import Ratio, Row, measured
from benchmarks.options import harness_own, ours, ten_option_requests
from benchmarks.routes import Setup
from benchmarks.shapes import SHAPES, random_model, shape_workload
from benchmarks.workloads import behind_long_demonstrations, texts


@pytest.fixture(scope="module")
def setup(lm_of):
    return Setup(lm_of("llama"), topk_sae(64), 0, 512)


@pytest.fixture(scope="module")
def proxy(tiny_models):
    from sae_lens.load_model import load_model

    return load_model("AutoModelForCausalLM", str(tiny_models["llama"]), device="cpu")


def test_every_route_over_texts_gives_the_same_sums(setup, proxy):
    prompts = texts(setup, 1_500)
    assert sum(len(prompt.ids) for prompt in prompts) >= 1_500
    wanted_L = routes.ours(setup, prompts)
    assert wanted_L.sum() > 0
    for found_L in (routes.sae_lens(setup, proxy, prompts, stop=True),
                    routes.sae_lens(setup, proxy, prompts, stop=False), routes.dense_append(setup, prompts)):
        torch.testing.assert_close(found_L, wanted_L, rtol=1e-4, atol=1e-4)


def test_naive_and_shared_demonstrations_give_the_same_change(setup):
    group = behind_long_demonstrations(setup, 5, demonstration_tokens=150)
    assert len(group.base) == 5 and group.icl[0].question[0] >= 300
    wanted_L = routes.ours_paired(setup, group)
    for full in (False, True):
        torch.testing.assert_close(routes.naive_paired(setup, group, full=full), wanted_L, rtol=1e-3, atol=1e-4)


def test_both_classes_score_the_same_ten_options(setup):
    requests = ten_option_requests(setup, 4)
    assert len(requests) == 40 and len({tuple(context) for _, context, _ in requests}) == 4
    wanted = harness_own(setup, requests, 10)
    assert ours(setup, requests, 8) == pytest.approx(wanted, abs=1e-4)
    assert len(set(wanted)) == 40


def test_the_truncated_decoder_is_the_model_up_to_the_layer(lm_of):
    lm = lm_of("llama")
    ids_BP = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = lm.model(ids_BP, output_hidden_states=True).hidden_states[1]
        found = routes.truncated_decoder(lm, 0)(input_ids=ids_BP).last_hidden_state
    torch.testing.assert_close(found, wanted)
    assert len(lm.model.model.layers) == 2 and not isinstance(lm.model.model.norm, torch.nn.Identity)


def test_peak_memory_is_what_a_call_touches():
    _, peak, _ = measured(lambda: torch.ones(30_000_000).sum())  # 120 MB in float32
    assert peak is None or 100 < peak < 200
    _, small, _ = measured(lambda: None)
    assert small is None or small < 30


def test_ratios_compare_the_median_with_the_requirement():
    ratio = Ratio("x", [1.0, 1.3, 1.1], "at most", 1.15).to_dict()
    assert (ratio["value"], ratio["low"], ratio["high"], ratio["held"]) == (1.1, 1.0, 1.3, True)
    assert not Ratio("x", [9.0], "at least", 10.0).to_dict()["held"]
    assert Row("text", "r", "l", 100, 8, seconds=[1.0, 4.0, 2.0]).to_dict()["tokens_per_second"] == 50


def test_flops_of_a_shape_are_those_of_its_layers(lm_of):
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES["tiny"]
    model = random_model(shape, "cpu", torch.float32).model
    model.set_attn_implementation("sdpa")
    linear = 0
    for layer in model.model.layers[:shape.layer + 1]:
        linear += sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear))
    assert shape.flops_per_token == 2 * (linear + shape.width * shape.latents)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.layers[0].mlp(torch.ones(1, 10, shape.width))
    assert counter.get_total_flops() == 10 * 2 * 3 * shape.width * shape.mlp_width


def test_the_shape_of_the_papers_model_has_its_published_size():
    shape = SHAPES["llama-3-8b"]
    linear = (shape.flops_per_token / 2 - shape.width * shape.latents) / (shape.layer + 1) * shape.layers
    embeddings = 2 * shape.vocabulary * shape.width
    assert linear + embeddings == pytest.approx(8.03e9, rel=0.001)


@pytest.mark.parametrize("compiled", [False])
def test_the_shape_benchmark_runs_without_a_gpu(compiled):
    rows, summary = shape_workload("tiny", "cpu", tokens=512, length=64, tokens_per_batch=256, repetitions=2,
                                   compiled=compiled)
    assert [len(row.seconds) for row in rows] == [2, 2]
    assert summary["tflops"] > 0 and summary["share_of_peak"] is None


def test_the_whole_benchmark_writes_what_the_book_reads(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["--run", "smoke", "--out", str(out), "--tokens", "400", "--questions", "3", "--demonstration-tokens",
                 "100", "--memory-tokens", "300", "--memory-latents", "256", "--other-tokens", "200", "--repetitions",
                 "1", "--shape", "tiny", "--shape-tokens", "256", "--option-questions", "2", "--workloads", "text",
                 "memory", "demonstrations", "options", "precision", "shape"]) == 0
    result = json.loads(out.read_text())
    assert {row["workload"] for row in result["rows"]} == {"text", "memory", "demonstrations", "options", "precision",
                                                           "shape"}
    assert all(row["tokens_per_second"] > 0 for row in result["rows"])
    assert len(result["ratios"]) >= 5 and result["shapes"][0]["shape"] == "tiny"
    assert "Wrote" in capsys.readouterr().out


def test_an_unknown_run_is_one_line(capsys):
    assert main(["--run", "nope"]) == 1
    assert "'nope' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "named"), [
    (["--out", "/proc/nope/x.json"], "cannot be written"),
    (["--workloads", "shape", "--shape", "llama-3-8b", "--out", "OUT"], "needs a GPU")])
def test_what_cannot_work_is_said_before_anything_is_measured(tmp_path, capsys, arguments, named):
    arguments = [str(tmp_path / "x.json") if one == "OUT" else one for one in arguments]
    assert main(["--run", "smoke", *arguments]) == 1
    assert named in capsys.readouterr().err


def test_numbers_below_one_are_refused(capsys):
    for name in ("--tokens", "--repetitions", "--questions", "--memory-latents"):
        with pytest.raises(SystemExit):
            main(["--run", "smoke", name, "0"])
        assert "at least 1" in capsys.readouterr().err
