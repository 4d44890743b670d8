"""How a thread of the processor waits for the next piece of work: awake for a moment on a quiet machine, asleep on a
busy one.

A step is thousands of short operations. A thread that sleeps between them is woken too late each time, which costs a
fifth of the step; one that stays awake without limit takes the core from whoever else needs it, and two such runs
hardly move. So waiting threads sleep, after `SPINS` looks for work where the cores were idle.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Final

SPINS: Final = 5000
"""Looks of a waiting thread, about a tenth of a millisecond in all."""
IDLE: Final = 0.8
"""Share of the processor's time that a quiet machine leaves idle."""
LOOK_SECONDS: Final = 0.1
WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def settle(environment: MutableMapping[str, str] = os.environ, *, idle: Callable[[], float] | None = None) -> None:
    """Set how threads wait, for this process before torch is loaded and for those that it starts.

    A variable that somebody set already means what it says, and nothing is changed beside it. OpenMP reads them once,
    when it is loaded: later it is too late.

    Args:
        idle: the share of the processor's time that nobody uses now; a tenth of a second's look by default.
    """
    if any(name in environment for name in WAITING) or (environment is os.environ and "torch" in sys.modules):
        return
    environment["OMP_WAIT_POLICY"] = "passive"
    if (idle or idle_share)() >= IDLE:
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def idle_share() -> float:
    """The share of all processors' time that was idle over a tenth of a second."""
    import psutil

    return 1.0 - float(psutil.cpu_percent(interval=LOOK_SECONDS)) / 100
