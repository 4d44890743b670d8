"""Adapters of random weights on the tiny models, made by PEFT itself, with what peftkit writes beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbones.load import base_identity, load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.files import write_json


@pytest.fixture(autouse=True)
def proven_here(proving_here: None) -> None:
    """No merge of these tests starts a process; `test_proof` asks for one by itself."""


PROMPT = torch.tensor([[5, 17, 300, 42, 7, 99]])


@pytest.fixture(scope="session")
def make_peft(tiny_llama: Path) -> Callable[..., Path]:
    """Writes an adapter of any PEFT configuration, all its trainable numbers moved by `amount` times a normal value."""

    def make(
        folder: Path,
        config: Any,
        *,
        seed: int = 1,
        base: Path = tiny_llama,
        head: Head = LANGUAGE_HEAD,
        identity: bool = True,
        amount: float = 0.1,
    ) -> Path:
        from peft import get_peft_model

        torch.manual_seed(seed)
        backbone = load_backbone(BackboneSpec(name=str(base), dtype="float32"), head)
        if identity:
            write_json(folder / "base.json", base_identity(backbone))
        model = get_peft_model(backbone.model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += amount * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        write_json(folder / "head.json", asdict(head))
        return folder

    return make


@pytest.fixture(scope="session")
def make_lora(make_peft: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a LoRA adapter of random B and A."""

    def make(folder: Path, *, seed: int = 1, rank: int = 4, base: Path | None = None, **settings: Any) -> Path:
        from peft import LoraConfig

        beside = {key: settings.pop(key) for key in ("head", "identity", "amount") if key in settings}
        usual = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 2 * rank}
        config = LoraConfig(r=rank, **{**usual, **settings})
        return make_peft(folder, config, seed=seed, **beside, **({"base": base} if base else {}))

    return make


@pytest.fixture(scope="session")
def bare_model(tiny_llama: Path) -> Any:
    """The tiny causal model alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def loaded(tiny_llama: Path) -> Callable[..., Any]:
    """The tiny causal model with adapters on it, as plain PEFT reads them; the first is active."""

    def load(first: Path, *others: Path) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, first, adapter_name="0")
        for number, other in enumerate(others, 1):
            model.load_adapter(other, adapter_name=str(number))
        return model.eval()

    return load


@torch.inference_mode()
def answers(model: Any) -> torch.Tensor:
    """Logits of a fixed prompt."""
    found: torch.Tensor = model(PROMPT).logits
    return found


@pytest.fixture(scope="session")
def ask() -> Callable[[Any], torch.Tensor]:
    """Logits of a fixed prompt."""
    return answers


@pytest.fixture(scope="session")
def deltas(loaded: Callable[..., Any]) -> Callable[[Path], dict[str, torch.Tensor]]:
    """What PEFT itself says a LoRA adds to each weight."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return peft_deltas(loaded(folder), "0")

    return read


def peft_deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The delta of every layer that an adapter of a `PeftModel` changes, by the layer's path in the base."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def small_tokenizer() -> Any:
    """A byte-level tokenizer of few words that splits like SmolLM's: quick to write a thousand times."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lead = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=lead, initial_alphabet=alphabet, show_progress=False)
    text = "What is the capital of France? Name three colours, and say hello to the small miracle of timing and warmth."
    words.train_from_iterator([text] * 3, trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), lead, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = CHATML
    return tokenizer


def write_tiny(folder: Path, family: str, tokenizer: Any, **settings: Any) -> Path:
    """A causal model of random weights, its norms and biases moved from where they start."""
    import transformers

    text = "TextConfig" if family == "Gemma3" else "Config"
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    usual |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    usual |= {"tie_word_embeddings": True, "vocab_size": len(tokenizer)}
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, family + text)(**usual | ids | settings)
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Path]:
    """Writes a causal model of any family."""
    return write_tiny


@pytest.fixture(scope="session")
def small_llama(small_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of few words."""
    return write_tiny(tmp_path_factory.mktemp("models") / "small-llama", "Llama", small_tokenizer)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's: it writes BOS, which the tokenizer adds as well, and puts a system prompt into the first user's turn."""


@pytest.fixture(scope="session")
def make_sentencepiece() -> Callable[..., Any]:
    """Makes a tokenizer of SentencePiece's kind, as Gemma's (`space_first=False`), or Llama 2's and Phi 3's."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "What is the capital of France? The sea, the sky and three colours of a rainbow: good morning, hello. "
    sample = Tokenizer(models.BPE())
    sample.normalizer = normalizers.Replace(" ", "\u2581")
    sample.train_from_iterator([text] * 3, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    trained = json.loads(sample.to_str())["model"]
    lead = ["<pad>", "</s>", "<s>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = [*lead, *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]

    def make(*, space_first: bool, template: str | None = GEMMA_TEMPLATE) -> Any:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepend = [{"type": "Prepend", "prepend": "\u2581"}] if space_first else []
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        content = json.loads(sample.to_str()) | {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "added_tokens": [{"id": index, "content": word, **added} for index, word in enumerate(lead)],
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": trained
            | {
                "vocab": {word: index for index, word in enumerate(words)},
                "unk_token": "<unk>",
                "byte_fallback": True,
                "fuse_unk": True,
            },
        }
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)
        tokenizer.chat_template = template
        return tokenizer

    return make
