"""The step of a plain transformers and PEFT trainer on fake tensors: how published runs of others are predicted.

It differs from peftkit's own step: the loss holds full logits, the cache may be on, adapters take float32 inputs, and
batches are padded and masked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone, build_skeleton
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.errors import InputError
from peftkit.plan.collection import without_collection
from peftkit.plan.cuda_operators import Architecture, cuda_operators, scratch_of
from peftkit.plan.depth import depth_of, shorten_config, singles_out, trace_deep
from peftkit.plan.fake import fake_tensors, is_packable, materialize, quantize_linears
from peftkit.plan.kinds import tag_gradients, tag_state, tag_weights
from peftkit.plan.on_card import paged, quantized_optimizers
from peftkit.plan.simulation import Simulation, summarize
from peftkit.plan.sizes import Size
from peftkit.plan.storages import StorageTracker, Stream
from peftkit.recipe import Recipe

LAYER_SETTINGS = ("target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "adapter_layers")
"""Of PEFT's configurations, those that may name or count layers."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What another trainer does, as far as it decides memory.

    Attributes:
        lengths: tokens of every example of each optimizer step; the last step is the one reported.
        adapter: PEFT's configuration; None trains all weights.
        optimizer: as a recipe names it, or torch's plain SGD.
        narrow_adapters: adapters stay in the weights' dtype, which PEFT would widen to float32.
        attention: transformers' name of the implementation.
        repeat_heads: keys and values are repeated for each query head before fused attention.
        loads_on_device: transformers loads straight onto the device, into one block that it asks for beforehand.
        padded: batches have padding, so attention gets a mask.
        cache: keys and values of every layer are kept with the outputs.
        keeps_outputs: the outputs of a step are alive until those of the next take their place.
        clip: the gradient's norm is clipped.
        empties_cache: after every step, with its gradients still there.
    """

    batch: int
    lengths: tuple[int, ...]
    adapter: Any = None
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "sgd"] = "adamw"
    narrow_adapters: bool = False
    precision: Literal["fp16", "bf16", "fp32"] = "bf16"
    quantization: Literal["none", "nf4"] = "none"
    double_quantization: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    repeat_heads: bool = False
    checkpointing: bool = False
    loads_on_device: bool = True
    padded: bool = False
    cache: bool = False
    keeps_outputs: bool = False
    clip: bool = False
    empties_cache: bool = False
    architecture: Architecture = field(default_factory=Architecture)


def settings_of(
    recipe: Recipe, dims: Dims, config: Any, *, sizes: Sequence[Size], architecture: Architecture
) -> PeerSettings:
    """What a plain trainer makes of a recipe: forwards padded to their longest example, full logits, the cache on.

    Args:
        sizes: of the examples of the step that needs most.

    Raises:
        InputError: a task without a language head, or int8.
    """
    if dims.head.kind != "language":
        raise InputError("--as peer knows trainers of language models: the task must be chat or completion.")
    if recipe.backbone.quantization == "int8":
        raise InputError("backbone.quantization=int8 cannot be simulated. Set backbone.quantization=nf4 or none.")
    training = recipe.training
    batch = training.micro_batch if isinstance(training.micro_batch, int) else len(sizes)
    checkpointing = training.checkpointing not in ("auto", "off")
    return PeerSettings(
        batch=batch,
        lengths=(max(sizes).tokens,) * 2,
        adapter=_adapter_of(recipe, dims, config),
        optimizer=training.optimizer,
        precision=_precision(recipe, architecture),
        quantization=recipe.backbone.quantization,
        double_quantization=True,
        checkpointing=checkpointing,
        padded=True,
        cache=not checkpointing,  # transformers turns it off where layers are recomputed
        clip=training.clip is not None,
        architecture=architecture,
    )


def _adapter_of(recipe: Recipe, dims: Dims, config: Any) -> Any:
    """PEFT's configuration of the recipe's method; None where the model's own weights train."""
    skeleton = build_skeleton(config, LANGUAGE_HEAD)
    backbone = Backbone(skeleton, None, dims, recipe.backbone, recipe.backbone.name, torch.float32)
    adapted = recipe.method.attach(backbone)
    if adapted.artifact != "adapter":
        return None
    configs: Any = adapted.model.peft_config
    return configs["default"]


def _precision(recipe: Recipe, architecture: Architecture) -> Literal["fp16", "bf16", "fp32"]:
    if recipe.backbone.dtype == "auto":
        return "bf16" if architecture.capability >= (8, 0) else "fp16"
    names: dict[str, Literal["fp16", "bf16", "fp32"]] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    return names[recipe.backbone.dtype]


def simulate_peer(settings: PeerSettings, config: Any) -> Simulation:
    """Memory of the step of `settings` for the model of a transformers configuration, on a CUDA device."""
    options = {} if settings.adapter is None else settings.adapter.to_dict()
    named = {key: options.get(key) for key in LAYER_SETTINGS}
    depth = depth_of(build_skeleton(config, Head("language")), config, None if singles_out(named) else [])

    def trace(stretches: Sequence[int]) -> Stream:
        short = shorten_config(config, depth.num_layers(stretches))
        depth.is_shortened(build_skeleton(short, Head("language")), short)
        return _trace(replace(settings, adapter=copy.deepcopy(settings.adapter)), short)

    with without_collection():
        stream = trace_deep(depth, trace)
        return summarize(stream, context_bytes=settings.architecture.context_bytes, vocab=config.vocab_size)


def _trace(settings: PeerSettings, config: Any) -> Stream:
    """The stream of the steps; the adapter's configuration is filled in."""
    architecture = settings.architecture
    tracker = StorageTracker(scratch_of(architecture), workspace_bytes=architecture.workspace_bytes)
    with (
        quietly(),
        fake_tensors(masked=settings.padded),
        cuda_operators(architecture, repeat_heads=settings.repeat_heads),
        quantized_optimizers(tracker),
        tracker,
    ):
        tracker.enter("load*")
        model = _build_model(settings, config)
        tag_weights(tracker, model, adapted=settings.adapter is not None)
        tracker.watch(model)
        tracker.empty_cache()
        _train(settings, model, tracker, config.vocab_size)
    return tracker.take()


def _build_model(settings: PeerSettings, config: Any) -> Any:
    """The model as such a trainer prepares it: loaded, quantized, with its adapter, set to train."""
    config._attn_implementation = settings.attention
    dtype = DTYPES[settings.precision]
    model = build_skeleton(config, Head("language"))
    model.config._attn_implementation = settings.attention
    if settings.loads_on_device:
        _ask_beforehand(model, dtype, quantized=settings.quantization == "nf4")
    if settings.quantization == "nf4":
        quantize_linears(model, dtype, nested=settings.double_quantization)
    materialize(model, dtype)
    model.config.use_cache = settings.cache
    if settings.adapter is not None:
        import peft

        if settings.quantization == "nf4":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.checkpointing)
        widened = not settings.narrow_adapters
        model = peft.get_peft_model(model, settings.adapter, autocast_adapter_dtype=widened)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _ask_beforehand(model: Any, dtype: torch.dtype, *, quantized: bool) -> None:
    """One block of the size of all weights, freed at once: the allocator then cuts them out of it."""
    output = model.get_output_embeddings()
    inner = {id(m.weight) for m in model.modules() if quantized and is_packable(m) and m is not output}
    sizes = [p.numel() // 2 if id(p) in inner else p.numel() * dtype.itemsize for p in model.parameters()]
    torch.empty(sum(sizes), dtype=torch.uint8)


def _open_optimizer(settings: PeerSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own with whole lists of tensors at once, as it chooses on a card, or bitsandbytes'."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, foreach=True)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, foreach=True)
    from bitsandbytes.optim import AdamW8bit

    built: torch.optim.Optimizer = AdamW8bit(parameters)
    return paged(built, settings.optimizer) if settings.optimizer.startswith("paged") else built


def _train(settings: PeerSettings, model: nn.Module, tracker: StorageTracker, vocab: int) -> None:
    """Optimizer steps in the order that such scripts take them."""
    optimizer = _open_optimizer(settings, [p for p in model.parameters() if p.requires_grad])
    kept: list[Any] = []
    for number, length in enumerate(settings.lengths, start=1):
        suffix = "" if number == len(settings.lengths) else "*"
        optimizer.zero_grad(set_to_none=True)
        tracker.enter("forward" + suffix)
        tokens = torch.randint(0, vocab, (settings.batch, length))
        inputs = {"input_ids": tokens, "labels": tokens.clone()}
        if settings.padded:
            inputs["attention_mask"] = torch.ones_like(tokens)
        outputs = model(**inputs)
        kept[:] = [outputs] if settings.keeps_outputs else []
        tracker.enter("backward" + suffix)
        outputs.loss.backward()
        tag_gradients(tracker, model)
        tracker.enter("optimizer" + suffix)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tag_state(tracker, optimizer.state_dict())
        del outputs, inputs, tokens
        if settings.empties_cache:
            tracker.empty_cache()
