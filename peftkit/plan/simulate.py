"""peftkit's own step on fake tensors: the model, method, task, kernels and optimizer that `train` would run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from peftkit.backbones.dims import read_dims
from peftkit.backbones.load import Backbone, build_skeleton, compute_dtype, read_config, set_dropout
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.data.features import IGNORED, Features
from peftkit.errors import InputError
from peftkit.kernels import attention, dropout, loss
from peftkit.methods.base import Adapted
from peftkit.plan.cuda_operators import HALF, Architecture, cuda_operators, flash_attention, scratch_of
from peftkit.plan.fake import fake_tensors, materialize, quantize_linears
from peftkit.plan.kinds import tag_gradients, tag_state, tag_weights
from peftkit.plan.simulation import Simulation, summarize
from peftkit.plan.storages import StorageTracker
from peftkit.recipe import Recipe
from peftkit.tasks import open_task
from peftkit.tasks.base import Task
from peftkit.train.activations import OFFLOADED_BYTES, saving_on_host, set_checkpointing
from peftkit.train.fastpath import FastPath
from peftkit.train.loop import AUTO_TOKENS
from peftkit.train.optimizers import Updates, open_updates
from peftkit.train.scoring import computing

STEPS = 2
"""Optimizer steps: its state is there from the second on."""


def simulate(
    recipe: Recipe,
    head: Head,
    *,
    lengths: Sequence[int],
    device: Literal["cuda", "cpu"] = "cuda",
    architecture: Architecture | None = None,
    config: Any = None,
) -> Simulation:
    """Memory and work of an optimizer step of a recipe over examples of these lengths, without a weight in memory.

    Args:
        head: that the task puts on the backbone.
        lengths: tokens of each example of the step; all of them carry loss.
        architecture: of the CUDA device; default: a common one.
        config: the backbone's transformers configuration; None reads it.

    Raises:
        InputError: a backbone in int8, which only exists on a device.
    """
    if recipe.backbone.quantization == "int8":
        raise InputError("backbone.quantization=int8 cannot be simulated. Set backbone.quantization=nf4 or none.")
    card = (architecture or Architecture()) if device == "cuda" else None
    config = read_config(recipe.backbone) if config is None else copy.deepcopy(config)
    if recipe.training.dropout is not None:
        set_dropout(config, recipe.training.dropout)
    scratch, workspace = (scratch_of(card), card.workspace_bytes) if card else (None, 0)
    tracker = StorageTracker(scratch, workspace_bytes=workspace)
    with quietly():
        skeleton = build_skeleton(config, head)
        dims = read_dims(config, skeleton, head)
        with fake_tensors(masked=True), _chosen_for(card), tracker:
            tracker.enter("load*")
            dtype = step_dtype(recipe.backbone, card)
            if recipe.backbone.quantization == "nf4":
                quantize_linears(skeleton, dtype, nested=True, skip=dims.head_modules)
            materialize(skeleton, dtype)
            skeleton.config.use_cache = False
            backbone = Backbone(skeleton, None, dims, recipe.backbone, recipe.backbone.name, dtype)
            run_steps(recipe, backbone, head, tracker, lengths=lengths, device=device)
    context = card.context_bytes if card else 0
    return summarize(tracker.stream, context_bytes=context, vocab=dims.vocab, on_card=card is not None)


def run_steps(
    recipe: Recipe,
    backbone: Backbone,
    head: Head,
    tracker: StorageTracker,
    *,
    lengths: Sequence[int],
    device: Literal["cuda", "cpu"],
) -> Adapted:
    """A few optimizer steps as the training loop takes them, under a tracker that is in place; tensors fake or real."""
    training = recipe.training
    adapted = recipe.method.attach(backbone)
    fast = FastPath.open(
        adapted.model, training.kernels, attention=recipe.backbone.attention, pad_id=0, say=lambda text: None
    )
    set_checkpointing(adapted.model, training.checkpointing)
    updates = open_updates(adapted.trainable(), training, adapted.rounding)
    task = open_task(recipe.task, head)
    saving = (
        saving_on_host(adapted.model, smallest_bytes=OFFLOADED_BYTES) if training.offload_activations else nullcontext()
    )
    tag_weights(tracker, adapted.model, adapted=adapted.artifact == "adapter")
    tracker.watch(adapted.model)
    adapted.model.train()
    features = [_example(length, head, row) for row, length in enumerate(lengths)]
    for step in range(STEPS):
        suffix = "" if step + 1 == STEPS else "*"
        _advance(adapted, task, fast, updates, recipe, tracker, features, saving, device=device, suffix=suffix)
    return adapted


def step_dtype(spec: BackboneSpec, card: Architecture | None) -> torch.dtype:
    """The dtype of activations on a card that need not be here, or on this host."""
    if card is None or spec.dtype != "auto":
        return compute_dtype(spec, "cpu")
    return torch.bfloat16 if card.capability >= (8, 0) else torch.float16


def _advance(
    adapted: Adapted,
    task: Task,
    fast: FastPath,
    updates: Updates,
    recipe: Recipe,
    tracker: StorageTracker,
    features: list[Features],
    saving: AbstractContextManager[object],
    *,
    device: str,
    suffix: str,
) -> None:
    """One optimizer step, as `Loop._advance` takes it."""
    training, host = recipe.training, torch.device("cpu")
    units = sum(example.loss_units for example in features)
    tracker.enter("forward" + suffix)
    total = torch.zeros(())
    batches = list(_batches(recipe, fast, features, device))
    for number, batch in enumerate(batches, start=1):
        if number == len(batches):
            updates.begin_last_micro_batch()
        tracker.enter("forward" + suffix)
        with fast.active():
            with computing(adapted, host), saving:
                summed = task.loss(
                    adapted.model, batch.to(host), smoothing=training.label_smoothing, fused=fast.fused_loss
                )
            tracker.enter("backward" + suffix)
            (summed / units).backward()  # type: ignore[no-untyped-call]
        total += summed.detach()
        del summed
    tag_gradients(tracker, adapted.model)
    tracker.enter("optimizer" + suffix)
    updates.gradient_norm()
    updates.finish()
    tag_state(tracker, updates.state_dict())


def _batches(recipe: Recipe, fast: FastPath, features: list[Features], device: str) -> Iterator[Any]:
    """How the loop cuts a step."""
    match recipe.training.micro_batch:
        case "auto":
            return fast.batches(features, max_tokens=AUTO_TOKENS.get(device, 8192))
        case int(count):
            return fast.batches(features, max_examples=count)
        case budget:
            return fast.batches(features, max_tokens=int(budget.split()[0]))


def _example(length: int, head: Head, row: int) -> Features:
    """An example of this length whose every token carries loss."""
    tokens = np.ones(length, dtype=np.int32)
    if head.kind == "language":
        target = tokens.copy()
        target[0] = IGNORED
        return Features(tokens, target, length - 1, row)
    if head.problem == "multi_label_classification":
        return Features(tokens, np.zeros(head.num_outputs, dtype=np.float32), 1, row)
    return Features(tokens, 0.0 if head.problem == "regression" else 0, 1, row)


@contextmanager
def _chosen_for(card: Architecture | None) -> Iterator[None]:
    """What this package's kernels choose by device, chosen as on the card although tensors call the host theirs."""
    if card is None:
        yield
        return

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **terms: Any) -> Any:
        plain = terms.get("softcap") is None and not terms.get("dropout") and terms.get("prefix") is None
        if not plain or query.dtype not in HALF:
            return attention.attend(module, query, key, value, mask, **terms)
        out = flash_attention(query, key, value, dropout=0.0, causal=bool(module.is_causal), scale=terms["scaling"])
        return out.transpose(1, 2), None

    def keep_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.bool).bernoulli_(1 - p)

    registered = {attention.PRODUCTS: attend, attention.FUSED: attend}
    with ExitStack() as stack:
        stack.enter_context(cuda_operators(card))
        stack.enter_context(patch.dict(AttentionInterface._global_mapping, registered))
        stack.enter_context(patch.object(loss, "CHUNK_BYTES", {}))
        for module in (attention, dropout):
            stack.enter_context(patch.object(module, "keep_mask", keep_mask))
        yield
