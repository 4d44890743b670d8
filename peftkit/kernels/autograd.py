"""The one door to torch's autograd functions, whose `apply` is untyped."""

from __future__ import annotations

from typing import Any

from torch.autograd import Function


def apply(function: type[Function], *inputs: Any) -> Any:
    """What the function's forward gives, with its backward recorded."""
    return function.apply(*inputs)  # type: ignore[no-untyped-call]  # torch leaves it untyped
