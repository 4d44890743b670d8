"""An adapter on a base that is not in memory: every shape, the adapter's own numbers, and weights that come on demand.

PEFT puts its layers on a hollow model as on any other, whatever the method: what the layers share, their patterns of
rank and alpha, and their formulas stay PEFT's own. One module at a time is then given the weights it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.dims import Dims
from peftkit.backbones.hollow import build_hollow, is_hollow
from peftkit.backbones.load import DTYPES, Backbone, dims_of, load_tokenizer, read_config
from peftkit.backbones.spec import BackboneSpec, Head, Quantization
from peftkit.deploy.adapter import INSIDE, Source, attach, resized, saved_shapes
from peftkit.deploy.parts import REWRITES_BASE
from peftkit.deploy.rounding import through_codes
from peftkit.deploy.weights import NotByTensor, WeightFiles, folder_of, open_weights, saved_names
from peftkit.errors import BackboneError

REFOUND = ("pissa", "olora")
"""Those initialisations that rewrite the frozen weights from nothing but these."""


@dataclass(frozen=True, eq=False)
class Hollow:
    """A model whose weights are on disk.

    Attributes:
        base: the transformers model, hollow.
        adapted: the `PeftModel` around it; the model itself where there is no adapter.
        files: where the weights lie.
        dtype: what floating weights are held in.
        codes: names of the weights that quantized layers hold.
        quantization: of those.
        transposed: names of weights that are [in, out], as GPT-2's layers have them.
        state: parameters and stored buffers by the base's own names, tied ones under each of theirs.
        targets: the name that each of them has in files.
        given: tensors of the base that the adapter brings along: resized embeddings, biases.
        start: the initialisation that rewrites the frozen weights, where there is one.
    """

    base: Any
    adapted: Any
    files: WeightFiles
    dtype: torch.dtype
    codes: frozenset[str]
    quantization: Quantization
    transposed: frozenset[str]
    state: Mapping[str, Tensor]
    targets: Mapping[str, str]
    given: frozenset[str]
    start: str | None

    def read(self, name: str) -> Tensor:
        """A tensor of the base in the numbers the adapter was trained on: float32, rounded to the dtype, dequantized.

        Raises:
            NotByTensor: the files do not have it.
        """
        return self.widened(name, self.held(name))

    def held(self, name: str) -> Tensor:
        """A tensor of the base in the dtype that it is held in.

        Raises:
            NotByTensor: the files do not have it.
        """
        stored = self.stored_name(name)
        if stored is None:
            raise NotByTensor(f"{self.files.folder} lacks {name}")
        found = self.files.places[stored].read()
        return found.to(self.dtype) if found.is_floating_point() else found

    def widened(self, name: str, held: Tensor) -> Tensor:
        """What such a tensor stands for, in float32."""
        if not held.is_floating_point():
            return held
        if name not in self.codes:
            return held.float()
        if name in self.transposed:
            return through_codes(held.T.contiguous(), self.quantization).T.contiguous()
        return through_codes(held, self.quantization)

    def stored_name(self, name: str) -> str | None:
        """The name under which the files have a tensor: its own, or that of one it is tied to."""
        return next((other for other in (name, *self.tied(name)) if other in self.files.places), None)

    def tied(self, name: str) -> list[str]:
        """All names of one tensor, in the model's order."""
        return self.by_identity[id(self.state[name])] if name in self.state else [name]

    def name_of(self, parameter: Tensor) -> str | None:
        """The base's name of a parameter; None for one of the adapter's own."""
        return self.by_identity.get(id(parameter), [None])[0]

    @cached_property
    def by_identity(self) -> dict[int, list[str]]:
        """The names of each tensor of the base, by its identity."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            names.setdefault(id(tensor), []).append(name)
        return names

    @contextmanager
    def filled(self, module: nn.Module, grid: dict[str, Tensor] | None = None) -> Iterator[dict[str, nn.Parameter]]:
        """Give the weights of the base to everything inside `module`; yields them by name. They are gone afterwards.

        Args:
            grid: gets the weights that lie on the grid of a narrow dtype, in that dtype.
        """
        held: dict[str, nn.Parameter] = {}
        before: dict[str, Tensor] = {}
        for parameter in module.parameters():
            name = self.name_of(parameter)
            if name is None or not (name in self.given or self.stored_name(name)):
                continue
            held[name], before[name] = parameter, parameter.data
            narrow = parameter.data.clone() if name in self.given else self.held(name)
            parameter.data = self.widened(name, narrow)
            if grid is not None and narrow.dtype != torch.float32 and name not in self.codes:
                grid[name] = narrow
        if self.start is not None:
            self._rewrite(module)
        try:
            yield held
        finally:
            for name, parameter in held.items():
                parameter.data = before[name]

    def _rewrite(self, module: nn.Module) -> None:
        """Take out of the frozen weights what the adapter's initialisation took, and leave the adapter as trained."""
        from peft.tuners.lora import LoraLayer

        for layer in module.modules():
            if not isinstance(layer, LoraLayer):
                continue
            for name in layer.active_adapters:
                factors = (layer.lora_A[name].weight, layer.lora_B[name].weight)
                trained = [factor.data for factor in factors]
                if str(self.start).startswith("pissa"):
                    layer.pissa_init(name, self.start)
                else:
                    layer.olora_init(name)
                layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = trained


def open_hollow(source: Source, *, quantization: Quantization | None = None) -> tuple[Hollow, Backbone]:
    """The base of an adapter, hollow, with the adapter on it; and the same as a backbone, for `check_base`.

    Args:
        quantization: what the weights are read through; None takes the adapter's own.

    Raises:
        BackboneError: damaged files, or an adapter that does not fit this base.
        NotByTensor: only the whole model in memory will do.
    """
    spec, head = source.spec, source.head
    start = _start_of(source)
    dims, tokenizer = dims_of(spec, head), load_tokenizer(spec)
    base = build_hollow(resized(source, dims.config), head, tokenizer)
    held = spec.quantization if quantization is None else quantization
    codes = _quantized(base, dims) if held != "none" else []
    given = _make_room(source, base.state_dict(keep_vars=True))
    hollow = _lay_out(base, folder_of(spec), DTYPES[spec.dtype], frozenset(codes), held, given)
    hollow = replace(hollow, start=start)
    _require_body(hollow, dims, spec)
    backbone = Backbone(base, tokenizer, dims, spec, str(hollow.files.folder), hollow.dtype)
    hollow = replace(hollow, adapted=attach(source, backbone, config=_neutral(source) if start else None))
    for name, tensor in hollow.state.items():
        if isinstance(tensor, nn.Parameter) and name not in hollow.given and not is_hollow(tensor):
            raise NotByTensor(f"putting {source.config.peft_type.value} on a base changes its weights, {name} first")
    return hollow, backbone


def open_plain(folder: Path, head: Head, dtype: torch.dtype) -> Hollow:
    """A model in a folder, hollow, without an adapter."""
    config = read_config(BackboneSpec(name=str(folder)))
    return _lay_out(build_hollow(config, head), folder, dtype, frozenset(), "none", frozenset())


def _lay_out(
    base: Any,
    folder: Path,
    dtype: torch.dtype,
    codes: frozenset[str],
    quantization: Quantization,
    given: frozenset[str],
) -> Hollow:
    from transformers.pytorch_utils import Conv1D

    files = open_weights(folder, base, replaced=given)
    state = base.state_dict(keep_vars=True)
    transposed = {f"{path}.weight" for path, module in base.named_modules() if isinstance(module, Conv1D)}
    return Hollow(
        base=base,
        adapted=base,
        files=files,
        dtype=dtype,
        codes=codes,
        quantization=quantization,
        transposed=frozenset(transposed),
        state=state,
        targets=saved_names(base, list(state)),
        given=given,
        start=None,
    )


def _require_body(hollow: Hollow, dims: Dims, spec: BackboneSpec) -> None:
    """See that the files have every weight but those of a new head.

    Raises:
        BackboneError: they lack some.
    """
    absent = [
        name
        for name, tensor in hollow.state.items()
        if isinstance(tensor, nn.Parameter)
        and name not in hollow.given
        and name.split(".")[0] not in dims.head_modules
        and hollow.stored_name(name) is None
    ]
    if absent:
        raise BackboneError(
            f"{spec.name} lacks {len(absent)} weights of {type(hollow.base).__name__}, such as {absent[0]}. "
            "Use a complete model of this architecture."
        )


def _start_of(source: Source) -> str | None:
    """The initialisation that rewrites the frozen weights whenever this adapter is loaded.

    Raises:
        NotByTensor: one that needs more than each weight by itself.
    """
    start = getattr(source.config, "init_lora_weights", None)
    if not isinstance(start, str) or not start.startswith(REWRITES_BASE):
        return None
    if start.startswith(REFOUND):
        return start
    raise NotByTensor(f"init_lora_weights={start} changes the frozen weights")


def _neutral(source: Source) -> Any:
    """The adapter's configuration without its initialisation."""
    config = copy(source.config)
    config.init_lora_weights = True
    return config


def _make_room(source: Source, state: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the base's own tensors that the adapter's file has; they get storage to be loaded into."""
    saved = {name.removeprefix(INSIDE).replace(".base_layer.", ".") for name in saved_shapes(source)}
    under = {name.replace(".original_module.", ".") for name in saved if ".original_module." in name}
    whole = tuple(f".{module}." for module in getattr(source.config, "modules_to_save", None) or ())
    beside = {name for name in saved if not any(word in f".{name}" for word in whole)}
    brought = [name for name in state if name in beside or name in under]
    for name in brought:
        if is_hollow(state[name]):
            state[name].data = torch.empty(state[name].shape)
    return frozenset(name for name, tensor in state.items() if any(tensor is state[other] for other in brought))


def _quantized(base: Any, dims: Dims) -> list[str]:
    """The weights that transformers would quantize, chosen by its own rules."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(base, list(dims.head_modules) or None, base._keep_in_fp32_modules)
    return [
        f"{path}.weight"
        for path, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(path, skipped)
    ]
