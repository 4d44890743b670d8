"""An endpoint for labels: each client gets its own text's, scored as the model itself scores it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import Running, running

from peftkit.deploy.generate import generate
from peftkit.deploy.serve.app import Service
from peftkit.errors import InputError

TEXTS = [f"a film about the number {number}" + " and its friends" * (number % 4) for number in range(30)]


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary transformers classifier of three labels, not made by us."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "judge"
    torch.manual_seed(0)
    labels = {0: "bad", 1: "good", 2: "mixed"}
    config = BertConfig.from_pretrained(tiny_bert, num_labels=3, id2label=labels)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(open_service: Callable[..., Service], classifier: Path) -> Iterator[Running]:
    from peftkit.deploy.serve.options import Limits

    with running(open_service(classifier, Limits(tokens=64), name="judge")) as found:
        yield found


@pytest.fixture(scope="module")
def probabilities(classifier: Path) -> Callable[..., list[float]]:
    """What transformers' own model says of a text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)

    @torch.inference_mode()
    def score(*texts: str) -> list[float]:
        found: list[float] = model(**tokenizer(*texts, return_tensors="pt")).logits.softmax(-1)[0].tolist()
        return found

    return score


def test_clients_at_once_each_get_the_probabilities_of_their_own_text(
    server: Running, probabilities: Callable[..., list[float]]
) -> None:
    async def together() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            made = await asyncio.gather(*[client.post("/classify", json={"input": text}) for text in TEXTS])
            return [one.json()["data"][0] for one in made]

    found = asyncio.run(together())
    expected = [probabilities(text) for text in TEXTS]
    assert len({tuple(scores) for scores in expected}) == len(TEXTS)
    for one, scores in zip(found, expected, strict=True):
        assert one["probs"] == pytest.approx(scores, abs=1e-5)  # rounded to six digits
        assert one["label"] == ("bad", "good", "mixed")[one["probs"].index(max(one["probs"]))]


def test_a_list_keeps_its_order_and_pairs_stand_beside_single_texts(
    server: Running, probabilities: Callable[..., list[float]]
) -> None:
    pair = {"text": "a dull script", "text_pair": "but a wonderful cast"}
    document = server.post("/classify", json={"model": "judge", "input": [TEXTS[0], pair, TEXTS[1]]}).json()
    expected = [probabilities(TEXTS[0]), probabilities(*pair.values()), probabilities(TEXTS[1])]
    assert [one["index"] for one in document["data"]] == [0, 1, 2]
    for one, scores in zip(document["data"], expected, strict=True):
        assert one["probs"] == pytest.approx(scores, abs=1e-5)
    assert document["usage"]["total_tokens"] > 20


def test_what_cannot_be_classified_is_refused(server: Running) -> None:
    long = server.post("/classify", json={"input": ["short", "long " * 100]})
    assert (long.status_code, long.json()["error"]["message"]) == (
        400,
        "the text has 102 tokens, and the longest may have 64",
    )
    chat = server.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert "judge labels texts: ask /classify" in chat.json()["error"]["message"]


def test_a_classifier_writes_no_text(classifier: Path) -> None:
    with pytest.raises(InputError, match="it does not write text"):
        generate(classifier, "Hello")
