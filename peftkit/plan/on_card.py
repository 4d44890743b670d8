"""What this package and its libraries choose by device, chosen as on a card although tensors say they are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from transformers import AttentionInterface

from peftkit.kernels import attention, dropout, lora, loss, products
from peftkit.plan.cuda_operators import HALF, Architecture, cuda_operators, flash_attention
from peftkit.plan.storages import StorageTracker, Stream
from peftkit.recipe import Training
from peftkit.train import lowprecision, optimizers
from peftkit.train.lowprecision import Rounding

Builder = Callable[[Iterable[nn.Parameter], Training, Rounding | None], Optimizer]

PAGED_ELEMENTS = 10**5
"""Optimizer states of at least as many live in memory that the driver moves, outside of torch's allocator."""


@contextmanager
def chosen_for(card: Architecture | None, tracker: StorageTracker) -> Iterator[None]:
    """Kernels and optimizers that run and allocate as on the card; without one, as on the host."""
    with ExitStack() as stack:
        stack.enter_context(quantized_optimizers(tracker))
        stack.enter_context(
            patch.object(lowprecision, "_buckets", partial(_few_buckets, lowprecision._buckets, tracker))
        )
        if card is not None:
            stack.enter_context(cuda_operators(card))
            kinds = {attention.PRODUCTS: True, attention.FUSED: False}
            attend = {name: _attention_on(card, products=products) for name, products in kinds.items()}
            stack.enter_context(patch.dict(AttentionInterface._global_mapping, attend))
            stack.enter_context(patch.object(loss, "CHUNK_BYTES", {}))
            stack.enter_context(patch.object(optimizers, "build_optimizer", _paging(optimizers.build_optimizer)))
            for module in (dropout, lora, products):
                stack.enter_context(patch.object(module, "keep_mask", _keep_mask))
        yield


def _attention_on(card: Architecture, *, products: bool) -> Any:
    """This package's attention: FlashAttention where the card has it and where it computes the same."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **terms: Any) -> Any:
        query, key = query.to(value.dtype), key.to(value.dtype)  # as the real one
        plain = terms.get("softcap") is None and not terms.get("dropout") and terms.get("prefix") is None
        if not plain or not card.flash or query.dtype not in HALF:
            return attention.attend(module, query, key, value, mask, products=products, **terms)
        out = flash_attention(query, key, value, dropout=0.0, causal=bool(module.is_causal), scale=terms["scaling"])
        return out.transpose(1, 2), None

    return attend


def _keep_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """One byte an element, without a generator's words before it."""
    return torch.empty(tuple(shape), dtype=torch.bool).bernoulli_(1 - p)


def _paging(build: Builder) -> Builder:
    """The recipe's optimizers, the paged ones among them, which are refused where tensors are not on a CUDA device."""

    def paging(parameters: Iterable[nn.Parameter], training: Training, rounding: Rounding | None = None) -> Optimizer:
        if not training.optimizer.startswith("paged"):
            return build(parameters, training, rounding)
        built = build(parameters, training.model_copy(update={"optimizer": "adamw-8bit"}), rounding)
        return paged(built, training.optimizer)

    return paging


def paged(built: Any, name: str) -> Optimizer:
    """bitsandbytes' optimizer in 8 bits as the paged one of this name, which its class refuses on the host."""
    built.is_paged, built.args.optim_bits = True, 8 if name.endswith("8bit") else 32
    return cast(Optimizer, built)


@contextmanager
def quantized_optimizers(tracker: StorageTracker) -> Iterator[None]:
    """bitsandbytes' optimizers on fake tensors: their tables are not computed, and paged states not counted."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    def fill(self: Any) -> None:
        self.name2qmap |= {"dynamic": torch.empty(256), "udynamic": torch.empty(256)}

    def state_buffer(self: Any, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.is_paged and parameter.numel() >= PAGED_ELEMENTS:
            with tracker.on_host():
                return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros_like(parameter, dtype=dtype)

    with patch.object(Optimizer8bit, "fill_qmap", fill), patch.object(Optimizer8bit, "get_state_buffer", state_buffer):
        yield


def _few_buckets(
    cut: Callable[[Iterable[Any]], Iterable[Sequence[Any]]], tracker: StorageTracker, pieces: Iterable[Any]
) -> Iterator[Sequence[Any]]:
    """The first two and the last of the buckets of one form; what those between do is known, and leaves nothing.

    In the first step they leave the optimizer's state, so that all of them are taken.
    """
    if tracker.phase.endswith("*"):
        yield from cut(pieces)
        return
    buckets = list(cut(pieces))
    forms = [tuple((p.weight.shape, p.weight.dtype, p.gradient.dtype) for p in bucket) for bucket in buckets]
    ahead, done, known = Counter(forms), Counter[Any](), {}
    for form, bucket in zip(forms, buckets, strict=True):
        done[form] += 1
        if done[form] in (1, 2, ahead[form]):
            before = _work_of(tracker.stream)
            yield bucket
            known[form] = [after - had for after, had in zip(_work_of(tracker.stream), before, strict=True)]
        else:
            tracker.stream.add_work(*known[form])


def _work_of(stream: Stream) -> tuple[int, int]:
    """Operations and moved bytes so far."""
    return sum(work.flops for work in stream.work), sum(work.moved_bytes for work in stream.work)


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """What is left of a tensor on the card while its content waits in the host's memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def offloading(model: nn.Module, *, smallest_bytes: int) -> AbstractContextManager[object]:
    """`saving_on_host` for fake tensors: what is saved leaves the card and is made anew for the backward pass."""
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor | _Offloaded:
        if tensor.nbytes < smallest_bytes or tensor.untyped_storage()._cdata in held:
            return tensor
        return _Offloaded(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def unpack(packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return torch.empty_strided(packed.shape, packed.stride, dtype=packed.dtype)

    return saved_tensors_hooks(pack, unpack)
