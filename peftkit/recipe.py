"""The recipe: one typed YAML file that says everything about a run. The only reader of YAML."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from peftkit.backbones.spec import BackboneSpec
from peftkit.data.spec import DataSpec
from peftkit.errors import InputError, RecipeError, nearest
from peftkit.kernels.spec import Kernels
from peftkit.methods import ALIASES, AnyMethod
from peftkit.spec import Section
from peftkit.tasks.spec import AnyTask, Chat

TokenBudget = Annotated[str, Field(pattern=r"^[1-9]\d* tokens$")]
TrainingBudget = Annotated[str, Field(pattern=r"^[1-9]\d* (examples|tokens|seconds)$")]


class Training(Section):
    """How the parameters move."""

    epochs: PositiveFloat = 3
    max_steps: PositiveInt | None = Field(None, description="Stop after so many optimizer steps, whatever epochs says")
    budget: TrainingBudget | None = Field(
        None,
        description="Stop once so many 'N examples', 'N tokens' or 'N seconds' of steps went into training, whatever "
        "epochs says; the schedule follows the share that is spent",
    )
    learning_rate: PositiveFloat = 2e-4
    batch_size: PositiveInt = Field(8, description="Examples per optimizer step, over all devices")
    micro_batch: Literal["auto"] | PositiveInt | TokenBudget = Field(
        "auto", description="Examples, or 'N tokens', per forward; the optimizer step is the same whatever it is"
    )
    max_tokens: PositiveInt = Field(1024, description="Longest example")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeFloat = Field(0.05, description="Below 1 a fraction of all steps, else a number of steps")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: PositiveFloat | None = Field(1.0, description="Largest norm of the whole gradient; null leaves it alone")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Of the backbone's own layers; null leaves what its configuration says"
    )
    checkpointing: Literal["auto", "off", "all"] | PositiveInt = Field(
        "auto", description="Recompute activations in the backward pass: of no layer, all, or so many"
    )
    offload_activations: bool = Field(False, description="Keep activations for the backward pass in the host's memory")
    optimizer_in_backward: bool = Field(
        False,
        description="Update each weight as soon as its gradient is whole, and keep no gradients; needs clip: null",
    )
    activation_cache: bool = Field(
        False, description="Run frozen lower layers once per example and keep their output on disk for later epochs"
    )
    kernels: Kernels = Kernels()
    checkpoint_every: PositiveInt = Field(200, description="Steps between checkpoints on disk")
    log_every: PositiveInt = Field(10, description="Steps between lines of log.jsonl")


class Evaluation(Section):
    """When the validation split is scored, and what is done about it."""

    every: Literal["epoch", "never"] | PositiveInt = Field("epoch", description="epoch, never, or a number of steps")
    metric: str = Field("auto", description="What 'best' means: a metric of the task, or loss; auto is the task's own")
    patience: PositiveInt | None = Field(None, description="Stop after so many scorings without a better one")
    hurdles: dict[PositiveInt, float] = Field(
        {}, description="Step -> value of the metric; stop where no scoring up to that step was as good"
    )
    keep: Literal["best", "last"] = "best"
    batch_tokens: PositiveInt = Field(4096, description="Tokens per forward while scoring")


class Tracking(Section):
    """Where else the log goes, through accelerate's trackers."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([])
    project: str = "peftkit"


class Recipe(Section):
    """Everything that decides a run. Two runs of one recipe on one machine end in the same numbers."""

    backbone: BackboneSpec
    method: AnyMethod
    task: AnyTask = Chat()
    data: DataSpec
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    seed: NonNegativeInt = 0
    description: str = Field("", description="For people; not part of the digest")

    @model_validator(mode="after")
    def _settings_are_heeded(self) -> Self:
        if self.data.validation is None:
            for name in ("patience", "metric", "hurdles"):
                if getattr(self.evaluation, name) not in (None, "auto", {}):
                    raise ValueError(f"evaluation.{name} would be ignored: there is no data.validation to score")
        if self.training.budget is not None and self.training.max_steps is not None:
            raise ValueError(
                f"training.max_steps={self.training.max_steps} and training.budget={self.training.budget!r} both say "
                "where training ends. Leave one out"
            )
        recomputes = self.training.checkpointing not in ("auto", "off")
        padded = not self.training.kernels.packing or self.backbone.attention != "auto"
        if recomputes and padded and not self.method.checkpointable:
            raise ValueError(
                f"training.checkpointing={self.training.checkpointing} with method {self.method.kind!r} needs packed "
                "batches: padded, the recomputed layers would not see what it trains. Set "
                "training.kernels.packing=true and backbone.attention=auto, or training.checkpointing=off"
            )
        if self.training.optimizer_in_backward and self.training.clip is not None:
            raise ValueError(
                "training.optimizer_in_backward updates weights before the norm of the whole gradient is known, so it "
                "cannot be clipped. Set training.clip=null"
            )
        changed = [name for name, value in self.training if value != getattr(Training(), name) and name != "max_tokens"]
        if self.method.shots is not None and changed:
            ignored = ", ".join(f"training.{name}" for name in changed)
            raise ValueError(f"{ignored} would be ignored: method {self.method.kind!r} trains nothing")
        return self

    @property
    def label(self) -> str:
        """The method as tables print it: `qlora` for LoRA on an NF4 backbone."""
        return self.method.label(self.backbone.quantization)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits over every field that decides the run."""
        content = self.to_dict()
        content.pop("description", None)
        content.pop("tracking", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every field, defaults included."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return dump_yaml(self.to_dict())

    def differing_keys(self, other: Recipe) -> list[str]:
        """Dotted names of the fields in which two recipes differ, with both values."""
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        keys = sorted(set(mine) | set(theirs))
        return [f"{key}: {mine.get(key)} -> {theirs.get(key)}" for key in keys if mine.get(key) != theirs.get(key)]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key.sub=value` overrides, and check all of it.

    Relative data and backbone paths are taken from the folder of the recipe, when they exist there.

    Raises:
        InputError: the file is missing or is not YAML.
        RecipeError: one or more faults, all named at once, each with the nearest known key.
    """
    path = Path(path)
    content = read_yaml(path)
    return build_recipe(anchor(content, path.parent), overrides, where=str(path))


def build_recipe(content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """A checked recipe from plain data and overrides."""
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        apply_override(plain, override)
    _resolve_alias(plain)
    plain = anchor(plain, Path())
    try:
        return Recipe.model_validate(plain)
    except ValidationError as fault:
        raise RecipeError(where, _explain_all(fault.errors())) from None


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in plain recipe data; the value is YAML. `method=lora` chooses the kind."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"{override!r} is not an override. Write key.sub=value, for example training.epochs=1.")
    set_value(content, key.strip(), parse_yaml(text, where=f"override {override!r}"))


def set_value(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in plain recipe data. A bare name for method, task or backbone chooses its kind or name."""
    *sections, last = key.split(".")
    for section in sections:
        inner = content.get(section)
        content[section] = inner = dict(inner) if isinstance(inner, Mapping) else _shorthand(section, inner)
        content = inner
    content[last] = value


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    names = sorted(ALIASES)
    schema["properties"]["method"] = {"anyOf": [schema["properties"]["method"], {"type": "string", "examples": names}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file.

    Raises:
        InputError: missing, unreadable, malformed, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise InputError(f"cannot read {path}: {getattr(fault, 'strerror', None) or fault}{near}") from fault
    content = parse_yaml(text, where=str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a mapping of keys to values. See `peftkit recipes list` for examples.")
    return content


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data from YAML 1.2 text: `1e-4` is a number, `off` is a word."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise InputError(f"{place}: not valid YAML: {getattr(fault, 'problem', None) or fault}") from fault


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML text of plain data, keys in the order given."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(dict(content), stream)
    return stream.getvalue()


def _shorthand(section: str, value: Any) -> dict[str, Any]:
    """`method: lora` means `method: {kind: lora}`; a backbone's bare word is its name."""
    if not isinstance(value, str):
        return {}
    return {"name" if section == "backbone" else "kind": value}


def _resolve_alias(content: dict[str, Any]) -> None:
    for section in ("backbone", "method", "task"):
        if isinstance(content.get(section), str):
            content[section] = _shorthand(section, content[section])
    method = content.get("method")
    alias = ALIASES.get(method.get("kind", "")) if isinstance(method, dict) else None
    for section, values in (alias or {}).items():
        inner = content.get(section)
        content[section] = {**(inner if isinstance(inner, dict) else {}), **values}


def anchor(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths that exist in `folder` become absolute, so that a run's own copy of the recipe is read from anywhere."""

    def anchored(value: Any) -> Any:
        if isinstance(value, str) and not value.startswith("builtin:") and not Path(value).is_absolute():
            beside = folder / value
            if any(folder.glob(value)) if any(sign in value for sign in "*?[") else beside.exists():
                return str(beside.absolute())
        return value

    content = dict(content)
    for section, keys in (("data", ("train", "validation", "test")), ("backbone", ("name",))):
        if isinstance(content.get(section), dict):
            inner = dict(content[section])
            content[section] = {key: anchored(value) if key in keys else value for key, value in inner.items()}
    return content


def _explain_all(errors: Sequence[Any]) -> list[str]:
    """Every fault in our words; the branches of a union that refused one value become one fault."""
    faults: dict[str, list[str]] = {}
    for error in errors:
        where, what = _explain(error)
        faults.setdefault(where, []).append(what)
    return [f"{where}: {' or '.join(dict.fromkeys(whats))}" if where else whats[0] for where, whats in faults.items()]


def _explain(error: Any) -> tuple[str, str]:
    """Where one pydantic error is, and what is wrong with its remedy."""
    location = [str(part) for part in error["loc"]]
    tags = {
        "full",
        "lora",
        "prefix",
        "prompt",
        "head",
        "zero-shot",
        "few-shot",
        "peft",
        "chat",
        "completion",
        "classify",
    }
    where = ".".join(part for part in location if part not in tags and not any(sign in part for sign in "[-"))
    if error["type"] == "extra_forbidden":
        return where, f"unknown key{nearest(location[-1], _known_keys(location[:-1]))}"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = error["ctx"].get("expected_tags", "").replace("'", "")
        names = [*expected.split(", "), *(sorted(ALIASES) if where == "method" else [])]
        given = error["ctx"].get("tag")
        if given is None:
            return where, f"needs a kind, one of {', '.join(names)}"
        return f"{where}.kind", f"unknown {where} {given!r}{nearest(given, names)}. Known: {', '.join(names)}"
    if error["type"] == "missing":
        return where, "is required"
    if error["type"] == "value_error":
        return where, str(error["ctx"]["error"])
    return where, f"{error['msg'][0].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the section at `path`, unions entered by their tag."""
    schema: Any = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for part in path:
        options = _options(schema, definitions)
        schema = next((o["properties"][part] for o in options if part in o.get("properties", {})), None) or next(
            (o for o in options if o.get("properties", {}).get("kind", {}).get("const") == part), {}
        )
    return sorted({key for option in _options(schema, definitions) for key in option.get("properties", {})})


def _options(schema: Any, definitions: Mapping[str, Any]) -> Iterable[Any]:
    if "$ref" in schema:
        return [definitions[schema["$ref"].rsplit("/", 1)[-1]]]
    branches = schema.get("oneOf") or schema.get("anyOf")
    return [inner for branch in branches for inner in _options(branch, definitions)] if branches else [schema]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
