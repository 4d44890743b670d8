"""What a server is told: what it serves, where, to whom, and how much. Imports nothing heavy."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftkit.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all together, may ask for.

    Attributes:
        tokens: of a prompt with its answer; None: what the model takes.
        new_tokens: of one answer.
        requests: answered at a time, those that wait for a place among them included.
        body_bytes: of one request.
        body_seconds: in which a request's body has to arrive.
    """

    tokens: int | None = None
    new_tokens: int = 1024
    requests: int = 256
    body_bytes: int = 2**20
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, and what clients have to show."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Menu:
    """What is served: a model by its name, and adapters on it by theirs."""

    reference: str
    name: str
    adapters: Mapping[str, Path]


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, reached from itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_key(address: Address) -> None:
    """Refuse to listen where others can reach it, without a key.

    Raises:
        InputError: no key elsewhere than on loopback, or one that no header can carry.
    """
    if address.key is None and not is_loopback(address.host):
        raise InputError(
            f"--host {address.host} can be reached from other machines, so it needs an API key: set PEFTKIT_API_KEY "
            "or pass --api-key. Without one, leave --host out: 127.0.0.1."
        )
    if address.key is not None and not (address.key.isascii() and address.key.isprintable() and address.key.strip()):
        raise InputError("the API key must be printable ASCII, and not empty.")
