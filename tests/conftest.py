"""Tiny models with real tokenizers, built once: two layers of random weights, quick enough for every contract test."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from peftkit.recipe import Recipe, build_recipe

REVIEWS = [
    ("a moving and beautiful film", "good"),
    ("dull, dull, dull from the first scene on", "bad"),
    ("the cast is wonderful", "good"),
    ("I walked out", "bad"),
    ("a small miracle of timing and warmth, and the ending earns its tears", "good"),
    ("an awful script that wastes a good cast", "bad"),
    ("splendid", "good"),
    ("not worth the ticket", "bad"),
]
TALKS = [
    ("Hi", "Hello! How can I help you today?"),
    ("What is 2+2?", "4"),
    ("Name a colour.", "Blue is a colour."),
    ("Say something long, please.", "This answer goes on for a while so that the lengths differ a good deal."),
    ("Who wrote Hamlet?", "William Shakespeare."),
    ("Bye", "Goodbye!"),
    ("What do bees make?", "Bees make honey."),
    ("Is water wet?", "That depends on whom you ask."),
]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of two layers with grouped-query attention and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from peftkit.backbones import local_path

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(local_path("smollm2-135m"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two layers with MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from peftkit.backbones import local_path

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(local_path("minilm-l6"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight labelled sentences as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in REVIEWS))
    return path


@pytest.fixture(scope="session")
def talks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations of unequal lengths as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in TALKS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def proving_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges are proven by the same code in this process: a fresh one takes eight seconds to import torch and all."""
    from peftkit.deploy import merge
    from peftkit.deploy.verify import examine

    monkeypatch.setattr(merge, "prove", examine)


@pytest.fixture
def classify_recipe(tiny_bert: Path, reviews_file: Path) -> Any:
    """Builds a recipe for the tiny encoder; overrides as on the command line."""

    def build(*overrides: str, method: Any = "lora") -> Recipe:
        source = str(reviews_file)
        content = {
            "backbone": {"name": str(tiny_bert), "dtype": "float32"},
            "method": method,
            "task": "classify",
            "data": {"train": source, "validation": source, "test": source},
        }
        return build_recipe(content, overrides)

    return build


@pytest.fixture
def chat_recipe(tiny_llama: Path, talks_file: Path) -> Any:
    """Builds a recipe for the tiny causal model; overrides as on the command line."""

    def build(*overrides: str, method: Any = "lora") -> Recipe:
        source = str(talks_file)
        content = {
            "backbone": {"name": str(tiny_llama), "dtype": "float32"},
            "method": method,
            "task": "chat",
            "data": {"train": source, "validation": source, "test": source},
        }
        return build_recipe(content, overrides)

    return build
