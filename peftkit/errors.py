"""Everything a user can be told, as one tree.

    PeftkitError                  exit 1: it ran and failed
    ├── InputError                exit 2: the input is wrong; nothing was run, nothing written
    │   ├── RecipeError           a recipe's faults, all at once
    │   ├── DataError             a data source, a file, a row
    │   ├── BackboneError         a model reference or its files
    │   ├── MethodError           a method that cannot work on this backbone or task
    │   └── OutputError           a folder that cannot be written, or that holds another run
    ├── DoesNotFit                exit 3: the plan says that the run cannot fit; nothing was run
    ├── DeviceBusy                the memory that the run needs is in use; nothing was run
    ├── Diverged                  the loss is not finite
    ├── OutOfMemory               the device or the machine ran out
    ├── GuardTripped              training ran, but not what was asked for (weights that did not move, ...)
    └── VerificationFailed        a merged model that does not answer like its adapter

A message says what, where and the remedy. The command line prints it and exits with `exit_code`, without a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

DOES_NOT_FIT = 3
"""Exit code of a plan that does not fit, and of a run that is not started because of it."""


class PeftkitError(Exception):
    """The root: a failure with a message meant for a person."""

    exit_code = 1


class InputError(PeftkitError):
    """The input is wrong; no work was started."""

    exit_code = 2


class RecipeError(InputError):
    """One or more faults of a recipe, collected and raised together."""

    def __init__(self, where: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(f"{where} has {len(self.faults)} fault{'s'[: len(self.faults) != 1]}:{lines}")


class DataError(InputError):
    """A data source cannot be read, or one of its examples is unusable."""


class BackboneError(InputError):
    """A model reference cannot be resolved, fetched or loaded."""


class MethodError(InputError):
    """The method cannot work on this backbone, task or quantization."""


class OutputError(InputError):
    """The output folder cannot be used."""


class DoesNotFit(PeftkitError):
    """The planner says that the run needs more memory than there is; no work was started."""

    exit_code = DOES_NOT_FIT


class DeviceBusy(PeftkitError):
    """Something else holds the device's memory; no work was started."""


class Diverged(PeftkitError):
    """The loss or a gradient stopped being a finite number."""


class OutOfMemory(PeftkitError):
    """The device, or the machine, ran out of memory."""


class GuardTripped(PeftkitError):
    """A check of the first steps found that the run is not doing what the recipe asks."""


class VerificationFailed(PeftkitError):
    """The merged model does not answer like the adapter it was made from."""


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing when none is near."""
    found = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
