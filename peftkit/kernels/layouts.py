"""The architectures whose blocks the fast paths know. Every other one runs on its own modules, and says so.

An architecture belongs here when its position enters through `position_ids` and its attention through transformers'
attention interface alone, so that examples can lie end to end; a test runs each one packed and padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class EncoderLayout:
    """How an encoder with a classification head takes its first token.

    Attributes:
        pooling: path of the module that is given the hidden states and takes the first row of each example.
        padded_positions: whether positions count from one after the padding token's index, as RoBERTa's do.
    """

    pooling: str
    padded_positions: bool = False

    def first_position(self, model: Any) -> int:
        """The position of an example's first token."""
        return int(model.config.pad_token_id) + 1 if self.padded_positions else 0


DECODERS: Final = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
ENCODERS: Final = {
    "bert": EncoderLayout("bert.pooler"),
    "electra": EncoderLayout("classifier"),
    "roberta": EncoderLayout("classifier", padded_positions=True),
    "xlm-roberta": EncoderLayout("classifier", padded_positions=True),
}


def model_type(model: Any) -> str:
    """The architecture's name in its configuration; of the text part where there are several."""
    return str(model.config.get_text_config().model_type)
