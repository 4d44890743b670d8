"""What lies beside the deltas of an adapter, and cannot be added up: head, saved modules, kind of task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peftkit.backbones.spec import Head
from peftkit.deploy.parts import Adapter, saved_modules
from peftkit.errors import InputError

MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Beside:
    """What the combination takes over.

    Attributes:
        origin: the part whose configuration, labels and tokenizer these are.
        saved: tensors that were trained whole.
        told: whose they are, in words.
    """

    origin: Adapter
    saved: Mapping[str, Tensor]
    told: str

    @property
    def head(self) -> Head:
        """What sits on the base."""
        return self.origin.head


def choose_beside(adapters: Sequence[Adapter], choice: str | None, weights: Sequence[float]) -> Beside:
    """The head and saved modules that the combination gets.

    Args:
        choice: a part's path, its number from 1, or `mean`; None needs all parts to agree.
        weights: of the parts; `mean` takes their shares.

    Raises:
        InputError: they do not agree, and none is chosen; or what is chosen is not there.
    """
    first = adapters[0]
    if choice is None:
        if all(_same(first, other) for other in adapters[1:]):
            return Beside(first, first.saved, "all parts agree" if first.saved else "no part has one of its own")
        told = ", ".join(f"{index} {_described(adapter)}" for index, adapter in enumerate(adapters, 1))
        raise InputError(
            f"the parts were trained with different heads or saved modules ({told}). Say which one the combination "
            f"gets: --head 1 to {len(adapters)}, or --head mean for their weighted mean."
        )
    if choice == MEAN:
        return Beside(first, _mean(adapters, weights), "the weighted mean of all parts")
    for index, adapter in enumerate(adapters, 1):
        if choice in (str(index), str(adapter.path), adapter.name):
            return Beside(adapter, adapter.saved, f"of part {index}, {adapter.name}")
    raise InputError(f"--head {choice} is none of the parts. Give 1 to {len(adapters)}, a part's path, or mean.")


def _same(one: Adapter, other: Adapter) -> bool:
    return (
        one.config.task_type == other.config.task_type
        and one.head == other.head
        and one.saved.keys() == other.saved.keys()
        and all(bool(tensor.equal(other.saved[name])) for name, tensor in one.saved.items())
    )


def _mean(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean of what was saved, each part by its share of the weights."""
    first = adapters[0]
    for other in adapters[1:]:
        shapes = [{name: tensor.shape for name, tensor in each.saved.items()} for each in (first, other)]
        if first.head != other.head or shapes[0] != shapes[1]:
            raise InputError(
                f"--head mean needs heads of the same labels in the same order: {_described(first)} of {first.name}, "
                f"{_described(other)} of {other.name}. Choose one of them: --head 1 to {len(adapters)}."
            )
    if not first.saved:
        raise InputError("--head mean would be ignored: no part has a head of its own. Leave it out.")
    whole = sum(weights)
    if whole <= 0:
        raise InputError(f"--head mean needs weights that add up to more than 0, not {whole:g}. Choose a part's head.")
    return {
        name: sum(
            (weight / whole * each.saved[name].float() for each, weight in zip(adapters, weights, strict=True)),
            start=tensor.new_zeros(tensor.shape, dtype=tensor.float().dtype),
        ).to(tensor.dtype)
        for name, tensor in first.saved.items()
    }


def _described(adapter: Adapter) -> str:
    labels = adapter.head.labels
    words = "/".join(labels[:4]) + ("/..." if len(labels) > 4 else "") if labels else adapter.head.kind
    return f"{words} ({', '.join(saved_modules(adapter.config)) or 'nothing saved'})"
