"""Language models: where they come from, and where their residual stream is.

A model is named by a hub id (`meta-llama/Meta-Llama-3-8B-Instruct`), a local folder, or the name of one that a Python
package carries (`packaged.PACKAGED`). All families keep their decoder layers in `model.model.layers`.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sts.errors import StsError

_SLIDING = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"]}
#: Families known to work, and what a tiny random model of each, `random-<family>`, is like. A new family is one row.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {"model_type": "gemma2", **_SLIDING},
    "gemma3": {"model_type": "gemma3_text", **_SLIDING},
}
#: Families whose random model is a base model: no chat template, BOS before plain text.
BASE = ("gemma3",)
RANDOM = {f"random-{family}": family for family in FAMILIES}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model with its tokenizer."""

    name: str
    model: Any  # a PreTrainedModel, of which a type checker knows too little
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        return int(self.model.config.get_text_config().max_position_embeddings)


def sha256_of_file(*paths: Path) -> str:
    """Hex SHA-256 of a file's bytes, or of several files' one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # adds to it
    return digest.hexdigest()


def resolve_model(name: str, revision: str, cache: Path, convert: bool = True) -> tuple[str, str]:
    """What `from_pretrained` takes for a packaged name, local folder or hub id, and what identifies its weights: a
    digest of local files, or `hub:<id>@<revision>`; `StsError` for what is none of these. A packaged model is converted
    into the folder `cache` unless its identity alone is wanted (`convert`)."""
    from sts.engine import packaged  # it knows this module

    if name in RANDOM:
        name = str(packaged.save_random_model(RANDOM[name], cache / name))
    if name in packaged.PACKAGED:
        digest = sha256_of_file(*packaged.packaged_files(name))
        folder = cache / f"{name}-{digest[:12]}"
        if convert and not (folder / "config.json").is_file():
            packaged.convert(name, folder)
        return str(folder), f"gguf:{digest[:16]}"
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
        raise StsError(f"Model {name!r} is not known. Valid: {', '.join([*packaged.PACKAGED, *RANDOM])}, a local "
                       "folder with config.json and *.safetensors, or a hub id such as 'Qwen/Qwen2.5-7B-Instruct'.")
    return name, f"hub:{name}@{revision or 'main'}"


def load_model(name: str, *, revision: str = "", dtype: str = "float32", device: str = "cpu",
               cache: Path = Path("results/models")) -> LanguageModel:
    """Load a causal language model and its tokenizer for inference (see `resolve_model`); `StsError` where it is
    unknown, damaged or out of reach, or its tokenizer has no offsets."""
    location, identity = resolve_model(name, revision, cache)
    tokenizer, model = _read(name, location, identity, revision,
                             partial(AutoModelForCausalLM.from_pretrained, dtype=dtype))
    return LanguageModel(name, model.eval().requires_grad_(False).to(device), tokenizer)


def without_weights(name: str, *, revision: str = "", cache: Path = Path("results/models")) -> tuple[Any, Any]:
    """A model's tokenizer and configuration, of which no weights are read; `StsError` as in `load_model`."""
    from sts.engine import packaged  # it knows this module

    location, identity = resolve_model(name, revision, cache, convert=False)
    if name in packaged.PACKAGED and not Path(location).is_dir():
        with packaged.gguf(name, cache) as path:
            return _read(name, str(path.parent), identity, "", AutoConfig.from_pretrained, gguf_file=path.name)
    return _read(name, location, identity, revision, AutoConfig.from_pretrained)


def _read(name: str, location: str, identity: str, revision: str, more: Callable[..., Any], **options) -> tuple:
    """A model's tokenizer, and what `more` reads from the same place."""
    from sts.engine.packaged import PACKAGED

    on_hub = identity.startswith("hub:")
    options |= {"revision": revision} if on_hub and revision else {}
    try:
        tokenizer, found = AutoTokenizer.from_pretrained(location, **options), more(location, **options)
    except (OSError, ValueError, SafetensorError) as error:  # no such model, no tokenizer, a truncated weights file
        hint = f" from the Hugging Face hub. What works without a network: a local folder, or {', '.join(PACKAGED)}"
        raise StsError(f"Model {name!r} could not be read{hint if on_hub else ''}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise StsError(f"Model {name!r}: its tokenizer ({type(tokenizer).__name__}) cannot say which characters a "
                       "token stands for. Use a model with a tokenizer.json, a \"fast\" tokenizer.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, found


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for one-line messages."""
    return (str(error).strip() or type(error).__name__).replace(":\n\t", " ").splitlines()[0]


def bf16_is_fast(device: str) -> bool:
    """Whether bf16 matrix products run on hardware here rather than emulated."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN emulates it on AVX-512 processors without the instructions.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return bool(supported and supported())


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's decoder layers in order; `StsError` where they are elsewhere."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise StsError(f"{type(model).__name__} does not keep its decoder layers in `.model.layers`; families known to "
                       f"work: {', '.join(FAMILIES)}.")
    return layers


def check_layer(model: Any, layer: int) -> None:
    """Raise `StsError` unless `layer` (zero-based) names a decoder layer of the model."""
    count = len(decoder_layers(model))
    if not 0 <= layer < count:
        raise StsError(f"Layer {layer} was asked for; the model has layers 0 to {count - 1}.")


def resid_post(output: torch.Tensor | tuple) -> torch.Tensor:
    """The residual stream after a decoder layer, batch x positions x width, from that layer's output."""
    # transformers 5 returns a bare tensor, of which [0] would silently be the first row of the batch.
    return output if isinstance(output, torch.Tensor) else output[0]


class _Stop(Exception):
    """Raised inside the forward pass by our hook to leave it at the layer we need."""


def residual_stream(model: Any, layers: int | Sequence[int], input_ids_BP: torch.Tensor, **inputs) -> torch.Tensor:
    """Run the model up to a layer (zero-based, inclusive): the residual stream after it, batch x positions x width; of
    several layers side by side.

    Nothing after the last of them is computed: a forward hook raises there, and the exception ends the pass. `inputs`
    go to the decoder."""
    layers, found = (layers,) if isinstance(layers, int) else layers, {}

    def keep(layer: int):
        def hook(module, args, output) -> None:
            found[layer] = resid_post(output)
            if layer == max(layers):
                raise _Stop
        return hook

    handles = [decoder_layers(model)[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        with torch.inference_mode():
            model.get_decoder()(input_ids=input_ids_BP, **inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([found[layer] for layer in layers], dim=-1)


@contextmanager
def logits_at(model: Any, tokens_T: torch.Tensor) -> Iterator[None]:
    """A context in which the model computes logits, 1 x T x vocabulary, at these of a batch's flattened positions."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].flatten(0, 1)[tokens_T][None],))
    try:
        yield
    finally:
        handle.remove()
