"""The endpoint: OpenAI's routes for text, `/classify` for labels, and what watches over a server."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from peftkit.deploy.serve.classifier import Classifier
from peftkit.deploy.serve.engine import Ask, Engine, EngineFault
from peftkit.deploy.serve.guard import Guard, error_document
from peftkit.deploy.serve.metrics import Metrics
from peftkit.deploy.serve.options import Limits
from peftkit.deploy.serve.schema import ChatRequest, ClassifyRequest, CompletionRequest, Sampled
from peftkit.deploy.serve.text import TextStream
from peftkit.deploy.usable import Usable
from peftkit.errors import InputError, nearest

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Served:
    """A model by its name, with what answers for it: an engine, or a classifier."""

    name: str
    usable: Usable
    engine: Engine | None = None
    classifier: Classifier | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def worker(self) -> Engine | Classifier:
        """Whichever answers."""
        worker = self.engine or self.classifier
        assert worker is not None
        return worker


@dataclass(slots=True)
class Service:
    """Everything that is served. `models` is empty until they are loaded."""

    limits: Limits
    metrics: Metrics = field(default_factory=Metrics)
    models: dict[str, Served] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What no longer answers."""
        return [f"{name}: {one.worker.fault}" for name, one in self.models.items() if one.worker.fault is not None]

    def find(self, name: str | None, *, classifies: bool) -> Served:
        """The model of a request: by its name, or the first where it names none."""
        if not self.models:
            raise Unanswerable(503, "loading", "the model is still being loaded")
        known = list(self.models)
        found = self.models.get(known[0] if name is None else name)
        if found is None:
            raise Unanswerable(
                404,
                "model_not_found",
                f"there is no model {name!r}{nearest(str(name), known)}. Served: {', '.join(known)}",
            )
        if classifies != (found.classifier is not None):
            told = "writes text: ask /v1/chat/completions" if classifies else "labels texts: ask /classify"
            raise Unanswerable(400, "wrong_endpoint", f"{found.name} {told}")
        return found


class Unanswerable(Exception):
    """A request that gets no answer, and why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class Reply:
    """How an answer is told: as a message, or as text that goes on."""

    kind: Literal["chat", "text"]
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: Finish, usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        return self._document(said | {"finish_reason": finish, "logprobs": None}, part=False) | {"usage": usage}

    def part(self, text: str, finish: Finish | None = None, *, first: bool = False) -> dict[str, Any]:
        """A piece of it."""
        if self.kind == "text":
            said: dict[str, Any] = {"text": text}
        else:
            role = {"role": "assistant"} if first else {}
            said = {"delta": role | ({"content": text} if text or first else {})}
        return self._document(said | {"finish_reason": finish, "logprobs": None}, part=True)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, for clients that want the count."""
        return self._document(None, part=True) | {"usage": usage}

    def _document(self, choice: dict[str, Any] | None, *, part: bool) -> dict[str, Any]:
        names = {"chat": "chat.completion" + (".chunk" if part else ""), "text": "text_completion"}
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": names[self.kind],
            "created": self.created,
            "model": self.model,
            "choices": [] if choice is None else [{"index": 0, **choice}],
        }


class Writing:
    """One answer being written."""

    def __init__(self, served: Served, ask: Ask, stops: list[str], metrics: Metrics) -> None:
        assert served.engine is not None
        self._served, self._engine, self._ask = served, served.engine, ask
        self._stops, self._metrics = stops, metrics
        self.finish: Finish = "stop"
        self.count = 0

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = len(self._ask.tokens)
        return {"prompt_tokens": read, "completion_tokens": self.count, "total_tokens": read + self.count}

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes.

        Raises:
            EngineFault: the engine failed.
        """
        usable, name, started = self._served.usable, self._served.name, time.perf_counter()
        text, ends, ended = TextStream(usable.tokenizer, self._stops), set(usable.stops()), False
        self._metrics.prompt_tokens.labels(name).inc(len(self._ask.tokens))
        try:
            async with aclosing(self._engine.answer(self._ask)) as tokens:
                async for token in tokens:
                    if self.count == 0:
                        self._metrics.first_token.labels(name).observe(time.perf_counter() - started)
                    self.count += 1
                    ended = token in ends
                    piece = "" if ended else text.push(token)
                    if piece:
                        yield piece
                    if text.stopped:
                        return
            self.finish = "stop" if ended else "length"
            if rest := text.rest():
                yield rest
        finally:
            self._metrics.answer_tokens.labels(name).inc(self.count)

    async def whole(self) -> str:
        """All of it."""
        return "".join([piece async for piece in self.pieces()])


def build_app(service: Service, *, key: str | None, closing: Callable[[], bool] = lambda: False) -> Guard:
    """The ASGI application.

    Args:
        key: that clients have to show; None: none, and names of this machine alone.
        closing: whether the server takes nothing new.
    """
    app = FastAPI(title="peftkit", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_watching(app, service, closing)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        served = service.find(asked.model, classifies=False)
        if served.usable.tokenizer.chat_template is None:
            raise Unanswerable(400, "no_chat_template", f"{served.name} has no chat template: ask /v1/completions")
        tokens = served.usable.conversation([message.plain() for message in asked.messages])
        return await _answer(service, served, tokens, asked, request, "chat")

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        served = service.find(asked.model, classifies=False)
        return await _answer(service, served, served.usable.text(asked.prompt), asked, request, "text")

    @app.post("/classify")
    async def classify(asked: ClassifyRequest) -> Response:
        served = service.find(asked.model, classifies=True)
        assert served.classifier is not None
        rows = asked.rows()
        read = sum(served.classifier.tokens(row) for row in rows)
        service.metrics.prompt_tokens.labels(served.name).inc(read)
        found = await served.classifier.classify(rows)
        document = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": served.name,
            "data": [{"index": index} | one for index, one in enumerate(found)],
            "usage": {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read},
        }
        return JSONResponse(document)

    return Guard(app, key=key, limits=service.limits, metrics=service.metrics, closing=closing)


def _add_watching(app: FastAPI, service: Service, closing: Callable[[], bool]) -> None:
    """What is served, whether it lives, whether it takes requests, and its counts."""

    @app.get("/v1/models")
    async def models() -> Response:
        known = [
            {"id": name, "object": "model", "created": one.created, "owned_by": "peftkit"}
            for name, one in service.models.items()
        ]
        return JSONResponse({"object": "list", "data": known})

    @app.get("/health")
    async def health() -> Response:
        faults = service.faults
        return JSONResponse({"status": "unhealthy" if faults else "ok", "faults": faults}, 503 if faults else 200)

    @app.get("/ready")
    async def ready() -> Response:
        reason = "closing" if closing() else "loading" if not service.models else "; ".join(service.faults)
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every error as OpenAI's clients read it."""

    @app.exception_handler(Unanswerable)
    async def unanswerable(request: Request, fault: Unanswerable) -> Response:
        return JSONResponse(error_document(str(fault), fault.code), fault.status)

    @app.exception_handler(InputError)
    async def wrong(request: Request, fault: InputError) -> Response:
        return JSONResponse(error_document(str(fault), "invalid_input"), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> Response:
        places = [(".".join(map(str, one["loc"][1:])) or "the body", one["msg"]) for one in fault.errors()]
        told = "; ".join(f"{place}: {message.removeprefix('Value error, ')}" for place, message in places)
        return JSONResponse(error_document(told, "invalid_request"), 400)

    @app.exception_handler(EngineFault)
    async def failed(request: Request, fault: EngineFault) -> Response:
        return JSONResponse(error_document(str(fault), "engine", kind="server_error"), 503)

    @app.exception_handler(404)
    async def unknown(request: Request, fault: Any) -> Response:
        return JSONResponse(error_document(f"there is no {request.url.path}", "not_found"), 404)


async def _answer(
    service: Service, served: Served, tokens: list[int], asked: Sampled, request: Request, kind: Literal["chat", "text"]
) -> Response:
    """The response to a request for text, at once or in pieces."""
    ask = _admitted(served, tokens, asked, service.limits)
    writing = Writing(served, ask, asked.stops(), service.metrics)
    reply = Reply(kind, served.name)
    if not asked.stream:
        text = await _unless_gone(request, writing)
        if text is None:
            return Response(status_code=499)
        return JSONResponse(reply.whole(text, writing.finish, writing.usage))
    counted = asked.stream_options is not None and asked.stream_options.include_usage

    async def events() -> AsyncGenerator[str, None]:
        try:
            if kind == "chat":
                yield _event(reply.part("", first=True))
            async with aclosing(writing.pieces()) as pieces:
                async for piece in pieces:
                    yield _event(reply.part(piece))
            yield _event(reply.part("", writing.finish))
            if counted:
                yield _event(reply.usage(writing.usage))
        except EngineFault as fault:
            yield _event(error_document(str(fault), "engine", kind="server_error"))
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


def _admitted(served: Served, tokens: list[int], asked: Sampled, limits: Limits) -> Ask:
    """What the engine is asked, within the limits."""
    engine = served.engine
    assert engine is not None
    room = engine.limit - len(tokens)
    if not tokens or room < 1:
        told = f"the prompt has {len(tokens)} tokens, and with its answer may have {engine.limit}"
        raise Unanswerable(400, "context_length_exceeded", told if tokens else "the prompt is empty")
    wanted = asked.wanted_tokens()
    most = min(room, limits.new_tokens)
    if wanted is not None and wanted > most:
        told = f"{wanted} tokens are asked for, and this answer may have {most} (the prompt has {len(tokens)})"
        raise Unanswerable(400, "context_length_exceeded", told)
    if asked.seed is not None and asked.temperature > 0 and not engine.seeds:
        raise Unanswerable(400, "invalid_request", "seed: requests are batched; temperature=0 gives repeatable answers")
    return Ask(tokens, wanted or most, asked.temperature, asked.top_p, asked.seed)


async def _unless_gone(request: Request, writing: Writing) -> str | None:
    """The whole answer; None where the client has hung up, and then no more is written."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.create_task(writing.whole()), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
