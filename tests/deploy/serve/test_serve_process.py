"""The verb in a process of its own: what it prints, how it ends, what it refuses before it loads anything."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from peftkit.cli import main


def test_a_signal_lets_running_answers_finish_and_nothing_new_in(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "peftkit.cli", "serve", str(tiny_llama), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        assert (found["models"], found["engine"]) == (["tiny-llama"], "transformers continuous batching")
        client = OpenAI(base_url=found["url"] + "/v1", api_key="any", max_retries=0)
        messages = [{"role": "user", "content": "Say something long."}]
        whole = client.chat.completions.create(model="tiny-llama", messages=messages, max_tokens=300)
        parts = client.chat.completions.create(model="tiny-llama", messages=messages, max_tokens=300, stream=True)
        said = [next(parts).choices[0].delta.content or ""]
        process.send_signal(signal.SIGTERM)
        said += [part.choices[0].delta.content or "" for part in parts]
        assert "".join(said) == whole.choices[0].message.content
        client.close()
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == "", "one JSON document, and nothing else"
        with pytest.raises(httpx.ConnectError):
            httpx.get(found["url"] + "/health")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny", "--host", "0.0.0.0"], "needs an API key"),
        (["tiny", "--adapter", "runs/a"], "say NAME=DIR"),
        (["tiny", "--adapter", "tiny=runs/a"], "the name of another model"),
        (["tiny", "--engine", "vllm"], "vLLM is not installed"),
        (["nowhere/at/all", "--port", "0"], "is no folder"),
    ],
)
def test_wrong_input_ends_at_once_with_the_remedy(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEFTKIT_API_KEY", raising=False)
    assert main(["serve", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_loaded(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(tiny_llama), "--port", str(taken.getsockname()[1])]) == 2
    said = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1" in said
    assert "loading" not in said
