"""The layers below the first one that trains: which they are, and whether their output can stand in for them.

`plan_cache` does not take that on trust. It runs a few examples, and refuses a model whose lower layers draw at random,
train after all, look at other examples, or hand more to the upper ones than their output.

Shapes: B examples, T positions of the longest, N positions of a packed batch, H hidden size.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.data.batching import Batch, collate
from peftkit.data.features import Features
from peftkit.train.checkpoint import random_states, restore_random_states

CODE = ("torch", "transformers", "peft", "bitsandbytes", "peftkit")
"""Packages whose version may change how layers compute."""
NOT_COMPUTED_WITH = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type", "transformers_version")
"""Fields of a configuration that change no hidden state."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why lower layers cannot be cached exactly, with the remedy where there is one."""

    reason: str


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Which layers are skipped, and what is kept in their place.

    Attributes:
        blocks: the model's repeated layers, lowest first.
        index: the first of them that still runs; their number when only what is above them trains.
        hidden: H.
        dtype: the one the layers put out, so that keeping rounds nothing.
        identity: digest of everything but the data that decides the kept states.
    """

    blocks: nn.ModuleList
    index: int
    hidden: int
    dtype: torch.dtype
    identity: str

    @property
    def frozen(self) -> list[nn.Module]:
        """The layers that the cache answers for; there is at least one."""
        return list(self.blocks)[: self.index]


def plan_cache(
    model: nn.Module, features: Sequence[Features], *, pad_id: int, settings: Mapping[str, Any] | None = None
) -> CachePlan | Refusal:
    """What to cache of a model, or why that would not be exact. The model and all generators stay as they were.

    Args:
        features: the split to train on; a few examples of it are run.
        settings: what else changes how the layers compute, such as the recipe's kernels; part of the identity.
    """
    blocks = repeated_blocks(model)
    if blocks is None:
        return Refusal("the model has no single list of repeated layers.")
    index = lowest_trainable_block(blocks)
    if index == 0:
        return Refusal("the lowest layer trains, so none below it is frozen. Set method.layers=top-N.")
    if any(parameter.dtype == torch.int8 for block in blocks[:index] for parameter in block.parameters()):
        return Refusal("int8 layers round an example by what else is in its batch. Set backbone.quantization=nf4.")
    training, states = model.training, random_states()
    try:
        found = _probe(model, blocks, index, features, pad_id=pad_id)
    finally:
        model.train(training)
        restore_random_states(states)
    if isinstance(found, Refusal):
        return found
    identity = _identity(model, blocks, index, output=found, settings=settings or {})
    return CachePlan(blocks, index, found.shape[-1], found.dtype, identity)


def repeated_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The model's layers: the longest list of transformer blocks in it; None where there is none, or two as long."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    found = [blocks for blocks in lists if all(isinstance(block, GradientCheckpointingLayer) for block in blocks)]
    longest = max((len(blocks) for blocks in found), default=0)
    candidates = [blocks for blocks in found if len(blocks) == longest]
    return candidates[0] if len(candidates) == 1 else None


def lowest_trainable_block(blocks: nn.ModuleList) -> int:
    """Index of the first block that holds a tensor that trains; their number when none does."""
    trained = (i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    return next(trained, len(blocks))


class Reached(Exception):
    """Ends a forward at the block whose output is wanted."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def run_to(model: nn.Module, block: nn.Module, batch: Batch) -> Any:
    """What `block` returns for a padded batch; nothing above it runs."""

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise Reached(output)

    handle = block.register_forward_hook(stop)
    try:
        model(**batch.inputs())
    except Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise AssertionError("a forward runs every block")


@contextmanager
def answering(blocks: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Let blocks return `hidden`. Their `forward` alone is replaced: names, indices and the state dict stay."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        return hidden

    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = answer
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def begins(batch: Batch, lengths: Sequence[int]) -> list[int]:
    """Where each example begins among all positions of its batch: every T where padded, end to end where packed."""
    num_rows, width = batch.input_ids.shape
    packed = num_rows < len(batch.rows)
    assert (sum(lengths) if packed else max(lengths)) <= width, "a batch of another split"
    return [0, *accumulate(lengths)][:-1] if packed else [row * width for row in range(num_rows)]


def examples_of(hidden: Tensor, batch: Batch, lengths: Sequence[int]) -> list[Tensor]:
    """The states [length, H] of each example of a batch."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return [flat[begin : begin + length] for begin, length in zip(begins(batch, lengths), lengths, strict=True)]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _probe(
    model: nn.Module, blocks: nn.ModuleList, index: int, features: Sequence[Features], *, pad_id: int
) -> Tensor | Refusal:
    """The frozen layers' output for two short examples, once it is shown to be all that training needs of them."""
    device, last = next(model.parameters()).device, blocks[index - 1]
    ordered = sorted(features, key=lambda feature: (len(feature), feature.row))
    short = ordered[:1]
    batch, alone, crowd = (collate(group, pad_id).to(device) for group in (ordered[:2], short, short + ordered[-1:]))
    with torch.enable_grad():
        output = run_to(model.train(), last, batch)
        trouble = _trouble_of_output(model, last, output, batch)
        if trouble is not None:
            return Refusal(trouble)
        if not torch.equal(output, run_to(model, last, batch)):
            return Refusal("the frozen layers drop activations at random in training. Set training.dropout=0.")
    with torch.no_grad():
        quiet: Tensor = run_to(model.eval(), last, batch)
        if not _agree(output, quiet):
            return Refusal("the frozen layers compute something else in training than in evaluation.")
        expected = model(**batch.inputs()).logits
        # other tokens come between, so that no module still holds what the layers above are to miss
        lone, padded = (run_to(model, last, other)[0, : len(short[0])] for other in (alone, crowd))
        if not _agree(lone, padded):
            return Refusal("the frozen layers compute something else for an example when others are in its batch.")
        with answering(list(blocks)[:index], quiet):
            if not _agree(expected, _logits(model, batch)):
                return Refusal("the upper layers use more of the frozen ones than the last one's output.")
    return quiet


def _logits(model: nn.Module, batch: Batch) -> Tensor | None:
    """The model's answer while layers are replaced; None when the others miss what did not run."""
    try:
        return model(**batch.inputs()).logits  # type: ignore[no-any-return]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def _trouble_of_output(model: nn.Module, block: nn.Module, output: Any, batch: Batch) -> str | None:
    """Why what a frozen block returned cannot be kept, in words; None when it can."""
    if not isinstance(output, Tensor) or output.ndim != 3:
        return f"{type(block).__name__} returns something else than one vector for each token."
    if output.shape[:2] != batch.input_ids.shape:
        return "the method puts virtual tokens before the input, so what trains acts in the lowest layer already."
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if output.requires_grad and trained:  # recomputing layers may ask for it without a tensor that trains
        gradients = torch.autograd.grad(output.sum(), list(trained.values()), allow_unused=True)
        names = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        if names:
            return f"what trains acts below the frozen layers: {', '.join(names[:3])}."
    return None


def _agree(one: Tensor, other: Tensor | None) -> bool:
    """Whether two ways to compute the same differ by rounding alone: half of the dtype's digits have to agree."""
    if other is None:
        return False
    tolerance = math.sqrt(torch.finfo(one.dtype).eps)
    return bool(torch.linalg.vector_norm((one - other).float()) <= tolerance * torch.linalg.vector_norm(one.float()))


def _identity(
    model: nn.Module, blocks: nn.ModuleList, index: int, *, output: Tensor, settings: Mapping[str, Any]
) -> str:
    """Digest of the frozen weights as they lie in memory, the configuration, the code and the numbers' format."""
    from transformers import PreTrainedModel

    around = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    body = [module for module in around if any(inner is blocks for inner in module.modules())][-1]
    path = next(name for name, module in body.named_modules() if module is blocks)
    upper = tuple(f"{path}.{i}." for i in range(index, len(blocks)))
    trained = {name for name, parameter in body.named_parameters() if parameter.requires_grad}
    kind = output.device.type
    facts = {
        "index": index,
        "numbers": [str(output.dtype), kind, torch.is_autocast_enabled(kind)],
        "attention": body.config._attn_implementation,
        "config": {key: value for key, value in body.config.to_dict().items() if key not in NOT_COMPUTED_WITH},
        "versions": {name: metadata.version(name) for name in CODE},
        "source": hashlib.blake2b(Path(inspect.getfile(type(blocks[0]))).read_bytes()).hexdigest(),
        "settings": dict(settings),
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(body.state_dict().items()):
        if isinstance(tensor, Tensor) and name not in trained and not name.startswith(upper):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.cpu().contiguous()))
    return digest.hexdigest()
