"""A model that reads its weights from disk layer by layer while it answers, for machines that cannot hold it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftkit.deploy.adapter import Onto, check_base
from peftkit.deploy.answers import Probes, Reference, answer, compare_answers, take_reference
from peftkit.deploy.changes import compare_on_disk, touched_names
from peftkit.deploy.hollow import Hollow, open_hollow, open_plain
from peftkit.deploy.sides import Side, open_side
from peftkit.deploy.tolerance import CONTROL_POSITIONS, SEED, derive_tolerance, nudged
from peftkit.deploy.verification import Proof, Say, reach_verdict, refuse
from peftkit.deploy.weights import NotByTensor, folder_of
from peftkit.errors import BackboneError, InputError

if TYPE_CHECKING:
    from peftkit.backbones.dims import Dims


class Streamed:
    """A hollow model that can be called: each layer is filled before it runs, and emptied after.

    A layer is a block of the model's lists of blocks, or any module outside them that has weights of its own.
    """

    def __init__(self, hollow: Hollow) -> None:
        self.hollow = hollow
        self.model: Any = hollow.adapted
        self.noisy: frozenset[str] = frozenset()
        self._open: dict[int, Any] = {}
        for layer in _layers(hollow):
            layer.register_forward_pre_hook(self._fill, with_kwargs=True)
            layer.register_forward_hook(self._empty, always_call=True)

    def shake(self, names: set[str]) -> None:
        """From now on, move these weights as one rounding would, each time they are read."""
        self.noisy = frozenset(names)

    def _fill(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        context = self.hollow.filled(module)
        held = context.__enter__()
        self._open[id(module)] = context
        if self.noisy:
            for name, parameter in held.items():
                if self.noisy.intersection(self.hollow.tied(name)):
                    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
                    parameter.data = nudged(parameter.data, self.hollow.dtype, generator)

    def _empty(self, module: nn.Module, args: Any, output: Any) -> None:
        context = self._open.pop(id(module), None)
        if context is not None:
            context.__exit__(None, None, None)


def _layers(hollow: Hollow) -> list[nn.Module]:
    """The modules that are filled as one, none inside another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[nn.Module] = []

    def visit(module: nn.Module, *, listed: bool) -> None:
        own = any(hollow.name_of(parameter) for parameter in module.parameters(recurse=False))
        whole = listed or own or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if whole and any(hollow.name_of(parameter) for parameter in module.parameters()):
            found.append(module)
            return
        for child in module.children():
            visit(child, listed=isinstance(module, nn.ModuleList))

    visit(hollow.adapted, listed=False)
    return found


def examine_streamed(
    side: Side, folder: Path, dims: Dims, probes: Probes, faults: list[str], onto: Onto | None, say: Say
) -> Proof:
    """Compare a candidate with its reference, neither of them ever in memory.

    Args:
        probes: inputs of one length: each forward reads the whole model from disk.
        faults: what is known to be wrong already.

    Raises:
        InputError: the reference cannot be loaded layer by layer. A candidate that cannot be is a failure.
    """
    other = open_side(folder)
    if other.source is not None:
        raise InputError(
            f"--streamed reads a model's folder layer by layer, and {folder} is an adapter. Merge it first."
        )
    if onto == "requantized":
        raise InputError(
            "--streamed cannot read quantized layers. Leave it out, on a machine whose memory holds the model."
        )
    dtype = getattr(torch, other.spec.dtype)
    say(f"asking {side.name}, layer by layer")
    try:
        if side.source is None:
            base, recognised = open_plain(folder_of(side.spec), side.head, getattr(torch, side.spec.dtype)), "itself"
        else:
            base, backbone = open_hollow(side.source, quantization="none" if onto == "original" else None)
            recognised = check_base(side.source, backbone)
    except NotByTensor as reason:
        raise InputError(
            f"{side.name} cannot be read layer by layer: {reason}. Use a machine whose memory holds it, without "
            "--streamed."
        ) from reason
    reference = take_reference(Streamed(base).model, probes)
    say("asking the candidate, layer by layer")
    try:
        model = open_plain(folder, side.head, dtype)
        absent = [name for name in model.state if model.stored_name(name) is None]
    except (NotByTensor, BackboneError) as fault:
        return refuse(probes, other.spec.dtype, [*faults, str(fault)], recognised)
    if absent:
        told = f"{len(absent)} tensors are missing in the files, such as {absent[0]}"
        return refuse(probes, other.spec.dtype, [*faults, told], recognised)
    candidate = Streamed(model)
    theirs = answer(candidate.model, probes)
    widths = [part.shape[-1] for part in (theirs[0], reference.logits[0])]
    if widths[0] != widths[1]:
        told = f"it has {widths[0]} outputs, and the reference {widths[1]}"
        return refuse(probes, other.spec.dtype, [*faults, told], recognised)
    changes, touched = None, set[str]()
    if side.source is not None:
        say("comparing the tensors with the base's")
        touched = touched_names(side.source, base.adapted, base.state)
        changes = compare_on_disk(base, model, touched)
    noise = None
    if dtype != torch.float32 and touched:
        candidate.shake(touched)
        few = probes.first(CONTROL_POSITIONS)
        noise = compare_answers(Reference(few, tuple(theirs)), answer(candidate.model, few))
    tolerance = derive_tolerance(dtype, dims, reference, noise)
    verification = reach_verdict(
        probes,
        dtype,
        faults,
        found=compare_answers(reference, theirs, tie=tolerance.rms_difference),
        reference=reference,
        tolerance=tolerance,
        changes=changes,
        streamed=True,
    )
    return Proof(verification=verification, recognised_by=recognised)
