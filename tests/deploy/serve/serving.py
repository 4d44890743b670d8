"""A server on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI, OpenAI

from peftkit.deploy.generate import write_answer
from peftkit.deploy.serve.app import Service, build_app
from peftkit.deploy.usable import Usable

LENGTH = 12
"""Tokens of an answer, if not said otherwise."""


def asked(number: int) -> list[dict[str, str]]:
    """A prompt like no other."""
    return [{"role": "user", "content": f"Say something about the number {number}, and no more."}]


def alone(usable: Usable, numbers: Sequence[int]) -> list[str]:
    """What the model itself answers to each prompt, one after another, without any server."""
    tokens = [write_answer(usable, usable.conversation(asked(number)), max_new_tokens=LENGTH) for number in numbers]
    return [usable.tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd") for answer in tokens]


def ask_all(url: str, questions: Sequence[tuple[str, int]], *, stream: bool = False, **settings: Any) -> list[str]:
    """The answers to (model, number) pairs, all asked at the same time by the real client."""

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:

            async def one(model: str, number: int) -> str:
                said: Any = {"max_tokens": LENGTH, "temperature": 0, **settings}
                made = await client.chat.completions.create(model=model, messages=asked(number), stream=stream, **said)
                if not stream:
                    return str(made.choices[0].message.content)
                return "".join([part.choices[0].delta.content or "" async for part in made])

            return list(await asyncio.gather(*[one(*question) for question in questions]))

    return asyncio.run(together())


class Running:
    """A server that runs: its service, its address, and clients of it."""

    def __init__(self, service: Service, url: str, server: uvicorn.Server) -> None:
        self.service, self.url, self.server = service, url, server

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    def post(self, path: str, **settings: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=30, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **settings)


@contextmanager
def running(service: Service, *, key: str | None = None) -> Iterator[Running]:
    """Serve what is in the service, until the block ends."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server: uvicorn.Server
    app = build_app(service, key=key, closing=lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    bound.listen()
    thread.start()
    try:
        yield Running(service, f"http://127.0.0.1:{bound.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        thread.join()
