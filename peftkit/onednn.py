"""How many compiled matrix products oneDNN keeps for the next one of the same shape.

torch's bfloat16 products on a processor are compiled for each shape, and two caches, oneDNN's own and that of torch's
wrapper around it, keep 1,024 of them, at half a megabyte and more each. Every forward of unpadded examples has another
number of tokens, so a run fills both with what it never meets again: hundreds of megabytes. The shapes that one
forward and its backward repeat from layer to layer are few dozen.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

KEPT: Final = 64
"""Products in each cache: within some hundredths of the speed of 1,024 (`benchmarks/step_profile.py --ablate`)."""
CAPACITIES: Final = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_caches(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bound both caches for this process before its first product; a bound that somebody set stands."""
    for name in CAPACITIES:
        environment.setdefault(name, str(KEPT))
