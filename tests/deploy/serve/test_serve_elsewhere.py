"""Engines with servers of their own: the command lines they are given, and what they are not asked to serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkit.deploy.serve import elsewhere
from peftkit.deploy.serve.elsewhere import choose, llama_command, vllm_command
from peftkit.deploy.serve.options import Address, Limits, Menu
from peftkit.errors import InputError

FAKE = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY")}))
"""


@pytest.fixture
def adapters(make_lora: Any, tmp_path: Path) -> dict[str, Path]:
    return {"low": make_lora(tmp_path / "low", rank=4), "high": make_lora(tmp_path / "high", rank=20)}


def test_vllm_is_told_base_adapters_limits_and_the_key_out_of_sight(
    tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    menu = Menu(str(tiny_llama), "tiny", adapters)
    command = vllm_command(menu, Address("0.0.0.0", 9000, "secret"), Limits(tokens=400, new_tokens=100))
    assert command.arguments == (
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_llama)),
        *("--host", "0.0.0.0", "--port", "9000", "--served-model-name", "tiny"),
        *("--override-generation-config", '{"max_new_tokens": 100}', "--max-model-len", "400"),
        *("--enable-lora", "--max-lora-rank", "32", "--max-loras", "2", "--lora-modules"),
        *(f"low={adapters['low']}", f"high={adapters['high']}"),
    )
    assert command.environment == {"VLLM_API_KEY": "secret"}
    assert "secret" not in repr(command)


def test_an_adapter_alone_is_served_by_its_name_on_its_base(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    command = vllm_command(Menu(str(adapters["low"]), "mine", {}), Address(), Limits())
    assert str(tiny_llama) in command.arguments
    assert f"mine={adapters['low']}" in command.arguments
    assert command.environment == {}


def test_the_process_becomes_vllm_with_its_arguments_and_the_key(tiny_llama: Path, tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(FAKE)
    code = (
        "from peftkit.deploy.serve.elsewhere import Command; import sys\n"
        "Command((sys.executable, '-m', 'vllm.entrypoints.cli.main', 'serve', 'x'), {'VLLM_API_KEY': 'secret'})"
        ".replace_process()"
    )
    settings = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"arguments": ["serve", "x"], "key": "secret"}


def test_what_vllm_cannot_serve_is_served_here_or_refused_where_vllm_was_asked_for(
    make_peft: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PrefixTuningConfig

    prefix = make_peft(tmp_path / "prefix", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    monkeypatch.setattr(elsewhere, "installed", lambda package: True)
    menu, told = Menu(str(prefix), "prefix", {}), list[str]()
    settings: dict[str, Any] = {"cuda": True, "say": told.append}
    assert choose("auto", menu, Address(), Limits(), **settings) is None
    assert "it is a PREFIX_TUNING adapter, and only LoRA is known" in told[0]
    with pytest.raises(InputError, match="only LoRA is known"):
        choose("vllm", menu, Address(), Limits(), **settings)
    plain = Menu(str(tiny_llama), "tiny", {})
    assert choose("auto", plain, Address(), Limits(), **settings) is not None
    with pytest.raises(InputError, match="--max-requests would be ignored by vLLM"):
        choose("vllm", plain, Address(), Limits(requests=3), **settings)
    assert choose("transformers", plain, Address(), Limits(), **settings) is None


def test_engines_that_are_not_here_say_how_to_get_them(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    menu = Menu(str(tiny_llama), "tiny", {})
    monkeypatch.setattr(elsewhere, "installed", lambda package: False)
    for engine, told in (("vllm", "pip install vllm"), ("llama-cpp", "pip install 'llama-cpp-python")):
        with pytest.raises(InputError, match=told):
            choose(engine, menu, Address(), Limits(), cuda=True, say=print)
    assert choose("auto", menu, Address(), Limits(), cuda=True, say=print) is None
    monkeypatch.setattr(elsewhere, "installed", lambda package: True)
    with pytest.raises(InputError, match="needs a CUDA device"):
        choose("vllm", menu, Address(), Limits(), cuda=False, say=print)


def test_a_gguf_file_is_served_by_llama_cpp_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    monkeypatch.setattr(elsewhere, "installed", lambda package: package == "llama_cpp")
    command = choose("auto", Menu(str(path), "m", {}), Address(key="k"), Limits(tokens=9), cuda=False, say=print)
    assert command is not None
    assert command.arguments[1:] == (
        *("-m", "llama_cpp.server", "--model", str(path), "--model_alias", "m", "--host", "127.0.0.1"),
        *("--port", "8000", "--n_ctx", "9", "--api_key", "k"),
    )
    with pytest.raises(InputError, match="serves GGUF files"):
        llama_command(Menu(str(tmp_path), "m", {}), Address(), Limits())
    with pytest.raises(InputError, match="no adapters by name"):
        llama_command(Menu(str(path), "m", {"a": path}), Address(), Limits())
