"""peftkit's own step on fake tensors: the model, method, task, kernels and optimizer that `train` would run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from peftkit.backbones.dims import read_dims
from peftkit.backbones.load import Backbone, build_skeleton, compute_dtype, read_config, set_dropout
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.errors import InputError
from peftkit.plan.align import Irregular
from peftkit.plan.collection import without_collection
from peftkit.plan.cuda_operators import Architecture, scratch_of
from peftkit.plan.depth import Depth, Trace, cuts_of, depth_of, shorten_config, shorten_recipe, trace_deep
from peftkit.plan.fake import fake_tensors, materialize, quantize_linears
from peftkit.plan.known import Streams, key_of
from peftkit.plan.on_card import chosen_for
from peftkit.plan.simulation import Simulation, summarize
from peftkit.plan.sizes import Size
from peftkit.plan.steps import run_steps
from peftkit.plan.storages import StorageTracker, Stream
from peftkit.recipe import Recipe


def simulate(
    recipe: Recipe,
    head: Head,
    *,
    sizes: Sequence[Size],
    first: Sequence[Size] = (),
    device: Literal["cuda", "cpu"] = "cuda",
    architecture: Architecture | None = None,
    config: Any = None,
    known: Streams | None = None,
) -> Simulation:
    """Memory and work of an optimizer step of a recipe over examples of these sizes, without a weight in memory.

    Args:
        head: that the task puts on the backbone.
        sizes: of the examples of the step.
        first: of the step before it, in which the optimizer has no state; default: the same.
        architecture: of the CUDA device; default: a common one.
        config: the backbone's transformers configuration; None reads it.
        known: streams of earlier simulations, which this one takes from and adds to.

    Raises:
        InputError: a backbone in int8, which only exists on a device, an activation cache without frozen layers, or a
            method whose tensors depend on values.
    """
    card = (architecture or Architecture()) if device == "cuda" else None
    config = read_config(recipe.backbone) if config is None else copy.deepcopy(config)
    context = card.context_bytes if card else 0
    vocab = config.get_text_config().vocab_size
    with without_collection(), _explained():
        depth, trace = open_trace(recipe, head, steps=(first or sizes, sizes), card=card, config=config, known=known)
        return summarize(trace_deep(depth, trace), context_bytes=context, vocab=vocab, on_card=card is not None)


@contextmanager
def _explained() -> Iterator[None]:
    """A step whose tensors depend on values, as one message."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as fault:
        raise InputError(
            f"this run cannot be planned: the sizes of its tensors depend on numbers that only a run has ({fault}). "
            "`peftkit train --no-plan` trains it without a plan."
        ) from fault


def open_trace(
    recipe: Recipe,
    head: Head,
    *,
    steps: Sequence[Sequence[Size]],
    card: Architecture | None,
    config: Any,
    known: Streams | None = None,
) -> tuple[Depth, Trace]:
    """How the layers of the recipe's model repeat, and what simulates its steps with some of them.

    Raises:
        InputError: a backbone in int8, which only exists on a device.
    """
    if recipe.backbone.quantization == "int8":
        raise InputError("backbone.quantization=int8 cannot be simulated. Set backbone.quantization=nf4 or none.")
    if recipe.training.dropout is not None:
        set_dropout(config, recipe.training.dropout)
    depth = depth_of(build_skeleton(config, head), config, cuts_of(recipe, config.get_text_config().num_hidden_layers))

    def trace(stretches: Sequence[int]) -> Stream:
        if stretches == depth.stretches:
            return _trace(recipe, head, config, depth, steps=steps, card=card)
        short = shorten_recipe(recipe, depth.layers_in(stretches))
        shallow = shorten_config(config, depth.num_layers(stretches))
        key = key_of(short, head, shallow, steps=steps, card=card)
        return (known or Streams()).get(key, lambda: _trace(short, head, shallow, depth, steps=steps, card=card))

    return depth, trace


def _trace(
    recipe: Recipe,
    head: Head,
    config: Any,
    depth: Depth,
    *,
    steps: Sequence[Sequence[Size]],
    card: Architecture | None,
) -> Stream:
    """The stream of the recipe's steps.

    Args:
        depth: of the model that this one stands in for.

    Raises:
        Irregular: it cannot stand in for it.
    """
    scratch, workspace = (scratch_of(card), card.workspace_bytes) if card else (None, 0)
    tracker = StorageTracker(scratch, workspace_bytes=workspace)
    with quietly():
        skeleton = build_skeleton(config, head)
        shortened = depth.is_shortened(skeleton, config)
        dims = read_dims(config, skeleton, head)
        with fake_tensors(masked=True), chosen_for(card, tracker), tracker:
            tracker.enter("load*")
            dtype = step_dtype(recipe.backbone, card)
            if recipe.backbone.quantization == "nf4":
                quantize_linears(skeleton, dtype, nested=True, skip=dims.head_modules)
            materialize(skeleton, dtype)
            skeleton.config.use_cache = False
            backbone = Backbone(skeleton, None, dims, recipe.backbone, recipe.backbone.name, dtype)
            device: Literal["cuda", "cpu"] = "cpu" if card is None else "cuda"
            ran = run_steps(recipe, backbone, head, tracker, steps=steps, device=device)
        stream = tracker.take()
    if shortened and ran.adapted.rounding is not None:
        raise Irregular  # its optimizer puts parameters of several layers into one bucket
    return stream


def step_dtype(spec: BackboneSpec, card: Architecture | None) -> torch.dtype:
    """The dtype of activations on a card that need not be here, or on this host."""
    if card is None or spec.dtype != "auto":
        return compute_dtype(spec, "cpu")
    return torch.bfloat16 if card.capability >= (8, 0) else torch.float16
