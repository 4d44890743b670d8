"""Every storage's birth and death during a simulated run, with where it was born: phase, module, operator."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from peftkit.plan.allocator import Event

aten = torch.ops.aten
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products whose work torch counts under another name."""
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.mm.out,
        aten.bmm.default,
        aten.addmm.default,
        aten.addmm_.default,
        aten.baddbmm.default,
        aten.baddbmm_.default,
    }
)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What an operator's kernel allocates and frees within one call.

    Attributes:
        sizes: bytes of each piece, given the arguments of the call.
        first: allocated before the outputs; else after them.
    """

    sizes: Callable[[tuple[Any, ...], Mapping[str, Any]], Sequence[int]]
    first: bool = False


@dataclass(slots=True)
class Birth:
    """Where a storage comes from.

    Attributes:
        num_bytes: as asked for, not rounded.
        phase: of the run at its birth.
        module: path of the innermost running module; empty outside of the model.
        operator: what made it, such as `aten.mm`.
        last: size of its last dimension at birth.
        kind: what it is, where somebody said so.
    """

    num_bytes: int
    phase: str
    module: str
    operator: str
    last: int
    kind: str | None = None


@dataclass(slots=True)
class Work:
    """What operators do between one event or phase and the next.

    Attributes:
        events: so many happened before.
        phases: so many began before.
    """

    events: int
    phases: int
    flops: int = 0
    moved_bytes: int = 0


@dataclass(slots=True)
class Stream:
    """What happened, in order: births and deaths of storages, phases, and the work of all operators.

    Attributes:
        events: births and deaths; tensors are numbered in the order of their births.
        births: by number.
        phases: the event each phase starts at, with its name.
        emptied: the events before which the allocator's cache was emptied.
        work: of all operators, in order.
    """

    events: list[Event] = field(default_factory=list)
    births: list[Birth] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)
    emptied: set[int] = field(default_factory=set)
    work: list[Work] = field(default_factory=list)

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations by phase."""
        return self._by_phase(work.flops for work in self.work)

    @property
    def moved_bytes(self) -> dict[str, int]:
        """Bytes that operators read and write, by phase."""
        return self._by_phase(work.moved_bytes for work in self.work)

    def add_work(self, flops: int, moved_bytes: int) -> None:
        """Note what an operator does now."""
        now = len(self.events), len(self.phases)
        if not self.work or (self.work[-1].events, self.work[-1].phases) != now:
            self.work.append(Work(*now))
        self.work[-1].flops += flops
        self.work[-1].moved_bytes += moved_bytes

    def order_deaths(self) -> None:
        """Put storages that die together in the order of their births: autocast, for one, drops its copies in any."""
        apart = {work.events for work in self.work} | {start for start, _ in self.phases} | self.emptied
        start = 0
        for index in range(1, len(self.events) + 1):
            if index == len(self.events) or index in apart or self.events[index].num_bytes:
                if not self.events[start].num_bytes:
                    self.events[start:index] = sorted(self.events[start:index], key=lambda event: event.tensor)
                start = index
            elif self.events[start].num_bytes:
                start = index

    def _by_phase(self, amounts: Iterable[int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for work, amount in zip(self.work, amounts, strict=True):
            phase = self.phases[work.phases - 1][1] if work.phases else ""
            if amount:
                found[phase] = found.get(phase, 0) + amount
        return found

    def phase_at(self, event: int) -> str:
        """The phase that an event belongs to."""
        return next((name for start, name in reversed(self.phases) if start <= event), "")

    def live_at(self, event: int) -> set[int]:
        """Numbers of the storages that are alive after an event."""
        live: set[int] = set()
        for happened in self.events[: event + 1]:
            if happened.num_bytes:
                live.add(happened.tensor)
            else:
                live.discard(happened.tensor)
        return live


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a `Stream` of all that runs under it; storages of the host's own constants are left out.

    Args:
        scratch: by operator, what its kernel allocates besides its outputs.
        workspace_bytes: what the library of matrix products holds, once in the forward and once in the backward thread.
    """

    def __init__(self, scratch: Mapping[Any, Scratch] | None = None, *, workspace_bytes: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = Stream()
        self.phase = ""
        self._scratch, self._alone = dict(scratch or {}), _engine_holders()
        self._workspace_bytes, self._workspaces = workspace_bytes, set[bool]()
        self._numbers: dict[int, int] = {}
        self._modules: list[str] = [""]
        self._paths: dict[int, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._host: set[int] = set()
        self._on_host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # autograd asks it of every fake tensor that it meets
            return args[0].device
        if func is aten.add.Tensor and (index := _summed_into(args, self._alone)) is not None:
            self._count(func, args, kwargs, args[0])
            return args[index].add_(args[1 - index])
        if self._workspace_bytes and func in PRODUCTS:
            self._hold_workspace()
        scratch = self._scratch.get(func)
        sizes = scratch.sizes(args, kwargs) if scratch else ()
        held = [self._born(size, str(func), 0) for size in sizes] if scratch and scratch.first else []
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        for tensor in _tensors((out,)):
            self._see(tensor, func)
        held = held or [self._born(size, str(func), 0) for size in sizes]
        self.stream.events.extend(Event(number, 0) for number in held)
        return out

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what happens inside."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str) -> None:
        """Name what happens from here on."""
        self.phase = phase
        self.stream.phases.append((len(self.stream.events), phase))

    def take(self) -> Stream:
        """What was written so far; what happens from here on is not part of it."""
        taken, self.stream = self.stream, Stream()
        taken.order_deaths()
        return taken

    def empty_cache(self) -> None:
        """The run returns what it does not use to the card here."""
        self.stream.emptied.add(len(self.stream.events))

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is born inside is not on the device."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def watch(self, model: nn.Module) -> None:
        """Tell births by the module that is running, in its forward pass, until this mode ends.

        The hooks are torch's global ones: modules with hooks of their own are computed another way by fast paths.
        """
        self._paths |= {id(module): path for path, module in model.named_modules()}
        if not self._hooks:
            self._hooks += [
                register_module_forward_pre_hook(self._entered),
                register_module_forward_hook(self._left, always_call=True),
            ]

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)  # type: ignore[no-untyped-call]
        while self._hooks:
            self._hooks.pop().remove()

    def adopt(self, tensors: Iterator[tuple[str, Tensor]], kind: str) -> None:
        """Count tensors that are there already, or say what those are that were seen being born."""
        for name, tensor in tensors:
            self.tag(tensor, kind, module=name)

    def tag(self, tensor: Tensor, kind: str, *, module: str | None = None) -> None:
        """Say what a tensor's storage is."""
        number = self._see(tensor, "")
        if number is not None:
            birth = self.stream.births[number]
            birth.kind = kind
            birth.module = birth.module if module is None else module

    def _hold_workspace(self) -> None:
        """A birth without a death, in the thread that this is."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward not in self._workspaces:
            self._workspaces.add(in_backward)
            self.stream.births[self._born(self._workspace_bytes, "", 0)].kind = "cuBLAS workspaces"

    def _see(self, tensor: Tensor, func: Any) -> int | None:
        if tensor.is_meta:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._numbers.get(key)
        if known is not None:
            return known
        if key in self._host or self._on_host or func is aten.lift_fresh.default:
            # constants that Python writes down live on the host, whatever the device
            if key not in self._host:
                self._host.add(key)
                weakref.finalize(storage, self._host.discard, key).atexit = False
            return None
        num_bytes = storage.nbytes()
        if not num_bytes:
            return None
        number = self._born(num_bytes, str(func), tensor.shape[-1] if tensor.ndim else 1)
        self._numbers[key] = number
        weakref.finalize(storage, self._died, key, number).atexit = False
        return number

    def _born(self, num_bytes: int, operator: str, last: int) -> int:
        number = len(self.stream.births)
        self.stream.births.append(Birth(num_bytes, self.phase, self._modules[-1], operator, int(last)))
        self.stream.events.append(Event(number, num_bytes))
        return number

    def _died(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self.stream.events.append(Event(number, 0))

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        counted = flop_registry.get(IN_PLACE.get(packet, packet))
        flops = 0 if counted is None else int(counted(*args, **kwargs, out_val=out))
        moved = 0 if func.is_view else sum(tensor.nbytes for tensor in _tensors((args, out)))
        if flops or moved:
            self.stream.add_work(flops, moved)

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._modules.append(self._paths.get(id(module), self._modules[-1]))

    def _left(self, module: nn.Module, args: Any, out: Any) -> None:
        self._modules.pop()


class _CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how often the first operand of the last addition is held."""

    holders = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            self.holders = _holders(args, 0)
        return func(*args, **(kwargs or {}))


@cache
def _engine_holders() -> tuple[int, int]:
    """What `_holders` says of a gradient that autograd's engine alone holds while it adds another to it."""
    with torch.enable_grad(), _CountingMode() as mode:  # type: ignore[no-untyped-call]
        x = torch.ones(2, requires_grad=True) * 1
        (x.sin() + x.exp()).sum().backward()  # type: ignore[no-untyped-call]
    holders: tuple[int, int] = mode.holders
    return holders


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or outputs."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _holders(args: Sequence[Any], index: int) -> tuple[int, int]:
    """References that Python holds to an operand, and uses of its storage."""
    return sys.getrefcount(args[index]), torch._C._storage_Use_Count(args[index].untyped_storage()._cdata)


def _summed_into(args: Sequence[Any], alone: tuple[int, int]) -> int | None:
    """Which operand of an addition autograd's engine would overwrite: one that nothing but the engine holds.

    Between two nodes of a backward pass it sums in place, but not under a mode or with fake tensors.
    """
    if torch._C._current_graph_task_id() == -1 or not all(isinstance(operand, Tensor) for operand in args[:2]):
        return None
    if args[0].shape != args[1].shape or args[0].dtype != args[1].dtype:
        return None
    return next((index for index in (0, 1) if _holders(args, index) == alone), None)
