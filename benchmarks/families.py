"""The transformers configuration of a model that is known by its name and its dimensions alone.

What the dimensions leave out (rope, norm, activation, biases) is the architecture's own default. Which architecture it
is, the name says; where it does not, the modules that adapters sit on and the number of parameters do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftkit.backbones.configs import bundled_config
from peftkit.backbones.load import build_skeleton
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.errors import InputError

DIMENSIONS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Dimensions of a model -> what most configurations call them."""
OTHER_NAMES = {
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_key_value_heads": ("num_kv_heads",),
}
"""And what some call them."""
NAMED_OTHERWISE = {
    "qwen1.5": "qwen2",
    "qwen": "qwen2",
    "phi-4": "phi3",
    "pythia": "gpt_neox",
    "dolly-v2": "gpt_neox",
    "zephyr": "mistral",
    "ministral": "mistral",
    "bloomz": "bloom",
}
"""Models whose name does not hold their architecture's."""
COMMON = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gpt_neox", "gpt2")
"""Architectures that are tried where the name leads nowhere, the most common first."""
SHORT = 3
"""Letters of an architecture's name up to which it counts only as a word of its own: `opt`, `mpt`."""


def config_of(model: str, dimensions: Mapping[str, Any], targets: Sequence[str] = ()) -> Any:
    """The configuration of a model: the one kept with peftkit where there is one, else an architecture's own.

    Args:
        model: such as `Qwen/Qwen2.5-1.5B-Instruct`.
        dimensions: by the names in `DIMENSIONS`; `num_params` and `model_type` count where they are given.
        targets: last words of the modules that adapters sit on.

    Raises:
        InputError: no architecture has these modules, or the dimensions make no model.
    """
    bundled = bundled_config(model)
    if bundled is not None:
        with quietly():
            known = AutoConfig.from_pretrained(str(bundled))
            return _with_dimensions(known.model_type, dimensions, known.to_dict())
    named = dimensions.get("model_type")
    named = named if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else spelled(model)
    counted = dimensions.get("num_params")
    fitting: list[Any] = []
    for family in dict.fromkeys(([named] if named else []) + [*COMMON]):
        config = _with_dimensions(family, dimensions, {})
        skeleton = build_skeleton(config, LANGUAGE_HEAD)
        if _has(skeleton, targets):
            if counted is None or sum(p.numel() for p in skeleton.parameters()) == counted:
                return config
            fitting.append(config)
    if not fitting:
        raise InputError(f"{model}: no architecture that is known here has the modules {', '.join(targets)}.")
    return fitting[0]


def spelled(model: str) -> str | None:
    """The model type that a name spells, such as `gemma2` in `google/gemma-2-2b-it`; None where it spells none."""
    name = model.rsplit("/", 1)[-1].lower()
    known = [(word, kind) for word, kind in NAMED_OTHERWISE.items() if _holds(name, word)]
    known += [(kind, kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _holds(name, kind)]
    if not known:
        return None
    _, kind = max(known, key=lambda pair: len(pair[0]))
    text = f"{kind}_text"  # of a model that sees as well, the part that reads
    return text if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else kind


def _holds(name: str, word: str) -> bool:
    """Whether a name has a word in it, whatever stands between; `gemma2` is not in `gemma-2b`."""
    parts = re.findall(r"[a-z]+|\d+", word)
    before = r"(?<![a-z\d])" if len(word) <= SHORT else ""
    return re.search(before + r"[-_.]?".join(parts) + r"(?![a-z\d])", name) is not None


def _with_dimensions(family: str, dimensions: Mapping[str, Any], base: dict[str, Any]) -> Any:
    """An architecture's configuration with these dimensions, and what `base` says of the rest."""
    config_class = CONFIG_MAPPING[family]
    own = config_class().to_dict()
    given = {DIMENSIONS[key]: value for key, value in dimensions.items() if key in DIMENSIONS and value is not None}
    if not base and "num_key_value_heads" not in given and "num_attention_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    renamed = {_name_in(config_class, own, key): value for key, value in given.items()}
    if not base:
        renamed["pad_token_id"] = None  # it belongs to a vocabulary of the default's size
    layers = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if renamed.get(layers, base.get(layers)) != base.get(layers):
        # lists of a value for each layer are made anew
        base = {key: v for key, v in base.items() if not (isinstance(v, list) and len(v) == base[layers])}
    try:
        with quietly():
            return config_class.from_dict(base | renamed)
    except (TypeError, ValueError) as fault:
        raise InputError(f"these dimensions make no {family} model: {fault}") from fault


def _name_in(config_class: Any, own: Mapping[str, Any], name: str) -> str:
    """What a configuration class calls a dimension."""
    mapped: str = config_class.attribute_map.get(name, name)
    if mapped in own:
        return mapped
    return next((other for other in OTHER_NAMES.get(name, ()) if other in own), name)


def _has(skeleton: torch.nn.Module, targets: Sequence[str]) -> bool:
    """Whether a model has a module for each of the words."""
    leaves = {path.rsplit(".", 1)[-1] for path, _ in skeleton.named_modules()}
    return all(target.rsplit(".", 1)[-1] in leaves for target in targets)
