"""Chat: supervised finetuning on conversations, loss on the assistant's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone
from peftkit.data.chat import encode_conversation
from peftkit.data.features import IGNORED, Features
from peftkit.data.spec import DataSpec
from peftkit.data.table import Row, Table
from peftkit.errors import DataError, InputError
from peftkit.tasks.base import EncodedExample, FeatureSet, Prediction, encode_table
from peftkit.tasks.language import LanguageTask
from peftkit.tasks.spec import Chat


class ChatTask(LanguageTask):
    """Conversations rendered by the tokenizer's chat template."""

    def __init__(self, spec: Chat) -> None:
        self.spec = spec

    def encode(self, table: Table, tokenizer: Any, dims: Dims, data: DataSpec, *, max_tokens: int) -> FeatureSet:
        templated = self._templated(tokenizer)
        return encode_table(table, lambda index, row: self._encode(index, row, templated, max_tokens), data)

    def prompt(
        self, backbone: Backbone, table: Table, demonstrations: Table, *, shots: int, data: DataSpec, max_tokens: int
    ) -> list[Prediction] | FeatureSet:
        """Each conversation with `shots` training conversations before it; only its own answers are scored."""
        tokenizer = self._templated(backbone.tokenizer)
        turns = [
            message
            for row in list(demonstrations)[:shots]
            for message in row["messages"]
            if message["role"] != "system"
        ]
        room = min(max_tokens * (1 + shots), backbone.dims.max_positions or max_tokens * (1 + shots))

        def encode(index: int, row: Row) -> EncodedExample:
            alone = self._encode(index, row, tokenizer, max_tokens)
            system = [message for message in row["messages"] if message["role"] == "system"]
            rest = [message for message in row["messages"] if message["role"] != "system"]
            whole = self._encode(index, {"messages": [*system, *turns, *rest]}, tokenizer, room)
            return EncodedExample(
                _keep_last(whole.features, alone.features.loss_units), whole.truncated, whole.answer_cut
            )

        return encode_table(table, encode, data)

    def _encode(self, index: int, row: Row, tokenizer: Any, max_tokens: int) -> EncodedExample:
        encoded = encode_conversation(
            row["messages"], tokenizer, train_on=self.spec.train_on, system=self.spec.system, max_tokens=max_tokens
        )
        units = int((encoded.target[1:] != IGNORED).sum())
        features = Features(encoded.input_ids, encoded.target, units, index)
        return EncodedExample(features, encoded.truncated, encoded.answer_cut)

    def _templated(self, tokenizer: Any) -> Any:
        if self.spec.template is not None:
            path = Path(self.spec.template)
            if not path.is_file():
                raise InputError(f"task.template: there is no file {path}.")
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        if tokenizer.chat_template is None:
            raise DataError(
                "this backbone's tokenizer has no chat template, so conversations cannot be rendered. "
                "Set task.template to a Jinja file, or use an instruction-tuned backbone."
            )
        return tokenizer


def _keep_last(features: Features, count: int) -> Features:
    """Loss on the last `count` labelled tokens alone."""
    target = np.array(features.target, dtype=np.int32)
    labelled = np.flatnonzero(target != IGNORED)
    target[labelled[: len(labelled) - count]] = IGNORED
    return Features(features.input_ids, target, min(count, len(labelled)), features.row)
