"""Tiny models with random weights, saved to disk: for tests and the `smoke` run, where nothing is downloaded.

They have the real architectures (Llama, Qwen2, Gemma2 and Gemma3 with sliding windows) and a byte-level BPE tokenizer
trained on the spot, so that every code path runs; what they say means nothing. Gemma3's is a base model's: no chat
template, and BOS before plain text.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from sts.errors import one_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 8192}
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3")


def save_random_model(family: str, folder: Path, *, seed: int = 0, texts: list[str] | None = None,
                      **settings) -> Path:
    """Write a random model and its tokenizer to `folder`, unless it is there already.

    Args:
        family: one of `FAMILIES`.
        texts: text that the tokenizer is trained on; a few sentences of our own by default.
        settings: override fields of the model's configuration (sliding_window, num_hidden_layers, ...).

    Returns:
        `folder`.
    """
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen2Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
    if family not in classes:
        raise one_of("Model family", family, classes)
    if (folder / "config.json").is_file():
        return folder
    tokenizer = _tokenizer(texts or _SENTENCES, base=family == "gemma3")
    shape = {**_SHAPE, **settings}
    if family in ("gemma2", "gemma3"):
        # Sliding and full attention in turn, as in Gemma2; Gemma3 has five sliding layers for a full one.
        kinds = [("sliding_attention", "full_attention")[layer % 2] for layer in range(shape["num_hidden_layers"])]
        shape = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "layer_types": kinds, **shape}
    config = classes[family](vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                             eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers' default spread of 0.02 makes two layers nearly the identity; 0.1 makes them matter.
        config.initializer_range = 0.1
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _tokenizer(texts: list[str], *, base: bool):
    """A chat model's, or a base model's: no chat template, and BOS before plain text (as Gemma-3-270m's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
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
