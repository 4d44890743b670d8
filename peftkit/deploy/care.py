"""What an adapter is and holds, and how two of them differ. No base is loaded.

Norms and ranks are those of scaling x B A, from the QR of B and A. A method that is more than that (DoRA's magnitudes,
a rewritten base) has them measured all the same where it has B and A, and `delta` says what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from peftkit.backbones.dims import LAYER_INDEX
from peftkit.deploy.adapter import WEIGHTS_NAME
from peftkit.deploy.lowrank import (
    Factors,
    distance,
    effective_rank,
    inner,
    norm,
    numerical_rank,
    root_sum_square,
    spectrum,
)
from peftkit.deploy.parts import Adapter, read_adapter, saved_modules
from peftkit.errors import InputError
from peftkit.record import Metric, Part


class BaseOf(Part):
    """What the adapter was trained on, as far as somebody wrote it down."""

    name: str | None = None
    revision: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    config_digest: str | None = None
    weights_digest: str | None = None


class Training(Part):
    """The run that made it."""

    label: str
    recipe_digest: str
    seed: int
    status: str
    task: str
    data: str
    train_seconds: float | None = None
    loss: dict[str, float] = Field(default_factory=dict)
    metrics: dict[str, Metric] = Field(default_factory=dict)
    validation_metrics: dict[str, Metric] = Field(default_factory=dict)


class ModuleCare(Part):
    """One module's delta. `effective_rank` is the participation ratio of the squared singular values, 1 to `rank`."""

    path: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    norm: float
    largest_singular: float
    numerical_rank: int
    effective_rank: float


class LayerCare(Part):
    """The modules of one layer together; `layer` is absent for modules outside the layers."""

    layer: int | None = None
    modules: int
    norm: float
    effective_rank: float
    strongest: str


class TensorCare(Part):
    """A tensor that is no part of B and A."""

    name: str
    shape: tuple[int, ...]
    norm: float


class Inspection(Part):
    """Everything that can be said about an adapter from its own folder."""

    path: str
    method: str
    peft_type: str
    delta: str
    ranks: tuple[int, ...]
    alpha: float | None = None
    targets: dict[str, int]
    modules_to_save: tuple[str, ...]
    head: str
    num_params: int
    num_bytes: int
    dtypes: tuple[str, ...]
    digest: str
    base: BaseOf
    training: Training | None = None
    norm: float | None = None
    effective_rank: float | None = None
    layers: tuple[LayerCare, ...]
    modules: tuple[ModuleCare, ...]
    others: tuple[TensorCare, ...]


class ModuleDifference(Part):
    """One module in both. `relative` is the norm of the difference over that of A's delta, absent where that is zero;
    `cosine` is absent where either is."""

    path: str
    norm_a: float
    norm_b: float
    relative: float | None = None
    cosine: float | None = None


class TensorDifference(Part):
    """A tensor in both that is no part of B and A; `relative` is absent for other shapes, and for A's zeros."""

    name: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float | None = None


class AdapterDifference(Part):
    """How two adapters differ: B against A."""

    a: str
    b: str
    same_weights: bool
    config: dict[str, tuple[Any, Any]]
    base: dict[str, tuple[Any, Any]]
    recipe: tuple[str, ...]
    relative: float | None = None
    cosine: float | None = None
    modules: tuple[ModuleDifference, ...]
    tensors: tuple[TensorDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]


def inspect(path: str | Path) -> Inspection:
    """Look into the adapter of a run or an adapter folder, of any method.

    Raises:
        InputError: neither of the two, or files that cannot be understood.
    """
    adapter = read_adapter(path)
    modules = tuple(_module(adapter, name, delta) for name, delta in adapter.products().items())
    config = adapter.config
    return Inspection(
        path=str(adapter.path),
        method=adapter.method,
        peft_type=str(config.peft_type.value),
        delta="scaling x B A" if adapter.impurity is None else f"not scaling x B A alone: {adapter.impurity}",
        ranks=tuple(sorted({module.rank for module in modules})),
        alpha=getattr(config, "lora_alpha", None),
        targets=_targets(adapter),
        modules_to_save=tuple(saved_modules(config)),
        head=adapter.head.kind + (f" ({', '.join(adapter.head.labels)})" if adapter.head.labels else ""),
        num_params=sum(tensor.numel() for tensor in adapter.tensors.values()),
        num_bytes=(adapter.folder / WEIGHTS_NAME).stat().st_size,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors.values()})),
        digest=adapter.digest,
        base=_base(adapter),
        training=_training(adapter),
        norm=root_sum_square([module.norm for module in modules]) if modules else None,
        effective_rank=_mean([module.effective_rank for module in modules]) if modules else None,
        layers=_layers(modules),
        modules=modules,
        others=tuple(
            TensorCare(name=name, shape=tuple(tensor.shape), norm=float(tensor.double().norm()))
            for name, tensor in adapter.beyond.items()
        ),
    )


def diff(one: str | Path, other: str | Path) -> AdapterDifference:
    """Compare two adapters, B against A: what they say they are, and what they add to each module.

    Raises:
        InputError: not an adapter, or adapters that share nothing.
    """
    a, b = read_adapter(one), read_adapter(other)
    deltas_a, deltas_b = a.products(), b.products()
    others_a, others_b = a.beyond, b.beyond
    shared = [path for path in deltas_a if path in deltas_b and deltas_a[path].shape == deltas_b[path].shape]
    same = [name for name in others_a if name in others_b]
    if not shared and not same:
        raise InputError(
            f"{one} and {other} have no module in common, or only such of other shapes: they belong to different bases "
            f"({a.base_name}, {b.base_name}) or change different modules. `peftkit inspect` shows each."
        )
    pairs = [(deltas_a[path], deltas_b[path]) for path in shared]
    norms_a, norms_b = [norm(mine) for mine, _ in pairs], [norm(theirs) for _, theirs in pairs]
    far = [distance(mine, theirs) for mine, theirs in pairs]
    products = [inner(mine, theirs) for mine, theirs in pairs]
    whole = root_sum_square(norms_a), root_sum_square(norms_b)
    everything = (set(deltas_a) | set(others_a), set(deltas_b) | set(others_b))
    common = {*shared, *same}
    return AdapterDifference(
        a=str(one),
        b=str(other),
        same_weights=a.digest == b.digest,
        config=_differing(_plain(a.config), _plain(b.config)),
        base=_differing(_base(a).model_dump(), _base(b).model_dump()),
        recipe=tuple(a.recipe.differing_keys(b.recipe)) if a.recipe and b.recipe else (),
        relative=_ratio(root_sum_square(far), whole[0]) if pairs else None,
        cosine=_ratio(sum(products), whole[0] * whole[1]),
        modules=tuple(
            ModuleDifference(
                path=path,
                norm_a=norms_a[index],
                norm_b=norms_b[index],
                relative=_ratio(far[index], norms_a[index]),
                cosine=_ratio(products[index], norms_a[index] * norms_b[index]),
            )
            for index, path in enumerate(shared)
        ),
        tensors=tuple(_tensor_difference(name, others_a[name], others_b[name]) for name in same),
        only_in_a=tuple(sorted(everything[0] - common)),
        only_in_b=tuple(sorted(everything[1] - common)),
    )


def _module(adapter: Adapter, path: str, delta: Factors) -> ModuleCare:
    singular = spectrum(delta)
    return ModuleCare(
        path=path,
        shape=delta.shape,
        rank=delta.rank,
        scaling=adapter.scaling(path),
        norm=float(singular.norm()),
        largest_singular=float(singular[0]),
        numerical_rank=numerical_rank(singular),
        effective_rank=effective_rank(singular),
    )


def _layers(modules: Sequence[ModuleCare]) -> tuple[LayerCare, ...]:
    """One entry a layer, in order; modules outside the layers come last."""
    layers: dict[int | None, list[ModuleCare]] = {}
    for module in modules:
        found = LAYER_INDEX.search(module.path)
        layers.setdefault(int(found.group(1)) if found else None, []).append(module)
    return tuple(
        LayerCare(
            layer=layer,
            modules=len(layers[layer]),
            norm=root_sum_square([module.norm for module in layers[layer]]),
            effective_rank=_mean([module.effective_rank for module in layers[layer]]),
            strongest=max(layers[layer], key=lambda module: module.norm).path.rsplit(".", 1)[-1],
        )
        for layer in sorted(layers, key=lambda index: (index is None, index or 0))
    )


def _targets(adapter: Adapter) -> dict[str, int]:
    """Last words of the changed modules' paths, each with how many there are; what the configuration says else."""
    leaves = [path.rsplit(".", 1)[-1] for path in adapter.unscaled]
    if not leaves:
        said = getattr(adapter.config, "target_modules", None) or ()
        leaves = [said] if isinstance(said, str) else list(said)
        return {leaf: sum(f".{leaf}." in name for name in adapter.tensors) for leaf in sorted(leaves)}
    return {leaf: leaves.count(leaf) for leaf in sorted(set(leaves))}


def _base(adapter: Adapter) -> BaseOf:
    known = {key: value for key, value in (adapter.identity or {}).items() if key in BaseOf.model_fields}
    return BaseOf(**{**known, "name": adapter.base_name})


def _training(adapter: Adapter) -> Training | None:
    recipe, record = adapter.recipe, adapter.record
    if recipe is None or record is None:
        return None
    return Training(
        label=recipe.label,
        recipe_digest=recipe.digest,
        seed=recipe.seed,
        status=record.status,
        task=recipe.task.kind,
        data=recipe.data.train,
        train_seconds=record.throughput.train_seconds if record.throughput else None,
        loss=record.loss.model_dump(exclude_none=True) if record.loss else {},
        metrics=record.metrics,
        validation_metrics=record.validation_metrics,
    )


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as plain data, sets in order."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted(set(mine) | set(theirs))
    return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def _tensor_difference(name: str, mine: Tensor, theirs: Tensor) -> TensorDifference:
    relative = None
    if mine.shape == theirs.shape:
        relative = _ratio(float((mine.double() - theirs.double()).norm()), float(mine.double().norm()))
    return TensorDifference(name=name, shape_a=tuple(mine.shape), shape_b=tuple(theirs.shape), relative=relative)


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole > 0 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
