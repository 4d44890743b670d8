"""Adapters as they lie on disk, read without their base: factors, what was saved beside them, where they come from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.backbones.spec import Head
from peftkit.cache import file_sha256
from peftkit.deploy.adapter import INSIDE, WEIGHTS_NAME, locate, read_adapter_head, read_config, read_json
from peftkit.deploy.lowrank import Factors
from peftkit.errors import BackboneError, InputError, MethodError, OutputError
from peftkit.files import write_json
from peftkit.folder import BASE_NAME, HEAD_NAME, RECIPE_NAME
from peftkit.recipe import Recipe, load_recipe
from peftkit.record import RECORD_NAME, RunRecord, read_record

DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja")
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the frozen weights, so that scaling x B A is not what the adapter adds to the base."""
FREE_FIELDS = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    | {"fan_in_fan_out", "ensure_weight_tying", "megatron_core", "runtime_config", "qalora_group_size"}
    | {"loftq_config", "eva_config", "velora_config"}
)
"""Fields of a LoRA configuration under which the delta stays scaling x B A, whatever they say."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, its tensors in memory.

    Attributes:
        path: as it was given: a run's folder or the adapter's own.
        folder: the adapter's own.
        config: the PEFT configuration.
        identity: the content of `base.json`; None where nobody wrote it down.
        tensors: all that was saved, by the names in the file.
    """

    path: Path
    folder: Path
    config: Any
    identity: Mapping[str, Any] | None
    recipe: Recipe | None
    record: RunRecord | None
    tensors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The last word of its path that says something."""
        whole = self.folder.absolute()
        return whole.parent.name if whole.name == "adapter" else whole.name

    @property
    def method(self) -> str:
        """`lora`, `ia3`, ...: the run's label, or the adapter's PEFT type."""
        return self.recipe.label if self.recipe else str(self.config.peft_type.value).lower().replace("_", "-")

    @property
    def base_name(self) -> str | None:
        """What the base was called where the adapter was trained."""
        name = (self.identity or {}).get("name") or self.config.base_model_name_or_path
        return str(name) if name else None

    @property
    def base_names(self) -> set[str]:
        """Every name under which the base was written down."""
        return {str(name) for name in (self.base_name, self.config.base_model_name_or_path) if name}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights' file."""
        return file_sha256(self.folder / WEIGHTS_NAME)

    @cached_property
    def head(self) -> Head:
        """What sits on the base."""
        return read_adapter_head(self.folder, self.config)

    @cached_property
    def unscaled(self) -> dict[str, Factors]:
        """B and A as they were trained, by the module's path in the base; nothing for other methods than LoRA."""
        if self.config.peft_type.value != "LORA":
            return {}
        downs = {name.removesuffix(DOWN): tensor for name, tensor in self.tensors.items() if name.endswith(DOWN)}
        return {
            name.removeprefix(INSIDE): Factors(self.tensors[name + UP], down)
            for name, down in sorted(downs.items())
            if name + UP in self.tensors and down.dim() == 2
        }

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """What was trained whole and saved beside the deltas, such as a head."""
        names = saved_modules(self.config)
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if any(f".{module}." in f".{name}" for module in names)
        }

    @cached_property
    def beyond(self) -> dict[str, Tensor]:
        """Every tensor that is no B and no A."""
        known = {INSIDE + path + end for path in self.unscaled for end in (DOWN, UP)}
        return {name: tensor for name, tensor in sorted(self.tensors.items()) if name not in known}

    @cached_property
    def odd_fields(self) -> dict[str, Any]:
        """Settings of a LoRA under which what it adds to the base is not scaling x B A."""
        settings, usual = vars(self.config), vars(type(self.config)())
        return {
            name: settings[name]
            for name in sorted(usual)
            if name not in FREE_FIELDS and settings.get(name) != usual[name]
        }

    @property
    def rewrites_base(self) -> bool:
        """Whether its initialisation takes something out of the frozen weights whenever it is loaded."""
        start = getattr(self.config, "init_lora_weights", None)
        return isinstance(start, str) and start.startswith(REWRITES_BASE)

    @cached_property
    def impurity(self) -> str | None:
        """Why what it adds to the base is not scaling x B A; None where it is."""
        kind = self.config.peft_type.value
        if kind != "LORA":
            return f"{kind} is not made of B and A"
        if self.rewrites_base:
            return f"init_lora_weights={self.config.init_lora_weights} changed the frozen weights"
        for name, value in self.odd_fields.items():
            return f"{name}={value} makes it more than scaling x B A"
        strange = [name for name in self.beyond if name not in self.saved]
        return f"it holds {strange[0]}, which belongs to no linear layer's B and A" if strange else None

    def scaling(self, path: str) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) with rsLoRA; the patterns heeded as PEFT heeds them."""
        from peft.utils.other import get_pattern_key

        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), path), self.config.lora_alpha)
        rank = self.unscaled[path].rank
        return float(alpha) / (rank**0.5 if self.config.use_rslora else rank)

    def products(self) -> dict[str, Factors]:
        """Scaling x B A of every module, by its path. It is what a plain LoRA adds to the base."""
        return {path: factors.scaled(self.scaling(path)) for path, factors in self.unscaled.items()}


def saved_modules(config: Any) -> list[str]:
    """Names of the modules that are trained whole and saved beside the adapter, each once."""
    return sorted(set(getattr(config, "modules_to_save", None) or ()))


def read_adapter(path: str | Path) -> Adapter:
    """Read a run folder or an adapter folder, of any method.

    Raises:
        InputError: neither of the two, files that cannot be understood, or numbers that are not finite.
        MethodError: a whole model.
    """
    from safetensors.torch import load_file

    folder, run = locate(Path(path))
    config = read_config(folder)
    tensors = load_file(str(folder / WEIGHTS_NAME))
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise InputError(f"{folder} holds {len(broken)} tensors that are not finite, such as {broken[0]}: it diverged.")
    return Adapter(
        path=Path(path),
        folder=folder,
        config=config,
        identity=read_json(folder / BASE_NAME),
        recipe=load_recipe(run / RECIPE_NAME) if run else None,
        record=read_record(run) if run and (run / RECORD_NAME).is_file() else None,
        tensors=tensors,
    )


def check_same_base(adapters: Sequence[Adapter]) -> list[str]:
    """That all adapters belong to one base; returns what could not be proven, in words.

    Raises:
        BackboneError: they belong to different bases.
    """
    first, notes = adapters[0], []
    for other in adapters[1:]:
        here, there = first.identity or {}, other.identity or {}
        compared = [key for key in ("config_digest", "weights_digest") if here.get(key) and there.get(key)]
        different = [key for key in compared if here[key] != there[key]]
        strangers = first.base_names.isdisjoint(other.base_names) and bool(first.base_names | other.base_names)
        if different or (strangers and not compared):
            what = f"{different[0]} {here[different[0]]} and {there[different[0]]}" if different else "other names"
            raise BackboneError(
                f"{first.path} was trained on {first.base_name} and {other.path} on {other.base_name} ({what}). "
                "Only adapters of one base can be taken together; where it is one base under two names, write the "
                "same base_model_name_or_path into both adapter_config.json."
            )
        if "weights_digest" not in compared:
            notes.append(f"{first.name} and {other.name} name the same base; its weights are not compared")
        numbers = [(known.get("quantization"), known.get("dtype")) for known in (here, there)]
        if here and there and numbers[0] != numbers[1]:
            told = [" ".join(str(word) for word in pair if word not in (None, "none")) for pair in numbers]
            notes.append(f"{first.name} was trained over {told[0]} weights and {other.name} over {told[1]}")
    return notes


def deltas_through_base(adapter: Adapter, base: str | None) -> dict[str, Tensor]:
    """What an adapter of any foldable method adds to each linear layer, in float32: the folded weights less the base's.

    The base is loaded, so this needs memory for three times its weights in float32.

    Raises:
        MethodError: it cannot be folded, or changes more than the weights of linear layers.
        BackboneError: the base cannot be loaded, or is not the one the adapter was trained on.
    """
    from torch import nn

    from peftkit.backbones.load import load_backbone
    from peftkit.deploy.adapter import attach, check_base, fold, read_source
    from peftkit.deploy.rounding import to_float32

    source = read_source(adapter.path, base)
    if source.spec.quantization != "none":
        raise MethodError(
            f"{adapter.path}: {adapter.impurity}, and its base was held in {source.spec.quantization}, to which no "
            "delta can be added. Merge each adapter, or train with method=lora."
        )
    backbone = load_backbone(source.spec, source.head)
    check_base(source, backbone)
    before = {name: weight.detach().float().clone() for name, weight in backbone.model.named_parameters()}
    merged = fold(source, to_float32(attach(source, backbone)))
    saved = saved_modules(adapter.config)
    deltas: dict[str, Tensor] = {}
    for name, weight in merged.named_parameters():
        if any(f".{module}." in f".{name}" for module in saved) or bool((weight == before[name]).all()):
            continue
        path, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(merged.get_submodule(path), nn.Linear):
            raise MethodError(
                f"{adapter.path}: {adapter.impurity}, and it changes {name}, for which a LoRA has no place. "
                "Merge it instead: peftkit merge."
            )
        deltas[path] = weight.detach() - before[name]
    return deltas


def write_adapter(
    folder: Path, config: Any, tensors: Mapping[str, Tensor], *, head: Head, origin: Adapter, identity: Any
) -> None:
    """Write an ordinary PEFT adapter; head and base are noted beside it, and `origin`'s tokenizer comes along."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(str(folder))
    write_json(folder / HEAD_NAME, asdict(head))
    if identity is not None:
        write_json(folder / BASE_NAME, dict(identity))
    for pattern in TOKENIZER_FILES:
        for file in origin.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def require_free(out: Path) -> None:
    """Refuse an output that holds anything.

    Raises:
        OutputError: a file, or a folder that is not empty.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"{out} is not empty. Choose another --out, or move what is there.")
