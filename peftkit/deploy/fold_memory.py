"""Fold an adapter with the whole model in memory: what is left for architectures and methods that files alone won't do.

The base is loaded as transformers loads it, PEFT folds all of it in float32, and every parameter is rounded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit.cache import file_sha256
from peftkit.deploy.adapter import Onto, Source, attach, check_base, fold, touched_modules
from peftkit.deploy.fold import Folded
from peftkit.deploy.rounding import dequantize, round_parameters, snapshot, to_float32
from peftkit.deploy.sides import with_weights
from peftkit.errors import InputError


def fold_in_memory(source: Source, folder: Path, *, onto: Onto) -> Folded:
    """Write the merged model's weights, configuration and generation settings into `folder`.

    Args:
        onto: which weights of a quantized base the merged model gets.

    Raises:
        MethodError: the method has no fold.
        BackboneError: the base is not the adapter's, or cannot be loaded.
        InputError: it was to be quantized again.
    """
    from peftkit.backbones.load import load_backbone
    from peftkit.backbones.quiet import quietly

    if onto == "requantized":
        raise InputError(
            f"--onto requantized writes tensor by tensor, and {source.spec.name} needs to be folded whole."
        )
    backbone = load_backbone(source.spec, source.head)
    recognised = check_base(source, backbone)
    dtype, dims = backbone.compute_dtype, backbone.dims
    if source.spec.quantization != "none":
        codes = {} if onto == "original" else dequantize(backbone.model)
        del backbone
        backbone = with_weights(source.spec, source.head, codes)
    grid = snapshot(backbone.model, dtype)
    adapted = to_float32(attach(source, backbone))
    modules = touched_modules(adapted)
    model: Any = fold(source, adapted)
    dithered = round_parameters(model, dtype, grid)
    model.config.dtype = dtype
    model.config.use_cache = dims.config.to_dict().get("use_cache", True)
    with quietly():
        model.save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    return Folded(
        recognised=recognised,
        dtype=dtype,
        num_params=dims.num_params,
        modules=len(modules),
        dithered=dithered,
        digests={file.name: file_sha256(file) for file in files},
        num_bytes=sum(file.stat().st_size for file in files),
    )
