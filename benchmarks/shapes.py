"""Throughput of models of a published shape with random weights, so that nothing needs to be downloaded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import Row, measured
from benchmarks.routes import latent_stats
from sts.data.prompts import Prompt
from sts.engine.extract import Masks
from sts.engine.models import LanguageModel, decoder_layers

#: Dense bf16 peak of an accelerator in TFLOP/s, without sparsity, by a part of its name (vendors' data sheets).
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder with an SAE: zero-based `layer`, `latents` wide, `k` active."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    layer: int
    latents: int
    k: int = 64

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions of a token up to the layer and in the SAE, attention scores left out."""
        head = self.width // self.heads
        attention = self.width * head * (self.heads + 2 * self.kv_heads) + self.width * self.width
        return 2.0 * ((self.layer + 1) * (attention + 3 * self.width * self.mlp_width) + self.width * self.latents)


SHAPES = {
    # The paper's first model, with the width of the SAE that its official code loads, at that SAE's layer.
    "llama-3-8b": Shape(32, 4096, 32, 8, 14336, 128_256, 25, 65_536),
    "tiny": Shape(4, 64, 4, 2, 128, 512, 2, 256, 8),
}


def random_model(shape: Shape, device: str, dtype: torch.dtype) -> LanguageModel:
    """A model of this shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return LanguageModel("random", model.eval().requires_grad_(False), None)


def random_sae(shape: Shape, device: str, dtype: str):
    """A TopK SAE of this shape with random weights."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=shape.width, d_sae=shape.latents, k=shape.k, device=device, dtype=dtype))
    return sae.eval().requires_grad_(False)


def compile_layers(model: torch.nn.Module) -> None:
    """`torch.compile` each decoder layer in place, one graph for all lengths.

    For measuring only. Behind a key-value cache the compiler makes a graph for every layer and gives up after eight,
    so the product does not compile.
    """
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def peak_flops(device: str) -> float | None:
    """The accelerator's bf16 peak in FLOP/s by its data sheet; None if it is not in `PEAKS` (or a CPU)."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * tera for part, tera in PEAKS.items() if part in name), None)


def shape_workload(name: str, device: str, *, tokens: int, length: int, tokens_per_batch: int, repetitions: int,
                   compiled: bool = False, report=lambda row: None) -> tuple[list[Row], dict]:
    """Statistics of random texts of equal length through a random model and SAE.

    Returns:
        (rows, {"shape", "flops_per_token", "tflops", "share_of_peak", "sae_dtype"}): achieved TFLOP/s over the whole
        job with the SAE in the faster precision, which is named; the share is None where the peak is not known.
    """
    shape = SHAPES[name]
    dtype = torch.bfloat16
    lm = random_model(shape, device, dtype)
    if compiled:
        compile_layers(lm.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocabulary, (max(1, tokens // length), length), generator=generator).tolist()
    prompts = [Prompt(tuple(row), (0, length)) for row in ids]
    rows, best, fastest = [], 0.0, ""
    for sae_dtype in ("float32", "bfloat16"):
        sae = random_sae(shape, device, sae_dtype)
        row = Row("shape", f"{name}_{sae_dtype}" + ("_compiled" if compiled else ""),
                  f"shape of {name}, model bfloat16, SAE {sae_dtype}" + (", compiled" if compiled else ""),
                  len(prompts) * (length - 1), shape.latents, note="random weights")
        for repetition in range(repetitions + 1):
            seconds, peak, _ = measured(lambda sae=sae: latent_stats(
                lm, sae, shape.layer, prompts, Masks(question_tokens_only=False, outlier_norm=0.0),
                tokens_per_batch=tokens_per_batch), device)
            if repetition:
                row.seconds.append(seconds)
                row.peak_memory_mb = max(row.peak_memory_mb or 0.0, peak or 0.0)
        report(row)
        rows.append(row)
        achieved = shape.flops_per_token * row.tokens / statistics.median(row.seconds)
        if achieved > best:
            best, fastest = achieved, sae_dtype
        del sae
    peak = peak_flops(device)
    return [replace(row) for row in rows], {
        "shape": name, "flops_per_token": shape.flops_per_token, "tflops": best / 1e12,
        "share_of_peak": best / peak if peak else None, "sae_dtype": fastest}
