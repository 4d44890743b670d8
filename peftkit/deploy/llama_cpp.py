"""llama.cpp as a judge of GGUF files: its own server, in a process of its own, asked over loopback.

A file that llama.cpp cannot digest ends its process, not ours. The server renders the file's chat template and
tokenizes by the file's vocabulary, so what is compared is what a user of the file gets.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from peftkit.errors import InputError, VerificationFailed

INSTALL = "python -m pip install 'peftkit[export]'"
CONTEXT = 1024
"""Tokens of the engine's cache: enough for the prompts it is asked."""
ANSWER_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Completion:
    """A greedy answer.

    Attributes:
        tokens: ids, up to the stop token and with it.
        likeliest: at each step, the most likely tokens with the logarithm of their probability; empty where it tells
            none.
    """

    tokens: tuple[int, ...]
    likeliest: tuple[dict[int, float], ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """A running server with one model."""

    address: str
    key: str
    opener: OpenerDirector

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation through the file's own chat template, up to where the assistant begins to answer."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def tokenize(self, text: str) -> list[int]:
        """Ids of a prompt, as they are made of the text that a user sends: with BOS where the file asks for it."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", asked)["tokens"]]

    def complete(self, prompt: Sequence[int], *, max_tokens: int, likeliest: int) -> Completion:
        """The likeliest next token each time, with the probabilities of `likeliest` tokens at each step."""
        tokens, told = self._predict(prompt, max_tokens, likeliest)
        if len(told) != len(tokens):
            # of a token that ends inside a character it tells no probabilities: asked alone, each has its own or none
            steps = [self._predict([*prompt, *tokens[:index]], 1, likeliest)[1] for index in range(len(tokens))]
            told = [step[0] if step else {} for step in steps]
        return Completion(tuple(tokens), tuple(told))

    def _predict(
        self, prompt: Sequence[int], max_tokens: int, likeliest: int
    ) -> tuple[list[int], list[dict[int, float]]]:
        asked = {"prompt": list(prompt), "n_predict": max_tokens, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
        asked |= {"n_probs": likeliest, "return_tokens": True, "cache_prompt": False, "repeat_penalty": 1.0}
        answered = self._post("/completion", asked)
        steps = answered.get("completion_probabilities", [])
        told = [{int(each["id"]): float(each["logprob"]) for each in step["top_logprobs"]} for step in steps]
        return [int(token) for token in answered["tokens"]], told

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = Request(self.address + path, json.dumps(content).encode(), headers)
        try:
            with self.opener.open(request, timeout=ANSWER_SECONDS) as reply:
                answer: dict[str, Any] = json.load(reply)
        except HTTPError as fault:
            raise VerificationFailed(f"llama.cpp refuses {path}: {fault.read().decode()[:300]}") from fault
        except OSError as fault:
            raise VerificationFailed(f"llama.cpp ended while it was asked {path}: {fault}") from fault
        return answer


def is_installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return find_spec("xllamacpp") is not None


def require_engine(reason: str) -> None:
    """Refuse to go on without llama.cpp.

    Raises:
        InputError: it is not installed.
    """
    if not is_installed():
        raise InputError(f"{reason}. Install it: {INSTALL}")


@contextmanager
def open_engine(model: Path, lora: Path | None = None, *, context: int = CONTEXT) -> Iterator[Engine]:
    """Start llama.cpp on a GGUF file, with a LoRA on it; everything is computed and cached in float32 where it can be.

    Raises:
        VerificationFailed: it cannot load the file.
    """
    key = secrets.token_urlsafe(24)
    settings = {"model": str(model), "lora": str(lora) if lora else None, "context": context, "key": key}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "peftkit.deploy.llama_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = _start(process.stdin, process.stdout, settings)
            if not address:
                process.wait()
                said.seek(0)
                raise VerificationFailed(f"llama.cpp cannot load {model.name}: {_last_words(said.read())}")
            yield Engine(address, key, build_opener(ProxyHandler({})))
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _start(asked: IO[str], answered: IO[str], settings: dict[str, Any]) -> str:
    """The address that the server listens at; nothing when it ended."""
    try:
        asked.write(json.dumps(settings) + "\n")
        asked.flush()
    except BrokenPipeError:
        return ""
    return answered.readline().strip()


def _last_words(log: str) -> str:
    """The lines of llama.cpp's log that say what went wrong."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return "; ".join((told or lines or ["it said nothing"])[-3:])[:500]
