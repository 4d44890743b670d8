"""Fake tensors at a fraction of torch's price: an operator is asked once what it puts out for the same shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten
ASKED_ANEW = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})
"""Tags of operators whose outputs depend on more than shapes, or that change the shape of an argument."""
PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)

ALARMS = frozenset({aten.any.default, aten.any.dim, aten.any.dims})
"""What a model asks to see whether something is amiss, such as a number that is none."""
ALARM = "peftkit_alarm"
"""Mark of their outputs."""

Tensors = dict[int, tuple[int, FakeTensor]]
"""Of one call, by identity: position among them, and the tensor."""


@dataclass(frozen=True, slots=True)
class _Made:
    """How an output comes about.

    Attributes:
        source: position among the call's tensors of the one that it is or shares its storage with; None: new storage.
        same: it is that very tensor.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None
    same: bool


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a call returns: its outputs, in a sequence of this kind; None for a single one. Plain values as they are."""

    kind: type[Any] | None
    outputs: tuple[Any, ...]


class ShapeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """torch's mode, with a shorter way for operators on shapes whose outputs were seen in this process."""

    _known: ClassVar[dict[tuple[Any, ...], _Outcome]] = {}

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and type(args[0]) is FakeTensor and args[0].constant is None:
            return _guessed(args[0])
        out = self._answer(func, types, args, kwargs)
        if func in ALARMS:
            vars(out)[ALARM] = True
        return out

    def _answer(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors: Tensors = {}
        key = _key(func, args, kwargs, tensors)
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        known = self._known.get(key)
        if known is not None:
            sources = [tensor for _, tensor in tensors.values()]
            made = [self._make(output, sources) if type(output) is _Made else output for output in known.outputs]
            return made[0] if known.kind is None else known.kind(made)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if _key(func, args, kwargs, {}) == key:
            learned = _learn(out, [tensor for _, tensor in tensors.values()])
            if learned is not None:
                self._known[key] = learned
        return out

    def _make(self, made: _Made, tensors: list[FakeTensor]) -> Tensor:
        if made.source is None:
            inner = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        elif made.same:
            return tensors[made.source]
        else:
            storage = tensors[made.source].untyped_storage()
            inner = torch.empty(0, dtype=made.dtype, device="meta").set_(storage, made.offset, made.shape, made.stride)
        return self._fake(inner, made.device)

    def _fake(self, inner: Tensor, device: torch.device) -> FakeTensor:
        """`FakeTensor(self, inner, device)`, which takes ten times as long to set the same attributes each time."""
        if device not in self._attributes:
            self._attributes[device] = dict(vars(FakeTensor(self, inner, device)))
        fake = Tensor._make_subclass(FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=device)
        vars(fake).update(self._attributes[device])
        return fake


def _guessed(tensor: FakeTensor) -> bool | int | float:
    """The number in a tensor of unknown content, so that a step goes its usual way: nothing is amiss, and what is drawn
    to decide whether a module is left out keeps it."""
    if tensor.dtype is torch.bool:
        return not vars(tensor).get(ALARM, False)
    return 1.0 if tensor.is_floating_point() else 1


def _key(func: Any, args: Any, kwargs: Any, tensors: Tensors) -> tuple[Any, ...] | None:
    """All that an operator's outputs depend on; None where that is more than shapes. The call's tensors are noted."""
    parts = [func, torch.get_default_dtype()]
    if not _depends_on_shapes(func) or not _describe(parts, args, tensors):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _describe(parts, (value,), tensors):
            return None
    return tuple(parts)


@cache
def _depends_on_shapes(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and not ASKED_ANEW & set(func.tags)


def _describe(parts: list[Any], values: Iterable[Any], tensors: Tensors) -> bool:
    """Add what values are to the parts of a key; False where one of them is more than its shape."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if not _is_plain(value):
                return False
            place, _ = tensors.setdefault(id(value), (len(tensors), value))
            parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device, place))
        elif kind in PLAIN:
            parts += (kind, value)  # 1, 1.0 and True are equal
        elif kind in (list, tuple):
            parts += (kind, len(value))
            if not _describe(parts, value, tensors):
                return False
        else:
            return False
    return True


def _learn(out: Any, tensors: Sequence[FakeTensor]) -> _Outcome | None:
    """The outcome of a call on these tensors, for others of their shapes; None where it may differ for those."""
    kind = type(out) if type(out) in (list, tuple) else None
    held = [tensor.untyped_storage()._cdata for tensor in tensors]
    outputs: list[Any] = []
    for value in out if kind else (out,):
        if type(value) in PLAIN:
            outputs.append(value)
            continue
        if type(value) is not FakeTensor or not _is_plain(value) or value.requires_grad:
            return None
        storage = value.untyped_storage()
        same = next((place for place, tensor in enumerate(tensors) if tensor is value), None)
        shared = held.index(storage._cdata) if storage._cdata in held else None
        if shared is None and storage.nbytes() != _whole_bytes(value):
            return None
        if shared is not None and shared >= len(tensors):
            return None
        held.append(storage._cdata)
        source = shared if same is None else same
        form = tuple(value.shape), value.stride(), int(value.storage_offset())
        outputs.append(_Made(*form, value.dtype, value.fake_device, source, same is not None))
    return _Outcome(kind, tuple(outputs))


def _is_plain(tensor: FakeTensor) -> bool:
    """Whether strides and dtype say all about it: it has no known value, and is neither sparse nor conjugated."""
    return tensor.constant is None and tensor.layout is torch.strided and not tensor.dtype.is_complex


def _whole_bytes(tensor: FakeTensor) -> int:
    """Bytes of a storage that nothing else looks into."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if not tensor.storage_offset() else -1
