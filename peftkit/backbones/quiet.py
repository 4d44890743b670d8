"""Load models without transformers' chatter; what matters of it is said by peftkit itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, warnings, and its report of heads that are new on purpose."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def hush_bitsandbytes() -> None:
    """Keep bitsandbytes from saying, as it is loaded, which of its kernels for this processor are not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
