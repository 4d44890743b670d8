"""What stands before the endpoint, around an application that only says hello."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from peftkit.deploy.serve.guard import Guard
from peftkit.deploy.serve.metrics import Metrics
from peftkit.deploy.serve.options import Address, Limits, check_key, is_loopback
from peftkit.errors import InputError

WORK = "/v1/completions"


class Hello:
    """Reads the body, waits until it may answer, says hello."""

    def __init__(self) -> None:
        self.read: list[bytes] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.entered = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            self.read.append((await receive())["body"])
        self.entered.set()
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})


def guarded(app: Any, *, base: str = "http://127.0.0.1:8000", **settings: Any) -> httpx.AsyncClient:
    usual: dict[str, Any] = {"key": None, "limits": Limits(), "metrics": Metrics(), "closing": lambda: False}
    guard = Guard(app, **{**usual, **settings})
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=base)


async def statuses(client: httpx.AsyncClient, *paths: str, **settings: Any) -> list[int]:
    return [(await client.get(path, **settings)).status_code for path in paths]


def test_with_a_key_only_the_watchers_paths_are_open() -> None:
    async def ask() -> None:
        client = guarded(Hello(), key="secret", base="http://example.org")
        paths = ("/health", "/ready", "/metrics", "/v1/models")
        assert await statuses(client, *paths) == [200, 200, 401, 401]
        assert await statuses(client, *paths, headers={"Authorization": "Bearer secret"}) == [200] * 4
        assert await statuses(client, "/v1/models", headers={"Authorization": "Bearer secrets"}) == [401]
        assert await statuses(client, "/v1/models", headers={"Authorization": "secret"}) == [401]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("base", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost", 200),
        ("http://[::1]:8000", 200),
        ("http://evil.example:8000", 403),
        ("http://127.0.0.1.evil.example", 403),
    ],
)
def test_without_a_key_no_other_name_is_answered(base: str, status: int) -> None:
    assert asyncio.run(statuses(guarded(Hello(), base=base), "/v1/models")) == [status]


def test_while_closing_nothing_new_is_taken_and_the_connection_is_given_up() -> None:
    async def ask() -> None:
        answer = await guarded(Hello(), closing=lambda: True).post(WORK, content=b"{}")
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert answer.json()["error"]["message"] == "the server is shutting down"

    asyncio.run(ask())


def test_a_body_too_large_is_refused_declared_or_not() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 10

    async def ask() -> None:
        app = Hello()
        client = guarded(app, limits=Limits(body_bytes=100))
        assert (await client.post(WORK, content=b"x" * 101)).status_code == 413
        assert (await client.post(WORK, content=pieces())).status_code == 413
        assert app.read == [], "the application never saw them"
        assert (await client.post(WORK, content=b"x" * 100)).status_code == 200
        assert app.read == [b"x" * 100]

    asyncio.run(ask())


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def ask() -> None:
        client = guarded(Hello(), limits=Limits(body_seconds=0.01))
        assert (await client.post(WORK, content=never())).status_code == 408

    asyncio.run(ask())


def test_more_requests_than_the_limit_are_turned_away_until_one_is_answered() -> None:
    async def ask() -> None:
        app = Hello()
        app.may_answer.clear()
        metrics = Metrics()
        client = guarded(app, limits=Limits(requests=1), metrics=metrics)
        first = asyncio.create_task(client.post(WORK, content=b"1"))
        await app.entered.wait()
        second = await client.post(WORK, content=b"2")
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        app.may_answer.set()
        assert (await first).status_code == 200
        assert (await client.post(WORK, content=b"3")).status_code == 200
        assert app.read == [b"1", b"3"]
        assert 'peftkit_requests_refused_total{reason="busy"} 1.0' in metrics.text().decode()
        assert "peftkit_requests_in_flight 0.0" in metrics.text().decode()

    asyncio.run(ask())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_elsewhere_than_on_loopback_a_key_is_needed(host: str) -> None:
    with pytest.raises(InputError, match="needs an API key"):
        check_key(Address(host))
    check_key(Address(host, key="secret"))


def test_loopback_needs_none_and_a_key_must_fit_a_header() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"))
    check_key(Address())
    for key in ("", " ", "schlüssel", "two\nlines"):
        with pytest.raises(InputError, match="printable ASCII"):
            check_key(Address(key=key))
    assert "secret" not in repr(Address(key="secret"))
