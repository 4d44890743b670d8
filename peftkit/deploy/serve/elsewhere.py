"""Engines that bring a server of their own: how peftkit's flags are said to vLLM and to llama.cpp's server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peftkit.deploy.serve.options import Address, Limits, Menu
from peftkit.errors import InputError

if TYPE_CHECKING:
    from peftkit.deploy.adapter import Source

EngineName = Literal["auto", "transformers", "vllm", "llama-cpp"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments, what its environment holds beside ours, and what is to be said before it starts."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def replace_process(self) -> None:
        """Become that program; signals reach it as they are."""
        os.execvpe(self.arguments[0], list(self.arguments), {**os.environ, **self.environment})


def choose(
    wanted: EngineName, menu: Menu, address: Address, limits: Limits, *, cuda: bool, say: Callable[[str], None]
) -> Command | None:
    """The program that serves the menu; None: peftkit itself, on transformers.

    Raises:
        InputError: the engine that was asked for is not here, or cannot serve this.
    """
    if wanted == "transformers":
        return None
    gguf = menu.reference.endswith(".gguf")
    if wanted == "llama-cpp" or (wanted == "auto" and gguf and installed("llama_cpp")):
        _require(installed("llama_cpp"), "llama-cpp-python is not installed: pip install 'llama-cpp-python[server]'.")
        return _unless_refused(wanted, lambda: llama_command(menu, address, limits), say)
    if wanted == "vllm" or (wanted == "auto" and not gguf and cuda and installed("vllm")):
        _require(installed("vllm"), "vLLM is not installed: pip install vllm.")
        _require(cuda, "vLLM needs a CUDA device, and there is none.")
        return _unless_refused(wanted, lambda: vllm_command(menu, address, limits), say)
    return None


def vllm_command(menu: Menu, address: Address, limits: Limits) -> Command:
    """How vLLM is started for the menu. It has metrics, health and an orderly end of its own.

    Raises:
        InputError: what vLLM cannot serve, or a limit that it does not know.
    """
    from peftkit.backbones.load import resolve
    from peftkit.deploy.usable import gather

    _require_unset(limits, "vLLM")
    sources, base = gather(menu.reference, menu.adapters, menu.name)
    spec = base if base is not None else next(iter(sources.values())).spec
    _require(spec.quantization == "none", f"vLLM is not told how to hold {spec.name} in {spec.quantization}.")
    for source in sources.values():
        obstacle = _vllm_obstacle(source)
        _require(obstacle is None, f"vLLM cannot serve {source.adapter}: {obstacle}. Merge it, or serve it here.")
    program = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", resolve(spec))
    arguments = [*program, "--host", address.host, "--port", str(address.port)]
    arguments += ["--served-model-name", menu.name if base is not None else Path(spec.name).name]
    arguments += ["--override-generation-config", json.dumps({"max_new_tokens": limits.new_tokens})]
    arguments += [] if limits.tokens is None else ["--max-model-len", str(limits.tokens)]
    if sources:
        rank = max(_rank(source) for source in sources.values())
        modules = [f"{name}={source.adapter.absolute()}" for name, source in sources.items()]
        arguments += ["--enable-lora", "--max-lora-rank", str(next(known for known in VLLM_RANKS if known >= rank))]
        arguments += ["--max-loras", str(len(modules)), "--lora-modules", *modules]
    systems = [
        f"note: {name} was trained with a system message, which vLLM does not add: clients have to send it"
        for name, source in sources.items()
        if source.recipe is not None and getattr(source.recipe.task, "system", None)
    ]
    secret = {} if address.key is None else {"VLLM_API_KEY": address.key}
    return Command(tuple(arguments), secret, tuple(systems))


def llama_command(menu: Menu, address: Address, limits: Limits) -> Command:
    """How llama-cpp-python's server is started for a GGUF file.

    Raises:
        InputError: it is no such file, adapters were named, or a limit that it does not know.
    """
    _require_unset(limits, "llama.cpp's server")
    path = Path(menu.reference)
    _require(path.suffix == ".gguf" and path.is_file(), f"llama.cpp serves GGUF files, and {path} is none.")
    _require(not menu.adapters, "llama.cpp's server takes no adapters by name: merge them, or --engine transformers.")
    arguments = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--model_alias", menu.name]
    arguments += ["--host", address.host, "--port", str(address.port)]
    arguments += ["--n_ctx", str(limits.tokens or 0)]  # 0: what the file says
    arguments += [] if address.key is None else ["--api_key", address.key]
    return Command(tuple(arguments), notes=("note: llama.cpp's server has no /metrics and no /ready",))


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def _unless_refused(wanted: EngineName, compose: Callable[[], Command], say: Callable[[str], None]) -> Command | None:
    """The command; where the engine was not asked for by name, None with the reason told."""
    try:
        return compose()
    except InputError as fault:
        if wanted != "auto":
            raise
        say(f"served by transformers here: {fault}")
        return None


def _vllm_obstacle(source: Source) -> str | None:
    """What of an adapter vLLM does not take; None for nothing."""
    config = source.config
    if config.peft_type.value != "LORA":
        return f"it is a {config.peft_type.value} adapter, and only LoRA is known"
    if source.head.kind != "language":
        return "it is a classifier"
    told = {"use_dora": "DoRA", "modules_to_save": "modules saved whole", "trainable_token_indices": "trained tokens"}
    known = next((what for key, what in told.items() if getattr(config, key, None)), None)
    if known is None and config.bias != "none":
        known = "trained biases"
    if known is None and _rank(source) > VLLM_RANKS[-1]:
        known = f"a rank above {VLLM_RANKS[-1]}"
    return None if known is None else f"it has {known}"


def _rank(source: Source) -> int:
    return int(max([source.config.r, *(source.config.rank_pattern or {}).values()]))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _require_unset(limits: Limits, engine: str) -> None:
    usual = Limits()
    for flag, is_set in {
        "--max-requests": limits.requests != usual.requests,
        "--max-body": limits.body_bytes != usual.body_bytes,
    }.items():
        _require(not is_set, f"{flag} would be ignored by {engine}. Leave it out, or --engine transformers.")
