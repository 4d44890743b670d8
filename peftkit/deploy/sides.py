"""The two sides of a comparison: a run, an adapter or a model, and the model that each of them is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import (
    DTYPES,
    Backbone,
    dims_of,
    load_backbone,
    load_tokenizer,
    read_config,
)
from peftkit.backbones.packaged import PACKAGED
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.deploy.adapter import Source, attach, check_base, read_source
from peftkit.deploy.rounding import dequantize, to_float32
from peftkit.errors import InputError
from peftkit.folder import HEAD_NAME, RECIPE_NAME
from peftkit.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Side:
    """What a name on the command line stands for.

    Attributes:
        source: the adapter; None for a whole model.
        spec: the base of the adapter, or the model, in the numbers it is held in.
        recipe: of the run; None for what comes from elsewhere.
    """

    name: str
    source: Source | None
    spec: BackboneSpec
    head: Head
    recipe: Recipe | None

    def dims(self) -> Dims:
        """The dimensions of its base."""
        return dims_of(self.spec, self.head)

    def tokenizer(self) -> Any:
        """Its own tokenizer where it brings one along, else that of its base."""
        adapter = None if self.source is None else self.source.adapter
        if adapter is not None and (adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(self.spec, adapter)
        return load_tokenizer(self.spec)


def open_side(reference: str | Path, base: str | None = None) -> Side:
    """What a run's folder, an adapter, a model folder, a packaged backbone or a hub id stands for.

    Args:
        base: the base of an adapter that doesn't know it, or whose base has moved.

    Raises:
        InputError: nothing of the kind.
    """
    path = Path(reference)
    if (path / "adapter_config.json").is_file() or (path / "adapter").is_dir():
        source = read_source(path, base)
        return Side(str(reference), source, source.spec, source.head, source.recipe)
    recipe = load_recipe(path / RECIPE_NAME) if (path / RECIPE_NAME).is_file() else None
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if not (folder / "config.json").is_file() and str(reference) not in PACKAGED and path.exists():
        raise InputError(f"{reference} is no run, no adapter and no model folder: it has no config.json.")
    name = str(folder) if folder.exists() else str(reference)
    spec = BackboneSpec(name=name)
    config = read_config(spec)
    spec = spec.model_copy(update={"dtype": dtype_name(config)})
    return Side(str(reference), None, spec, read_model_head(folder, config), recipe)


def dtype_name(config: Any) -> str:
    """What a model's weights are held in, by its configuration."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def read_model_head(folder: Path, config: Any) -> Head:
    """The head of a model folder: what is recorded beside it, or what its architecture's name says."""
    path = folder / HEAD_NAME
    if path.is_file():
        written = json.loads(path.read_text(encoding="utf-8"))
        return Head(written["kind"], tuple(written.get("labels") or ()), written.get("problem"))
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        return LANGUAGE_HEAD
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    problem: Any = config.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
    return Head("classification", () if problem == "regression" else labels, problem)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A side in memory, answering in float32.

    Attributes:
        base: the bare base as it was loaded; the model itself where there is no adapter.
        codes: what its quantized layers stand for, by module path.
    """

    model: Any
    backbone: Backbone
    recognised: str
    codes: dict[str, torch.Tensor]


def load_side(side: Side, *, onto_original: bool = False, before: Any = None) -> Loaded:
    """Load a side; its adapter computes over the base it was trained on.

    Args:
        onto_original: over a quantized base's original weights instead.
        before: called with the bare base and `codes`, before the adapter is put on it.

    Raises:
        BackboneError: the base is not the adapter's.
    """
    spec = side.spec.model_copy(update={"quantization": "none"}) if onto_original else side.spec
    backbone = load_backbone(spec, side.head)
    recognised = check_base(side.source, backbone) if side.source is not None else "itself"
    codes = dequantize(backbone.model) if spec.quantization != "none" else {}
    if before is not None:
        before(backbone.model, codes)
    if spec.quantization == "int8":  # its kernel rounds activations too, which no fold can copy
        backbone = with_weights(side.spec, side.head, codes)
    model = backbone.model if side.source is None else attach(side.source, backbone)
    return Loaded(to_float32(model).eval(), backbone, recognised, codes)


def with_weights(spec: BackboneSpec, head: Head, codes: dict[str, torch.Tensor]) -> Backbone:
    """The base without quantization, with the weights of `codes` put in place of its own."""
    backbone = load_backbone(spec.model_copy(update={"quantization": "none"}), head)
    for path, weight in codes.items():
        module = backbone.model.get_submodule(path)
        module.weight.data = weight if module.weight.shape == weight.shape else weight.T.contiguous()
    return backbone


def reload(folder: Path, head: Head, spec: BackboneSpec) -> tuple[Any, torch.dtype, list[str]]:
    """The model in `folder` as plain transformers loads it, the dtype of its weights, and what was missing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if head.kind == "language" else AutoModelForSequenceClassification
    attention = {} if spec.attention == "auto" else {"attn_implementation": spec.attention}
    with quietly():
        model, report = auto.from_pretrained(
            str(folder),
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=spec.remote_code,
            output_loading_info=True,
            **attention,
        )
    faults = [
        f"{len(report[kind])} tensors are {word} in the files, such as {sorted(map(str, report[kind]))[0]}"
        for kind, word in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unknown"),
            ("mismatched_keys", "misshapen"),
        )
        if report[kind]
    ]
    return model.eval(), model.dtype, faults
