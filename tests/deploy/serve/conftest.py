"""Services with tiny models, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from serving import Running, running

from peftkit.deploy.serve.app import Service
from peftkit.deploy.serve.options import Limits, Menu
from peftkit.deploy.serve.server import open_models

SMALL = Limits(tokens=256, new_tokens=64)


@pytest.fixture(scope="module", autouse=True)
def in_float32() -> Iterator[None]:
    """No bfloat16, whatever the processor can do: there, answers part ways at near ties with whoever else is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        yield


@pytest.fixture(scope="module")
def open_service(in_float32: None) -> Iterator[Callable[..., Service]]:
    """Loads a model, and adapters on it by name, with their engines; these are stopped at the end."""
    services: list[Service] = []

    def open_(reference: Path, limits: Limits = SMALL, *, name: str = "tiny", **adapters: Path) -> Service:
        service = Service(limits)
        services.append(service)
        service.models = open_models(Menu(str(reference), name, adapters), limits, lambda text: None)
        return service

    yield open_
    for service in services:
        for served in service.models.values():
            served.worker.stop()


@pytest.fixture(scope="module")
def tiny_server(open_service: Callable[..., Service], tiny_llama: Path) -> Iterator[Running]:
    """The tiny chat model."""
    with running(open_service(tiny_llama)) as found:
        yield found
