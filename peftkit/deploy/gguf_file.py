"""Write a model, or a LoRA alone, as one GGUF file, tensor by tensor: no more than one of them is in memory.

The tensors come from the safetensors files as they lie; `gguf_layout` says what the engine wants them to be.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftkit.deploy.gguf_kinds import KINDS, ggml_quantize, mixed_type
from peftkit.deploy.gguf_layout import Layout, describe_architecture, is_left_out, place, rotation_factors
from peftkit.deploy.gguf_vocab import read_vocabulary, write_vocabulary
from peftkit.errors import BackboneError, MethodError

if TYPE_CHECKING:
    import numpy as np

    from peftkit.deploy.parts import Adapter

_FILE_TYPES = {"f32": "ALL_F32"} | {kind: f"MOSTLY_{kind.upper()}" for kind in KINDS if kind != "f32"}
_FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
METADATA_BYTES = 32 * 2**20
"""Room for the vocabulary in front of the tensors."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk, as far as it is read before its weights.

    Attributes:
        stops: ids of the tokens that end an answer.
        layout: how llama.cpp sees its architecture.
    """

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    stops: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Planned:
    """One tensor to be written: where it goes, what it becomes, and how it is read."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        import gguf

        return int(prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind)))


def own_kind(model: Model) -> str:
    """The kind that holds the weights as they are."""
    return _FLOATS.get(str(model.config.dtype).removeprefix("torch."), "f32")


def file_bytes(model: Model, kind: str) -> int:
    """About how large the file of a model becomes."""
    with _tensors(model.folder) as sources:
        return METADATA_BYTES + sum(planned.num_bytes for planned in _plan(model, kind, sources))


def write_model(model: Model, kind: str, path: Path) -> list[str]:
    """Write a model to `path`; returns what a user should know, in words.

    Raises:
        BackboneError: a tokenizer or a tensor that llama.cpp does not know.
    """
    import gguf

    with _tensors(model.folder) as sources:
        planned = _plan(model, kind, sources)
        rows = next(each.shape[0] for each in planned if each.name == "token_embd.weight")
        vocabulary = read_vocabulary(model.tokenizer, rows, model.name)
        writer = gguf.GGUFWriter(str(path), model.layout.arch)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model.name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes = describe_architecture(writer, model.layout, model.config, rows)
        write_vocabulary(writer, vocabulary, model.tokenizer, model.stops)
        _write(writer, planned)
    narrower = sorted({each.kind.name for each in planned if len(each.shape) > 1})
    if len(narrower) > 1:
        notes.append(f"rows of some widths do not fit {kind}: the matrices are held in {', '.join(narrower)}")
    return notes


def write_lora(adapter: Adapter, model: Model, path: Path) -> None:
    """Write a LoRA alone, to be put on the model's file by the engine.

    Raises:
        MethodError: it is more than B and A of the blocks' linear layers.
    """
    import gguf

    reason = adapter.impurity or (f"it holds {next(iter(adapter.saved))}, trained whole" if adapter.saved else None)
    if reason:
        raise MethodError(
            f"{adapter.path} cannot be written as a GGUF LoRA: {reason}. Merge it, and export the model: "
            f"peftkit merge {adapter.path} --out MERGED; peftkit export MERGED --to gguf."
        )
    names = _name_map(model)
    writer = gguf.GGUFWriter(str(path), model.layout.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config.lora_alpha))
    writer.add_name(adapter.name)
    planned: list[_Planned] = []
    for module, factors in adapter.unscaled.items():
        written = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if written is None or not written.startswith("blk."):
            raise MethodError(
                f"{adapter.path} changes {module}, for which llama.cpp takes no LoRA. Merge it, and export the model."
            )
        # the engine scales by alpha / rank alone: patterns and rsLoRA are folded into B, where they differ from it
        stretch = adapter.scaling(module) * factors.rank / float(adapter.config.lora_alpha)
        up = place(model.layout, model.config, f"{module}.weight", factors.up_OR.float() * stretch)
        for end, tensor in (("lora_a", factors.down_RI.float()), ("lora_b", up)):
            planned.append(_Planned(f"{written}.{end}", tuple(tensor.shape), _types()["f32"], _holding(tensor)))
    _write(writer, planned)


def _plan(model: Model, kind: str, sources: Mapping[str, Any]) -> list[_Planned]:
    names, planned = _name_map(model), []
    blocks = int(model.config.num_hidden_layers)
    tied = bool(model.config.tie_word_embeddings)
    for name, source in sources.items():
        if is_left_out(model.config, name):
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise BackboneError(
                f"{model.name} holds {name}, for which llama.cpp's {model.layout.arch} has no place. Export a plain "
                "causal model: a merged one, without a classification head."
            )
        shape = tuple(source.get_slice(name).get_shape())
        chosen = _kind_of(kind, written, shape, blocks=blocks, tied=tied)
        planned.append(_Planned(written, shape, chosen, _reader(model, source, name)))
    for name, factors in rotation_factors(model.layout, model.config).items():
        planned.append(_Planned(name, tuple(factors.shape), _types()["f32"], _holding(factors)))
    return planned


def _kind_of(kind: str, name: str, shape: tuple[int, ...], *, blocks: int, tied: bool) -> Any:
    """GGML's type of a tensor: float32 for vectors, the wanted one for matrices whose rows it divides, else a wider."""
    import gguf

    types = _types()
    if len(shape) < 2 or kind == "f32":
        return types["f32"]
    if kind == "q4_k_m":
        return mixed_type(name, shape[-1], blocks=blocks, tied=tied)
    return types[kind] if shape[-1] % gguf.GGML_QUANT_SIZES[types[kind]][0] == 0 else types["f16"]


def _types() -> dict[str, Any]:
    import gguf

    return {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in KINDS if kind != "q4_k_m"}


def _holding(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _reader(model: Model, source: Any, name: str) -> Callable[[], Tensor]:
    return lambda: place(model.layout, model.config, name, source.get_tensor(name))


def _write(writer: Any, planned: list[_Planned]) -> None:
    """Header, then one tensor after the other."""
    import gguf
    import numpy as np

    for each in planned:
        if each.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            number = np.float32 if each.kind == gguf.GGMLQuantizationType.F32 else np.float16
            writer.add_tensor_info(each.name, each.shape, np.dtype(number), each.num_bytes)
        else:
            shape = gguf.quant_shape_to_byte_shape(each.shape, each.kind)
            writer.add_tensor_info(each.name, shape, np.dtype(np.uint8), each.num_bytes, each.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in planned:
        writer.write_tensor_data(_encoded(each.read().float().contiguous().numpy(), each.kind))
    writer.close()


def _encoded(values: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    import gguf

    if kind.name.endswith("_K"):
        return ggml_quantize(values, kind)
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(values, kind)
    return encoded


def _name_map(model: Model) -> Any:
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model.layout.arch)
    return gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Each tensor's name with the opened file that holds it, in the order of the files.

    Raises:
        BackboneError: no safetensors, or a shard that the index names and that is not there.
    """
    from contextlib import ExitStack

    from safetensors import SafetensorError, safe_open

    logging.getLogger("gguf").setLevel(logging.WARNING)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for shard in shards:
            path = folder / shard
            if not path.is_file():
                raise BackboneError(
                    f"{folder} has no {shard}. Only whole models in safetensors are exported; load it with "
                    "transformers and save it again, or point to a merged model."
                )
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as fault:
                raise BackboneError(f"{path} cannot be read: {fault}. Fetch or merge it again.") from fault
            found |= dict.fromkeys(file.keys(), file)
        yield found
