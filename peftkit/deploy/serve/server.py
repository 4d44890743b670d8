"""Serve on this machine: bind, load, answer, and at a signal finish what runs."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import psutil
import torch
import uvicorn

from peftkit.deploy.serve.app import Served, Service, build_app
from peftkit.deploy.serve.classifier import Classifier
from peftkit.deploy.serve.engine import CACHE_SHARE, open_engine
from peftkit.deploy.serve.options import Address, Limits, Menu
from peftkit.deploy.usable import Usable, open_together, open_usable
from peftkit.errors import InputError, PeftkitError

LONGEST_TOKENS = 4096
"""Of a prompt with its answer, where neither the model nor the command line says less."""


def serve(
    menu: Menu,
    address: Address,
    limits: Limits,
    *,
    grace_seconds: int = 60,
    say: Callable[[str], None],
    opened: Callable[[dict[str, Any]], None],
) -> None:
    """Serve until a signal comes. What then runs is finished, for at most `grace_seconds`; nothing new is taken.

    Args:
        say: told what is being done.
        opened: told once, when requests are taken: `url`, `models`, `engine`, `device`, `dtype`, `limit_tokens`.

    Raises:
        InputError: the port is in use, or there is nothing to serve.
    """
    bound = _bind(address)
    service = Service(limits)
    server: uvicorn.Server

    def closing() -> bool:
        return server.should_exit

    app = build_app(service, key=address.key, closing=closing)
    settings: dict[str, Any] = {"access_log": False, "log_level": logging.WARNING, "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=grace_seconds, **settings))
    # uvicorn raises the signal again when it has shut down: this process has done what was asked
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(_run(server, bound, menu, service, say, opened))
    finally:
        bound.close()
        for number, handler in before.items():
            signal.signal(number, handler)


async def _run(
    server: uvicorn.Server,
    bound: socket.socket,
    menu: Menu,
    service: Service,
    say: Callable[[str], None],
    opened: Callable[[dict[str, Any]], None],
) -> None:
    """Answer from the first moment on, with models when they are there."""
    answering = asyncio.create_task(server.serve(sockets=[bound]))
    say(f"loading {menu.reference}")
    try:
        service.models = await asyncio.to_thread(open_models, menu, service.limits, say)
        if not server.should_exit:
            opened(describe(service, bound))
        await answering
    finally:
        server.should_exit = True
        await answering
        say("finished what was running; closed")
        for served in service.models.values():
            await asyncio.to_thread(served.worker.stop)


def open_models(menu: Menu, limits: Limits, say: Callable[[str], None]) -> dict[str, Served]:
    """Everything on the menu, loaded and with its engine running.

    Raises:
        InputError: it cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if menu.adapters:
        loaded = open_together(menu.reference, menu.adapters, name=menu.name, device=device)
    else:
        loaded = {menu.name: open_usable(menu.reference, device=device)}
    cache_bytes = int(CACHE_SHARE * _free_bytes(device)) // len(loaded)
    found: dict[str, Served] = {}
    try:
        for name, usable in loaded.items():
            found[name] = _open(name, usable, limits, cache_bytes, say)
    except PeftkitError:
        for served in found.values():
            served.worker.stop()
        raise
    return found


def describe(service: Service, bound: socket.socket) -> dict[str, Any]:
    """Where it is, and what answers there."""
    host, port = bound.getsockname()[:2]
    first = next(iter(service.models.values()))
    return {
        "url": f"http://{f'[{host}]' if ':' in host else host}:{port}",
        "models": list(service.models),
        "engine": first.worker.name,
        "device": str(first.usable.backbone.model.device),
        "dtype": str(first.usable.backbone.compute_dtype).removeprefix("torch."),
        "limit_tokens": first.worker.limit,
        "classifies": first.classifier is not None,
    }


def _open(name: str, usable: Usable, limits: Limits, cache_bytes: int, say: Callable[[str], None]) -> Served:
    longest = (usable.backbone.dims.max_positions or LONGEST_TOKENS) - usable.virtual_tokens
    limit = limits.tokens or min(longest, LONGEST_TOKENS)
    if limit > longest:
        raise InputError(f"--max-tokens {limit}: {name} takes {longest} tokens at most.")
    if usable.kind == "classify":
        return Served(name, usable, classifier=Classifier(usable, limit=limit))
    penalty = usable.backbone.model.generation_config.repetition_penalty
    if penalty not in (None, 1.0):
        say(f"warning: {name} asks for repetition_penalty={penalty} in its generation_config; it is not applied")
    usable.backbone.model.generation_config.repetition_penalty = None
    return Served(name, usable, engine=open_engine(usable, limit=limit, cache_bytes=cache_bytes, say=say))


def _bind(address: Address) -> socket.socket:
    """The socket, held before anything is loaded.

    Raises:
        InputError: the address is in use, or not this machine's.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
    except (OSError, OverflowError) as fault:
        if bound is not None:
            bound.close()
        reason = getattr(fault, "strerror", None) or str(fault)
        raise InputError(
            f"cannot listen on {address.host}:{address.port}: {reason}. Choose another --port (0: any that is free)."
        ) from fault
    return bound


def _free_bytes(device: str) -> int:
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)
