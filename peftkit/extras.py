"""Packages that only some verbs need, loaded when asked for."""

from __future__ import annotations

from typing import Any

from peftkit.errors import InputError


def load_optuna(wanted_by: str) -> Any:
    """The optuna package, silent about single trials.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
    except ImportError as fault:
        raise InputError(f"{wanted_by} needs optuna. Install it: pip install 'peftkit[search]'.") from fault
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
