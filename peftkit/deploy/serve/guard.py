"""What stands before the endpoint: the key, the limits, the count, and the door that closes at the end."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from peftkit.deploy.serve.metrics import Metrics
from peftkit.deploy.serve.options import Limits, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key and while closing, for whoever watches over the process."""
WORK_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/classify"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    reason: str
    message: str


class Guard:
    """ASGI middleware. Without a key only names of this machine are served, so that no web page can reach it."""

    def __init__(
        self, app: Any, *, key: str | None, limits: Limits, metrics: Metrics, closing: Callable[[], bool]
    ) -> None:
        self._app, self._key, self._limits = app, key, limits
        self._metrics, self._closing = metrics, closing
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await self._refuse(send, refusal)
        elif path in WORK_PATHS and scope["method"] == "POST":
            await self._work(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is None:
            host = urlsplit("//" + headers.get(b"host", "")).hostname or ""
            if not is_loopback(host):
                return Refusal(403, "host", f"this server answers to localhost alone, not to {host!r}")
        elif not hmac.compare_digest(headers.get(b"authorization", "").encode(), f"Bearer {self._key}".encode()):
            return Refusal(401, "key", "an API key is needed: Authorization: Bearer KEY")
        if self._closing():
            return Refusal(503, "closing", "the server is shutting down")
        return None

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._in_flight >= self._limits.requests:
            await self._refuse(send, Refusal(429, "busy", f"{self._limits.requests} requests are being answered"))
            return
        started, status, path = time.perf_counter(), 500, scope["path"]
        self._in_flight += 1
        self._metrics.in_flight.inc()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(scope, receive)
            if isinstance(body, Refusal):
                status = body.status
                await self._refuse(send, body)
            else:
                await self._app(scope, _replaying(body, receive), watched)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Refusal:
        """The whole body, or why it is not taken."""
        most = self._limits.body_bytes
        too_large = Refusal(413, "body", f"the request is larger than {most} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            return too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return Refusal(408, "gone", "the client has gone")
                    content += message.get("body", b"")
                    if len(content) > most:
                        return too_large
                    if not message.get("more_body", False):
                        return bytes(content)
        except TimeoutError:
            return Refusal(408, "slow", f"the request took longer than {self._limits.body_seconds:g} seconds to arrive")

    async def _refuse(self, send: Send, refusal: Refusal) -> None:
        self._metrics.refused.labels(refusal.reason).inc()
        content = json.dumps(error_document(refusal.message, refusal.reason)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        headers += [(b"retry-after", b"1")] if refusal.status in (429, 503) else []
        headers += [(b"www-authenticate", b"Bearer")] if refusal.status == 401 else []
        headers += [(b"connection", b"close")] if refusal.status in (408, 413, 503) else []
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def error_document(message: str, code: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what the connection says."""
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay
