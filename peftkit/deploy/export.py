"""From a model or an adapter on disk to the files of another engine, and the check that these answer alike.

    gguf    MODEL -> name-q8_0.gguf           ADAPTER -> name-lora.gguf
    ollama  MODEL -> the same + Modelfile     ADAPTER -> base.gguf, name-lora.gguf, Modelfile
    onnx    MODEL -> model.onnx or decode.onnx, weights and tokenizer

Nothing stands at the output folder before the check has passed; a rejected export leaves its report alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftkit import __version__
from peftkit.backbones.load import load_backbone, load_tokenizer, read_config, resolve
from peftkit.backbones.packaged import PACKAGED
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import BackboneSpec
from peftkit.deploy.gguf_file import Model, file_bytes, own_kind, write_lora, write_model
from peftkit.deploy.gguf_layout import LAYOUTS, find_layout
from peftkit.deploy.llama_cpp import require_engine
from peftkit.deploy.ollama import read_wraps, write_modelfile
from peftkit.deploy.parity import NOT_INSTALLED, Parity, check_gguf, obstacle, read_back, unchecked
from peftkit.deploy.parts import Adapter, read_adapter, require_free
from peftkit.errors import BackboneError, InputError, MethodError, OutputError, VerificationFailed
from peftkit.files import staged_folder, write_json
from peftkit.folder import HEAD_NAME
from peftkit.record import Part
from peftkit.units import format_bytes

if TYPE_CHECKING:
    from peftkit.deploy.adapter import Source

REPORT_NAME = "export_report.json"
REJECTED_SUFFIX = ".rejected"
Target = Literal["gguf", "ollama", "onnx"]
FLOAT_BYTES = 4
CHAT_CONTEXT = 4096
"""Tokens that Ollama keeps for a conversation, unless the model holds fewer."""


class ExportReport(Part):
    """What was written, and how far it is from torch. `kind` says how the matrices are held; `files` are in bytes."""

    peftkit_version: str
    source: str
    to: Target
    out: str
    status: Literal["ok", "rejected"]
    architecture: str
    kind: str
    files: dict[str, int]
    parity: Parity
    notes: list[str]
    wall_seconds: float


@dataclass(frozen=True, slots=True)
class _Input:
    """What an export starts from: a whole model's folder, and the adapter on it where it is one."""

    name: str
    folder: Path
    adapter: Adapter | None = None
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class _Made:
    """What an export put into its folder, before the report."""

    parity: Parity
    notes: list[str]


def export(
    reference: str | Path,
    to: Target,
    out: str | Path | None = None,
    *,
    kind: str | None = None,
    base: str | None = None,
    parity: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write a merged model, a run, an adapter or a packaged backbone for another engine; check it, return the report.

    Args:
        out: the folder; default NAME-TO in the current one.
        kind: how a GGUF file holds its matrices; default: as the weights are.
        base: the base of an adapter, where it doesn't know it or it has moved.
        parity: whether the file is asked the same as the model in torch.

    Raises:
        InputError: no such model, an architecture or tokenizer that the engine does not know, an output in use.
        VerificationFailed: the files don't answer like the model.
    """
    started = time.perf_counter()
    given = _read_input(reference, base)
    out = Path(out or f"{given.name}-{to}").absolute()
    require_free(out)
    if to == "onnx":
        if kind not in (None, "f32"):
            raise InputError(f"--kind {kind} would be ignored: ONNX graphs are written in f32. Leave it out.")
        config, kind, make = _prepare_onnx(given, out, parity, say)
    else:
        config, kind, make = _prepare_gguf(given, to, out, kind, parity, say)
    with staged_folder(out) as staging:
        made = make(staging)
        files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
        report = ExportReport(
            peftkit_version=__version__,
            source=str(reference),
            to=to,
            out=str(out),
            status="rejected" if made.parity.status == "failed" else "ok",
            architecture=(config.architectures or ["?"])[0],
            kind=kind,
            files=files,
            parity=made.parity,
            notes=made.notes,
            wall_seconds=time.perf_counter() - started,
        )
        if report.status == "rejected":
            rejected = out.with_name(out.name + REJECTED_SUFFIX) / REPORT_NAME
            write_json(rejected, report.model_dump(mode="json", exclude_none=True))
            raise VerificationFailed(
                f"the exported files do not answer like {reference}: {'; '.join(made.parity.failures)}. "
                f"Nothing was written to {out}; {rejected} has the numbers."
            )
        write_json(staging / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
    return report


def _read_input(reference: str | Path, base: str | None) -> _Input:
    """The folder of the model, and the adapter where the reference is one."""
    path = Path(reference).expanduser()
    if (path / "adapter_config.json").is_file() or (path / "adapter" / "adapter_config.json").is_file():
        return _read_adapter_input(path, base)
    if base is not None:
        raise InputError(f"--base would be ignored: {reference} is a whole model. Leave it out.")
    whole = path / "model" if (path / "model" / "config.json").is_file() else path
    folder = _local(str(whole) if path.exists() else str(reference))
    name = path.absolute().name if path.is_dir() else path.stem if path.suffix == ".gguf" else str(reference)
    return _Input(name, folder)


def _read_adapter_input(path: Path, base: str | None) -> _Input:
    from peftkit.deploy.adapter import read_source

    adapter, source = read_adapter(path), read_source(path, base)
    return _Input(adapter.name, _local(source.spec.name), adapter, source)


def _local(name: str) -> Path:
    folder = Path(resolve(BackboneSpec(name=name)))
    if not folder.is_dir():
        raise BackboneError(
            f"{name} is not on this disk, and an export reads every weight. Fetch it first (hf download {name}), and "
            f"give the folder. Packaged backbones have a name: {', '.join(PACKAGED)}."
        )
    return folder


def _prepare_gguf(
    given: _Input, to: Target, out: Path, kind: str | None, parity: bool, say: Callable[[str], None]
) -> tuple[Any, str, Callable[[Path], _Made]]:
    """The configuration, the kind, and what writes the files, once all is known to be well."""
    if given.source is not None and given.source.head.kind != "language":
        raise MethodError(
            f"{given.name} is a classifier, which llama.cpp does not run. Merge it, and export it with --to onnx."
        )
    model = read_model(given.folder, given.name, given.adapter.folder if given.adapter else None)
    if given.adapter is not None and to == "gguf" and kind not in (None, "f32"):
        raise InputError(f"--kind {kind} would be ignored: a LoRA alone is written in f32. Leave it out.")
    held = kind or ("f32" if given.adapter is not None and to == "gguf" else own_kind(model))
    if held == "q4_k_m":
        require_engine("q4_k_m is quantized by llama.cpp itself, which is not installed")
    wraps = read_wraps(model.tokenizer, given.name) if to == "ollama" else None
    whole = file_bytes(model, held)
    require_room(out, whole)
    num_bytes = file_bytes(model, "f32")

    def make(staging: Path) -> _Made:
        lora = None if given.adapter is None else staging / f"{given.name}-lora.gguf"
        file = staging / (f"{given.name}-{held}.gguf" if lora is None else f"base-{held}.gguf")
        notes: list[str] = []
        reason = obstacle(num_bytes, wanted=parity)
        if lora is not None and given.adapter is not None:
            write_lora(given.adapter, model, lora)
            notes += _adapter_notes(given)
        if lora is None or to == "ollama" or reason is None:
            say(f"writing {format_bytes(whole)} of {held}")
            notes += write_model(model, held, file)
        found = _check(given, model, held, file, lora, reason, say)
        if wraps is not None:
            stops = [model.tokenizer.convert_ids_to_tokens(token) for token in model.stops]
            context = min(CHAT_CONTEXT, model.config.max_position_embeddings)
            adapter = lora.name if lora else None
            write_modelfile(staging, model=file.name, adapter=adapter, wraps=wraps, stops=stops, context=context)
        elif lora is not None:
            file.unlink(missing_ok=True)  # the base was written to be asked with the LoRA on it
        return _Made(found, notes)

    return model.config, held, make


def read_model(folder: Path, name: str, adapter: Path | None = None) -> Model:
    """A causal model's configuration, tokenizer and stop tokens, where llama.cpp knows its architecture.

    Args:
        adapter: a folder whose tokenizer, where it has one, comes before the model's.

    Raises:
        BackboneError: an architecture that is not supported, or files that cannot be read.
    """
    from transformers import AutoTokenizer, GenerationConfig

    spec = BackboneSpec(name=str(folder))
    config = read_config(spec)
    layout = find_layout(config, name)
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    else:
        tokenizer = load_tokenizer(spec)
    given = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        given = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    listed = given if isinstance(given, list) else [given]
    stops = dict.fromkeys(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
    return Model(name, folder, config, tokenizer, tuple(stops), layout)


def _check(
    given: _Input,
    model: Model,
    kind: str,
    file: Path,
    lora: Path | None,
    reason: str | None,
    say: Callable[[str], None],
) -> Parity:
    """Parity with llama.cpp where there is one; what another reader makes of the file where there is none."""
    if reason is not None and (lora is not None or reason != NOT_INSTALLED):
        return unchecked(reason)
    say("asking torch and llama.cpp the same" if reason is None else f"reading the file back: {reason}")
    torch_model = _load_torch(given)
    if reason is None:
        return check_gguf(torch_model, model.tokenizer, kind, file, lora)
    found = read_back(torch_model, model.tokenizer, kind, file)
    if found is None:
        return unchecked(reason)
    status: Literal["failed", "not checked"] = "failed" if found.status == "failed" else "not checked"
    return found.model_copy(update={"status": status, "reason": reason})


def _load_torch(given: _Input) -> Any:
    """The model in float32, with its adapter."""
    from peftkit.deploy.adapter import attach, check_base
    from peftkit.deploy.onnx_graph import load_model

    if given.source is None:
        return load_model(given.folder, read_config(BackboneSpec(name=str(given.folder))), given.name)
    plain = {"dtype": "float32", "quantization": "none"}
    backbone = load_backbone(given.source.spec.model_copy(update=plain), given.source.head)
    check_base(given.source, backbone)
    with quietly():
        return attach(given.source, backbone)


def _adapter_notes(given: _Input) -> list[str]:
    assert given.source is not None
    held = given.source.spec.quantization
    if held == "none":
        return []
    return [
        f"it was trained over {held} weights, and an engine puts it on others: merge it to keep its answers "
        f"(peftkit merge {given.name} --out MERGED)"
    ]


def _prepare_onnx(
    given: _Input, out: Path, parity: bool, say: Callable[[str], None]
) -> tuple[Any, str, Callable[[Path], _Made]]:
    from peftkit.deploy import onnx_graph

    onnx_graph.require_exporter()
    if given.adapter is not None:
        raise MethodError(
            f"an ONNX graph has no place for an adapter. Merge it first: peftkit merge {given.adapter.path} --out "
            "MERGED, then export MERGED."
        )
    spec = BackboneSpec(name=str(given.folder))
    config = read_config(spec)
    num_bytes = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    require_room(out, FLOAT_BYTES // max(1, config.dtype.itemsize if config.dtype else FLOAT_BYTES) * num_bytes)

    def make(staging: Path) -> _Made:
        tokenizer = load_tokenizer(spec)
        model = onnx_graph.load_model(given.folder, config, given.name)
        causal = type(model).__name__ in LAYOUTS or type(model).__name__.endswith("ForCausalLM")
        say("tracing the model")
        onnx_graph.write_graph(model, tokenizer, staging, causal=causal)
        if (given.folder / HEAD_NAME).is_file():
            shutil.copyfile(given.folder / HEAD_NAME, staging / HEAD_NAME)
        if not parity:
            return _Made(unchecked("left out (--no-parity)"), [])
        say("asking torch and ONNX Runtime the same")
        return _Made(onnx_graph.check_graph(model, tokenizer, staging, causal=causal), [])

    return config, "f32", make


def require_room(out: Path, num_bytes: int) -> None:
    """Refuse a disk that is too full.

    Raises:
        OutputError: it has less free than the files need.
    """
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.is_dir())).free
    if free < num_bytes:
        raise OutputError(
            f"{out.parent} has {format_bytes(free)} free and the export needs {format_bytes(num_bytes)}. Choose "
            "another --out or a narrower --kind, or free space there."
        )
