"""Random models of a few layers with a byte tokenizer and a chat template: one of each family, made in a blink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALPHABET_SIZE = 258
COMMON: dict[str, Any] = {"vocab_size": ALPHABET_SIZE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
FAMILIES = ("bert", "t5", "llama", "qwen2", "gemma", "phi", "gpt2", "mixtral")
ENCODERS = ("bert", "t5")
"""Those that classify; the others write."""


def write_tiny(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    shard_size: str = "50GB",
    pairs: Sequence[tuple[str, str]] = (),
    **changes: Any,
) -> Path:
    """A random model of a family as an ordinary folder, with tokenizer and chat template.

    Args:
        pairs: as `byte_tokenizer` takes them.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    byte_tokenizer(end=family == "t5", pairs=pairs).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"vocab_size": ALPHABET_SIZE + len(pairs)}
    config = AutoConfig.for_model(family, **{**settings_of(family), **sizes, **changes})
    auto = AutoModel if family in ENCODERS else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def settings_of(family: str) -> dict[str, Any]:
    """The configuration of a family's tiny model."""
    if family == "t5":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.0}
        return {**COMMON, **sizes, "decoder_start_token_id": 0, "is_encoder_decoder": True}
    if family == "gpt2":
        return {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.15}
    if family == "bert":
        return {**COMMON, **{key: value for key, value in DECODER.items() if key != "num_key_value_heads"}}
    if family == "gemma":
        return {**COMMON, **DECODER, "head_dim": 16}
    if family == "mixtral":
        return {**COMMON, **DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    return {**COMMON, **DECODER}


def byte_tokenizer(*, end: bool = False, pairs: Sequence[tuple[str, str]] = ()) -> Any:
    """A tokenizer of bytes with a chat template.

    Args:
        end: it ends every text with its end token.
        pairs: letters that make a token of their own; llama.cpp takes no byte-pair vocabulary without any.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(alphabet) == ALPHABET_SIZE
    tokens = [*alphabet, *("".join(pair) for pair in pairs)]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(pairs)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if end:
        inner.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    return tokenizer
