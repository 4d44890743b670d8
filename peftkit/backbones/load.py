"""Load a backbone: resolve its reference, read its dimensions, hold its weights in the recipe's numbers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftkit.backbones.dims import Dims, read_dims
from peftkit.backbones.packaged import PACKAGED, gguf_folder, is_unpacked, local_path
from peftkit.backbones.quiet import quietly
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.errors import BackboneError, nearest

logger = logging.getLogger(__name__)
IDENTIFYING = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "tie_word_embeddings",
    "rope_parameters",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded model with its head, its tokenizer, and where both came from.

    Attributes:
        folder: what transformers was given: a local folder, or a hub id.
        compute_dtype: dtype of activations; of the frozen weights too, unless they are quantized.
    """

    model: Any
    tokenizer: Any
    dims: Dims
    spec: BackboneSpec
    folder: str
    compute_dtype: torch.dtype


def load_backbone(
    spec: BackboneSpec, head: Head, *, device: str | torch.device = "cpu", dropout: float | None = None
) -> Backbone:
    """Load weights, tokenizer and head. A classification head that the files lack is initialised at random.

    Args:
        dropout: probability in the backbone's own dropout layers; None leaves what its configuration says.

    Raises:
        BackboneError: the reference cannot be resolved, or its files cannot be loaded under the recipe's terms.
    """
    folder = resolve(spec)
    config = read_config(spec)
    dims = dims_of(spec, head, config)
    if dropout is not None:
        set_dropout(config, dropout)
    tokenizer = load_tokenizer(spec)
    dtype = compute_dtype(spec, device)
    arguments: dict[str, Any] = {"dtype": dtype, "config": headed(config, head, tokenizer), "device_map": {"": device}}
    arguments |= _reference(spec) | {"use_safetensors": None if spec.pickled_weights else True}
    if spec.attention != "auto":
        arguments["attn_implementation"] = spec.attention
    if spec.quantization != "none":
        arguments["quantization_config"] = quantization_config(spec, dims, dtype)
    with _explained(spec), quietly():
        model, report = auto_class(head).from_pretrained(folder, **arguments, output_loading_info=True)
    fresh = [key for key in report["missing_keys"] if key.split(".")[0] not in dims.head_modules]
    if fresh:
        raise BackboneError(
            f"{spec.name} lacks {len(fresh)} weights of {type(model).__name__}, such as {fresh[0]}; "
            "they would stay random. Use a complete model of this architecture."
        )
    model.config.use_cache = False
    _keep_packing(model)
    _restore_head(model, folder, dims, report["missing_keys"])
    return Backbone(model=model, tokenizer=tokenizer, dims=dims, spec=spec, folder=folder, compute_dtype=dtype)


def load_tokenizer(spec: BackboneSpec, folder: Path | None = None) -> Any:
    """The tokenizer, with a padding token and padding on the right.

    Args:
        folder: whose tokenizer to take instead of the backbone's own.
    """
    with _explained(spec), quietly():
        if folder is not None:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        else:
            tokenizer = AutoTokenizer.from_pretrained(resolve(spec), **_reference(spec))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer


def resolve(spec: BackboneSpec) -> str:
    """The local folder of a packaged backbone, GGUF file or path; a hub id stays what it is.

    Raises:
        BackboneError: a path that is missing or holds no model, or a name that is none of these.
    """
    name = spec.name
    if name in PACKAGED:
        return str(local_path(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"backbone.name: there is no file {path}.")
        return str(gguf_folder(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f"backbone.name: {path} has no config.json; it is not a Hugging Face model folder.")
        return str(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise BackboneError(
        f"backbone.name: {name!r} is no folder, no .gguf file, no hub id (owner/model), and no packaged "
        f"backbone{nearest(name, list(PACKAGED))}. Packaged: {', '.join(PACKAGED)}."
    )


def read_config(spec: BackboneSpec) -> Any:
    """The transformers configuration, without fetching weights.

    For a packaged backbone that is not unpacked, and for a known hub id that cannot be reached, it is the copy that
    ships with peftkit.
    """
    from peftkit.backbones.configs import bundled_config

    bundled = bundled_config(spec.name)
    if bundled is not None and spec.name in PACKAGED and not is_unpacked(spec.name):
        return AutoConfig.from_pretrained(str(bundled))
    folder = resolve(spec)
    try:
        with _explained(spec):
            return AutoConfig.from_pretrained(folder, **_reference(spec))
    except BackboneError:
        if bundled is None:
            raise
        return AutoConfig.from_pretrained(str(bundled))


def is_on_disk(spec: BackboneSpec) -> bool:
    """Whether configuration and tokenizer can be read without fetching anything."""
    return is_unpacked(spec.name) or Path(spec.name).expanduser().exists()


def dims_of(spec: BackboneSpec, head: Head, config: Any = None) -> Dims:
    """The dimensions of a backbone with this head, from its configuration alone."""
    config = read_config(spec) if config is None else config
    return read_dims(config, build_skeleton(config, head), head)


def build_skeleton(config: Any, head: Head) -> Any:
    """The model of a configuration on the meta device: every shape, no storage."""
    with torch.device("meta"), quietly():
        return auto_class(head).from_config(headed(config, head, None))


def compute_dtype(spec: BackboneSpec, device: str | torch.device) -> torch.dtype:
    """The dtype of activations: the recipe's, or bfloat16 where the device multiplies it natively, else float32."""
    if spec.dtype != "auto":
        return DTYPES[spec.dtype]
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return torch.float32


def base_identity(backbone: Backbone) -> dict[str, Any]:
    """What an adapter was trained on: name, revision, and digests of the configuration and of one body weight."""
    return {
        "name": backbone.spec.name,
        "revision": backbone.spec.revision,
        "quantization": backbone.spec.quantization,
        "dtype": str(backbone.compute_dtype).removeprefix("torch."),
        "config_digest": config_digest(backbone.dims.config),
        "weights_digest": weights_digest(backbone.folder),
    }


def config_digest(config: Any) -> str:
    """Digest of the fields that shape a model; versions, names and labels do not count."""
    content = {key: config.to_dict().get(key) for key in IDENTIFYING}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(folder: str) -> str | None:
    """Digest over the safetensors files' headers and first MiB of data each; None for a hub id not on this disk."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            digest.update(file.read(size + 2**20))
    return digest.hexdigest()[:16] if files else None


def auto_class(head: Head) -> Any:
    return AutoModelForCausalLM if head.kind == "language" else AutoModelForSequenceClassification


def headed(config: Any, head: Head, tokenizer: Any) -> Any:
    """A copy of the configuration that asks for the head."""
    config = type(config).from_dict(config.to_dict())
    if head.kind == "classification":
        config.num_labels = head.num_outputs
        names = head.labels or ("value",)
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        config.problem_type = head.problem
        if tokenizer is not None and config.get_text_config().pad_token_id is None:
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return config


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability that this architecture's configuration has.

    Raises:
        BackboneError: it has none, so that the setting would be ignored.
    """
    text = config.get_text_config()
    names = [name for name in text.to_dict() if "dropout" in name or name.endswith("_pdrop")]
    if not names:
        raise BackboneError(
            f"training.dropout={dropout} would be ignored: {config.model_type} has no dropout. Leave it out."
        )
    for name in names:
        if name != "classifier_dropout" or getattr(text, name) is not None:
            setattr(text, name, dropout)


def quantization_config(spec: BackboneSpec, dims: Dims, dtype: torch.dtype) -> Any:
    """What transformers is asked to quantize by."""
    from transformers import BitsAndBytesConfig

    skip = list(dims.head_modules) or None
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _keep_packing(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew in the first evaluation on a processor with bfloat16 products.

    That layout is for inference: it multiplies in bfloat16 whatever the recipe says, and narrow layers have none.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _restore_head(model: Any, folder: str, dims: Dims, missing: list[str]) -> None:
    """Read a trained head again in float32: it was trained and saved so, and loading rounded it to the body's dtype."""
    from safetensors import safe_open

    wanted = {name for name, _ in model.named_parameters() if name.split(".")[0] in dims.head_modules} - set(missing)
    for path in sorted(Path(folder).glob("*.safetensors")) if wanted and Path(folder).is_dir() else []:
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                model.get_parameter(name).data = file.get_tensor(name).to(model.device)
    for name in dims.head_modules if wanted else ():
        for module in model.get_submodule(name).modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(match_input_dtype)


def match_input_dtype(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook of linear layers wider than the body around them: takes inputs of any float dtype."""
    if torch.is_autocast_enabled(args[0].device.type):
        return args
    return (args[0].to(module.weight.dtype), *args[1:])  # type: ignore[arg-type]


def _reference(spec: BackboneSpec) -> dict[str, Any]:
    if spec.remote_code:
        logger.warning("%s: running Python code that ships with the model (backbone.remote_code is true)", spec.name)
    if spec.pickled_weights:
        logger.warning("%s: pickled weights are accepted; loading them can run code", spec.name)
    return {"trust_remote_code": spec.remote_code} | ({"revision": spec.revision} if spec.revision else {})


@contextmanager
def _explained(spec: BackboneSpec) -> Iterator[None]:
    """What transformers and the hub raise, as one message with its remedy."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as fault:
        text = " ".join(str(fault).split())
        if "trust_remote_code" in text:
            remedy = "It ships its own Python code; read it, then set backbone.remote_code=true."
        elif "safetensors" in text or ".bin" in text:
            remedy = "If its weights are pickles that you trust, set backbone.pickled_weights=true."
        elif "gated" in text.lower() or "401" in text or "403" in text:
            remedy = "It is gated or private: accept its terms on the hub and log in with `hf auth login`."
        elif Path(spec.name).exists() or spec.name in PACKAGED:
            remedy = "Check the files in that folder."
        else:
            remedy = (
                "Check the name and the network, or use a local folder or a packaged backbone: "
                + ", ".join(PACKAGED)
                + "."
            )
        raise BackboneError(f"backbone {spec.name} cannot be loaded: {text[:300]} {remedy}") from fault
