"""One example as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True, slots=True)
class Features:
    """Tokens, target and weight of one example.

    Attributes:
        input_ids: [T] token ids.
        target: [T] token ids with `IGNORED` where no loss is (token tasks; `target[t]` is the token at t itself, not
            the next one); a class index, a float, or a multi-hot vector [num_labels] (sequence tasks).
        loss_units: what a mean loss is a mean over: labelled tokens that have a predecessor, or 1 a sequence.
        row: index of the example in its table.
        token_type_ids: [T] segment ids for backbones that have them.
    """

    input_ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32] | npt.NDArray[np.float32] | int | float
    loss_units: int
    row: int
    token_type_ids: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)
