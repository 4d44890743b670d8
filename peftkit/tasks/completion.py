"""Completion: prompt and completion with loss on the completion, or plain text with loss on all of it."""

from __future__ import annotations

from typing import Any

from peftkit.backbones.dims import Dims
from peftkit.backbones.load import Backbone
from peftkit.data.chat import encode_completion
from peftkit.data.features import IGNORED, Features
from peftkit.data.spec import DataSpec
from peftkit.data.table import Row, Table
from peftkit.tasks.base import EncodedExample, FeatureSet, Prediction, encode_table
from peftkit.tasks.language import LanguageTask
from peftkit.tasks.spec import Completion


class CompletionTask(LanguageTask):
    """Text that goes on."""

    def __init__(self, spec: Completion) -> None:
        self.spec = spec

    def encode(self, table: Table, tokenizer: Any, dims: Dims, data: DataSpec, *, max_tokens: int) -> FeatureSet:
        return encode_table(table, lambda index, row: self._encode(index, row, tokenizer, max_tokens), data)

    def prompt(
        self, backbone: Backbone, table: Table, demonstrations: Table, *, shots: int, data: DataSpec, max_tokens: int
    ) -> list[Prediction] | FeatureSet:
        """Each prompt after `shots` whole examples, blank lines between."""
        shown = [row["prompt"] + self.spec.separator + row["completion"] for row in list(demonstrations)[:shots]]
        preface = "".join(text + "\n\n" for text in shown)
        room = min(max_tokens * (1 + shots), backbone.dims.max_positions or max_tokens * (1 + shots))

        def encode(index: int, row: Row) -> EncodedExample:
            return self._encode(index, {**row, "prompt": preface + row["prompt"]}, backbone.tokenizer, room)

        return encode_table(table, encode, data)

    def _encode(self, index: int, row: Row, tokenizer: Any, max_tokens: int) -> EncodedExample:
        encoded = encode_completion(
            row["prompt"], row["completion"], tokenizer, separator=self.spec.separator, max_tokens=max_tokens
        )
        units = int((encoded.target[1:] != IGNORED).sum())
        return EncodedExample(
            Features(encoded.input_ids, encoded.target, units, index), encoded.truncated, encoded.answer_cut
        )
