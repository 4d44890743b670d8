"""Models by name and dimensions: which architecture they are, and that it comes out in the size that is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from families import config_of, spelled

from peftkit.backbones.load import build_skeleton
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.errors import InputError

SMALL = {
    "hidden_size": 64,
    "num_layers": 5,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama"),
        ("Qwen/Qwen2.5-0.5B", "qwen2"),
        ("Qwen/Qwen1.5-0.5B", "qwen2"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("google/gemma-2b", "gemma"),
        ("google/gemma-2-2b-it", "gemma2"),
        ("google/gemma-3-1b-it", "gemma3_text"),
        ("microsoft/phi-2", "phi"),
        ("microsoft/Phi-3.5-mini-instruct", "phi3"),
        ("microsoft/phi-4", "phi3"),
        ("mistralai/Mistral-7B-v0.1", "mistral"),
        ("EleutherAI/pythia-410m", "gpt_neox"),
        ("distilbert/distilgpt2", "gpt2"),
        ("facebook/opt-350m", "opt"),
        ("someone/adopted-1b", None),
        ("HuggingFaceTB/SmolLM2-135M", None),
    ],
)
def test_a_name_spells_its_architecture(name: str, expected: str | None) -> None:
    assert spelled(name) == expected


@pytest.mark.parametrize("model", ["x/llama-tiny", "x/qwen2-tiny", "x/gpt2-tiny", "x/opt-tiny", "x/gemma-3-tiny"])
def test_dimensions_reach_every_architecture_by_its_own_words(model: str) -> None:
    config = config_of(model, SMALL)
    skeleton = build_skeleton(config, LANGUAGE_HEAD)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 5, 100)
    # in one order or the other a weight of the feed-forward part has the intermediate and the hidden size
    assert {(96, 64), (64, 96)} & {tuple(parameter.shape) for parameter in skeleton.parameters()}


def test_a_name_that_says_nothing_is_told_by_modules_and_by_the_count() -> None:
    def count(config: Any) -> int:
        return sum(parameter.numel() for parameter in build_skeleton(config, LANGUAGE_HEAD).parameters())

    # queries, keys and values of Qwen2 have biases, those of Llama none
    biases = SMALL["num_layers"] * (64 + 32 + 32)
    llama = count(config_of("x/llama-tiny", SMALL))
    told = config_of("someone/else", SMALL | {"num_params": llama + biases}, ["q_proj"])
    assert told.model_type == "qwen2"
    assert config_of("someone/else", SMALL | {"num_params": llama}, ["q_proj"]).model_type == "llama"
    assert config_of("someone/else", SMALL, ["query_key_value"]).model_type == "gpt_neox"


def test_a_kept_configuration_takes_other_dimensions_with_as_many_entries_in_its_lists() -> None:
    config = config_of("google/gemma-3-1b-it", {"num_layers": 7})
    assert len(config.layer_types) == config.num_hidden_layers == 7
    assert config.hidden_size == 1152  # as published


def test_modules_that_no_architecture_has_are_named() -> None:
    with pytest.raises(InputError, match="no architecture that is known here has the modules wq, wv"):
        config_of("someone/else", SMALL, ["wq", "wv"])
