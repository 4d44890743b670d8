"""An adapter on disk: what it is, what it was trained on, and the model it makes with its base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.deploy.shards import read_header
from peftkit.errors import BackboneError, InputError, MethodError
from peftkit.folder import BASE_NAME, HEAD_NAME, RECIPE_NAME
from peftkit.recipe import Recipe, load_recipe
from peftkit.record import RunRecord, read_record

if TYPE_CHECKING:
    import torch

    from peftkit.backbones.load import Backbone

WEIGHTS_NAME = "adapter_model.safetensors"
INSIDE = "base_model.model."
"""What PEFT puts before the base's own names."""
Onto = Literal["dequantized", "original", "requantized"]
"""Which weights of a quantized base a merged model has: those that its codes stand for, those in its files, or codes
again."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a merge starts from.

    Attributes:
        adapter: the PEFT adapter's folder.
        recipe: of the run that trained it; None for an adapter from elsewhere.
        record: of that run; None where it is missing.
        spec: the base, in the numbers that the adapter was trained on.
        head: what sits on the base.
        identity: the content of `base.json`: what the adapter was trained on; None where nobody wrote it down.
        config: the PEFT configuration.
    """

    adapter: Path
    recipe: Recipe | None
    record: RunRecord | None
    spec: BackboneSpec
    head: Head
    identity: dict[str, Any] | None
    config: Any

    @property
    def method(self) -> str:
        """`lora`, `ia3`, ...: the run's label, or the adapter's PEFT type."""
        return self.recipe.label if self.recipe else str(self.config.peft_type.value).lower().replace("_", "-")

    @property
    def trained_on(self) -> str:
        """The base in words, for messages."""
        name = (
            (self.identity or {}).get("name") or self.config.base_model_name_or_path or "a base that it does not name"
        )
        revision = (self.identity or {}).get("revision")
        return f"{name} at revision {revision}" if revision else str(name)


def read_source(path: Path, base: str | None = None, *, foldable: bool = True) -> Source:
    """Read a run folder or an adapter folder; `base` overrides the name of the base.

    Args:
        foldable: refuse a method that changes no weight.

    Raises:
        InputError: neither of the two, or files that cannot be understood.
        MethodError: there is nothing to fold: a whole model, or a method that changes no weight.
    """
    adapter, run = locate(path)
    config = read_config(adapter)
    if config.is_prompt_learning and foldable:
        raise unfoldable(adapter, config, "it puts trained virtual tokens before the input, and changes no weight")
    recipe = load_recipe(run / RECIPE_NAME) if run else None
    identity = read_json(adapter / BASE_NAME)
    return Source(
        adapter=adapter,
        recipe=recipe,
        record=read_record(run) if run and (run / "record.json").is_file() else None,
        spec=_base_spec(adapter, recipe, identity, config, base),
        head=read_adapter_head(adapter, config),
        identity=identity,
        config=config,
    )


def read_config(adapter: Path) -> Any:
    """The PEFT configuration in an adapter's folder, beside which its weights are known to stand.

    Raises:
        InputError: a configuration that the installed peft does not know, or no safetensors.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as fault:
        raise InputError(
            f"{adapter}/adapter_config.json cannot be understood by the installed peft: {fault}"
        ) from fault
    if not (adapter / WEIGHTS_NAME).is_file():
        raise InputError(
            f"{adapter} has no {WEIGHTS_NAME}. Pickled adapters are not loaded; save it again as safetensors."
        )
    return config


def check_base(source: Source, backbone: Backbone) -> str:
    """What proves that this base is the one that the adapter was trained on: `weights`, `config` or `shapes` alone.

    Raises:
        BackboneError: another architecture, other dimensions or other weights.
    """
    from peftkit.backbones.load import base_identity

    here, there = base_identity(backbone), source.identity or {}
    for key, what in (
        ("config_digest", "another architecture or other dimensions"),
        ("weights_digest", "other weights"),
    ):
        if there.get(key) and here[key] and there[key] != here[key]:
            raise BackboneError(
                f"{backbone.spec.name} is not the base of {source.adapter}: it has {what} ({here[key]}, "
                f"trained on {there[key]}). The adapter was trained on {source.trained_on}; pass that as --base."
            )
    if there.get("weights_digest") and here["weights_digest"]:
        return "weights"
    return "config" if there.get("config_digest") else "shapes"


def attach(source: Source, backbone: Backbone, *, config: Any = None) -> Any:
    """The adapter on its base, as a `PeftModel` ready to answer. The base's model is changed in place.

    Args:
        config: to read the adapter by, instead of its own.

    Raises:
        BackboneError: the adapter's tensors do not fit this base.
        InputError: the adapter holds numbers that are not finite.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    from peftkit.backbones.quiet import quietly

    saved = load_file(str(source.adapter / WEIGHTS_NAME))
    broken = [name for name, tensor in saved.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise InputError(
            f"{source.adapter} holds {len(broken)} tensors that are not finite, such as {broken[0]}: it diverged."
        )
    device = str(backbone.model.device)
    rows = saved_vocabulary(source, backbone.model)
    if rows is not None and rows != backbone.model.get_input_embeddings().weight.shape[0]:
        with quietly():
            backbone.model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with quietly():
            model = PeftModel.from_pretrained(backbone.model, str(source.adapter), torch_device=device, config=config)
            needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            known = set(get_peft_model_state_dict(model, save_embedding_layers=True))
    except (RuntimeError, ValueError, KeyError) as fault:
        text = " ".join(str(fault).split())[:300]
        raise _misfit(source, backbone, text) from fault
    absent, extra = sorted(needed - set(saved)), sorted(set(saved) - known)
    if absent:
        raise _misfit(source, backbone, f"the adapter has nothing for {len(absent)} tensors, such as {absent[0]}")
    if extra:
        raise _misfit(source, backbone, f"the base has no place for {len(extra)} tensors, such as {extra[0]}")
    model.requires_grad_(False)
    return model.eval()


def saved_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors, by the names in its file."""
    return {name: entry.shape for name, entry in read_header(source.adapter / WEIGHTS_NAME).entries.items()}


def saved_vocabulary(source: Source, model: Any) -> int | None:
    """The rows of the input embedding that the adapter brings along; None where it brings none."""
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embedding:
            shapes = saved_shapes(source)
            for kind in ("weight", "base_layer.weight"):
                if f"{INSIDE}{name}.{kind}" in shapes:
                    return shapes[f"{INSIDE}{name}.{kind}"][0]
    return None


def resized(source: Source, config: Any) -> Any:
    """The base's configuration with the vocabulary that the adapter brings along."""
    from peftkit.backbones.load import build_skeleton

    rows = saved_vocabulary(source, build_skeleton(config, source.head))
    if rows is None or rows == config.get_text_config().vocab_size:
        return config
    changed = type(config).from_dict(config.to_dict())
    changed.get_text_config().vocab_size = rows
    return changed


def touched_modules(model: Any) -> frozenset[str]:
    """Paths, in the base's own names, of the modules that the adapter changes or replaces."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return frozenset(
        name.removeprefix(INSIDE)
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    )


def fold(source: Source, model: Any) -> torch.nn.Module:
    """Fold the adapter into the weights of `model`, a `PeftModel`, in the dtype these have; returns the plain model.

    Raises:
        MethodError: the method has no fold.
    """
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from peftkit.backbones.quiet import quietly

    if not isinstance(model.base_model, BaseTuner):
        raise unfoldable(source.adapter, source.config, "its layers are not changes of weights")
    try:
        with quietly():
            merged: torch.nn.Module = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as fault:
        raise unfoldable(source.adapter, source.config, f"peft says: {' '.join(str(fault).split())}") from fault
    left = [name for name, module in merged.named_modules() if isinstance(module, BaseTunerLayer)]
    if left:
        raise unfoldable(source.adapter, source.config, f"peft leaves {left[0]} as it is")
    return merged


def locate(path: Path) -> tuple[Path, Path | None]:
    """The adapter's folder, and the run's when there is one.

    Raises:
        MethodError: a whole model.
        InputError: neither a run nor an adapter.
    """
    if (path / "adapter_config.json").is_file():
        run = path.absolute().parent
        return path, run if path.absolute().name == "adapter" and (run / RECIPE_NAME).is_file() else None
    if (path / "adapter" / "adapter_config.json").is_file():
        return path / "adapter", path if (path / RECIPE_NAME).is_file() else None
    if (path / "model" / "config.json").is_file() or (path / "config.json").is_file():
        whole = path / "model" if (path / "model").is_dir() else path
        raise MethodError(f"there is no adapter in {path}: {whole} is a whole model and can be deployed as it is.")
    raise InputError(
        f"{path} is neither a finished run (no adapter/ in it) nor a PEFT adapter (no adapter_config.json)."
    )


def _base_spec(
    adapter: Path, recipe: Recipe | None, identity: dict[str, Any] | None, config: Any, base: str | None
) -> BackboneSpec:
    from peftkit.backbones.load import compute_dtype
    from peftkit.backbones.load import read_config as read_base_config

    known = identity or {}
    if recipe:
        spec = recipe.backbone
    else:
        name = base or known.get("name") or config.base_model_name_or_path
        if not name:
            raise InputError(f"{adapter} does not say which base it was trained on. Pass it as --base.")
        spec = BackboneSpec(name=name, revision=known.get("revision"), quantization=known.get("quantization") or "none")
    if base and base != spec.name:
        spec = spec.model_copy(update={"name": base, "revision": None})
    dtype = known.get("dtype")
    if dtype is None and recipe is None:
        dtype = str(read_base_config(spec).dtype).removeprefix("torch.")
    if dtype not in get_args(BackboneSpec.model_fields["dtype"].annotation) or dtype == "auto":
        dtype = str(compute_dtype(spec, "cpu")).removeprefix("torch.")
    return spec.model_copy(update={"dtype": dtype})


def read_adapter_head(adapter: Path, config: Any) -> Head:
    """The head that was written beside the adapter; else one with as many outputs as the adapter's saved head has."""
    written = read_json(adapter / HEAD_NAME)
    if written is not None:
        return Head(written["kind"], tuple(written.get("labels") or ()), written.get("problem"))
    if config.task_type != "SEQ_CLS":
        return LANGUAGE_HEAD
    rows = [
        entry.shape[0]
        for key, entry in read_header(adapter / WEIGHTS_NAME).entries.items()
        if key.rsplit(".", 2)[-2:] in (["classifier", "weight"], ["score", "weight"], ["out_proj", "weight"])
    ]
    if len(rows) != 1:
        raise InputError(f"{adapter} is a classifier but its head's labels are unknown. Write {HEAD_NAME} beside it.")
    problem = "regression" if rows[0] == 1 else "single_label_classification"
    return Head("classification", tuple(f"LABEL_{index}" for index in range(rows[0])), problem)  # type: ignore[arg-type]


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file beside an adapter; None where there is no such file.

    Raises:
        InputError: not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as fault:
        raise InputError(f"{path} cannot be read: {fault}. Restore it, or delete it and pass --base.") from fault
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object. Restore it, or delete it and pass --base.")
    return content


def _misfit(source: Source, backbone: Backbone, reason: str) -> BackboneError:
    return BackboneError(
        f"{source.adapter} does not fit {backbone.spec.name}: {reason}. "
        f"The adapter was trained on {source.trained_on}; pass that as --base."
    )


def unfoldable(adapter: Path, config: Any, reason: str) -> MethodError:
    """What to tell of a method that has no fold, and what to deploy instead."""
    return MethodError(
        f"a {config.peft_type.value} adapter cannot be folded into a model: {reason}. Deploy the base with the adapter "
        f"folder {adapter} on it: PeftModel.from_pretrained(base, {str(adapter)!r}). Engines that serve only LoRA, "
        "vLLM among them, cannot serve it; method=lora gives a model that can be merged."
    )
