"""A classifier that answers many clients at once: what waits is scored together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from peftkit.data.spec import DataSpec
from peftkit.data.table import Table
from peftkit.deploy.serve.schema import TextPair
from peftkit.deploy.usable import Usable
from peftkit.errors import InputError
from peftkit.tasks.base import Prediction
from peftkit.train.scoring import predict

BATCH_TOKENS = 4096
"""Most tokens of one forward, padding included."""
NO_DATA = DataSpec(train="-")
"""The rows are given, none are read."""


class Classifier:
    """Scores texts as `peftkit eval` does.

    Attributes:
        limit: tokens of the longest text.
    """

    name = "transformers, what waits together in one forward"
    fault: str | None = None

    def __init__(self, usable: Usable, *, limit: int) -> None:
        assert usable.task is not None, "it classifies"
        self.limit = limit
        self._usable, self._task = usable, usable.task
        self._head = usable.backbone.dims.head
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="classify")
        self._waiting: list[tuple[Sequence[TextPair], asyncio.Future[list[Prediction]]]] = []
        self._runner: asyncio.Task[None] | None = None

    def tokens(self, row: TextPair) -> int:
        """How many tokens a text is.

        Raises:
            InputError: too many.
        """
        count = len(self._usable.tokenizer(row.text, row.text_pair, verbose=False)["input_ids"])
        if count > self.limit:
            raise InputError(f"the text has {count} tokens, and the longest may have {self.limit}")
        return count

    async def classify(self, rows: Sequence[TextPair]) -> list[dict[str, Any]]:
        """For each text its label (or labels, or number) and the probability of each."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, mine))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return [self._named(prediction) for prediction in await mine]

    def stop(self) -> None:
        """Finish what runs."""
        self._worker.shutdown(wait=True)

    async def _run(self) -> None:
        """Score what waits until nothing does."""
        while self._waiting:
            taken, self._waiting = self._waiting, []
            work = self._worker.submit(self._score, [row for rows, _ in taken for row in rows])
            await asyncio.wait([asyncio.wrap_future(work)])
            fault, start = work.exception(), 0
            for rows, client in taken:
                end = start + len(rows)
                if fault and not client.done():  # done: it has gone
                    client.set_exception(fault)
                elif not client.done():
                    client.set_result(work.result()[start:end])
                start = end

    def _score(self, rows: Sequence[TextPair]) -> list[Prediction]:
        """Predictions in order. Single texts and pairs are tokenized apart: a table with one pair is all pairs."""
        found: dict[int, Prediction] = {}
        for paired in (False, True):
            mine = [index for index, row in enumerate(rows) if (row.text_pair is not None) == paired]
            if mine:
                found |= zip(mine, self._predict([rows[index] for index in mine]), strict=True)
        return [found[index] for index in range(len(rows))]

    def _predict(self, rows: Sequence[TextPair]) -> list[Prediction]:
        some_label: dict[str, Any] = {"regression": 0.0, "multi_label_classification": []}
        label = some_label[str(self._head.problem)] if self._head.problem in some_label else self._head.labels[0]
        content = [{**row.model_dump(), "label": label} for row in rows]
        table = Table(content, [f"input {index}" for index in range(len(rows))], "")
        usable = self._usable
        dims, tokenizer = usable.backbone.dims, usable.tokenizer
        features = self._task.encode(table, tokenizer, dims, NO_DATA, max_tokens=self.limit).features
        pad = int(tokenizer.pad_token_id or 0)
        return predict(usable.adapted, self._task, features, pad_id=pad, max_tokens=BATCH_TOKENS)

    def _named(self, prediction: Prediction) -> dict[str, Any]:
        labels, scores, decided = self._head.labels, prediction["scores"], prediction["prediction"]
        if self._head.problem == "regression":
            return {"label": None, "value": decided, "probs": []}
        if self._head.problem == "multi_label_classification":
            named: Any = [label for label, given in zip(labels, decided, strict=True) if given]
        else:
            named = labels[decided]
        return {"label": named, "probs": scores, "num_classes": len(labels)}
